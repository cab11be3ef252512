"""Where pictures come from: a generator answers requests for one person with one expression."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True, kw_only=True, slots=True)
class PortraitRequest:
    """One picture to make.

    Attributes:
        identity: seed of the person.
        domain: "human" or "anime".
        pose: seed of the head's placement; pictures of one pose differ in the expression alone.
        expression: name of the expression, or None for the neutral face.
        intensity: 0 (absent) to 1.5 (exaggerated); 0 for the neutral face.
        size: side in pixels.
    """

    identity: int
    domain: str
    pose: int
    expression: str | None
    intensity: float
    size: int


class Generator(Protocol):
    """A source of pictures, with what a licence check needs to know about it."""

    name: str
    """Name and version: part of every key, so a new version makes new pictures."""
    license: str
    """SPDX expression of the pictures' licence."""
    origin: str
    """Where the people in the pictures come from, for the adapter's card."""

    def generate(self, requests: Sequence[PortraitRequest]) -> Iterator[np.ndarray]:
        """Yield one uint8 [size, size, 3] RGB picture for each request, in order."""

    def truth(self, request: PortraitRequest) -> list[float] | None:
        """Return the true 12 intensities of the picture, or None where nobody knows them."""
