"""How the SDKs of the vendors speak HTTP: nowhere else than to the server, and not without end.

The SDKs follow redirections, Gemini's with the key in a header of its own, which goes along to any host; they
read an answer into memory however long it is, or however long it becomes when it is unpacked; and they
believe a gateway that sends a failure as a success.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any

from trainer.apis.request import Billed, Failed, Usage

MAX_ANSWER = 96 << 20
"""Bytes; a picture of `serving.images.MAX_IMAGE_BYTES` in base64 and as much around it."""

HEADERS: Mapping[str, str] = {"Accept-Encoding": "identity"}
"""Of each request: an answer that comes packed is none that was asked for."""

_LONGEST_ERROR = 64 << 10  # bytes; what is longer is an answer, and not read twice
_ANSWERS = ("choices", "data", "candidates", "promptFeedback")
_answered: ContextVar[bool] = ContextVar("answered", default=False)


def arguments() -> dict[str, Any]:
    """Return what an ``httpx.Client`` (or one of httpx2) is made with."""
    return {"follow_redirects": False, "event_hooks": {"response": [bound, unmask]}}


def begin() -> None:
    """Forget the answer before: until another one comes, no error is an answer's."""
    _answered.set(False)


def bound(response: Any) -> None:
    """Let nobody read more of a response than `MAX_ANSWER`.

    Raises:
        Failed: it is packed; later, it is too long.
    """
    _answered.set(True)
    if response.headers.get("content-encoding", "identity") != "identity":
        raise unreadable("the answer is packed, which was not asked for")
    # httpx looks whether a stream is one of its own kind, and httpx2 is a module of its own.
    kind = sys.modules[type(response).__module__.partition(".")[0]].SyncByteStream
    response.stream = _bounded(kind)(response.stream)


def unmask(response: Any) -> None:
    """Give a failure that comes as a success the status that it names, 502 if it names none.

    Gateways say ``{"error": {"code": 429}}`` with status 200 when the server behind them is busy or down.
    """
    if response.status_code != 200:
        return
    body = response.read()
    try:
        value = json.loads(body) if len(body) <= _LONGEST_ERROR else None
    except (ValueError, RecursionError):
        return
    if not isinstance(value, dict) or any(value.get(name) for name in _ANSWERS):
        return
    if error := value.get("error"):
        code = str(error.get("code") if isinstance(error, dict) else "")
        named = len(code) == 3 and code.isascii() and code.isdigit() and code[0] in "45"
        response.status_code = int(code) if named else 502


def _bounded(kind: type) -> type:
    class Bounded(kind):  # type: ignore[misc]
        """A stream that ends with an error where it becomes too long."""

        def __init__(self, stream: Any) -> None:
            self._stream = stream

        def __iter__(self) -> Iterator[bytes]:
            count = 0
            for chunk in self._stream:
                count += len(chunk)
                if count > MAX_ANSWER:
                    raise unreadable(f"the answer is longer than {MAX_ANSWER} bytes")
                yield chunk

        def close(self) -> None:
            self._stream.close()

    return Bounded


def unreadable(message: str, usage: Usage | None = None, *, delivered: bool | None = None) -> Failed:
    """Return the failure of an answer that nobody can read.

    Args:
        message: what is wrong with it.
        usage: what it took; None if that cannot be read either: the vendor may take money all the same.
        delivered: see `Failed`; None takes who counts for one who did the work, and anything else (a page of
            a gateway, half a file) for a server in trouble.
    """
    billed: Billed = "unsure" if usage is None else "yes"
    done = usage is not None if delivered is None else delivered
    return Failed(status="malformed", message=message, delivered=done, billed=billed, usage=usage or Usage())


def transport_failure(error: Exception) -> Failed:
    """Return what an error of an SDK, httpx, httpx2 or the standard library means.

    Raises:
        Exception: the error itself, if it is not of the network and there was no answer yet.
    """
    if isinstance(error, Failed):
        return error
    names = {kind.__name__ for kind in type(error).__mro__}
    if names & {"ConnectError", "ConnectTimeout", "PoolTimeout", "ConnectionRefusedError"}:
        return Failed(status="connection", message=f"no connection ({type(error).__name__})")
    if names & {"TimeoutException", "TimeoutError"}:
        # The vendor may well have answered somebody who was gone.
        return Failed(status="timeout", message="no answer in time", billed="unsure")
    if names & {"TransportError", "ConnectionError", "RequestError"}:
        message = f"the connection broke ({type(error).__name__})"
        return Failed(status="connection", message=message, billed="unsure")
    if _answered.get():
        # The SDKs check little: JSON of another form or depth ends in whatever Python says where it does.
        return unreadable(f"the answer has another form ({type(error).__name__})")
    raise error
