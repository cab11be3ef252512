"""A request on its way through the engine."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from serving.adapters import Stack
from serving.schedules import Course
from serving.schema import SweepRequest

if TYPE_CHECKING:
    from PIL import Image

    from serving.pipelines.denoising import Denoising


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Portrait:
    """A picture ready to be encoded.

    Attributes:
        picture: upright, RGB, cut out, without metadata.
        digest: blake3 of its pixels.
    """

    picture: Image.Image
    digest: bytes


@dataclass(kw_only=True, slots=True, eq=False)
class Run:
    """A request on its way through the engine.

    Attributes:
        request: what was asked.
        stack: the adapters that answer.
        denoising: its rows.
        course: its steps and their noise levels.
        pinned: whether its adapters are kept for it.
    """

    request: SweepRequest
    stack: Stack
    denoising: Denoising
    course: Course
    pinned: bool = True

    @property
    def rows(self) -> int:
        """How many pictures it makes."""
        return len(self.denoising)

    @property
    def shape(self) -> Hashable:
        """Runs of one shape can share a step; an exact one shares with none."""
        return (self.denoising.shape, id(self)) if self.request.exact else self.denoising.shape

    @property
    def step(self) -> int:
        """Steps that are done."""
        return self.denoising.step

    @property
    def steps(self) -> int:
        """Steps that it takes."""
        return self.denoising.steps

    @property
    def done(self) -> bool:
        """Whether only decoding is left."""
        return self.denoising.done

    @property
    def shares(self) -> tuple[tuple[str, float], ...]:
        """The digests of its adapters, and the strength of each."""
        return tuple((str(adapter.digest), strength) for adapter, strength in self.stack)
