"""Batches: which triplet, which noise and which noise level a step trains on.

Every draw is a function of (seed, step, slot), a slot being a place in the global batch. So a resumed run is
the same run, and so is a run on another number of processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from registry.digest import Digest
from registry.manifest import ConditioningSpec
from serving.conditioning import blend
from serving.pipelines.base import PromptEmbeds
from trainer.data.cache import TensorCache, latent_key, prompt_key
from trainer.data.triplets import Dataset, Triplet
from trainer.errors import DataError
from trainer.recipe import OptimiserSection

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """P pairs: rows 0..P-1 are the members a, rows P..2P-1 the members b in the same order.

    Attributes:
        target: latents of the wanted pictures [2P, T, C].
        source: latents of the neutral pictures [2P, T, C].
        noise: the same for both members of a pair [2P, T, C].
        sigma: noise level [2P] in (0, 1), the same for both members.
        prompts: interpolated conditioning of 2P rows.
        images: row of each wanted picture in the dataset, 2P numbers.
        keeps: whether a row asks for nothing and wants the source itself, 2P values.
    """

    target: torch.Tensor
    source: torch.Tensor
    noise: torch.Tensor
    sigma: torch.Tensor
    prompts: PromptEmbeds
    images: tuple[int, ...]
    keeps: tuple[bool, ...]

    @property
    def noisy(self) -> torch.Tensor:
        """The model's input x_s = (1 - s) x_0 + s noise, [2P, T, C]."""
        s = self.sigma[:, None, None]
        return (1 - s) * self.target + s * self.noise


def generator(*path: int | str) -> torch.Generator:
    """Return a fresh generator for a place named by ``path``, for example (seed, step, slot)."""
    digest = hashlib.sha256("/".join(map(str, path)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class TrainingSet:
    """One split of a dataset with its cached latents and embeddings in memory."""

    def __init__(
        self,
        dataset: Dataset,
        cache: TensorCache,
        encoder: Digest,
        spec: ConditioningSpec,
        settings: OptimiserSection,
        split: str = "train",
        device: torch.device | str = "cpu",
    ) -> None:
        self.triplets = [triplet for triplet in dataset.triplets if triplet.split == split]
        if not self.triplets:
            raise DataError(f"the dataset has no triplets for {split}", f"give data.{split} more people")
        self._spec, self._settings = spec, settings
        rows = {row for t in self.triplets for row in (t.source, t.a.image, t.b.image)}
        order = sorted(rows)
        latents = cache.get([latent_key(encoder, dataset.image_digests[row]) for row in order])
        self._latents = torch.stack(latents).float().to(device)
        self._place = {row: number for number, row in enumerate(order)}
        self._prompt_place, self._prompts = self._read_prompts(dataset, cache, encoder, device)
        names = spec.expressions
        self._with = [
            [t for t in self.triplets if name in (t.a.expression, t.b.expression)] for name in names
        ]
        self._with = [found for found in self._with if found]

    def _read_prompts(
        self, dataset: Dataset, cache: TensorCache, encoder: Digest, device: torch.device | str
    ) -> tuple[dict[int, int], torch.Tensor]:
        """Return source row -> place, and embeddings [S, 1 + K, L, D] with the neutral prompt first."""
        words = (self._spec.neutral, *self._spec.expressions)
        sources = sorted({triplet.source for triplet in self.triplets})
        digests = [dataset.image_digests[row] for row in sources]
        found = cache.get(
            [prompt_key(encoder, digest, self._spec.prompt(word)) for digest in digests for word in words]
        )
        lengths = {word: len(value) for word, value in zip(words, found, strict=False)}
        if len({len(value) for value in found}) > 1:
            raise DataError(
                f"the prompts have different numbers of tokens: {lengths}",
                "change conditioning.template or its words: only prompts of one length can be interpolated",
            )
        stacked = torch.stack(found).float().to(device).unflatten(0, (len(sources), len(words)))
        return {row: number for number, row in enumerate(sources)}, stacked

    def draw(self, seed: int, step: int, slots: Sequence[int]) -> Batch:
        """Return the batch of some slots of a step; both members of a pair share noise and noise level."""
        chosen: list[tuple[Triplet, bool, bool]] = []
        noise, sigma = [], []
        for slot in slots:
            source = generator(seed, step, slot)
            u = torch.rand(6, generator=source).tolist()
            found = self._with[int(u[0] * len(self._with))]
            triplet = found[int(u[1] * len(found))]
            chosen.append((triplet, u[2] < self._settings.keep_share, u[3] < self._settings.keep_share))
            sigma.append(self._noise_level(u[4], u[5], source))
            noise.append(torch.randn(self._latents.shape[1:], generator=source))
        return self._collate(chosen, noise, sigma)

    def _noise_level(self, choice: float, uniform: float, source: torch.Generator) -> float:
        normal = float(torch.randn((), generator=source))
        if choice >= self._settings.sigma_uniform:
            uniform = float(torch.sigmoid(torch.tensor(normal + self._settings.sigma_shift)))
        return min(0.998, max(0.002, uniform))

    def _collate(
        self, chosen: Sequence[tuple[Triplet, bool, bool]], noise: list[torch.Tensor], sigma: list[float]
    ) -> Batch:
        sources = [triplet.source for triplet, _, _ in chosen] * 2
        members = [triplet.a for triplet, _, _ in chosen] + [triplet.b for triplet, _, _ in chosen]
        keeps = [keep for _, keep, _ in chosen] + [keep for _, _, keep in chosen]
        images = [
            source if keep else member.image
            for source, member, keep in zip(sources, members, keeps, strict=True)
        ]
        levels = [0.0 if keep else member.intensity for member, keep in zip(members, keeps, strict=True)]
        like = self._latents
        return Batch(
            target=like[[self._place[row] for row in images]],
            source=like[[self._place[row] for row in sources]],
            noise=torch.stack(noise).to(like).repeat(2, 1, 1),
            sigma=torch.tensor(sigma).to(like).repeat(2),
            prompts=self._conditioning(sources, [member.expression for member in members], levels),
            images=tuple(images),
            keeps=tuple(keeps),
        )

    def _conditioning(
        self, sources: Sequence[int], expressions: Sequence[str], intensities: Sequence[float]
    ) -> PromptEmbeds:
        """Return what serving would give the model for these requests: the very same function."""
        people = [self._prompt_place[row] for row in sources]
        words = [1 + self._spec.expressions.index(name) for name in expressions]
        embeds = blend(
            self._prompts[people, 0],
            self._prompts[people, words].unsqueeze(1),
            torch.tensor(intensities, device=self._prompts.device)[:, None],
            self._spec.token_window,
        )
        return PromptEmbeds(embeds=embeds, mask=embeds.new_ones(embeds.shape[:2], dtype=torch.bool))


def as_pixels(images: np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return uint8 pictures [N, H, W, 3] as float pixels [N, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
