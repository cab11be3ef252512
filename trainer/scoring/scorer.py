"""Who sees expressions: one protocol for the judge of this machine and for models that are asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from registry.digest import Digest
from registry.manifest import Ingredient
from trainer.data.blobs import Blobs

if TYPE_CHECKING:
    import numpy as np

Status = Literal["scored", "review", "quarantined"]
Row = tuple[float, ...]
"""Intensities in the order of a scorer's expressions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """A picture to look at; nothing tells who or what it should show.

    Attributes:
        digest: sha256 of its file.
        blobs: where the file lies.
    """

    digest: Digest
    blobs: Blobs

    def pixels(self) -> np.ndarray:
        """Return the decoded picture, uint8 [H, W, 3], upright and without metadata.

        Raises:
            DataError: it is missing, damaged or over a limit.
        """
        return self.blobs.pixels(self.digest)


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """What a scorer says about one picture.

    Attributes:
        scores: one intensity for each expression of the scorer, the median of the samples; empty for a
            quarantined picture. Answers of models lie in 0 to 1, the judge's may leave it by about 0.3.
        confidence: 0 to 1, see `trainer.scoring.agreement`; the judge does not state any and has 1.
        disagreement: largest spread of an expression over the samples, 0 to 1.
        samples: each answer that was accepted; what a reviewer sees.
        status: "scored" counts, "review" waits for a person, "quarantined" has no score.
        reason: why it is not just scored.
    """

    scores: Row
    confidence: float = 1.0
    disagreement: float = 0.0
    samples: tuple[Row, ...] = ()
    status: Status = "scored"
    reason: str | None = None


class Scorer(Protocol):
    """Sees expressions."""

    name: str
    """Name and version: part of the key of the scores."""
    expressions: tuple[str, ...]
    """What the numbers of `Scored.scores` stand for."""
    ingredient: Ingredient | None
    """What an adapter's card must name; None for nothing."""

    def __call__(self, pictures: Sequence[Picture]) -> list[Scored]:
        """Return what is seen in each picture, in order.

        Raises:
            DataError: a picture cannot be read.
            ApiError: a paid service refuses its key, cannot be reached, or its budget is spent.
        """


def quarantined(reason: str) -> Scored:
    """Return a picture without a score."""
    return Scored(scores=(), confidence=0.0, status="quarantined", reason=reason)
