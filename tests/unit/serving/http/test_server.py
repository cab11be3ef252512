"""The server's limits of time, on a socket and with a clock that tests move."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from serving.http.limits import Message, Receive, Send
from serving.http.server import WRITE_BYTES, WRITE_SECONDS, WatchedProtocol

ANSWER = 8 << 20
STEP = 10.0
"""Seconds between two looks of a client at its socket."""


class SteppedLoop(asyncio.SelectorEventLoop):
    """Its sockets are real, and its time stands until somebody moves it."""

    now = 0.0

    def time(self) -> float:
        """See `asyncio.AbstractEventLoop.time`."""
        return self.now


async def answer(scope: Message, receive: Receive, send: Send) -> None:
    """One large answer."""
    headers = [(b"content-length", str(ANSWER).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"x" * ANSWER})


async def heard(step: int) -> tuple[int, float]:
    """Bytes that a client gets who reads so many every `STEP`, and the seconds until that was over."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, SteppedLoop)
    config = uvicorn.Config(answer, http=WatchedProtocol, ws="none", lifespan="off", log_config=None)  # type: ignore[arg-type]
    config.load()
    state, nothing = ServerState(), dict[str, Any]()
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.setblocking(False)
    await loop.connect_accepted_socket(
        lambda: WatchedProtocol(config=config, server_state=state, app_state=nothing), ours
    )
    got = 0
    with theirs:
        await loop.sock_sendall(theirs, b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
        while got < ANSWER and state.connections:
            left = min(step, ANSWER - got)
            while left and (data := await loop.sock_recv(theirs, left)):
                got, left = got + len(data), left - len(data)
            loop.now += STEP
            for _ in range(4):  # what the time has brought, and what the socket has room for
                await asyncio.sleep(0)
        after = loop.now
        while got < ANSWER and (data := await loop.sock_recv(theirs, 1 << 20)):
            got += len(data)  # what was on its way when the connection ended
    return got, after


def read(step: int) -> tuple[int, float]:
    with asyncio.Runner(loop_factory=SteppedLoop) as runner:
        return runner.run(heard(step))


def test_who_reads_steadily_gets_the_whole_answer_however_long_it_takes() -> None:
    got, seconds = read(WRITE_BYTES // 3)
    assert got >= ANSWER
    assert seconds > 5 * WRITE_SECONDS


@pytest.mark.parametrize("step", [1, WRITE_BYTES // 30])
def test_who_hardly_reads_is_cut_off(step: int) -> None:
    got, seconds = read(step)
    assert got < ANSWER
    assert seconds <= 3 * WRITE_SECONDS
