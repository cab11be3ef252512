"""Parts of stages on a real Ray cluster: the same bytes, errors explained, a killed worker."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from prefect import flow

from flows.mapping import part_mapper
from flows.server import Server, attached, managed_server, task_runs, wait_until_recorded
from flows.settings import FlowSettings
from registry.digest import digest_bytes
from trainer.errors import DataError
from trainer.parts import in_parts

pytestmark = pytest.mark.slow
SETTINGS = FlowSettings(workers=2)
KEY = digest_bytes(b"parts")


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One data folder for the module."""
    return tmp_path_factory.mktemp("flows-ray")


@pytest.fixture(scope="module")
def server(data_folder: Path) -> Iterator[Server]:
    """One server for the module, and this process set to use it."""
    with managed_server(data_folder) as server, attached(data_folder, server.url):
        yield server


def work(folder: Path, *, number: int, log: str) -> dict[str, Any]:
    """Refuse the third part, die in the first attempt of the second, and tell who did the others."""
    marker = folder / "killed"
    if number == 2 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 3 and not (folder / "again").exists():
        time.sleep(1)
        raise DataError("the third is bad", "leave it out")
    with Path(log).open("a") as stream:
        stream.write(f"{number}\n")
    return {"square": number * number, "process": os.getpid(), "home": os.environ["ADAPTER_FOUNDRY_HOME"]}


def children() -> set[int]:
    return {process.pid for process in psutil.Process().children(recursive=True)}


def test_parts_on_ray_survive_a_killed_worker_and_explain_their_errors(
    server: Server, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.local_ray._STARTS", 15)  # the suite's machine is busy
    out, log, runs, before = tmp_path / "out", tmp_path / "log", [], children()
    given = [{"number": number, "log": str(log)} for number in range(6)]

    @flow(name="squares")
    def squares() -> None:
        with part_mapper(data_folder, "ray", SETTINGS, runs) as mapper:
            with pytest.raises(DataError) as problem:
                in_parts("squares", out, KEY, work, given, mapper)
            assert (problem.value.message, problem.value.mend) == ("the third is bad", "leave it out")
            (out.with_name(f".out-{KEY.hex[:16]}.parts") / "again").touch()
            _, answers = in_parts("squares", out, KEY, work, given, mapper)
            assert [answer["square"] for answer in answers] == [number**2 for number in range(6)]
            assert {answer["process"] for answer in answers} - {os.getpid()}
            homes = {answer["home"] for answer in answers if answer["process"] != os.getpid()}
            assert homes == {str(data_folder)}

    # Ray's workers import this module without the folders of the tests.
    from fakes.followed import wait_until

    squares()
    assert sorted(log.read_text().split()) == [str(number) for number in range(6)], "each part once"
    wait_until_recorded(server.url, runs, 180)
    states = list(task_runs(server.url, runs).values())
    assert states.count("FAILED") == 1
    assert states.count("COMPLETED") == len(states) - 1
    wait_until(lambda: children() <= before)  # the cluster is gone
