"""The backend in this process: an engine, the registry that is followed, and a scheduler.

The base is that of the first adapter that arrives. Each version that arrives is put onto the device and makes
one small edit before it serves, so that one which cannot edit never answers anybody, and everything is warm
when it does.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from registry.admission import VerifiedAdapter
from registry.digest import Digest
from registry.errors import Explained
from registry.reference import Reference
from serving.backend import AdapterStatus, Health, Progress
from serving.conditioning import strength_of
from serving.errors import Draining, Overloaded, ServingError, UsageError
from serving.following import Follower
from serving.scheduler import Scheduler
from serving.schema import EditResult, SweepRequest
from serving.tickets import Event
from serving.trial import trial

if TYPE_CHECKING:
    from pathlib import Path

    from registry.client import Registry
    from serving.adapters import Stack
    from serving.engine import EditEngine
    from serving.metrics import Metrics
    from serving.settings import ServingSettings

WARM_UP = "warm-up"
"""The key of the edits that new versions are tried with."""

WARM_SECONDS = 600.0
"""Within which a new version has to make one; others wait for their turn behind it."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Device:
    """The engine and its scheduler; there from the first adapter on, which decides on the base."""

    engine: EditEngine
    scheduler: Scheduler

    def weight(self, request: SweepRequest) -> float:
        """Return what a step of a row costs: its pixels, beside those of the base's own size."""
        height, width = self.engine.size
        tall, wide = request.size or (height, width)
        return tall * wide / (height * width)


class LocalBackend:
    """Answers edits with an engine in this process; see `serving.backend.Backend`.

    Args:
        settings: what is served, and how.
        registry: whose adapters; None is the registry of the data folder.
        metrics: where it counts.
        home: the data folder; None is the registry's.
    """

    def __init__(
        self,
        settings: ServingSettings,
        *,
        registry: Registry | None = None,
        metrics: Metrics | None = None,
        home: Path | None = None,
    ) -> None:
        from registry.client import Registry

        self._settings = settings
        self._metrics = metrics
        self._home = home
        self._follower = Follower(
            registry or Registry.open(home), settings, on_new=self._arrived, metrics=metrics
        )
        self._followed = {
            str(Reference.parse(text))
            for text in (*settings.adapters, *(one for under in settings.stacked.values() for one in under))
        }
        self._under = {str(Reference.parse(text)): under for text, under in settings.stacked.items()}
        self._loading = threading.Lock()
        self._device: _Device | None = None
        self._no_base: Explained | None = None
        self._held: dict[Digest, VerifiedAdapter] = {}
        self._closed = False

    async def start(self) -> None:
        """Load the base and the followed adapters, and warm up.

        A registry that does not answer is no error: `health` says what is missing, and it is tried again.

        Raises:
            BaseNotFound: the base is not on this machine.
            WrongBase: the folder of the base holds another revision.
        """
        await asyncio.to_thread(self._follower.start)
        if self._device is None and self._no_base is not None:
            await self.close(0)
            raise self._no_base

    async def stream(
        self, request: SweepRequest, *, key: str, previews: int = 0
    ) -> AsyncIterator[Progress | list[EditResult]]:
        """Answer a request; see `Backend.stream`."""
        reference = request.adapter or next(iter(self._settings.adapters), None)
        if reference is None:
            raise UsageError("the request names no adapter, and this server has no default", "name one")
        device = await self._with_base(reference)
        events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def listener(event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        ticket = device.scheduler.take(request, key=key, listener=listener, previews=previews)
        try:
            stack = await self._stack(reference, request)
            device.engine.check(request, stack)
            self._require_answerable(request, device)
            steps, first = device.engine.course(request, stack).steps, stack[0][0]
            device.scheduler.enter(ticket, stack, weight=device.weight(request))
            yield Progress(step=0, steps=steps, adapter=first.reference, adapter_digest=first.digest)
            while True:
                event = await events.get()
                if isinstance(event, Exception):
                    raise event
                yield event
                if isinstance(event, list):
                    return
        finally:
            device.scheduler.cancel(ticket)

    async def adapters(self) -> Sequence[AdapterStatus]:
        """Return what is served."""
        return self._follower.statuses()

    async def adapter(self, reference: str) -> AdapterStatus:
        """Return what a reference means now; raises as `stream` does."""
        return await self._follower.status(reference)

    async def health(self) -> Health:
        """Return how it is."""
        scheduler = None if self._device is None else self._device.scheduler
        draining = self._closed or (scheduler is not None and scheduler.draining)
        waiting, running = (0, 0) if scheduler is None else scheduler.load()
        problem = "it is going down" if draining else self._follower.missing
        if problem is None and scheduler is not None:
            problem = scheduler.problem
        return Health(
            ready=problem is None,
            draining=draining,
            waiting=waiting,
            running=running,
            problem=problem,
            retry_after=None if scheduler is None else scheduler.retry_after(),
            device="works" if scheduler is None else scheduler.device,
        )

    async def close(self, grace: float) -> None:
        """Take no more requests, finish those that were taken for at most ``grace`` seconds, and stop."""
        self._closed = True
        if self._device is not None:
            self._device.scheduler.refuse()  # at once, as `health` says, and not when a thread comes to it
            await asyncio.to_thread(self._device.scheduler.drain, grace)
        await asyncio.to_thread(self._follower.stop)

    # -- adapters --

    async def _with_base(self, reference: str) -> _Device:
        """Return the device; where there is none yet, the adapter that a reference means brings its base."""
        if self._device is None:
            if self._closed:
                raise Draining("the server is going down", "send the request again")
            await self._resolve(reference)
        assert self._device is not None, "an adapter is resolved once it is on the device"
        return self._device

    async def _resolve(self, reference: str) -> VerifiedAdapter:
        """Return the adapter that answers to a reference; only those that nobody follows are waited for."""
        if reference in self._followed:
            adapter = self._follower.resolve(reference)
            if adapter.digest not in self._held and self._device is not None:
                await asyncio.to_thread(self._hold_followed, self._device)
            return adapter
        return (await self._follower.meant(reference)).in_memory()

    def _require_answerable(self, request: SweepRequest, device: _Device) -> None:
        """Refuse what would fill the memory when it is answered.

        Raises:
            UsageError: all pictures together have too many pixels.
        """
        height, width = request.size or device.engine.size
        most = self._settings.max_output_pixels
        if len(request.rows) * height * width > most:
            raise UsageError(
                f"{len(request.rows)} pictures of {height} x {width} pixels are more than the {most:,} "
                "pixels that one request may make",
                "ask for fewer or smaller ones, or split the request (setting: max_output_pixels)",
            )

    async def _stack(self, reference: str, request: SweepRequest) -> Stack:
        """Decide which adapters answer a request, and how strong each is."""
        asked = [(reference, request.strength)]
        if request.stacked is None:
            asked += [(one, None) for one in self._under.get(reference, ())]
        else:
            asked += [(one.adapter, one.strength) for one in request.stacked]
        stack = []
        for name, strength in asked:
            adapter = await self._resolve(name)
            stack.append((adapter, strength_of(adapter.card.conditioning, strength)))
        names = [adapter.digest for adapter, _ in stack]
        if len(set(names)) < len(names):
            raise UsageError("an adapter is stacked on itself", "name each adapter once, with one strength")
        working = [adapter for adapter, strength in stack if strength]
        if len(working) > 1:
            await asyncio.to_thread(self._follower.together, working)
        return tuple(stack)

    def _arrived(self, adapter: VerifiedAdapter) -> None:
        """Make a version ready to serve, in a thread of the follower; what raises here never serves."""
        device = self._on_device(adapter)
        self._hold_followed(device)
        try:
            device.engine.prefetch(adapter)
        except Overloaded:
            # Where there is no room for two versions, the new one takes that of the old one.
            self._release_all(device)
        done: Future[None] = Future()

        def listener(event: Event) -> None:
            if isinstance(event, Exception):
                done.set_exception(event)
            elif isinstance(event, list):
                done.set_result(None)

        request, stack = trial(adapter)
        ticket = device.scheduler.take(request, key=WARM_UP, listener=listener, ours=True)
        device.scheduler.enter(ticket, stack)
        try:
            done.result(WARM_SECONDS)
        except TimeoutError:
            device.scheduler.cancel(ticket)
            raise ServingError(
                f"{adapter.reference} made no picture within {WARM_SECONDS:g} s",
                "it is tried again; where that goes on, look for the device in the server's log",
            ) from None
        _log.info("%s is warm", adapter.reference)

    def _hold_followed(self, device: _Device) -> None:
        """Keep the adapters on the device that followed references are served with, and let others go."""
        with self._loading:
            served = [one for one in self._follower.statuses() if one.followed and one.state == "ready"]
            for digest in set(self._held) - {one.digest for one in served}:
                device.engine.release(self._held.pop(digest))
            for one in served:
                if one.digest not in self._held:
                    # One that does not fit or was withdrawn just now is nobody else's matter.
                    with suppress(Explained):
                        adapter = self._follower.resolve(one.reference)
                        if adapter.digest not in self._held:  # it may mean another since, held already
                            device.engine.hold(adapter)
                            self._held[adapter.digest] = adapter

    def _release_all(self, device: _Device) -> None:
        with self._loading:
            while self._held:
                device.engine.release(self._held.popitem()[1])

    def _on_device(self, adapter: VerifiedAdapter) -> _Device:
        """Return the device; the first adapter has its base loaded."""
        from serving.engine import EditEngine

        with self._loading:
            if self._closed:
                raise Draining("the server is going down", "ask another one")
            if self._device is None:
                try:
                    engine = EditEngine.load(adapter.card.base, settings=self._settings, home=self._home)
                except Explained as error:
                    self._no_base = error
                    raise
                scheduler = Scheduler(
                    engine,
                    max_rows=self._settings.max_rows,
                    max_waiting=self._settings.max_waiting,
                    check=self._follower.check,
                    metrics=self._metrics,
                )
                if self._metrics is not None:
                    self._metrics.watch(engine)
                scheduler.start()
                self._device = _Device(engine=engine, scheduler=scheduler)
            return self._device
