"""Works on the jobs: hands them to the backend, some at a time, and sends the webhooks that are owed.

Any number of processes may do so with one database; one that is not ready leaves the jobs to the others. A
job is given up as soon as it is cancelled or its lease is lost, and waits again when the service is full or
stops. A loop that dies is started again.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from registry.errors import Explained, NetworkError
from serving.backend import Progress
from serving.errors import Cancelled, Draining, Overloaded, ServingError
from serving.http.answers import error_facts
from serving.http.job import MAX_ATTEMPTS
from serving.http.job_table import LEASE_SECONDS
from serving.http.webhooks import SECONDS, wait_after
from serving.lasting import lasting

if TYPE_CHECKING:
    from serving.backend import Backend
    from serving.http.job import Delivery, Job
    from serving.http.jobs import JobStore
    from serving.metrics import Metrics
    from serving.schema import EditResult, SweepRequest

Encode = Callable[["SweepRequest", "EditResult"], bytes]

JOBS_AT_ONCE: Final = 8
WEBHOOKS_AT_ONCE: Final = 8
WEBHOOKS_OF_ONE: Final = 2
"""Of one caller, whose receivers may answer as slowly as they like."""
POLL_SECONDS: Final = 0.5
BEAT_SECONDS: Final = 2.0
UPKEEP_SECONDS: Final = 30.0
_log = logging.getLogger(__name__)


class JobRunner:
    """Works on the jobs of a store.

    Args:
        backend: answers them.
        store: holds them.
        encode: makes the file of a result; runs in a thread.
        metrics: counts jobs and webhooks; None counts nothing.
        at_once: jobs of this process that run at the same moment.
    """

    def __init__(
        self,
        backend: Backend,
        store: JobStore,
        *,
        encode: Encode,
        metrics: Metrics | None = None,
        at_once: int = JOBS_AT_ONCE,
    ) -> None:
        self._backend, self._store, self._encode, self._metrics = backend, store, encode, metrics
        self._owner = secrets.token_hex(8)
        self._at_once = at_once
        self._edits: dict[str, asyncio.Task[None]] = {}
        self._working: set[asyncio.Task[None]] = set()
        self._loops: list[asyncio.Task[None]] = []
        self._closing = False

    def start(self) -> None:
        """Begin; the event loop runs."""
        self._store.on_cancel = self._cancelled
        bodies: tuple[Callable[[], Coroutine[Any, Any, None]], ...] = (self._take, self._tell, self._upkeep)
        self._loops = [asyncio.create_task(lasting(body, "jobs", POLL_SECONDS)) for body in bodies]

    async def close(self, grace: float = 0.0) -> None:
        """Take no more jobs; let those that run finish for so long, and the others wait for another process.

        Args:
            grace: seconds.
        """
        self._closing = True
        self._store.news.set()
        if self._loops:  # a job that is being taken at this moment is not forgotten
            await asyncio.wait(self._loops[:1], timeout=5.0)
        if self._working and grace > 0:
            await asyncio.wait(self._working, timeout=grace)
        for task in (*self._loops, *self._edits.values()):
            task.cancel()
        await asyncio.gather(*self._loops, *self._working, return_exceptions=True)

    # -- jobs --

    async def _take(self) -> None:
        """Take jobs while there is room for them, and the backend does not say that it is not ready."""
        while not self._closing:
            self._store.news.clear()
            job = None
            if len(self._working) < self._at_once and (await self._backend.health()).problem is None:
                own = tuple(self._edits)  # goes on, though its lease may be over after a stall
                job = await self._tried(asyncio.to_thread(self._store.table.claim, self._owner, but=own))
            if job is None:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._store.news.wait(), POLL_SECONDS)
                continue
            task = asyncio.create_task(self._work(job))
            self._working.add(task)
            task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._working.discard(task)
        self._store.news.set()

    async def _work(self, job: Job) -> None:
        """Run one job, and hold its lease while it runs."""
        done = [0, job.steps]
        edit = asyncio.create_task(self._edit(job, done))
        self._edits[job.id] = edit
        failures = 0
        try:
            while not edit.done():
                await asyncio.wait([edit], timeout=BEAT_SECONDS)
                if edit.done():
                    break
                held = await self._tried(
                    asyncio.to_thread(self._store.table.renew, job.id, self._owner, *done)
                )
                failures = failures + 1 if held is None else 0
                if held is False or failures * BEAT_SECONDS >= LEASE_SECONDS:
                    edit.cancel()
            await self._end(job, edit)
        finally:
            edit.cancel()
            del self._edits[job.id]

    async def _edit(self, job: Job, done: list[int]) -> None:
        """Ask the backend, and keep what it answers."""
        request = await asyncio.to_thread(self._store.request, job)
        results = await self._results(job, request, done)
        pictures = await asyncio.to_thread(lambda: [self._encode(request, result) for result in results])
        facts = [result.facts() for result in results]
        await asyncio.to_thread(self._store.table.succeed, job.id, self._owner, pictures, facts)

    async def _results(self, job: Job, request: SweepRequest, done: list[int]) -> list[EditResult]:
        stream = self._backend.stream(request, key=job.caller)
        try:
            async for item in stream:
                if not isinstance(item, Progress):
                    return item
                done[:] = item.step, item.steps
        finally:
            close = getattr(stream, "aclose", None)
            if close is not None:
                await close()
        raise Cancelled("the edit ended without a result", "ask again")

    async def _end(self, job: Job, edit: asyncio.Task[None]) -> None:
        """Write how it ended; what was cancelled or lost is not ours to write."""
        if edit.cancelled():
            if self._closing:
                await self._back(job, 0.0, counts=False)
            return
        error = edit.exception()
        if error is None:
            return
        if isinstance(error, Overloaded):
            await self._back(job, max(1.0, error.retry_after), counts=False)
        elif isinstance(error, Draining):
            await self._back(job, 1.0, counts=False)
        elif _elsewhere(error) and job.attempts < MAX_ATTEMPTS:
            await self._back(job, 5.0 * 2**job.attempts, counts=True)
        else:
            if not isinstance(error, Explained):
                _log.error("job %s failed", job.id, exc_info=error)
            told = error_facts(error) if isinstance(error, Exception) else error_facts(RuntimeError())
            await self._tried(asyncio.to_thread(self._store.table.fail, job.id, self._owner, told))

    async def _back(self, job: Job, seconds: float, *, counts: bool) -> None:
        give_back = self._store.table.give_back
        await self._tried(asyncio.to_thread(give_back, job.id, self._owner, seconds, counts=counts))

    def _cancelled(self, id: str) -> None:
        edit = self._edits.get(id)
        if edit is not None:
            edit.cancel()

    # -- webhooks and upkeep --

    async def _tell(self) -> None:
        """Send what is owed."""
        on_their_way: Counter[str] = Counter()
        room = asyncio.Event()

        async def tell(due: Delivery) -> None:
            await self._tell_one(due)
            on_their_way[due.caller] -= 1
            room.set()

        async with asyncio.TaskGroup() as sending:
            while not self._closing:
                room.clear()
                due = None
                if on_their_way.total() < WEBHOOKS_AT_ONCE:
                    busy = [caller for caller, count in on_their_way.items() if count >= WEBHOOKS_OF_ONE]
                    ask = asyncio.to_thread(self._store.table.due, 4 * SECONDS, but=busy)
                    due = await self._tried(ask)
                if due is None:
                    with suppress(TimeoutError):
                        await asyncio.wait_for(room.wait(), POLL_SECONDS)
                    continue
                on_their_way[due.caller] += 1
                sending.create_task(tell(due))

    async def _tell_one(self, due: Delivery) -> None:
        """Make an attempt; whatever becomes of it, the other deliveries go on."""
        outcome, again = "failed", wait_after(due)
        try:
            outcome, again = await self._store.sender.send(due)
        except Exception:
            _log.exception("an attempt to deliver %s failed", due.id)
        await self._tried(asyncio.to_thread(self._store.table.told, due.id, again))
        if self._metrics is not None:
            self._metrics.webhooks.labels(outcome=outcome).inc()

    async def _upkeep(self) -> None:
        while not self._closing:
            await self._tried(asyncio.to_thread(self._store.remove_old))
            counts: Mapping[str, int] | None = await self._tried(asyncio.to_thread(self._store.table.counts))
            if self._metrics is not None and counts is not None:
                for state in ("queued", "running", "succeeded", "failed", "cancelled"):
                    self._metrics.jobs.labels(state=state).set(counts.get(state, 0))
            await asyncio.sleep(UPKEEP_SECONDS)

    async def _tried(self, work: Coroutine[Any, Any, Any]) -> Any:
        """What came of it; None when the database failed, which is tried again later."""
        try:
            return await work
        except Explained as error:
            _log.warning("jobs: %s", error.message)
            await asyncio.sleep(POLL_SECONDS)
            return None


def _elsewhere(error: BaseException) -> bool:
    """Whether a job may succeed later or in another process: what failed was no fault of the job.

    What breaks an edit and explains nothing itself, as a device does, comes as a plain `ServingError`.
    """
    return isinstance(error, NetworkError) or type(error) is ServingError
