"""From readings to samples: editors whose faults are known are found to have just these."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from registry.manifest import ConditioningSpec
from trainer.evaluation import measure
from trainer.evaluation.catalogue import METRICS
from trainer.evaluation.plan import NEUTRAL, Ask, Plan, plan_of, single
from trainer.evaluation.readings import VALUES, Readings
from trainer.evaluation.statistics import difference, estimate
from trainer.portraits.expressions import EXPRESSIONS
from trainer.sections import SuiteSection

SUITE = SuiteSection(
    name="small",
    identities={"human": 3, "anime": 2},
    intensities=(0.0, 0.5, 1.0, 1.5),
    sweep_people=2,
    blend_people=1,
)
CONDITIONING = ConditioningSpec(template="{} face", expressions=EXPRESSIONS)
PLAN = plan_of(SUITE, CONDITIONING)
PEOPLE = len(PLAN.subjects)

Judge = Callable[[int, Ask], np.ndarray]
RANGES = {"control_linearity": -1.0, "basic_linearity": -1.0, "control_range": -1.5, "psnr_gain": -60.0}


def shown(ask: Ask) -> np.ndarray:
    judged = np.zeros(12)
    for name, intensity in ask:
        judged[EXPRESSIONS.index(name)] = intensity
    return judged


def true(subject: int, ask: Ask) -> np.ndarray:
    """Judged as it was asked, with a little of everything that a judge sees in everybody."""
    return shown(ask) + 0.01 * np.arange(12)


def read(
    judge: Judge = true,
    plan: Plan = PLAN,
    *,
    full: bool = False,
    **values: float | Callable[[int, Ask], float],
) -> Readings:
    """What judges say of an editor; `values` beside those of a perfect one."""
    keys = [
        (index, ask)
        for index, one in enumerate(plan.subjects)
        for ask in (one.full_strength if full else one.asks)
    ]
    perfect = dict.fromkeys(VALUES, 1.0) | {"psnr": 40.0, "background_lpips": 0.0, "identity": 0.9, **values}
    columns = {
        name: np.array([told(*key) if callable(told) else told for key in keys], np.float64)
        for name, told in perfect.items()
    }
    judged = np.array([judge(*key) for key in keys], np.float64)
    subjects = np.array([index for index, _ in keys], np.int64)
    return Readings(subjects=subjects, asks=tuple(ask for _, ask in keys), judged=judged, values=columns)


def value(readings: Readings, name: str, plan: Plan = PLAN, **others: Readings) -> float:
    found = measure.measure_all(plan, {"adapter": readings, **others})["adapter"][name]
    return float(found.value()[0])


BASE = read(lambda subject, ask: true(subject, NEUTRAL), full=True, psnr=30.0)
TRUTH = read()


# -- editors with one fault ----------------------------------------------------------------------------------


def test_a_perfect_editor_is_perfect_in_everything() -> None:
    found = measure.measure_all(PLAN, {"adapter": read(), "base": BASE, "renders": TRUTH})["adapter"]
    assert {name: float(sample.value()[0]) for name, sample in found.items()} == pytest.approx(
        {
            "top1_accuracy": 1,
            "basic_accuracy": 1,
            "base_top1_accuracy": 1 / 12,  # always the last class: the judge's own leaning
            "structural_confusion": 0,
            "expression_leakage": 0,
            "neutral_drift": 0,
            "unjudged_rate": 0,
            "control_linearity": 1,
            "basic_linearity": 1,
            "monotonicity": 1,
            "control_range": 1,
            "identity_similarity": 0.9,
            "identity_ratio": 1,
            "harmonic_editing_score": 1.8 / 1.9,
            "lazy_rate": 0,
            "over_edit_rate": 0,
            "face_lost_rate": 0,
            "background_ssim": 1,
            "background_lpips": 0,
            "paired_psnr": 40,
            "psnr_gain": 10,
            "seam_energy": 1,
            "seam_excess": 1,
            "blend_success": 1,
        }
    )
    assert found.keys() == METRICS.keys()


def test_a_copy_of_the_source_is_lazy_and_nothing_else_hides_it() -> None:
    copied = read(lambda subject, ask: true(subject, NEUTRAL), identity=1.0)
    found = {"renders": TRUTH}
    assert value(copied, "lazy_rate", **found) == 1
    assert value(copied, "over_edit_rate", **found) == 0
    assert value(copied, "identity_ratio", **found) == pytest.approx(1 / 0.9)
    assert value(copied, "harmonic_editing_score") == pytest.approx(
        np.mean([2 * x / (1 + x) for x in 0.01 * np.arange(12)])
    )
    assert value(copied, "control_range") == 0
    assert value(copied, "control_linearity") == 0


def test_another_person_is_an_over_edit_however_well_it_smiles() -> None:
    stranger = read(identity=0.2)
    assert value(stranger, "over_edit_rate") == value(stranger, "over_edit_rate", renders=TRUTH) == 1
    assert value(stranger, "top1_accuracy") == 1
    assert value(stranger, "harmonic_editing_score") == pytest.approx(2 * 0.2 / 1.2)


def test_swapped_partners_are_confused_in_both_directions() -> None:
    fear, surprised = EXPRESSIONS.index("fear"), EXPRESSIONS.index("surprised")

    def swapped(subject: int, ask: Ask) -> np.ndarray:
        judged = shown(ask)
        judged[[fear, surprised]] = judged[[surprised, fear]]
        return judged

    # One of six pairs, both directions; two of six basic expressions.
    assert value(read(swapped), "structural_confusion") == pytest.approx(1 / 6)
    assert value(read(swapped), "top1_accuracy") == pytest.approx(10 / 12)
    assert value(read(swapped), "basic_accuracy") == pytest.approx(4 / 6)
    assert value(read(swapped), "basic_linearity") == pytest.approx(4 / 6)

    def one_way(subject: int, ask: Ask) -> np.ndarray:
        return swapped(subject, ask) if "fear" in dict(ask) else shown(ask)

    assert value(read(one_way), "structural_confusion") == pytest.approx(1 / 12)
    matrix = np.array(measure.confusion(PLAN, read(one_way)))
    assert matrix[fear, surprised] == matrix[surprised, surprised] == 1
    assert matrix.sum(axis=1) == pytest.approx(np.ones(12))


def test_basic_accuracy_does_not_know_the_other_six() -> None:
    shy = EXPRESSIONS.index("shy")

    def bashful(subject: int, ask: Ask) -> np.ndarray:
        judged = shown(ask)
        judged[shy] = 2.0
        return judged

    assert value(read(bashful), "top1_accuracy") == pytest.approx(1 / 12)
    assert value(read(bashful), "basic_accuracy") == 1


def test_what_leaks_beside_the_asked_expression_is_measured_above_truth() -> None:
    def leaking(subject: int, ask: Ask) -> np.ndarray:
        judged = true(subject, ask)
        judged[EXPRESSIONS.index("sleepy")] += 0.33
        return judged

    # Of every twelve edits one asked for it; in the others it is one of eleven.
    assert value(read(leaking), "expression_leakage", renders=TRUTH) == pytest.approx(0.33 / 11 * 11 / 12)
    assert value(read(leaking), "neutral_drift", renders=TRUTH) == pytest.approx(0.33)
    # Where nobody knows the truth, everything counts.
    assert value(read(leaking), "neutral_drift") == pytest.approx(0.33 + 0.09)


def test_control_is_judged_from_0_to_1_whatever_comes_beyond() -> None:
    def breaking(subject: int, ask: Ask) -> np.ndarray:
        return np.full(12, np.nan) if any(x > 1 for _, x in ask) else shown(ask)

    assert value(read(breaking), "control_linearity") == pytest.approx(1)
    assert value(read(breaking), "monotonicity") == 1
    assert measure.response_curves(PLAN, read(breaking))[0].judged[3].value == 0

    def switch(subject: int, ask: Ask) -> np.ndarray:
        return shown(tuple((name, 1.0) for name, _ in ask))

    assert value(read(switch), "control_linearity") == pytest.approx(np.sqrt(3) / 2)
    assert value(read(switch), "monotonicity") == 0.5


def test_curves_are_of_those_who_were_asked_for_the_whole_sweep() -> None:
    samples = measure.measure_all(PLAN, {"adapter": read(), "base": BASE})
    adapter = samples["adapter"]
    assert (adapter["control_linearity"].subjects, adapter["control_linearity"].samples) == (2, 24)
    assert (adapter["control_range"].subjects, adapter["control_range"].samples) == (PEOPLE, 60)
    assert "control_linearity" not in samples["base"]
    assert float(samples["base"]["control_range"].value()[0]) == 0
    curves = measure.response_curves(PLAN, read())
    assert [curve.expression for curve in curves] == list(EXPRESSIONS)
    assert [point.n for point in curves[0].judged] == [2] * 4
    assert [point.value for point in curves[0].judged] == pytest.approx([0, 0.5, 1, 1.5])
    assert measure.response_curves(PLAN, BASE) == ()


def test_two_intensities_are_no_line() -> None:
    plan = plan_of(SUITE.model_copy(update={"intensities": (0.0, 1.0)}), CONDITIONING)
    found = measure.measure_all(plan, {"adapter": read(plan=plan)})["adapter"]
    assert not {"control_linearity", "basic_linearity", "monotonicity"} & found.keys()
    assert float(found["control_range"].value()[0]) == 1


# -- what nobody saw -----------------------------------------------------------------------------------------


def test_a_lost_face_is_counted_against_the_editor() -> None:
    def lost(subject: int, ask: Ask) -> float:
        return np.nan if subject == 0 and ask == single("happy", 1.0) else 0.9

    faceless = read(identity=lost)
    for name, fault in (
        ("face_lost_rate", 1 / 60),
        ("over_edit_rate", 1 / 60),
        ("identity_similarity", 0.9 * 59 / 60),
        ("identity_ratio", 59 / 60),
        ("harmonic_editing_score", 1.8 / 1.9 * 59 / 60),
    ):
        assert value(faceless, name, renders=TRUTH) == pytest.approx(fault)
        (told, *more) = measure.worst(PLAN, {"adapter": faceless, "renders": TRUTH}, name)
        assert (told.subject, told.asked, told.identity) == (PLAN.subjects[0].name, {"happy": 1.0}, None)
        assert not more


def test_a_source_without_a_face_is_nobodys_fault() -> None:
    def lost(subject: int, ask: Ask) -> float:
        return np.nan if subject == 0 else 0.9

    readings = read(identity=lost, source_face=lambda subject, ask: float(subject != 0))
    found = measure.measure_all(PLAN, {"adapter": readings})["adapter"]
    for name in ("face_lost_rate", "over_edit_rate", "lazy_rate", "harmonic_editing_score"):
        assert found[name].subjects == PEOPLE - 1
    assert float(found["identity_similarity"].value()[0]) == pytest.approx(0.9)
    assert float(found["face_lost_rate"].value()[0]) == 0
    assert found["top1_accuracy"].subjects == PEOPLE


def test_an_editor_whose_faces_are_all_lost_loses_everything() -> None:
    found = measure.measure_all(PLAN, {"adapter": read(identity=np.nan), "renders": TRUTH})["adapter"]
    assert [float(found[name].value()[0]) for name in ("face_lost_rate", "over_edit_rate")] == [1, 1]
    assert [float(found[name].value()[0]) for name in ("identity_ratio", "harmonic_editing_score")] == [0, 0]


def test_what_the_judge_does_not_see_shows_nothing() -> None:
    blind = read(lambda subject, ask: np.full(12, np.nan))
    found = measure.measure_all(PLAN, {"adapter": blind})["adapter"]
    for name, told in (("unjudged_rate", 1), ("top1_accuracy", 0), ("harmonic_editing_score", 0)):
        assert float(found[name].value()[0]) == told
    # Not even the first class, which an argmax of nothing would name.
    assert np.array(measure.confusion(PLAN, blind)).sum() == 0
    assert {case.judged_as for case in measure.cases(PLAN, blind)} == {measure.NOTHING}


def test_an_encoder_that_does_not_know_the_people_gives_no_ratio() -> None:
    strange = read(identity=-0.1)
    assert (
        "identity_ratio" not in measure.measure_all(PLAN, {"adapter": read(), "renders": strange})["adapter"]
    )
    assert "identity_ratio" not in measure.measure_all(PLAN, {"adapter": read()})["adapter"]


# -- who is compared with whom -------------------------------------------------------------------------------


def test_true_answers_are_not_compared_with_themselves() -> None:
    found = measure.measure_all(PLAN, {"adapter": read(), "base": BASE, "renders": TRUTH})
    assert "psnr_gain" not in found["base"]
    assert not {"identity_ratio", "paired_psnr", "psnr_gain", "seam_excess", "expression_leakage"} & set(
        found["renders"]
    )
    assert float(found["renders"]["top1_accuracy"].value()[0]) == 1
    assert "base_top1_accuracy" not in found["base"] | found["renders"]


def test_psnr_gain_pairs_every_edit_with_the_same_edit_of_the_base() -> None:
    base = read(full=True, psnr=lambda subject, ask: 20.0 + subject)
    adapter = read(psnr=lambda subject, ask: 21.0 + 2 * subject)
    sample = measure.measure_all(PLAN, {"adapter": adapter, "base": base})["adapter"]["psnr_gain"]
    assert (sample.sums / sample.counts)[:, 0] == pytest.approx([1 + subject for subject in range(PEOPLE)])


def test_two_adapters_of_a_plan_are_paired_in_every_metric() -> None:
    rng = np.random.default_rng(0)

    def noisy(subject: int, ask: Ask) -> np.ndarray:
        return np.full(12, np.nan) if rng.random() < 0.1 else shown(ask) + rng.normal(0, 0.4, 12)

    worse = read(noisy, identity=lambda subject, ask: np.nan if rng.random() < 0.2 else 0.5)
    found = measure.measure_all(
        PLAN, {"adapter": read(), "against": worse, "base": BASE, "renders": TRUTH, "raw": read(full=True)}
    )
    assert found["adapter"].keys() - found["against"].keys() == {"base_top1_accuracy"}
    for name, theirs in found["against"].items():
        told = difference(found["adapter"][name], theirs, resamples=100)
        assert told.n == theirs.subjects
        gain = -told.value if METRICS[name].direction == "lower" else told.value
        assert gain >= 0, name


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_every_metric_stays_in_its_range_and_ignores_the_order_of_rows(seed: int) -> None:
    rng = np.random.default_rng(seed)

    def anything(subject: int, ask: Ask) -> np.ndarray:
        return np.full(12, np.nan) if rng.random() < 0.2 else rng.uniform(-0.25, 1.25, 12)

    def similarity(subject: int, ask: Ask) -> float:
        return np.nan if rng.random() < 0.2 else rng.uniform(-1, 1)

    readings = read(anything, identity=similarity)
    for name, sample in measure.measure_all(PLAN, {"adapter": readings, "base": BASE})["adapter"].items():
        told = estimate(sample, resamples=50)
        limit = METRICS[name].unit == "dB" or name == "control_range"
        assert np.isfinite([told.low, told.high]).all()
        lowest = -1.0 if name in ("identity_similarity", "background_ssim") else RANGES.get(name, 0.0)
        assert told.low >= lowest, name
        assert limit or told.high <= 1.25, name
        shuffled = readings.where(rng.permutation(len(readings)))
        assert value(shuffled, name, base=BASE) == pytest.approx(float(sample.value()[0]))


def test_rates_are_known_as_such() -> None:
    found = measure.measure_all(PLAN, {"adapter": read(), "base": BASE, "renders": TRUTH})["adapter"]
    assert {name for name, sample in found.items() if sample.rate} == {
        "top1_accuracy", "basic_accuracy", "base_top1_accuracy", "structural_confusion", "unjudged_rate",
        "lazy_rate", "over_edit_rate", "face_lost_rate", "blend_success",
    }  # fmt: skip
    told = estimate(found["structural_confusion"])
    assert (told.low, told.value, told.high) == (0, 0, 3 / 60)


# -- ragged suites -------------------------------------------------------------------------------------------


def ragged() -> Plan:
    """As FFE-Bench: every subject is asked for one expression, and no true answer is known."""
    subjects = tuple(
        replace(
            PLAN.subjects[0],
            name=f"task {number}",
            asks=(NEUTRAL, *(single(name, level) for level in SUITE.intensities[1:])),
        )
        for number, name in enumerate(("happy", "fear", "shy", "fear", "surprised"))
    )
    return replace(PLAN, subjects=subjects, expressions=("fear", "happy", "shy", "surprised"))


def test_subjects_with_one_expression_each_give_every_metric_that_needs_no_truth() -> None:
    plan = ragged()

    def fearful(subject: int, ask: Ask) -> np.ndarray:
        return shown((("surprised", 1.0),)) if subject == 3 and ask else shown(ask)

    nothing = {"psnr": np.nan, "seam_truth": np.nan}
    readings = read(fearful, plan, **nothing)
    base = read(lambda subject, ask: np.zeros(12), plan, full=True, **nothing)
    found = measure.measure_all(plan, {"adapter": readings, "base": base})["adapter"]
    assert METRICS.keys() - found.keys() == {
        "identity_ratio", "paired_psnr", "psnr_gain", "seam_excess", "blend_success",
    }  # fmt: skip
    assert float(found["top1_accuracy"].value()[0]) == pytest.approx(4 / 5)
    assert float(found["basic_accuracy"].value()[0]) == pytest.approx(3 / 4)
    assert (found["basic_accuracy"].subjects, found["top1_accuracy"].subjects) == (4, 5)
    # Fear is asked twice and taken for surprise once, surprise and happy and shy are asked once: four rates.
    pairs = [pair for pair in PLAN.pairs if set(pair) <= set(plan.expressions)]
    assert pairs == [("fear", "surprised"), ("happy", "shy")]
    assert float(found["structural_confusion"].value()[0]) == pytest.approx((1 / 2 + 0 + 0 + 0) / 4)
    assert float(found["control_linearity"].value()[0]) == pytest.approx(4 / 5)
    assert float(found["base_top1_accuracy"].value()[0]) == 0
    (told,) = measure.worst(plan, {"adapter": readings}, "structural_confusion")
    assert (told.subject, told.judged_as) == ("task 3", "surprised")
    assert [curve.judged[0].n for curve in measure.response_curves(plan, readings)] == [2, 1, 1, 1]
    assert (
        np.array(measure.confusion(plan, readings))[0].tolist()
        == (shown((("fear", 0.5), ("surprised", 0.5)))).tolist()
    )


# -- what speaks against an adapter --------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(METRICS))
def test_the_worst_edits_of_a_metric_are_those_with_the_fault(name: str) -> None:
    """Everything of one person is bad; of every metric the examples are that person's."""
    bad = 1

    def judge(subject: int, ask: Ask) -> np.ndarray:
        if subject != bad:
            return true(subject, ask)
        return np.full(12, np.nan) if dict(ask).get("happy", 0) else 1 - shown(ask)

    def spoilt(good: float, worse: float) -> Callable[[int, Ask], float]:
        return lambda subject, ask: worse if subject == bad else good

    adapter = read(
        judge,
        identity=lambda subject, ask: np.nan if subject == bad and dict(ask).get("sad", 0) else 0.9,
        psnr=spoilt(40.0, 10.0),
        seam=spoilt(1.0, 3.0),
        background_ssim=spoilt(1.0, 0.5),
        background_lpips=spoilt(0.0, 0.5),
    )
    if name == "blend_success":
        bad = 0
        adapter = read(judge)
    if name == "lazy_rate":
        adapter = read(lambda subject, ask: true(subject, NEUTRAL if subject == bad else ask))
    if name == "structural_confusion":
        partner = {a: b for pair in PLAN.pairs for a, b in (pair, pair[::-1])}
        adapter = read(
            lambda subject, ask: shown(tuple((partner[n] if subject == bad else n, x) for n, x in ask))
        )
    base = read(lambda subject, ask: true(subject, ask) if subject == bad else np.zeros(12), full=True)
    told = measure.worst(PLAN, {"adapter": adapter, "base": base, "renders": TRUTH}, name)
    assert 1 <= len(told) <= 3
    assert {case.subject for case in told} == {PLAN.subjects[bad].name}


def test_the_worst_of_an_unknown_metric_or_of_nothing() -> None:
    with pytest.raises(KeyError):
        measure.worst(PLAN, {"adapter": TRUTH}, "beauty")
    assert measure.worst(PLAN, {"adapter": BASE}, "blend_success") == ()


def test_cases_name_the_worst_edits_first() -> None:
    def judge(subject: int, ask: Ask) -> np.ndarray:
        return (
            shown(single("happy", 1.0)) if subject == 2 and ask == single("shy", 1.0) else true(subject, ask)
        )

    readings = read(judge, identity=lambda subject, ask: 0.4 if subject == 1 else 0.9)
    cases = measure.cases(PLAN, readings)
    assert len(cases) == PEOPLE * 12
    assert (cases[0].subject, cases[0].asked) == (PLAN.subjects[2].name, {"shy": 1.0})
    assert (cases[0].judged_as, cases[0].judged_intensity) == ("happy", 0.0)
    assert {case.subject for case in cases[1:13]} == {PLAN.subjects[1].name}


# -- blends --------------------------------------------------------------------------------------------------


def test_blends_tell_how_often_both_were_there_and_how_strong() -> None:
    plan = plan_of(SUITE.model_copy(update={"blend_people": 4}), CONDITIONING)

    def judge(subject: int, ask: Ask) -> np.ndarray:
        judged = shown(ask)
        if set(dict(ask)) == {"angry", "happy"} and subject < 1:
            judged[EXPRESSIONS.index("happy")] = 0.1
        return judged

    found = measure.blends(plan, read(judge, plan))
    assert len(found) == 15
    assert [one.expressions for one in found[:3]] == [
        ("angry", "disgust"),
        ("angry", "fear"),
        ("angry", "happy"),
    ]
    assert (found[0].success, found[0].n) == (1, 4)
    assert found[0].judged == pytest.approx((0.7, 0.7))
    assert found[2].success == 0.75
    assert found[2].judged == pytest.approx((0.7, (0.1 + 3 * 0.7) / 4))
    assert value(read(judge, plan), "blend_success", plan) == pytest.approx(1 - 0.25 / 15)
    assert measure.blends(PLAN, BASE) == ()


# -- the catalogue -------------------------------------------------------------------------------------------


def test_the_catalogue_names_every_column_of_the_paper_once() -> None:
    columns = [facts.paper for facts in METRICS.values() if facts.paper]
    assert sorted(columns) == ["Acc-12", "Acc-6", "CLS-12", "CLS-6", "HES", "ID Sim", "mSCR"]
    for name, facts in METRICS.items():
        assert name == facts.name
        assert facts.definition.endswith(".")
