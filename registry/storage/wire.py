"""HTTP to a server that may be slow, broken or hostile: every wait and every byte has a bound.

A request ends at its deadline, however the server drips its headers or its body; no more of an answer is read
than was asked for; nothing is ever redirected. What may work a moment later is tried again with growing
pauses, and ends as a `NetworkError`. The vendors' clients bound none of this: they read the body of an error
to its end, and a timeout of a socket starts again with each byte.
"""

from __future__ import annotations

import http.client
import io
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection

from registry.errors import NetworkError, RegistryError, UsageError, shown

_RETRIED: Final = frozenset({408, 429, 500, 502, 503, 504})
_PIECE_BYTES = 1 << 18
_CONNECTIONS = 16
_ERROR_BYTES = 1 << 14


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """How long a server may take.

    Attributes:
        answer: seconds until a connection stands, and again until an answer begins.
        rate: bytes a second below which a transfer is given up.
        attempts: how often a request is sent.
        pause: seconds before the second attempt; each later pause may be twice as long.
        longest_pause: seconds; also the longest ``Retry-After`` that is waited for.
    """

    answer: float = 30.0
    rate: float = 128 * 1024
    attempts: int = 5
    pause: float = 0.2
    longest_pause: float = 20.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """A server's answer.

    Attributes:
        status: the HTTP status.
        headers: by lower-case name.
        body: no more bytes than were asked for.
        repeated: an earlier attempt failed after it may have been carried out.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes = field(repr=False)
    repeated: bool = False


class Wire:
    """Sends requests to one server over connections that are kept; used from several threads.

    Args:
        endpoint: ``http://`` or ``https://``, a host and perhaps a port.
        patience: how long to wait.

    Raises:
        UsageError: the endpoint is not such a URL.
    """

    def __init__(self, endpoint: str, patience: Patience | None = None) -> None:
        parts = urlsplit(endpoint)
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1 or parts.username:
            raise UsageError(
                f"{shown(endpoint)!r} is not the address of a server",
                mend="write it like https://s3.example.org or http://127.0.0.1:8333 in AWS_ENDPOINT_URL_S3",
            )
        self.secure = parts.scheme == "https"
        self.host = parts.netloc
        self.path = parts.path.rstrip("/")
        self.url = f"{parts.scheme}://{parts.netloc}"
        self._patience = patience or Patience()
        self._pool: urllib3.PoolManager | None = None
        self._lock = threading.Lock()

    def call(
        self,
        method: str,
        target: str,
        headers: Callable[[], Mapping[str, str]],
        body: bytes,
        limit: int,
        accepted: frozenset[int],
        retried: frozenset[int] = frozenset(),
    ) -> Reply:
        """Sends a request, again if need be, and returns the answer.

        Args:
            method: the HTTP method.
            target: path and query, encoded.
            headers: gives the headers of an attempt, which may depend on the time.
            body: what to send.
            limit: bytes of an accepted answer's body that are read; what comes after them is left unread. Of
                other answers only the beginning is read, which says what is wrong.
            accepted: statuses that the caller understands.
            retried: statuses after which to try again, beside those that always mean it.

        Returns:
            The answer, with an accepted status or one that will not change.

        Raises:
            NetworkError: no accepted answer came in time.
            RegistryError: the server's certificate is not valid.
        """
        problem, repeated, asked = "", False, 0.0
        for attempt in range(self._patience.attempts):
            if attempt:
                time.sleep(max(self._pause(attempt - 1), asked))
            try:
                reply = self._once(method, target, headers(), body, limit, accepted)
            except (OSError, urllib3.exceptions.HTTPError, http.client.HTTPException, ValueError) as error:
                # ValueError: http.client meets the length of a chunk that is no number.
                problem, repeated, asked = _reason(error), True, 0.0
                if "CERTIFICATE_VERIFY_FAILED" in problem:
                    raise RegistryError(
                        f"{self.url} cannot prove who it is: {problem}",
                        mend="somebody may stand between; if its certificate is your own, set AWS_CA_BUNDLE",
                    ) from error
                continue
            if reply.status in accepted or reply.status not in _RETRIED | retried:
                return Reply(status=reply.status, headers=reply.headers, body=reply.body, repeated=repeated)
            problem = f"it answers {reply.status}"
            repeated = repeated or reply.status >= 500
            asked = _retry_after(reply.headers)
            if asked > self._patience.longest_pause:
                problem += f" and asks to come back in {asked:.0f} s"
                break
        raise NetworkError(
            f"{self.url} failed: {problem}",
            mend="try again later; what was transferred is kept. If it goes on, look at the server's log",
        )

    def _pause(self, attempt: int) -> float:
        longest = min(self._patience.longest_pause, self._patience.pause * float(1 << attempt))
        return longest * random.uniform(0.5, 1.0)

    def _once(
        self,
        method: str,
        target: str,
        headers: Mapping[str, str],
        body: bytes,
        limit: int,
        accepted: frozenset[int],
    ) -> Reply:
        pool, patience = self._pool_manager(), self._patience
        _until.moment = time.monotonic() + patience.answer + len(body) / patience.rate
        response = pool.urlopen(
            method,
            self.url + target,
            body=body or None,
            headers=headers,
            retries=False,
            redirect=False,
            preload_content=False,
            decode_content=False,
            timeout=urllib3.Timeout(patience.answer),
        )
        try:
            wanted = limit if response.status in accepted else _ERROR_BYTES
            _until.moment = time.monotonic() + patience.answer + wanted / patience.rate
            data = _read(response, wanted)
            found = {name.lower(): value for name, value in response.headers.items()}
            return Reply(status=response.status, headers=found, body=data)
        finally:
            if not response.closed:
                response.close()
            response.release_conn()

    def _pool_manager(self) -> urllib3.PoolManager:
        with self._lock:
            if self._pool is None:
                settings: dict[str, Any] = {"maxsize": _CONNECTIONS, "ssl_context": self._tls()}
                scheme = "https" if self.secure else "http"
                proxy = None if proxy_bypass(self.host) else getproxies().get(scheme)
                try:
                    made = (
                        urllib3.ProxyManager(proxy, **settings) if proxy else urllib3.PoolManager(**settings)
                    )
                except urllib3.exceptions.HTTPError as error:
                    raise UsageError(
                        f"the proxy of {scheme.upper()}_PROXY cannot be used: {shown(error)}",
                        mend="write it like http://proxy.example.org:3128",
                    ) from error
                made.pool_classes_by_scheme = {"http": _PlainPool, "https": _SecurePool}
                self._pool = made
            return self._pool

    def _tls(self) -> Any:
        if not self.secure:
            return None
        import ssl

        bundle = os.environ.get("AWS_CA_BUNDLE") or None
        try:
            return ssl.create_default_context(cafile=bundle)
        except OSError as error:
            raise UsageError(
                f"the certificates {bundle} cannot be read: {error}", mend="correct AWS_CA_BUNDLE"
            ) from error


class _Until(threading.local):
    """When the request of this thread has to be over, by the monotonic clock."""

    moment = 0.0


_until = _Until()


class _PlainConnection(HTTPConnection):
    def connect(self) -> None:
        super().connect()
        self.sock: Any = _Socket(self.sock)


class _SecureConnection(HTTPSConnection):
    def connect(self) -> None:
        super().connect()
        self.sock: Any = _Socket(self.sock)


class _PlainPool(urllib3.HTTPConnectionPool):
    ConnectionCls = _PlainConnection


class _SecurePool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _SecureConnection


class _Socket:
    """What urllib3 uses of a socket, with every wait ending when the request has to be over.

    It is closed when the last reader is.
    """

    def __init__(self, inner: socket.socket) -> None:
        self._inner = inner
        self._readers, self._closed = 0, False

    def sendall(self, data: Any) -> None:
        with memoryview(data) as view:
            sent = 0
            while sent < len(view):
                self._bound()
                sent += self._inner.send(view[sent : sent + _PIECE_BYTES])

    def receive(self, buffer: Any) -> int:
        self._bound()
        return self._inner.recv_into(buffer)

    def makefile(self, mode: str) -> io.BufferedReader:
        self._readers += 1
        return io.BufferedReader(_Reader(self), _PIECE_BYTES)

    def fileno(self) -> int:
        return self._inner.fileno()

    def settimeout(self, seconds: float | None) -> None:
        """A timeout of each wait says nothing about their sum; `_bound` does."""

    def reader_closed(self) -> None:
        self._readers -= 1
        if self._closed and not self._readers:
            self._inner.close()

    def close(self) -> None:
        self._closed = True
        if not self._readers:
            self._inner.close()

    def _bound(self) -> None:
        left = _until.moment - time.monotonic()
        if left <= 0:
            raise TimeoutError("it is too slow")
        self._inner.settimeout(left)


class _Reader(io.RawIOBase):
    def __init__(self, source: _Socket) -> None:
        self._source = source

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._source.receive(buffer)

    def close(self) -> None:
        if not self.closed:
            super().close()
            self._source.reader_closed()


def _read(response: urllib3.BaseHTTPResponse, limit: int) -> bytes:
    """The body, or the first `limit` bytes of it; urllib3 notices a body that is shorter than promised."""
    data, got = io.BytesIO(), 0
    while got < limit and (piece := response.read1(min(limit - got, _PIECE_BYTES))):
        got += data.write(piece)
    if got > limit:
        raise ConnectionError("the answer's lengths contradict each other")
    if response.length_remaining == 0:
        response.read1(1)  # sees that this was all, so that the connection can be used again
    return data.getvalue()


def _reason(error: BaseException) -> str:
    """What went wrong at the bottom; the layers above repeat it with addresses of Python objects."""
    while error.__cause__ is not None:
        error = error.__cause__
    return shown(str(error) or type(error).__name__)


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that the server asks to wait; 0 if it does not say, or says it as a date."""
    try:
        return max(float(headers.get("retry-after", "0")), 0.0)
    except ValueError:
        return 0.0
