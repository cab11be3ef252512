"""Scoring with the shipped judge, on this machine: free, and always the same answer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from registry.digest import Digest, digest_bytes
from registry.manifest import Ingredient
from trainer.portraits.expressions import EXPRESSIONS
from trainer.scoring.scorer import Picture, Scored

_SIDE = 64  # the judge's own; pictures are made that small one by one, so few large ones are open together


class LocalScorer:
    """The judge that labels data; evaluation uses another one, trained apart from it.

    Its numbers are kept as they are: an exaggerated expression has more than 1.
    """

    expressions = EXPRESSIONS

    @cached_property
    def name(self) -> str:
        """Name with the digest of the judge's weights."""
        return f"label-judge/{self._digest.hex[:16]}"

    @property
    def ingredient(self) -> Ingredient:
        """See `Scorer`."""
        return Ingredient(
            name="label-judge",
            kind="judge",
            license="Apache-2.0",
            source="shipped with adapter-foundry; trained on faces drawn by trainer.portraits.renderer",
            digest=self._digest,
        )

    @cached_property
    def _digest(self) -> Digest:
        from trainer.portraits import judges

        return digest_bytes(judges.path("label").read_bytes())

    def __call__(self, pictures: Sequence[Picture]) -> list[Scored]:
        """See `Scorer`."""
        from trainer.portraits.judges import ExpressionJudge, resized

        if not pictures:
            return []
        small = np.concatenate([resized(picture.pixels()[None], _SIDE) for picture in pictures])
        rows = ExpressionJudge.load("label")(small)  # its session is made once a process
        return [Scored(scores=tuple(map(float, row)), samples=(tuple(map(float, row)),)) for row in rows]
