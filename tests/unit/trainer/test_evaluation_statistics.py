"""Statistics: intervals that hold what they say, fair tests where nothing differs, and honest refusals."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from trainer.evaluation.statistics import Sample, difference, estimate, holm, needed, weights

SUBJECTS = 60

some_values = arrays(np.float64, st.integers(2, 20), elements=st.floats(-10, 60, width=32))


def edits(rates: np.ndarray, rng: np.random.Generator, each: int = 12) -> Sample:
    """Hits of `each` edits of every subject, who differ in how hard they are."""
    hits = rng.random((len(rates), each)) < rates[:, None]
    return Sample.rows(hits.ravel(), np.repeat(np.arange(len(rates)), each), len(rates), rate=True)


# -- samples -------------------------------------------------------------------------------------------------


def test_ragged_edits_of_one_stratum_weigh_the_same() -> None:
    sample = Sample.rows([1, 0, 0, 1], [0, 0, 0, 2], 4)
    assert sample.value() == pytest.approx([0.5])
    assert (sample.subjects, sample.samples) == (2, 4)
    assert sample.sums[:, 0].tolist() == [1, 0, 1, 0]
    assert sample.counts[:, 0].tolist() == [3, 0, 1, 0]


def test_strata_weigh_the_same_however_many_edits_they_have() -> None:
    # Pair 0: 1 of 4; pair 1: 1 of 1; pair 2 was not asked of anybody.
    sample = Sample.rows([1, 0, 0, 0, 1, 0.25], [0, 0, 1, 1, 1, 2], 3, [0, 0, 0, 0, 1, 3])
    assert sample.value() == pytest.approx([(0.25 + 1 + 0.25) / 3])
    drawn = np.array([[2.0, 1.0, 0.0], [0.0, 0.0, 3.0]])
    assert sample.value(drawn) == pytest.approx([(2 / 6 + 1) / 2, 0.25])


def test_what_is_missing_has_no_part() -> None:
    sample = Sample.rows([0.2, np.nan, 0.4, np.inf], [0, 0, 1, 2], 3)
    assert sample.value() == pytest.approx([0.3])
    assert (sample.subjects, sample.samples) == (2, 2)
    assert Sample.of([0.1, np.nan, 0.3]).value() == pytest.approx([0.2])
    assert np.isnan(Sample.of([np.nan]).value()[0])


@given(some_values, st.integers(0, 99))
def test_a_value_does_not_know_the_order_of_edits_or_subjects(values: np.ndarray, seed: int) -> None:
    rng = np.random.default_rng(seed)
    whose, which = rng.integers(0, 5, len(values)), rng.integers(0, 3, len(values))
    value = Sample.rows(values, whose, 5, which).value()
    order, names = rng.permutation(len(values)), rng.permutation(5)
    again = Sample.rows(values[order], names[whose][order], 5, which[order]).value()
    assert again == pytest.approx(value)
    assert values.min() - 1e-9 <= value[0] <= values.max() + 1e-9


def test_draws_are_of_all_subjects_and_the_same_for_everybody() -> None:
    drawn = weights(7, seed=3, resamples=50)
    assert drawn.shape == (50, 7)
    assert (drawn.sum(axis=1) == 7).all()
    assert np.array_equal(drawn, weights(7, seed=3, resamples=50))
    assert not np.array_equal(drawn, weights(7, seed=4, resamples=50))
    with pytest.raises(ValueError, match="read-only"):
        drawn[0, 0] = 9


# -- intervals -----------------------------------------------------------------------------------------------


def test_an_interval_is_decided_by_its_seed() -> None:
    sample = Sample.of(np.random.default_rng(3).normal(0.8, 0.1, 16))
    first = estimate(sample, seed=5)
    assert first == estimate(sample, seed=5)
    assert first != estimate(sample, seed=6)
    assert first.low < first.value < first.high
    assert (first.n, first.samples) == (16, 16)


@given(some_values)
@settings(max_examples=50)
def test_an_interval_lies_within_the_values_and_around_the_mean(values: np.ndarray) -> None:
    result = estimate(Sample.of(values), resamples=200)
    assert values.min() - 1e-6 <= result.low <= result.value <= result.high <= values.max() + 1e-6


def test_an_interval_hardly_knows_the_order_of_subjects() -> None:
    rng = np.random.default_rng(4)
    values = rng.normal(0.5, 0.2, SUBJECTS)
    here, there = estimate(Sample.of(values)), estimate(Sample.of(rng.permutation(values)))
    assert here.value == pytest.approx(there.value)
    assert [here.low, here.high] == pytest.approx([there.low, there.high], abs=0.006)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """Of means, and of rates over edits of subjects who differ: 95 % asked."""
    rng = np.random.default_rng(7)
    means, rates = [], []
    for trial in range(300):
        told = estimate(Sample.of(rng.normal(0.5, 0.2, SUBJECTS)), seed=trial, resamples=400)
        means.append(told.low <= 0.5 <= told.high)
        told = estimate(edits(rng.beta(8, 2, SUBJECTS), rng), seed=trial, resamples=400)
        rates.append(told.low <= 0.8 <= told.high)
    assert 0.90 <= np.mean(means) <= 0.98
    assert 0.90 <= np.mean(rates) <= 0.98


def test_subjects_without_a_value_do_not_widen_the_interval() -> None:
    values = np.random.default_rng(5).normal(0.5, 0.1, 12)
    few = estimate(Sample.of(values))
    among_many = estimate(Sample.of(np.concatenate([values, np.full(84, np.nan)])))
    assert among_many == few


def test_a_rate_without_exception_is_not_certain() -> None:
    """The rule of three: of nothing in 60 edits up to 5 % may still be there."""
    never = estimate(edits(np.zeros(5), np.random.default_rng(0)))
    assert (never.low, never.value, never.high) == (0, 0, 3 / 60)
    always = estimate(edits(np.ones(5), np.random.default_rng(0)))
    assert (always.low, always.value, always.high) == (pytest.approx(57 / 60), 1, 1)
    rng = np.random.default_rng(15)
    held = [
        estimate(edits(np.full(30, 0.003), rng), seed=trial, resamples=400).high >= 0.003
        for trial in range(300)
    ]
    assert np.mean(held) > 0.93


def test_an_interval_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing was measured"):
        estimate(Sample.of([np.nan, np.nan]))


# -- differences ---------------------------------------------------------------------------------------------


def test_equal_editors_do_not_differ() -> None:
    sample = Sample.of(np.random.default_rng(8).normal(0.5, 0.1, 20))
    told = difference(sample, sample)
    assert (told.value, told.low, told.high, told.p, told.n) == (0.0, 0.0, 0.0, 1.0, 20)
    assert (told.spread, told.detectable) == (0.0, 0.0)


@given(some_values, st.integers(0, 9))
@settings(max_examples=50)
def test_a_difference_turns_around_with_its_editors(values: np.ndarray, seed: int) -> None:
    first, second = Sample.of(values), Sample.of(np.random.default_rng(seed).permutation(values))
    there = difference(first, second, seed=seed, resamples=200)
    back = difference(second, first, seed=seed, resamples=200)
    assert there.value == pytest.approx(-back.value)
    assert [there.low, there.high] == pytest.approx([-back.high, -back.low], abs=1e-9)
    assert there.p == back.p
    assert 0 < there.p <= 1


def test_pairing_takes_away_what_both_editors_share() -> None:
    rng = np.random.default_rng(9)
    hard = rng.normal(0.5, 0.3, SUBJECTS)
    first = Sample.of(hard + 0.02 + rng.normal(0, 0.01, SUBJECTS))
    second = Sample.of(hard)
    assert estimate(first).low < estimate(second).high
    told = difference(first, second)
    assert told.low > 0
    assert told.p < 0.01
    assert told.value == pytest.approx(0.02, abs=0.005)


def test_p_is_that_of_the_exact_test() -> None:
    gains = np.array([0.3, 0.1, 0.2, -0.1, 0.4, 0.2])
    told = difference(Sample.of(0.5 + gains), Sample.of(np.full(6, 0.5)), resamples=20_000)
    exact = stats.permutation_test(
        (0.5 + gains, np.full(6, 0.5)), lambda a, b: np.mean(a - b), permutation_type="samples"
    )
    assert told.p == pytest.approx(exact.pvalue, abs=0.01)


def test_p_is_as_small_as_it_says_where_nothing_differs() -> None:
    rng = np.random.default_rng(10)
    p = []
    for trial in range(300):
        rates = rng.beta(8, 2, 30)
        p.append(difference(edits(rates, rng), edits(rates, rng), seed=trial, resamples=200).p)
    for level in (0.05, 0.2, 0.5, 0.8):
        # Ties of rates make the test a little careful, never bold: three standard errors above at most.
        assert level - 0.1 <= np.mean(np.array(p) <= level) <= level + 3 * np.sqrt(level * (1 - level) / 300)


def test_p_is_never_zero() -> None:
    told = difference(Sample.of(np.ones(30)), Sample.of(np.zeros(30)), resamples=99)
    assert told.p == pytest.approx(0.01)


def test_differences_of_what_is_not_paired_are_refused() -> None:
    sample = Sample.of([0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match="same subjects"):
        difference(sample, Sample.of([0.1, 0.2]))
    with pytest.raises(ValueError, match="asked for the same"):
        difference(sample, Sample.of([0.1, np.nan, 0.3]))
    with pytest.raises(ValueError, match="asked for the same"):
        difference(sample, Sample.rows([0.1, 0.2, 0.3, 0.3], [0, 1, 2, 2], 3))
    with pytest.raises(ValueError, match="nothing was measured"):
        difference(Sample.of([np.nan]), Sample.of([np.nan]))


# -- power ---------------------------------------------------------------------------------------------------


def test_spread_is_that_of_the_subjects() -> None:
    rng = np.random.default_rng(11)
    gains = rng.normal(0, 0.1, SUBJECTS)
    told = difference(Sample.of(gains), Sample.of(np.zeros(SUBJECTS)), resamples=20_000)
    assert told.spread == pytest.approx(gains.std(ddof=1), rel=0.02)
    few = difference(Sample.of(gains[:5]), Sample.of(np.zeros(5)), resamples=20_000)
    assert few.spread == pytest.approx(gains[:5].std(ddof=1), rel=0.02)
    reach = NormalDist().inv_cdf(0.975) + NormalDist().inv_cdf(0.8)
    assert told.detectable == pytest.approx(reach * told.spread / np.sqrt(SUBJECTS), rel=0.02)


def test_needed_by_hand() -> None:
    # (1.96 + 0.84)^2 = 7.85 times the square of spread over margin.
    assert needed(0.1, 0.1) == 8
    assert needed(0.1, 0.02) == 197
    assert needed(0.0, 0.02) == 2
    with pytest.raises(ValueError, match="difference of 0"):
        needed(0.1, 0.0)


@given(st.floats(0.001, 1), st.floats(0.001, 1))
def test_finer_margins_need_more_subjects(spread: float, margin: float) -> None:
    assert needed(spread, margin / 2) >= needed(spread, margin) <= needed(2 * spread, margin)


def test_so_many_subjects_as_needed_show_the_margin_four_times_in_five() -> None:
    rng = np.random.default_rng(12)
    spread, margin = 0.06, 0.02
    count = needed(spread, margin)
    assert count == 71
    shown = []
    for trial in range(300):
        gains = rng.normal(margin, spread, count)
        told = difference(Sample.of(gains), Sample.of(np.zeros(count)), seed=trial, resamples=400)
        shown.append(told.low > 0)
    assert 0.74 <= np.mean(shown) <= 0.87


def test_the_portraits_suite_tells_two_points_of_accuracy_apart() -> None:
    """Of as many people as portraits-v1 has; editors as good as the shipped one, each with its own luck."""
    rng = np.random.default_rng(16)
    shown = []
    for trial in range(200):
        skill = rng.beta(20 * 0.99, 20 * 0.01, 96)
        told = difference(
            edits(skill, rng), edits(np.maximum(skill - 0.02, 0), rng), seed=trial, resamples=400
        )
        shown.append(told.low > 0)
    assert np.mean(shown) >= 0.8


def test_editors_who_agree_everywhere_could_still_differ_by_a_few_edits() -> None:
    all_hits = edits(np.ones(SUBJECTS), np.random.default_rng(0))
    told = difference(all_hits, all_hits)
    assert (told.value, told.spread, told.p) == (0, 0, 1)
    # Six people could not show two points, however much they agree.
    assert [-told.low, told.high] == pytest.approx([3 / (12 * SUBJECTS)] * 2)
    few = difference(*[edits(np.ones(6), np.random.default_rng(0))] * 2)
    assert few.low < -0.02 < 0.02 < few.high
    assert told.detectable == 6 / (12 * SUBJECTS)
    rng = np.random.default_rng(14)
    shown = []
    for trial in range(300):
        misses = edits(np.full(SUBJECTS, 1 - told.detectable), rng)
        shown.append(difference(all_hits, misses, seed=trial, resamples=400).low > 0)
    assert 0.76 <= np.mean(shown) <= 0.92


# -- many tests at once --------------------------------------------------------------------------------------


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_holm_keeps_the_order_and_never_lowers(p_values: list[float]) -> None:
    corrected = holm(p_values)
    assert all(p <= q <= 1 for p, q in zip(p_values, corrected, strict=True))
    assert corrected[int(np.argmin(p_values))] == pytest.approx(min(1, len(p_values) * min(p_values)))
    order = np.argsort(p_values, kind="stable")
    assert (np.diff(np.array(corrected)[order]) >= 0).all()


def test_holm_raises_a_false_alarm_as_seldom_as_one_test() -> None:
    rng = np.random.default_rng(13)
    alarms = [min(holm(rng.random(20).tolist())) <= 0.05 for _ in range(2000)]
    assert np.mean(alarms) == pytest.approx(0.05, abs=0.015)
