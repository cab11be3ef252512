"""Logs: one event a line whatever strangers send, no keys and no pictures, one id through a request."""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image

from registry.digest import digest_bytes
from serving import logs
from serving.logs import HttpLogs
from serving.tracing import Tracing

KEY = "afk_" + "A1b-_" * 8 + "xyz"
HOSTILE = 'x"}\n{"event": "forged"}\r\n\x1b[2J\x1b]0;title\x07\u2028\u2029\x85\x00\ud800 ::error::'.encode(
    "utf-8", "surrogatepass"
).decode("utf-8", "surrogatepass")


@pytest.fixture(autouse=True)
def quiet_again(pytestconfig: pytest.Config) -> Iterator[None]:
    """Logging is the process's own; each test gives it back as it was.

    pytest keeps what is logged for its report, and cannot send a lone surrogate from one process to another.
    """
    kept = pytestconfig.pluginmanager.get_plugin("logging-plugin").report_handler
    kept.setLevel(logging.CRITICAL + 1)
    names = ("", "serving", "uvicorn", "py.warnings")
    before = [(logging.getLogger(name).level, list(logging.getLogger(name).handlers)) for name in names]
    yield
    logging.captureWarnings(False)
    for name, (level, handlers) in zip(names, before, strict=True):
        logging.getLogger(name).setLevel(level)
        logging.getLogger(name).handlers[:] = handlers
    kept.setLevel(logging.NOTSET)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def stream() -> io.StringIO:
    made = io.StringIO()
    logs.configure(made)
    return made


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    """Every line, each of which must be an object."""
    text = stream.getvalue()
    assert text.isascii()
    assert text == "" or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def test_an_event_is_one_object_on_one_line(stream: io.StringIO) -> None:
    digest = digest_bytes(b"weights")
    logs.event(
        "adapter promoted", adapter="pixelsmile", version=3, digest=digest, seconds=0.12345678, old=None
    )
    (line,) = lines(stream)
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "level": "info",
        "event": "adapter promoted",
        "adapter": "pixelsmile",
        "version": 3,
        "digest": str(digest),
        "seconds": 0.123457,
        "old": None,
    }


def test_lines_of_a_request_share_its_facts(stream: io.StringIO) -> None:
    with logs.request("abc-1.2_3") as identifier:
        assert logs.request_id() == identifier == "abc-1.2_3"
        logs.bind(key="ann")
        logs.event("one")
    logs.bind(key="nobody")
    logs.event("two")
    one, two = lines(stream)
    assert (one["request_id"], one["key"]) == ("abc-1.2_3", "ann")
    assert not {"request_id", "key"} & set(two)


@pytest.mark.parametrize("given", [None, "", "a b", "a\nb", "x" * 65, HOSTILE, "é"])
def test_an_id_that_is_no_plain_word_is_replaced(given: str | None) -> None:
    with logs.request(given) as identifier:
        assert len(identifier) == 32
        assert identifier.isalnum()


# -- injection --


def test_hostile_text_makes_no_line_of_its_own(stream: io.StringIO) -> None:
    logs.event("refused", reference=HOSTILE, **{HOSTILE[:20]: "as a name"})
    logging.getLogger("some.library").warning("could not read %s", HOSTILE)
    try:
        raise ValueError(HOSTILE)
    except ValueError as error:
        logs.event("failed", level=logging.ERROR, error=error)
    warnings.warn(HOSTILE, stacklevel=1)
    events = [line["event"] for line in lines(stream)]
    assert len(events) == 4
    assert "forged" not in events


def test_hostile_text_leaves_a_terminal_alone() -> None:
    stream = Terminal()
    logs.configure(stream)
    logs.event("refused", reference=HOSTILE)
    try:
        raise ValueError(HOSTILE)
    except ValueError as error:
        logs.event("failed " + HOSTILE, level=logging.ERROR, error=error)
    text = stream.getvalue()
    assert text.isascii()
    assert all(sign == "\n" or sign.isprintable() for sign in text)
    heads = [line for line in text.splitlines() if not line.startswith("    ")]
    assert len(heads) == 2


def test_a_terminal_gets_a_short_line() -> None:
    stream = Terminal()
    logs.configure(stream)
    logs.event("adapter promoted", adapter="pixelsmile", version=3)
    assert stream.getvalue()[8:] == " info    adapter promoted  adapter=pixelsmile  version=3\n"


# -- what is never said --


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_keys_are_blotted_out_everywhere(kind: type[io.StringIO]) -> None:
    stream = kind()
    logs.configure(stream)
    logs.event(
        f"used {KEY}", key=KEY, header=f"Authorization: Bearer {KEY}", odd="bearer something-else", **{KEY: 1}
    )
    logging.getLogger("uvicorn.error").info("got %s", f"'Bearer {KEY[4:]}'")
    try:
        raise ValueError(f"no such key {KEY}")
    except ValueError as error:
        logs.event("failed", error=error)
    logs.event("cut", text="x" * (logs.MAX_TEXT - 10) + KEY)
    assert KEY[4:9] not in stream.getvalue()
    assert "something-else" not in stream.getvalue()
    assert "***" in stream.getvalue()


def test_pictures_and_bodies_are_named_by_their_type(stream: io.StringIO) -> None:
    logs.event("edited", image=Image.new("RGB", (8, 8)), body=b"\x89PNG secret", rows=[{"happy": 1}])
    (line,) = lines(stream)
    assert (line["image"], line["body"], line["rows"]) == ("<Image>", "<bytes>", "<list>")
    assert "secret" not in stream.getvalue()


def test_long_texts_are_cut_and_odd_numbers_stay_json(stream: io.StringIO) -> None:
    logs.event("odd", text="y" * 100_000, number=float("nan"), big=float("-inf"))
    (line,) = lines(stream)
    assert len(line["text"]) < logs.MAX_TEXT + 50
    assert (line["number"], line["big"]) == ("nan", "-inf")


def test_configuring_again_does_not_say_everything_twice() -> None:
    first, second = io.StringIO(), io.StringIO()
    logs.configure(first)
    logs.configure(second)
    logs.event("once")
    assert (first.getvalue(), len(lines(second))) == ("", 1)


def test_libraries_are_heard_from_a_warning_on(stream: io.StringIO) -> None:
    logging.getLogger("urllib3").info("chatter")
    logging.getLogger("urllib3").warning("trouble")
    (line,) = lines(stream)
    assert (line["event"], line["logger"]) == ("trouble", "urllib3")


# -- HTTP --


@pytest.fixture
def client() -> TestClient:
    app = FastAPI()

    @app.get("/v1/adapters/{reference}")
    async def adapter(reference: str) -> str | None:
        logs.bind(key="ann", adapter=reference)
        return logs.request_id()

    @app.get("/v2/health/live")
    async def live() -> None:
        """Say nothing."""

    @app.get("/broken")
    def broken() -> None:
        raise RuntimeError(f"with {KEY}")

    app.add_middleware(HttpLogs)
    return TestClient(app, raise_server_exceptions=False)


def test_a_request_is_a_line_with_what_routes_bound(client: TestClient, stream: io.StringIO) -> None:
    answer = client.get("/v1/adapters/pixelsmile@prod?secret=1", headers={"X-Request-Id": "call-7"})
    (line,) = lines(stream)
    assert line["event"] == "request"
    assert {"method": "GET", "route": "/v1/adapters/{reference}", "status": 200}.items() <= line.items()
    assert {"key": "ann", "adapter": "pixelsmile@prod", "request_id": "call-7"}.items() <= line.items()
    assert line["seconds"] > 0
    assert answer.headers["x-request-id"] == answer.json() == "call-7"
    assert "secret" not in stream.getvalue()


def test_an_unmatched_path_cannot_forge_a_line(client: TestClient, stream: io.StringIO) -> None:
    answer = client.get("/no%0A%7B%22event%22:%22forged%22%7D%1b[2J", headers={"X-Request-Id": "a b"})
    (line,) = lines(stream)
    assert (line["event"], line["status"], line["route"]) == ("request", 404, "unmatched")
    assert line["path"].startswith("/no\n{")
    assert len(answer.headers["x-request-id"]) == 32


def test_a_failure_is_logged_with_its_traceback_and_without_keys(
    client: TestClient, stream: io.StringIO
) -> None:
    assert client.get("/broken").status_code == 500
    failed, request = lines(stream)
    assert (failed["event"], failed["level"], request["status"]) == ("request failed", "error", 500)
    assert "RuntimeError: with ***" in failed["exception"]
    assert failed["request_id"] == request["request_id"]


def test_health_checks_are_quiet(client: TestClient, stream: io.StringIO) -> None:
    client.get("/v2/health/live")
    assert lines(stream) == []
    client.post("/v2/health/live")
    assert [line["status"] for line in lines(stream)] == [405]


def test_lines_name_the_trace(stream: io.StringIO) -> None:
    traces = Tracing("http://127.0.0.1:9")
    with traces.serving("GET", {"traceparent": "00-" + "ab" * 16 + "-" + "cd" * 8 + "-00"}):
        logs.event("inside")
    logs.event("outside")
    traces.close()
    inside, outside = lines(stream)
    assert inside["trace_id"] == "ab" * 16
    assert "trace_id" not in outside
