"""The evaluation report: metrics with intervals and thresholds, a verdict, and what was judged by what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from registry.digest import Digest
from trainer.evaluation.gates import METRICS, gate, show
from trainer.evaluation.metrics import Estimate


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Value(_Frozen):
    """A mean over subjects with its 95 % bootstrap interval.

    Attributes:
        value: mean over subjects.
        low: lower end of the interval.
        high: upper end of the interval.
        n: number of subjects.
        samples: number of images (or curves) behind the value.
    """

    value: float
    low: float
    high: float
    n: int = Field(ge=1)
    samples: int = Field(ge=1)

    @classmethod
    def of(cls, estimate: Estimate, samples: int) -> Value:
        """The report's form of an estimate from `samples` images."""
        return cls(value=estimate.value, low=estimate.low, high=estimate.high, n=estimate.n, samples=samples)


class Metric(_Frozen):
    """One row of the report: the adapter's value, its gate, and the same measure on what it is compared with.

    Attributes:
        threshold: the value that still passes, or None where nothing is required.
        bound: "min" or "max" of the threshold.
        passed: None where nothing is required.
        references: the same measure for "raw" (weights without EMA), "base" (no adapter), "renders" (true
            renders, the judge's own ceiling), as far as it was measured.
    """

    name: str
    title: str
    definition: str
    direction: Literal["higher", "lower", "context"]
    unit: str
    value: Value
    threshold: float | None = None
    bound: Literal["min", "max"] | None = None
    passed: bool | None = None
    references: dict[str, Value] = Field(default_factory=dict)

    def sentence(self) -> str:
        """The metric against its threshold, in words."""
        mean, low, high = (show(x, self.unit) for x in (self.value.value, self.value.low, self.value.high))
        if self.threshold is None:
            return f"{self.name} {mean} (95 % interval {low} to {high})"
        required = f"at {'least' if self.bound == 'min' else 'most'} {show(self.threshold, self.unit)}"
        return f"{self.name} is {mean} (95 % interval {low} to {high}), required {required}"


class Verdict(_Frozen):
    """Whether every gate passed; `failed` names the metrics that did not and `reasons` says why."""

    passed: bool
    failed: tuple[str, ...]
    reasons: tuple[str, ...]


class Digests(_Frozen):
    """What was judged, on what, by what."""

    adapter: Digest
    raw: Digest | None
    base: Digest
    judges: dict[str, Digest]
    suite: Digest


class Suite(_Frozen):
    """What was asked: enough to ask it again. `judged` names the classes of the expression judge."""

    name: str
    definitions: str
    identities: tuple[str, ...]
    expressions: tuple[str, ...]
    judged: tuple[str, ...]
    confusing_pairs: tuple[tuple[str, str], ...]
    intensities: tuple[float, ...]
    blends: tuple[dict[str, float], ...]
    blend_identities: int
    steps: int
    seed: int


class Curve(_Frozen):
    """Judged intensity of one expression for each asked intensity, with its interval over subjects."""

    expression: str
    asked: tuple[float, ...]
    judged: tuple[Value, ...]


class Case(_Frozen):
    """One edit at intensity 1, named so that it can be made again."""

    identity: str
    expression: str
    judged_as: str
    judged_intensity: float
    identity_similarity: float
    paired_psnr: float


class EvaluationReport(_Frozen):
    """The outcome of an evaluation, as evaluation.json holds it and as the registry signs it.

    Attributes:
        confusion: rows are asked expressions, columns judged ones, rates at intensity 1.
        curves: response of each expression to its intensity.
        worst: the worst edits first, wrong expression before low PSNR.
    """

    schema_version: Literal[1] = 1
    code_version: str
    digests: Digests
    suite: Suite
    metrics: tuple[Metric, ...]
    verdict: Verdict
    confusion: tuple[tuple[float, ...], ...]
    curves: tuple[Curve, ...]
    worst: tuple[Case, ...]

    def metric(self, name: str) -> Metric:
        """The metric of that name.

        Raises:
            KeyError: the report has no such metric.
        """
        for metric in self.metrics:
            if metric.name == name:
                return metric
        raise KeyError(name)

    def predicate(self) -> dict[str, Any]:
        """What the registry signs as the evaluation statement: the report, its verdict "pass" or "fail"."""
        content = self.model_dump(mode="json", exclude={"verdict"})
        return {
            "verdict": "pass" if self.verdict.passed else "fail",
            "failed": list(self.verdict.failed),
            "reasons": list(self.verdict.reasons),
            **content,
        }

    def scalars(self) -> dict[str, float]:
        """Flat names and means, for experiment trackers: `top1_accuracy`, `top1_accuracy.raw`, …"""
        flat: dict[str, float] = {}
        for metric in self.metrics:
            flat[metric.name] = metric.value.value
            flat |= {f"{metric.name}.{which}": value.value for which, value in metric.references.items()}
        return flat


def build_metrics(
    values: Mapping[str, Value],
    references: Mapping[str, Mapping[str, Value]],
    thresholds: Mapping[str, float],
) -> tuple[Metric, ...]:
    """Rows in the catalogue's order, gated by the thresholds.

    Args:
        values: the adapter's values by metric name.
        references: by metric name, then by what it is compared with.
        thresholds: by metric name; the metric's direction says whether it is a minimum or a maximum.

    Raises:
        ValueError: a threshold on an unknown metric, or on one that was not measured.
    """
    gates = {name: gate(name, threshold) for name, threshold in thresholds.items()}
    missing = sorted(gates.keys() - values.keys())
    if missing:
        raise ValueError(f"thresholds on metrics that this evaluation did not measure: {', '.join(missing)}")
    rows = []
    for name, facts in METRICS.items():
        if name not in values:
            continue
        rule = gates.get(name)
        rows.append(
            Metric(
                name=name,
                title=facts.title,
                definition=facts.definition,
                direction=facts.direction,
                unit=facts.unit,
                value=values[name],
                threshold=rule.threshold if rule else None,
                bound=rule.bound if rule else None,
                passed=rule.passes(values[name].value) if rule else None,
                references=dict(references.get(name, {})),
            )
        )
    return tuple(rows)


def judge(metrics: tuple[Metric, ...]) -> Verdict:
    """The verdict over gated metrics: passed only if none failed. Without any gate nothing can fail."""
    failed = [metric for metric in metrics if metric.passed is False]
    return Verdict(
        passed=not failed,
        failed=tuple(metric.name for metric in failed),
        reasons=tuple(metric.sentence() for metric in failed),
    )
