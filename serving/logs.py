"""Logs of the service: one event a line on stderr, JSON for machines, short lines on a terminal.

    {"time": "…", "level": "info", "event": "request", "request_id": "…", "trace_id": "…", "key": "…", …}

What a stranger sent cannot forge a line or move a terminal's cursor: JSON escapes every control character,
and text for a terminal is escaped the same way. API keys are blotted out wherever they stand, also in what
libraries say and in tracebacks; a fact that is no text or number (a picture, a body) is named by its type.
Events come from `event`; what a request has in common (its id, the name of the key, the adapter) is said once
with `bind`.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, TextIO

from registry.digest import Digest
from registry.errors import shown
from serving import tracing
from serving.asgi import template, verb

if TYPE_CHECKING:
    from serving.asgi import App, Message, Receive, Send

LOGGER: Final = "serving"
MAX_TEXT: Final = 2000
"""Characters of one fact or message; tracebacks get ten times as much."""

_KEY = re.compile(r"afk_[A-Za-z0-9_-]{4,}|(?<=[Bb]earer )[^\s\"']+")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_REQUEST: ContextVar[MutableMapping[str, Any] | None] = ContextVar("request", default=None)
_QUIET = ("/v2", "/metrics", "/static")
"""Routes that are asked every few seconds; they are logged when they fail, or at the level debug."""


def event(
    name: str, *, level: int = logging.INFO, error: BaseException | None = None, **facts: object
) -> None:
    """Log that something happened.

    Args:
        name: what happened, a few constant words such as ``adapter promoted``.
        level: of `logging`.
        error: logged with its traceback.
        facts: texts, numbers, digests, None.
    """
    logging.getLogger(LOGGER).log(level, name, extra={"facts": facts}, exc_info=error)


def bind(**facts: object) -> None:
    """Add facts to every later line of the request that is being answered; nothing outside of one."""
    bound = _REQUEST.get()
    if bound is not None:
        bound.update(facts)


def request_id() -> str | None:
    """Return the id of the request that is being answered."""
    return (_REQUEST.get() or {}).get("request_id")


@contextmanager
def request(identifier: str | None = None) -> Iterator[str]:
    """Be in a request: its lines carry its id.

    Args:
        identifier: the caller's; one that is not made of up to 64 letters, digits, dots, dashes and
            underscores is replaced.
    """
    safe = identifier is not None and _REQUEST_ID.fullmatch(identifier) is not None
    chosen = identifier if safe and identifier is not None else uuid.uuid4().hex
    token = _REQUEST.set({"request_id": chosen})
    try:
        yield chosen
    finally:
        _REQUEST.reset(token)


def configure(stream: TextIO | None = None, *, level: int = logging.INFO) -> logging.Handler:
    """Log to ``stream``: lines of JSON, or of text where it is a terminal. Returns the handler.

    Libraries are heard from the level warning on, uvicorn as we are.
    """
    target = sys.stderr if stream is None else stream
    handler = logging.StreamHandler(target)
    handler.setFormatter(TextLines() if target.isatty() else JsonLines())
    root = logging.getLogger()
    for old in list(root.handlers):
        if isinstance(old.formatter, JsonLines | TextLines):
            root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger(LOGGER).setLevel(level)
    logging.getLogger("uvicorn").setLevel(level)
    logging.captureWarnings(True)
    return handler


class JsonLines(logging.Formatter):
    """One JSON object a line, pure ASCII: a line break can only be the end of an event."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        return json.dumps(said(record), ensure_ascii=True, allow_nan=False)


class TextLines(logging.Formatter):
    """Short lines for a person at a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record; a traceback stands below it, escaped line by line."""
        facts = said(record)
        moment, level, name = facts.pop("time"), facts.pop("level"), facts.pop("event")
        trace = str(facts.pop("exception", ""))
        rest = "  ".join(f"{key}={shown(value, MAX_TEXT)}" for key, value in facts.items())
        head = f"{str(moment)[11:19]} {level!s:<7} {shown(name, MAX_TEXT)}"
        below = "".join(f"\n    {shown(line, MAX_TEXT)}" for line in trace.splitlines())
        return (f"{head}  {rest}" if rest else head) + below


def said(record: logging.LogRecord) -> dict[str, Any]:
    """Return what a record says: plain values, without keys, cut to a length."""
    facts: dict[str, Any] = {
        "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
        "level": record.levelname.lower(),
        "event": _text(record.getMessage(), MAX_TEXT),
    }
    if not record.name.startswith(LOGGER):
        facts["logger"] = record.name
    own: Mapping[str, object] = getattr(record, "facts", {})
    trace_id = tracing.here().trace_id
    found = {**(_REQUEST.get() or {}), **({} if trace_id is None else {"trace_id": trace_id}), **own}
    facts |= {_text(key, 64): _plain(value) for key, value in found.items()}
    if record.exc_info and record.exc_info[0] is not None:
        facts["exception"] = _text(logging.Formatter().formatException(record.exc_info), 10 * MAX_TEXT)
    return facts


def _plain(value: object) -> str | int | float | bool | None:
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return round(value, 6) if abs(value) < float("inf") else str(value)
    if isinstance(value, str | Digest):
        return _text(str(value), MAX_TEXT)
    return f"<{type(value).__name__}>"


def _text(text: str, limit: int) -> str:
    """Return a text without API keys and not too long. Keys go first: half a key is still half a key."""
    blotted = _KEY.sub("***", text)
    return blotted if len(blotted) <= limit else f"{blotted[:limit]}... ({len(blotted)} characters)"


class HttpLogs:
    """ASGI middleware: a line for each request, and an id that the answer, its lines and its errors share.

    The id is the caller's ``X-Request-Id`` where that is a plain word, and comes back in the header of that
    name. Addresses of callers are not logged, and a path only where no route took it.

    Args:
        app: what it wraps.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name.lower() == b"x-request-id"), None)
        status = 500  # what the server answers when the app raises before it said anything
        began = time.perf_counter()
        with request(None if given is None else given.decode("latin-1")) as identifier:

            async def sending(message: Message) -> None:
                nonlocal status
                if message["type"] == "http.response.start":
                    status = message["status"]
                    message["headers"] = [
                        *(
                            (name, value)
                            for name, value in message.get("headers", ())
                            if name != b"x-request-id"
                        ),
                        (b"x-request-id", identifier.encode("ascii")),
                    ]
                await send(message)

            try:
                await self._app(scope, receive, sending)
            except Exception as error:
                event("request failed", level=logging.ERROR, error=error)
                raise
            finally:
                _request_line(scope, status, time.perf_counter() - began)


def _request_line(scope: Message, status: int, seconds: float) -> None:
    route = template(scope)
    quiet = route.startswith(_QUIET) and status < 400
    bind(method=verb(scope), route=route, status=status, seconds=seconds)
    if route == "unmatched":
        bind(path=scope.get("path", ""))
    event("request", level=logging.DEBUG if quiet else logging.INFO)
