"""The calibration report and the review queue in a real browser: painted, and no wider than the screen."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fakes.vlm import images_folder
from trainer.data.blobs import Blobs
from trainer.portraits.expressions import EXPRESSIONS
from trainer.recipe import Recipe, load
from trainer.scoring import LocalScorer, Picture, Scored, score
from trainer.scoring.calibration import Plan, calibrate
from trainer.scoring.calibration_page import page as calibration_page
from trainer.scoring.review import page as review_page

pytestmark = pytest.mark.browser

PAPER = {"light": (250, 250, 248), "dark": (22, 23, 27)}
HIT = {"light": (50, 102, 200), "dark": (122, 165, 247)}
WIDE = (210, 86, 63)


def painted(pixels: np.ndarray, colour: tuple[int, int, int], tolerance: int = 3) -> int:
    """How many pixels have about this colour."""
    return int((np.abs(pixels.astype(int) - colour).max(axis=2) <= tolerance).sum())


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_calibration_is_painted(
    tmp_path: Path, screenshot: Callable[..., np.ndarray], scheme: str
) -> None:
    report = calibrate(LocalScorer(), Plan(people={"human": 2}, intensities=(1.0,)))
    path = tmp_path / "calibration.html"
    path.write_text(calibration_page(report), "utf-8")
    pixels = screenshot(path, dark=scheme == "dark")
    assert painted(pixels[:40], PAPER[scheme]) > 40 * 1200 * 0.9
    # The diagonal of the confusions: a dozen squares of more than 40 x 40 pixels in full ink.
    assert painted(pixels, HIT[scheme]) > 12 * 40 * 40 * 0.7


class Unsure:
    """Disagrees with itself about every picture."""

    name, expressions, ingredient = "unsure/1", EXPRESSIONS, None

    def __call__(self, pictures: list[Picture]) -> list[Scored]:
        rows = tuple((value, *(0.0,) * 11) for value in (0.1, 0.9))
        one = Scored(
            scores=rows[0], disagreement=0.8, samples=rows, status="review", reason="samples differ " * 9
        )
        return [one] * len(pictures)


def test_a_narrow_screen_shows_the_whole_queue(tmp_path: Path, screenshot: Callable[..., np.ndarray]) -> None:
    recipe: Recipe = load("pixelsmile-portraits")
    images_folder(tmp_path / "images", 3)
    score(recipe, tmp_path / "images", tmp_path / "scored", scorer=Unsure(), data_folder=tmp_path)
    assert len(list(map(json.loads, (tmp_path / "scored" / "review.jsonl").open()))) == 3
    path = tmp_path / "review.html"
    path.write_text(review_page(tmp_path / "scored", Blobs(tmp_path / "images" / "blobs")), "utf-8")
    pixels = screenshot(path, width=500, height=3000)
    assert (pixels[:, -12:] == PAPER["light"]).all(), "nothing reaches into the right margin"
    half = tuple(round(0.55 * ink + 0.45 * card) for ink, card in zip(WIDE, (241, 241, 238), strict=True))
    assert painted(pixels, half, tolerance=4) > 3 * 500, "a bar of the span of each picture"  # type: ignore[arg-type]
