"""What a request may be before anything of it is read: the outermost layer of the service, plain ASGI.

The order of the checks: length and characters of the path, headers, content type, the length that is
promised, the bytes that come, and the time that they take. What a client promises is never believed: bytes
are counted as they arrive. The bodies of all requests together are bounded too, so that many clients cannot
do what one may not, and those of one key, so that it leaves room for the others. `serving.http.reading` then
parses what came.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

from serving.http.answers import HttpError, NoSuchThing, RateLimited, TooLarge, WrongMedia, error_answer
from serving.settings import ServingSettings

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

MAX_PATH: Final = 2048
MAX_HEADERS: Final = 64
MAX_HEADER_BYTES: Final = 16 << 10
BODIES_AT_ONCE: Final = 8
"""So many bodies of the largest size may be held at the same moment, each until its request is answered."""
BODIES_OF_ONE: Final = BODIES_AT_ONCE // 2
"""So many of them may be of one key; whoever asks without a key is one, too."""
LINGER_SECONDS: Final = 5.0
"""For so long the rest of a refused body is read and thrown away, so that the client gets to read why."""
_PATH: Final = re.compile(r"/[A-Za-z0-9._~@:+,=!$&'()*;/-]*")
_ONCE: Final = frozenset(
    b"host content-length content-type transfer-encoding content-encoding authorization x-api-key".split()
    + b"expect origin idempotency-key".split()
)
_MEDIA: Final = ("application/json", "multipart/form-data")


class BadRequest(HttpError):
    """The request contradicts itself."""

    status = 400


class TooSlow(HttpError):
    """The body did not arrive in time."""

    status = 408


class AddressTooLong(HttpError):
    """The path or the query is over a limit."""

    status = 414


class HeadersTooLarge(HttpError):
    """There are too many headers, or too long ones."""

    status = 431


class Limits:
    """Holds every request to the limits; wraps the whole application.

    Args:
        app: the application.
        settings: of serving: bytes of a request, and the seconds in which it has to arrive.
    """

    def __init__(self, app: App, settings: ServingSettings) -> None:
        self._app, self._settings = app, settings
        self._held: Counter[str] = Counter()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(self, scope, receive, send)
        try:
            check_head(scope, self._settings.max_body)
            await self._app(scope, exchange.receive, exchange.send)
        except HttpError as error:
            if exchange.answered:
                raise
            await error_answer(error)(scope, receive, exchange.send)
        finally:
            self._held[exchange.caller] -= exchange.held
            self._held += Counter()  # callers without anything are forgotten

    def hold(self, caller: str, size: int) -> None:
        """Count bytes that came; they are given back when their request is answered.

        Args:
            caller: the name of the key that sent them; "" is nobody's.
            size: how many.

        Raises:
            RateLimited: the requests of the caller, or all together, hold too much.
        """
        if self._held[caller] + size > BODIES_OF_ONE * self._settings.max_body:
            raise RateLimited("the requests of this caller hold too much", "wait for one of them", 1.0)
        if self._held.total() + size > BODIES_AT_ONCE * self._settings.max_body:
            raise RateLimited("the service receives too much at the moment", "try again in a moment", 1.0)
        self._held[caller] += size

    @property
    def max_body(self) -> int:
        """Bytes of a body."""
        return self._settings.max_body

    @property
    def seconds(self) -> float:
        """In which a request has to arrive."""
        return self._settings.request_seconds


class _Exchange:
    """One request and its answer.

    Attributes:
        held: bytes of the body that came so far.
        caller: name of the key that asks, which the gate has left before a byte was read; "" without.
        answered: whether the answer has begun.
    """

    def __init__(self, limits: Limits, scope: Message, receive: Receive, send: Send) -> None:
        self._limits, self._scope, self._receive, self._send = limits, scope, receive, send
        self._deadline = time.monotonic() + limits.seconds
        headers = dict(scope["headers"])
        self._whole = headers.get(b"content-length", b"0") == b"0" and b"transfer-encoding" not in headers
        self._asks_first = b"expect" in headers
        self.held = 0
        self.caller = ""
        self.answered = False

    async def receive(self) -> Message:
        """Return what comes next of the body, or that the client is gone.

        Raises:
            TooLarge: more came than a request may have.
            TooSlow: it did not come in time.
            RateLimited: see `Limits.hold`.
        """
        if self._whole:
            return await self._receive()
        try:
            async with asyncio.timeout(max(0.0, self._deadline - time.monotonic())):
                message = await self._receive()
        except TimeoutError:
            raise TooSlow(
                f"the request did not arrive within {self._limits.seconds:g} seconds", "send it faster"
            ) from None
        if message["type"] == "http.request":
            size = len(message.get("body", b""))
            if self.held + size > self._limits.max_body:
                raise _too_large(self._limits.max_body)
            if not self.held:
                self.caller = self._scope.get("state", {}).get("caller", "")
            self._limits.hold(self.caller, size)
            self.held += size
            self._whole = not message.get("more_body", False)
        else:
            self._whole = True
        return message

    async def send(self, message: Message) -> None:
        """Pass the answer on, with the headers that checks have left for it."""
        if message["type"] == "http.response.start":
            self.answered = True
            if not self._whole:
                await self._linger()
            extra = list(self._scope.get("state", {}).get("answer_headers", ()))
            if not self._whole:
                extra.append((b"connection", b"close"))
            message = {**message, "headers": [*message.get("headers", ()), *extra]}
        await self._send(message)

    async def _linger(self) -> None:
        """Throw away what still comes, for a while: a socket closed on unread bytes loses the answer."""
        if self._asks_first:
            return
        left = self._limits.max_body
        seconds = min(LINGER_SECONDS, max(0.0, self._deadline - time.monotonic()))
        try:
            async with asyncio.timeout(seconds):
                while left > 0:
                    message = await self._receive()
                    left -= len(message.get("body", b""))
                    if not message.get("more_body", False):
                        self._whole = True
                        return
        except TimeoutError:
            return


def check_head(scope: Message, max_body: int) -> None:
    """Refuse a request by its first lines.

    Raises:
        HttpError: the path, a header or the promised body is over a limit, or they contradict each other.
    """
    raw = scope.get("raw_path") or scope["path"].encode()
    if len(raw) > MAX_PATH or len(scope.get("query_string", b"")) > MAX_PATH:
        raise AddressTooLong("the address is too long", f"paths and queries have at most {MAX_PATH} bytes")
    path = scope["path"]
    if not _PATH.fullmatch(path) or any(part in (".", "..") for part in path.split("/")):
        raise NoSuchThing("there is nothing at this address", "see /openapi.json for what there is")
    headers = scope["headers"]
    if (
        len(headers) > MAX_HEADERS
        or sum(len(name) + len(value) for name, value in headers) > MAX_HEADER_BYTES
    ):
        raise HeadersTooLarge(
            "the headers are too large", f"at most {MAX_HEADERS} with {MAX_HEADER_BYTES} bytes are read"
        )
    counts = Counter(name for name, _ in headers)
    if any(counts[name] > 1 for name in _ONCE) or (
        counts[b"content-length"] and counts[b"transfer-encoding"]
    ):
        raise BadRequest("headers contradict each other", "send each of them once, and one kind of length")
    _check_body(dict(headers), max_body)


def _check_body(headers: dict[bytes, bytes], max_body: int) -> None:
    length = headers.get(b"content-length", b"0")
    if not length.isdigit() or int(length[:20]) > max_body:
        raise _too_large(max_body)
    if headers.get(b"content-encoding", b"identity").lower() != b"identity":
        raise WrongMedia("compressed bodies are not read", "send the body as it is")
    media = headers.get(b"content-type", b"").partition(b";")[0].strip().lower().decode("latin-1")
    if (int(length) or b"transfer-encoding" in headers) and media not in _MEDIA:
        raise WrongMedia("the body is of a content type that is not read", "send " + " or ".join(_MEDIA))


def _too_large(max_body: int) -> TooLarge:
    return TooLarge(f"the request is larger than {max_body} bytes", "send a smaller picture")
