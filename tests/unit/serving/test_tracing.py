"""Traces: what a collector receives over OTLP/HTTP, whose trace it belongs to, and what is never in it."""

from __future__ import annotations

import asyncio
import itertools
import queue
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image

from fakes.collectors import Collector, collector
from registry.digest import digest_bytes
from serving import tracing
from serving.engine import EditEngine
from serving.errors import UsageError
from serving.scheduler import Scheduler
from serving.schema import SweepRequest
from serving.tickets import Event
from serving.tracing import HttpTraces, Tracing

DIGEST = digest_bytes(b"weights")
PARENT = "00-" + "ab" * 16 + "-" + "cd" * 8 + "-01"


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """A collector that is there is waited for, however busy the machine is."""
    monkeypatch.setattr(tracing, "_SEND_SECONDS", 120.0)
    with collector() as made:
        yield made


def on_a_device(trace: tracing.Trace) -> None:
    """What a scheduler's thread does with a request: wait, encode, steps, decode."""
    began = time.monotonic()
    trace.record("queue", began - 0.5, began)
    with trace.span("encode", rows=2):
        pass
    with trace.span("steps", adapter="pixelsmile", version=3, digest=DIGEST, rows=2, steps=8):
        pass
    with trace.span("decode", rows=2):
        time.sleep(0.01)


def app_with(traces: Tracing) -> FastAPI:
    """A service whose edits run in another thread."""
    app = FastAPI()

    @app.post("/v1/edits/{name}")
    async def edit(name: str) -> dict[str, str | None]:
        place = tracing.here()
        thread = threading.Thread(target=on_a_device, args=(place,))
        thread.start()
        await asyncio.to_thread(thread.join)
        return {"trace": place.trace_id, **place.headers()}

    @app.get("/broken")
    async def broken() -> None:
        with tracing.here().span("encode"):
            raise RuntimeError("secret afk_abcdefgh of the prompt")

    app.add_middleware(HttpTraces, tracing=traces)
    return app


def test_a_request_is_one_trace_from_the_caller_to_the_device(seen: Collector) -> None:
    traces = Tracing(seen.endpoint)
    answer = TestClient(app_with(traces)).post(
        "/v1/edits/secret?prompt=secret", headers={"traceparent": PARENT}
    )
    traces.close()
    spans = seen.spans()
    server = spans["POST /v1/edits/{name}"]
    assert set(spans) == {server.name, "queue", "encode", "steps", "decode"}
    assert {span.trace for span in spans.values()} == {"ab" * 16}
    assert server.parent == "cd" * 8
    assert {span.parent for span in spans.values() if span is not server} == {server.span}
    assert server.attributes == {
        "http.request.method": "POST",
        "http.route": "/v1/edits/{name}",
        "http.response.status_code": 200,
    }
    assert spans["steps"].attributes == {
        "foundry.adapter.name": "pixelsmile",
        "foundry.adapter.version": 3,
        "foundry.adapter.digest": str(DIGEST),
        "foundry.rows": 2,
        "foundry.steps": 8,
    }
    assert 0.49e9 < spans["queue"].ended - spans["queue"].began < 0.51e9
    assert server.began <= spans["decode"].began <= spans["decode"].ended <= server.ended
    assert seen.resource["service.name"] == "adapter-foundry-serving"
    assert set(seen.paths) == {"/v1/traces"}
    assert answer.json()["trace"] == "ab" * 16
    assert answer.json()["traceparent"] == answer.headers["traceresponse"]
    assert answer.headers["traceresponse"] == f"00-{'ab' * 16}-{server.span}-01"
    assert b"secret" not in b"".join(seen.bodies)


@pytest.mark.parametrize(
    "given",
    ["", "00-zz-1-01", "00-" + "0" * 32 + "-" + "cd" * 8 + "-01", "00-" + "ab" * 5000, "ff" + PARENT[2:]],
)
def test_a_broken_traceparent_begins_a_new_trace(seen: Collector, given: str) -> None:
    traces = Tracing(seen.endpoint)
    answer = TestClient(app_with(traces)).post("/v1/edits/x", headers={"traceparent": given})
    traces.close()
    assert re.fullmatch(r"[0-9a-f]{32}", answer.json()["trace"])
    assert answer.json()["trace"] != "ab" * 16
    assert seen.spans()["POST /v1/edits/{name}"].parent == ""


def test_a_failure_says_its_class_and_not_its_message(seen: Collector) -> None:
    traces = Tracing(seen.endpoint)
    client = TestClient(app_with(traces), raise_server_exceptions=False)
    assert client.get("/broken").status_code == 500
    assert client.get("/nowhere-secret").status_code == 404
    traces.close()
    spans = seen.spans()
    assert (spans["encode"].failed, spans["encode"].attributes) == (True, {"error.type": "RuntimeError"})
    assert spans["GET /broken"].failed
    assert not spans["GET unmatched"].failed
    assert b"secret" not in b"".join(seen.bodies)


def test_a_fact_that_is_not_on_the_list_cannot_be_said(seen: Collector) -> None:
    traces = Tracing(seen.endpoint)
    with traces.serving("GET", {}), pytest.raises(KeyError):
        tracing.here().record("steps", 0.0, 1.0, prompt="secret")  # type: ignore[call-arg]
    traces.close()
    assert b"secret" not in b"".join(seen.bodies)


def test_another_process_continues_the_trace(seen: Collector) -> None:
    """A replica elsewhere gets the headers with its task."""
    ingress, replica = Tracing(seen.endpoint), Tracing(seen.endpoint)
    with ingress.serving("POST", {}):
        headers = tracing.here().headers()
    with replica.resumed(headers), tracing.here().span("steps", rows=1):
        pass
    assert tracing.here().trace_id is None
    ingress.close()
    replica.close()
    spans = seen.spans()
    assert spans["steps"].parent == spans["POST"].span
    assert spans["steps"].trace == spans["POST"].trace


def test_without_an_endpoint_nothing_happens() -> None:
    traces = Tracing(None)
    answer = TestClient(app_with(traces)).post("/v1/edits/x", headers={"traceparent": PARENT})
    with traces.resumed({"traceparent": PARENT}):
        assert tracing.here().headers() == {}
    traces.close()
    assert answer.json() == {"trace": None}
    assert "traceresponse" not in answer.headers


def test_a_collector_that_is_away_costs_seconds_at_the_end_and_nothing_before() -> None:

    def exporters() -> set[threading.Thread]:
        return {one for one in threading.enumerate() if one.name.startswith("Otel")}

    others = exporters()
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        traces = Tracing(f"http://127.0.0.1:{held.getsockname()[1]}")
        began = time.perf_counter()
        for _ in range(3000):  # more than the exporter's queue holds
            with traces.serving("GET", {}):
                pass
        served = time.perf_counter() - began
        traces.close()
        closed = time.perf_counter() - began
        print(f"3,000 requests in {served:.2f} s; closed {closed - served:.2f} s later")
        assert served < 60, "one that waited for its span alone would take a second or more"
        assert closed < 300
        # The exporter goes on for a while, and would say in the logs of the next tests that it cannot send.
        while left := exporters() - others:
            assert time.perf_counter() - began < 600, left
            time.sleep(0.05)


@pytest.mark.parametrize("endpoint", ["localhost:4318", "ftp://x", "http://", "http://x:port", "\x1b[2J"])
def test_an_endpoint_that_is_no_address_is_refused(endpoint: str) -> None:
    with pytest.raises(UsageError, match="no address") as caught:
        Tracing(endpoint)
    assert "\x1b" not in str(caught.value)


def test_a_path_of_the_endpoint_is_kept(seen: Collector) -> None:
    traces = Tracing(seen.endpoint + "/tenant/v1/traces")
    with traces.serving("GET", {}):
        pass
    traces.close()
    assert set(seen.paths) == {"/tenant/v1/traces"}


def test_a_thread_that_is_held_up_between_two_clocks_shifts_no_span(
    seen: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings = itertools.count()
    real = time.time_ns

    def held_up() -> int:
        if next(readings) % 3 == 0:
            time.sleep(0.2)
        return real()

    traces = Tracing(seen.endpoint)
    with traces.serving("POST", {}):
        pass
    monkeypatch.setattr(tracing.time, "time_ns", held_up)
    with traces.resumed({"traceparent": PARENT}), tracing.here().span("encode"):
        inside = real()
    monkeypatch.undo()
    traces.close()
    span = seen.spans()["encode"]
    assert span.began - 0.1e9 < inside < span.ended + 0.1e9


def test_without_the_extra_only_an_endpoint_is_an_error() -> None:
    program = """
import sys
sys.modules["opentelemetry"] = None
from serving import tracing
from serving.engine import EditEngine
from serving.errors import UsageError
from serving.scheduler import Scheduler
from serving.schema import SweepRequest
from serving.tickets import Event
with tracing.Tracing(None).serving("GET", {}), tracing.here().span("steps", rows=1):
    pass
try:
    tracing.Tracing("http://127.0.0.1:4318")
except UsageError as error:
    print(error.mend)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "adapter-foundry[telemetry]" in result.stdout


def test_the_scheduler_says_where_the_time_went(
    seen: Collector, pipeline: Any, make_adapter: Any, portrait: Image.Image
) -> None:
    """A real edit on the device's thread, under the request that asked for it."""
    adapter = make_adapter()
    engine = EditEngine(pipeline, base=adapter.card.base, allow_candidates=True)
    scheduler, traces = Scheduler(engine, max_rows=8, max_waiting=8), Tracing(seen.endpoint)
    heard: queue.Queue[Event] = queue.Queue()
    scheduler.start()
    with traces.serving("POST", {}):
        request = SweepRequest.make(image=portrait, rows=({"happy": 0.5}, {"happy": 1.0}), steps=3)
        scheduler.enter(scheduler.take(request, key="ann", listener=heard.put), ((adapter, 1.0),))
        while not isinstance(event := heard.get(timeout=300), list):
            assert not isinstance(event, Exception), event
    scheduler.drain(120)
    traces.close()
    spans = seen.spans()
    order = ["queue", "encode", "steps", "decode"]
    assert set(spans) == {"POST", *order}
    assert {spans[name].parent for name in order} == {spans["POST"].span}
    assert spans["steps"].attributes == {"foundry.rows": 2, "foundry.steps": 3}, "a candidate has no name"
    times = [moment for name in order for moment in (spans[name].began, spans[name].ended)]
    assert all(after >= before for before, after in pairwise(times)), "one after the other"
