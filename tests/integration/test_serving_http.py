"""`serving serve` as its users have it: a process, a real registry, the shipped base, real clients."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from fakes.followed import PROD, three_versions, wait_until
from fakes.registries import BASE, NAME
from registry.client import Registry
from registry.manifest import BaseModelRef
from registry.reference import Reference
from serving.bases import register
from serving.images import TEXT_KEY
from trainer.portraits.base import base_path

pytestmark = [pytest.mark.integration, pytest.mark.slow]

SECONDS = 300.0
"""Whatever has to happen happens in these, also on a machine that is busy."""
HAPPY = {"happy": 0.8}


class Service:
    """A process of `serving serve`."""

    def __init__(self, home: Path, *arguments: str, **settings: object) -> None:
        self.home = home
        named = {f"ADAPTER_FOUNDRY_SERVING_{key.upper()}": str(value) for key, value in settings.items()}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "serving.cli", "serve", "--port", "0", "--json", *arguments],
            env={**os.environ, "ADAPTER_FOUNDRY_HOME": str(home), **named},
            stdout=subprocess.PIPE,
            stderr=(home / "serve.log").open("w"),
            text=True,
        )

    def ready(self) -> str:
        """Waits for what it prints, and returns its URL."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.log()
        said = json.loads(line)
        assert "url" in said, said
        return str(said["url"])

    def log(self) -> str:
        return (self.home / "serve.log").read_text()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("serving")
    three_versions(home)
    ref = BaseModelRef(id=BASE.id, revision=BASE.revision, family=BASE.family, license=BASE.license)
    register(base_path(), ref, home)
    return home


@pytest.fixture(scope="module")
def service(folder: Path) -> Iterator[Service]:
    started = Service(folder, "--adapter", PROD, follow_seconds=0.3, grace_seconds=SECONDS)
    try:
        yield started
    finally:
        started.end()


@pytest.fixture(scope="module")
def url(service: Service) -> str:
    return service.ready()


@pytest.fixture(scope="module")
def api(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=SECONDS) as made:
        yield made


@pytest.fixture(scope="module")
def picture() -> bytes:
    pixels = np.random.default_rng(5).integers(0, 255, (96, 80, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def ask(url: str, picture: bytes, accept: str = "application/json", **body: Any) -> httpx.Response:
    asked = {"image": base64.b64encode(picture).decode(), "expressions": HAPPY, **body}
    if "rows" in body or "sweep" in body:
        del asked["expressions"]
    return httpx.post(f"{url}/v1/edits", json=asked, headers={"Accept": accept}, timeout=SECONDS)


def pixels(data: str | bytes | None) -> Any:
    assert data is not None
    raw = base64.b64decode(data) if isinstance(data, str) else data
    return np.asarray(Image.open(io.BytesIO(raw)), dtype=np.int16)


def digest(home: Path, version: int) -> str:
    state = Registry.open(home).authority.state()
    return str(state.resolve(Reference(name=NAME, version=version)).digest)


def test_it_says_that_it_is_ready_and_what_it_serves(url: str, folder: Path) -> None:
    assert httpx.get(f"{url}/v2/health/ready", timeout=SECONDS).json()["ready"] is True
    assert httpx.get(f"{url}/v2/models/{NAME}/versions/1/ready", timeout=SECONDS).json() == {
        "name": NAME, "ready": True, "problem": None,
    }  # fmt: skip
    (adapter,) = httpx.get(f"{url}/v1/adapters", timeout=SECONDS).json()["adapters"]
    assert (adapter["reference"], adapter["version"]) == (PROD, 1)
    assert adapter["digest"] == digest(folder, 1)
    assert adapter["facts"]["expressions"] == ["happy", "surprised"]


def test_openai_and_native_make_the_same_picture(
    url: str, api: openai.OpenAI, picture: bytes, folder: Path
) -> None:
    native = ask(url, picture, seed=4)
    assert native.headers["adapter-digest"] == digest(folder, 1)
    told = api.images.edit(image=picture, prompt="happy=0.8", model=PROD, extra_body={"seed": 4})
    assert told.data is not None
    (adapter,) = httpx.get(f"{url}/v1/adapters", timeout=SECONDS).json()["adapters"]
    prompt = adapter["facts"]["template"].replace("{}", "happy=0.8")
    whole = api.images.edit(image=picture, prompt=prompt, extra_body={"seed": 4})
    assert whole.data is not None
    png = ask(url, picture, "image/png", seed=4).content
    one = pixels(native.json()["results"][0]["image"])
    for other in (told.data[0].b64_json, whole.data[0].b64_json, png):
        assert np.array_equal(one, pixels(other))
    label = json.loads(Image.open(io.BytesIO(png)).info[TEXT_KEY])
    assert label["adapter_digest"] == digest(folder, 1)


def test_a_sweep_starts_from_one_noise_and_n_from_several(
    url: str, api: openai.OpenAI, picture: bytes
) -> None:
    rows = ask(url, picture, sweep={"expression": "happy", "count": 3}, steps=2).json()["results"]
    assert [row["expressions"]["happy"] for row in rows] == [0.0, 0.75, 1.5]
    single = ask(url, picture, expressions={"happy": 0.75}, steps=2).json()["results"]
    assert np.abs(pixels(single[0]["image"]) - pixels(rows[1]["image"])).max() <= 1
    several = api.images.edit(image=picture, prompt="happy", n=2, extra_body={"steps": 2})
    assert several.data is not None
    first, second = (pixels(one.b64_json) for one in several.data)
    assert np.abs(first - second).max() > 1


def test_a_stream_ends_with_the_same_picture(api: openai.OpenAI, picture: bytes) -> None:
    told = list(api.images.edit(image=picture, prompt="happy", stream=True, partial_images=2))
    assert [event.type for event in told][-1] == "image_edit.completed"
    assert len(told) == 3
    plain = api.images.edit(image=picture, prompt="happy")
    assert plain.data is not None
    assert np.array_equal(pixels(told[-1].b64_json), pixels(plain.data[0].b64_json))


def test_a_job_is_done_behind_the_answer(url: str, picture: bytes) -> None:
    body = {"image": base64.b64encode(picture).decode(), "rows": [HAPPY, {}], "steps": 2}
    taken = httpx.post(f"{url}/v1/edits", json=body, headers={"Prefer": "respond-async"}, timeout=SECONDS)
    assert taken.status_code == 202, taken.text
    place = url + taken.headers["location"]
    end = time.monotonic() + SECONDS
    while (job := httpx.get(place, timeout=SECONDS).json())["status"] not in ("succeeded", "failed"):
        assert time.monotonic() < end, job
        time.sleep(0.1)
    plain = ask(url, picture, rows=[HAPPY, {}], steps=2).json()["results"]
    for row in range(2):
        assert np.array_equal(
            pixels(httpx.get(f"{place}/results/{row}.png", timeout=SECONDS).content),
            pixels(plain[row]["image"]),
        )


def test_errors_are_typed_and_explained(url: str, api: openai.OpenAI, picture: bytes) -> None:
    with pytest.raises(openai.NotFoundError):
        api.images.edit(image=picture, prompt="happy", model="other@prod")
    with pytest.raises(openai.BadRequestError, match="no expression of this adapter"):
        api.images.edit(image=picture, prompt="hapy")
    unknown = ask(url, picture, expressions={"hapy": 1.0})
    assert unknown.json()["error"]["code"] == "unknown_expression"
    assert "'happy'" in unknown.json()["error"]["mend"]
    strong = ask(url, picture, expressions={"happy": 9.0})
    assert strong.json()["error"]["code"] == "strength_out_of_range"
    assert {unknown.status_code, strong.status_code} == {400}


def test_a_promotion_goes_live_and_no_request_fails(url: str, picture: bytes, folder: Path) -> None:
    """Each answer is whole: its headers, its JSON and its picture name one version; none goes back."""
    answers: list[tuple[float, httpx.Response]] = []
    stop = threading.Event()

    def client() -> None:
        while not stop.is_set():
            began = time.monotonic()
            answers.append((began, ask(url, picture, steps=2)))

    callers = [threading.Thread(target=client, daemon=True) for _ in range(3)]
    for caller in callers:
        caller.start()
    wait_until(lambda: len(answers) >= len(callers), SECONDS)
    registry = Registry.open(folder)
    registry.promote(f"{NAME}:2", "prod")
    live = wait_until(
        lambda: any(answer.headers.get("adapter-version") == "2" for _, answer in list(answers)), SECONDS
    )
    seen = time.monotonic()
    wait_until(lambda: any(began > seen for began, _ in list(answers)), SECONDS)
    stop.set()
    for caller in callers:
        caller.join()
    assert {answer.status_code for _, answer in answers} == {200}
    for _, answer in answers:
        facts = answer.json()
        label = json.loads(
            Image.open(io.BytesIO(base64.b64decode(facts["results"][0]["image"]))).info[TEXT_KEY]
        )
        version = int(answer.headers["adapter-version"])
        expected = digest(folder, version)
        assert {label["adapter_digest"], facts["adapter_digest"], answer.headers["adapter-digest"]} == {
            expected
        }
    assert {answer.headers["adapter-version"] for _, answer in answers} == {"1", "2"}
    print(f"live after {live:.1f} s")
    late = [answer for began, answer in answers if began > seen]
    assert all(answer.headers["adapter-version"] == "2" for answer in late)


def test_the_end_finishes_what_runs(service: Service, url: str, picture: bytes) -> None:
    """The last test of this service: SIGTERM while an edit of many steps runs."""
    kept: list[httpx.Response] = []
    # Large, so that it outlasts the signal and the question after it.
    long = threading.Thread(target=lambda: kept.append(ask(url, picture, steps=100, size=[128, 128])))
    long.start()
    end = time.monotonic() + SECONDS
    while httpx.get(f"{url}/v2/health/ready", timeout=SECONDS).json()["running"] < 1:
        assert time.monotonic() < end
        time.sleep(0.02)
    service.process.send_signal(signal.SIGTERM)
    while httpx.get(f"{url}/v2/health/ready", timeout=SECONDS).status_code == 200:
        assert time.monotonic() < end
    refused = ask(url, picture, steps=1)
    assert long.is_alive(), "it ended before it could be asked"
    long.join()
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
    assert refused.headers["retry-after"]
    assert kept[0].status_code == 200
    assert service.process.wait(SECONDS) == 0
    assert "Traceback" not in service.log()


def failed(home: Path, *arguments: str, **settings: str) -> dict[str, Any]:
    """What `serving serve` explains when it does not start."""
    named = {f"ADAPTER_FOUNDRY_SERVING_{key.upper()}": value for key, value in settings.items()}
    ended = subprocess.run(
        [sys.executable, "-m", "serving.cli", "serve", "--json", *arguments],
        env={**os.environ, "ADAPTER_FOUNDRY_HOME": str(home), **named}, capture_output=True, text=True,
        timeout=SECONDS, check=False,
    )  # fmt: skip
    assert "Traceback" not in ended.stderr
    error: dict[str, Any] = json.loads(ended.stdout)["error"]
    assert error["exit_code"] == ended.returncode
    assert error["mend"]
    return error


def test_what_keeps_it_from_starting_is_explained(folder: Path, tmp_path: Path) -> None:
    nothing = failed(folder)
    assert (nothing["exit_code"], "--adapter" in nothing["mend"]) == (2, True)
    assert failed(folder, "--adapter", "pixelsmile")["exit_code"] == 2
    assert failed(folder, "--adapter", "other@prod")["exit_code"] == 11
    assert "serving keys add" in failed(folder, "--adapter", PROD, "--host", "0.0.0.0")["mend"]
    three_versions(tmp_path)
    assert failed(tmp_path, "--adapter", PROD, "--port", "0")["kind"] == "BaseNotFound"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert port in failed(folder, "--adapter", PROD, "--port", port)["message"]
