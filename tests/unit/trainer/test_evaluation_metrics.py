"""Metrics: hand-computed cases, perfect and worst edits, ranges and invariances, and what nobody saw."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from trainer.evaluation import metrics

ALL = np.arange(12)
NAN = np.nan
UNSEEN = np.full((1, 12), NAN)

judged_vectors = arrays(np.float64, (6, 12), elements=st.floats(-0.25, 1.5, width=32))
classes = arrays(np.int64, 6, elements=st.integers(0, 11))
similarities = arrays(np.float64, 6, elements=st.floats(-1, 1, width=32) | st.just(NAN))
response = arrays(np.float64, (4, 5), elements=st.floats(-0.25, 1.25, width=32))
tiny_images = arrays(np.uint8, (2, 16, 24, 3), elements=st.integers(0, 255))
embeddings = arrays(np.float64, (3, 8), elements=st.floats(-1, 1, width=32))


def is_rate(values: np.ndarray) -> bool:
    return set(values.tolist()) <= {0.0, 1.0}


# -- expression ----------------------------------------------------------------------------------------------


def test_a_hit_is_the_strongest_expression() -> None:
    judged = np.eye(12)
    assert metrics.hits(judged, ALL).tolist() == [1.0] * 12
    judged[3] = judged[7]
    assert metrics.hits(judged, ALL).tolist() == [float(k != 3) for k in range(12)]
    assert metrics.hits(judged[[3]], np.array([7])).tolist() == [1.0]


def test_a_hit_among_the_basic_six_ignores_the_others() -> None:
    judged = np.array([[0.5, 0.9, 0.4], [0.5, 0.9, 0.6]])
    asked = np.array([0, 0])
    assert metrics.hits(judged, asked).tolist() == [0.0, 0.0]
    assert metrics.hits(judged, asked, among=[0, 2]).tolist() == [1.0, 0.0]
    assert metrics.winners(judged, among=[2, 0]).tolist() == [0, 2]


def test_a_tie_and_a_judge_who_saw_nothing_have_no_winner() -> None:
    judged = np.array([[0.0, 0.0, 0.0], [0.7, 0.7, 0.1], [NAN, NAN, NAN], [0.1, 0.2, 0.1]])
    assert metrics.winners(judged).tolist() == [-1, -1, -1, 1]
    assert metrics.winners(np.array([[NAN], [0.4]])).tolist() == [-1, 0]
    # The first class must not be a hit because it is the first.
    assert metrics.hits(judged, np.zeros(4, int)).tolist() == [0.0] * 4
    assert metrics.unjudged(judged).tolist() == [0.0, 0.0, 1.0, 0.0]


def test_confusion_is_the_partner_and_no_other_mistake() -> None:
    fear, surprised, happy = 5, 10, 6
    judged = np.eye(12)[[fear, surprised, happy]]
    assert metrics.confused(judged, np.full(3, surprised)).tolist() == [0.0, 1.0, 0.0]


@given(judged_vectors, classes, st.permutations(range(12)))
def test_hits_and_confusions_ignore_the_order_of_the_classes(
    judged: np.ndarray, asked: np.ndarray, order: list[int]
) -> None:
    renamed = np.argsort(order)[asked]
    hits = metrics.hits(judged, asked)
    assert is_rate(hits)
    assert np.array_equal(metrics.hits(judged[:, order], renamed), hits)
    partner = (asked + 1) % 12
    confused = metrics.confused(judged, partner)
    assert np.array_equal(metrics.confused(judged[:, order], np.argsort(order)[partner]), confused)
    assert (hits + confused <= 1).all()


def test_expression_score_is_cut_to_what_was_asked() -> None:
    judged = np.array([[0.4, 0], [1.3, 0], [-0.1, 0], [NAN, NAN]])
    assert metrics.expression_score(judged, np.zeros(4, int)).tolist() == [0.4, 1.0, 0.0, 0.0]


def test_leakage_is_what_the_true_answer_does_not_show() -> None:
    judged = np.array([[0.9, 0.5, 0.1, -0.2]])
    asked = np.array([0])
    assert metrics.leakage(judged, asked) == pytest.approx([0.6 / 3])
    expected = np.array([[1.0, 0.3, 0.3, -0.5]])
    assert metrics.leakage(judged, asked, expected) == pytest.approx([0.2 / 3])
    assert metrics.leakage(expected, asked, expected).tolist() == [0.0]
    assert metrics.leakage(UNSEEN, asked).tolist() == [0.0]


def test_leakage_does_not_count_the_asked_expression() -> None:
    judged = np.zeros((1, 12))
    judged[0, 4] = 1.4
    assert metrics.leakage(judged, np.array([4])).tolist() == [0.0]


def test_drift_is_the_strongest_expression_that_nobody_asked_for() -> None:
    judged = np.array([[0.1, 0.4, 0.3], [-0.1, -0.2, -0.3]])
    assert metrics.neutral_drift(judged) == pytest.approx([0.4, 0.0])
    expected = np.array([[0.0, 0.35, 0.1], [0.0, 0.0, 0.0]])
    assert metrics.neutral_drift(judged, expected) == pytest.approx([0.2, 0.0])


@given(judged_vectors, classes, judged_vectors)
def test_leakage_and_drift_are_not_negative_and_truth_lessens_them(
    judged: np.ndarray, asked: np.ndarray, expected: np.ndarray
) -> None:
    for all_of_it, above in (
        (metrics.leakage(judged, asked), metrics.leakage(judged, asked, expected)),
        (metrics.neutral_drift(judged), metrics.neutral_drift(judged, expected)),
    ):
        assert (above >= 0).all()
        assert (above <= all_of_it + 1e-12).all()
        assert (all_of_it <= 1.5).all()


def test_blend_needs_every_component_at_half_of_what_was_asked() -> None:
    asked = np.zeros((4, 12))
    asked[:2, [6, 10]] = 0.8, 0.4
    asked[2:, [0, 7]] = 0.7
    judged = np.zeros((4, 12))
    judged[0, [6, 10]] = 0.4, 0.2
    judged[1, [6, 10]] = 0.39, 1.0
    judged[2, [0, 7]] = 0.9, 0.34
    judged[3] = NAN
    assert metrics.blend_success(judged, asked).tolist() == [1.0, 0.0, 0.0, 0.0]
    assert metrics.blend_success(judged, asked, present=0.4).tolist() == [1.0, 1.0, 1.0, 0.0]
    with pytest.raises(ValueError, match="at least one expression"):
        metrics.blend_success(judged, np.zeros((4, 12)))


# -- control -------------------------------------------------------------------------------------------------


def test_linearity_of_a_straight_a_flat_and_a_falling_response() -> None:
    asked = np.array([0, 0.25, 0.5, 0.75, 1])
    judged = np.stack([0.2 + 0.5 * asked, np.full(5, 0.3), 1 - asked, np.full(5, NAN)])
    assert metrics.control_linearity(asked, judged) == pytest.approx([1.0, 0.0, -1.0, 0.0])


def test_linearity_by_hand() -> None:
    linearity = metrics.control_linearity(np.array([0, 1, 2]), np.array([[0, 0, 1.0], [0, NAN, 1]]))
    assert linearity == pytest.approx([np.sqrt(3) / 2] * 2)


@pytest.mark.parametrize("asked", [[1.0, 1.0, 1.0], [0.0, 1.0, 1.0]])
def test_linearity_needs_three_different_intensities(asked: list[float]) -> None:
    with pytest.raises(ValueError, match="3 different"):
        metrics.control_linearity(np.array(asked), np.zeros((1, 3)))


@given(response, st.floats(0.1, 5), st.floats(-1, 1))
def test_linearity_is_bounded_and_ignores_scale_and_offset(
    judged: np.ndarray, scale: float, offset: float
) -> None:
    asked = np.linspace(0, 1, 5)
    judged = np.round(judged, 3)
    linearity = metrics.control_linearity(asked, judged)
    assert (np.abs(linearity) <= 1).all()
    assert np.allclose(metrics.control_linearity(asked, judged * scale + offset), linearity, atol=1e-6)
    assert np.allclose(metrics.control_linearity(asked, judged[:, ::-1]), -linearity, atol=1e-6)


def test_monotonicity_and_range_by_hand() -> None:
    judged = np.array([[0.0, 0.2, 0.1, 0.8], [0.1, 0.1, 0.3, 0.4]])
    assert metrics.monotonicity(judged) == pytest.approx([2 / 3, 2 / 3])
    assert metrics.control_range(judged[:, -1], judged[:, 0]) == pytest.approx([0.8, 0.3])
    assert metrics.control_range(np.array([0.7, NAN]), np.array([NAN, 0.2])) == pytest.approx([0.7, -0.2])


@given(response)
def test_monotonicity_is_a_share_and_reversal_never_counts_twice(judged: np.ndarray) -> None:
    rising, falling = metrics.monotonicity(judged), metrics.monotonicity(judged[:, ::-1])
    assert ((rising >= 0) & (rising + falling <= 1 + 1e-9)).all()


# -- identity ------------------------------------------------------------------------------------------------


def test_cosine_of_same_other_and_opposite() -> None:
    edits = np.array([[2.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, 0.0]])
    assert metrics.cosine(np.array([1.0, 0.0]), edits).tolist() == [1.0, 0.0, -1.0, 0.0]


def test_nobody_is_not_the_person() -> None:
    similarity = np.array([0.8, NAN])
    assert metrics.identity_kept(similarity).tolist() == [0.8, 0.0]
    assert metrics.face_lost(similarity).tolist() == [0.0, 1.0]
    assert metrics.identity_ratio(similarity, np.array([0.8, 0.8])).tolist() == [1.0, 0.0]
    assert metrics.harmonic_score(np.ones(2), similarity) == pytest.approx([2 * 0.8 / 1.8, 0.0])
    assert metrics.over_edited(similarity).tolist() == [0.0, 1.0]
    assert metrics.lazy(np.zeros(2), np.array([1.0, NAN])).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("ceiling", [0.0, -0.1, NAN])
def test_identity_ratio_refuses_a_ceiling_that_is_not_positive(ceiling: float) -> None:
    assert metrics.identity_ratio(np.array([0.72]), np.array([0.9])) == pytest.approx([0.8])
    with pytest.raises(ValueError, match="encoder"):
        metrics.identity_ratio(np.array([0.7, 0.7]), np.array([0.9, ceiling]))


def test_harmonic_score_by_hand() -> None:
    expression = np.array([0.6, 1.4, 0.0, 0.9, 0.0, NAN])
    similarity = np.array([0.3, 1.0, 1.0, -0.2, 0.0, 0.9])
    assert metrics.harmonic_score(expression, similarity) == pytest.approx([0.4, 1.0, 0.0, 0.0, 0.0, 0.0])


@given(arrays(np.float64, 6, elements=st.floats(-0.5, 1.5, width=32)), similarities)
def test_harmonic_score_lies_between_both_and_forgives_neither(
    expression: np.ndarray, similarity: np.ndarray
) -> None:
    score = metrics.harmonic_score(expression, similarity)
    both = np.clip(np.stack([expression, np.nan_to_num(similarity)]), 0, 1)
    assert (score >= both.min(axis=0) - 1e-12).all()
    assert (score <= both.mean(axis=0) + 1e-12).all()
    assert (score[both.min(axis=0) == 0] == 0).all()


def test_lazy_is_a_copy_without_the_expression() -> None:
    gain = np.array([0.0, 0.19, 0.2, 0.0, NAN])
    similarity = np.array([1.0, 0.95, 1.0, 0.94, 1.0])
    assert metrics.lazy(gain, similarity).tolist() == [1.0, 1.0, 0.0, 0.0, 1.0]
    # Where even the true answer is only 0.8 like the source, 0.76 is near.
    ceiling = np.array([0.8, 0.8, 0.8, NAN])
    assert metrics.lazy(np.zeros(4), np.array([0.76, 0.75, 1, 0.76]), ceiling).tolist() == [
        1.0,
        0.0,
        1.0,
        0.0,
    ]


def test_over_edits_lost_the_person_with_or_without_the_expression() -> None:
    similarity = np.array([0.53, 0.55, 0.31, 0.29])
    assert metrics.over_edited(similarity).tolist() == [0.0, 0.0, 0.0, 1.0]
    ceiling = np.array([0.9, 0.9, NAN, NAN])
    assert metrics.over_edited(similarity, ceiling).tolist() == [1.0, 0.0, 0.0, 1.0]


@given(arrays(np.float64, 6, elements=st.floats(-1, 1, width=32)), similarities)
def test_an_edit_cannot_be_lazy_and_overdone(gain: np.ndarray, similarity: np.ndarray) -> None:
    for ceiling in (None, np.full(6, 0.9), np.full(6, NAN)):
        lazy, over = metrics.lazy(gain, similarity, ceiling), metrics.over_edited(similarity, ceiling)
        assert is_rate(lazy)
        assert is_rate(over)
        assert (lazy + over <= 1).all()


@given(embeddings, embeddings, st.floats(0.5, 20))
def test_cosine_is_bounded_symmetric_and_ignores_length(a: np.ndarray, b: np.ndarray, scale: float) -> None:
    a, b = np.round(a, 3), np.round(b, 3)
    value = metrics.cosine(a, b)
    assert (np.abs(value) <= 1).all()
    assert np.allclose(value, metrics.cosine(b, a))
    assert np.allclose(value, metrics.cosine(a * scale, b), atol=1e-9)


# -- pixels --------------------------------------------------------------------------------------------------


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
    excess = metrics.seam_excess(metrics.seam_energy(edit), metrics.seam_energy(truth))
    assert excess[0] == 1
    assert excess[1] > 1.2


def test_seam_excess_of_what_has_no_true_answer_is_unknown_and_never_infinite() -> None:
    excess = metrics.seam_excess(np.array([2.0, 1000.0, 3.0]), np.array([NAN, 0.0, 1.5]))
    assert np.isnan(excess[0])
    assert excess[1:].tolist() == [1000.0, 2.0]


def test_seams_need_more_than_one_token() -> None:
    with pytest.raises(ValueError, match="larger than one token"):
        metrics.seam_energy(np.zeros((8, 8, 3), np.uint8))
