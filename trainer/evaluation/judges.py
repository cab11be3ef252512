"""Who judges: one who sees expressions, one who tells people apart. Never who labelled the training data.

An adapter that was trained towards a judge's opinion pleases that judge, whatever people see. So the judge of a
suite must not be among the ingredients of the adapters that it judges.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from registry.digest import Digest, digest_bytes
from registry.manifest import AdapterCard
from trainer.errors import EvaluationError

if TYPE_CHECKING:
    from trainer.data.likeness import Faces
    from trainer.scoring.scorer import Scorer
    from trainer.sections import SuiteSection


@dataclass(frozen=True)
class Judges:
    """The judges of a suite.

    Attributes:
        expression: sees expressions.
        face: name of the encoder that tells people apart; see `trainer.encoders`.
    """

    expression: Scorer
    face: str

    @cached_property
    def faces(self) -> Faces:
        """The encoder, loaded.

        Raises:
            BaseModelError: it is not on this machine.
        """
        from trainer.data.likeness import faces

        return faces(self.face)

    @property
    def digests(self) -> dict[str, Digest]:
        """What decides their opinions: the files' digests, or the digest of a judge's name and version."""
        seen = self.expression.ingredient
        known = None if seen is None else seen.digest
        expression = known or digest_bytes(self.expression.name.encode())
        identity = next((one.digest for one in self.faces.ingredients if one.digest), None)
        return {"expression": expression, "identity": identity or digest_bytes(self.face.encode())}

    def require_independent(self, card: AdapterCard) -> None:
        """Refuse to judge what was trained towards this judge's own opinion.

        Raises:
            EvaluationError: the judge of expressions is an ingredient of the adapter.
        """
        own = self.expression.ingredient
        if own is None:
            return
        for one in card.ingredients:
            if one.kind == "judge" and (one.name == own.name or (own.digest and one.digest == own.digest)):
                raise EvaluationError(
                    f"{own.name} scored the data that this adapter was trained on, so it cannot judge it",
                    "name another judge in the suite: a model of another vendor, or the portraits' own",
                )


def judges_of(suite: SuiteSection, data_folder: Path) -> Judges:
    """The judges that a suite names.

    Args:
        suite: says who.
        data_folder: keeps paid answers and their ledger.
    """
    from trainer.scoring.local import LocalScorer

    if suite.judge.scorer == "judge":
        return Judges(expression=LocalScorer("evaluation"), face=suite.faces)
    from trainer.scoring.stage import scorer_for
    from trainer.sections import ApiSection

    return Judges(expression=scorer_for(suite.judge, ApiSection(), data_folder, run=f"evaluation of {suite.name}"), face=suite.faces)
