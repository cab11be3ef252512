"""From readings to samples: every metric of every editor, the edits behind it, and what charts show.

A metric here is a function from what was read to one value for each of some edits (or curves). From these
values come the sample of subjects that statistics work on, and the edits that speak most against an adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from trainer.evaluation import metrics
from trainer.evaluation.catalogue import METRICS
from trainer.evaluation.plan import BASIC, NEUTRAL, Ask, Plan, single
from trainer.evaluation.readings import Readings
from trainer.evaluation.report import Blend, Case, Curve, Value
from trainer.evaluation.statistics import Array, Sample, estimate

Rows = NDArray[np.int64]
NOTHING = "nothing"
"""What an edit is judged as where the judge saw nothing, or two expressions equally strong."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Edits:
    """A metric of single edits.

    Attributes:
        values: [N], NaN where there is nothing to measure.
        rows: [N] numbers of the readings that show it; of a curve, its edit at full intensity.
        strata: [N] which rate of a mean of rates a value belongs to; None is one rate.
    """

    values: Array
    rows: Rows
    strata: Rows | None = None


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """What was read of one editor, of the base and of the true answers.

    Attributes:
        plan: what was asked.
        own: of the editor.
        base: of the base alone, if it was measured.
        truth: of the true answers, where there are any.
    """

    plan: Plan
    own: Readings
    base: Readings | None = None
    truth: Readings | None = None

    @cached_property
    def row_of(self) -> dict[tuple[int, Ask], int]:
        return self.own.row_of()

    @cached_property
    def judged(self) -> Array:
        return metrics.seen(self.own.judged)

    @cached_property
    def full(self) -> Rows:
        """The edits that ask for one expression at intensity 1."""
        return _rows(row for row, ask in enumerate(self.own.asks) if len(ask) == 1 and ask[0][1] == 1.0)

    @cached_property
    def asked(self) -> Rows:
        """The class that each of `full` asks for."""
        return _rows(self.plan.judged.index(self.own.asks[row][0][0]) for row in self.full)

    @cached_property
    def identity(self) -> Array:
        """Identity similarity of every row, 0 without a face; NaN where the source itself shows none."""
        found = metrics.identity_kept(self.own.values["identity"])
        source = self.own.values.get("source_face")
        return found if source is None else np.where(source > 0, found, np.nan)

    @cached_property
    def ceiling(self) -> Array:
        """Identity similarity of the true answer to every row; NaN where there is none, or no face in it."""
        return self._of(self.truth, "identity")

    @cached_property
    def expected(self) -> Array | None:
        """What the judge says of the true answer to every row; None where a suite has none."""
        if self.truth is None:
            return None
        return metrics.seen(self.truth.judged)[self._answers(self.truth)]

    def base_psnr(self) -> Array:
        """PSNR of the base's answer to every row; NaN where it was not asked."""
        return self._of(self.base, "psnr")

    def neutral_of(self, rows: Rows) -> Rows:
        """The row in which the subject of each row is asked for nothing; -1 where it was not."""
        subjects = self.own.subjects[rows].tolist()
        return _rows(self.row_of.get((subject, NEUTRAL), -1) for subject in subjects)

    def at_zero(self) -> Array:
        """Judged intensity of what `full` asks for, in the subject's neutral edit; NaN without one."""
        rows = self.neutral_of(self.full)
        return np.where(rows >= 0, self.judged[rows, self.asked], np.nan)

    def _answers(self, other: Readings) -> Rows:
        where = other.row_of()
        return _rows(where[key] for key in zip(self.own.subjects.tolist(), self.own.asks, strict=True))

    def _of(self, other: Readings | None, name: str) -> Array:
        found = np.full(len(self.own), np.nan)
        if other is None:
            return found
        where = other.row_of()
        for row, key in enumerate(zip(self.own.subjects.tolist(), self.own.asks, strict=True)):
            if key in where:
                found[row] = other.values[name][where[key]]
        return found


def _rows(numbers: Iterable[int]) -> Rows:
    return np.fromiter(numbers, np.int64)


# -- expression ----------------------------------------------------------------------------------------------


def _top1(seen: _Seen) -> Edits:
    return Edits(values=metrics.hits(seen.own.judged[seen.full], seen.asked), rows=seen.full)


def _basic(seen: _Seen) -> Edits:
    among = [seen.plan.judged.index(name) for name in BASIC if name in seen.plan.judged]
    mine = np.isin(seen.asked, among)
    rows = seen.full[mine]
    return Edits(values=metrics.hits(seen.own.judged[rows], seen.asked[mine], among), rows=rows)


def _confusion(seen: _Seen) -> Edits:
    values, rows, strata = list[Array](), list[Rows](), list[Rows]()
    for number, (asked, partner) in enumerate(directions(seen.plan)):
        mine = seen.full[seen.asked == asked]
        values.append(metrics.confused(seen.own.judged[mine], np.full(len(mine), partner)))
        rows.append(mine)
        strata.append(np.full(len(mine), number))
    if not rows:
        return Edits(values=np.zeros(0), rows=_rows(()))
    return Edits(values=np.concatenate(values), rows=np.concatenate(rows), strata=np.concatenate(strata))


def _leakage(seen: _Seen) -> Edits:
    expected = None if seen.expected is None else seen.expected[seen.full]
    return Edits(values=metrics.leakage(seen.judged[seen.full], seen.asked, expected), rows=seen.full)


def _drift(seen: _Seen) -> Edits:
    rows = _rows(row for row, ask in enumerate(seen.own.asks) if ask == NEUTRAL)
    expected = None if seen.expected is None else seen.expected[rows]
    return Edits(values=metrics.neutral_drift(seen.judged[rows], expected), rows=rows)


def _unjudged(seen: _Seen) -> Edits:
    empty = ~np.isfinite(seen.own.judged[seen.full]).all(axis=1)
    return Edits(values=empty.astype(np.float64), rows=seen.full)


def _blends(seen: _Seen) -> Edits:
    rows = _rows(row for row, ask in enumerate(seen.own.asks) if len(ask) > 1)
    if not rows.size:
        return Edits(values=np.zeros(0), rows=rows)
    asked = np.zeros((len(rows), len(seen.plan.judged)))
    for place, row in enumerate(rows):
        for name, intensity in seen.own.asks[row]:
            asked[place, seen.plan.judged.index(name)] = intensity
    return Edits(values=metrics.blend_success(seen.judged[rows], asked), rows=rows)


# -- control -------------------------------------------------------------------------------------------------


def _curves(seen: _Seen) -> tuple[Array, Array, Rows]:
    """Intensities [I] up to 1, judged ones [C, I], and each curve's row at intensity 1."""
    levels = [level for level in seen.plan.suite.intensities if level <= 1]
    found, rows = list[list[int]](), list[int]()
    for row in seen.full.tolist():
        subject, name = int(seen.own.subjects[row]), seen.own.asks[row][0][0]
        keys = [(subject, single(name, level)) for level in levels]
        if all(key in seen.row_of for key in keys):
            found.append([seen.row_of[key] for key in keys])
            rows.append(row)
    asked = _rows(seen.plan.judged.index(seen.own.asks[row][0][0]) for row in rows)
    places = np.array(found, np.int64).reshape(len(found), len(levels))
    return np.array(levels), seen.judged[places, asked[:, None]], _rows(rows)


def _linearity(seen: _Seen) -> Edits:
    levels, judged, rows = _curves(seen)
    if len(levels) < metrics.LINEAR_LEVELS:
        return Edits(values=np.zeros(0), rows=_rows(()))
    return Edits(values=metrics.control_linearity(levels, judged), rows=rows)


def _basic_linearity(seen: _Seen) -> Edits:
    found = _linearity(seen)
    mine = np.array([seen.own.asks[row][0][0] in BASIC for row in found.rows], bool)
    return Edits(values=found.values[mine], rows=found.rows[mine])


def _monotonicity(seen: _Seen) -> Edits:
    levels, judged, rows = _curves(seen)
    if len(levels) < metrics.LINEAR_LEVELS:
        return Edits(values=np.zeros(0), rows=_rows(()))
    return Edits(values=metrics.monotonicity(judged), rows=rows)


def _range(seen: _Seen) -> Edits:
    zero = seen.at_zero()
    there = np.isfinite(zero)
    rows = seen.full[there]
    judged = seen.judged[rows, seen.asked[there]]
    return Edits(values=metrics.control_range(judged, zero[there]), rows=rows)


# -- identity ------------------------------------------------------------------------------------------------


def _identity(seen: _Seen) -> Edits:
    return Edits(values=seen.identity[seen.full], rows=seen.full)


def _mean_ceiling(seen: _Seen) -> Array:
    """The mean ceiling of the subject of each of `full`; NaN where it is not positive."""
    whose = seen.own.subjects[seen.full]
    found, there = seen.ceiling[seen.full], np.isfinite(seen.ceiling[seen.full])
    count = len(seen.plan.subjects)
    sums = np.bincount(whose[there], found[there], count)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = (sums / np.bincount(whose[there], minlength=count))[whose]
    return np.where(means > 0, means, np.nan)


def _ratio(seen: _Seen) -> Edits:
    ceiling = _mean_ceiling(seen)
    there = np.isfinite(ceiling)
    rows = seen.full[there]
    return Edits(values=metrics.identity_ratio(seen.identity[rows], ceiling[there]), rows=rows)


def _harmonic(seen: _Seen) -> Edits:
    score = metrics.expression_score(seen.judged[seen.full], seen.asked)
    return _with_source(seen, metrics.harmonic_score(score, seen.identity[seen.full]))


def _face_lost(seen: _Seen) -> Edits:
    lost = ~np.isfinite(seen.own.values["identity"][seen.full])
    return _with_source(seen, lost.astype(np.float64))


def _lazy(seen: _Seen) -> Edits:
    gain = seen.judged[seen.full, seen.asked] - np.nan_to_num(seen.at_zero())
    return _with_source(seen, metrics.lazy(gain, seen.identity[seen.full], seen.ceiling[seen.full]))


def _over(seen: _Seen) -> Edits:
    return _with_source(seen, metrics.over_edited(seen.identity[seen.full], seen.ceiling[seen.full]))


def _with_source(seen: _Seen, values: Array) -> Edits:
    """Values of the edits whose source shows a face; an editor cannot lose what was never there."""
    there = np.isfinite(seen.identity[seen.full])
    return Edits(values=values[there], rows=seen.full[there])


# -- pixels --------------------------------------------------------------------------------------------------


def _plain(name: str) -> Callable[[_Seen], Edits]:
    def metric(seen: _Seen) -> Edits:
        return Edits(values=seen.own.values[name][seen.full], rows=seen.full)

    return metric


def _gain(seen: _Seen) -> Edits:
    return Edits(values=(seen.own.values["psnr"] - seen.base_psnr())[seen.full], rows=seen.full)


def _excess(seen: _Seen) -> Edits:
    seam, truth = (seen.own.values[name][seen.full] for name in ("seam", "seam_truth"))
    return Edits(values=metrics.seam_excess(seam, truth), rows=seen.full)


_METRICS: Mapping[str, Callable[[_Seen], Edits]] = {
    "top1_accuracy": _top1,
    "basic_accuracy": _basic,
    "structural_confusion": _confusion,
    "expression_leakage": _leakage,
    "neutral_drift": _drift,
    "unjudged_rate": _unjudged,
    "control_linearity": _linearity,
    "basic_linearity": _basic_linearity,
    "monotonicity": _monotonicity,
    "control_range": _range,
    "identity_similarity": _identity,
    "identity_ratio": _ratio,
    "harmonic_editing_score": _harmonic,
    "lazy_rate": _lazy,
    "over_edit_rate": _over,
    "face_lost_rate": _face_lost,
    "background_ssim": _plain("background_ssim"),
    "background_lpips": _plain("background_lpips"),
    "paired_psnr": _plain("psnr"),
    "psnr_gain": _gain,
    "seam_energy": _plain("seam"),
    "seam_excess": _excess,
    "blend_success": _blends,
}
_OF_BASE = {"base_top1_accuracy": "top1_accuracy"}
_AGAINST_TRUTH = (
    "expression_leakage",
    "neutral_drift",
    "identity_ratio",
    "paired_psnr",
    "psnr_gain",
    "seam_excess",
)
"""What compares with the true answers says nothing of these themselves."""


# -- all of them ---------------------------------------------------------------------------------------------


def measure_all(plan: Plan, readings: Mapping[str, Readings]) -> dict[str, dict[str, Sample]]:
    """The metrics of every editor, as far as its readings can tell them; see `trainer.evaluation.catalogue`.

    Args:
        plan: what was asked.
        readings: by editor: "adapter", "base", "raw", "against", and "renders" for the true answers.

    Returns:
        editor -> metric -> sample of the plan's subjects.
    """
    found = {who: _measure(plan, readings, who) for who in readings}
    for name, of in _OF_BASE.items():
        if "base" in found and "adapter" in found and of in found["base"]:
            found["adapter"][name] = found["base"][of]
    return found


def _measure(plan: Plan, readings: Mapping[str, Readings], who: str) -> dict[str, Sample]:
    seen, found = _seen(plan, readings, who), dict[str, Sample]()
    for name, metric in _METRICS.items():
        if (who == "renders" and name in _AGAINST_TRUTH) or (who == "base" and name == "psnr_gain"):
            continue
        edits = metric(seen)
        sample = Sample.rows(edits.values, seen.own.subjects[edits.rows], len(plan.subjects), edits.strata)
        if sample.subjects:
            found[name] = sample
    return found


def _seen(plan: Plan, readings: Mapping[str, Readings], who: str) -> _Seen:
    return _Seen(plan=plan, own=readings[who], base=readings.get("base"), truth=readings.get("renders"))


def directions(plan: Plan) -> list[tuple[int, int]]:
    """The declared confusing pairs in both directions: what is asked, and what it may be taken for."""
    found = []
    for pair in plan.pairs:
        a, b = (plan.judged.index(name) for name in pair)
        found += [(a, b), (b, a)]
    return found


def worst(
    plan: Plan, readings: Mapping[str, Readings], name: str, *, who: str = "adapter", count: int = 3
) -> tuple[Case, ...]:
    """The edits that speak most against an editor in a metric, the worst first.

    Only edits below the metric's mean (above it, where lower is better) are told, so that a rate names what
    missed.

    Args:
        plan: what was asked.
        readings: by editor, as in `measure_all`.
        name: of the metric.
        who: the editor.
        count: so many at most.

    Raises:
        KeyError: no metric is called so, or there is no such editor.
    """
    if name in _OF_BASE:
        name, who = _OF_BASE[name], "base"
    seen = _seen(plan, readings, who)
    edits = _METRICS[name](seen)
    sign = -1.0 if METRICS[name].direction == "lower" else 1.0
    there = np.isfinite(edits.values)
    values, rows = sign * edits.values[there], edits.rows[there]
    if not rows.size:
        return ()
    worse = values < values.mean()
    if not worse.any():
        worse[:] = True
    values, rows = values[worse], rows[worse]
    order = np.lexsort((rows, seen.identity[rows], values))[:count]
    return tuple(case(plan, readings[who], int(rows[place])) for place in order)


# -- what charts and tables show -----------------------------------------------------------------------------


def case(plan: Plan, readings: Readings, row: int) -> Case:
    """One edit. A blend is as strong as its weakest component; neutral as the strongest expression in it."""
    ask, judged = readings.asks[row], metrics.seen(readings.judged[row])
    winner = int(metrics.winners(readings.judged[row : row + 1])[0])
    parts = [float(judged[plan.judged.index(name)]) for name, _ in ask]
    return Case(
        subject=plan.subjects[readings.subjects[row]].name,
        asked=dict(ask),
        judged_as=NOTHING if winner < 0 else plan.judged[winner],
        judged_intensity=min(parts) if parts else float(judged.max()),
        identity=_number(readings.values["identity"][row]),
        psnr=_number(readings.values["psnr"][row]),
    )


def cases(plan: Plan, readings: Readings) -> list[Case]:
    """Every edit at intensity 1, the worst first: wrong expression, then lowest harmonic editing score."""
    seen = _Seen(plan=plan, own=readings)
    right = metrics.hits(readings.judged[seen.full], seen.asked)
    score = metrics.harmonic_score(
        metrics.expression_score(seen.judged[seen.full], seen.asked), seen.identity[seen.full]
    )
    return [case(plan, readings, int(seen.full[place])) for place in np.lexsort((seen.full, score, right))]


def response_curves(plan: Plan, readings: Readings) -> tuple[Curve, ...]:
    """Judged intensity of each expression at every asked one, with intervals over subjects.

    Over the subjects that were asked for the whole sweep of the expression, so that all points of a curve are
    about the same ones. An expression that nobody was asked for so has no curve.
    """
    row_of, judged, curves = readings.row_of(), metrics.seen(readings.judged), list[Curve]()
    levels = plan.suite.intensities
    for name in plan.expressions:
        asks = [single(name, level) for level in levels]
        whose = [index for index in range(len(plan.subjects)) if all((index, ask) in row_of for ask in asks)]
        if not whose:
            continue
        points = []
        for ask in asks:
            rows = [row_of[index, ask] for index in whose]
            sample = Sample.rows(judged[rows, plan.judged.index(name)], whose, len(plan.subjects))
            points.append(Value.of(estimate(sample, seed=plan.suite.seed)))
        curves.append(Curve(expression=name, asked=levels, judged=tuple(points)))
    return tuple(curves)


def confusion(plan: Plan, readings: Readings) -> tuple[tuple[float, ...], ...]:
    """Rates at which an expression asked at intensity 1 (row) is judged as another (column, all classes).

    A row sums to less than 1 where the judge saw nothing, or two equally strong.
    """
    seen = _Seen(plan=plan, own=readings)
    winners = metrics.winners(readings.judged[seen.full])
    matrix = []
    for name in plan.expressions:
        mine = winners[seen.asked == plan.judged.index(name)]
        counts = np.bincount(mine[mine >= 0], minlength=len(plan.judged)) / max(1, len(mine))
        matrix.append(tuple(round(float(rate), 6) for rate in counts))
    return tuple(matrix)


def blends(plan: Plan, readings: Readings) -> tuple[Blend, ...]:
    """How every blend of two expressions was judged, in the order of the plan's expressions."""
    edits = _blends(_Seen(plan=plan, own=readings))
    judged = metrics.seen(readings.judged)
    groups: dict[tuple[str, ...], list[int]] = {}
    for place, row in enumerate(edits.rows.tolist()):
        names = sorted((name for name, _ in readings.asks[row]), key=plan.judged.index)
        groups.setdefault(tuple(names), []).append(place)
    found = []
    for names, places in sorted(
        groups.items(), key=lambda item: [plan.judged.index(name) for name in item[0]]
    ):
        if len(names) != 2:
            continue
        a, b = (float(judged[edits.rows[places], plan.judged.index(name)].mean()) for name in names)
        rate = float(edits.values[places].mean())
        found.append(Blend(expressions=(names[0], names[1]), success=rate, judged=(a, b), n=len(places)))
    return tuple(found)


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
