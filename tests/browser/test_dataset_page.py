"""The report about a dataset in a real browser: painted in both schemes, on wide and narrow screens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fakes.datasets import drawn, small_dataset
from trainer.data import Dataset
from trainer.data.inspection import inspect
from trainer.data.inspection_page import page

pytestmark = pytest.mark.browser

PAPER = {"light": (250, 250, 248), "dark": (22, 23, 27)}
ACCENT = {"light": (50, 102, 200), "dark": (122, 165, 247)}
TILE = (17, 201, 93)
"""A colour that nothing else on the page has: where it is painted, a picture of the dataset was decoded."""
HEIGHT = 3200


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report about three people; one has the colour that the tests look for, another a very long name."""
    folder = tmp_path_factory.mktemp("page")
    rows = drawn({"human-100": "train", "human-101": "train"}, ("fear", "surprised"), (1.0,))
    people = [[row["pixels"] for row in rows if row["identity"] == who] for who in ("human-100", "human-101")]
    plain = [np.full((64, 64, 3), TILE, np.uint8) for _ in range(3)]
    for number, picture in enumerate(plain):
        picture[0, 0, 0] = number  # three pictures, not one
    dataset = small_dataset(
        folder / "dataset",
        [("train", "w" * 150, people[0]), ("train", "berta", people[1]), ("validation", "green", plain)],
    )
    data = Dataset.open(dataset)
    file = folder / "report.html"
    file.write_text(page(data, inspect(data), title="tests/dataset"), "ascii")
    return file


def painted(pixels: np.ndarray, colour: tuple[int, int, int], tolerance: int = 3) -> int:
    distance = np.abs(pixels.astype(int) - np.array(colour)).max(axis=-1)
    return int((distance <= tolerance).sum())


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pictures_and_charts_are_painted(
    report: Path, scheme: str, screenshot: Callable[..., np.ndarray]
) -> None:
    pixels = screenshot(report, dark=scheme == "dark", height=HEIGHT)
    assert painted(pixels, PAPER[scheme]) > 500_000, "the page"
    assert painted(pixels, TILE, 8) > 15_000, "contact sheet"
    assert painted(pixels, ACCENT[scheme], 12) > 3_000, "bars and lines"


def test_a_narrow_screen_scrolls_sheets_and_tables_but_never_the_page(
    report: Path, screenshot: Callable[..., np.ndarray]
) -> None:
    pixels = screenshot(report, width=500, height=HEIGHT)
    assert (pixels[:, -6:] == PAPER["light"]).all(), "nothing reaches into the right margin"
    assert painted(pixels, TILE, 8) > 5_000, "the contact sheet is there, too"
