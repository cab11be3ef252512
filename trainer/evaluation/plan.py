"""The portraits suite: who is asked for what. Everything here is decided before a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from registry.digest import Digest, digest_bytes
from registry.manifest import canonical_json
from trainer.errors import RecipeError
from trainer.evaluation.gates import gate
from trainer.evaluation.metrics import DEFINITIONS_VERSION
from trainer.evaluation.report import Suite
from trainer.portraits.renderer import CONFUSING_PAIRS, EXPRESSIONS, Domain, Identity, Pose, identity, pose
from trainer.recipe import Recipe

SUITE = "portraits-v1"

Ask = tuple[tuple[str, float], ...]
"""What one edit asks for: expressions with intensities, sorted by name; empty asks for neutral."""

NEUTRAL: Ask = ()
STRIP_INTENSITIES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
STRIP_EXPRESSIONS = ("happy", "surprised", "angry", "sad", "fear", "sleepy")
TRANSITIONS = (
    ("happy", "surprised"),
    ("sad", "angry"),
    ("fear", "happy"),
    ("angry", "surprised"),
    ("sad", "shy"),
)
TRANSITION_WEIGHTS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
BASIC = ("angry", "disgust", "fear", "happy", "sad", "surprised")
BLEND_INTENSITY = 0.7
BLEND_SUBJECTS = 6
CONTACT_SUBJECTS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """A held-out person, where the head sits in every picture of it, and the seed of its sampling noise."""

    name: str
    person: Identity
    place: Pose
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What the suite asks of every editor.

    Attributes:
        subjects: held-out people, domains alternating.
        expressions: those of the adapter, E of them, in the judge's order.
        pairs: declared confusing pairs of these expressions.
        intensities: rising, from 0, with 1 among them.
        strip: intensities of the intensity strip, up to what the adapter is signed for.
        blends: two expressions at `BLEND_INTENSITY`, asked of the first `BLEND_SUBJECTS` people.
        steps: sampling steps.
        seed: of the noise and of the bootstrap.
    """

    subjects: tuple[Subject, ...]
    expressions: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]
    intensities: tuple[float, ...]
    strip: tuple[float, ...]
    blends: tuple[Ask, ...]
    steps: int
    seed: int

    @property
    def blended(self) -> range:
        """Indices of the people that the blends are asked of."""
        return range(min(BLEND_SUBJECTS, len(self.subjects))) if self.blends else range(0)

    def strip_rows(self) -> list[tuple[int, str]]:
        """Person and expression of each row of the intensity strip."""
        names = [name for name in STRIP_EXPRESSIONS if name in self.expressions] or list(self.expressions[:1])
        return [(row % len(self.subjects), name) for row, name in enumerate(names)]

    def transition_rows(self) -> list[tuple[int, str, str]]:
        """Person and the two expressions of each row of the blend strip."""
        known = [pair for pair in TRANSITIONS if set(pair) <= set(self.expressions)]
        return [(row % len(self.subjects), a, b) for row, (a, b) in enumerate(known)]

    def full_strength(self) -> list[Ask]:
        """Neutral and each expression at intensity 1: what the base and the raw weights are asked for."""
        return [NEUTRAL, *(single(name, 1.0) for name in self.expressions)]

    def everything(self, index: int) -> list[Ask]:
        """All that the adapter is asked for on one person, each request once."""
        wanted = self.full_strength()
        wanted += [single(name, x) for name in self.expressions for x in self.intensities]
        wanted += self.blends if index in self.blended else ()
        wanted += [
            single(name, x) for row, name in self.strip_rows() if row == index for x in STRIP_INTENSITIES
        ]
        for row, a, b in self.transition_rows():
            if row == index:
                wanted += [mixed({a: 1 - w, b: w}) for w in TRANSITION_WEIGHTS]
                wanted.append(mixed({a: BLEND_INTENSITY, b: BLEND_INTENSITY}))
        return list(dict.fromkeys(wanted))

    def describe(self) -> Suite:
        """What was asked, for the report."""
        return Suite(
            name=SUITE,
            definitions=DEFINITIONS_VERSION,
            identities=tuple(subject.name for subject in self.subjects),
            expressions=self.expressions,
            judged=EXPRESSIONS,
            confusing_pairs=self.pairs,
            intensities=self.intensities,
            blends=tuple(dict(blend) for blend in self.blends),
            blend_identities=len(self.blended),
            steps=self.steps,
            seed=self.seed,
        )

    def digest(self) -> Digest:
        """Digest of what was asked, including the version of the metrics' definitions."""
        return digest_bytes(canonical_json(self.describe().model_dump(mode="json")))


def single(expression: str, intensity: float) -> Ask:
    """One expression; at intensity 0 that is neutral, whatever the expression."""
    return mixed({expression: intensity})


def mixed(intensities: Mapping[str, float]) -> Ask:
    """Several expressions at once; those at 0 ask for nothing."""
    return tuple(sorted((name, round(x, 6)) for name, x in intensities.items() if x > 0))


def vector(ask: Ask) -> np.ndarray:
    """The renderer's 12 intensities [12] float32 of a request."""
    values = np.zeros(len(EXPRESSIONS), np.float32)
    for name, intensity in ask:
        values[EXPRESSIONS.index(name)] = intensity
    return values


def plan_of(recipe: Recipe) -> Plan:
    """What the recipe's evaluation asks for.

    Raises:
        RecipeError: an expression that the portrait world does not know, intensities that do not rise from 0
            through 1, or a threshold that means nothing.
    """
    section = recipe.evaluation
    unknown = sorted(set(recipe.conditioning.expressions) - set(EXPRESSIONS))
    if unknown:
        raise RecipeError(
            f"the portraits suite cannot judge: {', '.join(unknown)}",
            f"conditioning.expressions can name: {', '.join(EXPRESSIONS)}",
        )
    levels = tuple(section.intensities)
    if not levels or levels[0] != 0 or 1.0 not in levels or list(levels) != sorted(set(levels)):
        raise RecipeError(
            f"evaluation.intensities are {list(levels)}",
            "let them rise from 0 and contain 1, for example [0, 0.25, 0.5, 0.75, 1]",
        )
    strongest = recipe.conditioning.strength_max
    if recipe.conditioning.strength_min > 0 or strongest < levels[-1]:
        raise RecipeError(
            f"evaluation.intensities reach from 0 to {levels[-1]:g}, the adapter is made for "
            f"{recipe.conditioning.strength_min:g} to {strongest:g}",
            "widen conditioning.strength_min and strength_max, or lower the intensities",
        )
    for name, threshold in section.thresholds.items():
        try:
            gate(name, threshold)
        except ValueError as error:
            raise RecipeError(f"evaluation.thresholds: {error}", "correct or remove that threshold") from None
    expressions = tuple(name for name in EXPRESSIONS if name in recipe.conditioning.expressions)
    return Plan(
        subjects=_subjects(section.identities, section.first_identity, section.seed),
        expressions=expressions,
        pairs=tuple(pair for pair in CONFUSING_PAIRS if set(pair) <= set(expressions)),
        intensities=levels,
        strip=tuple(x for x in STRIP_INTENSITIES if x <= strongest),
        blends=tuple(
            mixed({a: BLEND_INTENSITY, b: BLEND_INTENSITY})
            for a, b in combinations([name for name in BASIC if name in expressions], 2)
        ),
        steps=section.steps,
        seed=section.seed,
    )


def _subjects(counts: Mapping[Domain, int], first: int, seed: int) -> tuple[Subject, ...]:
    """People with consecutive seeds, domain after domain, then ordered so that domains alternate."""
    groups: list[Sequence[Subject]] = []
    for domain, count in sorted(counts.items(), reverse=True):
        groups.append([_subject(first + offset, domain, seed) for offset in range(count)])
        first += count
    longest = max(map(len, groups))
    return tuple(group[place] for place in range(longest) for group in groups if place < len(group))


def _subject(number: int, domain: Domain, seed: int) -> Subject:
    name = f"{domain} {number}"
    return Subject(name=name, person=identity(number, domain), place=pose(number), seed=seed + number)
