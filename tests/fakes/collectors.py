"""A collector of traces that speaks OTLP over HTTP with protobuf bodies, as the real ones do."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """A span as it came over the wire; ids in hex, times in nanoseconds since the epoch."""

    name: str
    trace: str
    span: str
    parent: str
    began: int
    ended: int
    failed: bool
    attributes: dict[str, str | int]


@dataclass
class Collector:
    """What a collector received.

    Attributes:
        endpoint: where it listens.
        bodies: raw requests.
        resource: attributes of the last sender.
    """

    endpoint: str = ""
    bodies: list[bytes] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    resource: dict[str, str | int] = field(default_factory=dict)

    def spans(self, trace: str | None = None) -> dict[str, Seen]:
        """Return the spans by name, of one trace or of all."""
        found: dict[str, Seen] = {}
        for body in self.bodies:
            request = ExportTraceServiceRequest.FromString(body)
            for resource in request.resource_spans:
                self.resource = _attributes(resource.resource.attributes)
                for scope in resource.scope_spans:
                    for span in scope.spans:
                        if trace not in (None, span.trace_id.hex()):
                            continue
                        found[span.name] = Seen(
                            name=span.name,
                            trace=span.trace_id.hex(),
                            span=span.span_id.hex(),
                            parent=span.parent_span_id.hex(),
                            began=span.start_time_unix_nano,
                            ended=span.end_time_unix_nano,
                            failed=span.status.code == 2,
                            attributes=_attributes(span.attributes),
                        )
        return found


def _attributes(pairs: Any) -> dict[str, str | int]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}


@contextmanager
def collector() -> Iterator[Collector]:
    """Listen on a free port of this machine until the block ends."""
    made = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            zipped = self.headers.get("content-encoding") == "gzip"
            right = self.headers["content-type"] == "application/x-protobuf"
            made.paths.append(self.path)
            if right:
                made.bodies.append(gzip.decompress(body) if zipped else body)
            answer = ExportTraceServiceResponse().SerializeToString()
            self.send_response(200 if right else 415)
            self.send_header("content-type", "application/x-protobuf")
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield made
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
