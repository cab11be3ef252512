"""The calibration: scorers whose faults are known are found to have just these."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from registry.digest import digest_bytes
from trainer.data.blobs import encode_png
from trainer.portraits.expressions import EXPRESSIONS, one_hot
from trainer.scoring import LocalScorer, Picture, Scored
from trainer.scoring.calibration import CalibrationReport, Plan, calibrate, calibration_error, draw, line
from trainer.scoring.calibration import spearman as rank_correlation
from trainer.scoring.calibration_page import page
from trainer.scoring.command import scores as commands
from trainer.scoring.scorer import quarantined

PLAN = Plan(people={"human": 2, "anime": 1}, intensities=(0.5, 1.0))
CONFIDENT, CONTEMPT = EXPRESSIONS.index("confident"), EXPRESSIONS.index("contempt")


class Biased:
    """Knows the truth, and tells something else of it."""

    name, expressions, ingredient = "biased/1", EXPRESSIONS, None

    def __init__(self, tell) -> None:  # type: ignore[no-untyped-def]
        self.tell = tell
        self.truth = {
            digest_bytes(encode_png(draw(person, face, PLAN.size))): one_hot(face[0] or "neutral", face[1])
            for person in PLAN.seeds
            for face in PLAN.faces
        }

    def __call__(self, pictures: list[Picture]) -> list[Scored]:
        told = [self.tell(self.truth[one.digest].astype(float)) for one in pictures]
        return [one if isinstance(one, Scored) else Scored(scores=tuple(one.tolist())) for one in told]


def measured(tell) -> CalibrationReport:  # type: ignore[no-untyped-def]
    return calibrate(Biased(tell), PLAN)


def test_a_scorer_that_tells_the_truth_is_perfect() -> None:
    report = measured(lambda truth: truth)
    assert report.images == 3 * (1 + 12 * 2)
    for sight in report.sights:
        assert (sight.slope, sight.spearman) == (pytest.approx(1), pytest.approx(1))
        assert [sight.offset, sight.mae, sight.absent, sight.ece] == pytest.approx([0, 0, 0, 0], abs=1e-12)
        assert [value.value for value in sight.curve.judged] == list(sight.curve.asked) == [0, 0.5, 1]
    assert report.top1.value == 1
    assert np.array_equal(report.confusion, np.eye(12))


def test_a_line_is_found_again() -> None:
    report = measured(lambda truth: 0.8 * truth + 0.1)
    for sight in report.sights:
        assert (sight.slope, sight.offset) == (pytest.approx(0.8), pytest.approx(0.1))
        # 0.1 too much on the 69 pictures without it, none at 0.5 (3), 0.1 too little at 1 (3).
        assert sight.mae == pytest.approx((69 * 0.1 + 3 * 0.1) / 75)
        assert sight.ece == pytest.approx((69 * 0.1 + 3 * 0.1) / 75)
        assert sight.absent == pytest.approx(0.1)
        assert sight.spearman == pytest.approx(1)


def test_what_is_taken_for_another_expression_is_in_the_confusions() -> None:
    def mistaken(truth: np.ndarray) -> np.ndarray:
        truth[CONTEMPT] += truth[CONFIDENT] * 1.1
        return truth

    report = measured(mistaken)
    assert report.confusion[CONFIDENT][CONTEMPT] == 1
    assert report.top1.value == pytest.approx(11 / 12)
    assert report.sights[CONTEMPT].absent > 0
    assert {miss.wrong for miss in report.worst} == {"contempt"}
    assert len({miss.identity for miss in report.worst}) == len(report.worst) == 3


def test_pictures_without_a_score_are_counted_and_left_out() -> None:
    def silent(truth: np.ndarray) -> np.ndarray | Scored:
        return quarantined("no answer: <b>no</b>") if truth[CONFIDENT] == 1 else truth

    report = measured(silent)
    assert report.status == {"scored": 72, "quarantined": 3}
    assert report.reasons == {"no answer: <b>no</b>": 3}
    assert sum(report.confusion[CONFIDENT]) == 0
    assert report.sights[CONFIDENT].curve.asked == (0, 0.5)
    # Three people with eleven faces at full intensity each.
    assert (report.top1.value, report.top1.n, report.top1.samples) == (1, 3, 33)
    assert "&lt;b&gt;no" in page(report)
    assert "<b>no" not in page(report)
    with pytest.raises(ValueError, match="scored no picture"):
        measured(lambda truth: quarantined("no"))


@given(st.lists(st.tuples(st.sampled_from([0, 0.25, 0.5, 1]), st.floats(0, 1)), min_size=3, max_size=40))
def test_rank_correlation_and_line_are_those_of_scipy(pairs: list[tuple[float, float]]) -> None:
    x, y = np.array(pairs).T
    if len(set(x)) < 2 or len({round(value, 9) for value in y}) < 2:
        assert abs(rank_correlation(x, y)) <= 1
        return
    assert rank_correlation(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-9)
    slope, offset = line(x, y)
    expected = stats.linregress(x, y)
    assert (slope, offset) == (pytest.approx(expected.slope), pytest.approx(expected.intercept))


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=60))
def test_the_calibration_error_lies_between_the_bias_and_the_absolute_error(
    pairs: list[tuple[float, float]],
) -> None:
    truth, scores = np.array(pairs).T
    error = calibration_error(truth, scores)
    assert abs((scores - truth).mean()) - 1e-9 <= error <= np.abs(scores - truth).mean() + 1e-9


def test_the_calibration_error_of_two_bins() -> None:
    truth, scores = np.array([0.0, 0.2, 1.0, 0.8]), np.array([0.12, 0.14, 0.92, 1.3])
    # Bin 0.1: mean score 0.13, truth 0.1, so 0.03; last bin, also for 1.3: 1.11 and 0.9, so 0.21.
    assert calibration_error(truth, scores) == pytest.approx((2 * 0.03 + 2 * 0.21) / 4)


def test_the_shipped_judge_is_measured_from_the_command_line(tmp_path: Path) -> None:
    words = ["calibrate", "--human", "3", "--anime", "2", "--intensity", "1", "--intensity", "0.5"]
    result = CliRunner().invoke(commands, [*words, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    report = CalibrationReport.model_validate_json((tmp_path / "calibration.json").read_text())
    assert report.scorer == LocalScorer().name
    assert (report.images, report.intensities) == (5 * 25, (0.5, 1.0))
    assert report.top1.value > 0.9
    assert 0.7 < report.mean("slope") < 1.4
    assert report.mean("mae") < 0.06
    for sight in report.sights:
        assert f"{sight.slope:.3f}" in result.stdout
    html = (tmp_path / "calibration.html").read_text()
    assert html.count('class="chart drawing curve"') == 12
    assert html.count('class="chart drawing heat"') == 1
    assert all(f'aria-label="response of {name}"' in html for name in EXPRESSIONS)
    assert "http" not in html.replace("http-equiv", "")
    as_json = CliRunner().invoke(commands, [*words, "--json"])
    assert json.loads(as_json.stdout)["images"] == 125


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--human", "0", "--anime", "0"], "needs people"),
        (["--intensity", "0"], "0<x<=1"),
        (["--intensity", "2"], "0<x<=1"),
        (["pixelsmile-portraits", "--first-identity", "40060"], "belong to pixelsmile-portraits"),
        (["pixelsmile-portraits", "--first-identity", "90000"], "belong to pixelsmile-portraits"),
    ],
)
def test_wrong_words_are_explained(words: list[str], said: str) -> None:
    result = CliRunner().invoke(commands, ["calibrate", *words])
    assert result.exit_code == 2
    assert said in result.output
