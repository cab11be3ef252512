"""A real browser for tests, driven as a person would: it clicks where things are painted, and types.

It speaks the DevTools protocol to the Chromium of the machine over one WebSocket; nothing is downloaded.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

SECONDS = 180.0
_START_SECONDS = 180.0
_STEADY_SECONDS = 0.2
_FILLS = 3
#: What the browser says of an expression whose document is left, or not there yet.
_NAVIGATED = (
    "Inspected target navigated",
    "Execution context was destroyed",
    "Cannot find default execution context",
)
#: ``byText``: the smallest painted element with a text; inputs are found by their label. ``target``: the
#: middle of an element, if whoever clicks there hits it. ``content``: what stands in an input or an editor.
_FINDERS = """
window.byText = (text, kinds) => [...document.querySelectorAll(kinds || '*')]
  .filter(e => e.innerText?.trim() === text && e.getClientRects().length)
  .sort((a, b) => a.querySelectorAll('*').length - b.querySelectorAll('*').length)[0];
window.middle = (e) => { if (!e) return null; e.scrollIntoView({block: 'center'});
  const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; };
window.target = (e) => { const at = middle(e), hit = at && document.elementFromPoint(...at);
  return hit && (e.contains(hit) || hit.contains(e)) ? at : null; };
window.content = (e) => (e?.value ?? e?.innerText ?? '').trim();
"""


class Navigated(Exception):
    """The document in which an expression was to be evaluated has made way for another."""


class NotThere(AssertionError):
    """What a test waits for does not appear on the page; the message has the page's text."""


@dataclass(kw_only=True)
class Page:
    """One tab.

    Attributes:
        socket: the tab's DevTools.
    """

    socket: ClientConnection
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Calls a method of the protocol and returns its result; events in between are dropped."""
        number = next(self._numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self.socket.recv(timeout=SECONDS))
            if answer.get("id") == number:
                if any(words in answer.get("error", {}).get("message", "") for words in _NAVIGATED):
                    raise Navigated(method)
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def value(self, expression: str) -> Any:
        """Evaluates JavaScript in the page; the finders, such as ``byText``, are there."""
        result = self.send("Runtime.evaluate", expression=_FINDERS + expression, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def open(self, url: str) -> None:
        """Goes to an address."""
        self.send("Page.navigate", url=url)

    def wait(self, expression: str, seconds: float = SECONDS) -> Any:
        """Waits until an expression is true and returns its value, whichever documents come and go."""
        end = time.monotonic() + seconds
        while True:
            with contextlib.suppress(Navigated):
                if value := self.value(expression):
                    return value
            if time.monotonic() > end:
                raise NotThere(f"{expression} never came true; the page says:\n{self.text()}")
            time.sleep(0.1)

    def read(self, text: str, seconds: float = SECONDS) -> None:
        """Waits until a text can be read on the page."""
        self.wait(f"document.body?.innerText.includes({json.dumps(text)})", seconds)

    def text(self) -> str:
        """What a person can read."""
        return self.value("document.body?.innerText ?? ''")

    def click(self, element: str, seconds: float = SECONDS) -> None:
        """Clicks into the middle of an element, an expression such as ``byText('Submit')``.

        Pages move while they are painted and cover what they load, so it waits until the element stays where
        it is and nothing else is there.
        """
        end = time.monotonic() + seconds
        place, before = self.wait(f"target({element})", seconds), None
        while place != before:
            if time.monotonic() > end:
                raise NotThere(f"{element} does not stay where it is; the page says:\n{self.text()}")
            time.sleep(_STEADY_SECONDS)
            place, before = self.wait(f"target({element})", seconds), place
        at = {"x": place[0], "y": place[1], "button": "left", "clickCount": 1}
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, **at)

    def fill(self, element: str, text: str) -> None:
        """Replaces what stands in an input or an editor.

        A page that draws its form anew meanwhile may swallow what is typed, as it does for people, who type
        it again.
        """
        for _ in range(_FILLS):
            self.click(element)
            for kind in ("keyDown", "keyUp"):
                self.send(
                    "Input.dispatchKeyEvent", type=kind, key="a", code="KeyA", modifiers=2,
                    commands=["selectAll"],
                )  # fmt: skip
            self.send("Input.insertText", text=text)
            time.sleep(_STEADY_SECONDS)
            found = self.value(f"content({element})")
            if found == text.strip():
                return
        raise NotThere(f"{element} says {found!r}, not {text!r}; the page says:\n{self.text()}")

    def choose(self, element: str, value: str) -> None:
        """Chooses an option of a ``select``, whose list the system draws outside of the page."""
        self.wait(f"middle({element})")
        self.value(
            f"{{ const e = {element}; e.value = {json.dumps(value)};"
            "for (const kind of ['input', 'change']) e.dispatchEvent(new Event(kind, {bubbles: true})); }"
        )
        self.wait(f"{element}.value === {json.dumps(value)}")

    def picture(self, file: Path, height: int | None = None) -> None:
        """Writes what is painted into a PNG, the upper ``height`` pixels or all that the window shows."""
        clip = (
            {} if height is None else {"clip": {"x": 0, "y": 0, "width": 1280, "height": height, "scale": 1}}
        )
        file.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png", **clip)["data"]))


@contextlib.contextmanager
def running(browser: str, width: int = 1280, height: int = 1000) -> Iterator[Page]:
    """Starts a browser with an empty profile and gives its only tab; ends it with all its processes."""
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [
                *(browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"),
                *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
                *(f"--user-data-dir={profile}", "--remote-debugging-port=0"),
                *(f"--window-size={width},{height}", "--hide-scrollbars", "about:blank"),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            # A browser that is busy for long has not gone, so it is not pinged.
            with connect(
                _tab(Path(profile), process),
                max_size=None,
                compression=None,
                open_timeout=_START_SECONDS,
                ping_interval=None,
            ) as socket:
                page = Page(socket=socket)
                size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
                page.send("Emulation.setDeviceMetricsOverride", **size)
                yield page
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _tab(profile: Path, process: subprocess.Popen[bytes]) -> str:
    """Returns the WebSocket of the first tab, once the browser has written down where it listens."""
    end = time.monotonic() + _START_SECONDS
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while time.monotonic() < end:
        assert process.poll() is None, f"the browser ended with status {process.returncode}"
        with contextlib.suppress(OSError, StopIteration, IndexError, ValueError):
            port = int((profile / "DevToolsActivePort").read_text().splitlines()[0])
            with opener.open(f"http://127.0.0.1:{port}/json", timeout=60) as answer:
                tabs = json.loads(answer.read())
            return str(next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page"))
        time.sleep(0.1)
    raise TimeoutError("the browser does not say where its DevTools are")
