"""What holds for every answer; health, adapters, and the document."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from fakes.backends import DrawingBackend, digest_of
from registry.errors import NetworkError
from servers.served import local_client
from serving.backend import AdapterStatus
from serving.settings import ServingSettings

EVERYWHERE = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}
PATHS = ["/", "/v2", "/v1/adapters", "/metrics", "/openapi.json", "/nothing", "/v1/jobs/none", "/v1/edits"]


@pytest.mark.parametrize("path", PATHS)
def test_headers_keep_browsers_careful(client: TestClient, path: str) -> None:
    answer = client.get(path)
    for name, value in EVERYWHERE.items():
        assert answer.headers[name] == value
        assert len(answer.headers.get_list(name)) == 1
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["x-request-id"]
    assert "server" not in answer.headers


def test_no_other_page_may_read_answers(client: TestClient) -> None:
    answer = client.options(
        "/v1/edits", headers={"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    )
    assert answer.status_code in (403, 405)
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_a_request_keeps_its_id(client: TestClient) -> None:
    assert client.get("/v2", headers={"X-Request-Id": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert client.get("/v2", headers={"X-Request-Id": "a b\tc"}).headers["x-request-id"] != "a b\tc"


def test_what_is_not_there(client: TestClient) -> None:
    assert client.get("/nothing").json()["error"]["code"] == "no_such_thing"
    wrong = client.put("/v1/edits")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert client.post("/v1/jobs/none").headers["allow"] == "DELETE, GET"


def test_the_document_needs_nothing_from_elsewhere(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    assert {
        "/v1/edits",
        "/v1/images/edits",
        "/v1/jobs/{id}",
        "/v1/adapters",
        "/v2/health/ready",
        "/metrics",
    } <= set(document["paths"])
    assert client.get("/docs").status_code == client.get("/redoc").status_code == 404


def test_the_document_explains_each_operation(client: TestClient) -> None:
    """A summary, a description, and errors in the one shape."""
    for path, operations in client.get("/openapi.json").json()["paths"].items():
        for method, operation in operations.items():
            assert operation["summary"], (method, path)
            assert operation["description"], (method, path)
            for status, answer in operation["responses"].items():
                if int(status) >= 400 and not (path.startswith("/v2") and status == "503"):
                    schema = answer["content"]["application/json"]["schema"]["$ref"]
                    assert schema.endswith("/ErrorAnswer"), (method, path, status)


def test_live_and_ready(client: TestClient, backend: DrawingBackend) -> None:
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").status_code == 200
    backend.problem = "the base at /srv/bases/x is away"
    answer = client.get("/v2/health/ready")
    assert (answer.status_code, answer.json()["ready"]) == (503, False)
    assert answer.json()["problem"] == "the base at … is away"
    assert client.get("/v2/health/live").status_code == 200


def test_a_service_whose_device_is_dead_has_to_start_again(
    client: TestClient, backend: DrawingBackend
) -> None:
    backend.problem, backend.device = "the last 3 steps on the device failed", "broken"
    assert client.get("/v2/health/live").status_code == 200, "it may work again"
    backend.device = "dead"
    answer = client.get("/v2/health/live")
    assert (answer.status_code, answer.json()) == (503, {"live": False})


AWAY = (
    "pixelsmile@prod is loading: the registry does not answer: https://minio.corp:9000 failed: "
    "HTTPSConnectionPool(host='minio.corp', port=9000): Failed to resolve 'minio.corp'"
)


def test_readiness_tells_a_stranger_yes_or_no(app: Any, client: TestClient, backend: DrawingBackend) -> None:
    keys = app.state.service.keys.keys
    token, _ = keys.add("reader", ("read",))
    writer, _ = keys.add("writer", ("edit",))
    backend.problem = AWAY
    for headers in ({}, {"X-Api-Key": "afk_" + "A" * 43}, {"X-Api-Key": writer}, {"X-Forwarded-For": "::1"}):
        answer = client.get("/v2/health/ready", headers=headers)
        assert answer.status_code == 503
        assert answer.json() == {
            "ready": False, "draining": False, "waiting": None, "running": None, "problem": "not ready",
        }  # fmt: skip
    told = client.get("/v2/health/ready", headers={"X-Api-Key": token})
    assert told.json()["problem"].startswith("pixelsmile@prod is loading: the registry does not answer: …")
    assert (told.json()["waiting"], told.json()["running"]) == (0, 0)
    backend.draining = True
    assert client.get("/v2/health/ready").json()["problem"] == "draining"
    backend.draining, backend.problem = False, None
    answer = client.get("/v2/health/ready")
    assert (answer.status_code, answer.json()["ready"], answer.json()["problem"]) == (200, True, None)


class Away(DrawingBackend):
    """Its store is away, and says where it was."""

    async def adapter(self, reference: str) -> AdapterStatus:
        return dataclasses.replace(await super().adapter(reference), state="loading", problem=AWAY)


def test_no_answer_names_the_store(settings: ServingSettings, tmp_path: Path, encoded: str) -> None:
    from serving.http.app import service_app

    backend = Away()
    backend.problem, backend.refusal = AWAY, NetworkError(AWAY, "look at http://minio.corp:9001")
    asked = {"image": encoded, "expressions": {"happy": 0.5}}
    app = service_app(backend, settings, home=tmp_path)
    with local_client(app) as client:
        answers = [
            client.get(path) for path in ("/v2/health/ready", "/v2/models/pixelsmile/ready", "/v1/adapters")
        ]
        answers.append(client.post("/v1/edits", json=asked))
    for answer in answers:
        assert "the registry does not answer" in answer.text, answer.text
        assert "minio.corp" not in answer.text


def test_readiness_of_each_adapter(client: TestClient) -> None:
    assert client.get("/v2/models/pixelsmile").json()["versions"] == ["1"]
    assert client.get("/v2/models/pixelsmile/ready").json()["ready"] is True
    assert client.get("/v2/models/pixelsmile/versions/1/ready").status_code == 200
    assert client.get("/v2/models/pixelsmile/versions/1").json()["name"] == "pixelsmile"
    for path in ("other", "other/ready", "pixelsmile/versions/2", "pixelsmile/versions/2/ready"):
        assert client.get(f"/v2/models/{path}").status_code == 404
    assert client.get("/v2/models/pixelsmile/versions/0/ready").status_code == 422


class Revoking(DrawingBackend):
    """Its adapter was withdrawn."""

    async def adapter(self, reference: str) -> AdapterStatus:
        status = await super().adapter(reference)
        return dataclasses.replace(status, state="revoked", problem="revoked: it leaks; see /srv/log/x")


def test_an_adapter_that_was_withdrawn_is_not_ready(settings: ServingSettings, tmp_path: Path) -> None:
    from serving.http.app import service_app

    app = service_app(Revoking(), settings, home=tmp_path)
    with local_client(app) as client:
        answer = client.get("/v2/models/pixelsmile/ready")
        assert answer.status_code == 503
        assert answer.json() == {"name": "pixelsmile", "ready": False, "problem": "revoked: it leaks; see …"}
        assert client.get("/v1/models").json()["data"] == []
        (adapter,) = client.get("/v1/adapters").json()["adapters"]
        assert (adapter["state"], adapter["problem"]) == ("revoked", "revoked: it leaks; see …")


def test_what_is_served(client: TestClient) -> None:
    told = client.get("/v1/adapters").json()
    assert told["default"] == "pixelsmile@prod"
    (adapter,) = told["adapters"]
    assert (adapter["digest"], adapter["state"]) == (str(digest_of(1)), "ready")
    assert client.get("/v1/adapters/pixelsmile:1").json()["version"] == 1
    assert client.get("/v1/adapters/other:1").status_code == 404
    assert client.get("/v1/adapters/pixelsmile").json()["error"]["mend"].startswith("write name@alias")


def test_metrics_are_counted_by_route(client: TestClient) -> None:
    client.get("/v1/adapters/pixelsmile:1")
    text = client.get("/metrics").text
    assert 'route="/v1/adapters/{reference}"' in text
    assert "pixelsmile:1" not in text


def test_a_key_is_needed_where_keys_are_made(app: Any, client: TestClient, tmp_path: Path) -> None:
    token, _ = app.state.service.keys.keys.add("reader", ("read",))
    for path in ("/v1/adapters", "/v1/models", "/metrics", "/v2/models/pixelsmile", "/v1/jobs"):
        assert client.get(path).status_code == 401
        assert client.get(path, headers={"Authorization": f"Bearer {token}"}).status_code == 200
    for path in ("/v1/edits", "/v1/images/edits"):
        assert client.post(path, json={}).status_code == 401
        refused = client.post(path, json={}, headers={"X-Api-Key": token})
        assert (refused.status_code, refused.json()["error"]["type"]) == (403, "permission_error")
    for path in ("/v2/health/live", "/v2/health/ready", "/v2", "/"):
        assert client.get(path).status_code == 200


def test_starting_and_ending_twice_is_once(app: Any, backend: DrawingBackend) -> None:
    import asyncio

    from serving.http.app import drain, start

    async def main() -> None:
        await start(app)
        runner = app.state.runner
        await start(app)
        assert app.state.runner is runner
        await drain(app)
        await drain(app)

    asyncio.run(main())
    assert backend.draining
