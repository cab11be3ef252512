"""Attacks on the service that hears MLflow's webhooks: whoever does not know the secret starts nothing."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from mlflow.webhooks.delivery import _generate_hmac_signature

from flows.errors import FlowError, MessageRefused
from flows.webhook import MAX_AGE, MAX_BODY, SECRET_VARIABLE, Gate, create_app, secret

SECRET = "a secret of thirty-two characters"
BODY = json.dumps(
    {
        "entity": "model_version_alias",
        "action": "created",
        "timestamp": "2026-01-01T00:00:00+00:00",
        "data": {"name": "pixelsmile", "alias": "prod", "version": "2"},
    }
)
NOW = 1_800_000_000


def message(
    body: str = BODY, *, key: str = SECRET, at: int = NOW, delivery: str = "d-1", **headers: str
) -> dict[str, Any]:
    """A message as MLflow sends it, signed by MLflow's own function."""
    signed = {
        "x-mlflow-delivery-id": delivery,
        "x-mlflow-timestamp": str(at),
        "x-mlflow-signature": _generate_hmac_signature(key, delivery, str(at), body),
    }
    return {"content": body.encode(), "headers": signed | headers}


@pytest.fixture
def started() -> list[str]:
    return []


@pytest.fixture
def client(started: list[str]) -> TestClient:
    gate = Gate(secret=SECRET.encode(), now=lambda: NOW)

    def start(news: Any) -> str:
        started.append(f"{news.data.name}@{news.data.alias}")
        return "run-1"

    return TestClient(create_app(gate, start))


def test_an_honest_message_starts_a_run(client: TestClient, started: list[str]) -> None:
    answer = client.post("/mlflow", **message())
    assert (answer.status_code, answer.json()) == (202, {"run": "run-1"})
    assert started == ["pixelsmile@prod"]


SIGNATURE = "x-mlflow-signature"
HONEST = message()["headers"][SIGNATURE]
Attack = Callable[[], dict[str, Any]]
ATTACKS: dict[str, tuple[int, Attack]] = {
    "another secret": (401, lambda: message(key="another secret of many characters")),
    "no signature": (401, lambda: message(**{"x-mlflow-signature": ""})),
    "a signature of another version": (401, lambda: message(**{SIGNATURE: HONEST.replace("v1", "v0")})),
    "a signature that is no ASCII": (401, lambda: message(**{SIGNATURE: "v1,\u00e4".encode("latin-1")})),
    "a signature without its last letter": (401, lambda: message(**{SIGNATURE: HONEST[:-1]})),
    "another body": (401, lambda: message() | {"content": BODY.replace("prod", "evil").encode()}),
    "another delivery": (401, lambda: message(**{"x-mlflow-delivery-id": "d-2"})),
    "another time": (401, lambda: message(**{"x-mlflow-timestamp": str(NOW - 1)})),
    "an old time": (401, lambda: message(at=NOW - MAX_AGE - 1)),
    "a time to come": (401, lambda: message(at=NOW + MAX_AGE + 1)),
    "a time that is no number": (401, lambda: message(**{"x-mlflow-timestamp": "now"})),
    "a time in other digits": (401, lambda: message(**{"x-mlflow-timestamp": "\u0661".encode()})),
    "a huge number": (401, lambda: message(**{"x-mlflow-timestamp": "9" * 300})),
    "a huge body": (413, lambda: message(BODY + " " * MAX_BODY)),
    "no JSON": (422, lambda: message("yes")),
    "nested JSON": (422, lambda: message("[" * 10_000)),
    "another event": (422, lambda: message(BODY.replace("model_version_alias", "registered_model"))),
    "no name": (422, lambda: message(BODY.replace("pixelsmile", ""))),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_what_mlflow_has_not_signed_starts_nothing(client: TestClient, started: list[str], name: str) -> None:
    status, attack = ATTACKS[name]
    answer = client.post("/mlflow", **attack())
    assert answer.status_code == status, answer.text
    assert set(answer.json()["error"]) == {"kind", "message", "mend"}
    assert started == []


def test_a_replay_starts_nothing(client: TestClient, started: list[str]) -> None:
    assert client.post("/mlflow", **message()).status_code == 202
    assert client.post("/mlflow", **message()).status_code == 409
    assert client.post("/mlflow", **message(delivery="d-2")).status_code == 202
    assert len(started) == 2


def test_a_replay_is_refused_as_long_as_its_time_would_let_it_through() -> None:
    clock = [float(NOW)]
    gate = Gate(secret=SECRET.encode(), now=lambda: clock[0])
    early = message(at=NOW + MAX_AGE)
    gate.check(early["headers"], early["content"])
    for clock[0] in (NOW + 1.0, NOW + MAX_AGE, NOW + 2 * MAX_AGE, NOW + 2 * MAX_AGE + 1):
        other = message(at=int(clock[0]), delivery=f"d-{clock[0]}")
        gate.check(other["headers"], other["content"])
        with pytest.raises(MessageRefused, match=r"twice|too old"):
            gate.check(early["headers"], early["content"])


def test_a_body_without_an_end_is_not_read_to_it() -> None:
    """The service is asked as a server asks it, which knows how much was taken."""
    app = create_app(Gate(secret=SECRET.encode(), now=lambda: NOW), lambda news: "run-1")
    scope = {
        "type": "http", "http_version": "1.1", "method": "POST", "path": "/mlflow", "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in message()["headers"].items()],
    }  # fmt: skip
    taken, answers = 0, []

    async def receive() -> dict[str, Any]:
        nonlocal taken
        taken += 1024
        return {"type": "http.request", "body": b"x" * 1024, "more_body": taken < 100 * MAX_BODY}

    async def send(told: dict[str, Any]) -> None:
        answers.append(told)

    asyncio.run(app(scope, receive, send))
    assert answers[0]["status"] == 413
    assert taken <= MAX_BODY + 2048


def test_a_message_of_which_nothing_came_may_come_again(started: list[str]) -> None:
    fails = [True]

    def start(news: Any) -> str:
        if fails.pop() if fails else False:
            raise FlowError("Prefect does not answer", "start it")
        return "run-1"

    client = TestClient(create_app(Gate(secret=SECRET.encode(), now=lambda: NOW), start))
    assert client.post("/mlflow", **message()).status_code == 503
    assert client.post("/mlflow", **message()).status_code == 202


def test_nothing_else_is_served(client: TestClient) -> None:
    for path in ("/", "/docs", "/openapi.json", "/mlflow"):
        assert client.get(path).status_code in (404, 405)


@pytest.mark.parametrize("value", ["", "short"])
def test_there_is_no_service_without_a_secret(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(SECRET_VARIABLE, value)
    with pytest.raises(FlowError, match=SECRET_VARIABLE):
        secret()


def test_the_secret_is_shown_nowhere() -> None:
    assert SECRET not in repr(Gate(secret=SECRET.encode()))


@given(st.binary(max_size=200), st.text(max_size=50), st.text(max_size=50), st.text(max_size=80))
def test_any_message_is_refused_with_a_reason(body: bytes, delivery: str, stamp: str, signature: str) -> None:
    gate = Gate(secret=SECRET.encode(), now=time.time)
    headers = {"x-mlflow-delivery-id": delivery, "x-mlflow-timestamp": stamp, "x-mlflow-signature": signature}
    with pytest.raises(MessageRefused):
        gate.check(headers, body)
