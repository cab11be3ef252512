"""Who is asked for what: decided before a model is loaded, by the suite and by an adapter's conditioning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from registry.digest import Digest, digest_bytes
from registry.manifest import ConditioningSpec, canonical_json
from trainer.errors import RecipeError
from trainer.evaluation.metrics import DEFINITIONS_VERSION
from trainer.evaluation.report import Suite
from trainer.portraits.expressions import CONFUSING_PAIRS, EXPRESSIONS
from trainer.sections import SuiteSection

Portrait = NDArray[np.uint8]
"""A picture, uint8 [H, W, 3]."""
Box = tuple[float, float, float, float]
"""Left, top, right and bottom of a part of a picture, in pixels."""
Ask = tuple[tuple[str, float], ...]
"""What one edit asks for: expressions with intensities, sorted by name; empty asks for neutral."""

NEUTRAL: Ask = ()
BASIC = ("angry", "disgust", "fear", "happy", "sad", "surprised")
BLEND_INTENSITY = 0.7


class Pictures(Protocol):
    """The pictures that a suite knows; they are made or read when their turn comes."""

    def source(self, index: int) -> Portrait:
        """The picture of a subject that is edited."""

    def truth(self, index: int, ask: Ask) -> Portrait | None:
        """The right answer to a request, where there is one."""

    def outside(self, index: int) -> NDArray[np.bool_]:
        """[H, W], True where no expression should change anything: outside of the face."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """Somebody whose picture is edited.

    Attributes:
        name: in reports.
        group: people of one kind, such as "human" and "anime".
        seed: of the starting noise.
        asks: all that is asked of an adapter, each request once, neutral first.
        content: sha256 of the source picture where it comes from outside; drawn people are their numbers.
        face: where the face is in that picture.
        prompts: expression and prompt of its tasks, as whoever made them says it.
    """

    name: str
    group: str
    seed: int
    asks: tuple[Ask, ...]
    content: Digest | None = None
    face: Box | None = None
    prompts: tuple[tuple[str, str], ...] = ()

    @property
    def full_strength(self) -> tuple[Ask, ...]:
        """Neutral, and single expressions at intensity 1: what the base alone is asked for."""
        return tuple(ask for ask in self.asks if not ask or (len(ask) == 1 and ask[0][1] == 1.0))


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a suite asks of every editor.

    Attributes:
        suite: where it comes from.
        subjects: who is edited.
        expressions: those that are asked for, in the order of `judged`.
        judged: the classes that the judge tells apart.
        pairs: declared confusing pairs among `expressions`.
        pictures: of the subjects.
        notes: what a reader of the report must know, in sentences.
    """

    suite: SuiteSection
    subjects: tuple[Subject, ...]
    expressions: tuple[str, ...]
    judged: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]
    pictures: Pictures
    notes: tuple[str, ...] = ()

    def describe(self) -> Suite:
        """What was asked, for the report."""
        asks = list(dict.fromkeys(ask for subject in self.subjects for ask in subject.asks))
        return Suite(
            name=self.suite.name,
            definitions=DEFINITIONS_VERSION,
            subjects=tuple(subject.name for subject in self.subjects),
            groups=tuple(dict.fromkeys(subject.group for subject in self.subjects)),
            expressions=self.expressions,
            judged=self.judged,
            confusing_pairs=self.pairs,
            intensities=self.suite.intensities,
            blends=tuple(dict(ask) for ask in asks if len(ask) > 1),
            pictures=sum(len(subject.asks) for subject in self.subjects),
            steps=self.suite.steps,
            seed=self.suite.seed,
            notes=self.notes,
        )

    def digest(self) -> Digest:
        """Digest of who is asked for what, including the version of the metrics' definitions."""
        asked = [
            [one.name, one.group, one.seed, one.asks, None if one.content is None else str(one.content),
             one.face, one.prompts]
            for one in self.subjects
        ]  # fmt: skip
        # Notes speak of an adapter's words too, and the version in production is asked the very same.
        facts = {"suite": self.describe().model_dump(mode="json", exclude={"notes"}), "asked": asked}
        return digest_bytes(canonical_json(facts))


def plan_of(suite: SuiteSection, conditioning: ConditioningSpec) -> Plan:
    """What a suite asks of an adapter.

    Args:
        suite: see `trainer.evaluation.suites`.
        conditioning: what the adapter is signed for, of its card or recipe.

    Raises:
        RecipeError: the suite's intensities do not rise from 0 through 1, its judge does not know an
            expression of the adapter, or it asks for nothing.
        DataError: its folder of tasks has a mistake, or a picture there cannot be read.
    """
    levels = suite.intensities
    if not levels or levels[0] != 0 or 1.0 not in levels or list(levels) != sorted(set(levels)):
        raise RecipeError(
            f"the intensities of {suite.name} are {list(levels)}",
            "let them rise from 0 and contain 1, for example [0, 0.25, 0.5, 0.75, 1]",
        )
    unknown = sorted(set(conditioning.expressions) - set(EXPRESSIONS))
    if unknown:
        raise RecipeError(
            f"the suite {suite.name} cannot judge: {', '.join(unknown)}",
            f"conditioning.expressions can name: {', '.join(EXPRESSIONS)}",
        )
    strongest = conditioning.strength_max
    if conditioning.strength_min > 0 or strongest < 1:
        raise RecipeError(
            f"the suite asks for 0 to 1, the adapter is for {conditioning.strength_min:g} to {strongest:g}",
            "widen conditioning.strength_min and strength_max",
        )
    # Beyond 1 a suite exaggerates, as far as the adapter is signed for.
    suite = suite.model_copy(update={"intensities": tuple(level for level in levels if level <= strongest)})
    if suite.source == "tasks":
        from trainer.evaluation.tasks import plan as tasks_plan

        return tasks_plan(suite, conditioning)
    from trainer.evaluation.drawn import plan as drawn_plan

    return drawn_plan(suite, conditioning)


def single(expression: str, intensity: float) -> Ask:
    """One expression; at intensity 0 that is neutral, whatever the expression."""
    return mixed({expression: intensity})


def mixed(intensities: Mapping[str, float]) -> Ask:
    """Several expressions at once; those at 0 ask for nothing."""
    rounded = {name: round(x, 6) for name, x in intensities.items()}
    return tuple(sorted((name, x) for name, x in rounded.items() if x > 0))


def basic_blends(expressions: Sequence[str]) -> list[Ask]:
    """The blends of two basic expressions at `BLEND_INTENSITY`; 15 of the 6."""
    names = [name for name in BASIC if name in expressions]
    return [mixed({a: BLEND_INTENSITY, b: BLEND_INTENSITY}) for a, b in combinations(names, 2)]


def vector(ask: Ask) -> NDArray[np.float32]:
    """The 12 intensities [12] of a request, in the order of `EXPRESSIONS`."""
    values = np.zeros(len(EXPRESSIONS), np.float32)
    for name, intensity in ask:
        values[EXPRESSIONS.index(name)] = intensity
    return values


def asked_pairs(expressions: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """The declared confusing pairs among some expressions."""
    return tuple(pair for pair in CONFUSING_PAIRS if set(pair) <= set(expressions))
