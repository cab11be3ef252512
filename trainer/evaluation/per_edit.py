"""Every metric of an editor as values of single edits: what the judges said, handed to the formulas.

A metric here is a function from what was read to one value for each of some edits, or curves. From these
values come the sample of subjects that statistics work on, and the edits that speak most against an adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from trainer.evaluation import metrics
from trainer.evaluation.plan import BASIC, NEUTRAL, Ask, Plan, single
from trainer.evaluation.readings import Readings

Array = NDArray[np.float64]
Rows = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Edits:
    """A metric of single edits.

    Attributes:
        values: [N], NaN where there is nothing to measure.
        rows: [N] numbers of the readings that show it; of a curve, its edit at full intensity.
        strata: [N] which rate of a mean of rates a value belongs to; None is one rate.
        rate: every value is 0 or 1.
    """

    values: Array
    rows: Rows
    strata: Rows | None = None
    rate: bool = False


@dataclass(frozen=True, kw_only=True)
class Seen:
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
        """Subject and request -> row."""
        return self.own.row_of()

    @cached_property
    def judged(self) -> Array:
        """Judged intensities of every row, 0 where the judge saw nothing."""
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
        return np.where(self.own.values["source_face"] > 0, found, np.nan)

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


def directions(plan: Plan) -> list[tuple[int, int]]:
    """The declared confusing pairs in both directions: what is asked, and what it may be taken for."""
    found = []
    for pair in plan.pairs:
        a, b = (plan.judged.index(name) for name in pair)
        found += [(a, b), (b, a)]
    return found


# -- expression ----------------------------------------------------------------------------------------------


def _top1(seen: Seen) -> Edits:
    return Edits(values=metrics.hits(seen.own.judged[seen.full], seen.asked), rows=seen.full, rate=True)


def _basic(seen: Seen) -> Edits:
    among = [seen.plan.judged.index(name) for name in BASIC if name in seen.plan.judged]
    mine = np.isin(seen.asked, among)
    rows = seen.full[mine]
    return Edits(values=metrics.hits(seen.own.judged[rows], seen.asked[mine], among), rows=rows, rate=True)


def _confusion(seen: Seen) -> Edits:
    values, rows, strata = list[Array](), list[Rows](), list[Rows]()
    for number, (asked, partner) in enumerate(directions(seen.plan)):
        mine = seen.full[seen.asked == asked]
        values.append(metrics.confused(seen.own.judged[mine], np.full(len(mine), partner)))
        rows.append(mine)
        strata.append(np.full(len(mine), number))
    if not rows:
        return Edits(values=np.zeros(0), rows=_rows(()))
    return Edits(
        values=np.concatenate(values), rows=np.concatenate(rows), strata=np.concatenate(strata), rate=True
    )


def _leakage(seen: Seen) -> Edits:
    expected = None if seen.expected is None else seen.expected[seen.full]
    return Edits(values=metrics.leakage(seen.judged[seen.full], seen.asked, expected), rows=seen.full)


def _drift(seen: Seen) -> Edits:
    rows = _rows(row for row, ask in enumerate(seen.own.asks) if ask == NEUTRAL)
    expected = None if seen.expected is None else seen.expected[rows]
    return Edits(values=metrics.neutral_drift(seen.judged[rows], expected), rows=rows)


def _unjudged(seen: Seen) -> Edits:
    return Edits(values=metrics.unjudged(seen.own.judged[seen.full]), rows=seen.full, rate=True)


def blends(seen: Seen) -> Edits:
    rows = _rows(row for row, ask in enumerate(seen.own.asks) if len(ask) > 1)
    if not rows.size:
        return Edits(values=np.zeros(0), rows=rows)
    asked = np.zeros((len(rows), len(seen.plan.judged)))
    for place, row in enumerate(rows):
        for name, intensity in seen.own.asks[row]:
            asked[place, seen.plan.judged.index(name)] = intensity
    return Edits(values=metrics.blend_success(seen.judged[rows], asked), rows=rows, rate=True)


# -- control -------------------------------------------------------------------------------------------------


def _curves(seen: Seen) -> tuple[Array, Array, Rows]:
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


def _linearity(seen: Seen) -> Edits:
    levels, judged, rows = _curves(seen)
    if len(levels) < metrics.LINEAR_LEVELS:
        return Edits(values=np.zeros(0), rows=_rows(()))
    return Edits(values=metrics.control_linearity(levels, judged), rows=rows)


def _basic_linearity(seen: Seen) -> Edits:
    found = _linearity(seen)
    mine = np.array([seen.own.asks[row][0][0] in BASIC for row in found.rows], bool)
    return Edits(values=found.values[mine], rows=found.rows[mine])


def _monotonicity(seen: Seen) -> Edits:
    levels, judged, rows = _curves(seen)
    if len(levels) < metrics.LINEAR_LEVELS:
        return Edits(values=np.zeros(0), rows=_rows(()))
    return Edits(values=metrics.monotonicity(judged), rows=rows)


def _range(seen: Seen) -> Edits:
    zero = seen.at_zero()
    there = np.isfinite(zero)
    rows = seen.full[there]
    judged = seen.judged[rows, seen.asked[there]]
    return Edits(values=metrics.control_range(judged, zero[there]), rows=rows)


# -- identity ------------------------------------------------------------------------------------------------


def _identity(seen: Seen) -> Edits:
    return Edits(values=seen.identity[seen.full], rows=seen.full)


def _mean_ceiling(seen: Seen) -> Array:
    """The mean ceiling of the subject of each of `full`; NaN where it is not positive."""
    whose = seen.own.subjects[seen.full]
    found, there = seen.ceiling[seen.full], np.isfinite(seen.ceiling[seen.full])
    count = len(seen.plan.subjects)
    sums = np.bincount(whose[there], found[there], count)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = (sums / np.bincount(whose[there], minlength=count))[whose]
    return np.where(means > 0, means, np.nan)


def _ratio(seen: Seen) -> Edits:
    ceiling = _mean_ceiling(seen)
    there = np.isfinite(ceiling)
    rows = seen.full[there]
    return Edits(values=metrics.identity_ratio(seen.identity[rows], ceiling[there]), rows=rows)


def _harmonic(seen: Seen) -> Edits:
    score = metrics.expression_score(seen.judged[seen.full], seen.asked)
    return _with_source(seen, metrics.harmonic_score(score, seen.identity[seen.full]))


def _face_lost(seen: Seen) -> Edits:
    return _with_source(seen, metrics.face_lost(seen.own.values["identity"][seen.full]), rate=True)


def _lazy(seen: Seen) -> Edits:
    gain = seen.judged[seen.full, seen.asked] - np.nan_to_num(seen.at_zero())
    return _with_source(
        seen, metrics.lazy(gain, seen.identity[seen.full], seen.ceiling[seen.full]), rate=True
    )


def _over(seen: Seen) -> Edits:
    return _with_source(
        seen, metrics.over_edited(seen.identity[seen.full], seen.ceiling[seen.full]), rate=True
    )


def _with_source(seen: Seen, values: Array, *, rate: bool = False) -> Edits:
    """Values of the edits whose source shows a face; an editor cannot lose what was never there."""
    there = np.isfinite(seen.identity[seen.full])
    return Edits(values=values[there], rows=seen.full[there], rate=rate)


# -- pixels --------------------------------------------------------------------------------------------------


def _plain(name: str) -> Callable[[Seen], Edits]:
    def metric(seen: Seen) -> Edits:
        return Edits(values=seen.own.values[name][seen.full], rows=seen.full)

    return metric


def _gain(seen: Seen) -> Edits:
    return Edits(values=(seen.own.values["psnr"] - seen.base_psnr())[seen.full], rows=seen.full)


def _excess(seen: Seen) -> Edits:
    seam, truth = (seen.own.values[name][seen.full] for name in ("seam", "seam_truth"))
    return Edits(values=metrics.seam_excess(seam, truth), rows=seen.full)


METRICS: Mapping[str, Callable[[Seen], Edits]] = {
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
    "blend_success": blends,
}
