"""Who works on a GPU beside a training holds its slot, too: encoding and evaluating wait for each other."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextvars import copy_context
from pathlib import Path
from typing import Any

import pytest
import torch

from flows import limits
from flows.dataset import cache
from flows.production import NOTHING
from flows.server import Server, ask, attached, managed_server
from flows.settings import FlowSettings
from flows.training import evaluate
from trainer import recipe as recipes
from trainer.parts import here
from trainer.progress import silent

_GENEROUS = 300.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with one GPU slot, which this process works with."""
    folder = tmp_path_factory.mktemp("limits")
    with managed_server(folder) as found, attached(folder, found.url):
        limits.ensure(settings=FlowSettings(gpu_slots=1))
        yield found


class Ear(logging.Handler):
    """Hears when somebody waits for a slot."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        if "GPU slots are taken: waiting" in record.getMessage():
            self.waiting.set()


@pytest.fixture
def ear() -> Iterator[Ear]:
    heard, logger = Ear(), logging.getLogger("prefect.task_runs")
    logger.addHandler(heard)
    yield heard
    logger.removeHandler(heard)


def work(kind: str, folder: Path) -> Any:
    """Do a stage on folders where nothing is, which ends as soon as it begins; return its state."""
    recipe = recipes.load("pixelsmile-portraits")
    absent = {"base": folder / "base", "out": folder / "out", "progress": silent, "return_state": True}
    if kind == "cache":
        return cache(recipe=recipe, dataset=folder / "dataset", **absent)
    return evaluate(
        recipe=recipe,
        trained=folder / "train",
        data=folder / "dataset",
        home=folder,
        against=NOTHING,
        rules={},
        mapper=here,
        **absent,
    )


def started(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """Do work in a thread that uses the same server; its answer comes into the list."""
    answers: list[Any] = []
    context = copy_context()
    thread = threading.Thread(target=lambda: answers.append(context.run(work)), daemon=True)
    thread.start()
    return thread, answers


def taken(server: Server) -> int:
    rows = ask(f"{server.url}/v2/concurrency_limits/filter", {"limit": 50}, 120)
    return next(row["active_slots"] for row in rows if row["name"] == "gpu")


@pytest.mark.parametrize("kind", ["cache", "evaluate"])
def test_on_a_gpu_it_waits_for_its_slot(
    kind: str, server: Server, ear: Ear, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("ADAPTER_FOUNDRY_SERVING_DEVICE", "cuda:0")
    with limits.gpus(1, print):
        thread, answers = started(lambda: work(kind, tmp_path))
        assert ear.waiting.wait(_GENEROUS)
        assert answers == []
    thread.join(_GENEROUS)
    assert [state.is_failed() for state in answers] == [True], "there was nothing to work on"
    assert taken(server) == 0


@pytest.mark.parametrize("kind", ["cache", "evaluate"])
def test_on_the_processor_it_needs_none(
    kind: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with limits.gpus(1, print):
        thread, answers = started(lambda: work(kind, tmp_path))
        thread.join(_GENEROUS)
        assert [state.is_failed() for state in answers] == [True]
        assert taken(server) == 1
