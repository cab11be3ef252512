"""The verdict of an evaluation: its rules, its words, and that a promotion never disagrees with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from registry.digest import digest_bytes
from registry.evaluation import Baseline, check_metrics, parse
from registry.policy import Gate, RegistryPolicy, Threshold
from trainer.errors import EvaluationError
from trainer.evaluation import gates
from trainer.evaluation.catalogue import METRICS
from trainer.evaluation.report import Against, Case, Digests, Gap, Metric, Probe, Value

MINE, PROD = digest_bytes(b"mine"), digest_bytes(b"prod")
CASES = tuple(
    Case(
        subject=f"human {n}",
        asked={"happy": 1.0},
        judged_as="sad",
        judged_intensity=0.1,
        identity=None,
        psnr=None,
    )
    for n in range(5)
)


def value(mean: float, spread: float = 0.05) -> Value:
    return Value(value=mean, low=mean - spread, high=mean + spread, n=96, samples=1152)


def gap(mean: float, spread: float = 0.01, n: int = 96) -> Gap:
    return Gap(value=mean, low=mean - spread, high=mean + spread, p=0.5, p_holm=1.0, n=n, detectable=0.02)


def row(
    rule: Threshold | None,
    mean: float = 0.9,
    difference: Gap | None = None,
    *,
    name: str = "top1_accuracy",
    **more: Any,
) -> Metric:
    """The row of one metric under one rule."""
    differences = {} if difference is None else {name: difference}
    (found,) = gates.rows(
        {name: value(mean)}, {}, differences, {} if rule is None else {name: rule}, CASES, **more
    )
    return found


def policy(text: str) -> RegistryPolicy:
    return RegistryPolicy.parse(text.encode())


def test_a_recipes_thresholds_know_which_end_they_are() -> None:
    found = gates.thresholds({"top1_accuracy": 0.85, "structural_confusion": 0.1})
    assert found == {"top1_accuracy": Threshold(min=0.85), "structural_confusion": Threshold(max=0.1)}
    with pytest.raises(ValueError, match="no metric is called 'accuracy'"):
        gates.thresholds({"accuracy": 0.85})


@pytest.mark.parametrize(
    ("rule", "mean", "difference", "taken", "passed"),
    [
        (None, 0.9, None, True, None),
        (Threshold(min=0.9), 0.9, None, True, True),
        (Threshold(min=0.91), 0.9, None, False, False),
        (Threshold(max=0.9), 0.9, None, False, True),
        (Threshold(min=0.5, max_regression=0.02), 0.9, gap(0.0), True, True),
        (Threshold(min=0.5, max_regression=0.02), 0.9, gap(-0.02), True, False),
        (Threshold(min=0.95, max_regression=0.02), 0.9, gap(0.0), True, False),
        (Threshold(max_regression=0.02, direction="higher"), 0.9, gap(0.0), False, True),
        (Threshold(max_regression=0.02, direction="higher"), 0.9, gap(0.0, n=3), False, False),
        (Threshold(max_regression=0.02, direction="higher"), 0.9, None, False, None),
        (Threshold(max_regression=0.02, direction="higher"), 0.9, None, True, False),
        (Threshold(max_regression=0.02, direction="lower"), 0.9, gap(0.0), True, False),
        (Threshold(min=0.5, max_regression=0.02), 0.9, None, False, True),
    ],
)
def test_every_rule(
    rule: Threshold | None, mean: float, difference: Gap | None, taken: bool, passed: bool | None
) -> None:
    found = row(rule, mean, difference, taken=taken)
    assert found.passed is passed
    assert bool(found.examples) == (passed is False)
    verdict = gates.judge((found,))
    assert verdict.passed == (passed is not False)
    assert verdict.failed == (("top1_accuracy",) if passed is False else ())
    assert len(verdict.reasons) == len(verdict.failed)


def test_the_reason_names_value_interval_requirement_and_examples() -> None:
    (reason,) = gates.judge((row(Threshold(min=0.95)),)).reasons
    assert reason == (
        "top1_accuracy is 0.900 (95 % interval 0.850 to 0.950), required at least 0.950; "
        "for example happy of human 0, happy of human 1, happy of human 2"
    )


def test_the_reason_names_the_difference() -> None:
    (reason,) = gates.judge((row(Threshold(min=0.5, max_regression=0.02), 0.9, gap(-0.05)),)).reasons
    assert reason.startswith(
        "top1_accuracy: difference -0.05 (95 % interval -0.06 to -0.04, p = 0.5), "
        "required at most 0.02 worse; for example"
    )
    (both,) = gates.judge((row(Threshold(min=0.95, max_regression=0.02), 0.9, gap(-0.05)),)).reasons
    assert "required at least 0.950; top1_accuracy: difference -0.05" in both
    lower = Threshold(max=0.5, max_regression=0.02)
    (worse,) = gates.judge((row(lower, 0.1, gap(0.05), name="structural_confusion"),)).reasons
    assert "difference +0.05" in worse


def test_what_could_not_be_compared_is_said() -> None:
    rule = Threshold(max_regression=0.02, direction="higher")
    (note,) = gates.judge((row(rule),)).notes
    assert note.startswith("top1_accuracy: whether it got worse was not judged")
    verdict = gates.judge((row(rule, taken=True),))
    assert verdict.notes == ()
    assert "no usable difference" in verdict.reasons[0]
    assert gates.judge((row(rule, 0.9, gap(0.0)),)).notes == ()


def test_a_probe_that_fails_refuses() -> None:
    wrong = Probe(name="memorisation", title="", outcome="fail", found="3 edits are training images")
    verdict = gates.judge((row(Threshold(min=0.5)),), (wrong,))
    assert (verdict.passed, verdict.failed) == (False, ("memorisation",))
    assert verdict.reasons == ("memorisation: 3 edits are training images",)
    assert gates.judge((), (wrong.model_copy(update={"outcome": "skipped"}),)).passed


def test_the_worst_edits_of_a_metric_are_its_examples() -> None:
    asked = []

    def worst(name: str) -> tuple[Case, ...]:
        asked.append(name)
        return CASES[3:]

    assert row(Threshold(min=0.95), worst=worst).examples == CASES[3:]
    assert row(Threshold(min=0.5), worst=worst).examples == ()
    assert asked == ["top1_accuracy"]


def test_a_rule_on_what_the_suite_does_not_measure_is_not_kept() -> None:
    rules = {"blend_success": Threshold(min=0.5)}
    assert gates.rows({}, {}, {}, rules) == ()
    verdict = gates.judge((), (), rules)
    assert (verdict.passed, verdict.failed) == (False, ("blend_success",))
    assert verdict.reasons == ("blend_success: this suite does not measure it, required >= 0.5",)
    kept = row(Threshold(min=0.5))
    assert gates.judge((kept,), (), {kept.name: Threshold(min=0.5)}).passed


def test_the_policy_gives_rules_on_metrics_that_are_known_and_says_the_others() -> None:
    found = policy(
        "[gates.prod.metrics.top1_accuracy]\nmin = 0.85\nmax_regression = 0.02\n"
        '[gates.prod.metrics."safety.score"]\nmin = 1\n'
    )
    assert gates.rules_of(found, "prod") == {"top1_accuracy": Threshold(min=0.85, max_regression=0.02)}
    assert gates.unknown_of(found, "prod") == ("safety.score",)
    assert gates.rules_of(found, "staging") == gates.rules_of(found, None) == {}


@pytest.mark.parametrize(
    ("name", "direction"),
    [("top1_accuracy", "lower"), ("structural_confusion", "higher")],
)
def test_a_policy_that_takes_the_wrong_end_for_better_is_explained(name: str, direction: str) -> None:
    found = policy(f'[gates.prod.metrics.{name}]\nmax_regression = 0.02\ndirection = "{direction}"')
    with pytest.raises(EvaluationError, match=name):
        gates.rules_of(found, "prod")


def test_of_two_sets_of_rules_the_stricter_ends_count() -> None:
    recipe = {"top1_accuracy": Threshold(min=0.85), "structural_confusion": Threshold(max=0.1)}
    gate = {
        "top1_accuracy": Threshold(min=0.8, max=0.99, max_regression=0.02, direction="higher"),
        "basic_accuracy": Threshold(min=0.9),
    }
    assert (
        gates.merged(recipe, gate)
        == gates.merged(gate, recipe)
        == {
            "top1_accuracy": Threshold(min=0.85, max=0.99, max_regression=0.02, direction="higher"),
            "structural_confusion": Threshold(max=0.1),
            "basic_accuracy": Threshold(min=0.9),
        }
    )
    with pytest.raises(EvaluationError, match="contradict"):
        gates.merged({"top1_accuracy": Threshold(min=0.9)}, {"top1_accuracy": Threshold(max=0.8)})


RULES = st.builds(
    lambda low, width, margin, better, ends: Threshold(
        min=low if ends in ("min", "both", "none+") else None,
        max=low + width if ends in ("max", "both", "none+") else None,
        max_regression=None if ends == "both" else margin,
        direction=None if ends == "both" else better,
    ),
    st.floats(-1, 1), st.floats(0, 1), st.floats(0, 0.2), st.sampled_from(["higher", "lower"]),
    st.sampled_from(["min", "max", "both", "none", "none+"]),
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(RULES, st.sampled_from(sorted(METRICS)), st.floats(-1, 1), st.floats(-0.3, 0.3), st.integers(1, 10))
def test_a_verdict_and_a_promotion_never_disagree(
    rule: Threshold, name: str, mean: float, apart: float, people: int
) -> None:
    """The row as a report has it, and the same row signed, read and held against a policy."""
    metric = row(rule, mean, gap(apart, n=people), name=name, taken=True)
    predicate = {
        "verdict": "pass",
        "digests": {"adapter": str(MINE)},
        "against": {"reference": "pixelsmile@prod", "weights": str(PROD)},
        "metrics": [metric.model_dump(mode="json")],
    }
    before = Baseline(weights=PROD, words="prod")
    promoted = check_metrics(Gate(metrics={name: rule}), [parse(predicate)], before)
    assert metric.passed == all(check.outcome == "pass" for check in promoted)
    assert (gates.reason(metric) == "") == bool(metric.passed)


def test_the_golden_statement_is_what_a_report_says(repository: Path) -> None:
    golden = repository / "tests" / "golden" / "statements" / "evaluation-2.json"
    told = json.loads(golden.read_bytes())["predicate"]
    for found in told["metrics"]:
        assert Metric.model_validate_json(json.dumps(found)).model_dump(mode="json") == found
    for model, found in ((Against, told["against"]), (Digests, told["digests"])):
        assert model.model_validate(found).model_dump(mode="json") == found
