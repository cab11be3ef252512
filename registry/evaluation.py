"""What a signed evaluation says, read where a gate decides by it, and the rules of a gate on its figures.

An evaluation of the trainer (schema 2) has rows: a metric's value with its interval, and its paired
difference to another adapter. Evaluations of other programs may have any form; a dotted path names a number
in them. What decides is read strictly: a number is a finite number, a difference needs enough people, a name
means one row, and what an evaluation says it is about must be so. The same functions judge a report while it
is written (`trainer.evaluation.gates`) and a promotion, so that the two cannot disagree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal

from registry.digest import Digest
from registry.errors import InvalidDocument, shown

if TYPE_CHECKING:
    from registry.policy import Gate, Threshold

Outcome = Literal["pass", "fail", "missing"]

MAX_ROWS: Final = 512
MIN_SUBJECTS: Final = 6
"""Fewer people cannot show that nothing got worse: with 5, the smallest two-sided p-value of a sign-flip test
is 2 / 2^5 = 0.06, and the bootstrap interval of one person has no width at all."""
_EXAMPLES: Final = 3
_RULES: Final = ("minimum", "maximum", "max_regression")
_MEND: Final = "`trainer evaluate` writes what is signed here; evaluate the adapter again"


@dataclass(frozen=True, kw_only=True, slots=True)
class Gap:
    """What a metric is above that of another adapter on the same people.

    Attributes:
        value: this adapter's minus the other's.
        low: lower end of the paired 95 % interval.
        high: upper end of it.
        p: two-sided p-value, 0 to 1; None where none was given.
        n: on how many people it rests.
    """

    value: float
    low: float
    high: float
    p: float | None
    n: int

    def __str__(self) -> str:
        """The difference with its interval and p-value."""
        chance = "" if self.p is None else f", p = {self.p:.3g}"
        return f"{self.value:+.4g} (95 % interval {self.low:+.4g} to {self.high:+.4g}{chance})"


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A metric of an evaluation.

    Attributes:
        value: of the adapter.
        low: lower end of its 95 % interval; None where none was given.
        high: upper end of it.
        direction: which end the evaluation calls better, in its own word; None if it does not say.
        difference: to the adapter that the evaluation was made against, if it can be believed.
        examples: edits that speak most against the adapter, in words.
    """

    value: float
    low: float | None = None
    high: float | None = None
    direction: str | None = None
    difference: Gap | None = None
    examples: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The value with its interval."""
        interval = "" if self.low is None else f" (95 % interval {self.low:.4g} to {self.high:.4g})"
        return f"{self.value:.4g}{interval}"

    @property
    def seen(self) -> str:
        """The examples as the end of a sentence."""
        return f"; for example {', '.join(self.examples)}" if self.examples else ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """An evaluation that was read.

    Attributes:
        predicate: all that it says.
        rows: the trainer's rows by metric; empty for evaluations of another form.
        weights: sha256 of the weights file that it says was judged, if it says so.
        against: sha256 of the weights file that it was compared with, if it says so.
    """

    predicate: Mapping[str, Any]
    rows: Mapping[str, Mapping[str, Any]]
    weights: Digest | None
    against: Digest | None

    def figure(self, name: str) -> Figure | None:
        """The metric at a dotted path, or else the row of that name; None if there is no such number.

        Raises:
            InvalidDocument: the name means both.
        """
        number = _number_at(self.predicate, name)
        row = self.rows.get(name)
        if number is not None and row is not None:
            raise InvalidDocument(f"the evaluation has two figures that are called {shown(name)}", _MEND)
        if number is not None:
            return Figure(value=number)
        return None if row is None else _figure(row)


def parse(predicate: Mapping[str, Any]) -> Evaluation:
    """Read an evaluation.

    Raises:
        InvalidDocument: it names what it is about in another form than a digest, or has one metric twice.
    """
    rows: dict[str, Mapping[str, Any]] = {}
    listed = predicate.get("metrics")
    if isinstance(listed, Sequence) and not isinstance(listed, str):
        if len(listed) > MAX_ROWS:
            raise InvalidDocument(
                f"the evaluation has {len(listed)} metrics; at most {MAX_ROWS} are read", _MEND
            )
        for row in listed:
            name = row.get("name") if isinstance(row, Mapping) else None
            if isinstance(name, str) and name in rows:
                raise InvalidDocument(f"the evaluation has the metric {shown(name, 60)} twice", _MEND)
            if isinstance(name, str):
                rows[name] = row
    return Evaluation(
        predicate=predicate,
        rows=rows,
        weights=_digest(predicate.get("digests"), "adapter", "judged"),
        against=_digest(predicate.get("against"), "weights", "compared with"),
    )


def _digest(said: Any, key: str, what: str) -> Digest | None:
    if not isinstance(said, Mapping) or key not in said:
        return None
    try:
        return Digest(said[key])
    except (TypeError, ValueError):
        raise InvalidDocument(f"what the evaluation {what} is named by no digest", _MEND) from None


def _number_at(value: Any, path: str) -> float | None:
    """The number at a dotted path; a key may itself have dots, the longest one that exists counts."""
    if not isinstance(value, Mapping):
        return None
    if path in value:
        return _number(value[path])
    for cut in sorted((index for index, letter in enumerate(path) if letter == "."), reverse=True):
        if path[:cut] in value:
            return _number_at(value[path[:cut]], path[cut + 1 :])
    return None


def _number(value: Any) -> float | None:
    # True is an int to Python, and NaN compares false with everything: neither is a measurement.
    if type(value) not in (int, float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _interval(said: Mapping[str, Any]) -> tuple[float, float, float] | None:
    """Value, low and high, if they are numbers in that order."""
    value, low, high = (_number(said.get(name)) for name in ("value", "low", "high"))
    if value is None or low is None or high is None or not low <= value <= high:
        return None
    return value, low, high


def _figure(row: Mapping[str, Any]) -> Figure | None:
    said, direction = row.get("value"), row.get("direction")
    estimate = said if isinstance(said, Mapping) else {"value": said}
    found = _interval(estimate)
    if found is None and (estimate.get("low"), estimate.get("high")) != (None, None):
        return None
    value = _number(estimate.get("value"))
    if value is None:
        return None
    return Figure(
        value=value,
        low=None if found is None else found[1],
        high=None if found is None else found[2],
        direction=None if direction is None else shown(direction, 20),
        difference=_gap(row.get("difference")),
        examples=tuple(_examples(row.get("examples"))),
    )


def _gap(said: Any) -> Gap | None:
    found = _interval(said) if isinstance(said, Mapping) else None
    if found is None:
        return None
    n, p = said.get("n"), _number(said.get("p"))
    if type(n) is not int or (said.get("p") is not None and (p is None or not 0 <= p <= 1)):
        return None
    return Gap(value=found[0], low=found[1], high=found[2], p=p, n=n)


def _examples(rows: Any) -> Iterator[str]:
    for row in rows[:_EXAMPLES] if isinstance(rows, list) else ():
        if isinstance(row, Mapping) and isinstance(row.get("asked"), Mapping):
            asked = "+".join(shown(name, 40) for name in list(row["asked"])[:_EXAMPLES]) or "nothing"
            yield f"{asked} of {shown(row.get('subject'), 60)}"


def required(row: Mapping[str, Any]) -> str:
    """What a row says was required of it, in words; empty if nothing was. Schema 1 has one threshold."""
    least, most, margin = (_number(row.get(name)) for name in _RULES)
    if row.get("threshold") is not None:
        least, most = _number(row["threshold"]), None
        least, most = (most, least) if row.get("bound") == "max" else (least, most)
    told = [] if least is None else [f">= {least:g}"]
    told += [] if most is None else [f"<= {most:g}"]
    return " and ".join(told + ([] if margin is None else [f"at most {margin:g} worse"]))


# -- rules ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Baseline:
    """What an alias means now, as far as a no-regression rule asks.

    Attributes:
        weights: sha256 of its weights file; None where nothing has to be compared.
        words: who that is, or why nothing has to be compared.
        reference: what `trainer evaluate --against` takes.
    """

    weights: Digest | None
    words: str
    reference: str = "name@alias"


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricCheck:
    """One rule on one metric.

    Attributes:
        name: the metric, as the policy names it.
        rule: what the policy says.
        kind: which part of it: "range" (min, max) or "regression" (max_regression).
        outcome: "missing" is no pass: what was not measured was not shown.
        detail: what was found and what is wanted, in words.
        figure: the metric, if it was measured.
        mend: what to do about it.
    """

    name: str
    rule: Threshold
    kind: Literal["range", "regression"]
    outcome: Outcome
    detail: str
    figure: Figure | None = None
    mend: str = "evaluate and push a better version, or change the threshold in the policy file"


Judge = Callable[[str, "Threshold", "Figure | None"], MetricCheck]
"""`in_range` or `not_worse`."""


def in_range(name: str, rule: Threshold, figure: Figure | None) -> MetricCheck:
    """Whether a metric lies between min and max, both ends included."""
    if figure is None:
        said = f"the evaluation has no such number, required {rule.range}"
        return MetricCheck(name=name, rule=rule, kind="range", outcome="missing", detail=said)
    inside = rule.min is None or figure.value >= rule.min
    inside = inside and (rule.max is None or figure.value <= rule.max)
    return MetricCheck(
        name=name,
        rule=rule,
        kind="range",
        outcome="pass" if inside else "fail",
        detail=f"{figure}, required {rule.range}{'' if inside else figure.seen}",
        figure=figure,
    )


def not_worse(name: str, rule: Threshold, figure: Figure | None) -> MetricCheck:
    """Whether the whole interval of the paired difference is no worse than the margin: non-inferiority.

    Which end is better is what the rule says; an evaluation that says something else is not judged by it.
    Source: Piaggio et al., "Reporting of noninferiority and equivalence randomized trials", 2012.
    """
    wanted = f"required at most {rule.max_regression:g} worse"
    gap = None if figure is None else figure.difference
    outcome: Outcome = "missing"
    if figure is None:
        said = f"the evaluation has no such number, {wanted}"
    elif figure.direction not in (None, rule.better):
        outcome = "fail"
        said = f"the policy says that {rule.better} is better, the evaluation says {figure.direction}"
    elif gap is None:
        said = f"the evaluation has no usable difference, {wanted}"
    elif gap.n < MIN_SUBJECTS:
        said = f"the difference rests on {gap.n} people, at least {MIN_SUBJECTS} are needed"
    else:
        worst = gap.low if rule.better == "higher" else -gap.high
        outcome = "pass" if worst >= -(rule.max_regression or 0.0) else "fail"
        said = f"difference {gap}, {wanted}{figure.seen if outcome == 'fail' else ''}"
    return MetricCheck(name=name, rule=rule, kind="regression", outcome=outcome, detail=said, figure=figure)


def check_metrics(
    gate: Gate, found: Sequence[Evaluation], before: Baseline | None
) -> tuple[MetricCheck, ...]:
    """Compare signed evaluations of a version with the metrics of a gate.

    There may be several, in no order: every one that has a metric must keep to its range, so that nobody
    measures until it fits. A no-regression rule looks at those made against what the alias means now.

    Args:
        gate: whose metrics.
        found: the evaluations.
        before: what the alias means; None where nobody can tell: no-regression rules are left out then.
    """
    checks = []
    for name, rule in gate.metrics.items():
        if rule.min is not None or rule.max is not None:
            checks.append(_gravest(name, rule, in_range, found))
        if rule.max_regression is not None and before is not None:
            checks.append(_regression(name, rule, found, before))
    return tuple(checks)


def _gravest(name: str, rule: Threshold, judge: Judge, found: Sequence[Evaluation]) -> MetricCheck:
    """What a rule says of several evaluations: a failure is not outvoted, and one that knows is enough."""
    checks = []
    for one in found:
        try:
            checks.append(judge(name, rule, one.figure(name)))
        except InvalidDocument as error:
            checks.append(replace(judge(name, rule, None), outcome="fail", detail=error.message))
    order: tuple[Outcome, ...] = ("fail", "pass", "missing")
    return min(checks, key=lambda check: order.index(check.outcome), default=judge(name, rule, None))


def _regression(name: str, rule: Threshold, found: Sequence[Evaluation], before: Baseline) -> MetricCheck:
    if before.weights is None:
        return MetricCheck(name=name, rule=rule, kind="regression", outcome="pass", detail=before.words)
    # Whoever leaves out what was judged could compare another adapter with what the alias means.
    compared = [one for one in found if one.against == before.weights and one.weights is not None]
    if compared:
        check = _gravest(name, rule, not_worse, compared)
        return replace(check, detail=f"against {before.words}: {check.detail}")
    return MetricCheck(
        name=name,
        rule=rule,
        kind="regression",
        outcome="missing",
        detail=f"no signed evaluation compares it with {before.words}",
        mend=f"`trainer evaluate ... --against {before.reference}`, and sign it by `registry attest`",
    )
