"""The backend of an ingress over engines that answer, refuse, take long, or are silent."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any

import pytest
from PIL import Image
from ray.serve.handle import DeploymentBroadcastResponse

from registry.digest import Digest, digest_bytes
from registry.errors import NetworkError
from serving import ray_backend
from serving.backend import AdapterStatus, Health
from serving.errors import AdapterMismatch, ServingError
from serving.ray_backend import Meaning, RayBackend, Refused
from serving.schema import StackedAdapter, SweepRequest
from serving.settings import ServingSettings
from serving.versions import Version

SOON = 300.0
"""Whatever has to happen happens in these seconds, also on a machine that is busy."""
Answer = Callable[[str], Awaitable[Any]]


def version(name: str) -> Version:
    digest = digest_bytes(name.encode())
    return Version(name=name, number=1, digest=digest, digests=(digest,), facts={}, adapter=None)


class Resolver:
    """Knows two adapters, and has the engines admit the first when it is started."""

    missing = None

    def __init__(self, admit: Callable[[Meaning], None]) -> None:
        self._admit = admit
        self.known = {"smile@prod": version("smile"), "fast:1": version("fast")}

    def start(self) -> None:
        self._admit(self.known["smile@prod"])

    def stop(self) -> None: ...

    async def meant(self, reference: str) -> Meaning:
        return self.known[reference]

    def statuses(self) -> Sequence[AdapterStatus]:
        return ()

    async def status(self, reference: str) -> AdapterStatus:
        return AdapterStatus(reference=reference, followed=True, state="ready")


class Engines:
    """A deployment's handle: Ray's own broadcast over replicas that are functions.

    Attributes:
        asked: the requests that were sent.
        failure: what each broadcast raises; None is well.
        failed: how many did, by what they were of.
    """

    def __init__(self, *replicas: Answer) -> None:
        self._replicas = replicas
        self.failure: Exception | None = None
        self.failed: Counter[str] = Counter()
        self.asked: list[SweepRequest] = []
        self.stream = self

    def broadcast(self, method: str, *values: str) -> Any:
        if self.failure is not None:
            self.failed[method] += 1
            raise self.failure

        class Result:
            def __init__(self, replica: Answer) -> None:
                self._replica = replica

            async def get_async(self) -> Any:
                return await self._replica(method)

        async def results() -> list[Any]:
            return [Result(replica) for replica in self._replicas]

        return DeploymentBroadcastResponse(results(), None)

    def options(self, **options: Any) -> Engines:
        return self

    async def remote(self, request: SweepRequest, *others: Any) -> AsyncGenerator[Any]:
        self.asked.append(request)
        yield []


async def good(method: str) -> Any:
    if method == "health":
        return Health(ready=True, draining=False, waiting=0, running=0)
    if method == "admitting":
        return False
    return ("good", "text") if method == "metrics" else None


async def silent(method: str) -> Any:
    await asyncio.Event().wait()


async def refuses(method: str) -> Any:
    return Refused(error=AdapterMismatch("it does not fit", "")) if method == "admit" else await good(method)


async def broken(method: str) -> Any:
    """Its device is gone, so nothing can be admitted there."""
    if method == "admit":
        return Refused(error=ServingError("the edit failed (AcceleratorError)", ""), broken=True)
    return await good(method)


class Slow:
    """An engine that takes long to admit a version, and says so.

    Attributes:
        admitted: it is done.
    """

    def __init__(self, seconds: float = 3.0) -> None:
        self._seconds = seconds
        self._at_it = False
        self.admitted = False

    async def __call__(self, method: str) -> Any:
        if method == "admitting":
            return self._at_it
        if method == "admit":
            self._at_it = True
            await asyncio.sleep(self._seconds)
            self._at_it, self.admitted = False, True
        return await good(method)


class Hanging:
    """An engine that hangs once it has admitted a version."""

    def __init__(self) -> None:
        self._hangs = False

    async def __call__(self, method: str) -> Any:
        if self._hangs:
            return await silent(method)
        self._hangs = method == "admit"
        return await good(method)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Silence is noticed soon, and nothing is admitted for longer than tests wait."""
    monkeypatch.setattr(ray_backend, "_PATIENCE", 0.2)
    monkeypatch.setattr(ray_backend, "_LOST", 0.5)


def backend(engines: Engines, **settings: Any) -> RayBackend:
    given = ServingSettings(**{"adapters": ("smile@prod",), **settings})
    return RayBackend(engines, Resolver, given)  # type: ignore[arg-type]


def test_a_silent_engine_silences_no_other_and_holds_up_no_promotion() -> None:
    async def run() -> None:
        found = backend(Engines(good, silent, good))
        async with asyncio.timeout(SOON):
            await found.start()  # a version is admitted by those that live
            while not (await found.health()).ready or not found.told:
                await asyncio.sleep(0.02)
        assert found.told == {"good": "text"}
        await found.close(0)

    asyncio.run(run())


@pytest.mark.parametrize("other", [lambda: good, lambda: silent, Hanging])
def test_an_engine_that_takes_long_but_lives_is_waited_for(other: Callable[[], Answer]) -> None:
    async def run() -> None:
        slow = Slow()
        found = backend(Engines(good, slow, other()))
        async with asyncio.timeout(SOON):
            await found.start()
        assert slow.admitted
        await found.close(0)

    asyncio.run(run())


def test_an_engine_whose_device_is_broken_holds_up_no_promotion() -> None:
    async def run() -> None:
        other = Slow(0.0)
        found = backend(Engines(broken, other))
        async with asyncio.timeout(SOON):
            await found.start()  # raises where the version is refused
        assert other.admitted
        await found.close(0)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("engines", "error"),
    [
        ((silent, silent), NetworkError),
        ((good, refuses, silent), AdapterMismatch),
        ((broken, refuses), AdapterMismatch),
        ((broken, broken, silent), NetworkError),
        ((), NetworkError),
    ],
)
def test_a_version_that_no_engine_or_not_every_one_admits_is_refused(
    engines: tuple[Answer, ...], error: type[Exception]
) -> None:
    async def run() -> None:
        found = backend(Engines(*engines))
        async with asyncio.timeout(SOON):
            with pytest.raises(error):
                await found.start()

    asyncio.run(run())


def test_a_strength_that_nobody_names_is_left_to_the_replica(portrait: Image.Image) -> None:
    async def run() -> None:
        engines = Engines(good)
        found = backend(engines, stacked={"smile@prod": ("fast:1",)})
        mine = (StackedAdapter(adapter="fast:1", strength=0.3),)
        for stacked in (None, mine, ()):
            request = SweepRequest.make(image=portrait, rows=({},), stacked=stacked)
            assert [one async for one in found.stream(request, key="me")] == [[]]
        fast = f"fast@{Digest(digest_bytes(b'fast'))}"
        assert [[(one.adapter, one.strength) for one in asked.stacked or ()] for asked in engines.asked] == [
            [(fast, None)],
            [(fast, 0.3)],
            [],
        ]
        assert [asked.strength for asked in engines.asked] == [None] * 3

    asyncio.run(run())


@pytest.mark.parametrize("error", [RuntimeError("Router is not initialized"), KeyError("engine")])
def test_whatever_a_question_to_the_engines_raises_they_are_asked_again(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_backend, "_COLLECTED", 0.1)

    async def run() -> None:
        engines = Engines(good)
        found = backend(engines)
        async with asyncio.timeout(SOON):
            await found.start()
            while not (await found.health()).ready or not found.told:
                await asyncio.sleep(0.02)
            engines.failure = error
            while (await found.health()).ready or found.told:  # what they said before holds no more
                await asyncio.sleep(0.02)
            assert {"health", "metrics"} <= set(engines.failed)
            engines.failure = None
            while not (await found.health()).ready or not found.told:
                await asyncio.sleep(0.02)
        await found.close(0)

    asyncio.run(run())


def test_a_version_is_not_refused_because_ray_knows_no_engine_yet() -> None:
    async def run() -> None:
        engines = Engines(good)
        engines.failure = RuntimeError("Router is not initialized")
        with pytest.raises(NetworkError, match="no engine answers yet"):
            await backend(engines).start()

    asyncio.run(run())
