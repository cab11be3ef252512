"""Prefect's worker, and the end of the runs in its hands.

``python -m flows.worker worker start …`` is ``prefect worker start …`` that can be told to take nothing new.
A worker that is asked to stop ends its runs at once, and they would be shown as running for ever: so they go
before it, and while the last of them saves, Prefect's own worker would take the next ones that wait.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

from flows.server import ask

if TYPE_CHECKING:
    import psutil
    from prefect.client.schemas.responses import WorkerFlowRunResponse

MODULE = "flows.worker"
#: Tells a worker to take no runs any more.
TAKE_NOTHING = signal.SIGUSR1
#: States of a run that a worker has to say something about.
IN_HAND = frozenset({"PENDING", "RUNNING", "CANCELLING"})
#: What a busy worker and a busy server may need to write down how runs have ended.
_REPORT_SECONDS = 60.0
_LOOK_SECONDS = 0.2
_RUN = "PREFECT__FLOW_RUN_ID"


def end_runs(keeper: int, seconds: float) -> None:
    """Ask the runs in the hands of a worker to end, and wait until they have, and the server knows of it.

    What waits in the queue stays there: a worker that is told so takes nothing new, and what another one
    takes meanwhile is asked to end as well.

    Args:
        keeper: process id of the worker's keeper.
        seconds: that the runs have.
    """
    import psutil

    workers = children(keeper)
    for worker in workers:
        with suppress(psutil.Error):  # the signal would end a worker that does not know it
            if MODULE in worker.cmdline():
                worker.send_signal(TAKE_NOTHING)
    asked: dict[str, Mapping[str, str]] = {}
    end = time.monotonic() + seconds
    while running := _runs(workers):
        # By the number of the run, for what looks after a crash is a process of the same run.
        for name in running.keys() - asked.keys():
            process, asked[name] = running[name]
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        if time.monotonic() > end:
            break
        time.sleep(_LOOK_SECONDS)
    _wait_until_told(workers, [variables for name, variables in asked.items() if name not in running])


def children(pid: int, recursive: bool = False) -> list[psutil.Process]:
    """Return the processes that a process has started, and with ``recursive`` those that they have."""
    import psutil

    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive)
    return []


def _runs(workers: Iterable[psutil.Process]) -> dict[str, tuple[psutil.Process, Mapping[str, str]]]:
    """Return the processes of runs that live, with their environment."""
    import psutil

    found = {}
    for process in (run for worker in workers for run in children(worker.pid)):
        variables: Mapping[str, str] = {}
        with suppress(psutil.Error):
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            variables = process.environ()
        if process.is_running():
            found[variables.get(_RUN, str(process.pid))] = (process, variables)
    return found


def _wait_until_told(workers: Iterable[psutil.Process], runs: Iterable[Mapping[str, str]]) -> None:
    """Wait until a worker has said how its runs have ended; each run's environment says whom."""
    end = time.monotonic() + _REPORT_SECONDS
    for run in runs:
        while any(worker.is_running() for worker in workers) and (left := end - time.monotonic()) > 0:
            if not _in_hand(run, left):
                break
            time.sleep(_LOOK_SECONDS)


def _in_hand(run: Mapping[str, str], seconds: float) -> bool:
    """Return whether a server takes a run for one that goes on; no, where none says anything."""
    try:
        url = f"{run['PREFECT_API_URL']}/flow_runs/{run[_RUN]}"
        return ask(url, timeout=seconds, variables=run)["state_type"] in IN_HAND
    except (OSError, ValueError, KeyError, TypeError):
        return False


def main() -> None:
    """Do what the command ``prefect`` does, with a worker of processes that can be told to take nothing."""
    told: list[int] = []
    # First of all: until then the signal would end this process.
    signal.signal(TAKE_NOTHING, lambda number, _: told.append(number))
    from prefect.cli import app
    from prefect.workers.process import ProcessWorker

    found = ProcessWorker._get_scheduled_flow_runs

    async def unless_told(worker: ProcessWorker) -> list[WorkerFlowRunResponse]:
        # It goes on asking, so that it is not taken for one that hangs.
        return [one for one in await found(worker) if not told]

    ProcessWorker._get_scheduled_flow_runs = unless_told  # type: ignore[method-assign, assignment]
    app()


if __name__ == "__main__":
    main()
