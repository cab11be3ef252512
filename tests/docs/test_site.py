"""The site: built without a warning and without a network, whole, and silent when somebody reads it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import pytest

from fakes.pages import REPOSITORY
from infra.docs import reference
from servers import watch

#: Attributes whose address a browser fetches by itself.
FETCHED = {
    **dict.fromkeys(("script", "img", "source", "iframe", "video", "audio", "embed"), "src"),
    "object": "data",
}
RELATIONS = {"stylesheet", "icon", "preload", "prefetch", "modulepreload", "preconnect", "dns-prefetch"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site of this checkout, built where no network is, if this machine can take it away."""
    site = tmp_path_factory.mktemp("site") / "site"
    command = [str(Path(sys.executable).with_name("mkdocs")), "build", "--strict", "--site-dir", str(site)]
    alone = ["unshare", "--user", "--net", "--map-root-user"]
    if shutil.which("unshare") and subprocess.run([*alone, "true"], capture_output=True).returncode == 0:
        command = [*alone, *command]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    found = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=environment)
    assert found.returncode == 0, found.stderr
    assert "WARNING" not in found.stderr
    return site


class _Page(HTMLParser):
    """What a page links to, what a browser fetches for it, and what can be jumped to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        has = {name: value or "" for name, value in attrs}
        self.anchors |= {has[name] for name in ("id", "name") if name in has}
        if tag == "a" and "href" in has:
            self.links.append(has["href"])
        if tag in FETCHED and has.get(FETCHED[tag]):
            self.fetched.append(has[FETCHED[tag]])
        if tag == "link" and RELATIONS & set(has.get("rel", "").split()):
            self.fetched.append(has["href"])


def pages(site: Path) -> dict[str, _Page]:
    found = sorted(site.rglob("*.html"))
    return {path.relative_to(site).as_posix(): _Page(path.read_text("utf-8")) for path in found}


def test_each_page_of_docs_is_built_and_in_the_navigation(built: Path) -> None:
    docs = REPOSITORY / "docs"
    wanted = {path.relative_to(docs).as_posix() for path in docs.rglob("*.md")} | set(reference.pages())
    start = pages(built)["index.html"]
    listed = {urljoin("/", link).partition("#")[0].rstrip("/") for link in start.links}
    for name in wanted:
        place = "/" + re.sub(r"(^|/)index\.md$", r"\1", name).removesuffix(".md").rstrip("/")
        assert (built / place.lstrip("/") / "index.html").exists(), name
        assert place.rstrip("/") in listed | {""}, f"{name} is not in the navigation"


def test_nothing_is_fetched_from_elsewhere(built: Path) -> None:
    foreign = [
        f"{name}: {address}"
        for name, page in pages(built).items()
        for address in page.fetched
        if urlsplit(address).netloc or address.startswith("//")
    ]
    for sheet in built.rglob("*.css"):
        found = re.findall(r"(?:url\(|@import)\s*['\"]?(https?:)?//", sheet.read_text("utf-8"))
        foreign += [f"{sheet.name}: {address}" for address in found]
    assert not foreign


def test_each_link_of_the_site_leads_to_a_page_and_an_anchor(built: Path) -> None:
    found = pages(built)
    broken = []
    for name, page in found.items():
        if name == "404.html":
            continue
        for link in page.links:
            if urlsplit(link).scheme or link.startswith("//"):
                continue
            path, _, anchor = urljoin(f"/{name}", link).partition("#")
            goal = path.lstrip("/") + "index.html" if path.endswith("/") else path.lstrip("/")
            there = (built / goal).is_file()
            if not there or (anchor and goal in found and anchor not in found[goal].anchors):
                broken.append(f"{name} -> {link}")
    assert not broken, "\n".join(broken[:40])


def test_a_wrong_address_gets_a_page_of_the_site(built: Path) -> None:
    assert "404" in (built / "404.html").read_text()


def test_readers_do_not_see_the_marks_of_tests_nor_edit_links(built: Path) -> None:
    for path in built.rglob("*.html"):
        text = path.read_text("utf-8")
        assert "<!-- sandbox:" not in text, path
        assert "<!-- needs:" not in text, path
        assert "edit_uri" not in text
        assert 'title="Edit this page"' not in text


@pytest.fixture
def address(built: Path) -> Iterator[str]:
    handler = partial(_Quiet, directory=str(built))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()
    server.server_close()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Nobody reads it."""


def test_a_browser_that_reads_the_site_asks_nobody_else(address: str, tmp_path: Path) -> None:
    browser = watch.browser() or pytest.skip("no browser is installed: Debian: apt-get install chromium")
    for number, page in enumerate(("", "reference/cli/")):
        folder = tmp_path / str(number)
        folder.mkdir()
        seen = watch.visit(browser, address + page, folder)
        assert seen.requests, "the log has the page's own requests"
        assert not seen.outside
