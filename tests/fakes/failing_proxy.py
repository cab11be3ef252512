"""A proxy in front of a real server that refuses chosen requests; everything else goes through as it came."""

from __future__ import annotations

import http.client
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

Hook = Callable[[], None]
_HOP = {"connection", "keep-alive", "transfer-encoding", "te", "upgrade"}


class FailingProxy(ThreadingHTTPServer):
    """The proxy.

    Attributes:
        target: host and port of the server behind it.
        requests: method and path of each request, in order.
        headers: the headers of each, in the same order.
    """

    daemon_threads = True

    def __init__(self, target: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = urlsplit(target).netloc
        self.requests: list[str] = []
        self.headers: list[dict[str, str]] = []
        self._refused: re.Pattern[str] | None = None
        self._hook: tuple[re.Pattern[str], int, Hook] | None = None
        self._lock, self._under_way = threading.Condition(), 0

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def refuse(self, pattern: str | None) -> None:
        """Answer 403 to requests whose "METHOD /path" matches, from now on; None to no request."""
        self._refused = None if pattern is None else re.compile(pattern)

    def before(self, pattern: str, number: int, hook: Hook) -> None:
        """Call something before the n-th matching request, counted from 1, goes through."""
        self._hook = (re.compile(pattern), number, hook)

    def refuses(self, line: str, headers: dict[str, str]) -> bool:
        """Note a request, and tell whether it is refused."""
        with self._lock:
            self.requests.append(line)
            self.headers.append(headers)
            if self._hook is not None and self._hook[0].search(line):
                pattern, number, hook = self._hook
                self._hook = (pattern, number - 1, hook)
                if number == 1:
                    hook()
            return self._refused is not None and self._refused.search(line) is not None

    def settle(self) -> None:
        """Wait until all that has come has gone through, also what clients that are dead by now have sent."""
        with self._lock:
            assert self._lock.wait_for(lambda: self._under_way == 0, 300)

    def count(self, more: int) -> None:
        """Note that a request has come, or gone."""
        with self._lock:
            self._under_way += more
            self._lock.notify_all()

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that are killed hang up; that is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FailingProxy

    def _answer(self) -> None:
        self.server.count(1)
        try:
            self._pass_on()
        finally:
            self.server.count(-1)

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.refuses(f"{self.command} {self.path}", dict(self.headers.items())):
            self._send(
                403, [("Content-Type", "application/xml")], b"<Error><Code>AccessDenied</Code></Error>"
            )
            return
        connection = http.client.HTTPConnection(self.server.target, timeout=300)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in _HOP | {"expect"}:
                    connection.putheader(name, value)  # Host as well: it is signed
            connection.endheaders(body)
            answer = connection.getresponse()
            data = answer.read()
            headers = [one for one in answer.getheaders() if one[0].lower() not in _HOP]
            self._send(answer.status, headers, data)
        finally:
            connection.close()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_PATCH = _answer

    def _send(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() != "content-length" or self.command == "HEAD":
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@contextmanager
def in_front_of(target: str) -> Iterator[FailingProxy]:
    """Starts a proxy and stops it."""
    proxy = FailingProxy(target)
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join()
