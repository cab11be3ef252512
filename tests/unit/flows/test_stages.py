"""Stages as Prefect tasks: reused by key, done again when their folder is gone, recorded in every case."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prefect import flow, task
from prefect.exceptions import Pause
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Suspended

from flows.display import Display
from flows.errors import ServerError, StageFailed
from flows.job import running
from flows.parameters import RecipeChoice
from flows.server import Server, attached, managed_server, task_runs, wait_until_recorded
from flows.settings import prefect_home
from flows.stages import Job, code_digest, in_words, made
from registry.digest import digest_bytes
from trainer.errors import DataError
from trainer.progress import Progress
from trainer.stage import StageResult, finished, new_folder, stage_key, unused, write_result


@task(name="double", description="twice the number")
def double(number: int, calls: list[int], out: Path, progress: Progress) -> dict[str, Any]:
    """Write twice the number into a folder."""
    calls.append(number)
    with new_folder(out) as folder:
        (folder / "answer").write_text(str(2 * number))
        result = StageResult(
            stage="double",
            folder=out,
            key=stage_key("double", number=number),
            digest=digest_bytes(str(2 * number).encode()),
            facts={"answer": 2 * number},
        )
        write_result(folder, result)
    progress("double", 1, 1)
    return result.as_json()


@task(name="attempt", description="another answer on each attempt")
def attempt(answer: str, killed: bool, out: Path, progress: Progress) -> dict[str, Any]:
    """Leave an answer in a folder, unless there is one; a killed one leaves it and never returns."""
    key = stage_key("attempt")
    if there := finished(out, key):
        return there.as_json()
    digest = digest_bytes(answer.encode())
    result = StageResult(stage="attempt", folder=out, key=key, digest=digest, facts={})
    with new_folder(out) as folder:
        (folder / "answer").write_text(answer)
        write_result(folder, result)
    if killed:
        raise DataError("killed before Prefect wrote the result down", "run it again")
    return result.as_json()


@task(name="refuse", description="always refuses")
def refuse(progress: Progress) -> dict[str, Any]:
    """Refuse with an explained error."""
    raise DataError("there is nothing to work on", "make something first")


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One data folder for the module."""
    return tmp_path_factory.mktemp("flows-stages")


@pytest.fixture(scope="module")
def server(data_folder: Path) -> Iterator[Server]:
    """One server for the module, and this process set to use it."""
    with managed_server(data_folder) as server, attached(data_folder, server.url):
        yield server


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """A run that shows nothing."""
    return Job(home=tmp_path, root=tmp_path / "runs", display=Display(1, io.StringIO()))


def test_a_stage_is_reused_by_its_key_and_done_again_without_its_folder(
    server: Server, tmp_path: Path
) -> None:
    calls: list[int] = []
    seen: list[Job] = []

    @flow(name="numbers")
    def numbers(number: int) -> bool:
        seen.append(Job(home=tmp_path, root=tmp_path / "runs", display=Display(1, io.StringIO())))
        result = seen[-1].cached(double, key={"number": number}, number=number, calls=calls)
        assert (result.folder / "answer").read_text() == str(2 * number)
        assert made(result.folder).digest == result.digest
        return result.reused

    assert numbers(3) is False
    assert numbers(3) is True
    assert numbers(4) is False
    assert calls == [3, 4]
    for path in (tmp_path / "runs").iterdir():
        (path / "stage.json").unlink()
    assert numbers(3) is False
    assert calls == [3, 4, 3]
    runs = [run for job in seen for run in job.runs]
    wait_until_recorded(server.url, runs, 180)
    assert task_runs(server.url, runs) == dict.fromkeys(runs, "COMPLETED")


def attempted(home: Path, root: str, answer: str, killed: bool = False) -> StageResult | None:
    """Run a flow of one stage with the same inputs wherever its folder lies; a killed one returns None."""

    @flow(name="attempts")
    def attempts() -> StageResult | None:
        job = Job(home=home, root=home / root, display=Display(1, io.StringIO()))
        try:
            return job.cached(attempt, key={}, answer=answer, killed=killed)
        except DataError:
            return None

    return attempts()


def test_what_is_made_again_elsewhere_is_never_taken_from_the_first_place(
    server: Server, tmp_path: Path
) -> None:
    """Otherwise a reproduction that was killed at the right moment compares a release with itself."""
    first = attempted(tmp_path, "runs/a", "first")
    assert first is not None
    assert attempted(tmp_path, "reproductions/a", "again", killed=True) is None
    again = attempted(tmp_path, "reproductions/a", "never done")
    assert again is not None
    assert again.reused
    assert again.folder.is_relative_to(tmp_path / "reproductions")
    assert (again.folder / "answer").read_text() == "again"
    assert again.digest == made(again.folder).digest == digest_bytes(b"again")
    # And the other way round: the first place is what it was, also when the other one is gone.
    shutil.rmtree(tmp_path / "reproductions")
    assert attempted(tmp_path, "runs/a", "never done") == replace(first, reused=True)


def test_an_attempt_that_prefect_did_not_record_is_what_counts(server: Server, tmp_path: Path) -> None:
    first = attempted(tmp_path, "runs/b", "first")
    assert first is not None
    shutil.rmtree(first.folder)
    assert attempted(tmp_path, "runs/b", "second", killed=True) is None
    found = attempted(tmp_path, "runs/b", "never done")
    assert found is not None
    assert (found.folder / "answer").read_text() == "second"
    assert found.digest == digest_bytes(b"second")


def test_a_data_folder_that_was_moved_has_its_stages(server: Server, tmp_path: Path) -> None:
    old = attempted(tmp_path / "old", "runs/c", "first")
    assert old is not None
    (tmp_path / "old").rename(tmp_path / "new")
    found = attempted(tmp_path / "new", "runs/c", "never done")
    assert found is not None
    assert found.reused
    assert found.folder == tmp_path / "new" / old.folder.relative_to(tmp_path / "old")
    assert found.digest == old.digest


def test_a_stage_that_names_another_folder_is_refused(server: Server, job: Job, tmp_path: Path) -> None:
    @task(name="elsewhere", description="says that its output lies somewhere else")
    def elsewhere(out: Path, progress: Progress) -> dict[str, Any]:
        digest = digest_bytes(b"x")
        return StageResult(stage="elsewhere", folder=tmp_path, key=digest, digest=digest).as_json()

    @flow(name="misled")
    def misled() -> None:
        job.cached(elsewhere, key={})

    with pytest.raises(StageFailed, match="says that its output lies in"):
        misled()


@task(name="lasting", description="takes longer than a clean-up waits")
def lasting(before: Path, seen: list[bool], out: Path, progress: Progress) -> dict[str, Any]:
    """Look whether a clean-up could come while the folder of an earlier stage grows old."""
    age(before)
    with unused(before.parent) as free:
        seen.append(free)
    return double.fn(1, [], out, progress)


def age(folder: Path) -> None:
    """Nobody has touched it for 40 days."""
    then = time.time() - 40 * 86_400
    for path in (*folder.rglob("*"), folder):
        os.utime(path, (then, then))


def days_ahead(folder: Path) -> float:
    """How many days from now a clean-up counts from."""
    return (folder.stat().st_mtime - time.time()) / 86_400


def test_what_a_run_uses_is_young_when_it_ends_and_locked_until_then(server: Server, tmp_path: Path) -> None:
    root, seen = tmp_path / "runs" / "a", list[bool]()

    @flow(name="long")
    def long() -> Path:
        job = Job(home=tmp_path, root=root, display=Display(2, io.StringIO()))
        first = job.cached(double, key={"number": 5}, number=5, calls=[]).folder
        assert days_ahead(first) > -1
        job.always(lasting, before=first, seen=seen, out=tmp_path / "x")
        return first

    first = long()
    assert seen == [False]
    assert days_ahead(first) > -1
    age(first)
    with unused(root) as free:
        assert free, "the run is over"
    assert long() == first
    assert seen == [False, False]


def test_a_run_that_waits_for_people_keeps_what_it_goes_on_with(server: Server, home: Path) -> None:
    recipe = RecipeChoice(recipe="pixelsmile-portraits").load()
    folders: list[Path] = []

    @flow(name="waiting")
    def waiting(number: int, signal: bool) -> None:
        with running("release", recipe, "threads") as job:
            folders.append(job.cached(double, key={"number": number}, number=number, calls=[]).folder)
            if signal:
                raise Pause(state=Suspended())

    waiting(1, signal=False)
    with pytest.raises(Pause):
        waiting(2, signal=True)
    waiting(2, signal=False)  # it goes on, or another run of the recipe does
    ended, waited = days_ahead(folders[0]), days_ahead(folders[1])
    assert ended < 1
    assert 6 < waited < 8


def test_why_a_run_failed_is_told_also_when_the_server_is_gone_by_then(server: Server, home: Path) -> None:
    recipe = RecipeChoice(recipe="pixelsmile-portraits").load()

    @flow(name="failing")
    def failing(refused: bool) -> None:
        with ExitStack() as until_the_end, running("dataset", recipe, "threads") as job:
            with suppress(DataError):
                job.always(refuse)
            until_the_end.enter_context(temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}))
            if refused:
                raise DataError("there is nothing to work on", "make something first")

    with pytest.raises(DataError) as caught:
        failing(refused=True)
    assert caught.value.mend == "make something first"
    with pytest.raises(ServerError, match="does not say what it has recorded"):
        failing(refused=False)


def test_what_protects_runs_every_time(server: Server, job: Job, tmp_path: Path) -> None:
    calls: list[int] = []

    @flow(name="always")
    def always() -> None:
        job.always(double, number=1, calls=calls, out=tmp_path / "a")
        job.always(double, number=1, calls=calls, out=tmp_path / "a")

    always()
    assert calls == [1, 1]


def test_an_explained_error_passes_through_and_is_recorded(server: Server, job: Job) -> None:
    @flow(name="refused")
    def refused() -> None:
        job.always(refuse)

    with pytest.raises(DataError, match="nothing to work on"):
        refused()
    wait_until_recorded(server.url, job.runs, 180)
    assert task_runs(server.url, job.runs) == dict.fromkeys(job.runs, "FAILED")


def test_results_are_json_and_no_pickle(server: Server, job: Job, data_folder: Path) -> None:
    @flow(name="stored")
    def stored() -> None:
        job.cached(double, key={"number": 77}, number=77, calls=[])

    stored()
    files = [
        path for path in (prefect_home(data_folder) / "storage").iterdir() if path.name.startswith("double-")
    ]
    assert files
    for path in files:
        record = json.loads(path.read_bytes())
        assert record["metadata"]["serializer"]["type"] == "json"


PROGRAM = """
import io, sys
from pathlib import Path
from flows.settings import prepare
from flows.server import attached, managed_server, wait_until_recorded
home = Path(sys.argv[1])
prepare(home)
with managed_server(home) as server:
    from prefect import flow, task
    @task
    def number(value: int) -> int:
        return value
    @flow(name="twenty")
    def twenty() -> list[str]:
        states = [number(value, return_state=True) for value in range(20)]
        runs = [str(state.state_details.task_run_id) for state in states]
        wait_until_recorded(server.url, runs, 180)
        return runs
    with attached(home, server.url):
        print(*twenty())
"""


def test_every_task_run_can_be_read_after_the_process_has_ended(tmp_path: Path) -> None:
    """Prefect's built-in temporary server loses half of twenty task runs; the managed one loses none."""
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    runs = ended.stdout.split()
    assert len(runs) == 20
    with managed_server(tmp_path) as later:
        assert not later.reused
        assert task_runs(later.url, runs) == dict.fromkeys(runs, "COMPLETED")


def test_the_code_digest_leaves_out_what_is_named() -> None:
    assert code_digest() == code_digest()
    assert code_digest(("trainer/evaluation/",)) != code_digest()


def test_facts_become_one_line() -> None:
    facts = {
        "images": 12,
        "top1_accuracy": 0.91666,
        "folder": "x" * 50,
        "license": "MIT",
        "none": None,
        "a.base": 1,
    }
    assert in_words(facts) == "top1 accuracy 0.9167, images 12, license MIT"
