"""What the service counts and times, for Prometheus.

Names follow the field's: requests that wait and run, time in the queue, end-to-end latency, rows in a batch,
loads of adapters, cache hits. A `Metrics` has a registry of its own, so that several services can live in one
process. The number of series is bounded: labels hold what is served, never what a stranger typed. Routes are
counted by their template, and where labels can grow over months (versions of an adapter) the series that was
used longest ago makes room.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

from registry.errors import Explained
from serving.asgi import App, Message, Receive, Send, template, verb
from serving.merging import OPEN_METRICS, Merged, Texts

if TYPE_CHECKING:
    from serving.encodings import CacheInfo

PREFIX = "foundry_serving_"
MAX_SERIES = 256
"""Of one metric; far more adapters and versions than one device serves, and nothing to a Prometheus."""

# From a tiny base on a CPU (milliseconds) to a large one with offload (minutes), about two a factor of ten.
_STEP = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_QUEUE = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_LATENCY = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)
_LOAD = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_HTTP = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128, 256)

_REASONS = {
    "Unsigned": "unsigned",
    "NotFound": "not_found",
    "BadSignature": "bad_signature",
    "IdentityMismatch": "identity_mismatch",
    "DigestMismatch": "digest_mismatch",
    "LicenseRefused": "license",
    "ScanRefused": "scan",
    "PolicyRefused": "policy",
    "Revoked": "revoked",
    "StaleTrust": "stale_trust",
    "NeedsReview": "needs_review",
    "NetworkError": "network",
    "WrongBase": "wrong_base",
    "AdapterMismatch": "does_not_fit",
}

_Metric = TypeVar("_Metric", bound=MetricWrapperBase)


class Labelled(Generic[_Metric]):
    """A metric with labels that has at most `MAX_SERIES` series; safe to use from several threads."""

    def __init__(self, metric: _Metric, names: Sequence[str]) -> None:
        self._metric = metric
        self._names = tuple(names)
        self._used: dict[tuple[str, ...], None] = {}
        self._lock = threading.Lock()

    def labels(self, **values: object) -> _Metric:
        """Return the series of these labels; the one that was used longest ago makes room for a new one."""
        if len(values) != len(self._names):
            raise ValueError(f"the labels are {', '.join(self._names)}")
        key = tuple(str(values[name]) for name in self._names)
        with self._lock:
            self._used.pop(key, None)
            self._used[key] = None
            if len(self._used) > MAX_SERIES:
                oldest = next(iter(self._used))
                del self._used[oldest]
                self._metric.remove(*oldest)
            return self._metric.labels(*key)


class _Slots(Protocol):
    @property
    def residents(self) -> Sequence[object]: ...

    @property
    def memory(self) -> int: ...


class Watched(Protocol):
    """What an engine says of itself: adapters on the device, and hits, misses and bytes of each cache."""

    @property
    def slots(self) -> _Slots: ...

    def cache_info(self) -> Mapping[str, CacheInfo]: ...


class Metrics:
    """All metrics of a service. Attributes are the metrics, by their name without prefix and ``_total``."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self._requests()
        self._adapters()
        self._edges()
        self._engine = _EngineCollector()
        self.registry.register(self._engine)
        self._merged: Merged | None = None

    def _requests(self) -> None:
        self.num_requests_waiting = self._gauge("num_requests_waiting", "Requests in the queue.")
        self.num_requests_running = self._gauge("num_requests_running", "Requests on the device.")
        self.request_queue_seconds = self._histogram(
            "request_queue_seconds", "Time from taking a request to its first step.", _QUEUE
        )
        self.e2e_request_latency_seconds = self._labelled_histogram(
            "e2e_request_latency_seconds",
            "Time from taking a request to its pictures.",
            _LATENCY,
            ("adapter", "version"),
        )
        self.step_seconds = self._histogram("step_seconds", "Time of one denoising step of a batch.", _STEP)
        self.batch_rows = self._histogram("batch_rows", "Rows that one denoising step worked on.", _ROWS)
        self.device_broken = self._gauge(
            "device_broken", "1 while steps on the device fail for everybody, 0 while it works."
        )
        self.cancelled = self._counter("cancelled", "Requests that their caller gave up.")
        self.rejected = self._labelled_counter("rejected", "Requests that were not taken.", ("reason",))

    def _adapters(self) -> None:
        self.adapter_loads = self._labelled_counter(
            "adapter_loads", "Adapters that were put on the device, or failed to.", ("adapter", "outcome")
        )
        self.adapter_load_seconds = self._histogram(
            "adapter_load_seconds", "Time to check an adapter and copy it to the device.", _LOAD
        )
        self.verification_failures = self._labelled_counter(
            "verification_failures", "Adapters that were refused, by what did not hold.", ("reason",)
        )
        for reason in (*_REASONS.values(), "other"):
            # From 0 on: a series that is born at 1 has not increased, and no alert sees the first refusal.
            self.verification_failures.labels(reason=reason)
        self.promotions = self._labelled_counter(
            "promotions", "Times that another version of an adapter went live.", ("adapter",)
        )
        self.registry_up = self._gauge("registry_up", "1 while the registry answers, 0 while it does not.")
        self.followed_version = self._labelled_gauge(
            "followed_version", "Version that a followed reference is served with.", ("reference",)
        )

    def _edges(self) -> None:
        self.http_requests = self._labelled_counter(
            "http_requests", "HTTP requests.", ("route", "method", "status")
        )
        self.http_request_seconds = self._labelled_histogram(
            "http_request_seconds", "Time to the last byte of an HTTP answer.", _HTTP, ("route",)
        )
        self.jobs = self._labelled_gauge("jobs", "Asynchronous jobs.", ("state",))
        self.webhooks = self._labelled_counter("webhooks", "Webhook deliveries.", ("outcome",))
        self.content_credentials_expiry_timestamp_seconds = self._gauge(
            "content_credentials_expiry_timestamp_seconds",
            "When the certificate that signs pictures ends; 0 signs none.",
        )

    def watch(self, engine: Watched) -> None:
        """Report an engine's caches and resident adapters from now on; they are read when somebody asks."""
        self._engine.engine = engine

    def include(self, name: str, texts: Texts) -> None:
        """Tell the metrics of other processes, too; from then on each series has the label ``replica``.

        Args:
            name: of this process.
            texts: gives what `exposition` of the others returned as OpenMetrics, by their names, at once.
        """
        self._merged = Merged(self.registry, name, texts)

    @contextmanager
    def loading(self, adapter: str) -> Iterator[None]:
        """Time and count putting an adapter on the device; an exception counts as a failure."""
        began = time.perf_counter()
        try:
            yield
        except BaseException:
            self.adapter_loads.labels(adapter=adapter, outcome="failed").inc()
            raise
        self.adapter_loads.labels(adapter=adapter, outcome="loaded").inc()
        self.adapter_load_seconds.observe(time.perf_counter() - began)

    def refused(self, error: Explained) -> None:
        """Count an adapter that was refused; an unknown kind of refusal counts as its nearest parent."""
        reason = next(
            (_REASONS[one.__name__] for one in type(error).__mro__ if one.__name__ in _REASONS), "other"
        )
        self.verification_failures.labels(reason=reason).inc()

    def edited(self, adapter: str, version: int, seconds: float, *, trace_id: str | None = None) -> None:
        """Time an answered request.

        Args:
            adapter: its name, as it was verified.
            version: as it was verified; 0 for a candidate without one.
            seconds: from taking the request to its pictures.
            trace_id: 32 hex digits; links the latency to its trace in scrapes that speak OpenMetrics.
        """
        exemplar = None if trace_id is None else {"trace_id": trace_id}
        series = self.e2e_request_latency_seconds.labels(adapter=adapter, version=version)
        series.observe(seconds, exemplar)

    def exposition(self, accept: str = "") -> tuple[bytes, str]:
        """Return all metrics as text and its content type.

        Args:
            accept: the header of that name; OpenMetrics 1.0 is written where it asks for it, otherwise the
                text format 0.0.4, which everything reads.
        """
        registry = self._merged or self.registry
        kinds = {part.split(";")[0].strip().lower() for part in accept.split(",")}
        if OPEN_METRICS in kinds:
            text: bytes = openmetrics.generate_latest(registry)  # type: ignore[no-untyped-call]
            return text, openmetrics.CONTENT_TYPE_LATEST
        return generate_latest(registry), CONTENT_TYPE_PLAIN_0_0_4

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(PREFIX + name, text, registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(PREFIX + name, text, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(PREFIX + name, text, registry=self.registry, buckets=buckets)

    def _labelled_counter(self, name: str, text: str, labels: Sequence[str]) -> Labelled[Counter]:
        return Labelled(Counter(PREFIX + name, text, labels, registry=self.registry), labels)

    def _labelled_gauge(self, name: str, text: str, labels: Sequence[str]) -> Labelled[Gauge]:
        return Labelled(Gauge(PREFIX + name, text, labels, registry=self.registry), labels)

    def _labelled_histogram(
        self, name: str, text: str, buckets: Sequence[float], labels: Sequence[str]
    ) -> Labelled[Histogram]:
        made = Histogram(PREFIX + name, text, labels, registry=self.registry, buckets=buckets)
        return Labelled(made, labels)


class _EngineCollector(Collector):
    """Reads the engine at the time of a scrape, so that the engine need not know of metrics."""

    def __init__(self) -> None:
        self.engine: Watched | None = None

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        engine = self.engine
        info = {} if engine is None else engine.cache_info()
        hits = CounterMetricFamily(PREFIX + "cache_hits", "Encodings that were cached.", labels=["cache"])
        misses = CounterMetricFamily(PREFIX + "cache_misses", "Encodings that were not.", labels=["cache"])
        size = GaugeMetricFamily(PREFIX + "cache_bytes", "Bytes of cached encodings.", labels=["cache"])
        for cache, one in info.items():
            hits.add_metric([cache], one.hits)
            misses.add_metric([cache], one.misses)
            size.add_metric([cache], one.nbytes)
        resident = GaugeMetricFamily(PREFIX + "adapters_resident", "Adapters on the device.")
        memory = GaugeMetricFamily(PREFIX + "adapter_memory_bytes", "Bytes that they take there.")
        if engine is not None:
            resident.add_metric([], len(engine.slots.residents))
            memory.add_metric([], engine.slots.memory)
        yield from (hits, misses, size, resident, memory)


class HttpMetrics:
    """ASGI middleware that counts and times answers by the template of their route.

    Args:
        app: what it wraps.
        metrics: where it counts.
    """

    def __init__(self, app: App, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500  # what the server answers when the app raises before it said anything
        began = time.perf_counter()

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, sending)
        finally:
            route = template(scope)
            self._metrics.http_requests.labels(route=route, method=verb(scope), status=status).inc()
            self._metrics.http_request_seconds.labels(route=route).observe(time.perf_counter() - began)
