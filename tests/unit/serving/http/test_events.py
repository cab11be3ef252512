"""A run ends when nobody waits for it, at whatever moment they leave."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import FastAPI, Request

from fakes.backends import DrawingBackend
from serving.errors import Cancelled
from serving.http import events
from serving.http.events import Running, event_of, event_stream, require_room, while_connected
from serving.http.service import Service
from serving.schema import SweepRequest

SCOPE: dict[str, Any] = {
    "type": "http",
    "method": "POST",
    "path": "/",
    "headers": [],
    "asgi": {"version": "3.0"},
}


@pytest.fixture
def service(app: FastAPI) -> Service:
    made: Service = app.state.service
    return made


@pytest.fixture
def asked(picture: bytes) -> SweepRequest:
    return SweepRequest.make(image=picture, rows=({"happy": 0.8},), steps=3)


class Client:
    """One side of an exchange; it leaves when it is told to."""

    def __init__(self) -> None:
        self.leaves = asyncio.Event()
        self.got: list[dict[str, Any]] = []
        self.heard = asyncio.Event()
        self.request = Request(SCOPE, self.receive)

    async def receive(self) -> dict[str, Any]:
        await self.leaves.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.got.append(dict(message))
        if message.get("body"):
            self.heard.set()

    @property
    def text(self) -> str:
        return b"".join(message.get("body", b"") for message in self.got).decode()


async def nothing(progress: Any) -> bytes | None:
    return event_of("step", {"step": progress.step})


async def ended(results: Any) -> bytes:
    return event_of("result", {"rows": len(results)})


def stream(running: Running, opening: bytes | None = b"event: queued\n\n") -> Any:
    return event_stream(running, opening=opening, tell=nothing, finish=ended, headers=running.headers)


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(120):
        while not true():
            await asyncio.sleep(0.01)


def test_a_run_is_told_to_its_end(service: Service, backend: DrawingBackend, asked: SweepRequest) -> None:
    async def main() -> None:
        client = Client()
        running = await Running.begin(service, asked, key="me")
        await stream(running)(SCOPE, client.receive, client.send)
        assert client.text.count("event: step") == 3
        assert client.text.endswith('event: result\ndata: {"rows": 1}\n\n')
        assert (backend.running, backend.cancelled) == (0, 0)

    asyncio.run(main())


def test_a_client_that_left_before_the_first_event(
    service: Service, backend: DrawingBackend, asked: SweepRequest
) -> None:
    async def main() -> None:
        client = Client()
        client.leaves.set()
        backend.go.clear()
        running = await Running.begin(service, asked, key="me")
        await stream(running)(SCOPE, client.receive, client.send)
        assert (backend.running, backend.cancelled) == (0, 1)

    asyncio.run(main())


def test_an_answer_that_cannot_be_sent(
    service: Service, backend: DrawingBackend, asked: SweepRequest
) -> None:
    """The first bytes fail, so the events were never looked at."""

    async def broken(message: Any) -> None:
        raise OSError("gone")

    async def main() -> None:
        running = await Running.begin(service, asked, key="me")
        with pytest.raises((OSError, ExceptionGroup)):
            await stream(running)(SCOPE, Client().receive, broken)
        assert (backend.running, backend.cancelled) == (0, 1)

    asyncio.run(main())


def test_silence_is_bridged_and_left(
    service: Service, backend: DrawingBackend, asked: SweepRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "PING_SECONDS", 0.02)

    async def main() -> None:
        client = Client()
        backend.go.clear()
        running = await Running.begin(service, asked, key="me")
        task = asyncio.create_task(stream(running, None)(SCOPE, client.receive, client.send))
        await until(lambda: client.text.count(": ping") >= 2)
        client.leaves.set()
        await task
        assert (backend.running, backend.cancelled) == (0, 1)

    asyncio.run(main())


def test_a_client_that_waits_for_the_whole(
    service: Service, backend: DrawingBackend, asked: SweepRequest
) -> None:
    async def main() -> None:
        client = Client()
        running = await Running.begin(service, asked, key="me")
        (result,) = await running.results(client.request)
        assert (result.adapter, backend.running, backend.cancelled) == ("pixelsmile:1", 0, 0)
        backend.go.clear()
        running = await Running.begin(service, asked, key="me")
        task = asyncio.create_task(running.results(client.request))
        await asyncio.sleep(0.02)
        client.leaves.set()
        with pytest.raises(Cancelled):
            await task
        assert (backend.running, backend.cancelled) == (0, 1)

    asyncio.run(main())


def test_a_client_that_is_gone_at_once(
    service: Service, backend: DrawingBackend, asked: SweepRequest
) -> None:
    async def main() -> None:
        backend.go.clear()
        running = await Running.begin(service, asked, key="me")
        task = asyncio.create_task(running.results(Client().request))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await running.close()
        assert (backend.running, backend.cancelled) == (0, 1)

    asyncio.run(main())


def test_work_goes_on_while_somebody_waits() -> None:
    async def main() -> None:
        assert await while_connected(Client().request, asyncio.sleep(0.01, "done")) == "done"

        async def fails() -> None:
            raise ValueError("broken")

        with pytest.raises(ValueError, match="broken"):
            await while_connected(Client().request, fails())

    asyncio.run(main())


def test_room(service: Service, backend: DrawingBackend) -> None:
    from serving.errors import Draining, Overloaded

    async def main() -> None:
        await require_room(service)
        backend.full = 2.5
        with pytest.raises(Overloaded) as full:
            await require_room(service)
        assert full.value.retry_after == 2.5
        backend.draining = True
        with pytest.raises(Draining):
            await require_room(service)

    asyncio.run(main())
