"""Metrics: names, negotiation, and a number of series that strangers cannot grow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from fastapi import APIRouter, FastAPI
from fastapi.staticfiles import StaticFiles
from fastapi.testclient import TestClient
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from registry.errors import IdentityMismatch, LicenseRefused, RegistryError, Revoked
from serving.encodings import CacheInfo
from serving.merging import OPEN_METRICS
from serving.metrics import MAX_SERIES, PREFIX, HttpMetrics, Metrics

#: The names that dashboards, alerts and other people's scrape rules rely on.
NAMES = {
    "num_requests_waiting": "gauge",
    "num_requests_running": "gauge",
    "request_queue_seconds": "histogram",
    "e2e_request_latency_seconds": "histogram",
    "step_seconds": "histogram",
    "batch_rows": "histogram",
    "device_broken": "gauge",
    "adapter_loads": "counter",
    "adapter_load_seconds": "histogram",
    "adapters_resident": "gauge",
    "adapter_memory_bytes": "gauge",
    "cache_hits": "counter",
    "cache_misses": "counter",
    "cache_bytes": "gauge",
    "verification_failures": "counter",
    "promotions": "counter",
    "registry_up": "gauge",
    "followed_version": "gauge",
    "http_requests": "counter",
    "http_request_seconds": "histogram",
    "rejected": "counter",
    "cancelled": "counter",
    "jobs": "gauge",
    "webhooks": "counter",
    "content_credentials_expiry_timestamp_seconds": "gauge",
}


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(PREFIX + name, labels)


def series(metrics: Metrics, name: str) -> set[tuple[str, ...]]:
    """The label sets of a metric."""
    return {
        tuple(value for key, value in sorted(sample.labels.items()) if key != "le")
        for family in parse(metrics.exposition()[0].decode())
        for sample in family.samples
        if family.name == PREFIX + name and not sample.name.endswith("_created")
    }


def test_names_and_types_are_the_promised_ones() -> None:
    found = {family.name: family.type for family in parse(Metrics().exposition()[0].decode())}
    assert {PREFIX + name: kind for name, kind in NAMES.items()} == {
        name: kind
        for name, kind in found.items()
        if name.startswith(PREFIX) and not name.endswith("_created")
    }
    assert "process_resident_memory_bytes" in found


def test_two_services_in_one_process_count_apart() -> None:
    one, two = Metrics(), Metrics()
    one.cancelled.inc()
    assert (value(one, "cancelled_total"), value(two, "cancelled_total")) == (1, 0)


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("", "text/plain; version=0.0.4"),
        ("*/*", "text/plain; version=0.0.4"),
        ("text/plain;version=1.0.0;escaping=allow-utf-8", "text/plain; version=0.0.4"),
        ("application/openmetrics-text;version=1.0.0,text/plain;q=0.1", "application/openmetrics-text"),
        ("application/openmetrics-text;version=no-version", "application/openmetrics-text"),
        ("application/OpenMetrics-text ; x=\x01,,;;=", "application/openmetrics-text"),
    ],
)
def test_the_format_is_the_one_that_was_asked_for(accept: str, kind: str) -> None:
    metrics = Metrics()
    metrics.edited("pixelsmile", 3, 1.5, trace_id="ab" * 16)
    text, content_type = metrics.exposition(accept)
    assert content_type.startswith(kind)
    parser = parse_openmetrics if "openmetrics" in kind else parse
    assert any(family.name == PREFIX + "e2e_request_latency_seconds" for family in parser(text.decode()))


def test_a_latency_names_its_trace_where_the_format_can() -> None:
    metrics = Metrics()
    metrics.edited("pixelsmile", 3, 1.5, trace_id="ab" * 16)
    text, _ = metrics.exposition("application/openmetrics-text")
    assert f'trace_id="{"ab" * 16}"'.encode() in text
    assert b"trace_id" not in metrics.exposition()[0]


def test_series_of_old_versions_make_room() -> None:
    metrics = Metrics()
    for version in range(MAX_SERIES + 50):
        metrics.edited("pixelsmile", 0, 0.1)
        metrics.edited("pixelsmile", version, 0.1)
    versions = {version for _, version in series(metrics, "e2e_request_latency_seconds")}
    assert len(versions) == MAX_SERIES
    assert {"0", str(MAX_SERIES + 49)} <= versions


def test_a_wrong_set_of_labels_is_an_error() -> None:
    with pytest.raises(ValueError, match="route, method, status"):
        Metrics().http_requests.labels(route="/")


def test_refusals_are_counted_by_what_did_not_hold() -> None:
    class Newer(LicenseRefused):
        """A refusal that this version of the metrics has never heard of."""

    metrics = Metrics()
    assert value(metrics, "verification_failures_total", reason="bad_signature") == 0, (
        "alerts see the first one"
    )
    for error in (Revoked("x"), IdentityMismatch("x"), Newer("x"), RegistryError("ab\ncd")):
        metrics.refused(error)
    for reason in ("revoked", "identity_mismatch", "license", "other"):
        assert value(metrics, "verification_failures_total", reason=reason) == 1
    assert value(metrics, "verification_failures_total", reason="bad_signature") == 0


def test_loads_are_timed_and_failures_counted() -> None:
    metrics = Metrics()
    with metrics.loading("pixelsmile"):
        pass
    with pytest.raises(MemoryError), metrics.loading("pixelsmile"):
        raise MemoryError
    assert value(metrics, "adapter_loads_total", adapter="pixelsmile", outcome="loaded") == 1
    assert value(metrics, "adapter_loads_total", adapter="pixelsmile", outcome="failed") == 1
    assert value(metrics, "adapter_load_seconds_count") == 1


@dataclass
class Slots:
    residents: Sequence[object] = ("one", "two")
    memory: int = 4096


@dataclass
class Engine:
    """What an engine says of itself."""

    slots: Slots = field(default_factory=Slots)
    info: Mapping[str, CacheInfo] = field(
        default_factory=lambda: {"prompts": CacheInfo(hits=5, misses=2, nbytes=1000)}
    )

    def cache_info(self) -> Mapping[str, CacheInfo]:
        return self.info


def test_the_engine_is_read_at_the_scrape() -> None:
    metrics, engine = Metrics(), Engine()
    assert value(metrics, "adapters_resident") is None
    metrics.watch(engine)
    assert value(metrics, "adapters_resident") == 2
    assert value(metrics, "adapter_memory_bytes") == 4096
    engine.info = {
        "prompts": CacheInfo(hits=6, misses=2, nbytes=900),
        "pictures": CacheInfo(hits=0, misses=1, nbytes=10),
    }
    assert value(metrics, "cache_hits_total", cache="prompts") == 6
    assert value(metrics, "cache_misses_total", cache="pictures") == 1
    assert value(metrics, "cache_bytes", cache="prompts") == 900


# -- several processes --


@pytest.mark.parametrize("accept", ["", "application/openmetrics-text"])
def test_one_scrape_tells_of_all_replicas(accept: str) -> None:
    own, engines = Metrics(), [Metrics(), Metrics()]
    own.promotions.labels(adapter="pixelsmile").inc()
    for number, engine in enumerate(engines):
        engine.watch(Engine())
        engine.step_seconds.observe(number)
        engine.edited("pixelsmile", 3, 1.5, trace_id="ab" * 16)
    texts = {f"engine-{n}": one.exposition(OPEN_METRICS)[0].decode() for n, one in enumerate(engines)}
    own.include("ingress", lambda: {**texts, "broken": "what is this", "cut": texts["engine-0"][:500]})
    text = own.exposition(accept)[0].decode()
    families = list((parse_openmetrics if accept else parse)(text))
    assert len({family.name for family in families}) == len(families)
    found = {
        (sample.name.removeprefix(PREFIX), sample.labels["replica"]): sample
        for family in families
        for sample in family.samples
        if sample.name.endswith(("_count", "_total", "_resident"))
    }
    assert found["step_seconds_count", "engine-1"].value == found["step_seconds_count", "engine-0"].value == 1
    assert found["step_seconds_count", "ingress"].value == 0
    assert found["promotions_total", "ingress"].value == 1
    assert found["adapters_resident", "engine-0"].value == 2
    assert ("adapters_resident", "ingress") not in found
    assert ('trace_id="' in text) == bool(accept), "exemplars come along"
    assert {replica for _, replica in found} == {"ingress", "engine-0", "engine-1"}


# -- HTTP --


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def client(metrics: Metrics, tmp_path: Path) -> TestClient:
    """A service with a route that has a parameter, a mounted folder, and one that fails."""
    (tmp_path / "page.css").write_text("body {}")
    router = APIRouter(prefix="/v1")

    @router.get("/adapters/{reference:path}")
    def adapter(reference: str) -> str:
        return reference

    @router.get("/broken")
    def broken() -> None:
        raise RuntimeError("as tests want it")

    app = FastAPI()
    app.include_router(router)
    app.mount("/static", StaticFiles(directory=tmp_path))
    app.add_middleware(HttpMetrics, metrics=metrics)
    return TestClient(app, raise_server_exceptions=False)


def test_requests_are_counted_by_template(client: TestClient, metrics: Metrics) -> None:
    for reference in ("a@prod", "b@prod", "c/d"):
        client.get(f"/v1/adapters/{reference}")
    client.post("/v1/adapters/a@prod")
    client.get("/static/page.css")
    client.get("/v1/broken")
    assert series(metrics, "http_requests") == {
        ("GET", "/v1/adapters/{reference:path}", "200"),
        ("POST", "/v1/adapters/{reference:path}", "405"),
        ("GET", "/static/*", "200"),
        ("GET", "/v1/broken", "500"),
    }
    labels = {"route": "/v1/adapters/{reference:path}"}
    assert value(metrics, "http_request_seconds_count", **labels) == 4


def test_strangers_make_no_series(client: TestClient, metrics: Metrics) -> None:
    for number in range(300):
        client.get(f"/wp-login-{number}.php")
        client.get(f"/v1/adapters/name-{number}")
        client.get(f"/static/{number}")
        client.request(f"VERB{number}", "/")
    assert series(metrics, "http_requests") == {
        ("GET", "unmatched", "404"),
        ("GET", "/v1/adapters/{reference:path}", "200"),
        ("GET", "/static/*", "404"),
        ("OTHER", "unmatched", "404"),
    }
