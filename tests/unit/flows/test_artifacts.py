"""What approvers read in tables: figures beside those of production, from evaluations of every schema."""

from __future__ import annotations

from typing import Any

import pytest

from fakes.releases import report
from flows.artifacts import compared
from registry.digest import digest_bytes

PROD = digest_bytes(b"what production runs")
OTHER = digest_bytes(b"something else")


def row(found: list[dict[str, str]], name: str) -> dict[str, str]:
    return next(one for one in found if one["metric"] == name)


def test_the_paired_difference_is_shown_where_the_evaluation_has_made_it() -> None:
    ours = report(0.9, against=("pixelsmile:1", PROD), gap=0.03).predicate()
    assert row(compared(ours, report(0.5).predicate(), PROD), "top1_accuracy") == {
        "metric": "top1_accuracy",
        "value": "0.9 (0.85 to 0.95)",
        "now": "0.87",
        "difference": "+0.03 (+0.02 to +0.04), p 0.08",
        "required": ">= 0.85",
        "passed": "yes",
    }


def test_a_comparison_with_something_else_than_production_is_not_shown_as_one_with_it() -> None:
    ours = report(0.8, against=("pixelsmile:1", OTHER), gap=0.03).predicate()
    found = row(compared(ours, report(0.5).predicate(), PROD), "top1_accuracy")
    assert (found["now"], found["difference"], found["passed"]) == ("0.5", "+0.3", "NO")
    alone = row(compared(ours, {}, None), "top1_accuracy")
    assert (alone["now"], alone["difference"]) == ("-", "-")


def test_evaluations_of_older_schemas_and_of_others_are_rows_too() -> None:
    value = {"value": 0.9, "low": 0.85, "high": 0.95, "n": 16, "samples": 192}
    first: dict[str, Any] = {
        "schema_version": 1,
        "metrics": [
            {"name": "top1_accuracy", "value": value, "threshold": 0.85, "bound": "min", "passed": True},
            {"name": "seam_excess", "value": value, "threshold": 0.5, "bound": "max", "passed": False},
        ],
    }
    accuracy, seams = compared(first, {"metrics": {"top1_accuracy": 0.93}}, PROD)
    assert (accuracy["required"], accuracy["passed"], accuracy["now"]) == (">= 0.85", "yes", "0.93")
    assert (seams["required"], seams["passed"], seams["difference"]) == ("<= 0.5", "NO", "-")
    (plain,) = compared({"metrics": {"top1": 0.93}, "against": "nonsense"}, first, PROD)
    assert (plain["value"], plain["required"], plain["passed"]) == ("0.93", "-", "-")
    assert compared({}, first, PROD) == []


@pytest.mark.parametrize(
    "predicate",
    [{}, {"metrics": None}, {"metrics": [None, 3, {"name": "x"}]}, {"metrics": {"a": {"b": "c"}}}],
)
def test_an_evaluation_of_another_form_is_no_error(predicate: Any) -> None:
    assert compared(predicate, predicate, PROD) == []


def test_a_rule_against_getting_worse_is_told_with_its_margin() -> None:
    metrics = [{"name": "top1_accuracy", "value": {"value": 0.9}, "minimum": 0.8, "max_regression": 0.02}]
    (found,) = compared({"metrics": metrics}, {}, None)
    assert found["required"] == ">= 0.8 and at most 0.02 worse"
