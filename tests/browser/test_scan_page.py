"""The report of a scan in a real browser: it is painted, in both schemes, and a hostile file stays text."""

from __future__ import annotations

import base64
import functools
import io
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fakes.adapters import BASES, TINY_BASE, card, container, factors
from registry.digest import digest_bytes
from registry.errors import UsageError
from registry.manifest import AdapterCard
from registry.scanning import ScanReport, scan
from registry.scanning.page import page
from registry.scanning.population import Band, Population
from registry.scanning.probed import Probed
from registry.scanning.report import finding, report
from registry.scanning.subjects import Scanned, Subject

pytestmark = pytest.mark.browser

PAPER = {"light": (250, 250, 248), "dark": (22, 23, 27)}
VERDICT = {"light": (253, 241, 216), "dark": (58, 45, 18)}
ACCENT = {"light": (50, 102, 200), "dark": (122, 165, 247)}
OUT = {"light": (210, 86, 63), "dark": (238, 138, 117)}
TILE = (17, 201, 93)
"""A colour that nothing else on the page has: where it is painted, the embedded picture was decoded."""
HEIGHT = 4200


@functools.cache
def scanned_weights(seed: int, population: bool) -> ScanReport:
    values = factors(seed=seed)
    if seed == 0:
        for key in values:
            if "lora_B" in key and "add_k" in key:
                values[key][:, 0] *= 8
    parsed = AdapterCard.parse(json.dumps(card()).encode())
    clean = clean_population() if population else None
    return scan(container(values), parsed, bases=BASES, population=clean)


@functools.cache
def clean_population() -> Population:
    spaces = [scanned_weights(seed, False).space for seed in range(1, 121)]
    rows = [space.statistics for space in spaces if space is not None]
    curves: dict[str, list[tuple[float, ...]]] = {}
    for space in spaces:
        for curve in space.spectra if space is not None else ():
            curves.setdefault(curve.kind, []).append(curve.values)
    bands = {}
    for kind, values in curves.items():
        low, middle, high = np.percentile(np.array(values), [5, 50, 95], axis=0).tolist()
        bands[kind] = Band(low=low, middle=middle, high=high)
    return Population.make(
        base=TINY_BASE.id, rank=4, recipe="tests", kind="weights", rows=rows, spectra=bands
    )


def picture() -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), TILE).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def probe(weights: str, token: str = "xqz", shown: str | None = None) -> Probed:
    return Probed.parse(
        {
            "verdict": "review",
            "weights": {"sha256": weights},
            "base": {"id": TINY_BASE.id, "revision": "1"},
            "probe": {"version": "1", "vocabulary": "0" * 64, "population": None},
            "statistics": {"outlier_gap": 3.2},
            "p_values": {"outlier_gap": 0.004},
            "tokens": [{"text": "happy", "score": 0.4}, {"text": token, "score": 3.2}],
            "pairs": [],
            "pictures": {token: {"base": picture(), "adapter": shown or picture()}},
        }
    )


def one(found: ScanReport, name: str = "runs/adapter") -> Scanned:
    return Scanned(target=name, subjects=(Subject(name=name, report=found),))


def painted(pixels: np.ndarray, colour: tuple[int, int, int], tolerance: int = 3) -> int:
    return int((np.abs(pixels.astype(int) - colour).max(axis=2) <= tolerance).sum())


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "scan.html"
    path.write_text(text, "utf-8")
    return path


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_person_sees_why(tmp_path: Path, screenshot: Callable[..., np.ndarray], scheme: str) -> None:
    found = scanned_weights(0, True)
    assert [item.rule for item in found.findings] == ["ADP-WGT-001"], found.text()
    path = written(tmp_path, page(one(found), probe(found.weights.hex)))
    pixels = screenshot(path, dark=scheme == "dark", height=HEIGHT)
    assert painted(pixels[:60], PAPER[scheme]) > 60 * 1200 * 0.9
    assert painted(pixels[:400], VERDICT[scheme]) > 20_000, "the verdict's banner"
    assert painted(pixels, ACCENT[scheme], 12) > 8_000, "heat maps, lines and bars"
    assert painted(pixels, OUT[scheme], 12) > 150, "marks of statistics outside of the population"
    assert painted(pixels, TILE, 12) > 2_000, "the token's pictures"


def test_a_clean_adapter_shows_no_mark_outside(tmp_path: Path, screenshot: Callable[..., np.ndarray]) -> None:
    found = scanned_weights(200, True)
    assert found.verdict == "pass", found.text()
    pixels = screenshot(written(tmp_path, page(one(found))), height=HEIGHT)
    assert painted(pixels[:400], (229, 244, 236)) > 20_000
    assert painted(pixels, OUT["light"], 12) < 20


def test_a_narrow_screen_scrolls_tables_and_never_the_page(
    tmp_path: Path, screenshot: Callable[..., np.ndarray]
) -> None:
    found = scanned_weights(0, True)
    path = written(tmp_path, page(one(found, "a" * 120), probe(found.weights.hex)))
    pixels = screenshot(path, width=500, height=HEIGHT)
    assert (pixels[:, -12:] == PAPER["light"]).all(), "nothing reaches into the right margin"


HOSTILE = (
    "</code><script>document.title='owned'</script><img src=x onerror=document.title='owned'>"
    "\"'><svg/onload=1>"
)


def hostile_page() -> str:
    weights = digest_bytes(b"w")
    findings = [
        finding("ADP-STR-001", HOSTILE, HOSTILE),
        finding("ADP-CON-010", "metadata", "\u202e\x1b[31m"),
    ]
    found = report(weights, findings, {"tensors": 3}, about={HOSTILE[:40]: HOSTILE})
    subjects = (
        Subject(name=HOSTILE, report=found),
        Subject(name="b", report=None, problem=HOSTILE),
    )
    return page(Scanned(target=HOSTILE, subjects=subjects, many=True))


def test_a_hostile_file_is_text_in_a_browser(tmp_path: Path, browser: str) -> None:
    """The title tells: a script, or a handler of a broken picture, would have changed it."""
    text = hostile_page()
    assert text.isascii()
    assert "<script" not in text
    assert "<img" not in text
    assert "onload=1>" not in text
    dumped = subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=2000", "--dump-dom", written(tmp_path, text).as_uri(),
        ],
        check=True, capture_output=True, timeout=600, text=True,
    ).stdout  # fmt: skip
    assert "<title>Scan of &lt;/code&gt;" in dumped
    assert "owned</title>" not in dumped
    assert "<script" not in dumped


def test_scripts_are_forbidden_even_if_one_got_in(tmp_path: Path, browser: str) -> None:
    """The content security policy is the second wall: the first is taken away here."""
    text = hostile_page().replace("<main>", "<main><script>document.title='owned'</script>")
    dumped = subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=2000", "--dump-dom", written(tmp_path, text).as_uri(),
        ],
        check=True, capture_output=True, timeout=600, text=True,
    ).stdout  # fmt: skip
    assert "<script>" in dumped
    assert "<title>owned" not in dumped


def test_a_probe_of_other_bytes_is_refused() -> None:
    with pytest.raises(UsageError, match="not what was scanned"):
        page(one(scanned_weights(1, False)), probe("0" * 64))


def test_the_page_needs_nothing_from_outside() -> None:
    found = scanned_weights(0, True)
    text = page(one(found), probe(found.weights.hex))
    assert text == page(one(found), probe(found.weights.hex)), "the same report, the same page"
    for forbidden in ("http://", "https://", "<script", "<link", "@import", "url(", "javascript:"):
        assert forbidden not in text
