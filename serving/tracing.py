"""Where the time of a request goes, as OpenTelemetry spans: HTTP request, queue, encode, steps, decode.

Spans are sent over OTLP/HTTP to the endpoint of the settings; without one, nothing here does anything, and
the ``telemetry`` extra is not needed. A caller's ``traceparent`` (W3C Trace Context) is continued, and
`Trace.headers` continues ours in what we call. Spans say which adapter and how many rows and steps; what they
may say is a fixed list, so pictures, prompts and keys cannot get in.
"""

from __future__ import annotations

import importlib.metadata
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, TypedDict, Unpack
from urllib.parse import urlsplit

from registry.errors import shown
from serving.asgi import template, verb
from serving.errors import UsageError

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, Tracer

    from registry.digest import Digest
    from serving.asgi import App, Message, Receive, Send

SERVICE = "adapter-foundry-serving"
_PATH = "/v1/traces"
_SEND_SECONDS = 5.0
"""A collector that is away may cost the end of the process this much, and nothing before."""

_ATTRIBUTES = {
    "adapter": "foundry.adapter.name",
    "version": "foundry.adapter.version",
    "digest": "foundry.adapter.digest",
    "rows": "foundry.rows",
    "steps": "foundry.steps",
    "outcome": "foundry.outcome",
}


class Facts(TypedDict, total=False):
    """What a span may say: the adapter as it was verified, rows and steps, and one word on how it ended."""

    adapter: str
    version: int
    digest: Digest
    rows: int
    steps: int
    outcome: str


class Trace:
    """The place of a request in its trace, also for other threads. Without tracing it does nothing."""

    __slots__ = ("_context", "_epoch", "_tracer")

    def __init__(self, tracer: Tracer | None = None, context: Context | None = None) -> None:
        self._tracer = tracer
        self._context = context
        # One for all spans of the request: read again for each, they would overlap or leave gaps.
        self._epoch = _epoch() if tracer is not None else 0

    @property
    def trace_id(self) -> str | None:
        """32 hex digits; None without tracing."""
        if self._tracer is None:
            return None
        from opentelemetry.trace import format_trace_id, get_current_span

        span = get_current_span(self._context).get_span_context()
        return format_trace_id(span.trace_id) if span.is_valid else None

    def headers(self) -> dict[str, str]:
        """Return the W3C headers that continue the trace in another service; empty without tracing."""
        found: dict[str, str] = {}
        if self._tracer is not None:
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

            TraceContextTextMapPropagator().inject(found, context=self._context)
        return found

    @contextmanager
    def span(self, name: str, **facts: Unpack[Facts]) -> Iterator[None]:
        """Time a piece of work under the request; an exception marks it as failed and says only its class."""
        began = time.monotonic()
        try:
            yield
        except BaseException as error:
            self._record(name, began, time.monotonic(), facts, type(error))
            raise
        self._record(name, began, time.monotonic(), facts)

    def record(self, name: str, began: float, ended: float, **facts: Unpack[Facts]) -> None:
        """Add a piece of work that was timed elsewhere.

        Args:
            name: ``queue``, ``encode``, ``steps``, ``decode``.
            began: by `time.monotonic`, in seconds.
            ended: likewise.
            facts: see `Facts`.
        """
        self._record(name, began, ended, facts)

    def _record(
        self, name: str, began: float, ended: float, facts: Facts, error: type[BaseException] | None = None
    ) -> None:
        if self._tracer is None:
            return
        said = {_ATTRIBUTES[key]: _plain(value) for key, value in facts.items()}
        span = self._tracer.start_span(
            name, context=self._context, attributes=said, start_time=self._epoch + int(began * 1e9)
        )
        if error is not None:
            _failed(span, error.__name__)
        span.end(self._epoch + int(ended * 1e9))


def _epoch() -> int:
    """Return the wall clock's time at 0 of the monotonic one, in nanoseconds.

    It is the closest of a few readings: a thread may be held up between the two clocks.
    """
    readings = []
    for _ in range(3):
        before, wall, after = time.monotonic_ns(), time.time_ns(), time.monotonic_ns()
        readings.append((after - before, wall - before))
    return min(readings)[1]


_NOWHERE = Trace()
_HERE: ContextVar[Trace] = ContextVar("trace", default=_NOWHERE)


def here() -> Trace:
    """Return the place of the request that is being answered; take it along to other threads."""
    return _HERE.get()


class Tracing:
    """Sends spans, or nothing at all.

    Args:
        endpoint: ``http(s)://host:port``; the path ``/v1/traces`` is added where there is none. None sends
            nothing.

    Raises:
        UsageError: the endpoint is no such address, or the ``telemetry`` extra is not installed.
    """

    def __init__(self, endpoint: str | None) -> None:
        self._provider: TracerProvider | None = None if endpoint is None else _provider(_address(endpoint))
        self._tracer = None if self._provider is None else self._provider.get_tracer(SERVICE)

    def close(self) -> None:
        """Send what is left, for at most a few seconds."""
        if self._provider is not None:
            # The exporter tries each of its batches again for as long; a server that goes down does not wait.
            last = threading.Thread(target=self._provider.shutdown, daemon=True)
            last.start()
            last.join(_SEND_SECONDS)

    @contextmanager
    def resumed(self, headers: Mapping[str, str]) -> Iterator[None]:
        """Be at the place that `Trace.headers` of another process named."""
        if self._tracer is None:
            yield
            return
        token = _HERE.set(Trace(self._tracer, _extracted(headers)))
        try:
            yield
        finally:
            _HERE.reset(token)

    @contextmanager
    def serving(self, method: str, headers: Mapping[str, str]) -> Iterator[Span | None]:
        """Be in the span of an HTTP request; it ends with the block."""
        if self._tracer is None:
            yield None
            return
        from opentelemetry.trace import SpanKind, set_span_in_context

        context = _extracted(headers)
        span = self._tracer.start_span(method, context=context, kind=SpanKind.SERVER)
        token = _HERE.set(Trace(self._tracer, set_span_in_context(span, context)))
        try:
            yield span
        except BaseException as error:
            _failed(span, type(error).__name__)
            raise
        finally:
            _HERE.reset(token)
            span.end()


class HttpTraces:
    """ASGI middleware: a span for each request, under the caller's trace where it names one.

    The answer carries ``traceresponse``, by which a caller finds the trace. Of the address only the template
    of the route is recorded, and nothing of the caller.

    Args:
        app: what it wraps.
        tracing: where spans go.
    """

    def __init__(self, app: App, tracing: Tracing) -> None:
        self._app = app
        self._tracing = tracing

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1")
            for name, value in scope["headers"]
            if name.lower() in (b"traceparent", b"tracestate")
        }
        method = verb(scope)
        with self._tracing.serving(method, headers) as span:
            if span is None:
                await self._app(scope, receive, send)
                return
            traceparent = here().headers().get("traceparent", "")

            async def sending(message: Message) -> None:
                if message["type"] == "http.response.start":
                    message["headers"] = [
                        *message.get("headers", ()),
                        (b"traceresponse", traceparent.encode("ascii")),
                    ]
                    span.set_attribute("http.response.status_code", message["status"])
                    if message["status"] >= 500:
                        _failed(span, str(message["status"]))
                await send(message)

            try:
                await self._app(scope, receive, sending)
            finally:
                route = template(scope)
                span.update_name(f"{method} {route}")
                span.set_attributes({"http.request.method": method, "http.route": route})


def _plain(value: object) -> str | int:
    return value if isinstance(value, int) else str(value)


def _failed(span: Span, kind: str) -> None:
    """Mark a span as failed. Messages of errors may quote what a caller sent, so only their class is said."""
    from opentelemetry.trace import Status, StatusCode

    span.set_status(Status(StatusCode.ERROR))
    span.set_attribute("error.type", kind)


def _extracted(headers: Mapping[str, str]) -> Context:
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract(dict(headers), context=Context())


def _address(endpoint: str) -> str:
    try:
        parts = urlsplit(endpoint)
        parts.port  # noqa: B018 - raises where it is no number
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(
            f"{shown(endpoint)} is no address that traces can be sent to",
            "set otlp_endpoint to the OTLP/HTTP port of a collector, for example http://127.0.0.1:4318",
        )
    return endpoint if parts.path.strip("/") else endpoint.rstrip("/") + _PATH


def _provider(address: str) -> TracerProvider:
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise UsageError(
            "otlp_endpoint is set, and OpenTelemetry is not installed",
            "install adapter-foundry[telemetry], or remove the setting",
        ) from error
    version = importlib.metadata.version("adapter-foundry")
    provider = TracerProvider(
        resource=Resource.create({"service.name": SERVICE, "service.version": version}),
        shutdown_on_exit=False,
    )
    exporter = OTLPSpanExporter(endpoint=address, timeout=_SEND_SECONDS)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider
