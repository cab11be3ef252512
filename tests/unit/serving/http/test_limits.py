"""What a request may be: the checks of its first lines, its bytes and its time; and how bodies are read."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st

from servers import service
from serving.errors import UsageError
from serving.http.answers import HttpError, Invalid, TooLarge, error_answer
from serving.http.limits import BODIES_AT_ONCE, BODIES_OF_ONE, Limits, Message, Receive, Send, check_head
from serving.http.reading import MAX_DEPTH, MAX_FIELD_BYTES, MAX_FIELDS, parse_json, read_base64, read_form
from serving.http.server import HttpServer
from serving.settings import ServingSettings

MAX_BODY = 1024
SECONDS = 120.0
"""Whatever has to happen happens in these, also on a machine that is busy."""


def scope(path: str = "/v1/edits", headers: dict[str, str] | None = None) -> dict[str, Any]:
    return {
        "type": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in (headers or {}).items()],
        "state": {},
    }


CHUNKED = {"transfer-encoding": "chunked", "content-type": "application/json"}


async def call(
    app: Any, asked: dict[str, Any], *parts: bytes, pause: float = 0.0
) -> tuple[int, dict[bytes, bytes]]:
    """Send a request in parts; return status and headers."""
    sent: list[Message] = []
    left = list(parts)

    async def receive() -> Message:
        if not left:
            return {"type": "http.disconnect"}
        await asyncio.sleep(pause)
        part = left.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(left)}

    async def send(message: Message) -> None:
        sent.append(message)

    await app(asked, receive, send)
    return sent[0]["status"], dict(sent[0]["headers"])


def reader(limits: Callable[[Any], Limits]) -> Limits:
    """An application that reads everything and says so."""

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    return limits(app)


def limited(app: Any, seconds: float = SECONDS) -> Limits:
    return Limits(app, ServingSettings(max_body=MAX_BODY, request_seconds=seconds))


# -- first lines --


@pytest.mark.parametrize(
    "path", ["/", "/v1/adapters/pixelsmile@prod", "/v1/adapters/pixelsmile@sha256:00", "/a.b~c_d-e"]
)
def test_addresses_that_are_fine(path: str) -> None:
    check_head(scope(path), 1024)


@pytest.mark.parametrize(
    ("asked", "status"),
    [
        (scope("/" + "a" * 2048), 414),
        (scope() | {"query_string": b"a" * 2049}, 414),
        (scope("/a/../b"), 404),
        (scope("/./b"), 404),
        (scope("/\0"), 404),
        (scope("/ä"), 404),
        (scope("/%2e"), 404),
        (scope(headers={f"x-{n}": "" for n in range(65)}), 431),
        (scope(headers={"x": "a" * 16385}), 431),
        (scope() | {"headers": [(b"host", b"a"), (b"host", b"b")]}, 400),
        (scope(headers={"content-length": "5", "transfer-encoding": "chunked"}), 400),
        (scope(headers={"content-length": "1025", "content-type": "application/json"}), 413),
        (scope(headers={"content-length": "-1", "content-type": "application/json"}), 413),
        (scope(headers={"content-length": "5", "content-type": "text/plain"}), 415),
        (scope(headers={"transfer-encoding": "chunked"}), 415),
        (scope(headers={**CHUNKED, "content-encoding": "gzip"}), 415),
    ],
)
def test_first_lines_that_are_refused(asked: dict[str, Any], status: int) -> None:
    with pytest.raises(HttpError) as refused:
        check_head(asked, 1024)
    assert refused.value.status == status
    assert refused.value.mend


# -- bytes and time --


def test_a_body_at_the_limit_is_read_and_one_byte_more_is_not() -> None:
    async def body() -> None:
        app = reader(limited)
        assert (await call(app, scope(headers=CHUNKED), b"x" * 1000, b"y" * 24))[0] == 200
        assert (await call(app, scope(headers=CHUNKED), b"x" * 1000, b"y" * 25))[0] == 413
        # a promise is not believed
        small = {"content-length": "10", "content-type": "application/json"}
        assert (await call(app, scope(headers=small), b"x" * 1025))[0] == 413

    asyncio.run(body())


def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    async def body() -> None:
        hasty = reader(lambda app: limited(app, 0.3))
        status, headers = await call(hasty, scope(headers=CHUNKED), *[b"x"] * 100, pause=0.05)
        assert (status, headers[b"connection"]) == (408, b"close")

    asyncio.run(body())


def test_an_answer_without_the_body_ends_the_connection_or_throws_the_rest_away() -> None:
    async def body() -> None:
        async def deaf(scope: Message, receive: Receive, send: Send) -> None:
            await send({"type": "http.response.start", "status": 401, "headers": []})
            await send({"type": "http.response.body", "body": b""})

        app = limited(deaf)
        assert b"connection" not in (await call(app, scope(headers=CHUNKED), b"a", b"b"))[1]
        assert (await call(app, scope(headers=CHUNKED), *[b"x" * 500] * 9))[1][b"connection"] == b"close"
        waits = {**CHUNKED, "expect": "100-continue"}
        assert (await call(app, scope(headers=waits), b"a"))[1][b"connection"] == b"close"

    asyncio.run(body())


class Holding:
    """An application that reads one part of each body, and answers when it may.

    Attributes:
        held: requests whose part was read.
        go: set when they may be answered.
    """

    def __init__(self) -> None:
        self.held = 0
        self.go = asyncio.Event()
        self.limits = limited(self)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        await receive()
        self.held += 1
        await self.go.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def ask(self, caller: str, size: int = MAX_BODY) -> tuple[int, dict[bytes, bytes]]:
        """Send a body as a caller whom the gate knows."""
        asked = scope(headers=CHUNKED) | {"state": {"caller": caller}}
        return await call(self.limits, asked, b"x" * size)

    async def full(self, *callers: str) -> list[asyncio.Task[tuple[int, dict[bytes, bytes]]]]:
        """As many of the largest bodies as each caller may have, held."""
        before, asked = self.held, [one for one in callers for _ in range(BODIES_OF_ONE)]
        tasks = [asyncio.create_task(self.ask(caller)) for caller in asked]
        async with asyncio.timeout(SECONDS):
            while self.held < before + len(asked):
                await asyncio.sleep(0)
        return tasks


def test_all_bodies_together_are_bounded_and_given_back() -> None:
    async def body() -> None:
        app = Holding()
        full = await app.full("one", "other")
        assert len(full) == BODIES_AT_ONCE
        status, headers = await app.ask("third", 1)
        assert (status, headers[b"retry-after"]) == (429, b"1")
        app.go.set()
        assert {(await one)[0] for one in full} == {200}
        assert (await app.ask("third"))[0] == 200
        assert {status for status, _ in [await app.ask("one") for _ in range(2 * BODIES_AT_ONCE)]} == {200}

    asyncio.run(body())


@pytest.mark.parametrize("greedy", ["one", ""], ids=["a key", "nobody"])
def test_bodies_of_one_caller_leave_room_for_those_of_others(greedy: str) -> None:
    async def body() -> None:
        app = Holding()
        full = await app.full(greedy)
        async with asyncio.timeout(SECONDS):
            status, headers = await app.ask(greedy, 1)
        assert (status, headers[b"retry-after"]) == (429, b"1")
        others = await app.full("other")
        app.go.set()
        assert {(await one)[0] for one in (*full, *others)} == {200}

    asyncio.run(body())


def test_a_body_counts_for_the_key_that_the_gate_found(tmp_path: Path) -> None:
    from fakes.backends import DrawingBackend
    from serving.http.app import service_app
    from serving.http.keyring import Keys

    token, _ = Keys.open(tmp_path).add("studio", ["edit"])
    inner = service_app(DrawingBackend(), ServingSettings(max_body=MAX_BODY), home=tmp_path)
    seen: list[str | None] = []

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        async def look() -> Message:
            seen.append(scope["state"].get("caller"))
            return await receive()

        await inner(scope, look if scope["type"] == "http" else receive, send)

    with TestClient(app) as client:
        client.post("/v1/edits", json={"image": "AAAA"}, headers={"X-Api-Key": token})
    assert seen[0] == "studio", "it was known before a byte was read"


def test_headers_that_checks_leave_are_added_to_any_answer() -> None:
    async def body() -> None:
        async def app(scope: Message, receive: Receive, send: Send) -> None:
            scope["state"]["answer_headers"] = [(b"ratelimit", b"r=1")]
            raise TooLarge("too large", "less")

        status, headers = await call(limited(app), scope())
        assert (status, headers[b"ratelimit"]) == (413, b"r=1")

    asyncio.run(body())


# -- bodies --

NUMBERS = st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)  # fmt: skip


@given(st.dictionaries(st.text(), VALUES, max_size=5))
def test_json_means_what_it_means_to_python(value: dict[str, Any]) -> None:
    text = json.dumps(value)
    try:
        assert parse_json(text.encode()) == value
    except HttpError:
        assert "\\ud" in text or text.count("[") + text.count("{") >= MAX_DEPTH


@given(st.binary(max_size=200))
def test_any_bytes_are_an_object_or_refused(data: bytes) -> None:
    try:
        status = 200 if isinstance(parse_json(data), dict) else 0
    except HttpError as error:
        status = error.status
    assert status in (200, 400, 413)


@pytest.mark.parametrize(
    "text",
    [
        '{"a": NaN}', '{"a": -Infinity}', '{"a": 1e999}', '{"a": -1e999}', '{"a": 1, "a": 1}',
        '{"a": "\\ud800"}', '{"\\udfff": 1}', '{"a": ' + "[" * MAX_DEPTH + "]" * MAX_DEPTH + "}",
        '{"a": ' + "[" * 9000 + "]" * 9000 + "}",
        '{"a": [' + "[]," * 10_000 + "[]]}", '{"a": ' + "9" * 5000 + "}", "[]", "null", "", "{", '{"a": 1} x',
    ],
    ids=lambda text: text[:20],
)  # fmt: skip
def test_json_that_is_refused(text: str) -> None:
    with pytest.raises(HttpError) as refused:
        parse_json(text.encode())
    assert refused.value.status in (400, 413)


def test_a_large_picture_in_json_is_fine() -> None:
    text = json.dumps({"image": "data:image/png;base64," + "A" * (8 << 20)})
    assert len(parse_json(text.encode())["image"]) > 8 << 20


def form(fields: int = 1, files: int = 1, size: int = 1, **options: Any) -> int:
    """Send a form to an application that reads it with `read_form`; return the status."""
    app = FastAPI()
    app.add_exception_handler(HttpError, lambda request, error: error_answer(error))

    @app.post("/")
    async def read(request: Request) -> dict[str, int]:
        found = await read_form(request, pictures=2)
        await found.close()
        return {"parts": len(found.multi_items())}

    data = {f"f{n}": "x" * size for n in range(fields)}
    pictures = [("image", (f"{n}.png", b"x", "image/png")) for n in range(files)]
    with TestClient(app) as client:
        return client.post("/", data=data, files=pictures, **options).status_code


def test_forms_at_their_limits_and_over() -> None:
    assert form(fields=MAX_FIELDS, files=2, size=100) == 200
    assert form(size=MAX_FIELD_BYTES) == 200
    assert form(fields=MAX_FIELDS + 1) == 400
    assert form(files=3) == 400
    assert form(size=MAX_FIELD_BYTES + 1) == 400
    assert form(headers={"content-type": "text/plain"}) == 415
    assert form(headers={"content-type": "multipart/form-data"}) == 400


@given(st.binary(max_size=500))
def test_base64_comes_back(data: bytes) -> None:
    import base64

    text = base64.b64encode(data).decode()
    assert read_base64(text) == data
    assert read_base64("data:image/png;base64," + text) == data


@pytest.mark.parametrize(
    "text",
    ["%", "AAA", "AA=A", "AAAA\n", "data:image/png,AAAA", "data:,", f"data:{'x' * 200};base64,AAAA"],
)
def test_what_is_no_base64(text: str) -> None:
    with pytest.raises(Invalid):
        read_base64(text)


# -- the server --


def test_an_address_in_use_is_explained() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = ServingSettings(port=taken.getsockname()[1])
        with pytest.raises(UsageError, match="cannot listen"):
            HttpServer(FastAPI(), settings, _nothing).bind()
    with pytest.raises(UsageError, match="cannot listen"):
        HttpServer(FastAPI(), ServingSettings(host="203.0.113.1", port=0), _nothing).bind()


async def _nothing() -> None:
    pass


def test_the_service_says_that_it_is_going_down_and_finishes_what_it_took(tmp_path: Path) -> None:
    import base64

    from PIL import Image

    from fakes.backends import digest_of
    from serving.images import png_bytes

    image = base64.b64encode(png_bytes(Image.new("RGB", (64, 64)), {})).decode()
    asked = {"image": image, "expressions": {"happy": 0.5}, "steps": 4}
    with (
        service.running(tmp_path, held=True, grace_seconds=SECONDS) as running,
        httpx.Client(base_url=running.url, timeout=SECONDS) as client,
    ):
        answers: list[httpx.Response] = []
        edit = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{running.url}/v1/edits", json=asked, timeout=SECONDS))
        )
        edit.start()
        _await(lambda: client.get("/v2/health/ready").json()["running"] == 1)
        running.process.send_signal(signal.SIGTERM)
        _await(lambda: client.get("/v2/health/ready").status_code == 503)
        refused = client.post("/v1/edits", json=asked)
        assert (refused.status_code, "retry-after" in refused.headers) == (503, True)
        assert not answers, "it still runs"
        running.let_go()
        edit.join(SECONDS)
        assert answers[0].status_code == 200
        assert answers[0].headers["adapter-digest"] == str(digest_of(1))
        assert running.process.wait(SECONDS) == 0


def _await(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
