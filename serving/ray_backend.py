"""Edits that are answered by engines on a Ray cluster.

The ingress decides once what a reference means and asks for that very ``name@sha256:…``. The digest is the
model id by which Ray routes: a moved alias is a new id, and replicas that hold an adapter get its requests. A
replica pulls the adapter from the registry and admits it itself, for a verified adapter is a proof of the
process that verified it and cannot be sent.

An edit is a pure function of its request, so one whose replica died is done again by another replica.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException

from registry.digest import Digest
from registry.errors import Explained, NetworkError, shown
from serving import tracing
from serving.backend import AdapterStatus, Health, Progress
from serving.errors import Draining, NotServed, Overloaded
from serving.lasting import lasting
from serving.schema import EditResult, StackedAdapter, SweepRequest
from serving.settings import ServingSettings

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

ATTEMPTS = 5
"""How often a request is sent while its replicas die."""
_PAUSE = 0.1
"""Seconds before the second attempt, doubled with each: the router needs a moment to see who is dead."""
_HEARD = 0.5
"""Seconds between two questions of the ingress how its engines are."""
_COLLECTED = 5.0
"""Seconds between two questions for the engines' metrics."""
_PATIENCE = 5.0
"""Seconds after which an engine that does not say how it is counts as silent."""
_LOST = 30.0
"""Seconds after which a promotion does not wait for a silent engine; one that loads says how it is."""
_ADMITTING = 600.0
"""Seconds within which engines have to pull and verify an adapter, and put it onto their devices."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """An explained error on its way from a replica; Ray would wrap what is raised.

    Attributes:
        error: what it is.
        broken: the replica's device does not work, whatever it was asked.
    """

    error: Explained
    broken: bool = False


class Meaning(Protocol):
    """What a reference means now."""

    @property
    def name(self) -> str: ...

    @property
    def digest(self) -> Digest: ...


class Resolver(Protocol):
    """Knows what references mean, without weights; see `serving.following`. What is no coroutine blocks."""

    def start(self) -> None: ...

    def stop(self) -> None: ...

    async def meant(self, reference: str) -> Meaning: ...

    def statuses(self) -> Sequence[AdapterStatus]: ...

    async def status(self, reference: str) -> AdapterStatus: ...

    @property
    def missing(self) -> str | None: ...


class RayBackend:
    """The backend of an ingress: resolves references, and has engines answer.

    Args:
        engines: handle of the deployment of engines.
        resolver: makes what knows the references; it is given a function that has all engines admit a
            version and raises why they cannot, to be called before a followed reference moves to it.
        settings: of serving.

    Attributes:
        told: the engines' metrics, by their names.
    """

    def __init__(
        self,
        engines: DeploymentHandle[Any],
        resolver: Callable[[Callable[[Meaning], None]], Resolver],
        settings: ServingSettings,
    ) -> None:
        self._engines = engines
        self._resolver = resolver(self._admit)
        self._settings = settings
        self._in_flight: Counter[str] = Counter()
        self._heard: Sequence[Health] = ()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._listening: Sequence[asyncio.Task[None]] = ()
        self.told: Mapping[str, str] = {}
        self._draining = False

    async def start(self) -> None:
        """Follow the registry, and hear how the engines are."""
        self._loop = asyncio.get_running_loop()
        await asyncio.to_thread(self._resolver.start)
        loops = (
            lasting(self._listen, "engines", _HEARD),
            lasting(self._collect, "engines' metrics", _COLLECTED),
        )
        self._listening = [asyncio.create_task(loop) for loop in loops]

    async def stream(
        self, request: SweepRequest, *, key: str, previews: int = 0
    ) -> AsyncGenerator[Progress | list[EditResult]]:
        """See `serving.backend.Backend.stream`.

        Raises:
            NetworkError: every replica that took the request died.
        """
        if self._draining:
            raise Draining("the server is going down", "send the request again, another server takes it")
        asked, model = await self._resolve(request)
        seen = -1
        problem: Exception | None = None
        for attempt in range(ATTEMPTS):
            try:
                async with aclosing(self._once(asked, model, key, previews)) as items:
                    async for item in items:
                        if isinstance(item, Progress):
                            if item.step <= seen:
                                continue  # of an attempt that has not come as far as the one before
                            seen = item.step
                        yield item
                return
            except _Lost as lost:
                problem = lost.reason
                await asyncio.sleep(_PAUSE * 2**attempt)
        raise NetworkError(
            f"{ATTEMPTS} replicas were lost while they worked on this request: {shown(problem)}",
            "send it again in a minute; the cluster's log says why they end",
        ) from problem

    async def adapters(self) -> Sequence[AdapterStatus]:
        """Return what is served."""
        return await asyncio.to_thread(self._resolver.statuses)

    async def adapter(self, reference: str) -> AdapterStatus:
        """Return what a reference means now."""
        return await self._resolver.status(reference)

    async def health(self) -> Health:
        """Return how the engines that answer were half a second ago, or `_PATIENCE` while one is silent."""
        heard = self._heard
        full = [engine.retry_after for engine in heard if engine.retry_after is not None]
        problem = self._resolver.missing
        if problem is None and not any(engine.ready for engine in heard):
            problem = next((engine.problem for engine in heard if engine.problem), "no engine answers yet")
        return Health(
            ready=problem is None and not self._draining,
            draining=self._draining,
            waiting=sum(engine.waiting for engine in heard),
            running=sum(engine.running for engine in heard),
            problem=problem,
            retry_after=min(full) if heard and len(full) == len(heard) else None,
        )

    async def close(self, grace: float) -> None:
        """Take nothing new, wait for what was taken, and stop following."""
        self._draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace):
                while self._in_flight.total():
                    await asyncio.sleep(0.05)
        for task in self._listening:
            task.cancel()
        await asyncio.to_thread(self._resolver.stop)

    async def _resolve(self, request: SweepRequest) -> tuple[SweepRequest, str]:
        """Return the request with each reference replaced by what it means now, and the model id.

        What the settings put under the reference is written into the request, for a replica knows the adapter
        by its digest alone. A strength that nobody names is left to the replica, which has the signed card.
        """
        reference = request.adapter or next(iter(self._settings.adapters), None)
        if reference is None:
            raise NotServed("the request names no adapter, and none is served", "name one, as name@alias")
        exact = _exact(await self._resolver.meant(reference))
        under = request.stacked
        if under is None:
            under = tuple(StackedAdapter(adapter=one) for one in self._settings.stacked.get(reference, ()))
        stacked = [
            StackedAdapter(adapter=_exact(await self._resolver.meant(one.adapter)), strength=one.strength)
            for one in under
        ]
        fields = {name: getattr(request, name) for name in type(request).model_fields}
        return SweepRequest.make(**fields | {"adapter": exact, "stacked": tuple(stacked)}), exact

    async def _once(
        self, request: SweepRequest, model: str, key: str, previews: int
    ) -> AsyncGenerator[Progress | list[EditResult]]:
        """Have one replica answer.

        A model that more requests ask for than one replica runs at once is routed by load alone: Ray would
        go on sending them to the replicas that have it, and the others would idle.

        Raises:
            _Lost: the replica died, or it goes down.
        """
        hot = self._in_flight[model] >= self._settings.max_rows
        engines = self._engines.options(stream=True, multiplexed_model_id="" if hot else model)
        self._in_flight[model] += 1
        response: Any = engines.stream.remote(request, key, previews, tracing.here().headers())
        ended = False
        try:
            async for item in response:
                if isinstance(item, Refused):
                    ended = True
                    raise item.error
                ended = isinstance(item, list)
                yield item
        except Draining as error:
            raise _Lost(error) from error
        except BackPressureError as error:
            raise Overloaded(
                "more requests wait for an engine than are taken",
                "try again later",
                error.retry_after_s or 1.0,
            ) from error
        except RayTaskError:
            raise  # a fault of our own, not of the machine
        except (RayError, RayServeException) as error:
            ended = True
            raise _Lost(error) from error
        finally:
            self._in_flight[model] -= 1
            if not self._in_flight[model]:
                del self._in_flight[model]
            if not ended:
                response.cancel()

    async def _listen(self) -> None:
        """Ask the engines how they are, again and again."""
        self._heard = ()  # where it died, what it heard before may hold no more
        while True:
            answers = await self._ask_all("health")
            self._heard = [one for one in answers if isinstance(one, Health)]
            await asyncio.sleep(_HEARD)

    async def _collect(self) -> None:
        """Ask the engines for their metrics, more often than anybody scrapes."""
        self.told = {}
        while True:
            answers = await self._ask_all("metrics")
            self.told = dict(answers)
            await asyncio.sleep(_COLLECTED)

    def _admit(self, version: Meaning) -> None:
        """Have every engine admit a version and get ready for it; called in threads of the resolver.

        Engines whose device does not work have no say where others answer.

        Raises:
            NetworkError: no engine answers, or no device works.
            Explained: an engine refuses it.
        """
        assert self._loop is not None, "the resolver was started by start()"
        asking = self._admitted(_exact(version))
        answers = asyncio.run_coroutine_threadsafe(asking, self._loop).result()
        if not answers:
            raise NetworkError("no engine answers yet", "wait until the engines have loaded their base")
        refused = [answer for answer in answers if isinstance(answer, Refused)]
        for answer in refused:
            if not answer.broken:
                raise answer.error
        if len(refused) == len(answers):
            raise NetworkError(
                f"the device of no engine works: {refused[0].error.message}",
                "look for the device in the engines' logs; it is tried again",
            )

    async def _admitted(self, model: str) -> Sequence[Any]:
        """Have every engine admit a model; those that do not say that they are at it are not waited for."""
        calls = await self._call_all("admit", model)
        waiting, ends = set(calls), time.monotonic() + _ADMITTING
        while waiting and time.monotonic() < ends:
            _, waiting = await asyncio.wait(waiting, timeout=_PATIENCE)
            # Ray does not tell which ones are silent, but those that are at it say so.
            if waiting and not any(await self._ask_all("admitting", model, patience=_LOST)):
                await asyncio.wait(waiting, timeout=_PATIENCE)  # an answer may be on its way
                break
        return _answers(calls)

    async def _ask_all(self, method: str, *values: Any, patience: float = _PATIENCE) -> Sequence[Any]:
        """Call a method of every engine; return what those answer that are not silent."""
        calls = await self._call_all(method, *values)
        if calls:
            await asyncio.wait(calls, timeout=patience)
        return _answers(calls)

    async def _call_all(self, method: str, *values: Any) -> Sequence[asyncio.Task[Any]]:
        """Call a method of every engine, each call by itself; none where no engine runs."""
        try:
            calls = self._engines.broadcast(method, *values)
            async with asyncio.timeout(_PATIENCE):
                # Ray's `results_async` gives all answers or none: one silent engine would silence the others.
                engines = await calls._fetch_replica_results_async()
        except (TimeoutError, RayError, RayServeException, RuntimeError):  # the last where Ray has no router
            return ()
        return [asyncio.create_task(engine.get_async()) for engine in engines]


class _Lost(Exception):
    """The replica that worked on a request is gone."""

    def __init__(self, reason: Exception) -> None:
        super().__init__(str(reason))
        self.reason = reason


def _answers(calls: Sequence[asyncio.Task[Any]]) -> Sequence[Any]:
    """Return what calls have answered; those that have not yet are given up."""
    for call in calls:
        call.cancel()
    ended = [call for call in calls if call.done() and not call.cancelled()]
    return [call.result() for call in ended if call.exception() is None]


def _exact(meaning: Meaning) -> str:
    return f"{meaning.name}@{meaning.digest}"
