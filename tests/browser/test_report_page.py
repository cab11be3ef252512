"""The evaluation report in a real browser: painted in both schemes, wide, narrow and on paper, and silent.

``PICTURES=docs/images pytest tests/browser/test_report_page.py`` takes the pictures of the documents anew.
"""

from __future__ import annotations

import base64
import json
import os
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from fakes import evaluations
from registry.policy import Threshold
from servers import chromium
from trainer.evaluation import pictures

pytestmark = pytest.mark.browser

PAPER = {"light": (250, 250, 248), "dark": (22, 23, 27)}
VERDICT = {"light": (251, 233, 231), "dark": (61, 29, 26)}
TILE = (17, 201, 93)
"""A colour that nothing else on the page has: where it is painted, the embedded picture was decoded."""


@pytest.fixture(scope="module")
def report_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    rules = {"top1_accuracy": Threshold(min=0.99), "identity_similarity": Threshold(min=0.1)}
    found = evaluations.drawn(folder / "kept", rules=rules)
    tile = np.full((64, 64, 3), TILE, np.uint8)
    (folder / "out").mkdir()
    pictures.write(
        folder / "out", found.report, found.plan, found.measured, subject="pixelsmile",
        pairs=[("nearer than any honest answer", tile, tile)],
    )  # fmt: skip
    return folder / "out" / pictures.PAGE


class _Counting(SimpleHTTPRequestHandler):
    """Serves a folder and notes what is asked for."""

    asked: list[str]

    def __init__(self, asked: list[str], *rest: object, **named: object) -> None:
        self.asked = asked
        super().__init__(*rest, **named)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def served(report_page: Path) -> Iterator[tuple[str, list[str]]]:
    """Address of the page, and what browsers asked for."""
    asked: list[str] = []
    handler = partial(_Counting, asked, directory=str(report_page.parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/{report_page.name}", asked
        server.shutdown()
        thread.join()


@pytest.fixture
def tab(browser: str) -> Iterator[chromium.Page]:
    with chromium.running(browser) as found:
        yield found


def show(tab: chromium.Page, url: str, *, width: int = 1200, dark: bool = False) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 700}
    tab.send("Emulation.setDeviceMetricsOverride", **size)
    feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    tab.send("Emulation.setEmulatedMedia", features=[feature])
    tab.open(url)
    tab.read("Provenance")
    tab.wait("document.readyState === 'complete'")


def picture(tab: chromium.Page, name: str, anchor: str = "") -> None:
    """Takes a picture of the page's head or of one section for the documents, if somebody wants it."""
    if folder := os.environ.get("PICTURES"):
        element = f"document.getElementById({json.dumps(anchor)})" if anchor else "document.body"
        top, height, width = tab.value(
            f"(() => {{ const r = {element}.getBoundingClientRect();"
            "return [r.top + scrollY, r.height, innerWidth]; })()"
        )
        clip = {"x": 0, "y": top, "width": width, "height": height if anchor else 1400, "scale": 1}
        data = tab.send("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)["data"]
        (Path(folder) / f"evaluation-{name}.png").write_bytes(base64.b64decode(data))


def painted(pixels: np.ndarray, colour: tuple[int, int, int], tolerance: int = 3) -> int:
    """How many pixels have about this colour."""
    return int((np.abs(pixels.astype(int) - colour).max(axis=2) <= tolerance).sum())


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report_is_painted(report_page: Path, screenshot: Callable[..., np.ndarray], scheme: str) -> None:
    pixels = screenshot(report_page, dark=scheme == "dark", height=16_000)
    assert pixels.shape == (16_000, 1200, 3)
    assert painted(pixels[:60], PAPER[scheme]) > 60 * 1200 * 0.8
    assert painted(pixels, VERDICT[scheme]) > 20_000, "the verdict's banner"
    assert painted(pixels, TILE, tolerance=12) > 2_000, "a picture"


def test_the_page_asks_for_nothing_and_complains_of_nothing(
    served: tuple[str, list[str]], tab: chromium.Page
) -> None:
    url, asked = served
    tab.send("Page.enable")
    tab.send(
        "Page.addScriptToEvaluateOnNewDocument",
        source="window.wrong = []; for (const kind of ['error', 'securitypolicyviolation'])"
        "addEventListener(kind, e => wrong.push(kind + ' ' + (e.message ?? e.violatedDirective)), true);",
    )
    show(tab, url)
    assert tab.value("[...document.images].every(e => e.complete && e.naturalWidth > 0)")
    assert tab.value("document.images.length") > 100
    assert (
        tab.value("performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length")
        == 0
    )
    assert [path for path in asked if path != "/favicon.ico"] == ["/report.html"]
    assert tab.value("wrong") == []


def test_links_lead_to_what_they_name(report_page: Path, tab: chromium.Page) -> None:
    show(tab, report_page.as_uri())
    tab.click("byText('Blends', 'nav a')")
    tab.wait("Math.abs(document.getElementById('blends').getBoundingClientRect().top) < 60")
    ids = tab.value("[...document.querySelectorAll('a')].map(e => e.getAttribute('href'))")
    assert len(ids) > 30
    assert tab.value("[...document.querySelectorAll('a')].every(e => document.querySelector(e.hash))")


@pytest.mark.parametrize("width", [390, 500, 820])
def test_a_narrow_screen_scrolls_tables_and_never_the_page(
    report_page: Path, tab: chromium.Page, width: int
) -> None:
    show(tab, report_page.as_uri(), width=width)
    assert tab.value("document.documentElement.scrollWidth") == width
    too_wide = "[...document.querySelectorAll('section, .verdict, .card, figure')]"
    assert tab.value(f"{too_wide}.filter(e => e.getBoundingClientRect().right > innerWidth).length") == 0
    if width == 390:
        picture(tab, "phone")


def test_the_page_prints(report_page: Path, tab: chromium.Page) -> None:
    show(tab, report_page.as_uri(), width=739)  # what margins leave of a sheet of letter paper
    tab.send("Emulation.setEmulatedMedia", media="print")
    assert tab.value("document.documentElement.scrollWidth") == 739, "nothing is cut at the right"
    printed = base64.b64decode(tab.send("Page.printToPDF", printBackground=True)["data"])
    assert printed.startswith(b"%PDF")
    assert 4 <= printed.count(b"/Type /Page\n") <= 30


def test_pictures_of_the_documents(report_page: Path, tab: chromium.Page) -> None:
    show(tab, report_page.as_uri(), dark=True)
    picture(tab, "dark")
    show(tab, report_page.as_uri())
    picture(tab, "report")
    for anchor in ("metrics", "blends", "intensity"):
        picture(tab, anchor, anchor)
    assert tab.value("getComputedStyle(document.body).backgroundColor") == "rgb(250, 250, 248)"
