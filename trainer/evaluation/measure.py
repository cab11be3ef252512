"""From readings to samples: every metric of an editor, one number a subject; and what charts show."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from trainer.evaluation import metrics
from trainer.evaluation.plan import Plan
from trainer.evaluation.readings import Readings
from trainer.evaluation.report import Case, Curve, Value
from trainer.evaluation.statistics import Array, Sample, estimate


def measure(plan: Plan, readings: Readings) -> dict[str, Sample]:
    """Every metric that these readings can tell, by name; see `trainer.evaluation.catalogue`."""
    found = {name: metric(plan, readings) for name, metric in _METRICS.items()}
    return {name: sample for name, sample in found.items() if sample.subjects}


def measure_all(plan: Plan, readings: Mapping[str, Readings]) -> dict[str, dict[str, Sample]]:
    """The metrics of every editor, with those that compare it with the base or with the true answers.

    Args:
        plan: what was asked.
        readings: by editor: "adapter", "base", "raw", "against", and "renders" for the true answers.
    """
    return {who: measure(plan, found) for who, found in readings.items()}


def _full(plan: Plan, readings: Readings) -> tuple[Readings, Array]:
    """The edits at full intensity, and which class each asks for."""
    full = readings.singles(1.0)
    return full, np.array([plan.judged.index(ask[0][0]) for ask in full.asks], np.int64)


def _top1(plan: Plan, readings: Readings) -> Sample:
    full, asked = _full(plan, readings)
    return Sample.rows(metrics.hits(full.judged, asked), full.subjects, len(plan.subjects))


def _plain(name: str) -> Callable[[Plan, Readings], Sample]:
    def metric(plan: Plan, readings: Readings) -> Sample:
        full = readings.singles(1.0)
        return Sample.rows(full.values[name], full.subjects, len(plan.subjects))

    return metric


_METRICS: dict[str, Callable[[Plan, Readings], Sample]] = {
    "top1_accuracy": _top1,
    "identity_similarity": _plain("identity"),
    "paired_psnr": _plain("psnr"),
    "seam_energy": _plain("seam"),
}


def response_curves(plan: Plan, readings: Readings) -> tuple[Curve, ...]:
    """Judged intensity of each expression at every asked one, with intervals over subjects."""
    curves = []
    neutral = {int(s): row for row, (s, ask) in enumerate(zip(readings.subjects, readings.asks, strict=True)) if not ask}
    for name in plan.expressions:
        column, values = plan.judged.index(name), []
        for level in plan.suite.intensities:
            rows = [
                row
                for row, ask in enumerate(readings.asks)
                if (level == 0 and row in neutral.values()) or ask == ((name, level),)
            ]
            sample = Sample.rows(readings.judged[rows, column], readings.subjects[rows], len(plan.subjects))
            values.append(Value.of(estimate(sample, seed=plan.suite.seed)))
        curves.append(Curve(expression=name, asked=plan.suite.intensities, judged=tuple(values)))
    return tuple(curves)


def confusion(plan: Plan, readings: Readings) -> tuple[tuple[float, ...], ...]:
    """Rates at which an expression asked at intensity 1 (row) is judged as another (column, all classes)."""
    full, asked = _full(plan, readings)
    winners = np.argmax(full.judged, axis=1)
    matrix = []
    for name in plan.expressions:
        mine = winners[asked == plan.judged.index(name)]
        counts = np.bincount(mine, minlength=len(plan.judged)) / max(1, len(mine))
        matrix.append(tuple(round(float(rate), 6) for rate in counts))
    return tuple(matrix)


def cases(plan: Plan, readings: Readings) -> list[Case]:
    """Every edit at intensity 1, the worst first: wrong expression, then lowest identity."""
    full, asked = _full(plan, readings)
    found = []
    for row, (subject, ask) in enumerate(zip(full.subjects, full.asks, strict=True)):
        judged = full.judged[row]
        found.append(
            Case(
                subject=plan.subjects[subject].name,
                asked=dict(ask),
                judged_as=plan.judged[int(np.argmax(judged))],
                judged_intensity=float(judged[asked[row]]),
                identity=_number(full.values["identity"][row]),
                psnr=_number(full.values["psnr"][row]),
            )
        )
    return sorted(found, key=lambda case: (case.judged_as in case.asked, case.psnr or 0.0, case.identity or 0.0))


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
