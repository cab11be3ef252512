"""Where pictures come from: a generator plans the pictures of a recipe and makes one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from registry.digest import Digest


@dataclass(frozen=True, kw_only=True, slots=True)
class PortraitRequest:
    """One picture to make; all values are JSON's, so that a request can be sent to another machine.

    Attributes:
        split: "train" or "validation"; all pictures of a person are in one of them.
        identity: name of the person, such as "human-40001".
        expression: name of the expression, or None for the neutral face.
        intensity: 0 (absent) to 1.5 (exaggerated); 0 for the neutral face.
        license: SPDX expression for the use of the picture.
        domain: "human" or "anime" for drawn people; None for others.
        pose: pictures of one person and pose differ in the expression alone; for drawn people the seed of
            the head's placement.
        seed: of a drawn person.
        size: side of a drawn picture in pixels.
        portrait: where the generator finds the neutral picture, for people who are not drawn.
        pixels: digest of that picture's pixels as they are sent.
    """

    split: str
    identity: str
    expression: str | None
    intensity: float
    license: str
    domain: str | None = None
    pose: int | None = None
    seed: int | None = None
    size: int | None = None
    portrait: str | None = None
    pixels: Digest | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """What became of a request.

    Attributes:
        data: the picture's file as it was made or delivered; None when it was refused.
        media_type: of the file.
        width, height: in pixels, upright.
        source: who made it, where that is not the generator: the portraits themselves.
        truth: the true intensities in the order of `trainer.portraits.expressions.EXPRESSIONS`; None where
            nobody knows them.
        model: the vendor's id of the model.
        prompt: what was asked.
        request: digest of the paid request.
        refused: why there is no picture.
    """

    data: bytes | None
    media_type: str | None = None
    width: int | None = None
    height: int | None = None
    source: str | None = None
    truth: list[float] | None = None
    model: str | None = None
    prompt: str | None = None
    request: Digest | None = None
    refused: str | None = None


class Generator(Protocol):
    """A source of pictures, with what a licence check needs to know about it."""

    name: str
    """Name and version; recorded with every picture."""
    license: str
    """SPDX expression of the pictures' licence, all together."""
    origin: str
    """Where the people in the pictures come from, for the adapter's card."""
    parallel: int
    """Pictures that are made at the same time in a process; 1 for what computes, more for what waits."""

    def inputs(self) -> Mapping[str, Any]:
        """Return JSON values that decide the pictures; quick, for it is asked even if all is there."""

    def plan(self) -> list[PortraitRequest]:
        """Return every picture of the recipe; the pictures of a person follow each other.

        Raises:
            DataError: a portrait that the plan stands on cannot be used.
        """

    def ready(self, request: PortraitRequest) -> bool:
        """Return whether making a picture costs nothing any more."""

    def make(self, request: PortraitRequest) -> Made:
        """Make one picture; safe in several threads.

        Raises:
            DataError: a portrait is not the one of the plan.
            ApiError, BudgetSpent: see `trainer.apis.Paid.ask`.
        """
