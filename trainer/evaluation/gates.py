"""The verdict: every rule on a metric, and what it says of an adapter's figures.

The rules are those of the registry (`registry.evaluation`), applied while the report is written: what is
refused here is refused at a promotion, and the other way round as far as this evaluation goes. A promotion
asks for more: that the comparison was made with what the alias means then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from registry import evaluation
from registry.policy import RegistryPolicy, Threshold
from trainer.errors import EvaluationError
from trainer.evaluation.catalogue import METRICS, show
from trainer.evaluation.report import Case, Gap, Metric, Probe, Value, Verdict

EXAMPLES = 3


def thresholds(section: Mapping[str, float]) -> dict[str, Threshold]:
    """The rules that a recipe's ``metric: threshold`` means; the metric's direction says which end it is.

    Raises:
        ValueError: an unknown metric.
    """
    found = {}
    for name, value in section.items():
        facts = METRICS.get(name)
        if facts is None:
            raise ValueError(
                f"no metric is called {name!r}. Thresholds can name: {', '.join(sorted(METRICS))}"
            )
        found[name] = Threshold(min=value) if facts.direction == "higher" else Threshold(max=value)
    return found


def rules_of(policy: RegistryPolicy, alias: str | None) -> dict[str, Threshold]:
    """The rules of an alias's gate on metrics that this program measures; `unknown_of` names the others.

    Raises:
        EvaluationError: a no-regression rule takes the wrong end for better.
    """
    found = {name: rule for name, rule in policy.gate(alias).metrics.items() if name in METRICS}
    for name, rule in found.items():
        direction = METRICS[name].direction
        if rule.max_regression is not None and rule.better != direction:
            raise EvaluationError(
                f"the policy takes a {rule.better} {name} for better; here its direction is {direction}",
                f"set direction in the policy's rule on {name}, or remove its max_regression",
            )
    return found


def unknown_of(policy: RegistryPolicy, alias: str | None) -> tuple[str, ...]:
    """What an alias's gate asks for that no evaluation of this program has; the registry looks for it."""
    return tuple(name for name in policy.gate(alias).metrics if name not in METRICS)


def merged(first: Mapping[str, Threshold], second: Mapping[str, Threshold]) -> dict[str, Threshold]:
    """Both sets of rules: where they are about one metric, the stricter end of each.

    Raises:
        EvaluationError: nothing could keep to both.
    """
    found = {**first, **second}
    for name in first.keys() & second.keys():
        one, other = first[name], second[name]
        margin = _least(one.max_regression, other.max_regression)
        try:
            found[name] = Threshold(
                min=_most(one.min, other.min),
                max=_least(one.max, other.max),
                max_regression=margin,
                direction=None if margin is None else METRICS[name].direction,
            )
        except ValueError:
            raise EvaluationError(
                f"recipe and policy contradict each other about {name}: {one.range}, and {other.range}",
                "change one of the two",
            ) from None
    return found


def _most(*given: float | None) -> float | None:
    return max((one for one in given if one is not None), default=None)


def _least(*given: float | None) -> float | None:
    return min((one for one in given if one is not None), default=None)


def rows(
    values: Mapping[str, Value],
    references: Mapping[str, Mapping[str, Value]],
    differences: Mapping[str, Gap],
    rules: Mapping[str, Threshold],
    cases: tuple[Case, ...] = (),
    *,
    taken: bool = False,
    worst: Callable[[str], tuple[Case, ...]] | None = None,
) -> tuple[Metric, ...]:
    """The rows of the report in the catalogue's order, with what the rules say.

    Args:
        values: the adapter's values by metric name.
        references: by metric name, then by what it is compared with.
        differences: by metric name, to the adapter that it is compared with.
        rules: by metric name.
        cases: the edits, the worst first; examples where `worst` is not given.
        taken: the alias means another version already: a no-regression rule without a difference fails.
            Otherwise it is left out, and `judge` says so.
        worst: the edits that speak most against the adapter in a metric.
    """
    found = []
    for name, facts in METRICS.items():
        if name not in values:
            continue
        rule, difference = rules.get(name), differences.get(name)
        row = Metric(
            name=name, title=facts.title, definition=facts.definition, direction=facts.direction,
            unit=facts.unit, value=values[name],
            minimum=None if rule is None else rule.min, maximum=None if rule is None else rule.max,
            max_regression=None if rule is None else rule.max_regression,
            difference=difference, references=dict(references.get(name, {})),
        )  # fmt: skip
        outcomes = [] if rule is None else [one.outcome for one in _checks(row, rule, taken=taken)]
        if outcomes:
            passed = set(outcomes) == {"pass"}
            examples = () if passed else (cases if worst is None else worst(name))[:EXAMPLES]
            row = row.model_copy(update={"passed": passed, "examples": examples})
        found.append(row)
    return tuple(found)


def _checks(row: Metric, rule: Threshold, *, taken: bool) -> list[evaluation.MetricCheck]:
    """What the registry's rules say of a row."""
    figure, found = _figure(row), []
    if rule.min is not None or rule.max is not None:
        found.append(evaluation.in_range(row.name, rule, figure))
    if rule.max_regression is not None and (taken or row.difference is not None):
        found.append(evaluation.not_worse(row.name, rule, figure))
    return found


def _figure(row: Metric) -> evaluation.Figure:
    """A row as the registry reads it."""
    gap = row.difference
    return evaluation.Figure(
        value=row.value.value,
        low=row.value.low,
        high=row.value.high,
        direction=row.direction,
        difference=None
        if gap is None
        else evaluation.Gap(value=gap.value, low=gap.low, high=gap.high, p=gap.p, n=gap.n),
    )


def judge(
    metrics: tuple[Metric, ...],
    probes: tuple[Probe, ...] = (),
    rules: Mapping[str, Threshold] = MappingProxyType({}),
) -> Verdict:
    """The verdict: passed only if no rule and no probe failed. Without any rule nothing can fail.

    Args:
        metrics: see `rows`.
        probes: what else was asked.
        rules: all rules by metric name; what the suite did not measure was not shown, and fails.
    """
    failed = [metric for metric in metrics if metric.passed is False]
    wrong = [probe for probe in probes if probe.outcome == "fail"]
    unseen = sorted(rules.keys() - {metric.name for metric in metrics})
    return Verdict(
        passed=not failed and not wrong and not unseen,
        failed=(*(metric.name for metric in failed), *unseen, *(probe.name for probe in wrong)),
        reasons=(
            *map(reason, failed),
            *(f"{name}: this suite does not measure it, required {_words(rules[name])}" for name in unseen),
            *(f"{probe.name}: {probe.found}" for probe in wrong),
        ),
        notes=tuple(
            f"{metric.name}: whether it got worse was not judged, for it was compared with nothing"
            for metric in metrics
            if metric.max_regression is not None and metric.difference is None and metric not in failed
        ),
    )


def _words(rule: Threshold) -> str:
    return evaluation.required(
        {"minimum": rule.min, "maximum": rule.max, "max_regression": rule.max_regression}
    )


def reason(metric: Metric) -> str:
    """What a metric misses, in words, with the edits that speak most against it."""
    missed = []
    inside = _holds(metric)
    if not inside:
        asked = [] if metric.minimum is None else [f"at least {show(metric.minimum, metric.unit)}"]
        asked += [] if metric.maximum is None else [f"at most {show(metric.maximum, metric.unit)}"]
        missed.append(f"{metric.name} is {metric.shown()}, required {' and '.join(asked)}")
    if metric.max_regression is not None and (inside or metric.difference is not None):
        rule = Threshold(max_regression=metric.max_regression, direction=metric.direction)
        check = evaluation.not_worse(metric.name, rule, _figure(metric))
        missed += [] if check.outcome == "pass" else [f"{metric.name}: {check.detail}"]
    text = "; ".join(missed)
    if metric.examples:
        text += "; for example " + ", ".join(map(_named, metric.examples))
    return text


def _holds(metric: Metric) -> bool:
    """Whether a metric lies in its range, if it has one."""
    if metric.minimum is None and metric.maximum is None:
        return True
    rule = Threshold(min=metric.minimum, max=metric.maximum)
    return evaluation.in_range(metric.name, rule, _figure(metric)).outcome == "pass"


def _named(case: Case) -> str:
    return f"{'+'.join(case.asked) or 'nothing'} of {case.subject}"
