"""`POST /v1/edits`: what it takes, what it answers, what it refuses, and in which order it looks."""

from __future__ import annotations

import base64
import http.client
import io
import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image

from fakes.backends import DrawingBackend, digest_of
from servers.served import local_client
from serving.errors import ConditioningError, WrongBase
from serving.http.app import service_app
from serving.http.keyring import KeyLimits
from serving.http.native import accepted
from serving.images import TEXT_KEY
from serving.settings import ServingSettings

HAPPY = {"happy": 0.8}
SECONDS = 120.0


def opened(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def events(text: str) -> list[tuple[str, Any]]:
    """Events of a stream, as (name, data)."""
    found = []
    for block in text.strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if fields:
            found.append((fields["event"], json.loads(fields["data"])))
    return found


def test_an_edit_says_what_made_it(client: TestClient, encoded: str) -> None:
    answer = client.post("/v1/edits", json={"image": encoded, "expressions": HAPPY, "seed": 7})
    assert answer.status_code == 200
    facts = answer.json()
    (row,) = facts["results"]
    assert facts["adapter"] == "pixelsmile:1"
    assert (facts["adapter_name"], facts["adapter_version"]) == ("pixelsmile", 1)
    assert facts["adapter_digest"] == row["adapter_digest"] == str(digest_of(1))
    assert facts["id"] == answer.headers["x-request-id"]
    assert (row["expressions"], row["seed"], row["size"]) == (HAPPY, 7, [64, 64])
    picture = opened(row["image"])
    assert picture.size == (64, 64)
    assert json.loads(picture.info[TEXT_KEY])["adapter_digest"] == facts["adapter_digest"]


def test_every_answer_names_the_adapter_in_headers(client: TestClient, encoded: str) -> None:
    for accept in ("application/json", "text/event-stream", "image/png"):
        answer = client.post(
            "/v1/edits", json={"image": encoded, "expressions": HAPPY}, headers={"Accept": accept}
        )
        assert answer.headers["content-type"].startswith(accept)
        assert answer.headers["adapter-name"] == "pixelsmile"
        assert answer.headers["adapter-version"] == "1"
        assert answer.headers["adapter-digest"] == str(digest_of(1))
        assert answer.headers["x-request-id"]


def test_a_form_asks_for_the_same(client: TestClient, picture: bytes, encoded: str) -> None:
    fields = {"expressions": json.dumps(HAPPY), "adapter": "pixelsmile@prod", "seed": "3", "size": "[32, 64]"}
    form = client.post("/v1/edits", files={"image": ("a.png", picture)}, data=fields)
    body = {"image": encoded, "expressions": HAPPY, "adapter": "pixelsmile@prod", "seed": 3, "size": [32, 64]}
    plain = client.post("/v1/edits", json=body)
    assert form.status_code == plain.status_code == 200
    assert form.json()["results"] == plain.json()["results"]
    assert form.json()["results"][0]["size"] == [32, 64]


def test_a_whole_number_may_have_a_dot(client: TestClient, encoded: str) -> None:
    """JSON has one kind of number."""
    text = f'{{"image": "{encoded}", "expressions": {{}}, "seed": 3.0, "steps": 2.0, "size": [64.0, 64]}}'
    answer = client.post("/v1/edits", content=text, headers={"Content-Type": "application/json"})
    assert answer.status_code == 200, answer.text
    assert (answer.json()["results"][0]["seed"], answer.json()["results"][0]["steps"]) == (3, 2)


def test_a_data_url_is_a_picture(client: TestClient, encoded: str) -> None:
    body = {"image": f"data:image/png;base64,{encoded}", "expressions": {}}
    assert client.post("/v1/edits", json=body).status_code == 200


def test_a_sweep_is_rows(client: TestClient, encoded: str) -> None:
    sweep = {"expression": "happy", "from": 0.5, "to": 1.5, "count": 3}
    answer = client.post("/v1/edits", json={"image": encoded, "sweep": sweep}).json()
    assert [row["expressions"]["happy"] for row in answer["results"]] == [0.5, 1.0, 1.5]
    rows = [{"happy": 0.5}, {"happy": 1.0}, {"happy": 1.5}]
    assert (
        client.post("/v1/edits", json={"image": encoded, "rows": rows}).json()["results"] == answer["results"]
    )


def test_adapters_may_lie_under_it(client: TestClient, backend: DrawingBackend, encoded: str) -> None:
    stacked = [{"adapter": "pixelsmile:1", "strength": 0.5}]
    answer = client.post("/v1/edits", json={"image": encoded, "expressions": HAPPY, "stacked": stacked})
    assert answer.json()["results"][0]["stacked"][0]["strength"] == 0.5
    ((request, key),) = backend.asked
    assert (request.stacked[0].adapter, key) == ("pixelsmile:1", "local")


def test_a_png_is_the_answer_where_it_is_wanted(client: TestClient, encoded: str) -> None:
    png = {"Accept": "image/png"}
    answer = client.post("/v1/edits", json={"image": encoded, "expressions": HAPPY}, headers=png)
    assert Image.open(io.BytesIO(answer.content)).size == (64, 64)
    two = client.post("/v1/edits", json={"image": encoded, "rows": [{}, HAPPY]}, headers=png)
    assert two.status_code == 406


def test_events_tell_the_edit(client: TestClient, encoded: str) -> None:
    body = {"image": encoded, "rows": [HAPPY, {}], "steps": 6, "previews": 2}
    answer = client.post("/v1/edits", json=body, headers={"Accept": "text/event-stream"})
    told = events(answer.text)
    assert [name for name, _ in told] == ["queued", *["step"] * 6, "result"]
    assert told[0][1] == {
        "id": answer.headers["x-request-id"],
        "adapter": "pixelsmile:1",
        "adapter_digest": str(digest_of(1)),
    }
    assert [data["step"] for _, data in told[1:-1]] == [1, 2, 3, 4, 5, 6]
    previews = [data["pictures"] for _, data in told[1:-1] if "pictures" in data]
    assert len(previews) == 2
    assert all(opened(text).format == "JPEG" for row in previews for text in row)
    plain = client.post("/v1/edits", json=body).json()
    assert told[-1][1]["results"] == plain["results"]


def test_an_error_before_the_first_event_has_its_status(
    client: TestClient, backend: DrawingBackend, encoded: str
) -> None:
    backend.refusal = WrongBase("the adapter was made for another base", "serve another base")
    body = {"image": encoded, "expressions": HAPPY}
    answer = client.post("/v1/edits", json=body, headers={"Accept": "text/event-stream"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "wrong_base")


def test_an_error_after_it_is_the_last_event(
    client: TestClient, backend: DrawingBackend, encoded: str
) -> None:
    backend.failure = ConditioningError("a secret of the machine", "none")
    body = {"image": encoded, "expressions": HAPPY}
    answer = client.post("/v1/edits", json=body, headers={"Accept": "text/event-stream"})
    told = events(answer.text)
    assert answer.status_code == 200
    assert [name for name, _ in told] == ["queued", "error"]
    assert told[-1][1]["error"]["code"] == "internal_error"
    assert "secret" not in answer.text
    assert backend.running == 0


WRONG = [
    ({}, "image"),
    ({"image": "x"}, "exactly one"),
    ({"image": "x", "expressions": {}, "rows": [{}]}, "exactly one"),
    ({"image": "x", "expressions": {}, "wish": 1}, "wish"),
    ({"image": "x", "expressions": {"happy": "0.8"}}, "happy"),
    ({"image": "x", "expressions": {"happy": True}}, "happy"),
    ({"image": "x", "expressions": {}, "seed": -1}, "seed"),
    ({"image": "x", "expressions": {}, "seed": 1.5}, "seed"),
    ({"image": "x", "expressions": {}, "steps": 101}, "steps"),
    ({"image": "x", "expressions": {}, "strength": "1"}, "strength"),
    ({"image": "x", "expressions": {}, "size": [64]}, "size"),
    ({"image": "x", "expressions": {}, "size": [64, 4096]}, "size"),
    ({"image": "x", "expressions": {str(index): 1.0 for index in range(13)}}, "expressions"),
    ({"image": "x", "rows": []}, "rows"),
    ({"image": "x", "rows": [{}] * 65}, "rows"),
    ({"image": "x", "sweep": {"expression": "happy", "count": 1}}, "count"),
    ({"image": "x", "sweep": {"expression": "happy", "low": 1}}, "low"),
    ({"image": "x", "expressions": {}, "stacked": [{"adapter": "a:1"}] * 5}, "stacked"),
    ({"image": "x", "expressions": {}, "later": True}, "later"),
    ({"image": "!", "expressions": {}}, "base64"),
    ({"image": "data:text/plain,hello", "expressions": {}}, "data URL"),
    ({"image": "https://example.org/a.png", "expressions": {}}, "base64"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "said"), WRONG)
def test_what_is_wrong_is_said(
    client: TestClient, backend: DrawingBackend, body: dict[str, Any], said: str
) -> None:
    answer = client.post("/v1/edits", json=body)
    assert answer.status_code == 422, answer.text
    error = answer.json()["error"]
    assert said in error["message"]
    assert error["mend"]
    assert error["type"] == "invalid_request_error"
    assert not backend.asked


def test_what_is_no_number_is_refused(client: TestClient, encoded: str) -> None:
    for number in ("NaN", "Infinity", "-Infinity", "1e999"):
        text = f'{{"image": "{encoded}", "expressions": {{"happy": {number}}}}}'
        headers = {"Content-Type": "application/json"}
        assert client.post("/v1/edits", content=text, headers=headers).status_code in (400, 422)
        form = client.post(
            "/v1/edits", files={"image": base64.b64decode(encoded)},
            data={"expressions": f'{{"happy": {number}}}'},
        )  # fmt: skip
        assert form.status_code == 422


FORMS = [
    ({"wish": "1"}, "wish"),
    ({"expressions": "happy"}, "expressions"),
    ({"expressions": '{}, "seed": 1'}, "expressions"),
    ({"expressions": "{}", "seed": "x"}, "seed"),
    ({"expressions": "{}", "image": "abc"}, "image"),
]


@pytest.mark.parametrize(("fields", "said"), FORMS)
def test_what_is_wrong_with_a_form_is_said(
    client: TestClient, picture: bytes, fields: dict[str, str], said: str
) -> None:
    answer = client.post("/v1/edits", files={"image": ("a.png", picture)}, data=fields)
    assert answer.status_code == 422, answer.text
    assert said in answer.json()["error"]["message"]


def test_a_file_belongs_into_one_field(client: TestClient, picture: bytes) -> None:
    answer = client.post("/v1/edits", files={"seed": ("a.png", picture)}, data={"expressions": "{}"})
    assert answer.status_code == 422
    assert "image" in answer.json()["error"]["mend"]


def test_a_body_of_another_kind_is_refused(client: TestClient) -> None:
    answer = client.post("/v1/edits", content=b"<a/>", headers={"Content-Type": "text/xml"})
    assert answer.status_code == 415


def test_what_is_no_picture_takes_no_place(client: TestClient, backend: DrawingBackend) -> None:
    body = {"image": base64.b64encode(b"hello").decode(), "expressions": HAPPY}
    answer = client.post("/v1/edits", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "image_refused")
    assert not backend.asked


def test_a_picture_with_too_many_pixels_takes_no_place(
    backend: DrawingBackend, settings: ServingSettings, tmp_path: Path, encoded: str
) -> None:
    """By its header: the limit of the service may be lower than what the engine could read."""
    small = settings.model_copy(update={"max_pixels": 1024})
    with local_client(service_app(backend, small, home=tmp_path)) as client:
        answer = client.post("/v1/edits", json={"image": encoded, "expressions": HAPPY})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "image_refused")
    assert "1024" in answer.json()["error"]["message"]
    assert not backend.asked


def test_pictures_are_counted_before_one_is_decoded(
    app: FastAPI, client: TestClient, backend: DrawingBackend, encoded: str
) -> None:
    token, _ = app.state.service.keys.keys.add("me", ("edit",), limits=KeyLimits(pictures=3))
    headers = {"Authorization": f"Bearer {token}"}
    body = {"image": encoded, "rows": [{}, HAPPY]}
    assert client.post("/v1/edits", json=body, headers=headers).status_code == 200
    again = client.post("/v1/edits", json={**body, "image": "!"}, headers=headers)
    assert (again.status_code, again.json()["error"]["code"]) == (429, "rate_limited")
    assert int(again.headers["retry-after"]) >= 1
    form = {"prompt": "happy", "n": "2"}
    files = {"image": b"no picture"}
    openai = client.post("/v1/images/edits", data=form, files=files, headers=headers)
    assert openai.status_code == 429
    assert len(backend.asked) == 1


def test_a_full_queue_is_told_before_the_body_is_read(client: TestClient, backend: DrawingBackend) -> None:
    """The body would be refused: it was not looked at."""
    backend.full = 3.2
    answer = client.post("/v1/edits", json={"nonsense": True})
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "4"
    assert answer.json()["error"]["type"] == "rate_limit_error"


def test_a_service_that_goes_down_says_so(client: TestClient, backend: DrawingBackend) -> None:
    backend.draining = True
    answer = client.post("/v1/edits", json={"nonsense": True})
    assert answer.status_code == 503
    assert answer.headers["retry-after"]


@pytest.mark.parametrize(
    ("reference", "status"),
    [("other@prod", 404), ("pixelsmile:9", 404), ("pixelsmile", 400), ("../../etc/passwd", 400)],
)
def test_adapters_that_are_not_served(client: TestClient, encoded: str, reference: str, status: int) -> None:
    body = {"image": encoded, "expressions": HAPPY, "adapter": reference}
    answer = client.post("/v1/edits", json=body)
    assert answer.status_code == status
    assert answer.json()["error"]["mend"]


def test_a_job_is_taken_where_it_is_wanted(client: TestClient, encoded: str) -> None:
    body = {"image": encoded, "expressions": HAPPY}
    wanted = [({**body, "async": True}, {}), (body, {"Prefer": "respond-async, wait=5"})]
    for asked, headers in wanted:
        answer = client.post("/v1/edits", json=asked, headers=headers)
        assert answer.status_code == 202, answer.text
        assert answer.headers["location"] == f"/v1/jobs/{answer.json()['id']}"
        end = time.monotonic() + SECONDS
        while (job := client.get(answer.headers["location"]).json())["status"] != "succeeded":
            assert time.monotonic() < end, job
            time.sleep(0.05)
        picture = client.get(f"{answer.headers['location']}/results/0.png")
        assert picture.headers["adapter-digest"] == str(digest_of(1))
        plain = client.post("/v1/edits", json=body, headers={"Accept": "image/png"})
        assert picture.content == plain.content


def test_a_failure_of_ours_says_nothing_of_us(
    client: TestClient, backend: DrawingBackend, encoded: str, caplog: pytest.LogCaptureFixture
) -> None:
    backend.failure = RuntimeError("/home/secret/base is broken")
    answer = client.post("/v1/edits", json={"image": encoded, "expressions": HAPPY})
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "secret" in caplog.text


@pytest.mark.parametrize(
    ("header", "kind"),
    [
        (None, "application/json"),
        ("*/*", "application/json"),
        ("image/*", "image/png"),
        ("text/event-stream", "text/event-stream"),
        ("application/json;q=0.5, image/png", "image/png"),
        ("image/png;q=0.1, */*;q=0.9", "application/json"),
        ("IMAGE/PNG", "image/png"),
        ("image/png;q=nonsense, application/json;q=0.2", "application/json"),
    ],
)
def test_what_a_caller_accepts(header: str | None, kind: str) -> None:
    assert accepted(header, ("application/json", "text/event-stream", "image/png")) == kind


def test_what_nobody_can_answer(client: TestClient) -> None:
    answer = client.post("/v1/edits", json={}, headers={"Accept": "video/mp4"})
    assert answer.status_code == 406


def wait(condition: Any) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("accept", ["application/json", "text/event-stream"])
def test_a_client_that_leaves_cancels_its_edit(
    served: Any, backend: DrawingBackend, encoded: str, accept: str
) -> None:
    backend.go.clear()
    caller = http.client.HTTPConnection(served.url.removeprefix("http://"), timeout=SECONDS)
    headers = {"Accept": accept, "Content-Type": "application/json"}
    caller.request("POST", "/v1/edits", json.dumps({"image": encoded, "expressions": HAPPY}), headers)
    wait(lambda: backend.running == 1)
    caller.close()
    wait(lambda: backend.running == 0)
    assert backend.cancelled == 1


def test_the_version_of_an_edit_is_the_one_that_took_it(
    served: Any, backend: DrawingBackend, encoded: str
) -> None:
    backend.go.clear()
    body = {"image": encoded, "expressions": HAPPY}
    with httpx.stream(
        "POST", f"{served.url}/v1/edits", json=body, headers={"Accept": "text/event-stream"}, timeout=SECONDS
    ) as answer:
        assert answer.headers["adapter-version"] == "1"
        backend.version = 2
        backend.go.set()
        told = events("".join(answer.iter_text()))
    assert told[-1][1]["adapter"] == "pixelsmile:1"
    later = httpx.post(f"{served.url}/v1/edits", json=body, timeout=SECONDS)
    assert later.headers["adapter-version"] == "2"
