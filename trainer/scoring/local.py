"""Scoring with the shipped judge, on this machine."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np

from registry.digest import digest_bytes
from trainer.portraits.expressions import EXPRESSIONS


class Scorer(Protocol):
    """Sees expressions."""

    name: str
    """Name and version: part of the key of the scores."""
    expressions: tuple[str, ...]
    """What its columns stand for."""

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Return float32 [N, K] intensities, 0 to about 1.2, of uint8 [N, H, W, 3] RGB pictures."""


class LocalScorer:
    """The judge that labels data; evaluation uses another one, trained apart from it."""

    expressions = EXPRESSIONS

    @cached_property
    def name(self) -> str:
        """Name with the digest of the judge's weights."""
        from trainer.portraits import judges

        return f"label-judge/{digest_bytes(Path(judges.path('label')).read_bytes()).hex[:16]}"

    @cached_property
    def _judge(self):  # type: ignore[no-untyped-def]
        from trainer.portraits.judges import ExpressionJudge

        return ExpressionJudge.load("label")

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """See `Scorer`."""
        return np.asarray(self._judge(images), np.float32)
