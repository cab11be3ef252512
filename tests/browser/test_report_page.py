"""The evaluation report in a real browser: it is painted, in both schemes, on wide and narrow screens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from registry.digest import digest_bytes
from trainer.evaluation import sheets
from trainer.evaluation.page import CasePictures, page
from trainer.evaluation.report import (
    Case,
    Curve,
    Digests,
    EvaluationReport,
    Suite,
    Value,
    build_metrics,
    judge,
)
from trainer.portraits.renderer import EXPRESSIONS, identity, one_hot, render

pytestmark = pytest.mark.browser

PAPER = {"light": (250, 250, 248), "dark": (22, 23, 27)}
VERDICT = {"light": (251, 233, 231), "dark": (61, 29, 26)}
TILE = (17, 201, 93)
"""A colour that nothing else on the page has: where it is painted, the embedded picture was decoded."""


def value(mean: float) -> Value:
    return Value(value=mean, low=mean - 0.05, high=mean + 0.05, n=16, samples=192)


@pytest.fixture
def report_page(tmp_path: Path) -> Path:
    metrics = build_metrics(
        {"top1_accuracy": value(0.7), "paired_psnr": value(23.0)},
        {"top1_accuracy": {"base": value(0.1), "renders": value(0.99)}},
        {"top1_accuracy": 0.85, "paired_psnr": 22.0},
    )
    digest = digest_bytes(b"weights")
    report = EvaluationReport(
        code_version="1.0",
        digests=Digests(adapter=digest, raw=digest, base=digest, judges={"expression": digest}, suite=digest),
        suite=Suite(
            name="portraits-v1", definitions="1", identities=("human 1",), expressions=EXPRESSIONS,
            judged=EXPRESSIONS, confusing_pairs=(("fear", "surprised"),), intensities=(0.0, 0.5, 1.0),
            blends=(), blend_identities=0, steps=4, seed=0,
        ),
        metrics=metrics,
        verdict=judge(metrics),
        confusion=tuple(map(tuple, np.eye(12).tolist())),
        curves=tuple(
            Curve(expression=name, asked=(0.0, 0.5, 1.0), judged=(value(0.1), value(0.4), value(0.9)))
            for name in EXPRESSIONS
        ),
        worst=(),
    )  # fmt: skip
    person = identity(1, "human")
    faces = [render(person, one_hot(name)) for name in EXPRESSIONS]
    faces[0] = np.full((64, 64, 3), TILE, np.uint8)
    contact = sheets.contact_sheet(
        [("human", faces[1], faces)], EXPRESSIONS, title="sheet", subtitle="people"
    )
    strip = sheets.intensity_strip([("happy", faces[:3])], (0.0, 0.5, 1.0), title="strip", subtitle="happy")
    case = Case(
        identity="human 1",
        expression="happy",
        judged_as="sad",
        judged_intensity=0.2,
        identity_similarity=0.9,
        paired_psnr=18.0,
    )
    worst = [CasePictures(case=case, source=faces[1], edit=faces[2], truth=faces[3])]
    path = tmp_path / "report.html"
    text = page(report, subject="pixelsmile", contact=contact, intensities=strip, blends=None, worst=worst)
    path.write_text(text, "utf-8")
    return path  # fmt: skip


def painted(pixels: np.ndarray, colour: tuple[int, int, int], tolerance: int = 3) -> int:
    """How many pixels have about this colour."""
    return int((np.abs(pixels.astype(int) - colour).max(axis=2) <= tolerance).sum())


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report_is_painted(report_page: Path, screenshot: Callable[..., np.ndarray], scheme: str) -> None:
    pixels = screenshot(report_page, dark=scheme == "dark")
    assert pixels.shape == (2600, 1200, 3)
    assert painted(pixels[:60], PAPER[scheme]) > 60 * 1200 * 0.9
    assert painted(pixels, VERDICT[scheme]) > 20_000, "the verdict's banner"
    assert painted(pixels, TILE, tolerance=12) > 2_000, "the contact sheet's picture"


def test_a_narrow_screen_scrolls_tables_and_never_the_page(
    report_page: Path, screenshot: Callable[..., np.ndarray]
) -> None:
    pixels = screenshot(report_page, width=500, height=3000)
    assert (pixels[:, -12:] == PAPER["light"]).all(), "nothing reaches into the right margin"
