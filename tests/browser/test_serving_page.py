"""The page of the service in a real browser, over a real registry, engine and server.

With ``SERVING_SCREENSHOTS`` set to a folder, the pictures for the docs are written there.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fakes.backends import FACTS, DrawingBackend
from fakes.followed import wait_until
from fakes.registries import NAME, PASSING
from registry.client import Registry
from registry.errors import PolicyRefused, Revoked
from servers.served import Served
from serving.http.app import service_app
from serving.http.keyring import Keys
from serving.settings import ServingSettings

pytest.importorskip("playwright", reason="playwright drives the browser: pip install playwright")

pytestmark = [pytest.mark.browser, pytest.mark.integration, pytest.mark.slow]

ADAPTER = Path(__file__).parents[1] / "data" / "adapters" / "pixelsmile"
PROD = f"{NAME}@prod"
HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
SHOTS = "SERVING_SCREENSHOTS"
WIDE, PHONE = (1280, 1000), (375, 812)
PATIENCE = 180_000
"""Milliseconds in which whatever has to happen happens also on a machine that is busy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Following:
    """A service that follows a real registry.

    Attributes:
        url: of the page, with a slash at the end.
        registry: that it follows: ``pixelsmile:1`` is good, ``:2`` has HTML in its card.
    """

    url: str
    registry: Registry


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Following]:
    """The service with the adapter that the demo trains, on the base that ships."""
    import torch

    torch.set_num_threads(1)
    home = tmp_path_factory.mktemp("served") / "home"
    registry = two_versions(home)
    with following(registry) as server:
        yield Following(url=f"{server.url}/", registry=registry)


def following(registry: Registry, **options: Any) -> Served:
    """A service that follows ``pixelsmile@prod`` of a registry, and was not started."""
    from serving.local import LocalBackend

    home = registry.place.home
    settings = ServingSettings(adapters=(PROD,), port=0, follow_seconds=0.3, **options)
    backend = LocalBackend(settings, registry=registry, home=home)
    return Served(service_app(backend, settings, home=home), settings)


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    """A service over a backend that draws, which a test can fill, drain and guard with keys."""

    url: str
    backend: DrawingBackend
    home: Path


@pytest.fixture
def drawing(tmp_path: Path) -> Iterator[Drawing]:
    """See `Drawing`."""
    backend = DrawingBackend()
    settings = ServingSettings(adapters=(PROD,), port=0)
    with Served(service_app(backend, settings, home=tmp_path), settings) as server:
        yield Drawing(url=f"{server.url}/", backend=backend, home=tmp_path)


def two_versions(home: Path) -> Registry:
    """A registry with two approved versions, the first at ``prod``, and the base beside it."""
    from registry.manifest import BaseModelRef
    from serving.bases import register
    from trainer.portraits.base import base_path

    registry = Registry.init(home)
    folder = home.parent / "adapter"
    shutil.copytree(ADAPTER, folder, ignore=shutil.ignore_patterns("README.md"))
    card = json.loads((folder / "adapter.json").read_text())
    register(base_path(), BaseModelRef(**card["base"]), home)
    for number, description in enumerate([card["description"], HOSTILE], start=1):
        (folder / "adapter.json").write_text(json.dumps({**card, "description": description}))
        registry.push(folder, NAME, evaluation=PASSING)
        registry.approve(f"{NAME}:{number}", "a person", "looks right")
    registry.promote(f"{NAME}:1", "prod")
    return registry


@pytest.fixture(scope="module")
def chromium(browser: str) -> Iterator[Any]:
    """The browser, for all tests of this file."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"], timeout=PATIENCE)
        yield running
        running.close()


@dataclass(kw_only=True)
class Tab:
    """The page in one tab, and everything that went wrong on it."""

    page: Any
    url: str
    problems: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)
    forgiven: list[str] = field(default_factory=list)

    def open(self, fragment: str = "") -> None:
        """Goes to the page and waits for a picture."""
        self.page.goto("about:blank")
        self.page.goto(self.url + fragment)
        self.settled()

    def settled(self, words: str | re.Pattern[str] = re.compile(".")) -> None:
        """Waits until the picture is made, described with these words and kept in the history."""
        from playwright.sync_api import expect

        expect(self.page.locator("#facts")).to_have_text(re.compile(r"\d m?s$"), timeout=PATIENCE)
        expect(self.page.locator("#made")).to_have_text(words, timeout=PATIENCE)
        made = self.page.locator("#made").inner_text().casefold()
        newest = self.page.locator("#history li span").first
        expect(newest).to_have_text(re.compile(f"^{re.escape(made)}$", re.IGNORECASE), timeout=PATIENCE)

    def pixels(self, selector: str = "#compare .after") -> str:
        """What an image on the page shows, as a data URL of its pixels."""
        found: list[str] = []

        def decoded() -> bool:
            """Not while the page puts another picture there."""
            found[:] = self.page.locator(selector).first.evaluate(
                """async image => { try { await image.decode(); } catch { return []; }
                const canvas = document.createElement('canvas');
                canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
                canvas.getContext('2d').drawImage(image, 0, 0); return [canvas.toDataURL()]; }"""
            )
            return bool(found)

        wait_until(decoded)
        return found[0]

    def forgive(self, *statuses: str) -> int:
        """Answers with these statuses, which the browser notes as errors, are no problems of this tab.

        It holds for good: the page asks again by itself, and the browser notes an answer when it likes.

        Returns:
            how many there were so far.
        """
        before = len(self.unforgiven())
        self.forgiven += [f"status of {status}" for status in statuses]
        return before - len(self.unforgiven())

    def unforgiven(self) -> list[str]:
        """The problems that no test expects."""
        return [said for said in self.problems if not any(words in said for words in self.forgiven)]

    def press(self, *keys: str) -> None:
        """Types keys, one after the other."""
        for key in keys:
            self.page.keyboard.press(key)


Open = Callable[..., Tab]


@pytest.fixture
def tab(served: Following, chromium: Any) -> Iterator[Open]:
    """Opens tabs with empty profiles; in the end nothing was logged as an error, nothing left the origin."""
    opened: list[tuple[Any, Tab]] = []

    def start(size: tuple[int, int] = WIDE, *, url: str | None = None, **options: Any) -> Tab:
        context = chromium.new_context(viewport={"width": size[0], "height": size[1]}, **options)
        found = Tab(page=context.new_page(), url=url or served.url)
        found.page.set_default_timeout(PATIENCE)
        found.page.on(
            "console", lambda said: said.type in ("error", "warning") and found.problems.append(said.text)
        )
        found.page.on("pageerror", lambda error: found.problems.append(str(error)))
        found.page.on("request", lambda asked: _note(found, asked.url))
        opened.append((context, found))
        return found

    yield start
    for context, found in opened:
        context.close()
        assert found.unforgiven() == []
        assert found.elsewhere == []


def _note(tab: Tab, url: str) -> None:
    if not url.startswith((tab.url, f"blob:{tab.url}", "about:")):
        tab.elsewhere.append(url)


@pytest.fixture
def shots(tmp_path: Path) -> Path:
    """Where screenshots go: the folder that the environment names, else a place that is thrown away."""
    folder = Path(os.environ.get(SHOTS) or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def slider(page: Any, name: str) -> Any:
    """The slider of an expression."""
    return page.locator("#sliders").get_by_label(name, exact=True)


def test_the_first_picture_is_there_without_a_click(tab: Open) -> None:
    one = tab()
    one.open()
    assert one.page.locator("#made").inner_text() == "happy 0.8".capitalize()
    assert "pixelsmile version 1" in one.page.locator("#facts").inner_text()
    assert one.pixels() != one.pixels("#compare .before")
    assert one.page.locator("#sliders input").count() == 12
    badges = one.page.locator("#badges").inner_text()
    assert "Apache-2.0" in badges
    assert "Scan passed" in badges
    assert "signed statements" in badges
    one.page.locator("#signatures summary").click()
    said = one.page.locator("#statements").inner_text()
    for word in ("approval", "approver", "scanner", "sha256:", "portrait renderer"):
        assert word in said


def test_sliders_move_with_the_keyboard_and_the_picture_follows(tab: Open) -> None:
    one = tab()
    one.open()
    before = one.pixels()
    slider(one.page, "surprised").focus()
    one.press("ArrowRight", "ArrowUp", "Shift+ArrowRight")
    one.settled(re.compile("surprised 0.11", re.IGNORECASE))
    after = one.pixels()
    assert after != before
    one.press("Delete")
    one.settled(re.compile("^happy 0.8$", re.IGNORECASE))
    assert one.pixels() == before
    one.page.get_by_role("button", name="Reset").click()
    one.settled(re.compile("^neutral$", re.IGNORECASE))


def test_steps_are_told_while_they_run_and_stale_requests_are_cancelled(tab: Open) -> None:
    one = tab()
    one.open()
    failed: list[str] = []
    one.page.on("requestfailed", lambda asked: failed.append(asked.url))
    # Fewer steps are asked for in the page itself, so that the many do not end before, however fast they are.
    one.page.evaluate(
        """() => { window.told = new Set(); const bar = document.querySelector('#progress');
        const steps = document.querySelector('#steps'), busy = document.querySelector('#compare').classList;
        new MutationObserver(() => {
          if (busy.contains('busy')) told.add(bar.value);
          if (told.size < 5 || steps.value === '4') return;
          steps.value = '4'; steps.dispatchEvent(new Event('input', {bubbles: true}));
        }).observe(bar, {attributes: true}); }"""
    )
    one.page.locator("#steps").fill("100")
    wait_until(lambda: one.page.evaluate("told.size") > 4)
    one.page.locator("#facts", has_text=" 4 steps").wait_for()
    assert any(url.endswith("/v1/edits") for url in failed)


def test_a_dropped_a_pasted_and_a_chosen_picture_are_edited(tab: Open) -> None:
    from trainer.portraits.renderer import identity, one_hot, pose, render

    one = tab()
    one.open()
    seen = {one.pixels()}
    for seed, way in [(21, "drop"), (22, "paste"), (23, "file")]:
        png = _png(render(identity(seed, "human"), one_hot("neutral"), 96, pose(seed)))
        last = one.page.url
        give(one.page, way, f"{way}.png", png)
        one.page.locator(f'#samples [aria-label="Your picture: {way}.png"][aria-pressed="true"]').wait_for()
        one.page.wait_for_url(lambda url, last=last: "#picture=sha256:" in url and url != last)
        one.settled()
        wait_until(lambda: one.pixels() not in seen)
        seen.add(one.pixels())


def test_an_edit_that_is_on_its_way_takes_no_message_away(tab: Open) -> None:
    one = tab()
    one.open()
    alert = one.page.locator("#alert")
    unknown = f"#picture=sha256:{'0' * 64}&adapter={PROD}&e=sad:0.5&seed=1"
    unserved = "#picture=human-1&adapter=nobody@prod&e=sad:0.5&seed=1"
    for words, left, made, then in (
        (
            "a picture that this browser can read",
            lambda: give(one.page, "drop", "a.txt", b"no"),
            "shy 0.05",
            "shy 0.1",
        ),
        (
            "is not in this browser",
            lambda: one.page.evaluate("to => { location.hash = to; }", unknown),
            "sad 0.5",
            "shy 0.05",
        ),
        (
            "Not served here",
            lambda: one.page.evaluate("to => { location.hash = to; }", unserved),
            "shy 0.1",
            "shy 0.15",
        ),
    ):
        slider(one.page, "shy").focus()
        one.press("ArrowRight")
        left()
        alert.get_by_text(words).wait_for()
        one.settled(re.compile(f"{made}$", re.IGNORECASE))
        assert alert.is_visible()
        one.press("ArrowRight")
        alert.wait_for(state="hidden")
        one.settled(re.compile(f"{then}$", re.IGNORECASE))
    assert one.forgive("404")


def test_nothing_is_said_of_an_edit_that_fails_while_a_newer_change_waits(
    drawing: Drawing, tab: Open
) -> None:
    one = tab(url=drawing.url)
    one.page.clock.install()
    one.open()
    drawing.backend.go.clear()
    slider(one.page, "sad").focus()
    one.press("ArrowRight")
    wait_until(lambda: drawing.backend.running == 1)
    one.page.clock.pause_at(one.page.evaluate("Date.now() / 1000 + 600"))
    one.press("ArrowRight")
    drawing.backend.failure = Revoked("it was withdrawn while it ran", "take another")
    drawing.backend.go.set()
    wait_until(lambda: drawing.backend.running == 0)
    one.page.evaluate("fetch('v2/health/live').then(answer => answer.text())")  # the page has the failure now
    drawing.backend.failure = None
    one.page.clock.resume()
    one.settled(re.compile("sad 0.1$", re.IGNORECASE))
    assert one.page.locator("#alert").is_hidden()


def give(page: Any, way: str, name: str, data: bytes) -> None:
    """Drops, pastes or chooses a file."""
    if way == "file":
        page.locator("#file").set_input_files({"name": name, "mimeType": "image/png", "buffer": data})
        return
    page.evaluate(
        """([way, name, coded]) => {
        const bytes = Uint8Array.from(atob(coded), letter => letter.charCodeAt(0));
        const box = new DataTransfer();
        box.items.add(new File([bytes], name, {type: name.endsWith('png') ? 'image/png' : 'text/plain'}));
        if (way === 'paste') document.dispatchEvent(new ClipboardEvent('paste', {clipboardData: box}));
        else for (const kind of ['dragenter', 'dragover', 'drop'])
          document.body.dispatchEvent(
            new DragEvent(kind, {dataTransfer: box, bubbles: true, cancelable: true}));
        }""",
        [way, name, base64.b64encode(data).decode()],
    )


def _png(pixels: Any) -> bytes:
    import io

    from PIL import Image

    target = io.BytesIO()
    Image.fromarray(pixels).save(target, "PNG")
    return target.getvalue()


def test_the_blend_pad_follows_the_pointer_and_the_keys(tab: Open) -> None:
    one = tab()
    one.open()
    pad = one.page.locator("#pad")
    pad.scroll_into_view_if_needed()
    box = pad.bounding_box()
    one.page.mouse.move(box["x"] + box["width"] / 3, box["y"] + box["height"] / 3)
    one.page.mouse.down()
    one.page.mouse.move(box["x"] + box["width"] * 2 / 3, box["y"] + box["height"] / 3, steps=5)
    one.page.mouse.up()
    one.settled(re.compile("happy 1, surprised 1", re.IGNORECASE))
    one.press("ArrowLeft", "ArrowDown", "Shift+ArrowDown")
    one.settled(re.compile(r"happy 0\.95, surprised 0\.94", re.IGNORECASE))
    assert pad.get_attribute("aria-valuetext") == "happy 0.95, surprised 0.94"
    assert slider(one.page, "surprised").input_value() == "0.94"
    one.press("Home")
    one.settled(re.compile("^neutral$", re.IGNORECASE))
    one.page.get_by_role("button", name="Show faces").click()
    one.page.locator("#faces img").nth(15).wait_for()
    corners = {one.pixels(f"#faces img:nth-child({number})") for number in (1, 4, 13, 16)}
    assert len(corners) == 4


def test_a_strip_is_one_request_and_its_faces_are_controls(tab: Open) -> None:
    one = tab()
    one.open()
    asked: list[Any] = []
    one.page.on("request", lambda request: request.method == "POST" and asked.append(request.post_data_json))
    one.page.get_by_role("button", name="Draw the strip").click()
    one.page.locator("#strip li").nth(7).wait_for()
    assert len(asked) == 1
    assert [row.get("happy", 0) for row in asked[0]["rows"]] == [0, 0.21, 0.43, 0.64, 0.86, 1.07, 1.29, 1.5]
    faces = [one.pixels(f"#strip li:nth-child({number}) img") for number in range(1, 9)]
    assert len(set(faces)) == 8
    one.page.locator("#strip button").nth(6).click()
    one.settled(re.compile("happy 1.29", re.IGNORECASE))
    assert slider(one.page, "happy").input_value() == "1.29"


def test_before_and_after_are_compared_with_pointer_and_keys(tab: Open) -> None:
    one = tab()
    one.open()
    share = one.page.locator("#compare").evaluate
    at = "element => element.style.getPropertyValue('--at')"
    box = one.page.locator("#compare").bounding_box()
    one.page.mouse.click(box["x"] + box["width"] / 4, box["y"] + 60)
    assert share(at) == "25%"
    one.press("ArrowRight")
    assert share(at) == "26%"
    one.press("End")
    assert share(at) == "100%"
    line = one.page.get_by_label("Where the picture before the edit ends")
    assert line.get_attribute("aria-valuetext") == "100 % before, 0 % after"


def test_a_link_of_the_history_makes_the_same_pixels_again(tab: Open) -> None:
    one = tab()
    one.open()
    slider(one.page, "sad").focus()
    one.press("ArrowRight", "ArrowRight")
    one.page.locator("#seed").fill("41")
    one.settled(re.compile("sad 0.1", re.IGNORECASE))
    one.page.wait_for_url(re.compile(r"seed=41.*pixels="))
    link, pixels = one.page.url, one.pixels()
    assert f"{NAME}@sha256:" in link
    one.page.get_by_role("button", name="Reset").click()
    one.settled(re.compile("^neutral$", re.IGNORECASE))
    one.page.locator("#history a").nth(1).click()
    one.settled(re.compile("happy 0.8, sad 0.1", re.IGNORECASE))
    assert one.pixels() == pixels
    other = tab()  # of somebody else, who was sent the link
    other.open(link.removeprefix(other.url))
    other.page.locator("body[data-reproduced=true]").wait_for(state="attached")
    assert other.pixels() == pixels
    assert other.page.locator("#seed").input_value() == "41"


def test_a_link_names_the_steps_and_what_lay_under_the_adapter(served: Following, tab: Open) -> None:
    """Neither the settings of the day nor those of another service change what a link makes."""
    under, schedules = {PROD: (f"{NAME}:2",)}, {NAME: {"steps": 4}}
    with following(served.registry, stacked=under, schedules=schedules) as server:
        one = tab(url=f"{server.url}/")
        one.open()
        assert " 4 steps" in one.page.locator("#facts").inner_text(), "as the adapter is scheduled"
        one.page.wait_for_url(re.compile(r"steps=4.*pixels="))
        link = one.page.url.removeprefix(one.url)
        stacked = one.pixels()
        one.page.goto("about:blank")
    other = tab()
    other.open()
    plain = other.pixels()
    other.open(link)
    other.page.locator("body[data-reproduced=true]").wait_for(state="attached")
    assert other.pixels() == stacked != plain
    other.page.locator("#steps").fill("")
    other.page.locator("#facts", has_text=" 8 steps").wait_for()


def test_the_strength_is_one_that_the_adapter_is_signed_for(drawing: Drawing, tab: Open) -> None:
    def asked() -> float | None:
        return drawing.backend.asked[-1][0].strength

    def shown(one: Tab) -> tuple[str | None, ...]:
        strength = one.page.get_by_label("Adapter strength")
        return strength.get_attribute("min"), strength.get_attribute("max"), strength.input_value()

    drawing.backend.facts = {**FACTS, "strength_min": -2.0, "strength_max": 0.8}
    one = tab(url=drawing.url)
    one.open()
    assert (asked(), shown(one)) == (None, ("-2", "0.8", "0.8")), "where nobody names one: the nearest to 1"
    usual = one.pixels()
    one.page.get_by_label("Adapter strength").focus()
    one.press("Home", "Shift+ArrowRight")
    one.page.wait_for_url(re.compile(r"strength=-1\.99&.*pixels="))
    link, pixels = one.page.url.removeprefix(one.url), one.pixels()
    assert (asked(), shown(one)) == (-1.99, ("-2", "0.8", "-1.99"))
    assert pixels != usual
    other = tab(url=drawing.url)  # of somebody else, who was sent the link
    other.open(link)
    other.page.locator("body[data-reproduced=true]").wait_for(state="attached")
    assert (asked(), shown(other), other.pixels()) == (-1.99, ("-2", "0.8", "-1.99"), pixels)
    other.page.close()
    drawing.backend.facts = {**FACTS, "strength_min": -0.5, "strength_max": 1.5}
    drawing.backend.version = 2
    one.page.locator("#live", has_text="version 2").wait_for()
    wait_until(lambda: asked() == -0.5)
    assert shown(one) == ("-0.5", "1.5", "-0.5")
    one.page.get_by_label("Adapter strength").focus()
    one.press("Delete")
    wait_until(lambda: asked() == 1.0)


def test_a_link_with_a_picture_of_another_browser_asks_for_it(tab: Open) -> None:
    one = tab()
    one.page.goto(f"{one.url}#picture=sha256:{'0' * 64}&adapter={PROD}&e=happy:0.5&seed=1&steps=4")
    one.page.locator("#alert", has_text="not in this browser").wait_for()
    for fragment, refused in (
        ("#picture=human-1&adapter=%3Cb%3E&e=x:1e999", True),
        ("#picture=&adapter=", False),
        ("#e=__proto__:1", False),
    ):
        two = tab()
        two.page.goto(two.url + fragment)
        two.page.locator("#sliders input").first.wait_for()
        if refused:
            two.page.locator("#alert").wait_for()
            assert two.forgive("400", "404")


def test_promotion_revocation_and_rollback_show_at_once_and_hostile_cards_stay_text(
    served: Following, tab: Open
) -> None:
    one = tab()
    one.open()
    served.registry.promote(f"{NAME}:2", "prod")
    try:
        one.page.locator("#live", has_text="version 2").wait_for()
        one.settled()
        wait_until(lambda: "version 2" in one.page.locator("#facts").inner_text())
        assert one.page.locator("#description").inner_text() == HOSTILE
        assert one.page.locator("main script, #description *").count() == 0
        assert one.page.title() == "Adapter Foundry"
        assert "version 2" in one.page.locator("#adapter option").first.inner_text()
        one.page.locator("#adapter").select_option(label="Another version…")
        one.page.locator("#reference").fill(f"{NAME}:1")
        one.press("Enter")
        wait_until(lambda: "version 1 " in one.page.locator("#facts").inner_text())
        one.page.locator("#adapter").select_option(PROD)
        wait_until(lambda: "version 2 " in one.page.locator("#facts").inner_text())
        served.registry.revoke(f"{NAME}:2", "it copies a person")
        one.page.locator("#live", has_text="revoked").wait_for()
        one.page.locator("#badges", has_text="Revoked").wait_for()
        one.page.locator("#alert", has_text="This adapter was revoked").wait_for()
    finally:
        served.registry.promote(f"{NAME}:1", "prod")
    one.page.locator("#live", has_text="version 1").wait_for()
    wait_until(lambda: "version 1 " in one.page.locator("#facts").inner_text())
    assert one.page.locator("#alert").is_hidden()
    assert one.forgive("410")


def test_the_browser_refuses_markup_from_text_even_if_the_page_wants_it(drawing: Drawing, tab: Open) -> None:
    one = tab(url=drawing.url)
    one.open()
    tried = one.page.evaluate(
        "() => { try { document.body.innerHTML = '<b>x</b>'; return 'done'; } catch (e) { return e.name; } }"
    )
    assert tried == "TypeError"
    one.problems.clear()  # it said so in the console


def test_a_full_queue_is_explained_and_the_page_tries_again_when_it_was_told_to(
    drawing: Drawing, tab: Open
) -> None:
    one = tab(url=drawing.url)
    one.open()
    drawing.backend.full = 2.0
    slider(one.page, "sad").focus()
    one.press("ArrowRight")
    alert = one.page.locator("#alert")
    alert.get_by_text("The service is busy").wait_for()
    alert.get_by_text(re.compile(r"Trying again in [12] s")).wait_for()
    drawing.backend.full = None
    one.settled(re.compile("sad 0.05", re.IGNORECASE))
    assert alert.is_hidden()
    assert one.forgive("429")


@pytest.mark.parametrize(
    ("refusal", "words"),
    [
        (Revoked("it copies <b>somebody</b>", "take another"), "This adapter was revoked"),
        (PolicyRefused("because <b>", "take another"), "Refused by policy"),
    ],
)
def test_what_is_refused_is_explained_as_text(
    drawing: Drawing, tab: Open, refusal: Exception, words: str
) -> None:
    one = tab(url=drawing.url)
    one.open()
    drawing.backend.refusal = refusal
    slider(one.page, "sad").focus()
    one.press("ArrowRight")
    alert = one.page.locator("#alert")
    alert.get_by_text(words).wait_for()
    assert "<b>" in alert.inner_text()
    assert "Take another." in alert.inner_text()
    assert one.forgive("410", "409")


def test_an_edit_that_fails_on_its_way_is_explained(drawing: Drawing, tab: Open) -> None:
    one = tab(url=drawing.url)
    one.open()
    drawing.backend.failure = Revoked("it was withdrawn while it ran", "take another")
    slider(one.page, "sad").focus()
    one.press("ArrowRight")
    one.page.locator("#alert", has_text="This adapter was revoked").wait_for()


def test_the_page_asks_for_a_key_and_forgets_it_with_the_tab(drawing: Drawing, tab: Open) -> None:
    token, _ = Keys.open(drawing.home).add("somebody", ("edit", "read"))
    one = tab(url=drawing.url)
    one.page.goto(one.url)
    one.page.locator("#key-dialog[open]").wait_for()
    assert one.page.evaluate("document.activeElement.id") == "key-input"
    one.page.keyboard.type("afk_wrong")
    one.press("Enter")
    one.page.locator("#key-dialog[open]").wait_for()
    one.page.locator("#key-input").fill(token)
    one.press("Enter")
    one.settled()
    assert drawing.backend.asked[-1][1] == "somebody"
    assert one.page.evaluate("Object.values(sessionStorage)") == [token]
    assert one.page.evaluate("Object.values(localStorage)") == []
    assert token not in one.page.content()
    Keys.open(drawing.home).revoke("somebody")  # the page learns it when it looks for promotions
    one.page.locator("#alert", has_text="An API key is needed").wait_for()
    assert one.page.locator("#key-dialog[open]").count() == 0
    assert one.forgive("401")


def test_every_control_has_a_name_and_the_tab_key_reaches_it(drawing: Drawing, tab: Open) -> None:
    one = tab(url=drawing.url)
    one.open()
    one.page.get_by_role("button", name="Draw the strip").click()
    one.page.locator("#strip li").nth(7).wait_for()
    controls = one.page.evaluate(
        """() => [...document.querySelectorAll('a[href],button,input,select,summary,[tabindex="0"]')]
        .filter(e => e.checkVisibility() && !e.disabled)
        .map((e, i) => { e.dataset.number = i; return [e.outerHTML.slice(0, 120),
          (e.ariaLabel || document.getElementById(e.getAttribute('aria-labelledby') || '-')?.textContent
           || e.labels?.[0]?.textContent || e.textContent || '').trim()]; })"""
    )
    assert [html for html, name in controls if not name] == []
    one.page.evaluate("scrollTo(0, 0)")
    one.page.mouse.click(2, 2)  # the next Tab begins at the top
    reached = []
    for _ in range(len(controls) + 2):
        one.press("Tab")
        reached.append(one.page.evaluate("document.activeElement?.dataset.number ?? null"))
        if reached[-1] is None:
            break
        ring = one.page.evaluate(
            """() => [document.activeElement, document.activeElement.parentElement].some(e =>
            getComputedStyle(e).outlineStyle !== 'none') || document.activeElement.type === 'range'
            || document.activeElement.type === 'file'"""
        )
        assert ring, f"no focus ring on {controls[int(reached[-1])][0]}"
    one.page.mouse.click(2, 2)
    one.press("Tab", "Enter")  # skips to the controls, and leaves the link of the picture in the address
    assert one.page.evaluate("document.activeElement.id") == "controls"
    assert "picture=" in one.page.url
    missed = [html for number, (html, _) in enumerate(controls) if str(number) not in reached]
    assert missed == []
    assert one.page.locator("h2").count() >= 6
    assert one.page.locator("img:not([alt])").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast_in_both_schemes(drawing: Drawing, tab: Open, scheme: str) -> None:
    one = tab(url=drawing.url, color_scheme=scheme)
    one.open()
    pairs = [
        *(("ink", "paper"), ("ink", "card"), ("ink", "well"), ("soft", "paper"), ("soft", "card")),
        *(("accent", "card"), ("accent", "paper"), ("accent", "accent-soft"), ("accent-ink", "accent")),
        *(("good", "good-soft"), ("warn", "warn-soft"), ("bad", "bad-soft"), ("ink", "warn-soft")),
    ]
    colours = one.page.evaluate(
        """names => { const style = getComputedStyle(document.documentElement);
        const colour = name => style.getPropertyValue('--' + name).trim();
        return Object.fromEntries(names.map(name => [name, colour(name)])); }""",
        sorted({name for pair in pairs for name in pair}),
    )
    for text, ground in pairs:
        assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)


def contrast(one: str, other: str) -> float:
    """The contrast of two colours ``#rrggbb`` as WCAG 2.2 defines it, 1 to 21."""

    def luminance(colour: str) -> float:
        channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def showcase(one: Tab) -> None:
    """Brings the page into the state of the screenshots."""
    one.open()
    for sample, name, keys, words in [
        ("Blond, drawn", "surprised", ["ArrowRight"] * 6, "happy 0.8, surprised 0.3"),
        ("Earrings", "surprised", ["Delete"], "happy 0.8"),
        ("Bun", "happy", ["ArrowRight"] * 4, "happy 1"),
    ]:
        one.page.get_by_label(f"Sample portrait: {sample}").click()
        slider(one.page, name).focus()
        one.press(*keys)
        one.settled(re.compile(f"^{words}$", re.IGNORECASE))
    for name in ("Draw the strip", "Show faces"):
        one.page.get_by_role("button", name=name).click()
    one.page.locator("#strip li").nth(7).wait_for()
    one.page.locator("#faces img").nth(15).wait_for()
    one.page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    one.page.wait_for_timeout(500)


def test_light_dark_and_the_toggle(tab: Open, shots: Path) -> None:
    one = tab()
    showcase(one)
    one.page.screenshot(path=shots / "serving-light.png", full_page=True)
    paper = "getComputedStyle(document.body).backgroundColor"
    light = one.page.evaluate(paper)
    one.page.get_by_role("button", name="Use the dark scheme").click()
    dark = one.page.evaluate(paper)
    assert dark != light
    one.page.reload()
    assert one.page.evaluate(paper) == dark
    assert one.page.get_by_role("button", name="Use the light scheme").count() == 1
    two = tab(color_scheme="dark")
    showcase(two)
    assert two.page.evaluate(paper) == dark
    two.page.screenshot(path=shots / "serving-dark.png", full_page=True)


def test_a_phone_has_no_sideways_scroll_and_keeps_the_picture_in_sight(tab: Open, shots: Path) -> None:
    one = tab(PHONE, device_scale_factor=2, is_mobile=True, has_touch=True)
    showcase(one)
    one.page.locator("#signatures summary").click()
    assert one.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    one.page.locator("#signatures summary").click()
    one.page.evaluate("document.querySelector('#sliders').scrollIntoView({block: 'end'})")
    top = "document.querySelector('#compare').getBoundingClientRect().top"
    wait_until(lambda: 0 <= one.page.evaluate(top) <= 12)
    box = one.page.locator("#compare").bounding_box()
    assert box["height"] < PHONE[1] / 2
    one.page.screenshot(path=shots / "serving-phone.png")


def test_motion_can_be_switched_off(drawing: Drawing, tab: Open) -> None:
    one = tab(url=drawing.url, reduced_motion="reduce")
    one.open()
    assert one.page.evaluate("getComputedStyle(document.querySelector('#toast')).transitionDuration") == "0s"


def test_parts_are_kept_for_ever_under_their_digest_and_nothing_else_is_served(drawing: Drawing) -> None:
    import httpx

    with httpx.Client(base_url=drawing.url, timeout=60, trust_env=False) as client:
        page = client.get("/")
        assert page.headers["cache-control"] == "no-cache"
        again = client.get("/", headers={"If-None-Match": page.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        folder = re.search(r"static/[0-9a-f]{32}/", page.text).group()  # type: ignore[union-attr]
        script = client.get(f"/{folder}app.js")
        assert script.headers["cache-control"] == "public, max-age=31536000, immutable"
        assert script.headers["content-type"] == "text/javascript; charset=utf-8"
        for answer in (page, again, script):
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert "default-src 'self'" in answer.headers["content-security-policy"]
            assert "unsafe" not in answer.headers["content-security-policy"]
        wrong = ("static/app.js", f"static/{'0' * 32}/app.js", f"{folder}index.html", f"{folder}../static.py",
                 f"{folder}%2e%2e/static.py", f"{folder}/etc/passwd", f"{folder}samples")  # fmt: skip
        assert {client.get(f"/{path}").status_code for path in wrong} == {404}


def test_no_part_of_the_page_has_inline_code_or_an_address_elsewhere() -> None:
    from serving.http.static import FOLDER

    for path in FOLDER.rglob("*"):
        if path.suffix in (".html", ".js", ".css", ".svg"):
            text = path.read_text("utf-8")
            assert not re.search(r"https?://(?!www\.w3\.org/)", text), path.name
            assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", text)
    page = (FOLDER / "index.html").read_text("utf-8")
    assert not re.search(r"<[^>]+\s(on\w+|style)=", page)
    assert not re.search(r"<script[^>]*>[^<]", page)


def test_our_own_sha256_is_sha256(drawing: Drawing, tab: Open) -> None:
    import hashlib

    one = tab(url=drawing.url)
    one.open()
    script = one.page.locator("script[type=module]").get_attribute("src").replace("app.js", "digest.js")
    for size in (0, 1, 55, 56, 63, 64, 65, 1000):
        found = one.page.evaluate(
            """async ([script, size]) => (await import(new URL(script, document.baseURI)))
            .slowSha256(Uint8Array.from({length: size}, (_, i) => i % 251))""",
            [script, size],
        )
        assert found == hashlib.sha256(bytes(i % 251 for i in range(size))).hexdigest()
