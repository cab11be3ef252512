"""An S3 server that misbehaves on demand: a slow one, a broken one, or one in the hands of an attacker.

It keeps objects in memory and speaks as much S3 as the registry uses. A fault takes the place of an honest
answer; it is given a handler and writes to its socket what it likes.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit

Fault = Callable[["Handler"], None]


class HostileS3(ThreadingHTTPServer):
    """The server.

    Attributes:
        objects: bytes by path, ``bucket/key``.
        requests: method and target of each request, in order.
        connections: how often a client has connected.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects: dict[str, bytes] = {}
        self.uploads: dict[str, dict[int, bytes]] = {}
        self.requests: list[tuple[str, str]] = []
        self.connections = 0
        self.stopped = threading.Event()
        self.lock = threading.Lock()
        self._faults: list[tuple[Fault, int, str]] = []

    @property
    def endpoint(self) -> str:
        """The server's URL."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def misbehave(self, fault: Fault, times: int = 1 << 30, method: str = "") -> None:
        """Answers the next requests (of a method) with a fault."""
        with self.lock:
            self._faults.append((fault, times, method))

    def next_fault(self, method: str) -> Fault | None:
        with self.lock:
            for at, (fault, times, only) in enumerate(self._faults):
                if only in ("", method) and times > 0:
                    self._faults[at] = (fault, times - 1, only)
                    return fault
        return None

    def process_request(self, request: object, client_address: object) -> None:
        """Counts connections."""
        self.connections += 1
        super().process_request(request, client_address)  # type: ignore[arg-type]

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients hang up on this server; that is no news."""


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: HostileS3

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.server.requests.append((self.command, self.path))
        fault = self.server.next_fault(self.command)
        if fault is not None and getattr(fault, "unread", False):
            fault(self)
            return
        self.body = self.rfile.read(length)
        if fault is not None:
            fault(self)
        else:
            honest(self)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _answer

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def send(self, status: int, body: bytes = b"", **headers: str) -> None:
        """A complete answer."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    @property
    def parts(self) -> tuple[str, dict[str, str]]:
        """Path without its first slash, and the query."""
        found = urlsplit(self.path)
        query = parse_qs(found.query, keep_blank_values=True)
        return unquote(found.path)[1:], {name: values[0] for name, values in query.items()}


def honest(handler: Handler) -> None:
    """What an honest server answers."""
    path, query = handler.parts
    objects, lock = handler.server.objects, handler.server.lock
    if handler.command in ("GET", "HEAD"):
        if "list-type" in query:
            prefix = query.get("prefix", "")
            bucket = path.partition("/")[0]
            keys = sorted(key.partition("/")[2] for key in objects if key.startswith(f"{bucket}/"))
            return handler.send(200, listing([key for key in keys if key.startswith(prefix)]))
        if "uploads" in query:
            return handler.send(200, b"<R><IsTruncated>false</IsTruncated></R>")
        if path not in objects:
            return handler.send(404, b"<Error><Code>NoSuchKey</Code></Error>")
        data = objects[path]
        tag = f'"{hashlib.md5(data).hexdigest()}"'
        if handler.command == "HEAD":
            return handler.send(200, Content_Length=str(len(data)), ETag=tag)
        return send_range(handler, data)
    with lock:
        if handler.command == "POST" and "uploads" in query:
            identity = f"upload-{len(handler.server.uploads)}"
            handler.server.uploads[identity] = {}
            return handler.send(200, f"<R><UploadId>{identity}</UploadId></R>".encode())
        if "uploadId" in query:
            return multipart(handler, path, query)
        if handler.command == "DELETE":
            objects.pop(path, None)
            return handler.send(204)
        if handler.headers.get("If-None-Match") == "*" and path in objects:
            return handler.send(412)
        objects[path] = handler.body
    return handler.send(200, ETag=f'"{hashlib.md5(handler.body).hexdigest()}"')


def multipart(handler: Handler, path: str, query: dict[str, str]) -> None:
    """The parts of an upload."""
    parts = handler.server.uploads.get(query["uploadId"])
    if parts is None:
        return handler.send(404, b"<Error><Code>NoSuchUpload</Code></Error>")
    if handler.command == "PUT":
        parts[int(query["partNumber"])] = handler.body
        return handler.send(200, ETag=f'"{hashlib.md5(handler.body).hexdigest()}"')
    if handler.command == "POST":
        if path in handler.server.objects:
            return handler.send(412)
        told = dict(re.findall(rb"<PartNumber>(\d+)</PartNumber><ETag>([^<]*)</ETag>", handler.body))
        for number, tag in told.items():
            if hashlib.md5(parts.get(int(number), b"")).hexdigest() != tag.decode():
                return handler.send(400, b"<Error><Code>InvalidPart</Code></Error>")
        handler.server.objects[path] = b"".join(parts[int(number)] for number in told)
        return handler.send(200, b"<R><ETag>x</ETag></R>")
    handler.server.uploads.pop(query["uploadId"])
    return handler.send(204)


def send_range(handler: Handler, data: bytes) -> None:
    """The range that was asked for."""
    asked = re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers.get("Range", ""))
    assert asked is not None, "the registry always asks for a range"
    start, stop = int(asked[1]), min(int(asked[2]) + 1, len(data))
    if start >= len(data):
        return handler.send(416)
    return handler.send(206, data[start:stop], Content_Range=f"bytes {start}-{stop - 1}/{len(data)}")


def listing(keys: list[str], token: str = "") -> bytes:
    """A page of a list."""
    items = "".join(f"<Contents><Key>{quote(key)}</Key></Contents>" for key in keys)
    more = f"<NextContinuationToken>{token}</NextContinuationToken>" if token else ""
    return f"<R><IsTruncated>{'true' if token else 'false'}</IsTruncated>{more}{items}</R>".encode()


# -- faults --


def status(code: int, body: bytes = b"", **headers: str) -> Fault:
    """Answers with a status."""
    return lambda handler: handler.send(code, body, **headers)


def half(handler: Handler) -> None:
    """Promises twice what it sends, and hangs up."""
    data = b"x" * 1000
    handler.send(206, data, Content_Length="2000", Content_Range="bytes 0-1999/2000")
    handler.close_connection = True


def altered(change: Callable[[bytes], bytes]) -> Fault:
    """Serves ranges of other bytes than it keeps."""

    def fault(handler: Handler) -> None:
        send_range(handler, change(handler.server.objects[handler.parts[0]]))

    return fault


def endless(handler: Handler) -> None:
    """A body without an end."""
    handler.send_response(206)
    handler.send_header("Content-Range", "bytes 0-1/2")
    handler.send_header("Connection", "close")
    handler.end_headers()
    with contextlib.suppress(OSError):
        while not handler.server.stopped.is_set():
            handler.wfile.write(b"y" * 65536)


def endless_error(handler: Handler) -> None:
    """A refusal without an end."""
    handler.send_response(403)
    handler.send_header("Connection", "close")
    handler.end_headers()
    with contextlib.suppress(OSError):
        while not handler.server.stopped.is_set():
            handler.wfile.write(b"y" * 65536)


def endless_headers(handler: Handler) -> None:
    """Headers without an end."""
    with contextlib.suppress(OSError):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
        while not handler.server.stopped.is_set():
            handler.wfile.write(b"X-Y: z\r\n" * 100)


def endless_continue(handler: Handler) -> None:
    """One `100 Continue` after the other."""
    with contextlib.suppress(OSError):
        while not handler.server.stopped.is_set():
            handler.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            time.sleep(0.01)


def _drip(handler: Handler, data: bytes) -> None:
    with contextlib.suppress(OSError):
        for at in range(len(data)):
            if handler.server.stopped.wait(0.2):
                return
            handler.wfile.write(data[at : at + 1])


def dripping_body(handler: Handler) -> None:
    """A few bytes a second, each in time for a timeout that starts again with every byte."""
    handler.send_response(206)
    handler.send_header("Content-Range", "bytes 0-999/1000")
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    _drip(handler, b"z" * 1000)


def dripping_headers(handler: Handler) -> None:
    """The same with headers."""
    _drip(handler, b"HTTP/1.1 200 OK\r\nX-Long: " + b"z" * 1000)


def hang(handler: Handler) -> None:
    """Never answers."""
    handler.server.stopped.wait(60)


def deaf(handler: Handler) -> None:
    """Never even reads what is sent."""
    handler.server.stopped.wait(60)


deaf.unread = True  # type: ignore[attr-defined]


def reset(handler: Handler) -> None:
    """Cuts the connection."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    handler.close_connection = True


def done_and_reset(handler: Handler) -> None:
    """Does what is asked, and cuts the connection before it says so."""
    wire, handler.wfile = handler.wfile, open("/dev/null", "wb")  # noqa: SIM115
    try:
        honest(handler)
    finally:
        handler.wfile.close()
        handler.wfile = wire
    reset(handler)


def garbage(handler: Handler) -> None:
    """No HTTP at all."""
    handler.wfile.write(b"\x00\xff\x1b[2J" * 50 + b"\r\n\r\n")
    handler.close_connection = True


@contextlib.contextmanager
def running() -> Iterator[HostileS3]:
    """Runs a server, honest at first."""
    server = HostileS3()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stopped.set()
        server.shutdown()
        thread.join()
        server.socket.close()
