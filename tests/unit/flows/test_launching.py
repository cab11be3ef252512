"""How a flow launches a training: whom it starts, what it hears, how it explains an end."""

from __future__ import annotations

import asyncio
import json
from datetime import timedelta
from pathlib import Path
from uuid import uuid4

import pytest
import torch
import yaml

from flows.errors import FlowError
from flows.heartbeat import EVERY, SILENCE, automation
from flows.launching import Listener, command, configuration
from flows.limits import GPU, wanted
from flows.settings import FlowSettings, prefect_environment
from trainer.errors import Interrupted, ProcessLost


@pytest.mark.parametrize(("processes", "kind"), [(1, "NO"), (3, "MULTI_GPU")])
def test_accelerate_gets_a_file_that_says_everything(tmp_path: Path, processes: int, kind: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    path, count = configuration(tmp_path / "train", FlowSettings(processes=processes))
    assert count == processes
    read = load_config_from_file(str(path))
    assert (read.num_processes, read.num_machines, read.distributed_type.value) == (processes, 1, kind)
    assert (read.mixed_precision.lower(), read.use_cpu) == ("no", not torch.cuda.is_available())


def test_a_file_of_ones_own_decides_and_its_processes_are_shared_among_machines(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(yaml.safe_dump({"num_processes": 16, "num_machines": 2}))
    assert configuration(tmp_path, FlowSettings(accelerate_config=mine)) == (mine, 8)


@pytest.mark.parametrize("content", [None, "[1, 2", "[]", "num_machines: 2", "num_processes: many"])
def test_a_file_that_is_none_is_explained(tmp_path: Path, content: str | None) -> None:
    mine = tmp_path / "mine.yaml"
    if content is not None:
        mine.write_text(content)
    with pytest.raises(FlowError, match="accelerate") as caught:
        configuration(tmp_path, FlowSettings(accelerate_config=mine))
    assert "ACCELERATE_CONFIG" in caught.value.mend


def test_one_process_computes_with_as_many_threads_as_this_one(tmp_path: Path) -> None:
    words = command(tmp_path / "accelerate.json", tmp_path / "job.json", 1)
    assert words[words.index("--num_cpu_threads_per_process") + 1] == str(torch.get_num_threads())
    assert words[-3:] == ["trainer.launch", str(tmp_path / "job.json"), "--tell"]


class Ear:
    """Takes progress and log lines."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int]] = []
        self.lines: list[str] = []
        self.listener = Listener(self.progress, self.lines.append)
        self.listener._gauge.show = lambda done, total: None  # type: ignore[method-assign]

    def progress(self, stage: str, done: int, total: int, note: str = "") -> None:
        self.steps.append((done, total))


def test_progress_moves_the_display_and_everything_else_is_logged() -> None:
    ear = Ear()
    ear.listener.hear("stdout", json.dumps({"stage": "train", "done": 2, "total": 9, "note": ""}))
    ear.listener.hear("stdout", "a word")
    # Only stdout has news: who writes such a line to stderr gets it logged.
    ear.listener.hear("stderr", json.dumps({"stage": "train", "done": 3, "total": 9, "note": ""}))
    assert ear.steps == [(2, 9)]
    assert len(ear.lines) == 2


def test_of_several_problems_the_cause_is_told_and_not_who_was_left_alone(tmp_path: Path) -> None:
    ear = Ear()
    for name in ("ProcessLost", "Interrupted"):
        ear.listener.hear("stdout", json.dumps({"error": name, "message": name, "mend": ""}))
    assert isinstance(ear.listener.why(1, tmp_path), Interrupted)
    alone = Ear()
    alone.listener.hear("stdout", json.dumps({"error": "ProcessLost", "message": "m", "mend": ""}))
    assert isinstance(alone.listener.why(1, tmp_path), ProcessLost)


def test_a_training_that_is_killed_is_explained_by_its_last_words(tmp_path: Path) -> None:
    ear = Ear()
    for number in range(40):
        ear.listener.hear("stderr", f"line {number}")
    error = ear.listener.why(137, tmp_path)
    assert isinstance(error, FlowError)
    assert "by signal 9" in error.message
    assert "line 39" in error.message
    assert "line 24" not in error.message
    assert "memory" in error.mend
    assert str(tmp_path) in error.mend


def test_a_page_that_cannot_be_drawn_stops_no_training() -> None:
    ear = Ear()

    def broken(done: int, total: int) -> None:
        raise ConnectionError("the server is away")

    ear.listener._gauge.show = broken  # type: ignore[method-assign]
    ear.listener.hear("stdout", json.dumps({"stage": "train", "done": 2, "total": 9, "note": ""}))
    assert ear.steps == [(2, 9)]
    assert "the server is away" in ear.lines[0]


def test_limits_follow_the_settings() -> None:
    usual, said = wanted(FlowSettings()), wanted(FlowSettings(gpu_slots=4, api_per_minute=30))
    assert usual[GPU].slots >= 1
    assert not usual[GPU].said
    assert (said[GPU].slots, said[GPU].said) == (4, True)
    assert (said["gemini-api"].per_second, said["gemini-api"].slots) == (0.5, 1)
    assert set(usual) == {"gpu", "gemini-api", "openai-api"}


def test_a_run_that_waits_for_people_is_not_taken_for_a_dead_one() -> None:
    trigger = automation().model_dump(mode="json")["trigger"]
    assert trigger["posture"] == "Proactive"
    assert trigger["within"] == SILENCE >= 3 * EVERY
    expected = {name.removeprefix("prefect.flow-run.") for name in trigger["expect"]}
    assert {"heartbeat", "Suspended", "Paused", "Completed", "Failed", "Cancelled", "Crashed"} <= expected


def test_slots_outlive_the_server_that_granted_them(tmp_path: Path) -> None:
    """Prefect's own choice keeps leases in the server's memory: after a restart their slots never return."""
    from importlib import import_module

    name = prefect_environment(tmp_path)["PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE"]
    storage = import_module(name).ConcurrencyLeaseStorage(tmp_path / "leases")

    async def granted() -> None:
        await storage.create_lease([uuid4()], timedelta(seconds=60))
        later = import_module(name).ConcurrencyLeaseStorage(tmp_path / "leases")
        assert len(await later.read_active_lease_ids()) == 1

    asyncio.run(granted())
