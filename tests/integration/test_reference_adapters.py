"""The gate on adapters whose one fault is known: each is refused, and by the metric that means that fault.

The suite is a small one, the thresholds are those of the shipped recipe. A metric that misses the fault it is
there for makes a test fail by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from fakes.reference_adapters import FAULTS, GOOD, Fault, adapter
from registry.admission import Policy, admit_candidate
from registry.digest import digest_bytes
from registry.manifest import CARD_NAME, WEIGHTS_NAME, AdapterCard
from serving.bases import fingerprint
from trainer import recipe as recipes
from trainer.evaluation.bench import Bench
from trainer.evaluation.editing import editor
from trainer.evaluation.evaluating import Wanted, build_report
from trainer.evaluation.gates import thresholds
from trainer.evaluation.judges import judges_of
from trainer.evaluation.plan import plan_of
from trainer.evaluation.report import Digests, EvaluationReport, Metric
from trainer.evaluation.suites import of_recipe
from trainer.portraits import base_path

pytestmark = [pytest.mark.integration]

SMALL = {
    "evaluation.identities": {"human": 2, "anime": 1},
    "evaluation.sweep_people": 1,
    "evaluation.blend_people": 1,
    "evaluation.intensities": [0.0, 0.5, 1.0],
}
RECIPE = recipes.change(recipes.load("pixelsmile-portraits"), SMALL)

#: What refuses each of them, among other metrics that the fault also spoils.
REFUSED_BY: dict[Fault, set[str]] = {
    "lazy": {"lazy_rate", "top1_accuracy", "control_range"},
    "over-edited": {"over_edit_rate", "identity_ratio", "paired_psnr"},
    "swapped": {"structural_confusion", "top1_accuracy"},
    "half": {"control_range"},
    "other base": {"psnr_gain", "top1_accuracy", "control_range"},
}

#: What passes in spite of the fault: a metric that fails whatever is wrong would tell nobody what is.
HELD: dict[Fault, set[str]] = {
    "lazy": {"identity_ratio", "over_edit_rate"},
    "over-edited": {"lazy_rate", "base_top1_accuracy"},
    "swapped": {"identity_ratio", "over_edit_rate"},
    "half": {"top1_accuracy", "structural_confusion", "identity_ratio", "lazy_rate", "over_edit_rate"},
    "other base": {"over_edit_rate", "base_top1_accuracy"},
}

Evaluated = Callable[[Fault], EvaluationReport]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    """The report on a reference adapter; the base and the true answers are measured once for all."""
    place = tmp_path_factory.mktemp("evaluations")
    suite = of_recipe(RECIPE)
    bench = Bench(
        plan=plan_of(suite, RECIPE.conditioning),
        judges=judges_of(suite, place),
        base=RECIPE.base,
        base_path=base_path(),
        place=place / "measured",
    )

    @cache
    def report(fault: Fault) -> EvaluationReport:
        folder = adapter(fault, place / fault)
        one = editor("adapter", folder)
        base = replace(one, name="base", strength=0.0, scope="full strength")
        measured = {"adapter": bench.measure(one), "base": bench.measure(base)}
        wanted = Wanted(adapter=folder, rules=thresholds(RECIPE.evaluation.thresholds))
        digests = Digests(
            adapter=one.weights,
            raw=None,
            base=bench.base_digest,
            judges=bench.judges.digests,
            suite=bench.plan.digest(),
            code=digest_bytes(b"this checkout"),
        )
        return build_report(bench, measured, bench.truth(), wanted, digests)

    return report


def metric(report: EvaluationReport, name: str) -> Metric:
    """A row of the report."""
    return next(row for row in report.metrics if row.name == name)


def test_the_good_one_passes(evaluated: Evaluated) -> None:
    report = evaluated("good")

    assert report.verdict.passed, report.verdict.reasons


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_one_is_refused_by_the_metric_that_means_its_fault(
    fault: Fault, evaluated: Evaluated
) -> None:
    report = evaluated(fault)
    failed = set(report.verdict.failed)

    assert not report.verdict.passed
    assert REFUSED_BY[fault] <= failed
    assert not HELD[fault] & failed


@pytest.mark.parametrize("fault", FAULTS)
def test_a_refusal_names_value_interval_and_examples(fault: Fault, evaluated: Evaluated) -> None:
    report = evaluated(fault)
    people = report.suite.subjects

    for name in REFUSED_BY[fault]:
        row = metric(report, name)
        reason = next(text for text in report.verdict.reasons if text.startswith(f"{name} is "))
        assert row.shown() in reason
        assert row.value.low <= row.value.value <= row.value.high
        assert row.examples, name
        assert all(example.subject in people for example in row.examples)
        assert row.examples[0].subject in reason


def test_a_swapped_one_is_judged_as_the_partner_of_what_was_asked(evaluated: Evaluated) -> None:
    """Good adapters and a swapped one differ in nothing else: the same people, the same strength."""
    swapped, good = evaluated("swapped"), evaluated("good")

    assert metric(swapped, "structural_confusion").value.value > 0.7
    assert metric(good, "structural_confusion").value.value < 0.1
    assert metric(swapped, "identity_ratio").value.value > 0.9 * metric(good, "identity_ratio").value.value


def test_half_an_alpha_halves_the_response_and_spoils_nothing_else(evaluated: Evaluated) -> None:
    half, good = (metric(evaluated(fault), "control_range").value for fault in ("half", "good"))

    assert half.value < 0.8 * good.value


@pytest.mark.parametrize("fault", FAULTS)
def test_the_scan_cannot_tell_them_from_the_good_one(fault: Fault, tmp_path: Path) -> None:
    folder = adapter(fault, tmp_path / "adapter")
    files = {name: (folder / name).read_bytes() for name in (WEIGHTS_NAME, CARD_NAME)}

    assert admit_candidate(files, Policy(allow_review=False)).scan.verdict == "pass"


def test_the_good_adapter_was_made_for_the_base_that_ships() -> None:
    card = AdapterCard.model_validate_json((GOOD / CARD_NAME).read_bytes())
    base = next(one for one in card.ingredients if one.kind == "base")

    assert card.base == RECIPE.base
    assert base.digest == fingerprint(base_path())
