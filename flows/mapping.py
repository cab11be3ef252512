"""Parts of a stage as Prefect tasks: on threads and processes of this machine, or on a Ray cluster.

`PartMapper` is the `trainer.parts.Mapper` of the flows. A part is one task run, whose parameters say what to
do and whose answer lies in the stage's folder, so nothing but names travels. At any time only so many parts
are submitted as keep all workers busy: what is not submitted cannot go on when a run is cancelled. The task
runner is started by the first stage with enough to do, and stays until the run ends; what is less is done by
the stage itself.

Ray does a part again, under the same task run, when the process that did it was killed.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

from prefect import task
from prefect.cache_policies import NO_CACHE

from flows.errors import ServerError, StageFailed
from flows.parameters import Runner
from flows.server import FINAL_STATES, only_logged, task_runs, wait_until_recorded
from flows.settings import FlowSettings, prefect_home
from registry.errors import Explained
from serving.errors import ServingError
from serving.local_ray import connect, kept_here
from trainer.apis.parallel import Stop, Stopped
from trainer.parent import end_with_parent
from trainer.parts import Mapper, Part, PartFunction, here

if TYPE_CHECKING:
    from prefect import State, Task
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.futures import PrefectFuture
    from prefect.task_runners import TaskRunner

_AT_MOST = 4
#: With fewer parts, starting processes takes longer than they save.
_WORTH_PROCESSES = 4
#: Parts that are submitted for each worker: the next one waits while a worker reports the last.
_AHEAD = 2
#: Seconds after which a worker that has not told how a part ended is taken to be dead.
_TELLING = 20.0
#: Variables that a Ray worker shares with the run, wherever it is.
_SHARED = ("ADAPTER_FOUNDRY_", "PREFECT_", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "DO_NOT_TRACK")


@task(name="part", cache_policy=NO_CACHE, persist_result=False)
def part(work: Callable[[], object], number: int) -> State[None] | None:
    """Do a part; paid APIs are asked no faster than Prefect's limits let all workers together.

    Returns:
        the task run's state, if the run was stopped before all of the part was asked for; else None.
    """
    from prefect.states import Cancelled

    from flows.limits import api_rates

    with api_rates():
        try:
            work()
        except Stopped:
            return Cancelled(message="the run was stopped; what was answered until then is kept")
    return None


@task(name="part", cache_policy=NO_CACHE, persist_result=False)
def part_elsewhere(work: Callable[[], object], number: int, pool: Executor) -> None:
    """Have a part done by a process of this machine."""
    pool.submit(work).result()


@dataclass(kw_only=True)
class PartMapper:
    """Does the parts of stages as tasks of the flow run that made it.

    Attributes:
        home: data folder; all workers share it.
        runner: "threads" or "ray".
        settings: of the flows.
        runs: gets the ids of the task runs.
    """

    home: Path
    runner: Runner
    settings: FlowSettings
    runs: list[str]
    _flow: Context = field(default_factory=copy_context)
    _states: dict[str, State[None]] = field(default_factory=dict)
    _started: tuple[TaskRunner[Any], int] | None = None
    _pool: Executor | None = None
    _open: ExitStack = field(default_factory=ExitStack)

    def __call__(self, stage: str, function: PartFunction, parts: Sequence[Part]) -> Iterator[None]:
        """See `trainer.parts.Mapper`.

        Raises:
            Explained: what a part raised, after those under way have ended.
            StageFailed: a part was lost with its worker, several times.
        """
        yield from self._map(stage, function, parts)

    def _map(
        self,
        stage: str,
        function: PartFunction,
        parts: Sequence[Part],
        *,
        on_processes: bool = False,
        on_gpus: bool = False,
    ) -> Iterator[None]:
        if len(parts) < (_WORTH_PROCESSES if on_processes else 2):
            for one in parts:
                function(**one) if on_processes else part.fn(partial(function, **one), 0)
                yield
            return
        runner, workers = self._start()
        gpus = _gpus() if on_gpus else 0
        workers = gpus or workers
        named = (part_elsewhere if on_processes else part).with_options(
            name=f"{stage}-part", task_run_name=f"{stage} {{number}}"
        )
        more = {"pool": self._processes(workers)} if on_processes else {}
        # A thread cannot be cancelled, so its part is told. (Ray's workers are other processes: `_drop`.)
        stop, flow = Stop(), self._flow.copy()
        flow.run(stop.obeyed)
        waiting = deque(parts)
        under_way: deque[PrefectFuture[None]] = deque()
        try:
            while waiting or under_way:
                while waiting and len(under_way) < _AHEAD * workers:
                    one = waiting.popleft()
                    # One opaque value: Prefect would look into each of thousands of values, several times.
                    given = {"work": partial(function, **one), "number": one.get("number", 0), **more}
                    # In the context of the flow, not of the stage's task: that one knows things that are
                    # of no use elsewhere and cannot be sent, such as the display.
                    under_way.append(flow.run(_submit, runner, named, given, gpus))
                    self.runs.append(str(under_way[-1].task_run_id))
                self._ended(stage, under_way[0])
                under_way.popleft()  # one that is interrupted while it is waited for is still to be dropped
                yield
        except Exception:
            stop.set()
            for future in under_way:
                with suppress(Exception):
                    self._ended(stage, future)
            raise
        except BaseException:
            # Cancelled, or nobody asks any more: what has not begun never will, and is never on record.
            stop.set()
            silent = _drop(under_way)
            self.runs[:] = [run for run in self.runs if run not in silent]
            raise

    def computing(self) -> Mapper:
        """Return the mapper of parts that ask no API but keep a core busy in Python.

        Threads would wait for each other (two render portraits slower than one), so each thread has a process
        do it. A Ray worker is one already.
        """
        return self if self.runner == "ray" else partial(self._map, on_processes=True)

    def spreading(self) -> Mapper:
        """Return the mapper of parts that each fill the cores or the GPU of a machine: others help, threads
        do not.
        """
        return partial(self._map, on_gpus=True) if self.runner == "ray" else here

    def close(self) -> None:
        """Wait until the server knows how each part ended, then stop the workers."""
        with self._open:
            # The workers tell the server by themselves, and have to live until they have.
            if self._states and self.runner == "ray":
                self._record()

    def _ended(self, stage: str, future: PrefectFuture[None]) -> None:
        """Wait for a part, note how it ended and raise what it raised."""
        future.wait()
        self._states[str(future.task_run_id)] = future.state
        _check(stage, future.state)

    def _record(self) -> None:
        """Wait until all parts are on record; write down what a worker that was killed did not tell."""
        from prefect.client.orchestration import get_client
        from prefect.context import FlowRunContext
        from prefect.settings import PREFECT_API_URL

        with suppress(ServerError):
            wait_until_recorded(PREFECT_API_URL.value(), list(self._states), _TELLING)
        known = task_runs(PREFECT_API_URL.value(), list(self._states))
        lost = {run: state for run, state in self._states.items() if known.get(run) not in FINAL_STATES}
        flow = FlowRunContext.get()
        if not lost or flow is None or flow.flow_run is None:
            return
        with get_client(sync_client=True) as client:
            for run, state in lost.items():
                if run not in known:
                    _put_on_record(client, flow.flow_run.id, run)
                client.set_task_run_state(UUID(run), state, force=True)

    def _start(self) -> tuple[TaskRunner[Any], int]:
        """Return the task runner, started, and how many parts it does at once."""
        if self._started is None:
            workers = self.settings.workers or min(_AT_MOST, os.cpu_count() or 1)
            if self.runner == "ray":
                self._started = self._ray(workers)
            else:
                from prefect.task_runners import ThreadPoolTaskRunner

                threads = self._open.enter_context(ThreadPoolTaskRunner(max_workers=workers))
                self._started = threads, workers
        return self._started

    def _processes(self, workers: int) -> Executor:
        """Return processes that end with this one; spawned, for a fork of one with threads can hang.

        They import no Prefect, which takes a process three seconds of a core.
        """
        if self._pool is None:
            self._pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=end_with_parent)
            self._open.callback(self._pool.shutdown, cancel_futures=True)
        return self._pool

    def _ray(self, workers: int) -> tuple[TaskRunner[Any], int]:
        """Return a task runner on the cluster of the settings, or on one of this machine's own."""
        options: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
        shared = {name: value for name, value in os.environ.items() if name.startswith(_SHARED)}
        shared["ADAPTER_FOUNDRY_HOME"] = str(self.home)
        with ExitStack() as starting:
            if self.settings.ray_address is None:
                shared |= starting.enter_context(kept_here(prefect_home(self.home) / "ray"))
                options |= {"num_cpus": workers, "include_dashboard": False}
            starting.enter_context(_signals_kept())
            import ray
            from prefect_ray import RayTaskRunner

            try:
                connect(self.settings.ray_address, {"runtime_env": {"env_vars": shared}, **options})
            except ServingError as error:
                raise StageFailed(error.message, error.mend) from error
            self._open.callback(ray.shutdown)
            # It takes the connection that there is, and leaves it.
            cluster = self._open.enter_context(RayTaskRunner())
        return cluster, max(1, int(ray.cluster_resources().get("CPU", 1)))


@contextmanager
def part_mapper(home: Path, runner: Runner, settings: FlowSettings, runs: list[str]) -> Iterator[PartMapper]:
    """Give the mapper of a flow run, which adds the ids of its task runs to ``runs``; called in the flow."""
    mapper = PartMapper(home=home, runner=runner, settings=settings, runs=runs)
    try:
        yield mapper
    except BaseException:
        with only_logged():
            mapper.close()
        raise
    mapper.close()


def _put_on_record(client: SyncPrefectClient, flow: UUID, run: str) -> None:
    """Have a task run on record.

    Raises:
        PrefectHTTPStatusError: the server refuses it, and has not put it there by itself, as one that is
            merely behind does.
    """
    from prefect.exceptions import PrefectHTTPStatusError
    from prefect.settings import PREFECT_API_URL

    try:
        client.create_task_run(part, flow, dynamic_key=run, id=UUID(run), name=run)
    except PrefectHTTPStatusError:
        if run not in task_runs(PREFECT_API_URL.value(), [run]):
            raise


def _gpus() -> int:
    """Return how many GPUs the Ray cluster has."""
    import ray

    return int(ray.cluster_resources().get("GPU", 0))


def _submit(
    runner: TaskRunner[Any], named: Task[..., None], given: dict[str, Any], gpus: int
) -> PrefectFuture[None]:
    if not gpus:
        return runner.submit(named, given)
    from prefect_ray.context import remote_options

    with remote_options(num_gpus=1):
        return runner.submit(named, given)


def _check(stage: str, state: State[None]) -> None:
    """Raise what a part raised, if it did not end well."""
    if state.is_completed():
        return
    if state.is_failed():
        problem = state.result(raise_on_failure=False)
        if isinstance(problem, Explained):
            raise problem
        raise StageFailed(
            f"a part of the stage {stage} failed: {type(problem).__name__}: {problem}",
            "the log of its task run in Prefect's page has the details; run the same command again to go on",
        ) from (problem if isinstance(problem, Exception) else None)
    raise StageFailed(
        f"a part of the stage {stage} ended as {state.name}: its worker was lost",
        "one that was killed had often no memory left; finished parts are kept: run the same command again",
    )


def _drop(futures: Sequence[PrefectFuture[None]]) -> list[str]:
    """Cancel parts, and return the ids of those that nobody will tell the server about."""
    silent = []
    for future in futures:
        wrapped = getattr(future, "wrapped_future", None)
        if not hasattr(wrapped, "cancel"):
            import ray

            ray.cancel(wrapped, force=True)  # kills the worker that has begun it
        elif not wrapped.cancel():
            continue
        silent.append(str(future.task_run_id))
    return silent


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Give SIGTERM back to whom it belonged: Ray takes it, and Prefect cancels runs with it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: Callable[..., Any] | int | None = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
