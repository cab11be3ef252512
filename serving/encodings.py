"""What pictures and prompts are encoded to, kept for the next request within a bound of memory.

Encodings do not depend on adapters, but for those that change a text encoder: the key names these.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from serving.conditioning import blend_prompts, require_equal_lengths

if TYPE_CHECKING:
    import torch

    from serving.adapters import AdapterSlots, Stack
    from serving.pipelines.base import EditPipeline, PromptEmbeds, Size
    from serving.runs import Portrait


T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheInfo:
    """How a cache does: how often something was there and was not, and the bytes that it holds."""

    hits: int
    misses: int
    nbytes: int


class Encodings(Generic[T]):
    """A cache of encodings; the least recently used go first. Safe to use from several threads.

    Args:
        budget: bytes; 0 keeps nothing.
        size_of: bytes of an encoding.
    """

    def __init__(self, budget: int, size_of: Callable[[T], int]) -> None:
        self._budget, self._size_of = budget, size_of
        self._kept: OrderedDict[Hashable, T] = OrderedDict()
        self._nbytes = self._hits = self._misses = 0
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return what is kept under a key, or make it and keep it."""
        with self._lock:
            if key in self._kept:
                self._hits += 1
                self._kept.move_to_end(key)
                return self._kept[key]
            self._misses += 1
        made = make()
        with self._lock:
            if key not in self._kept and self._size_of(made) <= self._budget:
                self._kept[key] = made
                self._nbytes += self._size_of(made)
                while self._nbytes > self._budget:
                    self._nbytes -= self._size_of(self._kept.popitem(last=False)[1])
        return made

    def info(self) -> CacheInfo:
        """Return how it does."""
        with self._lock:
            return CacheInfo(hits=self._hits, misses=self._misses, nbytes=self._nbytes)


class Encoder:
    """What the engine's requests are encoded to, by way of the caches.

    Args:
        pipeline: encodes.
        slots: the adapters on it; those that change a text encoder are heeded.
        budget: bytes for what is kept, half for pictures and half for prompts.
    """

    def __init__(self, pipeline: EditPipeline, slots: AdapterSlots, budget: int) -> None:
        self._pipeline, self._slots = pipeline, slots
        self._prompts: Encodings[PromptEmbeds] = Encodings(budget // 2, _prompts_size)
        self._pictures: Encodings[torch.Tensor] = Encodings(budget // 2, lambda latents: latents.nbytes)

    def info(self) -> dict[str, CacheInfo]:
        """How the caches do, by what they keep."""
        return {"prompts": self._prompts.info(), "pictures": self._pictures.info()}

    def encode(
        self, portrait: Portrait, rows: Sequence[Mapping[str, float]], stack: Stack, size: Size
    ) -> tuple[torch.Tensor, PromptEmbeds]:
        """Return latents of the picture [K, T, C] and the conditioning of each row.

        Every distinct prompt is encoded once, and alone: what it is encoded to must not depend on what it is
        encoded with, so that the same request gives the same picture, whatever was asked before.

        Args:
            portrait: the picture.
            rows: K mappings of expression -> intensity.
            stack: the adapters that answer, resident; the first conditions.
            size: of the result.

        Raises:
            ConditioningError: prompts that cannot be interpolated.
        """
        import torch

        source = self._pictures.get(
            (portrait.digest, size), lambda: self._pipeline.encode_images([portrait.picture], size)
        )
        spec = stack[0][0].card.conditioning
        names = sorted({name for row in rows for name in row})
        neutral, *targets = (
            self._encoded(portrait, spec.prompt(word), stack, size) for word in (spec.neutral, *names)
        )
        for name, target in zip(names, targets, strict=True):
            require_equal_lengths(neutral, target, name)
        weights = torch.tensor(
            [[row.get(name, 0.0) for name in names] for row in rows], device=neutral.embeds.device
        ).reshape(len(rows), len(names))
        joined = type(neutral).join(targets) if targets else neutral.rows(slice(0, 0))
        return source.expand(len(rows), -1, -1), blend_prompts(neutral, joined, weights, spec.token_window)

    def _encoded(self, portrait: Portrait, prompt: str, stack: Stack, size: Size) -> PromptEmbeds:
        texts = tuple((str(one.digest), share) for one, share in stack if self._slots.changes_text(one))
        seen = (portrait.digest, size) if self._pipeline.sees_image else None

        def encode() -> PromptEmbeds:
            with self._slots.routed([stack]):
                return self._pipeline.encode_prompts([portrait.picture], [prompt], size)

        return self._prompts.get((prompt, seen, texts), encode)


def _prompts_size(prompts: PromptEmbeds) -> int:
    return sum(
        tensor.nbytes for tensor in (prompts.embeds, prompts.mask, prompts.pooled) if tensor is not None
    )
