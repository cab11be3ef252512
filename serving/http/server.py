"""The server: uvicorn with the limits of time that it lacks, and an end that loses nothing.

uvicorn waits for ever for a request that began (slow loris), for a client that reads no answer, and for one
that opens a connection and says nothing. `WatchedProtocol` gives each of them a time. When all connections
are taken, the one that has waited longest without a whole request makes room.

On SIGTERM the service first drains: it still listens, tells that it is going down, and finishes what it took.
Then the connections are closed. Nothing is printed here.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from registry.errors import shown
from serving.errors import UsageError
from serving.http.limits import LINGER_SECONDS, MAX_HEADER_BYTES
from serving.settings import ServingSettings

MAX_CONNECTIONS: Final = 1024
KEEP_ALIVE_SECONDS: Final = 15
WRITE_SECONDS: Final = 60.0
WRITE_BYTES: Final = 512 << 10
"""So much of an answer that waits for its client has to be read in every `WRITE_SECONDS`."""
MAX_HEAD: Final = MAX_HEADER_BYTES + (16 << 10)
"""Bytes of the first line and the headers that the parser takes; `Limits` says better what is wrong."""
_TOO_SLOW: Final = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


class WatchedProtocol(H11Protocol):
    """A connection on which nothing lasts for ever.

    Attributes:
        seconds: in which a request has to arrive; the server sets it.
    """

    seconds = 20.0
    longest = MAX_CONNECTIONS

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._arrival: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None
        self._body_comes = False
        self.waits_since: float | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection; see `H11Protocol`."""
        if len(self.connections) >= self.longest:
            self._make_room()
        super().connection_made(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget a connection; see `H11Protocol`."""
        for timer in (self._arrival, self._writing):
            if timer is not None:
                timer.cancel()
        self._arrival = self._writing = None
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take bytes; see `H11Protocol`."""
        if self.transport.is_closing():
            return
        super().data_received(data)
        self._watch(began=True)

    def on_response_complete(self) -> None:
        """Go on with the next request; see `H11Protocol`."""
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        """The client does not read as fast as we write."""
        super().pause_writing()
        if self._writing is None:
            self._watch_reader()

    def resume_writing(self) -> None:
        """It has read."""
        super().resume_writing()
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None

    def _watch_reader(self) -> None:
        left = self.transport.get_write_buffer_size()
        self._writing = self.loop.call_later(WRITE_SECONDS, self._still_reads, left)

    def _still_reads(self, before: int) -> None:
        """End the connection if hardly anything of the answer was read since; nothing is added meanwhile."""
        if before - self.transport.get_write_buffer_size() < WRITE_BYTES:
            self.transport.abort()
        else:
            self._watch_reader()

    def _watch(self, *, began: bool = False) -> None:
        """Start, keep or stop the clock of the request that is arriving."""
        state = self.conn.their_state
        body = state is h11.SEND_BODY
        first = self.cycle is None
        if body or (state is h11.IDLE and (first or began or bool(self.conn.trailing_data[0]))):
            if self._arrival is None or (body and not self._body_comes):
                self._stop_clock()
                # `Limits` answers a slow body itself; this is for what no application reads any more
                seconds = self.seconds + LINGER_SECONDS + 1 if body else self.seconds
                self._arrival = self.loop.call_later(seconds, self._too_slow)
                self.waits_since = time.monotonic()
            self._body_comes = body
            return
        self._stop_clock()
        self._body_comes = False
        self.waits_since = time.monotonic() if state is h11.IDLE else None

    def _stop_clock(self) -> None:
        if self._arrival is not None:
            self._arrival.cancel()
            self._arrival = None

    def _too_slow(self) -> None:
        if self.transport.is_closing():
            return
        if self.cycle is None or (self.cycle.response_complete and self.conn.their_state is h11.IDLE):
            self.transport.write(_TOO_SLOW)
            self.transport.close()
        else:
            self.transport.abort()

    def _make_room(self) -> None:
        """Close the connection that has waited longest for its client."""
        waiting = [
            one
            for one in self.connections
            if isinstance(one, WatchedProtocol) and one.waits_since is not None and one.transport is not None
        ]
        oldest = min(waiting, key=lambda one: one.waits_since or 0.0, default=None)
        if oldest is not None:
            self.connections.discard(oldest)
            oldest.transport.abort()


class HttpServer:
    """The service on a socket.

    Args:
        app: the application.
        settings: of serving: address, times.
        drain: takes nothing new and finishes what was taken, `Backend.close` and what belongs to it.
        connections: that are held at the same moment.
    """

    def __init__(
        self,
        app: Any,
        settings: ServingSettings,
        drain: Callable[[], Awaitable[None]],
        *,
        connections: int = MAX_CONNECTIONS,
    ) -> None:
        self._settings = settings
        self._socket: socket.socket | None = None
        protocol = type(
            "Protocol",
            (WatchedProtocol,),
            {"seconds": settings.request_seconds, "longest": connections},
        )
        config = uvicorn.Config(
            app,
            http=protocol,
            ws="none",
            loop="asyncio",
            lifespan="on",
            log_config=None,
            log_level="error",  # whoever sends rubbish writes no log
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=5,
            h11_max_incomplete_event_size=MAX_HEAD,
            backlog=256,
        )
        self._server = _Draining(config, drain)

    def bind(self) -> str:
        """Take the address, and return it as a URL; port 0 takes a free one.

        Raises:
            UsageError: the address is in use, or not one of this machine.
        """
        host, port = self._settings.host, self._settings.port
        try:
            family, kind, protocol, _, place = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            taken = socket.socket(family, kind, protocol)
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            taken.bind(place)
        except OSError as error:
            raise UsageError(
                f"the service cannot listen on {shown(host)} port {port}: {shown(error.strerror or error)}",
                "stop what listens there, or set ADAPTER_FOUNDRY_SERVING_PORT to another port, or to 0",
            ) from error
        self._socket = taken
        name = taken.getsockname()
        return f"http://[{name[0]}]:{name[1]}" if family == socket.AF_INET6 else f"http://{name[0]}:{name[1]}"

    def run(self) -> None:
        """Answer until a signal or `stop`; binds first if nobody did.

        Raises:
            UsageError: see `bind`.
            ServingError: the application did not start.
        """
        asyncio.run(self.serve())

    async def serve(self, listens: Callable[[], None] | None = None) -> None:
        """Do the same in an event loop that runs.

        Args:
            listens: is called once, as soon as connections are taken.
        """
        if self._socket is None:
            self.bind()
        assert self._socket is not None
        self._server.listens = listens
        await self._server.serve(sockets=[self._socket])

    def stop(self) -> None:
        """Drain and end; safe from any thread."""
        self._server.should_exit = True

    @property
    def started(self) -> bool:
        """Whether it answers."""
        return self._server.started


class _Draining(uvicorn.Server):
    """uvicorn's server, which says when it listens, and first finishes what it took."""

    def __init__(self, config: uvicorn.Config, drain: Callable[[], Awaitable[None]]) -> None:
        super().__init__(config)
        self._drain = drain
        self.listens: Callable[[], None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        if self.started and self.listens is not None:
            self.listens()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain while still listening, so that balancers see that it is not ready; then close."""
        draining = asyncio.ensure_future(self._drain())
        while not draining.done() and not self.force_exit:
            await asyncio.wait([draining], timeout=0.1)
        finished = draining.done()
        draining.cancel()
        await super().shutdown(sockets)
        # uvicorn would raise the signal again and die of it; this was a proper end
        self._captured_signals.clear()
        if finished:
            draining.result()
