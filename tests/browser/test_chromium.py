"""The browser that our tests drive does what a patient person would do on a page that moves."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from websockets.sync.client import connect

from servers import chromium

pytestmark = [pytest.mark.browser, pytest.mark.integration, pytest.mark.slow]

RESTLESS = """<!doctype html><style>button, input { position: absolute; top: 100px; left: 0 }
#cover { position: fixed; inset: 0; background: #fff8 }</style>
<button id=go>Go</button><div id=cover></div><input id=name style="top: 300px" value="before"><script>
let left = 0, swallowed = false;
const moving = setInterval(() => { document.querySelector('#go').style.left = `${left += 40}px`; }, 100);
setTimeout(() => {
  clearInterval(moving);
  if (location.hash !== '#covered') document.querySelector('#cover').remove();
}, 2000);
for (const id of ['go', 'cover']) document.getElementById(id).onclick = () => { window.hit = id; };
document.querySelector('#name').oninput = (event) => {
  if (!swallowed) event.target.value = '';
  swallowed = true;
};
</script>"""


@pytest.fixture
def page(browser: str) -> Iterator[chromium.Page]:
    with chromium.running(browser) as found:
        yield found


@pytest.fixture
def restless(tmp_path: Path) -> str:
    """Address of a page whose button moves, covered, for two seconds, and whose field loses the first words.

    With ``#covered`` what covers it stays.
    """
    (tmp_path / "restless.html").write_text(RESTLESS)
    return (tmp_path / "restless.html").as_uri()


def test_what_moves_and_is_covered_is_clicked_when_it_rests(page: chromium.Page, restless: str) -> None:
    page.open(restless)
    page.click("byText('Go', 'button')")
    assert page.wait("window.hit") == "go"


def test_what_a_field_swallows_is_typed_again(page: chromium.Page, restless: str) -> None:
    page.open(restless)
    page.fill("document.querySelector('#name')", "after all")
    assert page.value("document.querySelector('#name').value") == "after all"


def test_what_stays_covered_is_not_clicked(page: chromium.Page, restless: str) -> None:
    page.open(f"{restless}#covered")
    page.wait("byText('Go', 'button') && true")
    with pytest.raises(chromium.NotThere):
        page.click("byText('Go', 'button')", seconds=4)
    assert page.value("window.hit ?? null") is None


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def there(tmp_path: Path) -> Iterator[str]:
    """Address of a page of another site, for which a browser begins another process."""
    (tmp_path / "there.html").write_text("<!doctype html><title>there</title>")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/there.html"
        server.shutdown()


def test_what_is_waited_for_may_come_with_another_document(
    page: chromium.Page, restless: str, there: str
) -> None:
    page.open(restless)
    page.wait("byText('Go', 'button') && true")
    host, port = page.socket.remote_address
    assert page.socket.request is not None
    with connect(f"ws://{host}:{port}{page.socket.request.path}", max_size=None, ping_interval=None) as other:
        leaving = threading.Timer(1, chromium.Page(socket=other).open, [there])
        leaving.start()
        # The document is left while this is evaluated.
        spin = "const end = Date.now() + 4000; while (Date.now() < end);"
        page.wait(f"document.title === 'there' || (() => {{ {spin} }})()")
        leaving.join()
