"""A request that a backend works on: who answers it, how far it is, and that nobody waits for it any more.

An event stream tells a run while it lasts (``text/event-stream``, one JSON object an event):

    queued   {"id", "adapter", "adapter_digest"}          taken; which version answers is decided
    step     {"step", "steps", "pictures"?}               after each step; small JPEG files where asked for
    result   the same object as the answer without events
    error    {"error": {…}}                               the same object as an error's answer
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event

from serving import logs
from serving.backend import Progress
from serving.errors import Cancelled, Draining, Overloaded
from serving.http import pictures
from serving.http.answers import error_facts, status_of

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from serving.http.service import Service
    from serving.schema import EditResult, SweepRequest

PING_SECONDS = 15.0
"""Between comments in an event stream that has nothing to tell; proxies cut what is silent for longer."""

_Value = TypeVar("_Value")
Item = Progress | list["EditResult"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Running:
    """A request that a backend has taken.

    Attributes:
        first: says which adapter will answer.
        items: the progress after it, then the results.
    """

    first: Progress
    items: AsyncIterator[Item]

    @classmethod
    async def begin(cls, service: Service, request: SweepRequest, *, key: str, previews: int = 0) -> Running:
        """Hand a request to the backend and wait until it is taken, which is at once or never.

        Raises:
            ServingError, registry.errors.RegistryError: it is not taken; see `serving.backend.Backend`.
        """
        items = service.backend.stream(request, key=key, previews=previews)
        first = await anext(items)
        assert isinstance(first, Progress)  # the backend's promise
        made = cls(first=first, items=items)
        logs.bind(rows=len(request.rows), **made.facts)
        return made

    @property
    def facts(self) -> dict[str, str | None]:
        """Which adapter answers, for JSON and for the log."""
        digest = self.first.adapter_digest
        return {"adapter": self.first.adapter, "adapter_digest": None if digest is None else str(digest)}

    @property
    def headers(self) -> dict[str, str]:
        """The headers that name the adapter."""
        name, _, version = (self.first.adapter or "").partition(":")
        return adapter_headers(name, version, self.facts["adapter_digest"] or "")

    async def results(self, request: Request) -> list[EditResult]:
        """Return what comes out; the run ends with the client's patience.

        Raises:
            Cancelled: the client has gone, or the run was stopped.
        """
        try:
            return await while_connected(request, self._results())
        finally:
            await self.close()

    async def _results(self) -> list[EditResult]:
        found: list[EditResult] | None = None
        async for item in self.items:  # to its end: a run that is left before it counts as cancelled
            if not isinstance(item, Progress):
                found = item
        if found is None:
            raise Cancelled("the edit ended without a result", "send it again")
        return found

    async def close(self) -> None:
        """Cancel the run, if it has not ended; also one that nobody has looked at yet."""
        assert isinstance(self.items, AsyncGenerator)  # every backend's stream is one
        await self.items.aclose()


def adapter_headers(name: str, version: str, digest: str) -> dict[str, str]:
    """Return the headers of every answer that an adapter made."""
    named = {"Adapter-Name": name, "Adapter-Version": version, "Adapter-Digest": digest}
    return {header: value for header, value in named.items() if value}


async def require_room(service: Service) -> None:
    """Refuse a request before a byte of its body is read.

    Raises:
        Draining: the service is going down.
        Overloaded: the queue is full.
    """
    health = await service.backend.health()
    if health.draining:
        raise Draining("the service is going down", "ask another replica, or try again in a moment")
    if health.retry_after is not None:
        raise Overloaded(
            "the queue is full", "wait as long as Retry-After says, then try again", health.retry_after
        )


async def while_connected(request: Request, work: Awaitable[_Value]) -> _Value:
    """Return what ``work`` returns; cancel it as soon as the client has gone.

    Args:
        request: its body has been read.

    Raises:
        Cancelled: nobody waits for the answer.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Cancelled("the client went away", "send the request again")
    finally:
        for one in (task, gone):
            one.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


Tell = Callable[[Progress], Awaitable[bytes | None]]
Finish = Callable[[Sequence["EditResult"]], Awaitable[bytes]]


def event_stream(
    running: Running, *, opening: bytes | None, tell: Tell, finish: Finish, headers: Mapping[str, str]
) -> StreamingResponse:
    """Return the answer that tells a run while it lasts.

    Args:
        running: the run; it is cancelled when the client goes away.
        opening: the first event; None begins with the first step.
        tell: makes an event of a step; None tells nothing.
        finish: makes the event of the results.
        headers: of the answer.
    """
    told = _told(running, opening, tell, finish)
    quiet = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return _Events(running, told, {**quiet, **headers})


class _Events(StreamingResponse):
    """Cancels what it tells when the client goes away, at once."""

    def __init__(
        self, running: Running, told: AsyncGenerator[bytes, None], headers: Mapping[str, str]
    ) -> None:
        super().__init__(told, media_type="text/event-stream", headers=headers)
        self._running, self._told = running, told

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._told.aclose()
            await self._running.close()  # a stream that never began has not closed it


async def _told(
    running: Running, opening: bytes | None, tell: Tell, finish: Finish
) -> AsyncGenerator[bytes, None]:
    """The events of a run; an error is the last of them, since the status has been sent."""
    if opening is not None:
        yield opening
    try:
        async with aclosing(_with_pings(running.items)) as items:
            async for item in items:
                if item is None:
                    yield KEEPALIVE_COMMENT
                elif not isinstance(item, Progress):
                    yield await finish(item)
                elif (event := await tell(item)) is not None:
                    yield event
    except Exception as error:
        if status_of(error) == 500:
            logs.event("request failed", level=logging.ERROR, error=error)
        yield event_of("error", error_facts(error))


async def _with_pings(items: AsyncIterator[Item]) -> AsyncGenerator[Item | None, None]:
    """The items, and None whenever none came for `PING_SECONDS`."""
    while True:
        coming = asyncio.ensure_future(anext(items))
        try:
            while not (await asyncio.wait({coming}, timeout=PING_SECONDS))[0]:
                yield None
        except BaseException:
            coming.cancel()
            with suppress(BaseException):
                await coming
            raise
        try:
            yield coming.result()
        except StopAsyncIteration:
            return


async def step_facts(progress: Progress) -> dict[str, Any]:
    """Return a step as JSON, with small pictures where the backend made some."""
    facts: dict[str, Any] = {"step": progress.step, "steps": progress.steps}
    if progress.pictures is not None:
        facts["pictures"] = await asyncio.to_thread(pictures.previews, progress.pictures)
    return facts


def event_of(name: str, data: Mapping[str, Any]) -> bytes:
    """Return one event as it goes over the wire."""
    return format_sse_event(data_str=json.dumps(data), event=name)
