"""Scoring with the shipped judge, on this machine: free, and always the same answer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Literal

import numpy as np

from registry.digest import Digest, digest_bytes
from registry.manifest import Ingredient
from trainer.portraits.expressions import EXPRESSIONS
from trainer.scoring.scorer import Picture, Scored

_SIDE = 64  # the judge's own; pictures are made that small one by one, so few large ones are open together


class LocalScorer:
    """A shipped judge: "label" labels data; "evaluation", trained apart from it, judges edits.

    Its numbers are kept as they are: an exaggerated expression has more than 1.
    """

    expressions = EXPRESSIONS

    def __init__(self, kind: Literal["label", "evaluation"] = "label") -> None:
        self._kind: Literal["label", "evaluation"] = kind

    @cached_property
    def name(self) -> str:
        """Name with the digest of the judge's weights."""
        return f"{self._kind}-judge/{self._digest.hex[:16]}"

    @property
    def ingredient(self) -> Ingredient:
        """See `Scorer`."""
        return Ingredient(
            name=f"{self._kind}-judge",
            kind="judge",
            license="Apache-2.0",
            source="shipped with adapter-foundry; trained on faces drawn by trainer.portraits.renderer",
            digest=self._digest,
        )

    @cached_property
    def _digest(self) -> Digest:
        from trainer.portraits import judges

        return digest_bytes(judges.path(self._kind).read_bytes())

    def __call__(self, pictures: Sequence[Picture]) -> list[Scored]:
        """See `Scorer`."""
        from trainer.portraits.judges import ExpressionJudge, resized

        if not pictures:
            return []
        small = np.concatenate([resized(picture.pixels()[None], _SIDE) for picture in pictures])
        rows = ExpressionJudge.load(self._kind)(small)  # its session is made once a process
        return [Scored(scores=tuple(map(float, row)), samples=(tuple(map(float, row)),)) for row in rows]
