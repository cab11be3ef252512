"""Parts of a stage as task runs: all are done and recorded, errors explained, one alone needs no task."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import pytest
from prefect import flow
from prefect.context import SyncClientContext
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Completed

from fakes.failing_proxy import FailingProxy, in_front_of
from fakes.followed import wait_until
from flows import server as server_module
from flows.errors import StageFailed
from flows.job import running
from flows.mapping import PartMapper, part_mapper
from flows.parameters import RecipeChoice
from flows.server import Server, attached, managed_server, task_runs, wait_until_recorded
from flows.settings import FlowSettings
from flows.stages import Job
from registry.digest import digest_bytes
from trainer.apis.parallel import Stopped, in_threads, pause
from trainer.errors import DataError
from trainer.parts import in_parts

SETTINGS = FlowSettings(workers=2)
KEY = digest_bytes(b"parts")
LONG = 600.0
"""Seconds that a run waits for a record that never comes, much longer than all else takes."""


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One data folder for the module."""
    return tmp_path_factory.mktemp("flows-mapping")


@pytest.fixture(scope="module")
def server(data_folder: Path) -> Iterator[Server]:
    """One server for the module, and this process set to use it."""
    with managed_server(data_folder) as server, attached(data_folder, server.url):
        yield server


def square(folder: Path, *, number: int, log: str) -> dict[str, Any]:
    """Square a number, and note that it was done."""
    with Path(log).open("a") as stream:
        stream.write(f"{number} {threading.current_thread().name}\n")
    return {"square": number * number}


def refuse_three(folder: Path, *, number: int, log: str) -> dict[str, Any]:
    """Square a number, but for one."""
    if number == 3:
        raise DataError("the third is bad", "leave it out")
    return square(folder, number=number, log=log)


def slip(folder: Path, *, number: int, log: str) -> dict[str, Any]:
    """Have a mistake in the program."""
    raise ZeroDivisionError(f"{number} / 0")


def mapped(
    home: Path, out: Path, function: Any, count: int, runs: list[str], computing: bool = False
) -> list[dict[str, Any]]:
    """Do parts in a flow, on threads, or on processes of these."""

    @flow(name="parts")
    def parts() -> list[dict[str, Any]]:
        with part_mapper(home, "threads", SETTINGS, runs) as mapper:
            given = [{"number": number, "log": str(out.with_suffix(".log"))} for number in range(count)]
            chosen = mapper.computing() if computing else mapper
            return in_parts("squares", out, KEY, function, given, chosen)[1]

    return parts()


def done_parts(out: Path) -> list[int]:
    return sorted(int(line.split()[0]) for line in out.with_suffix(".log").read_text().splitlines())


def test_each_part_is_a_recorded_task_run_and_done_once(
    server: Server, data_folder: Path, tmp_path: Path
) -> None:
    runs: list[str] = []
    answers = mapped(data_folder, tmp_path / "out", square, 7, runs)
    assert [answer["square"] for answer in answers] == [number**2 for number in range(7)]
    assert done_parts(tmp_path / "out") == list(range(7))
    names = {line.split()[1] for line in (tmp_path / "out.log").read_text().splitlines()}
    assert threading.current_thread().name not in names
    assert len(runs) == len(set(runs)) == 7
    wait_until_recorded(server.url, runs, 180)
    assert task_runs(server.url, runs) == dict.fromkeys(runs, "COMPLETED")
    assert mapped(data_folder, tmp_path / "out", square, 7, runs) == answers
    assert len(runs) == 7, "what is done needs no task run"


def test_one_part_is_done_by_the_stage_itself(server: Server, data_folder: Path, tmp_path: Path) -> None:
    runs: list[str] = []
    assert mapped(data_folder, tmp_path / "out", square, 1, runs) == [{"square": 0}]
    assert runs == []


def test_parts_that_compute_are_done_by_processes(server: Server, data_folder: Path, tmp_path: Path) -> None:
    runs: list[str] = []
    answers = mapped(data_folder, tmp_path / "out", whose, 6, runs, computing=True)
    assert len(runs) == 6
    assert 1 <= len({answer["process"] for answer in answers} - {os.getpid()}) <= 2
    wait_until(lambda: not {one.pid for one in psutil.Process().children()} & {a["process"] for a in answers})
    few = mapped(data_folder, tmp_path / "few", whose, 3, runs, computing=True)
    assert {answer["process"] for answer in few} == {os.getpid()}
    assert len(runs) == 6


def whose(folder: Path, *, number: int, log: str) -> dict[str, Any]:
    """Tell which process does this."""
    return {"process": os.getpid()}


@pytest.mark.parametrize("computing", [False, True])
def test_the_error_of_a_part_reaches_the_user_as_it_is(
    server: Server, data_folder: Path, tmp_path: Path, computing: bool
) -> None:
    runs: list[str] = []
    with pytest.raises(DataError) as problem:
        mapped(data_folder, tmp_path / "out", refuse_three, 30, runs, computing)
    assert (problem.value.message, problem.value.mend) == ("the third is bad", "leave it out")
    done = done_parts(tmp_path / "out")
    assert set(done) >= {0, 1, 2}
    assert len(done) < 29, "nothing is begun after the error"
    wait_until_recorded(server.url, runs, 180)
    assert sorted(task_runs(server.url, runs).values()).count("FAILED") == 1
    mapped(data_folder, tmp_path / "out", square, 30, runs)
    assert done_parts(tmp_path / "out") == list(range(30)), "no finished part is repeated"


def test_a_mistake_in_a_part_is_told_with_its_stage(
    server: Server, data_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(StageFailed, match="stage squares failed: ZeroDivisionError: 0 / 0"):
        mapped(data_folder, tmp_path / "out", slip, 2, [])


def test_a_run_that_is_cancelled_begins_no_more_parts(
    server: Server, data_folder: Path, tmp_path: Path
) -> None:
    runs: list[str] = []

    @flow(name="cancelled")
    def cancelled() -> None:
        with part_mapper(data_folder, "threads", SETTINGS, runs) as mapper:
            given = [{"function": wait, "given": {"log": tmp_path / "log"}, "number": n} for n in range(20)]
            for _ in mapper("waits", call, given):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cancelled()
    after = (tmp_path / "log").read_text()
    time.sleep(0.5)
    assert (tmp_path / "log").read_text() == after, "nothing goes on"
    assert len(after) < 20


def test_a_run_that_is_stopped_ends_so_and_waits_for_no_part_that_never_began(
    server: Server, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADAPTER_FOUNDRY_HOME", str(data_folder))
    monkeypatch.setenv("ADAPTER_FOUNDRY_FLOWS_WORKERS", "2")
    monkeypatch.setenv("ADAPTER_FOUNDRY_FLOWS_SERVER_TIMEOUT", str(LONG))
    recipe = RecipeChoice(recipe="pixelsmile-portraits").load()
    jobs: list[Job] = []

    @flow(name="stopped")
    def stopped(lost: str | None) -> None:
        with running("dataset", recipe, "threads") as job:
            jobs.append(job)
            job.runs += [lost] if lost else []
            given = {"runs": job.runs, "submitted": len(job.runs) + 4, "full": threading.Event()}
            parts = [{"number": n, **given} for n in range(20)]
            for _ in job.mapper("waits", until_some_are_dropped, parts):
                raise KeyboardInterrupt

    started = time.monotonic()
    for lost in (None, "00000000-0000-4000-8000-000000000000"):
        with pytest.raises(KeyboardInterrupt):
            stopped(lost)
    assert time.monotonic() - started < LONG, "nobody waits for a record now"
    begun = jobs[0].runs
    assert 1 <= len(begun) <= 3
    wait_until_recorded(server.url, begun, 180)


@pytest.mark.parametrize("problem", [KeyboardInterrupt, DataError])
def test_once_a_run_ends_early_its_parts_ask_nothing_new_and_keep_what_is_under_way(
    server: Server, data_folder: Path, tmp_path: Path, problem: type[BaseException]
) -> None:
    runs: list[str] = []
    begun: list[int] = []
    ended: list[int] = []

    @flow(name="asking")
    def asking_flow() -> None:
        with part_mapper(data_folder, "threads", SETTINGS, runs) as mapper:
            given = {"begun": begun, "ended": ended, "problem": problem}
            for _ in mapper("asks", ask, [{"number": number, **given} for number in range(2)]):
                raise KeyboardInterrupt

    with pytest.raises(problem):
        asking_flow()
    assert sorted(begun) == sorted(ended) == list(range(PARALLEL)), "no request but those under way"
    wait_until_recorded(server.url, runs, 180)
    assert task_runs(server.url, runs) == {
        runs[0]: "FAILED" if problem is DataError else "COMPLETED",
        runs[1]: "CANCELLED",
    }


def closed(home: Path, proxy: FailingProxy, run: str) -> None:
    """End a flow whose one part ended well on a cluster, and is not on record; the proxy is its server."""

    @flow(name="closed")
    def parts() -> None:
        mapper = PartMapper(home=home, runner="ray", settings=SETTINGS, runs=[run])
        mapper._states[run] = Completed()
        there = temporary_settings({PREFECT_API_URL: f"{proxy.url}/api"})
        with there, SyncClientContext(httpx_settings={}):  # not the client that the flow has already
            mapper.close()

    parts()


def test_a_part_that_the_server_records_late_is_no_failure_and_one_that_it_refuses_is(
    server: Server, data_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.mapping._TELLING", 0.0)
    late, refused = str(uuid4()), str(uuid4())

    def record() -> None:
        """As the server does it once it comes to it: with a key of its own."""
        row = {"id": late, "task_key": "part", "dynamic_key": "0", "state": {"type": "RUNNING"}}
        server_module.ask(f"{server.url}/task_runs/", {**row, "flow_run_id": None, "name": "late"})

    with in_front_of(server.url) as proxy:
        proxy.before(CREATION, 1, record)
        closed(data_folder, proxy, late)
        assert task_runs(server.url, [late]) == {late: "COMPLETED"}
        proxy.refuse(CREATION)
        with pytest.raises(PrefectHTTPStatusError, match="403"):
            closed(data_folder, proxy, refused)


CREATION = r"^POST /api/task_runs/$"
PARALLEL = 3


def ask(number: int, begun: list[int], ended: list[int], problem: type[BaseException]) -> None:
    """The first part ends once the other one asks; a request takes a minute, or until it is told to stop."""
    if number == 0:
        wait_until(lambda: len(begun) >= PARALLEL)
        if problem is DataError:
            raise DataError("this one is bad", "leave it out")
        return

    def request(number: int) -> None:
        begun.append(number)
        with suppress(Stopped):
            pause(60)
        ended.append(number)

    in_threads(request, range(2 * PARALLEL), PARALLEL)


def until_some_are_dropped(number: int, runs: list[str], submitted: int, full: threading.Event) -> None:
    """The first part ends once all are submitted; the others keep a worker busy until some are dropped."""
    if number == 0:
        wait_until(lambda: len(runs) >= submitted, 300)
        full.set()
    else:
        assert full.wait(300)
        wait_until(lambda: len(runs) < submitted)


def wait(log: Path) -> None:
    """Take a while."""
    time.sleep(0.1)
    with log.open("a") as stream:
        stream.write("x")


def call(function: Any, given: dict[str, Any], number: int) -> None:
    """Call a function with what is given."""
    function(**given)
