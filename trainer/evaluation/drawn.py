"""Suites of drawn people: true renders answer every request, so that edits are measured against truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from registry.manifest import ConditioningSpec
from trainer.errors import RecipeError
from trainer.evaluation.plan import (
    NEUTRAL,
    Ask,
    Plan,
    Portrait,
    Subject,
    asked_pairs,
    basic_blends,
    single,
    vector,
)
from trainer.portraits.renderer import EXPRESSIONS, Domain, Identity, Pose, identity, pose, render
from trainer.sections import SuiteSection


@dataclass(frozen=True, kw_only=True, slots=True)
class DrawnPictures:
    """Renders of people, each always in the same place; see `trainer.evaluation.plan.Pictures`."""

    people: tuple[tuple[Identity, Pose], ...]

    def source(self, index: int) -> Portrait:
        return self.truth(index, NEUTRAL)

    def truth(self, index: int, ask: Ask) -> Portrait:
        return _drawn(*self.people[index], ask)

    def outside(self, index: int) -> NDArray[np.bool_]:
        return _outside(*self.people[index])


@lru_cache(maxsize=8192)  # of 12 KB: every editor of an evaluation is compared with the same answers
def _drawn(person: Identity, place: Pose, ask: Ask) -> Portrait:
    drawn = render(person, vector(ask), place=place)
    drawn.flags.writeable = False
    return drawn


@lru_cache(maxsize=1024)
def _outside(person: Identity, place: Pose) -> NDArray[np.bool_]:
    """What no expression at full intensity draws differently, with a margin of two pixels."""
    neutral = _drawn(person, place, NEUTRAL).astype(int)
    changed = np.zeros(neutral.shape[:2], bool)
    for name in EXPRESSIONS:
        drawn = _drawn(person, place, single(name, 1.0)).astype(int)
        changed |= np.abs(drawn - neutral).max(axis=2) > 2
    for _ in range(2):
        wide = np.pad(changed, 1)
        changed = wide[1:-1, 1:-1] | wide[:-2, 1:-1] | wide[2:, 1:-1] | wide[1:-1, :-2] | wide[1:-1, 2:]
    return ~changed


def plan(suite: SuiteSection, conditioning: ConditioningSpec) -> Plan:
    """What a suite of drawn people asks for.

    Raises:
        RecipeError: the suite names nobody.
    """
    people = _people(suite.identities, suite.first_identity)
    if not people:
        raise RecipeError(
            f"the suite {suite.name} has nobody to judge an adapter on",
            "say how many identities of each domain",
        )
    expressions = tuple(name for name in EXPRESSIONS if name in conditioning.expressions)
    sweep = len(people) if suite.sweep_people is None else suite.sweep_people
    subjects = []
    for index, (number, domain) in enumerate(people):
        asks = [NEUTRAL, *(single(name, 1.0) for name in expressions)]
        if index < sweep:
            asks += [single(name, level) for name in expressions for level in suite.intensities]
        if index < suite.blend_people:
            asks += basic_blends(expressions)
        asks = list(dict.fromkeys(asks))
        seed = suite.seed + number
        subjects.append(Subject(name=f"{domain} {number}", group=domain, seed=seed, asks=tuple(asks)))
    pictures = DrawnPictures(
        people=tuple((identity(number, domain), pose(number)) for number, domain in people)
    )
    return Plan(
        suite=suite,
        subjects=tuple(subjects),
        expressions=expressions,
        judged=EXPRESSIONS,
        pairs=asked_pairs(expressions),
        pictures=pictures,
    )


def _people(counts: Mapping[Domain, int], first: int) -> list[tuple[int, Domain]]:
    """People with consecutive numbers, domain after domain, then ordered so that domains alternate."""
    groups: list[Sequence[tuple[int, Domain]]] = []
    for domain, count in sorted(counts.items(), reverse=True):
        groups.append([(first + offset, domain) for offset in range(count)])
        first += count
    longest = max(map(len, groups), default=0)
    return [group[place] for place in range(longest) for group in groups if place < len(group)]
