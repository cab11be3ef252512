"""The verdict: every rule on a metric, and what it says of an adapter's figures."""

from __future__ import annotations

from collections.abc import Mapping

from registry.policy import Threshold
from trainer.evaluation.catalogue import METRICS, show
from trainer.evaluation.report import Case, Gap, Metric, Probe, Value, Verdict


def thresholds(section: Mapping[str, float]) -> dict[str, Threshold]:
    """The rules that a recipe's ``metric: threshold`` means; the metric's direction says which end it is.

    Raises:
        ValueError: an unknown metric, or one that only gives context.
    """
    found = {}
    for name, value in section.items():
        facts = METRICS.get(name)
        if facts is None:
            raise ValueError(f"no metric is called {name!r}. Thresholds can name: {', '.join(sorted(METRICS))}")
        if facts.direction == "context":
            raise ValueError(f"{name} only gives context to other metrics: remove its threshold")
        found[name] = Threshold(min=value) if facts.direction == "higher" else Threshold(max=value)
    return found


def judge(metrics: tuple[Metric, ...], probes: tuple[Probe, ...] = ()) -> Verdict:
    """The verdict: passed only if no rule and no probe failed. Without any rule nothing can fail."""
    failed = [metric for metric in metrics if metric.passed is False]
    wrong = [probe for probe in probes if probe.outcome == "fail"]
    return Verdict(
        passed=not failed and not wrong,
        failed=(*(metric.name for metric in failed), *(probe.name for probe in wrong)),
        reasons=(*map(reason, failed), *(f"{probe.name}: {probe.found}" for probe in wrong)),
    )


def reason(metric: Metric) -> str:
    """The metric against its rules, in words, with the edits that speak most against it."""
    asked = []
    if metric.minimum is not None:
        asked.append(f"at least {show(metric.minimum, metric.unit)}")
    if metric.maximum is not None:
        asked.append(f"at most {show(metric.maximum, metric.unit)}")
    text = f"{metric.name} is {metric.shown()}, required {' and '.join(asked)}"
    if metric.examples:
        text += "; for example " + ", ".join(
            f"{'+'.join(case.asked)} of {case.subject}" for case in metric.examples[:3]
        )
    return text


def rows(
    values: Mapping[str, Value],
    references: Mapping[str, Mapping[str, Value]],
    differences: Mapping[str, Gap],
    rules: Mapping[str, Threshold],
    cases: tuple[Case, ...] = (),
) -> tuple[Metric, ...]:
    """The rows of the report in the catalogue's order, with what the rules say.

    Args:
        values: the adapter's values by metric name.
        references: by metric name, then by what it is compared with.
        differences: by metric name, to the adapter that it is compared with.
        rules: by metric name.
        cases: the edits, the worst first.

    Raises:
        ValueError: a rule on a metric that was not measured.
    """
    missing = sorted(rules.keys() - values.keys())
    if missing:
        raise ValueError(f"thresholds on metrics that this evaluation did not measure: {', '.join(missing)}")
    found = []
    for name, facts in METRICS.items():
        if name not in values:
            continue
        rule, value = rules.get(name), values[name].value
        passed = None
        if rule is not None:
            low = rule.min is None or value >= rule.min
            passed = low and (rule.max is None or value <= rule.max)
        found.append(
            Metric(
                name=name, title=facts.title, definition=facts.definition, direction=facts.direction,
                unit=facts.unit, value=values[name], passed=passed,
                minimum=None if rule is None else rule.min, maximum=None if rule is None else rule.max,
                difference=differences.get(name), references=dict(references.get(name, {})),
                examples=cases[:3] if passed is False else (),
            )
        )  # fmt: skip
    return tuple(found)
