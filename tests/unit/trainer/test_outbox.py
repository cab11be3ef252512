"""MLflow is away while a training goes on: nothing waits for it, nothing ends, and no figure is lost."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fakes.tracking_server import TrackingServer, tracking_server
from fakes.trainings import changed, curve
from registry.digest import digest_bytes
from registry.errors import NetworkError
from trainer.errors import Interrupted
from trainer.launch import train
from trainer.outbox import RUN_NAME, WAITING_NAME, send_waiting
from trainer.recipe import Recipe
from trainer.stage import StageResult
from trainer.tracking import Tracker, log_evaluation

_GENEROUS = 120.0


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TrackingServer]:
    with tracking_server(tmp_path / "artifacts") as found:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", found.url)
        # MLflow's own seven tries take four minutes, which a training does not notice but a test does.
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        yield found


def begin(out: Path) -> Tracker:
    return Tracker("small", {"seed": 1}, out=out, recipe={"name": "small"})


def evaluation(folder: Path) -> StageResult:
    folder.mkdir()
    digest = digest_bytes(b"evaluation")
    return StageResult(stage="evaluate", folder=folder, key=digest, digest=digest, facts={"gain": 1.0})


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.name == "trainer.outbox"]


def test_an_outage_in_the_middle_costs_no_figure(server: TrackingServer, tmp_path: Path) -> None:
    tracker = begin(tmp_path)
    for step in range(1, 401):
        if step == 100:
            server.away = True
        tracker.metrics(step, {f"loss-{number}": float(step) for number in range(8)})
        if step == 200:
            tracker.picture(step, "grid", Image.new("RGB", (8, 8)))
        if step == 300:
            assert server.asked.acquire(timeout=_GENEROUS), "it was tried while it was away"
            server.away = False
    tracker.close("FINISHED")
    run = (tmp_path / RUN_NAME).read_text()
    for number in range(8):
        assert server.steps(run, f"loss-{number}") == list(range(1, 401))
    assert server.runs == {run: "FINISHED"}
    assert (server.artifacts / run / "grid" / "step-000200.png").is_file()
    assert not (tmp_path / WAITING_NAME).exists()


def test_what_never_arrived_is_sent_by_the_evaluation(
    server: TrackingServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "train"
    tracker = begin(out)
    server.away = True
    for step in range(1, 101):
        tracker.metrics(step, {f"loss-{number}": float(step) for number in range(10)})
    tracker.close("FINISHED")
    run, evaluated = (out / RUN_NAME).read_text(), evaluation(tmp_path / "evaluation")
    assert len(json.loads((out / WAITING_NAME).read_text())["figures"]) == 1000
    said = told(caplog)
    assert len(said) == 2, "that it is away, once, and what waits"
    assert str(out) in said[0]
    assert WAITING_NAME in said[1]

    assert log_evaluation(out, evaluated) is not None
    server.away = False
    assert log_evaluation(out, evaluated) is None
    assert server.steps(run, "loss-9") == list(range(1, 101))
    assert server.runs == {run: "FINISHED"}
    assert not (out / WAITING_NAME).exists()


def test_why_mlflow_has_no_evaluation_is_told_without_its_password(
    server: TrackingServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "train"
    begin(out).close("FINISHED")
    evaluated = evaluation(tmp_path / "evaluation")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url.replace("://", "://trainer:hidden@"))
    server.away = True
    problem = log_evaluation(out, evaluated)
    assert problem is not None
    assert "trainer:***@" in problem
    assert "hidden" not in problem


def test_a_server_that_stumbles_gets_no_second_run(server: TrackingServer, tmp_path: Path) -> None:
    first = begin(tmp_path)
    first.close("KILLED")
    server.failing = "runs/get"
    second = begin(tmp_path)
    assert second.run_id == first.run_id
    server.failing = ""
    second.close("FINISHED")
    assert server.runs == {first.run_id: "FINISHED"}
    server.runs.clear()  # somebody removed it for good
    third = begin(tmp_path)
    third.metrics(1, {"loss": 1.0})
    third.close("FINISHED")
    assert third.run_id != first.run_id
    assert server.runs == {third.run_id: "FINISHED"}
    assert (tmp_path / RUN_NAME).read_text() == third.run_id


def test_a_training_does_not_begin_without_mlflow(server: TrackingServer, tmp_path: Path) -> None:
    server.away = True
    with pytest.raises(NetworkError, match="takes no run") as caught:
        begin(tmp_path)
    assert server.url in caught.value.message
    assert "MLFLOW_TRACKING_URI" in caught.value.mend


def test_an_answer_that_comes_after_the_end_takes_nothing_away_that_was_left_for_the_next_start(
    server: TrackingServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.outbox._LAST_SECONDS_OF_OTHERS", 0.1)
    begin(tmp_path).close("FAILED")
    server.holding = "runs/update"
    second = begin(tmp_path)
    assert server.asked.acquire(timeout=_GENEROUS), "it is asked to take that the training runs again"
    second.metrics(5, {"loss": 1.0})
    second.close("KILLED")
    left = (tmp_path / WAITING_NAME).read_bytes()
    server.holding = ""
    server.let_go.set()
    for thread in threading.enumerate():
        if thread.name == "mlflow":
            thread.join(_GENEROUS)
    assert (tmp_path / WAITING_NAME).read_bytes() == left
    third = begin(tmp_path)
    third.close("FINISHED")
    assert server.steps(str(third.run_id), "loss") == [5]
    assert server.runs == {third.run_id: "FINISHED"}
    assert not (tmp_path / WAITING_NAME).exists()


#: A disk that is not there, an address that is none.
NOWHERE = ["sqlite:////dev/null/mlflow.db", "databricks-uc://trainer:hidden@nowhere"]


@pytest.mark.parametrize("address", NOWHERE)
def test_a_training_that_mlflow_does_not_know_yet_does_not_begin_with_an_address_that_leads_nowhere(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADAPTER_FOUNDRY_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    with pytest.raises(NetworkError, match="takes no run") as caught:
        begin(tmp_path)
    assert "MLFLOW_TRACKING_URI" in caught.value.mend
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize("address", NOWHERE)
def test_one_that_mlflow_knows_goes_on_and_its_figures_wait_for_an_address_that_leads_somewhere(
    address: str,
    server: TrackingServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("ADAPTER_FOUNDRY_HOME", str(tmp_path / "home"))
    begin(tmp_path).close("KILLED")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    second = begin(tmp_path)
    second.metrics(5, {"loss": 1.0})
    second.close("FINISHED")
    said = told(caplog)
    assert len(said) == 2
    assert not any("hidden" in one for one in said)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    send_waiting(tmp_path)
    assert server.steps(str(second.run_id), "loss") == [5]
    assert server.runs == {second.run_id: "FINISHED"}


def test_a_training_is_stopped_and_goes_on_while_mlflow_is_away(
    server: TrackingServer,
    tiny_recipe: Recipe,
    tiny_run: Path,
    tiny_base: Path,
    tiny_pipeline: Any,
    tmp_path: Path,
) -> None:
    recipe, out = changed(tiny_recipe, "running", log_every=1), tmp_path / "train"
    given = (tiny_run / "dataset", tiny_run / "cache", tiny_base)

    def stop(stage: str, done: int, total: int, note: str = "") -> None:
        server.away = done >= 3
        if done == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="asked to stop"):
        train(recipe, *given, out, stop, pipeline=tiny_pipeline)
    run = (out / RUN_NAME).read_text()
    assert (out / WAITING_NAME).is_file()
    assert server.runs == {run: "RUNNING"}

    def come_back(stage: str, done: int, total: int, note: str = "") -> None:
        server.away = done < 9

    result = train(recipe, *given, out, come_back, pipeline=tiny_pipeline)
    assert result.facts["run_id"] == run
    assert result.facts["resumed_from"] == 6
    assert server.steps(run, "loss") == [line["step"] for line in curve(out)] == list(range(1, 13))
    assert server.runs == {run: "FINISHED"}


def test_the_same_command_sends_what_a_training_that_is_done_still_owes(
    server: TrackingServer,
    tiny_recipe: Recipe,
    tiny_run: Path,
    tiny_base: Path,
    tiny_pipeline: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    recipe, out = changed(tiny_recipe, "running", log_every=1), tmp_path / "train"
    given = (recipe, tiny_run / "dataset", tiny_run / "cache", tiny_base, out)

    def go_away(stage: str, done: int, total: int, note: str = "") -> None:
        server.away = done >= 3

    result = train(*given, go_away, pipeline=tiny_pipeline)
    run, waiting = (out / RUN_NAME).read_text(), out / WAITING_NAME
    assert server.runs == {run: "RUNNING"}
    left = waiting.read_bytes()
    assert "the same command" in told(caplog)[-1]

    again = train(*given, pipeline=tiny_pipeline)  # and it is away still
    assert again.reused
    assert waiting.read_bytes() == left
    assert str(waiting) in told(caplog)[-1]

    server.away = False
    train(*given, pipeline=tiny_pipeline, track=False)
    assert waiting.exists(), "who does not track is not asked for MLflow"
    for more in ({"pipeline": tiny_pipeline}, {"processes": 2}):
        waiting.write_bytes(left)
        server.runs[run] = "RUNNING"
        assert train(*given, **more).digest == result.digest
        assert server.runs == {run: "FINISHED"}
        assert not waiting.exists()
    assert server.steps(run, "loss") == [line["step"] for line in curve(out)]
