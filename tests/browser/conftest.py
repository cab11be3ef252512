"""Tests that need a real browser; they say so when there is none, and never vanish silently."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

_TRIES = 3
BROWSERS = ("chromium", "chromium-browser", "google-chrome")

Screenshot = Callable[..., np.ndarray]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "browser: needs an installed Chromium or Chrome")


@pytest.fixture(scope="session")
def browser() -> str:
    """Path of the installed browser; skips with a reason where there is none."""
    for name in BROWSERS:
        if path := shutil.which(name):
            return path
    pytest.skip(
        f"no browser is installed: looked for {', '.join(BROWSERS)} (Debian: apt-get install chromium)"
    )


@pytest.fixture
def screenshot(browser: str, tmp_path: Path) -> Screenshot:
    """Returns what the browser paints of a page as [H, W, 3], in the light or the dark scheme."""

    def take(page: Path, *, dark: bool = False, width: int = 1200, height: int = 2600) -> np.ndarray:
        for number in range(_TRIES):
            target = tmp_path / f"{'dark' if dark else 'light'}-{number}.png"
            paint(page, target, dark, width, height)
            with suppress(OSError):  # on a busy machine it may end before its picture is written
                return np.asarray(Image.open(target).convert("RGB"))
        raise AssertionError(f"the browser painted no picture of {page}, {_TRIES} times")

    def paint(page: Path, target: Path, dark: bool, width: int, height: int) -> None:
        command = [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
            "--disable-background-networking", f"--user-data-dir={target.with_suffix('')}",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            f"--window-size={width},{height}", f"--screenshot={target}", page.as_uri(),
        ]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True, timeout=600)

    return take
