"""What two datasets differ in: people, pictures, triplets, scores, filters, licences, provenance.

A picture is known by what it shows (person, portrait, expression, intensity), so it can be there in both and
still be another file; a triplet is known by what its three pictures show and by what its edits are said to
show, for a folder of one's own may say several things of the same picture. Versions are equal if and only if
everything is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np

from trainer.data.columns import score_column
from trainer.data.dataset import Dataset
from trainer.data.inspection import numbers

_EXAMPLES: Final = 20
_TABLE: Final = ("license", "source", "model", "prompt", "origin", "split")
_SAME: Final = 1e-6  # scores are float32

Key = tuple[Any, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Changes:
    """What is only in the second, only in the first, and in both but not the same.

    Attributes:
        added, removed, changed, same: how many.
        examples: of the first three, some, in words.
    """

    added: int
    removed: int
    changed: int
    same: int
    examples: Mapping[str, Sequence[str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreChange:
    """How the scores of an expression moved on pictures whose files are the same in both datasets."""

    expression: str
    pictures: int
    mean: float
    largest: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """What two datasets differ in.

    Attributes:
        versions: of the first and the second.
        people, pictures, triplets, rejects: see `Changes`; a person is changed who moved to another split.
        about: column -> pictures whose files are the same and whose values there are not.
        scores: expressions with scores that moved.
        values: name -> (first, second) of whatever else is not the same: provenance, expressions, filters,
            pictures by licence.
    """

    versions: tuple[str, str]
    people: Changes
    pictures: Changes
    triplets: Changes
    rejects: Changes
    about: Mapping[str, int]
    scores: tuple[ScoreChange, ...]
    values: Mapping[str, tuple[Any, Any]]

    @property
    def equal(self) -> bool:
        """Whether both are the same dataset."""
        return self.versions[0] == self.versions[1]

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {"equal": self.equal, **asdict(self)}


class _Side:
    """What is compared of one dataset."""

    def __init__(self, data: Dataset) -> None:
        self.data = data
        self.images = data.table("images")
        columns = [
            self.images.column(name).to_pylist() for name in ("domain", "identity", "pose", "expression")
        ]
        levels = numbers(self.images, "intensity").round(4).tolist()
        self.keys: list[Key] = _numbered(zip(*columns, levels, strict=True))
        self.rows = {key: row for row, key in enumerate(self.keys)}
        self.people = {who: split for split, people in data.manifest.splits.items() for who in people}

    def triplets(self) -> dict[Key, str]:
        """Return what the triplets show, and what their edits are said to show -> their split."""
        keys = _numbered(
            (
                *(self.keys[row] for row in one.rows),
                *((side.expression, round(side.intensity, 4)) for side in (one.a, one.b)),
            )
            for one in self.data.triplets
        )
        return {key: one.split for key, one in zip(keys, self.data.triplets, strict=True)}

    def rejects(self) -> Counter[Key]:
        """Return what was left out, and how often the same was."""
        table = self.data.table("rejects")
        names = ("what", "filter", "identity", "expression", "other", "intensity")
        columns = [table.column(name).to_pylist() for name in names]
        return Counter(zip(*columns, strict=True))


def difference(first: Dataset, second: Dataset) -> Difference:
    """Return what the second dataset has, lacks, or has otherwise than the first."""
    a, b = _Side(first), _Side(second)
    files = {key: first.files[row] for key, row in a.rows.items()}
    there = {key: second.files[row] for key, row in b.rows.items()}
    same = [(a.rows[key], b.rows[key]) for key, file in files.items() if there.get(key) == file]
    gone, new = a.rejects(), b.rejects()
    return Difference(
        versions=(str(first.digest), str(second.digest)),
        people=_changes(a.people, b.people, str),
        pictures=_changes(files, there, _picture),
        triplets=_changes(a.triplets(), b.triplets(), _triplet),
        rejects=_changes(dict(gone), dict(new), lambda key: ", ".join(str(part) for part in key if part)),
        about=_about(a, b, same),
        scores=tuple(_scores(a, b, same)),
        values=_values(first, second),
    )


def _numbered(keys: Iterable[Key]) -> list[Key]:
    """Return keys that are all different: what is there again gets a number."""
    seen: Counter[Key] = Counter()
    found = []
    for key in keys:
        seen[key] += 1
        found.append((*key, seen[key]))
    return found


def _changes(first: Mapping[Any, Any], second: Mapping[Any, Any], name: Any) -> Changes:
    added = [key for key in second if key not in first]
    removed = [key for key in first if key not in second]
    changed = [key for key, value in first.items() if key in second and second[key] != value]
    lists = {"added": added, "removed": removed, "changed": changed}
    return Changes(
        added=len(added),
        removed=len(removed),
        changed=len(changed),
        same=len(first) - len(removed) - len(changed),
        examples={word: [name(key) for key in keys[:_EXAMPLES]] for word, keys in lists.items() if keys},
    )


def _picture(key: Key) -> str:
    """What a picture shows, in words."""
    _, identity, pose, expression, level, number = key
    who = identity if pose is None else f"{identity} ({pose})"
    what = "neutral" if expression is None else f"{expression} {level:g}"
    return f"{who} {what}" + (f" #{number}" if number > 1 else "")


def _triplet(key: Key) -> str:
    """What a triplet shows, in words, and what it says of an edit where the picture itself says another."""
    source, *edits, said_of_a, said_of_b, number = key
    sides = [_picture(source)]
    for edit, (expression, level) in zip(edits, (said_of_a, said_of_b), strict=True):
        said = "" if edit[3:5] == (expression, level) else f" as {expression} {level:g}"
        sides.append(_picture(edit) + said)
    return " / ".join(sides) + (f" #{number}" if number > 1 else "")


def _about(a: _Side, b: _Side, same: Sequence[tuple[int, int]]) -> dict[str, int]:
    found = {}
    for name in _TABLE:
        first, second = (side.images.column(name).to_pylist() for side in (a, b))
        found[name] = sum(first[x] != second[y] for x, y in same)
    return {name: count for name, count in found.items() if count}


def _scores(a: _Side, b: _Side, same: Sequence[tuple[int, int]]) -> Iterable[ScoreChange]:
    rows, others = ([pair[side] for pair in same] for side in (0, 1))
    known = set(b.data.manifest.expressions)
    for name in a.data.manifest.expressions:
        if name not in known:
            continue
        first = numbers(a.images, score_column(name))[rows]
        second = numbers(b.images, score_column(name))[others]
        one_only = np.isnan(first) != np.isnan(second)
        moved = np.nan_to_num(np.abs(first - second))
        if count := int((one_only | (moved > _SAME)).sum()):
            change = moved[moved > _SAME]
            yield ScoreChange(
                expression=name,
                pictures=count,
                mean=float(change.mean()) if change.size else 0.0,
                largest=float(moved.max()),
            )


def _values(first: Dataset, second: Dataset) -> dict[str, tuple[Any, Any]]:
    sides = (_told(first), _told(second))
    names = dict.fromkeys((*sides[0], *sides[1]))
    return {
        name: (sides[0].get(name), sides[1].get(name))
        for name in names
        if sides[0].get(name) != sides[1].get(name)
    }


def _told(data: Dataset) -> dict[str, Any]:
    """Return what a dataset says of itself, flat: name -> JSON value."""
    told: dict[str, Any] = {"expressions": list(data.manifest.expressions)}
    about = data.provenance
    told |= {name: about[name] for name in ("source", "license", "scorer")}
    for one in about["ingredients"]:
        told[f"ingredient {one['kind']} {one['name']}"] = one
    for what in ("pictures", "triplets"):
        for one in getattr(data.manifest, what):
            told[f"filter {one.filter} of {what}, asked for"] = one.threshold
            told[f"filter {one.filter} of {what}, kept"] = one.kept
            told[f"filter {one.filter} of {what}, left out"] = one.left_out
    for one in data.table("images").column("license").value_counts().to_pylist():
        told[f"pictures under {one['values']}"] = one["counts"]
    return told
