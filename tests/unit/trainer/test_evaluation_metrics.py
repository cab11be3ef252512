"""Metrics: hand-computed cases, perfect and worst cases, ranges and invariances, and honest intervals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from trainer.evaluation import metrics

ALL = range(12)
PAIRS = ((0, 4), (5, 10))

judged_vectors = arrays(np.float64, (3, 12, 12), elements=st.floats(0, 1.25, width=32))
response = arrays(np.float64, (2, 3, 5), elements=st.floats(-0.25, 1.25, width=32))
tiny_images = arrays(np.uint8, (2, 16, 24, 3), elements=st.integers(0, 255))
embeddings = arrays(np.float64, (3, 8), elements=st.floats(-1, 1, width=32))


def perfect(subjects: int = 2) -> np.ndarray:
    return np.tile(np.eye(12), (subjects, 1, 1))


def swapped(a: int, b: int) -> np.ndarray:
    """A judge's answers where a and b are always taken for each other."""
    vectors = np.eye(12)
    vectors[[a, b]] = vectors[[b, a]]
    return vectors[None]


def test_top1_counts_the_strongest_expression() -> None:
    judged = perfect()
    judged[1, 3] = judged[1, 7]
    assert metrics.top1_accuracy(judged, ALL).tolist() == [1.0, pytest.approx(11 / 12)]


def test_top1_follows_the_asked_order() -> None:
    judged = np.eye(12)[[7, 2]][None]
    assert metrics.top1_accuracy(judged, [7, 2]).tolist() == [1.0]
    assert metrics.top1_accuracy(judged, [2, 7]).tolist() == [0.0]


def test_confusion_is_the_rate_of_the_partner_in_both_directions() -> None:
    assert metrics.structural_confusion(perfect(1), ALL, PAIRS).tolist() == [0.0]
    assert metrics.structural_confusion(swapped(0, 4), ALL, PAIRS).tolist() == [0.5]
    one_way = perfect(1)
    one_way[0, 5] = one_way[0, 10]
    assert metrics.structural_confusion(one_way, ALL, PAIRS).tolist() == [0.25]


def test_a_wrong_answer_outside_the_pair_is_no_confusion() -> None:
    judged = swapped(0, 7)
    assert metrics.structural_confusion(judged, ALL, PAIRS).tolist() == [0.0]
    assert metrics.top1_accuracy(judged, ALL).tolist() == [pytest.approx(10 / 12)]


@pytest.mark.parametrize(("pairs", "why"), [((), "at least one"), (((0, 11),), "not asked")])
def test_confusion_refuses_pairs_it_cannot_measure(pairs: tuple[tuple[int, int], ...], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        metrics.structural_confusion(perfect()[:, :5], range(5), pairs)


def test_confusion_matrix_rows_are_rates() -> None:
    judged = np.concatenate([perfect(1), swapped(0, 4)])
    matrix = metrics.confusion_matrix(judged, ALL)
    assert matrix[0, 0] == matrix[0, 4] == 0.5
    assert np.allclose(matrix.sum(axis=1), 1)


@given(judged_vectors, st.permutations(range(12)))
def test_rates_lie_in_range_and_ignore_the_names_of_expressions(judged: np.ndarray, order: list[int]) -> None:
    accuracy = metrics.top1_accuracy(judged, ALL)
    confusion = metrics.structural_confusion(judged, ALL, PAIRS)
    assert ((accuracy >= 0) & (accuracy <= 1)).all()
    assert ((confusion >= 0) & (confusion <= 1)).all()
    # The share that is right and the share of one pair that is confused can never exceed everything.
    shuffled = judged[:, order]
    assert np.allclose(metrics.top1_accuracy(shuffled, order), accuracy)
    assert np.allclose(metrics.structural_confusion(shuffled, order, PAIRS), confusion)


def test_linearity_of_a_straight_a_flat_and_a_falling_response() -> None:
    asked = np.array([0, 0.25, 0.5, 0.75, 1])
    judged = np.stack([0.2 + 0.5 * asked, np.full(5, 0.3), 1 - asked])[:, None]
    assert metrics.control_linearity(asked, judged) == pytest.approx([1.0, 0.0, -1.0])


def test_linearity_by_hand() -> None:
    linearity = metrics.control_linearity(np.array([0, 1, 2]), np.array([[[0, 0, 1]]]))
    assert linearity == pytest.approx([np.sqrt(3) / 2])


def test_linearity_needs_different_intensities() -> None:
    with pytest.raises(ValueError, match="two different"):
        metrics.control_linearity(np.ones(3), np.zeros((1, 1, 3)))


@given(response, st.floats(0.1, 5), st.floats(-1, 1))
def test_linearity_is_bounded_and_ignores_scale_and_offset(
    judged: np.ndarray, scale: float, offset: float
) -> None:
    asked = np.linspace(0, 1, 5)
    judged = np.round(judged, 3)
    linearity = metrics.control_linearity(asked, judged)
    assert (np.abs(linearity) <= 1).all()
    assert np.allclose(metrics.control_linearity(asked, judged * scale + offset), linearity, atol=1e-6)


def test_monotonicity_and_range_by_hand() -> None:
    judged = np.array([[[0.0, 0.2, 0.1, 0.8], [0.1, 0.1, 0.3, 0.4]]])
    assert metrics.monotonicity(judged) == pytest.approx([(2 + 2) / 6])
    assert metrics.control_range(judged) == pytest.approx([(0.8 + 0.3) / 2])


@given(response)
def test_monotonicity_is_a_share_and_reversal_never_counts_twice(judged: np.ndarray) -> None:
    rising, falling = metrics.monotonicity(judged), metrics.monotonicity(judged[:, :, ::-1])
    assert (rising + falling <= 1 + 1e-9).all()


def test_blend_needs_every_component_at_half_of_what_was_asked() -> None:
    asked = np.zeros((2, 12))
    asked[0, [6, 10]] = 0.8, 0.4
    asked[1, [0, 7]] = 0.7
    judged = np.zeros((2, 2, 12))
    judged[0, 0, [6, 10]] = 0.4, 0.2
    judged[0, 1, [0, 7]] = 0.9, 0.34
    judged[1, :, :] = 1.0
    assert metrics.blend_success(judged, asked).tolist() == [0.5, 1.0]
    with pytest.raises(ValueError, match="at least one expression"):
        metrics.blend_success(judged, np.zeros((2, 12)))


def test_identity_similarity_of_same_other_and_opposite() -> None:
    source = np.array([[1.0, 0.0]])
    edits = np.array([[[2.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, 0.0]]])
    assert metrics.cosine(source[:, None], edits).tolist() == [[1.0, 0.0, -1.0, 0.0]]
    assert metrics.identity_similarity(source, edits).tolist() == [0.0]


def test_identity_ratio_refuses_a_ceiling_that_is_not_positive() -> None:
    assert metrics.identity_ratio(np.array([0.72]), np.array([0.9])) == pytest.approx([0.8])
    with pytest.raises(ValueError, match="encoder"):
        metrics.identity_ratio(np.array([0.7, 0.7]), np.array([0.9, 0.0]))


@given(embeddings, embeddings, st.floats(0.5, 20))
def test_cosine_is_bounded_symmetric_and_ignores_length(a: np.ndarray, b: np.ndarray, scale: float) -> None:
    a, b = np.round(a, 3), np.round(b, 3)
    value = metrics.cosine(a, b)
    assert (np.abs(value) <= 1).all()
    assert np.allclose(value, metrics.cosine(b, a))
    assert np.allclose(value, metrics.cosine(a * scale, b), atol=1e-9)


def test_psnr_by_hand() -> None:
    truth = np.zeros((2, 8, 8, 3), np.uint8)
    edit = truth.copy()
    edit[1] = 51
    assert metrics.psnr(edit, truth) == pytest.approx([60.0, 20 * np.log10(5)])
    assert metrics.psnr(truth, np.full_like(truth, 255)) == pytest.approx([0.0, 0.0])
    with pytest.raises(ValueError, match="equal shapes"):
        metrics.psnr(truth, truth[:, :4])


@given(tiny_images, tiny_images)
@settings(max_examples=40)
def test_psnr_is_symmetric_bounded_and_best_for_truth(a: np.ndarray, b: np.ndarray) -> None:
    value = metrics.psnr(a, b)
    assert np.allclose(value, metrics.psnr(b, a))
    assert ((value >= 0) & (value <= 60)).all()
    assert (metrics.psnr(a, a) >= value).all()


def test_seams_of_flat_noisy_and_blocky_images() -> None:
    rng = np.random.default_rng(0)
    flat = np.full((64, 64, 3), 90, np.uint8)
    noise = rng.integers(0, 256, (64, 64, 3)).astype(np.uint8)
    smooth = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None] * 3, (64, 64, 3))
    blocky = np.kron(rng.integers(0, 256, (8, 8)), np.ones((8, 8))).astype(np.uint8)[..., None].repeat(3, 2)
    seams = metrics.seam_energy(np.stack([flat, noise, smooth, blocky]))
    assert seams[0] == 1
    assert seams[1] == pytest.approx(1, abs=0.1)
    assert seams[2] == pytest.approx(1)
    assert seams[3] == 1000
    assert metrics.seam_energy(noise) == pytest.approx(seams[1])


def test_seams_grow_with_a_step_at_the_token_border_only() -> None:
    rng = np.random.default_rng(1)
    image = rng.integers(100, 140, (32, 32, 3)).astype(np.uint8)
    at_border, inside = image.copy(), image.copy()
    at_border[:, 16:] += 60
    inside[:, 19:] += 60
    assert metrics.seam_energy(at_border) > 2 * metrics.seam_energy(image)
    assert metrics.seam_energy(inside) < metrics.seam_energy(image)


def test_seam_excess_cancels_the_lines_of_the_drawing() -> None:
    rng = np.random.default_rng(2)
    truth = rng.integers(100, 140, (2, 32, 32, 3)).astype(np.uint8)
    truth[:, 16:] += 60
    edit = truth.copy()
    edit[1, :, 8:16] += 40
    assert metrics.seam_excess(edit, truth)[0] == 1
    assert metrics.seam_excess(edit, truth)[1] > 1.2
    with pytest.raises(ValueError, match="equal shapes"):
        metrics.seam_excess(edit[:1], truth)


def test_seams_need_more_than_one_token() -> None:
    with pytest.raises(ValueError, match="larger than one token"):
        metrics.seam_energy(np.zeros((8, 8, 3), np.uint8))


def test_interval_is_deterministic_by_seed_and_holds_the_mean() -> None:
    values = np.random.default_rng(3).normal(0.8, 0.1, 16)
    first = metrics.estimate(values, seed=5)
    assert first == metrics.estimate(values, seed=5)
    assert first != metrics.estimate(values, seed=6)
    assert first.low < first.value < first.high
    assert first.n == 16


@given(arrays(np.float64, st.integers(1, 20), elements=st.floats(-10, 60, width=32)))
def test_interval_lies_within_the_values_and_around_the_mean(values: np.ndarray) -> None:
    result = metrics.estimate(values, resamples=200)
    assert values.min() - 1e-6 <= result.low <= result.value <= result.high <= values.max() + 1e-6


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    """Percentile intervals of 16 subjects are a little short; 95 % asked, at least 88 % must hold."""
    rng = np.random.default_rng(7)
    results = [metrics.estimate(rng.normal(0.5, 0.2, 16), seed=trial, resamples=400) for trial in range(400)]
    covered = [result.low <= 0.5 <= result.high for result in results]
    assert 0.88 <= np.mean(covered) <= 0.99


@pytest.mark.parametrize("values", [[], [0.5, np.nan], [np.inf], [[0.1, 0.2]]])
def test_interval_refuses_what_has_no_mean(values: list[float]) -> None:
    with pytest.raises(ValueError, match="estimate needs"):
        metrics.estimate(np.array(values))
