"""Batches: which triplet, which noise and which noise level a step trains on.

Every draw is a function of (seed, step, slot), a slot being a place in the global batch. So a resumed run is
the same run, and so is a run on another number of processes or with other micro-batches. `TrainingSet.plan`
draws what a whole step consists of, which costs next to nothing; `TrainingSet.batch` makes tensors of a part.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from registry.digest import Digest
from serving.conditioning import blend
from serving.pipelines.base import PromptEmbeds, Size
from trainer.data.cache import TensorCache, latent_key, prompt_key
from trainer.data.triplets import Dataset, Triplet
from trainer.errors import DataError
from trainer.noise import noise_level
from trainer.recipe import Recipe

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """P pairs: rows 0..P-1 are the members a, rows P..2P-1 the members b in the same order.

    Attributes:
        slots: place of each pair in the global batch, P numbers.
        size: height and width in pixels of its pictures.
        target: latents of the wanted pictures [2P, T, C].
        source: latents of the neutral pictures [2P, T, C].
        noise: the same for both members of a pair [2P, T, C].
        sigma: noise level [2P] in (0, 1), the same for both members.
        prompts: interpolated conditioning of 2P rows.
        images: row of each wanted picture in the dataset, 2P numbers.
        keeps: whether a row asks for nothing and wants the source itself, 2P values.
    """

    slots: tuple[int, ...]
    size: Size
    target: torch.Tensor
    source: torch.Tensor
    noise: torch.Tensor
    sigma: torch.Tensor
    prompts: PromptEmbeds
    images: tuple[int, ...]
    keeps: tuple[bool, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """What was drawn for one slot: a triplet, which of its members keep the source, and the noise level.

    ``noise`` goes on where these draws ended.
    """

    slot: int
    triplet: Triplet
    keeps: tuple[bool, bool]
    sigma: float
    noise: torch.Generator


@dataclass(frozen=True, kw_only=True, slots=True)
class StepPlan:
    """What a step trains on, over all processes; all its pictures are trained at one size."""

    size: Size
    draws: tuple[Draw, ...]


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
        recipe: Recipe,
        size: Size,
        split: str = "train",
        device: torch.device | str = "cpu",
    ) -> None:
        self.triplets = [triplet for triplet in dataset.triplets if triplet.split == split]
        if not self.triplets:
            raise DataError(f"the dataset has no triplets for {split}", f"give data.{split} more people")
        self._spec, self._data, self._noise = recipe.conditioning, recipe.data, recipe.noise
        self._size = size
        rows = {row for t in self.triplets for row in (t.source, t.a.image, t.b.image)}
        order = sorted(rows)
        latents = cache.get([latent_key(encoder, dataset.image_digests[row]) for row in order])
        self._latents = torch.stack(latents).float().to(device)
        self._place = {row: number for number, row in enumerate(order)}
        self._prompt_place, self._prompts = self._read_prompts(dataset, cache, encoder, device)
        names = self._spec.expressions
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

    def plan(self, seed: int, step: int, pairs: int) -> StepPlan:
        """Return what the ``pairs`` slots of a step train on."""
        return StepPlan(size=self._size, draws=tuple(self._draw(seed, step, slot) for slot in range(pairs)))

    def _draw(self, seed: int, step: int, slot: int) -> Draw:
        source = generator(seed, step, slot)
        u = torch.rand(6, generator=source).tolist()
        found = self._with[int(u[0] * len(self._with))]
        keep = self._data.keep_share
        return Draw(
            slot=slot,
            triplet=found[int(u[1] * len(found))],
            keeps=(u[2] < keep, u[3] < keep),
            sigma=noise_level(self._noise, u[4], u[5], float(torch.randn((), generator=source))),
            noise=source,
        )

    def batch(self, plan: StepPlan, slots: Sequence[int]) -> Batch:
        """Return some slots of a plan as tensors; both members of a pair share noise and noise level.

        A slot's noise is drawn from its plan, so it can be asked for once only.
        """
        draws = [plan.draws[slot] for slot in slots]
        sources = [draw.triplet.source for draw in draws] * 2
        members = [draw.triplet.a for draw in draws] + [draw.triplet.b for draw in draws]
        keeps = [draw.keeps[0] for draw in draws] + [draw.keeps[1] for draw in draws]
        images = [
            source if keep else member.image
            for source, member, keep in zip(sources, members, keeps, strict=True)
        ]
        levels = [0.0 if keep else member.intensity for member, keep in zip(members, keeps, strict=True)]
        like = self._latents
        noise = torch.stack([torch.randn(like.shape[1:], generator=draw.noise) for draw in draws])
        return Batch(
            slots=tuple(slots),
            size=plan.size,
            target=like[[self._place[row] for row in images]],
            source=like[[self._place[row] for row in sources]],
            noise=noise.to(like).repeat(2, 1, 1),
            sigma=torch.tensor([draw.sigma for draw in draws]).to(like).repeat(2),
            prompts=self._conditioning(sources, [member.expression for member in members], levels),
            images=tuple(images),
            keeps=tuple(keeps),
        )

    def ask(
        self, sources: Sequence[int], expressions: Sequence[str], intensities: Sequence[float]
    ) -> tuple[Size, torch.Tensor, PromptEmbeds]:
        """Return size, latents [N, T, C] and conditioning of N edits, for looking at what the model does.

        Args:
            sources: rows of neutral pictures of this split, N, all of one size.
            expressions: N names.
            intensities: N values.
        """
        latents = self._latents[[self._place[row] for row in sources]]
        return self._size, latents, self._conditioning(sources, expressions, intensities)

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
