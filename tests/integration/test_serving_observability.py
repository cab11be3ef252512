"""One edit of a running service, seen from outside: its picture, its trace, its log line and its metrics."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics

from fakes.collectors import Seen, collector
from fakes.followed import PROD, three_versions, wait_until
from fakes.registries import BASE, NAME
from registry.client import Registry
from registry.manifest import BaseModelRef
from registry.reference import Reference
from serving import certificates
from serving.bases import register
from serving.metrics import PREFIX
from serving.provenance import Checked, check
from trainer.portraits.base import base_path

pytestmark = [pytest.mark.integration, pytest.mark.slow]

SECONDS = 120.0
TOKEN = "afk_" + "Secret-Token_" * 3 + "1234"


@dataclass(frozen=True, kw_only=True)
class Story:
    """What came of one edit, and of one that was refused."""

    digest: str
    upload: bytes
    answer: httpx.Response
    refused: httpx.Response
    metrics: dict[str, list[Any]]
    lines: list[dict[str, Any]]
    spans: dict[str, Seen]
    bodies: bytes
    checked: Checked


def photo() -> bytes:
    """An upload that says where it was taken."""
    exif = Image.Exif()
    exif[0x010F] = "SecretCamera"
    exif.get_ifd(0x8825).update({1: "N", 2: (52.0, 31.0, 12.0), 29: "2026:01:02"})
    pixels = np.random.default_rng(5).integers(0, 255, (96, 80, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("serving")
    three_versions(made)
    ref = BaseModelRef(id=BASE.id, revision=BASE.revision, family=BASE.family, license=BASE.license)
    register(base_path(), ref, made)
    return made


@pytest.fixture(scope="module")
def story(home: Path) -> Story:
    signer = certificates.make(home / "signer", "Example Team")
    upload = photo()
    with collector() as seen, (home / "serve.log").open("w") as log:
        settings = {"OTLP_ENDPOINT": seen.endpoint, "CONTENT_CREDENTIALS": signer.setting}
        process = subprocess.Popen(
            [sys.executable, "-m", "serving.cli", "serve", "--port", "0", "--json", "--adapter", PROD],
            env={
                **os.environ,
                "ADAPTER_FOUNDRY_HOME": str(home),
                **{f"ADAPTER_FOUNDRY_SERVING_{key}": value for key, value in settings.items()},
            },
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, (home / "serve.log").read_text()
            url = json.loads(line)["url"]
            answer = edit(url, upload, {"happy": 0.8})
            refused = edit(url, upload, {"secret": 1.0}, trace="12" * 16)
            httpx.get(f"{url}/nowhere%0A%7B%22event%22:%22forged%22%7D", timeout=SECONDS)
            openmetrics = {"Accept": "application/openmetrics-text"}
            text = httpx.get(f"{url}/metrics", headers=openmetrics, timeout=SECONDS).text
            process.send_signal(signal.SIGTERM)
            process.wait(SECONDS)
        finally:
            process.kill()
            process.wait()
        wait_until(lambda: "POST /v1/edits" in seen.spans("ab" * 16))
        spans, bodies = seen.spans("ab" * 16), b"".join(seen.bodies)
    assert answer.status_code == 200, answer.text
    state = Registry.open(home).authority.state()
    return Story(
        digest=str(state.resolve(Reference(name=NAME, version=1)).digest),
        upload=upload,
        answer=answer,
        refused=refused,
        metrics={family.name: family.samples for family in parse_openmetrics(text)},
        lines=[json.loads(one) for one in (home / "serve.log").read_text().splitlines() if one[:1] == "{"],
        spans=spans,
        bodies=bodies,
        checked=check(answer.content, "image/png", signer.authority.read_bytes()),
    )


def edit(url: str, picture: bytes, expressions: dict[str, float], trace: str = "ab" * 16) -> httpx.Response:
    """Ask for one PNG, as a caller who is in a trace and sends a key that nobody asked for."""
    return httpx.post(
        f"{url}/v1/edits",
        json={"image": base64.b64encode(picture).decode(), "expressions": expressions, "steps": 2},
        headers={
            "Accept": "image/png",
            "traceparent": f"00-{trace}-{'cd' * 8}-01",
            "X-Request-Id": "call-7",
            "X-Other": TOKEN,
        },
        timeout=SECONDS,
    )


def test_the_picture_says_what_made_it_from_what(story: Story) -> None:
    assert story.checked.state == "trusted"
    assert story.checked.facts["adapter"] == f"{NAME}:1"
    assert story.checked.facts["adapter_digest"] == story.digest == story.answer.headers["adapter-digest"]
    assert story.checked.parent == sha256(story.upload).hexdigest()
    assert b"SecretCamera" in story.upload
    assert b"SecretCamera" not in story.answer.content
    assert b"2026:01:02" not in story.answer.content


def test_its_trace_is_the_callers(story: Story) -> None:
    server = story.spans["POST /v1/edits"]
    order = ("queue", "encode", "steps", "decode")
    assert (server.trace, server.parent) == ("ab" * 16, "cd" * 8)
    assert {story.spans[name].parent for name in order} == {server.span}
    assert story.spans["steps"].attributes == {
        "foundry.adapter.name": NAME,
        "foundry.adapter.version": 1,
        "foundry.adapter.digest": story.digest,
        "foundry.rows": 1,
        "foundry.steps": 2,
    }
    assert story.answer.headers["traceresponse"].startswith(f"00-{'ab' * 16}-")
    for private in (b"secret", b"happy", TOKEN.encode(), b"127.0.0.1:"):
        assert private not in story.bodies


def test_its_line_in_the_log_says_who_what_and_how_long(story: Story) -> None:
    mine = [line for line in story.lines if line.get("request_id") == "call-7" and line["event"] == "request"]
    done, refused = mine
    assert done["seconds"] > 0
    assert {
        "level": "info",
        "trace_id": "ab" * 16,
        "method": "POST",
        "route": "/v1/edits",
        "status": 200,
        "adapter": f"{NAME}:1",
        "adapter_digest": story.digest,
        "rows": 1,
    }.items() <= done.items()
    assert done["key"]
    assert refused["status"] == story.refused.status_code
    assert 400 <= refused["status"] < 500
    assert story.answer.headers["x-request-id"] == "call-7"
    log = json.dumps(story.lines)
    assert "forged" not in {line["event"] for line in story.lines}
    assert "afk_" not in log
    assert base64.b64encode(story.upload)[:40].decode() not in log


def test_the_metrics_have_counted_it(story: Story) -> None:
    def value(family: str, end: str = "", **labels: str) -> float:
        found = [
            sample
            for sample in story.metrics[PREFIX + family]
            if sample.name == PREFIX + family + end and labels.items() <= sample.labels.items()
        ]
        return float(found[0].value)

    latency = "e2e_request_latency_seconds"
    assert value(latency, "_count", adapter=NAME, version="1") == 1
    assert value("request_queue_seconds", "_count") == 1
    assert value("step_seconds", "_count") >= 2
    assert value("http_requests", "_total", route="/v1/edits", method="POST", status="200") == 1
    assert value("http_requests", "_total", route="unmatched", method="GET", status="404") == 1
    assert value("followed_version", reference=PROD) == 1
    assert value("registry_up") == 1
    assert value("adapters_resident") == 1
    assert value("adapter_memory_bytes") > 0
    assert value("adapter_loads", "_total", adapter=NAME, outcome="loaded") == 1
    assert value("cache_misses", "_total", cache="pictures") >= 1
    assert value("num_requests_waiting") == value("num_requests_running") == 0
    assert value("content_credentials_expiry_timestamp_seconds") > time.time()
    exemplars = [one.exemplar for one in story.metrics[PREFIX + latency] if one.exemplar is not None]
    assert [one.labels for one in exemplars] == [{"trace_id": "ab" * 16}]
