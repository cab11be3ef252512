"""The evaluation report: metrics with intervals, differences and rules, a verdict, and who judged what."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from registry.digest import Digest
from trainer.evaluation import statistics
from trainer.evaluation.catalogue import show


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Value(_Frozen):
    """A metric with its 95 % bootstrap interval over subjects.

    Attributes:
        value: over all subjects.
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
    def of(cls, estimate: statistics.Estimate) -> Value:
        """The report's form of an estimate."""
        return cls(
            value=estimate.value, low=estimate.low, high=estimate.high, n=estimate.n, samples=estimate.samples
        )


class Gap(_Frozen):
    """What a metric is above that of another adapter on the same subjects; see `statistics.Difference`.

    Attributes:
        p: two-sided, of this metric alone.
        p_holm: corrected for all metrics of the report.
        detectable: the smallest true difference that these subjects would show in 80 % of all cases.
    """

    value: float
    low: float
    high: float
    p: float
    p_holm: float
    n: int
    detectable: float


class Case(_Frozen):
    """One edit, named so that it can be made again."""

    subject: str
    asked: dict[str, float]
    judged_as: str
    judged_intensity: float
    identity: float | None
    psnr: float | None


class Metric(_Frozen):
    """One row of the report: the adapter's value, its rules, the same measure on what it is compared with.

    Attributes:
        minimum, maximum: the values that still pass; None where nothing is required.
        max_regression: how much worse than the adapter in `difference` the whole interval may reach.
        passed: None where nothing is required.
        difference: to the adapter that the report is against, if there is one.
        references: the same measure for "raw" (weights without EMA), "base" (no adapter), "against" (the
            adapter that it is compared with), "renders" (true answers: the judges' own error), as far
            as it was measured.
        examples: the edits that speak most against the adapter here, where a rule failed.
    """

    name: str
    title: str
    definition: str
    direction: Literal["higher", "lower"]
    unit: str
    value: Value
    minimum: float | None = None
    maximum: float | None = None
    max_regression: float | None = None
    passed: bool | None = None
    difference: Gap | None = None
    references: dict[str, Value] = Field(default_factory=dict)
    examples: tuple[Case, ...] = ()

    def shown(self) -> str:
        """Value and interval, in words."""
        mean, low, high = (show(x, self.unit) for x in (self.value.value, self.value.low, self.value.high))
        return f"{mean} (95 % interval {low} to {high})"


class Verdict(_Frozen):
    """Whether every rule holds; `failed` names what does not, `reasons` why, `notes` what was not judged."""

    passed: bool
    failed: tuple[str, ...]
    reasons: tuple[str, ...]
    notes: tuple[str, ...] = ()


class Against(_Frozen):
    """The adapter that the candidate is compared with: its reference, and the digest of its weights file."""

    reference: str
    weights: Digest


class Digests(_Frozen):
    """What was judged, on what, by what; `code` is that of the files which edit, judge and compute."""

    adapter: Digest
    raw: Digest | None
    base: Digest
    judges: dict[str, Digest]
    suite: Digest
    code: Digest


class Suite(_Frozen):
    """What was asked. `judged` names the classes of the expression judge, `pictures` counts the requests.

    `notes` are sentences that a reader must know, such as that tasks came with prompts of their own.
    """

    name: str
    definitions: str
    subjects: tuple[str, ...]
    groups: tuple[str, ...]
    expressions: tuple[str, ...]
    judged: tuple[str, ...]
    confusing_pairs: tuple[tuple[str, str], ...]
    intensities: tuple[float, ...]
    blends: tuple[dict[str, float], ...]
    pictures: int
    steps: int
    seed: int
    notes: tuple[str, ...] = ()


class Curve(_Frozen):
    """Judged intensity of one expression for each asked intensity, with its interval over subjects."""

    expression: str
    asked: tuple[float, ...]
    judged: tuple[Value, ...]


class Blend(_Frozen):
    """How often both expressions of a blend were judged present, and how strong each was judged."""

    expressions: tuple[str, str]
    success: float
    judged: tuple[float, float]
    n: int


class Probe(_Frozen):
    """One question that is not about quality: memorisation, neutral and empty prompts, strength 0.

    Attributes:
        outcome: "skipped" says in `found` why it could not be asked.
        found: the answer in words, with its figures.
    """

    name: str
    title: str
    outcome: Literal["pass", "fail", "skipped"]
    found: str
    figures: dict[str, float] = Field(default_factory=dict)


class EvaluationReport(_Frozen):
    """The outcome of an evaluation, as evaluation.json holds it and as the registry signs it.

    Attributes:
        judges: name of the judge of expressions, and of the encoder that tells people apart.
        confusion: rows are asked expressions, columns judged ones, rates at intensity 1.
        curves: response of each expression to its intensity.
        against_curves: the same of the adapter that it is compared with, where there is one.
        blends: of two expressions.
        worst: the worst edits first.
    """

    schema_version: Literal[2] = 2
    code_version: str
    digests: Digests
    judges: dict[str, str]
    suite: Suite
    against: Against | None = None
    metrics: tuple[Metric, ...]
    verdict: Verdict
    confusion: tuple[tuple[float, ...], ...]
    curves: tuple[Curve, ...]
    against_curves: tuple[Curve, ...] = ()
    blends: tuple[Blend, ...] = ()
    probes: tuple[Probe, ...] = ()
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
            "notes": list(self.verdict.notes),
            **content,
        }

    def scalars(self) -> dict[str, float]:
        """Flat names and values, for experiment trackers: `top1_accuracy`, `top1_accuracy.raw`, …"""
        flat: dict[str, float] = {}
        for metric in self.metrics:
            flat[metric.name] = metric.value.value
            flat |= {f"{metric.name}.{which}": value.value for which, value in metric.references.items()}
        return flat
