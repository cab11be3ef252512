"""Who judges: one who sees expressions, one who tells people apart. Never who labelled the training data.

An adapter that was trained towards a judge's opinion pleases that judge, whatever people see. So the judge of
a suite must not be among the ingredients of the adapters that it judges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from registry.digest import Digest, digest_bytes
from registry.manifest import AdapterCard, BaseModelRef, Ingredient, canonical_json
from trainer.errors import EvaluationError, RecipeError

if TYPE_CHECKING:
    from trainer.data.likeness import Faces
    from trainer.evaluation.background import Perceptual
    from trainer.scoring.scorer import Scorer
    from trainer.sections import SuiteSection

_SCORES = ("judge", "api")
"""Kinds of ingredients that say what is to be seen in a picture."""
PORTRAITS = "adapter-foundry/"
"""The bases that draw portraits begin so."""


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
            ModelLicenseError: it comes with a licence file that does not hold.
        """
        from trainer.data.likeness import faces

        return faces(self.face)

    @property
    def background(self) -> Perceptual | None:
        """The network that compares backgrounds; None where it is not on this machine."""
        from trainer.evaluation.background import perceptual

        return perceptual(self.face == "portraits")

    @property
    def names(self) -> dict[str, str]:
        """Who they are, for people."""
        found = {"expression": self.expression.name, "identity": self.face}
        if self.background is not None:
            found["background"] = self.background.name
        return found

    @property
    def digests(self) -> dict[str, Digest]:
        """What decides their opinions: files of networks, or the name of a judge that is asked over the net.

        That name says the model and has a digest of rubric, endpoint, samples and temperature.
        """
        seen = self.expression.ingredient
        known = None if seen is None else seen.digest
        found = {
            "expression": known or digest_bytes(self.expression.name.encode()),
            "identity": _digest_of(self.faces.ingredients),
        }
        if self.background is not None:
            found["background"] = self.background.digest
        return found

    def require_independent(self, card: AdapterCard) -> None:
        """Refuse to judge what was trained towards this judge's own opinion.

        A model that is asked over the net is the same one wherever it is asked and however it is spelt there:
        "openai/GPT-5" at one address is "gpt-5" at another.

        Raises:
            EvaluationError: the judge of expressions is an ingredient of the adapter.
        """
        own = self.expression.ingredient
        if own is None:
            return
        for one in card.ingredients:
            if one.kind in _SCORES and _same(one, own):
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

    expression = scorer_for(suite.judge, suite.api, data_folder, run=f"evaluation of {suite.name}")
    return Judges(expression=expression, face=suite.faces)


def require_able(suite: SuiteSection, base: BaseModelRef) -> None:
    """Refuse a suite whose judges have never seen what the base makes.

    Raises:
        RecipeError: the shipped judge or the portraits' encoder would look at photographs.
    """
    if base.id.startswith(PORTRAITS):
        return
    if suite.source == "renderer":
        raise RecipeError(
            f"the suite {suite.name} draws portraits, and {base.id} edits photographs",
            "name a suite of tasks, such as ffe-bench with the folder of its pictures as path",
        )
    if suite.judge.scorer == "judge":
        raise RecipeError(
            f"the judge of the suite {suite.name} has only seen drawn faces, and {base.id} edits photographs",
            "name a vision-language model as judge: scorer openai or gemini with model and license",
        )
    if suite.faces == "portraits":
        raise RecipeError(
            f"the encoder of faces of the suite {suite.name} has only seen drawn ones, and {base.id} edits "
            "photographs",
            "write faces: buffalo_l or antelopev2 (mind their licences)",
        )


def _same(first: Ingredient, second: Ingredient) -> bool:
    if first.digest and first.digest == second.digest:
        return True
    return _model(first.name) == _model(second.name)


def _model(name: str) -> str:
    """A model's name without its vendor or gateway, in small letters."""
    return name.strip().rsplit("/", 1)[-1].casefold()


def _digest_of(ingredients: Sequence[Ingredient]) -> Digest:
    """Digest of the files that look together, such as a detector and an encoder."""
    digests = [str(one.digest) for one in ingredients]
    return Digest(digests[0]) if len(digests) == 1 else digest_bytes(canonical_json(digests))
