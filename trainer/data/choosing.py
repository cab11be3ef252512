"""From candidates to a dataset: measure, filter, put triplets together, write; whoever made the pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from registry.digest import Digest
from trainer.data.blobs import Blobs
from trainer.data.candidates import Candidates
from trainer.data.dataset import Member, Triplet
from trainer.data.filters import KNOWN, Finding, Material, doubles, duplicate, funnel, used
from trainer.data.manifest import Provenance, Survival
from trainer.data.measuring import Measures
from trainer.data.writing import DatasetWriter
from trainer.errors import DataError
from trainer.recipe import Recipe

Measure = Callable[[list[int]], Measures]
"""From rows of candidates to measures of these, with room for all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wish:
    """A triplet that could be; rows are those of the candidates, None where nobody asked for a picture.

    Attributes:
        source, a, b: the neutral picture and its edits.
        expressions, intensities: of the two edits.
        number: of the line that asks for it.
    """

    source: int
    a: int | None
    b: int | None
    expressions: tuple[str, str]
    intensities: tuple[float, float]
    number: int | None = None


@dataclass(kw_only=True, slots=True)
class Choice:
    """What is kept, and what is left out for which reason.

    Attributes:
        seen: the candidates.
        measures: of those whose files were opened.
        left_out: row -> (filter, why).
        pictures, triplets: what the filters let through, in order.
        kept: the triplets; rows are those of the candidates.
        missed: wishes that were not fulfilled, with (filter, why).
    """

    seen: Candidates
    measures: Measures
    left_out: dict[int, tuple[str, Finding]]
    pictures: list[Survival]
    triplets: list[Survival] = field(default_factory=list)
    kept: list[Triplet] = field(default_factory=list)
    missed: list[tuple[Wish, str, Finding]] = field(default_factory=list)


def choose(
    recipe: Recipe, seen: Candidates, wishes: Iterable[Wish], measure: Measure, *, encoder: str | None,
    scored: bool = True,
) -> Choice:  # fmt: skip
    """Filter pictures and put triplets together.

    Args:
        recipe: says what a picture must be like.
        seen: the pictures.
        wishes: which triplets there could be.
        measure: measures pictures.
        encoder: who looks at faces; None looks at none.
        scored: whether somebody gave the pictures scores.
    """
    asked, judges = recipe.data.filters, used(recipe.data.filters, encoder is not None, scored)
    data = Material(
        seen=seen,
        measures=Measures.empty(0),
        asked=asked,
        expressions=recipe.conditioning.expressions,
        doubles={},
    )
    left_out: dict[int, tuple[str, Finding]] = {}
    kept, counted = funnel([one for one in judges if one in KNOWN], data, range(len(seen)), left_out)
    data = Material(
        seen=seen, measures=measure(kept), asked=asked, expressions=data.expressions, doubles=data.doubles
    )
    opened = [one for one in judges if one not in KNOWN and one is not duplicate]
    kept, more = funnel(opened, data, kept, left_out)
    counted += more
    if duplicate in judges:
        data.doubles.update(doubles(seen, data.measures, kept, asked.max_duplicate or 0))
        counted += funnel([duplicate], data, kept, left_out)[1]
    choice = Choice(seen=seen, measures=data.measures, left_out=left_out, pictures=counted)
    _fulfil(choice, wishes, scored)
    return choice


def _fulfil(choice: Choice, wishes: Iterable[Wish], scored: bool) -> None:
    """Fulfil the wishes for which all is there; the reasons of the others are counted in their order.

    Where people say themselves what pictures show, they may show a picture as its own edit to intensity 0,
    and the same ones again with other intensities.
    """
    seen, digests = set[tuple[Any, ...]](), choice.measures.pixels
    split_of: dict[str | None, str] = {}
    left_out = dict.fromkeys(("incomplete", "alike", "repeated", "other-split"), 0)
    total = 0
    for wish in wishes:
        total += 1
        split, identity = choice.seen.splits[wish.source], choice.seen.identities[wish.source]
        reason = _incomplete(choice, wish)
        if reason is None:
            rows = (wish.source, wish.a, wish.b)
            shown = tuple(digests[row] for row in rows if row is not None)
            same = shown if scored else (*shown, wish.expressions, wish.intensities)
            reason = _repeated(shown, same in seen, split, split_of, scored)
        if reason is not None:
            left_out[reason[0]] += 1
            choice.missed.append((wish, reason[1], reason[2]))
            continue
        seen.add(same)
        split_of.update(dict.fromkeys(shown, split))
        a, b = (Member(image=row, expression=name, intensity=level) for row, name, level in
                zip(rows[1:], wish.expressions, wish.intensities, strict=True))  # type: ignore[arg-type]  # fmt: skip
        choice.kept.append(Triplet(split=split, identity=identity, source=wish.source, a=a, b=b))
    for name, count in left_out.items():
        total -= count
        choice.triplets.append(Survival(filter=name, kept=total, left_out=count))


Refusal = tuple[str, str, Finding]
"""Which filter of triplets counts it, which filter is told, and why."""


def _incomplete(choice: Choice, wish: Wish) -> Refusal | None:
    """Return why one of the three pictures is not there, or nothing."""
    for row, name, level in zip(
        (wish.source, wish.a, wish.b), ("neutral", *wish.expressions), (0.0, *wish.intensities), strict=True
    ):
        if row is None:
            return "incomplete", "missing", Finding(reason=f"there is no picture of {name} at {level:g}")
        if row in choice.left_out:
            told, finding = choice.left_out[row]
            return "incomplete", told, finding
    return None


def _repeated(
    shown: tuple[str | None, ...], again: bool, split: str, split_of: dict[str | None, str], scored: bool
) -> Refusal | None:  # fmt: skip
    """Return why these three pictures cannot be a new triplet of ``split``, or nothing."""
    if scored and len(set(shown)) < 3:
        return "alike", "alike", Finding(reason="two of its pictures are the same")
    if again:
        return "repeated", "repeated", Finding(reason="the same triplet is there already")
    if any(split_of.get(one, split) != split for one in shown):
        return "other-split", "other-split", Finding(reason="one of its pictures is in the other split")
    return None


def write(
    folder: Path,
    choice: Choice,
    recipe: Recipe,
    rows: Iterator[tuple[int, dict[str, Any]]],
    blobs: Blobs | Callable[[int], tuple[bytes, str]],
    provenance: Callable[[Sequence[dict[str, Any]]], Provenance],
) -> Digest:
    """Write what was chosen and return the dataset's version.

    Args:
        folder: empty.
        choice: what is kept.
        recipe: of the dataset.
        rows: (row of the candidates, what images.parquet says beside the measures), in order; others than
            the kept ones are passed over.
        blobs: has the pictures' files; or gives bytes and media type of a row.
        provenance: from what is said of the kept pictures (their ``source``, ``model``, ``license``,
            ``origin`` and ``scorer``, each different line once) to the whole.
    """
    wanted = {row for one in choice.kept for row in one.rows}
    place: dict[int, int] = {}
    told: dict[tuple[Any, ...], dict[str, Any]] = {}
    with DatasetWriter(folder, recipe.conditioning.expressions) as writer:
        for row, values in rows:
            if row not in wanted:
                continue
            values |= choice.measures.row(row, int(choice.seen.sources[row]))
            place[row] = writer.picture(values, blobs if isinstance(blobs, Blobs) else blobs(row))
            about = {name: values.get(name) for name in ("source", "model", "license", "origin", "scorer")}
            told.setdefault(tuple(about.values()), about)
        for one in choice.kept:
            a, b = (Member(image=place[member.image], expression=member.expression,
                           intensity=member.intensity) for member in (one.a, one.b))  # fmt: skip
            writer.triplet(
                Triplet(split=one.split, identity=one.identity, source=place[one.source], a=a, b=b)
            )
        for reject in _rejects(choice):
            writer.reject(reject)
    return writer.complete(provenance(list(told.values())), choice.pictures, choice.triplets)


def _rejects(choice: Choice) -> Iterator[dict[str, Any]]:
    """Yield what rejects.parquet says: pictures in their order, then triplets in theirs."""
    for row in sorted(choice.left_out):
        name, finding = choice.left_out[row]
        yield choice.seen.described(row) | _explained(name, finding)
    for wish, name, finding in choice.missed:
        levels = set(wish.intensities)
        yield {
            "what": "triplet",
            "split": choice.seen.splits[wish.source],
            "identity": choice.seen.identities[wish.source],
            "number": wish.number,
            "expression": wish.expressions[0],
            "other": wish.expressions[1],
            "intensity": levels.pop() if len(levels) == 1 else None,
            **_explained(name, finding),
        }


def _explained(name: str, finding: Finding) -> dict[str, Any]:
    return {
        "filter": name,
        "reason": finding.reason,
        "value": finding.value,
        "threshold": finding.threshold,
    }


def facts(choice: Choice) -> dict[str, Any]:
    """Return what a stage tells about its filters."""
    return {
        "rejected": len(choice.missed),
        "filters": {
            what: [one.model_dump(mode="json") for one in survivals]
            for what, survivals in (("pictures", choice.pictures), ("triplets", choice.triplets))
        },
    }


def require_some(choice: Choice) -> None:
    """Refuse a dataset with nothing to train on.

    Raises:
        DataError: it is so.
    """
    if not any(one.split == "train" for one in choice.kept):
        reasons = [finding.reason for wish, _, finding in choice.missed]
        raise DataError(
            f"no triplet is left of {len(reasons)}; why the first was left out: "
            f"{reasons[0] if reasons else 'there were no pictures'}",
            "ask for less in data.filters, or look at the pictures and the scorer",
        )
