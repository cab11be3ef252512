"""Batches: which triplet, which noise and which noise level a step trains on.

Every draw is a function of (seed, step, slot), a slot being a place in the global batch. So a resumed run is
the same run, and so is a run on another number of processes or with other micro-batches. `TrainingSet.plan`
draws what a whole step consists of, which costs next to nothing; `TrainingSet.batch` makes tensors of a part.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from serving.conditioning import blend, blend_pooled
from serving.pipelines.base import PromptEmbeds, Size
from trainer.data.buckets import resolutions, sizes_of
from trainer.data.cache import View, pooled_key
from trainer.data.dataset import Dataset, Triplet
from trainer.data.held import Held
from trainer.data.tensors import TensorCache
from trainer.errors import DataError
from trainer.noise import noise_level
from trainer.recipe import Recipe

if TYPE_CHECKING:
    import numpy as np

_HELD_BYTES = 2 << 30


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
        sources: row of each neutral picture, 2P numbers.
        expressions, intensities: what each row asks for, 2P values each.
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
    sources: tuple[int, ...] = ()
    expressions: tuple[str, ...] = ()
    intensities: tuple[float, ...] = ()


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
    """One split of a dataset; latents and embeddings come from the cache when they are asked for.

    The last used stay in memory, and while a step is computed a thread reads what the next one needs.

    Args:
        dataset: has the triplets.
        cache: has what `trainer.data.cache_dataset` put there for this dataset and view.
        view: how the base sees pictures.
        recipe: gives sizes, prompts and noise levels.
        split: "train" or "validation".
        device: of the batches.
        limit: bytes of cached tensors that stay in memory.
        encode: encodes prompts for pictures of a size, while a text encoder is trained; None takes the
            embeddings from the cache.

    Raises:
        DataError: the split is empty, or the prompts have different numbers of tokens.
        CacheError: something was never cached.
    """

    def __init__(
        self,
        dataset: Dataset,
        cache: TensorCache,
        view: View,
        recipe: Recipe,
        split: str = "train",
        device: torch.device | str = "cpu",
        limit: int = _HELD_BYTES,
        encode: Callable[[Sequence[str], Size], PromptEmbeds] | None = None,
    ) -> None:
        self.triplets = [triplet for triplet in dataset.triplets if triplet.split == split]
        if not self.triplets:
            raise DataError(f"the dataset has no triplets for {split}", f"give {split} more people")
        self._spec, self._data, self._noise = recipe.conditioning, recipe.data, recipe.noise
        self._dataset, self._view, self._device = dataset, view, torch.device(device)
        self._encode = encode
        wanted = resolutions(recipe.data, view.size, view.multiple)
        self._size_of = {t.source: sizes_of(dataset.sizes[t.source], wanted) for t in self.triplets}
        sizes = sorted({size for found in self._size_of.values() for size in found})
        self._of_size = {
            size: [t for t in self.triplets if size in self._size_of[t.source]] for size in sizes
        }
        self._with = {size: self._by_expression(found) for size, found in self._of_size.items()}
        self._pooled = self._check(cache)
        self._held = Held(cache.get, limit)
        self._thread = ThreadPoolExecutor(1, "prefetch")
        self._asked: set[int] = set()

    def _by_expression(self, triplets: Sequence[Triplet]) -> list[list[Triplet]]:
        """Return the triplets with each expression, without expressions that have none."""
        found = [
            [t for t in triplets if name in (t.a.expression, t.b.expression)]
            for name in self._spec.expressions
        ]
        return [some for some in found if some]

    def _check(self, cache: TensorCache) -> bool:
        """Refuse a cache that lacks something; return whether prompts have pooled vectors."""
        words = (self._spec.neutral, *self._spec.expressions)
        keys: set[str] = set()
        pooled = False
        for size, triplets in self._of_size.items():
            keys |= {self._latent(row, size) for triplet in triplets for row in triplet.rows}
            for source in {triplet.source for triplet in triplets}:
                prompts = {word: self._prompt(source, size, word) for word in words}
                keys |= {*prompts.values()}
                lengths = {word: cache.shape(key)[0] for word, key in prompts.items() if key in cache}
                if len({*lengths.values()}) > 1:
                    raise DataError(
                        f"the prompts have different numbers of tokens: {lengths}",
                        "change conditioning.template or its words: only prompts of one length can be "
                        "interpolated",
                    )
                pooled = all(pooled_key(key) in cache for key in prompts.values())
        cache.require(keys)
        self._everything = len(keys) + sum(pooled_key(key) in cache for key in keys)
        return pooled

    def plan(self, seed: int, step: int, pairs: int) -> StepPlan:
        """Return what the ``pairs`` slots of a step train on, all at one size.

        A size is drawn as often as it has triplets; where there is one, none is drawn.
        """
        asked, self._asked = self._asked, set()
        if asked and len(self._held) < self._everything:
            self._thread.submit(self._prefetch, seed, step + 1, pairs, sorted(asked))
        return self._plan(seed, step, pairs)

    def _plan(self, seed: int, step: int, pairs: int) -> StepPlan:
        sizes = list(self._of_size)
        size = sizes[0]
        if len(sizes) > 1:
            ends = list(accumulate(len(found) for found in self._of_size.values()))
            place = float(torch.rand((), generator=generator(seed, step, "size"))) * ends[-1]
            size = sizes[bisect_right(ends, place)]
        draws = (self._draw(self._with[size], seed, step, slot) for slot in range(pairs))
        return StepPlan(size=size, draws=tuple(draws))

    def _draw(self, triplets: Sequence[Sequence[Triplet]], seed: int, step: int, slot: int) -> Draw:
        source = generator(seed, step, slot)
        u = torch.rand(6, generator=source).tolist()
        found = triplets[int(u[0] * len(triplets))]
        keep = self._data.keep_share
        return Draw(
            slot=slot,
            triplet=found[int(u[1] * len(found))],
            keeps=(u[2] < keep, u[3] < keep),
            sigma=noise_level(self._noise, u[4], u[5], float(torch.randn((), generator=source))),
            noise=source,
        )

    def _prefetch(self, seed: int, step: int, pairs: int, slots: Sequence[int]) -> None:
        """Read what some slots of a step need. What goes wrong here goes wrong again in `batch`."""
        plan = self._plan(seed, step, pairs)
        chosen = [plan.draws[slot].triplet for slot in slots if slot < len(plan.draws)]
        words = [(t.source, m.expression) for t in chosen for m in (t.a, t.b)]
        words += [(t.source, self._spec.neutral) for t in chosen]
        prompts = [] if self._encode else [self._prompt(source, plan.size, word) for source, word in words]
        latents = [self._latent(row, plan.size) for triplet in chosen for row in triplet.rows]
        self._held.get([*latents, *prompts, *(map(pooled_key, prompts) if self._pooled else ())])

    def batch(self, plan: StepPlan, slots: Sequence[int]) -> Batch:
        """Return some slots of a plan as tensors; both members of a pair share noise and noise level.

        A slot's noise is drawn from its plan, so it can be asked for once only.
        """
        self._asked.update(slots)
        draws = [plan.draws[slot] for slot in slots]
        sources = [draw.triplet.source for draw in draws] * 2
        members = [draw.triplet.a for draw in draws] + [draw.triplet.b for draw in draws]
        keeps = [draw.keeps[0] for draw in draws] + [draw.keeps[1] for draw in draws]
        images = [
            source if keep else member.image
            for source, member, keep in zip(sources, members, keeps, strict=True)
        ]
        levels = [0.0 if keep else member.intensity for member, keep in zip(members, keeps, strict=True)]
        expressions = [member.expression for member in members]
        target = self._read([self._latent(row, plan.size) for row in images])
        noise = torch.stack([torch.randn(target.shape[1:], generator=draw.noise) for draw in draws])
        return Batch(
            slots=tuple(slots),
            size=plan.size,
            target=target,
            source=self._read([self._latent(row, plan.size) for row in sources]),
            noise=self._move(noise).repeat(2, 1, 1),
            sigma=self._move(torch.tensor([draw.sigma for draw in draws])).repeat(2),
            prompts=self._conditioning(plan.size, sources, expressions, levels),
            images=tuple(images),
            keeps=tuple(keeps),
            sources=tuple(sources),
            expressions=tuple(expressions),
            intensities=tuple(levels),
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
        size = self._size_of[sources[0]][0]
        latents = self._read([self._latent(row, size) for row in sources])
        return size, latents, self._conditioning(size, sources, expressions, intensities)

    def _conditioning(
        self, size: Size, sources: Sequence[int], expressions: Sequence[str], intensities: Sequence[float]
    ) -> PromptEmbeds:
        """Return what serving would give the model for these requests: the very same function."""
        weights = torch.tensor(intensities, device=self._device)[:, None]
        if self._encode is not None:
            return self._encoded(size, expressions, weights)
        neutral = [self._prompt(source, size, self._spec.neutral) for source in sources]
        asked = [self._prompt(source, size, name) for source, name in zip(sources, expressions, strict=True)]
        embeds = blend(self._read(neutral), self._read(asked).unsqueeze(1), weights, self._spec.token_window)
        pooled = None
        if self._pooled:
            before, after = (self._read([*map(pooled_key, keys)]) for keys in (neutral, asked))
            pooled = blend_pooled(before, after.unsqueeze(1), weights)
        mask = embeds.new_ones(embeds.shape[:2], dtype=torch.bool)
        return PromptEmbeds(embeds=embeds, mask=mask, pooled=pooled)

    def _encoded(self, size: Size, expressions: Sequence[str], weights: torch.Tensor) -> PromptEmbeds:
        """Return the same with every distinct prompt encoded now, once; gradients flow into the encoder."""
        assert self._encode is not None
        words = [self._spec.neutral, *sorted(set(expressions))]
        found = self._encode([self._spec.prompt(word) for word in words], size)
        rows = [words.index(name, 1) for name in expressions]
        embeds = found.embeds.to(self._device).float()
        pooled = None if found.pooled is None else found.pooled.to(self._device).float()
        return PromptEmbeds(
            embeds=blend(embeds[:1], embeds[rows].unsqueeze(1), weights, self._spec.token_window),
            mask=found.mask[rows].to(self._device),
            pooled=None if pooled is None else blend_pooled(pooled[:1], pooled[rows].unsqueeze(1), weights),
        )

    def _latent(self, row: int, size: Size) -> str:
        return self._view.latent_key(self._dataset.image_digests[row], size)

    def _prompt(self, source: int, size: Size, word: str) -> str:
        return self._view.prompt_key(self._dataset.image_digests[source], size, self._spec.prompt(word))

    def _read(self, keys: Sequence[str]) -> torch.Tensor:
        """Return cached tensors as one fp32 tensor on the device."""
        return self._move(torch.stack(self._held.get(keys))).float()

    def _move(self, value: torch.Tensor) -> torch.Tensor:
        """Bring a tensor to the device; to a GPU from pinned memory and without waiting for it."""
        if self._device.type != "cuda":
            return value.to(self._device)
        return value.pin_memory().to(self._device, non_blocking=True)


def as_pixels(images: np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return uint8 pictures [N, H, W, 3] as float pixels [N, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
