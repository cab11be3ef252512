"""What a picture must be like to be kept: small filters in a fixed order, each with what it lets through.

A filter looks at pictures that all filters before it kept. The order is that of `FILTERS`: first what is
known without opening a picture, then what is measured. A neutral picture that is left out takes its edits
with it when triplets are made (`trainer.data.triplets`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from trainer.data.candidates import Candidates
from trainer.data.manifest import Survival
from trainer.data.measures import MIN_QUALITY, near
from trainer.data.measuring import Measures
from trainer.sections import FilterSection

FULL: Final = 0.95
"""From this intensity on, the scorer must see the expression before all others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """Why a picture or a triplet is left out: in words, and as a number against what is asked for."""

    reason: str
    value: float | None = None
    threshold: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Material:
    """What the filters look at.

    Attributes:
        seen: the pictures.
        measures: what was measured of those that were not left out before.
        asked: what the recipe asks for.
        expressions: of the recipe, in the order of the scores.
        doubles: person -> (who they look like, bits), for people that are there twice.
    """

    seen: Candidates
    measures: Measures
    asked: FilterSection
    expressions: Sequence[str]
    doubles: dict[Any, tuple[str, int]]


def refused(data: Material, row: int) -> Finding | None:
    """The API refused the request, or there is no picture for another reason."""
    if data.seen.images[row] is None or data.seen.refused[row] is not None:
        return Finding(reason=f"there is no picture: {data.seen.refused[row] or 'it was not made'}")
    return None


def quarantined(data: Material, row: int) -> Finding | None:
    """The scorer gave no answer that can be used."""
    if data.seen.status[row] == "quarantined":
        return Finding(reason=f"its scores are in quarantine: {data.seen.reasons[row] or 'no reason given'}")
    return None


def review(data: Material, row: int) -> Finding | None:
    """The scorer's samples disagree, and nobody has looked yet."""
    if data.seen.status[row] == "review":
        return Finding(reason=f"it waits for a review: {data.seen.reasons[row] or 'no reason given'}")
    return None


def confidence(data: Material, row: int) -> Finding | None:
    """The scorer is not sure."""
    value, least = float(data.seen.confidence[row]), data.asked.min_confidence
    if not value >= least:  # NaN: nobody looked
        return Finding(
            reason=f"the scorer is sure to {value:.2f} only", value=_number(value), threshold=least
        )
    return None


def score(data: Material, row: int) -> Finding | None:
    """The scorer does not see the asked expression."""
    name, level = data.seen.expressions[row], _level(data, row)
    if name is None:
        return None
    value, least = float(data.seen.scores[row, data.expressions.index(name)]), data.asked.min_score * level
    if not value >= least:
        return Finding(reason=f"{name} at {level:g} is seen at {value:.2f} only", value=_number(value),
                       threshold=least)  # fmt: skip
    return None


def strongest(data: Material, row: int) -> Finding | None:
    """At full intensity the scorer sees another expression more, or not enough less."""
    name, level = data.seen.expressions[row], _level(data, row)
    if name is None or level < FULL or len(data.expressions) < 2:
        return None
    values, own = data.seen.scores[row], data.expressions.index(name)
    others = np.delete(values, own)
    other = [one for one in data.expressions if one != name][int(others.argmax())]
    margin = float(values[own]) - float(others.max())
    if not margin >= data.asked.min_margin:
        reason = f"{name} at {level:g} is taken for {other}" if margin < 0 else (
            f"{name} at {level:g} is only {margin:.2f} above {other}"
        )  # fmt: skip
        return Finding(reason=reason, value=_number(margin), threshold=data.asked.min_margin)
    return None


def face(data: Material, row: int) -> Finding | None:
    """No face was found."""
    if data.measures.face[row] == 0:
        return Finding(reason="no face was found in it")
    return None


def identity(data: Material, row: int) -> Finding | None:
    """The edit shows somebody else."""
    value, least = float(data.measures.similarity[row]), data.asked.min_identity
    if least is not None and value < least:
        return Finding(reason=f"the face is only {value:.2f} like the source's", value=value, threshold=least)
    return None


def sharpness(data: Material, row: int) -> Finding | None:
    """The picture is blurred; see `trainer.data.measures.sharpness`."""
    value, least = float(data.measures.sharpness[row]), data.asked.min_sharpness
    if value < least:
        return Finding(reason=f"it is blurred: a sharpness of {value:.1f}", value=value, threshold=least)
    return None


def unchanged(data: Material, row: int) -> Finding | None:
    """The edit looks like its source; with hashes of little quality nobody knows."""
    source, most, found = int(data.seen.sources[row]), data.asked.max_unchanged, data.measures
    if most is None or source in (-1, row) or min(found.quality[row], found.quality[source]) < MIN_QUALITY:
        return None
    if (bits := found.distance(row, source)) <= most:
        return Finding(reason=f"it is its source, but for {bits} bits", value=bits, threshold=most)
    return None


def duplicate(data: Material, row: int) -> Finding | None:
    """The person looks like an earlier one, in whichever split."""
    if (double := data.doubles.get(data.seen.person(row))) is None:
        return None
    other, bits = double
    reason = f"{data.seen.identities[row]} is {other}, but for {bits} bits of the neutral pictures"
    return Finding(reason=reason, value=bits, threshold=data.asked.max_duplicate)


Judge = Callable[[Material, int], Finding | None]
FILTERS: Final[tuple[tuple[Judge, str | None], ...]] = (
    (refused, None),
    (quarantined, None),
    (review, None),
    (confidence, "min_confidence"),
    (score, "min_score"),
    (strongest, "min_margin"),
    (face, None),
    (identity, "min_identity"),
    (sharpness, "min_sharpness"),
    (unchanged, "max_unchanged"),
    (duplicate, "max_duplicate"),
)
"""All filters in their order, each with the setting that it compares with."""
KNOWN: Final = (refused, quarantined, review, confidence, score, strongest)
"""Those that open no picture."""
_OF_SCORES: Final = (quarantined, review, confidence, score, strongest)


def funnel(
    judges: Iterable[Judge], data: Material, rows: Sequence[int], found: dict[int, tuple[str, Finding]]
) -> tuple[list[int], list[Survival]]:
    """Let pictures through some filters.

    Args:
        judges: of `FILTERS`.
        data: what they look at.
        rows: pictures that are still there.
        found: gets row -> (name of the filter, why it was left out).

    Returns:
        the rows that are kept, and what each filter let through.
    """
    kept, counted = list(rows), []
    setting = dict(FILTERS)
    for judge in judges:
        name, before = judge.__name__, len(kept)
        findings = {row: finding for row in kept if (finding := judge(data, row)) is not None}
        found.update({row: (name, finding) for row, finding in findings.items()})
        kept = [row for row in kept if row not in findings]
        asked = setting[judge]
        threshold = None if asked is None else getattr(data.asked, asked)
        counted.append(
            Survival(filter=name, threshold=threshold, kept=len(kept), left_out=before - len(kept))
        )
    return kept, counted


def used(asked: FilterSection, looks_at_faces: bool, scored: bool = True) -> list[Judge]:
    """Return the filters that a recipe asks for, in order."""
    off = set() if scored else set(_OF_SCORES)
    if asked.min_confidence == 0:
        off.add(confidence)
    if not looks_at_faces:
        off |= {face, identity}
    off |= {judge for judge, setting in FILTERS if setting is not None and getattr(asked, setting) is None}
    if asked.min_sharpness == 0:
        off.add(sharpness)
    return [judge for judge, _ in FILTERS if judge not in off]


def doubles(
    seen: Candidates, measures: Measures, rows: Iterable[int], most: int
) -> dict[Any, tuple[str, int]]:
    """Return the people whose neutral picture is one of an earlier person: person -> (who, bits).

    Who was found to be somebody else is nobody's double; so of a chain of people that look alike two by two
    not all are left out. Hashes of little quality are not compared.
    """
    neutral = [row for row in rows if seen.expressions[row] is None and measures.quality[row] >= MIN_QUALITY]
    alike: dict[int, list[tuple[int, int]]] = {}
    hashes = np.ascontiguousarray(measures.pdq[neutral]).view(np.uint64)
    for first, second, bits in near(hashes, most):
        alike.setdefault(second, []).append((first, bits))
    found: dict[Any, tuple[str, int]] = {}
    for second in sorted(alike):
        person = seen.person(neutral[second])
        for first, bits in alike[second]:
            other = seen.person(neutral[first])
            if other != person and other not in found and person not in found:
                found[person] = (seen.identities[neutral[first]], bits)
    return found


def _level(data: Material, row: int) -> float:
    """Return an intensity as it was asked for: a float32 has digits that nobody wrote."""
    return float(np.format_float_positional(data.seen.intensities[row], unique=True))


def _number(value: float) -> float | None:
    return None if np.isnan(value) else value
