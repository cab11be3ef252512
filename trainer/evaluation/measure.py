"""From readings to samples: every metric of every editor, the edits behind it, and what charts show."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from trainer.evaluation import metrics, per_edit
from trainer.evaluation.catalogue import METRICS
from trainer.evaluation.per_edit import Seen
from trainer.evaluation.plan import Plan, single
from trainer.evaluation.readings import Readings
from trainer.evaluation.report import Blend, Case, Curve, Value
from trainer.evaluation.statistics import Sample, estimate

NOTHING = "nothing"
"""What an edit is judged as where the judge saw nothing, or two expressions equally strong."""
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
    for name, metric in per_edit.METRICS.items():
        if (who == "renders" and name in _AGAINST_TRUTH) or (who == "base" and name == "psnr_gain"):
            continue
        edits = metric(seen)
        whose = seen.own.subjects[edits.rows]
        sample = Sample.rows(edits.values, whose, len(plan.subjects), edits.strata, rate=edits.rate)
        if sample.subjects:
            found[name] = sample
    return found


def _seen(plan: Plan, readings: Mapping[str, Readings], who: str) -> Seen:
    return Seen(plan=plan, own=readings[who], base=readings.get("base"), truth=readings.get("renders"))


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
    sign = -1.0 if METRICS[name].direction == "lower" else 1.0
    if name in _OF_BASE:
        name, who = _OF_BASE[name], "base"
    seen = _seen(plan, readings, who)
    edits = per_edit.METRICS[name](seen)
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
    seen = Seen(plan=plan, own=readings)
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
    seen = Seen(plan=plan, own=readings)
    winners = metrics.winners(readings.judged[seen.full])
    matrix = []
    for name in plan.expressions:
        mine = winners[seen.asked == plan.judged.index(name)]
        counts = np.bincount(mine[mine >= 0], minlength=len(plan.judged)) / max(1, len(mine))
        matrix.append(tuple(round(float(rate), 6) for rate in counts))
    return tuple(matrix)


def blends(plan: Plan, readings: Readings) -> tuple[Blend, ...]:
    """How every blend of two expressions was judged, in the order of the plan's expressions."""
    edits = per_edit.blends(Seen(plan=plan, own=readings))
    judged = metrics.seen(readings.judged)
    groups: dict[tuple[str, ...], list[int]] = {}
    for place, row in enumerate(edits.rows.tolist()):
        names = sorted((name for name, _ in readings.asks[row]), key=plan.judged.index)
        groups.setdefault(tuple(names), []).append(place)
    found = []
    for pair, places in sorted(
        groups.items(), key=lambda item: [plan.judged.index(name) for name in item[0]]
    ):
        if len(pair) != 2:
            continue
        a, b = (float(judged[edits.rows[places], plan.judged.index(name)].mean()) for name in pair)
        rate = float(edits.values[places].mean())
        found.append(Blend(expressions=(pair[0], pair[1]), success=rate, judged=(a, b), n=len(places)))
    return tuple(found)


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
