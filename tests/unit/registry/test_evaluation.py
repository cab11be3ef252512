"""Signed evaluations: which number a name means, and what the rules of a gate say of it."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes.statements import evaluation, row
from registry.digest import digest_bytes
from registry.errors import InvalidDocument
from registry.evaluation import (
    MAX_ROWS,
    MIN_SUBJECTS,
    Baseline,
    Figure,
    Gap,
    MetricCheck,
    check_metrics,
    in_range,
    not_worse,
    parse,
    required,
)
from registry.policy import Gate, Threshold

MINE, PROD, OLDER = (digest_bytes(name) for name in (b"mine", b"prod", b"older"))
NOW = Baseline(weights=PROD, words="pixelsmile:1, which pixelsmile@prod means", reference="pixelsmile@prod")
FREE: dict[str, Any] = {
    "verdict": "pass",
    "metrics": {"top1": 0.9, "psnr": 30, "not.nested": 4.0, "nan": float("nan"), "yes": True, "text": "0.99"},
    "expression.top1": 0.5,
    "expression": {"top1": 0.8},
    "huge": 10**400,
}


def checked(
    rule: Threshold, *found: dict[str, Any], name: str = "top1_accuracy", before: Baseline | None = NOW
) -> MetricCheck:
    (check,) = check_metrics(Gate(metrics={name: rule}), [parse(one) for one in found], before)
    return check


@pytest.mark.parametrize(
    ("path", "threshold", "found", "outcome"),
    [
        ("metrics.top1", {"min": 0.9}, 0.9, "pass"),
        ("metrics.top1", {"min": 0.91}, 0.9, "fail"),
        ("metrics.top1", {"max": 0.9}, 0.9, "pass"),
        ("metrics.psnr", {"max": 29}, 30.0, "fail"),
        ("metrics.psnr", {"min": 20, "max": 40}, 30.0, "pass"),
        ("metrics.not.nested", {"min": 1}, 4.0, "pass"),
        ("expression.top1", {"min": 0.6}, 0.5, "fail"),
        ("metrics.nan", {"max": 1}, None, "missing"),
        ("metrics.yes", {"min": 0}, None, "missing"),
        ("metrics.text", {"min": 0}, None, "missing"),
        ("metrics", {"min": 0}, None, "missing"),
        ("metrics.top1.more", {"min": 0}, None, "missing"),
        ("nothing.at.all", {"min": 0}, None, "missing"),
        ("huge", {"min": 0}, None, "missing"),
        (".", {"min": 0}, None, "missing"),
    ],
)
def test_numbers_at_a_path(path: str, threshold: dict[str, float], found: float | None, outcome: str) -> None:
    check = checked(Threshold(**threshold), FREE, name=path)
    assert (check.name, check.outcome) == (path, outcome)
    assert (None if check.figure is None else check.figure.value) == found
    assert any(sign in check.detail for sign in (">=", "<="))


def test_a_row_is_found_by_its_name_with_its_interval_and_examples() -> None:
    told = row(examples=[{"subject": "human 3", "asked": {"happy": 1.0, "sad": 0.5}}, {"asked": 3}, None])
    assert checked(Threshold(min=0.9), evaluation(MINE, told)).detail == (
        "0.9 (95 % interval 0.85 to 0.95), required >= 0.9"
    )
    assert checked(Threshold(min=0.95), evaluation(MINE, told)).detail == (
        "0.9 (95 % interval 0.85 to 0.95), required >= 0.95; for example happy+sad of human 3"
    )


def test_rows_of_schema_1_and_of_other_programs_are_read() -> None:
    rows = [
        {"name": "a", "value": {"value": 0.5, "low": 0.4, "high": 0.6}, "threshold": 0.4, "bound": "min"},
        {"name": "b", "value": 4},
        {"name": "c", "value": {"value": 4}},
        "nonsense",
        {"value": 3},
    ]
    found = parse({"verdict": "pass", "metrics": rows, "against": "something", "digests": ["one"]})
    assert found.figure("a") == Figure(value=0.5, low=0.4, high=0.6)
    assert found.figure("b") == found.figure("c") == Figure(value=4.0)
    assert found.figure("d") is None
    assert (found.weights, found.against) == (None, None)


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"threshold": 0.4, "bound": "min"}, ">= 0.4"),
        ({"threshold": 0.4, "bound": "max"}, "<= 0.4"),
        ({"minimum": 0.4, "maximum": 1, "max_regression": None}, ">= 0.4 and <= 1"),
        ({"minimum": None, "maximum": 0.5, "max_regression": 0.02}, "<= 0.5 and at most 0.02 worse"),
        ({"max_regression": 0}, "at most 0 worse"),
        ({"threshold": None, "bound": None}, ""),
        ({"minimum": "x", "maximum": True}, ""),
        ({}, ""),
    ],
)
def test_what_a_row_required(told: dict[str, Any], words: str) -> None:
    assert required(told) == words


def gap(low: float, high: float, n: int = 96) -> Gap:
    return Gap(value=(low + high) / 2, low=low, high=high, p=0.5, n=n)


@pytest.mark.parametrize(
    ("better", "margin", "low", "high", "outcome"),
    [
        ("higher", 0.02, -0.02, 0.01, "pass"),
        ("higher", 0.02, -0.021, 0.5, "fail"),
        ("higher", 0.0, 0.0, 0.1, "pass"),
        ("higher", 0.0, -0.001, 0.1, "fail"),
        ("lower", 0.02, -0.5, 0.02, "pass"),
        ("lower", 0.02, -0.5, 0.021, "fail"),
        ("lower", 0.0, -0.1, 0.0, "pass"),
    ],
)
def test_the_whole_interval_must_be_within_the_margin(
    better: Any, margin: float, low: float, high: float, outcome: str
) -> None:
    rule = Threshold(max_regression=margin, direction=better)
    figure = Figure(value=0.5, direction=better, difference=gap(low, high))
    check = not_worse("a", rule, figure)
    assert check.outcome == outcome
    assert f"required at most {margin:g} worse" in check.detail
    assert "95 % interval" in check.detail


@given(
    st.floats(-1, 1),
    st.floats(0, 1),
    st.floats(0, 1),
    st.floats(0, 0.5),
    st.sampled_from(["higher", "lower"]),
)
def test_both_directions_are_mirrors(
    value: float, down: float, up: float, margin: float, better: Any
) -> None:
    other: Any = {"higher": "lower", "lower": "higher"}[better]
    mine = Gap(value=value, low=value - down, high=value + up, p=None, n=10)
    mirrored = Gap(value=-value, low=-mine.high, high=-mine.low, p=None, n=10)
    outcomes = {
        not_worse(
            "a", Threshold(max_regression=margin, direction=way), Figure(value=0, difference=found)
        ).outcome
        for way, found in ((better, mine), (other, mirrored))
    }
    assert len(outcomes) == 1


@given(st.floats(allow_nan=True, allow_infinity=True), st.floats(-1, 1), st.floats(0, 1))
def test_a_range_holds_what_lies_in_it_and_never_nan(value: float, low: float, width: float) -> None:
    outcome = in_range("a", Threshold(min=low, max=low + width), Figure(value=value)).outcome
    assert (outcome == "pass") == (low <= value <= low + width)
    if math.isnan(value):
        assert outcome == "fail"


def test_few_people_show_nothing() -> None:
    rule = Threshold(max_regression=0.02, direction="higher")
    few = Figure(value=0.9, difference=gap(0.1, 0.1, n=MIN_SUBJECTS - 1))
    enough = Figure(value=0.9, difference=gap(0.1, 0.1, n=MIN_SUBJECTS))
    assert not_worse("a", rule, few).outcome == "missing"
    assert not_worse("a", rule, enough).outcome == "pass"


RULE = Threshold(max_regression=0.02, direction="higher")
BETTER, WORSE = row(difference=(0.03, 0.01, 0.05)), row(difference=(-0.03, -0.05, -0.01))


@pytest.mark.parametrize(
    ("found", "outcome", "words"),
    [
        (
            [evaluation(MINE, BETTER, against=PROD)],
            "pass",
            "against pixelsmile:1, which pixelsmile@prod means",
        ),
        (
            [evaluation(MINE, WORSE, against=PROD)],
            "fail",
            "difference -0.03 (95 % interval -0.05 to -0.01, p",
        ),
        ([evaluation(MINE, BETTER, against=OLDER)], "missing", "no signed evaluation compares it with pixel"),
        ([evaluation(MINE, BETTER)], "missing", "no signed evaluation compares it"),
        ([evaluation(MINE, row(), against=PROD)], "missing", "no usable difference"),
        ([evaluation(MINE, row("other"), against=PROD)], "missing", "no such number"),
        ([evaluation(MINE, BETTER, against=PROD), evaluation(MINE, WORSE, against=OLDER)], "pass", ""),
        ([evaluation(MINE, WORSE, against=OLDER), evaluation(MINE, BETTER, against=PROD)], "pass", ""),
        ([evaluation(MINE, BETTER, against=PROD), evaluation(MINE, WORSE, against=PROD)], "fail", ""),
        ([evaluation(MINE, WORSE, against=PROD), evaluation(MINE, BETTER, against=PROD)], "fail", ""),
        ([], "missing", ""),
    ],
)
def test_only_a_comparison_with_what_the_alias_means_counts(
    found: list[dict[str, Any]], outcome: str, words: str
) -> None:
    check = checked(RULE, *found)
    assert (check.kind, check.outcome) == ("regression", outcome)
    assert words in check.detail
    if "no signed evaluation" in check.detail:
        assert "trainer evaluate ... --against pixelsmile@prod" in check.mend


def test_where_nothing_is_compared_the_words_say_why() -> None:
    first = Baseline(weights=None, words="the first version")
    check = checked(RULE, evaluation(MINE), before=first)
    assert (check.outcome, check.detail) == ("pass", "the first version")
    assert check_metrics(Gate(metrics={"a": RULE}), [], None) == ()


def test_a_range_and_a_regression_are_two_checks() -> None:
    rule = Threshold(min=0.5, max_regression=0.02)
    found = check_metrics(
        Gate(metrics={"top1_accuracy": rule}), [parse(evaluation(MINE, WORSE, against=PROD))], NOW
    )
    assert [(check.kind, check.outcome) for check in found] == [("range", "pass"), ("regression", "fail")]


def test_every_evaluation_has_to_keep_to_a_range_in_any_order() -> None:
    """Nobody measures until it fits; an evaluation without the metric says nothing about it."""
    rule = Threshold(min=0.8)
    good, bad, other = (evaluation(MINE, one) for one in (row(value=0.9), row(value=0.7), row("other")))
    assert checked(rule, good, other).outcome == checked(rule, other, good).outcome == "pass"
    assert checked(rule, good, bad).outcome == checked(rule, bad, good, other).outcome == "fail"
    assert checked(rule, other).outcome == checked(rule).outcome == "missing"


ODD_GAPS: list[Any] = [
    3, "0.1", [], {}, {"value": 0.1}, {"value": 0.1, "low": 0.2, "high": 0.3, "n": 96, "p": 0.5},
    {"value": 0.1, "low": 0.1, "high": 0.05, "n": 96, "p": 0.5},
    {"value": 0.1, "low": math.nan, "high": 0.2, "n": 96, "p": 0.5},
    {"value": math.inf, "low": 0.1, "high": math.inf, "n": 96, "p": 0.5},
    {"value": "0.1", "low": 0.1, "high": 0.2, "n": 96, "p": 0.5},
    {"value": True, "low": True, "high": True, "n": 96, "p": 0.5},
    {"value": 0.1, "low": 0.1, "high": 0.2, "p": 0.5},
    {"value": 0.1, "low": 0.1, "high": 0.2, "n": True, "p": 0.5},
    {"value": 0.1, "low": 0.1, "high": 0.2, "n": 96.0, "p": 0.5},
    {"value": 0.1, "low": 0.1, "high": 0.2, "n": 96, "p": 2},
    {"value": 0.1, "low": 0.1, "high": 0.2, "n": 96, "p": math.nan},
]  # fmt: skip


@pytest.mark.parametrize("odd", ODD_GAPS)
def test_a_difference_that_is_none_is_missing(odd: Any) -> None:
    assert checked(RULE, evaluation(MINE, row() | {"difference": odd}, against=PROD)).outcome == "missing"


@pytest.mark.parametrize(
    "value",
    [
        None, True, "0.99", math.nan, math.inf, 10**400, [], {}, {"value": True}, {"value": "0.99"},
        {"value": math.nan}, {"value": 0.99, "low": 0.9, "high": math.nan},
        {"value": 0.99, "low": 0.9, "high": None}, {"value": 0.99, "low": 0.1, "high": 0.2},
        {"value": 0.99, "low": "0.9", "high": 1.0},
    ],
)  # fmt: skip
def test_a_value_that_is_none_is_missing(value: Any) -> None:
    told = evaluation(MINE, row(difference=(0.1, 0.1, 0.1)) | {"value": value}, against=PROD)
    for rule in (Threshold(min=-1e9), RULE):
        assert checked(rule, told).outcome == "missing"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"digests": {"adapter": "0" * 64}}, "judged"),
        ({"digests": {"adapter": None}}, "judged"),
        ({"digests": {"adapter": 7}}, "judged"),
        ({"against": {"weights": "prod"}}, "compared with"),
        ({"metrics": [row(), row()]}, "twice"),
        ({"metrics": [row(), {"name": "top1_accuracy"}]}, "twice"),
        ({"metrics": [row(f"m{number}") for number in range(MAX_ROWS + 1)]}, "at most"),
    ],
)
def test_what_decides_and_cannot_be_read_is_refused(more: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidDocument, match=words):
        parse(evaluation(MINE) | more)


def test_a_name_that_means_a_row_and_a_number_is_refused() -> None:
    told = evaluation(MINE, row(value=0.1)) | {"top1_accuracy": 0.99}
    with pytest.raises(InvalidDocument, match="two figures"):
        parse(told).figure("top1_accuracy")
    assert checked(Threshold(min=0.9), told).outcome == "fail"


def test_an_evaluation_that_does_not_say_what_it_judged_is_compared_with_nothing() -> None:
    told = evaluation(MINE, BETTER, against=PROD)
    del told["digests"]["adapter"]
    assert checked(RULE, told).outcome == "missing"


def test_the_policy_decides_which_end_is_better() -> None:
    """Less accuracy, called better by the evaluation itself."""
    flipped = row(difference=(-0.5, -0.6, -0.4), direction="lower")
    check = checked(RULE, evaluation(MINE, flipped, against=PROD))
    assert check.outcome == "fail"
    assert "the policy says that higher is better, the evaluation says lower" in check.detail


NAMES = st.sampled_from(["top1_accuracy", "value", "low", "high", "n", "p", "name", "asked", "a.b", ""])
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=12,
)
KEYS = ("name", "value", "direction", "difference", "examples", "minimum", "maximum", "threshold", "bound")
ROWS = st.lists(st.fixed_dictionaries({}, optional=dict.fromkeys(KEYS, ANYTHING)) | ANYTHING, max_size=4)
PREDICATES = st.fixed_dictionaries(
    {},
    optional={
        "digests": ANYTHING,
        "against": ANYTHING,
        "metrics": ROWS | ANYTHING,
        "top1_accuracy": ANYTHING,
    },
)


@given(PREDICATES, NAMES)
def test_no_predicate_breaks_the_reader(predicate: dict[str, Any], name: str) -> None:
    """It is read or refused, and what passes a rule is a finite number in its range."""
    try:
        found = parse(predicate)
    except InvalidDocument:
        return
    rule = Threshold(min=-1, max=1, max_regression=0.5, direction="higher")
    for check in check_metrics(Gate(metrics={name or "x": rule}), [found], Baseline(weights=PROD, words="")):
        if check.outcome == "pass":
            assert check.figure is not None
            assert math.isfinite(check.figure.value)
            assert -1 <= check.figure.value <= 1
    for one in found.rows.values():
        assert isinstance(required(one), str)
