"""What is in a dataset, in figures: counts, licences, filters, distributions, balance, rejects, look-alikes.

Everything is reckoned from the tables; pictures are opened by the page only (`trainer.data.inspection_page`).
Texts are as they stand in the dataset, and so is whatever they were written for: who shows them escapes them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from trainer.data.columns import score_column
from trainer.data.dataset import Dataset
from trainer.data.measures import BITS, MIN_QUALITY, near, packed

if TYPE_CHECKING:
    import pyarrow as pa

BINS: Final = 24
ALIKE: Final = 31
"""Pictures whose PDQ hashes differ in at most so many of 256 bits are taken for the same; the figure that the
makers of PDQ recommend for matching."""
_MOST = 40  # of different texts that are counted one by one
_MEASURES: Final = {
    "sharpness": None,
    "similarity": (-1.0, 1.0),
    "pdq_distance": (0.0, float(BITS)),
    "confidence": (0.0, 1.0),
    "disagreement": (0.0, 1.0),
}
_EXAMPLES = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Distribution:
    """How the values of a measure are spread.

    Attributes:
        count, missing: pictures that have the measure, and that do not.
        low, high: ends of the histogram.
        bins: pictures in each of `BINS` equal steps from low to high.
        p5, median, p95: percentiles.
    """

    count: int
    missing: int
    low: float
    high: float
    bins: tuple[int, ...]
    p5: float
    median: float
    p95: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Level:
    """What the scorer sees of one expression where one intensity was asked for: median and percentiles."""

    asked: float
    pictures: int
    p10: float
    median: float
    p90: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Expression:
    """Pictures of one expression: how many, their own scores, and these at each intensity."""

    name: str
    pictures: int
    score: Distribution | None
    levels: tuple[Level, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """How many triplets have two expressions, in either order."""

    first: str
    second: str
    train: int
    validation: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Reject:
    """What one filter left out.

    Attributes:
        what: "picture" or "triplet".
        filter: its name.
        count: how many.
        reasons: some of the reasons, as they were given, the first of each kind.
        examples: digests of some of the pictures.
    """

    what: str
    filter: str
    count: int
    reasons: tuple[str, ...]
    examples: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Alike:
    """Two people whose neutral pictures look the same; rows of the dataset's pictures."""

    first: int
    second: int
    names: tuple[str, str]
    bits: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Inspection:
    """Everything that is reckoned of a dataset.

    Attributes:
        version: its digest.
        expressions: figures of each.
        counts: ``pictures``, ``bytes``, and per split ``triplets``, ``people``; ``rejects`` by kind.
        provenance: see `trainer.data.dataset.Provenance`.
        made: name of a column -> text -> pictures, for licences, sources, models, scorers and media types.
        sizes: "width x height" -> pictures.
        filters: survival of pictures and of triplets, in order.
        measures: name -> distribution; measures that no picture has are left out.
        pairs: most triplets first.
        rejects: most first.
        alike, alike_total: some people that look the same, the nearest first, and how many pairs there are.
        cost: US dollars that paid APIs took for the edits that were kept, None if it is not known. Scores and
            pictures that were left out cost, too: the ledger has them by run.
    """

    version: str
    counts: Mapping[str, Any]
    provenance: Mapping[str, Any]
    made: Mapping[str, Mapping[str, int]]
    sizes: Mapping[str, int]
    filters: Mapping[str, Sequence[Mapping[str, Any]]]
    expressions: tuple[Expression, ...]
    measures: Mapping[str, Distribution]
    pairs: tuple[Pair, ...]
    rejects: tuple[Reject, ...]
    alike: tuple[Alike, ...]
    alike_total: int
    cost: float | None

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self)


def inspect(data: Dataset, spent: Mapping[str, float] | None = None) -> Inspection:
    """Return the figures of a dataset.

    Args:
        data: an opened dataset.
        spent: US dollars by digest of the paid request; None where no ledger is known.
    """
    images = data.table("images")
    alike = _alike(images)
    return Inspection(
        version=str(data.digest),
        counts=_counts(data, images),
        provenance=data.provenance,
        made={name: _tally(images, name) for name in ("license", "source", "model", "scorer", "media_type")},
        sizes=_few(Counter(f"{width} x {height}" for height, width in data.sizes)),
        filters={
            "pictures": [one.model_dump() for one in data.manifest.pictures],
            "triplets": [one.model_dump() for one in data.manifest.triplets],
        },
        expressions=tuple(_expressions(images, data.manifest.expressions)),
        measures=_measures(images),
        pairs=_pairs(data),
        rejects=_rejects(data.table("rejects")),
        alike=alike[:_MOST],
        alike_total=len(alike),
        cost=_cost(images, spent),
    )


def distribution(values: np.ndarray, ends: tuple[float, float] | None = None) -> Distribution | None:
    """Return how values are spread; NaN counts as missing.

    Args:
        values: float [N].
        ends: of the histogram; None takes the least and the largest value.

    Returns:
        the distribution, or None if all are missing.
    """
    found = values[~np.isnan(values)]
    if not found.size:
        return None
    low, high = ends or (float(found.min()), float(found.max()))
    width = high - low or 1.0
    places = np.clip(((found - low) / width * BINS).astype(np.int64), 0, BINS - 1)
    p5, median, p95 = np.percentile(found, (5, 50, 95)).tolist()
    return Distribution(
        count=int(found.size),
        missing=int(values.size - found.size),
        low=low,
        high=low + width,
        bins=tuple(np.bincount(places, minlength=BINS).tolist()),
        p5=p5,
        median=median,
        p95=p95,
    )


def numbers(table: pa.Table, name: str) -> np.ndarray:
    """Return a column of numbers as float64 [N]; missing ones are NaN."""
    import pyarrow as pa

    return table.column(name).cast(pa.float64()).to_numpy(zero_copy_only=False)


def _counts(data: Dataset, images: pa.Table) -> dict[str, Any]:
    triplets = Counter(one.split for one in data.triplets)
    return {
        "pictures": len(data.files),
        "bytes": int(numbers(images, "bytes").sum()),
        "triplets": {split: triplets[split] for split in ("train", "validation")},
        "people": {split: len(people) for split, people in data.manifest.splits.items()},
        "rejects": data.manifest.tables["rejects"].rows,
    }


def _tally(table: pa.Table, name: str) -> dict[str, int]:
    """Return text -> number of rows, most first; missing texts are not counted."""
    pairs = table.column(name).value_counts().to_pylist()
    return _few({one["values"]: one["counts"] for one in pairs if one["values"] is not None})


def _few(counted: Mapping[str, int]) -> dict[str, int]:
    """Return the largest counts, and what is left as one."""
    order = sorted(counted.items(), key=lambda item: (-item[1], item[0]))
    rest = sum(number for _, number in order[_MOST:])
    return {**dict(order[:_MOST]), **({"(others)": rest} if rest else {})}


def _expressions(images: pa.Table, names: Sequence[str]) -> Iterable[Expression]:
    asked = np.asarray(images.column("expression").to_pylist(), dtype=object)
    levels = numbers(images, "intensity").round(4)
    for name in names:
        rows = asked == name
        scores = numbers(images, score_column(name))[rows]
        of_levels = levels[rows]
        found = []
        for level in np.unique(of_levels[~np.isnan(scores)]):
            seen = scores[(of_levels == level) & ~np.isnan(scores)]
            p10, median, p90 = np.percentile(seen, (10, 50, 90)).tolist()
            found.append(Level(asked=float(level), pictures=len(seen), p10=p10, median=median, p90=p90))
        spread = distribution(scores, (0.0, 1.0))
        yield Expression(name=name, pictures=int(rows.sum()), score=spread, levels=tuple(found))


def _measures(images: pa.Table) -> dict[str, Distribution]:
    found = {name: distribution(numbers(images, name), ends) for name, ends in _MEASURES.items()}
    edits = numbers(images, "intensity")
    found["intensity"] = distribution(edits[edits > 0], (0.0, 1.5))
    return {name: one for name, one in found.items() if one is not None}


def _pairs(data: Dataset) -> tuple[Pair, ...]:
    counted: dict[tuple[str, str], Counter[str]] = {}
    for one in data.triplets:
        first, second = sorted((one.a.expression, one.b.expression))
        counted.setdefault((first, second), Counter())[one.split] += 1
    pairs = [
        Pair(first=first, second=second, train=found["train"], validation=found["validation"])
        for (first, second), found in counted.items()
    ]
    return tuple(sorted(pairs, key=lambda one: (-one.train - one.validation, one.first, one.second)))


def _rejects(table: pa.Table) -> tuple[Reject, ...]:
    names = ("what", "filter", "reason", "image")
    found: dict[tuple[str, str], tuple[list[str], list[str]]] = {}
    counted: Counter[tuple[str, str]] = Counter()
    for batch in table.to_batches(4096):
        for what, judge, reason, image in zip(
            *(batch.column(table.schema.get_field_index(name)).to_pylist() for name in names), strict=True
        ):
            reasons, examples = found.setdefault((what, judge), ([], []))
            counted[what, judge] += 1
            if len(reasons) < _EXAMPLES and reason not in reasons:
                reasons.append(reason)
            if image is not None and len(examples) < _EXAMPLES and image not in examples:
                examples.append(image)
    rejects = [
        Reject(
            what=what, filter=judge, count=counted[what, judge], reasons=tuple(reasons),
            examples=tuple(examples),
        )
        for (what, judge), (reasons, examples) in found.items()
    ]  # fmt: skip
    return tuple(sorted(rejects, key=lambda one: (-one.count, one.what, one.filter)))


def _alike(images: pa.Table) -> tuple[Alike, ...]:
    """Return pairs of different people whose neutral pictures look the same, the nearest first."""
    names, hashes = images.column("identity").to_pylist(), images.column("pdq").to_pylist()
    neutral = np.asarray(images.column("expression").is_null())
    good = numbers(images, "pdq_quality") >= MIN_QUALITY
    rows = np.flatnonzero(neutral & good).tolist()
    found = [
        Alike(first=rows[x], second=rows[y], names=(names[rows[x]], names[rows[y]]), bits=bits)
        for x, y, bits in near(packed([hashes[row] for row in rows]), ALIKE)
        if names[rows[x]] != names[rows[y]]
    ]
    return tuple(sorted(found, key=lambda one: (one.bits, one.first, one.second)))


def _cost(images: pa.Table, spent: Mapping[str, float] | None) -> float | None:
    """Return what the paid requests behind the kept pictures took, None if one is unknown."""
    requests = set(images.column("request").drop_null().to_pylist())
    if not requests:
        return 0.0
    if spent is None or not requests <= spent.keys():
        return None
    return sum(spent[request] for request in requests)
