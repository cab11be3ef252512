"""Who works on a GPU beside a training holds its slot, too: encoding and evaluating wait for each other.

No GPU is needed for that: torch is made to say that it has four.
"""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import copy_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fakes.averaging_base import AveragingBase
from fakes.datasets import small_dataset
from flows import limits
from flows.dataset import cache
from flows.errors import FlowError
from flows.production import NOTHING
from flows.server import Server, ask, attached, managed_server
from flows.settings import FlowSettings
from flows.training import evaluate
from trainer import recipe as recipes
from trainer.data import cache_dataset
from trainer.parts import here
from trainer.progress import silent

_GENEROUS = 300.0
RECIPE = recipes.change(recipes.load("pixelsmile-portraits"), {"precision.compute": "fp32"})


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


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset, a base without weights, and in ``out`` all that a training needs of them."""
    folder = tmp_path_factory.mktemp("encoded")
    (folder / "base").mkdir()
    pictures = {
        split: [np.full((64, 64, 3), value + face, np.uint8) for face in range(3)]
        for split, value in (("train", 0), ("validation", 9))
    }
    small_dataset(folder / "dataset", [(split, split, faces) for split, faces in pictures.items()])
    cache_dataset(RECIPE, folder / "dataset", folder / "base", folder / "out", pipeline=AveragingBase())
    return folder


def without_tensors(folder: Path, encoded: Path) -> Path:
    """Return a copy of which everything is still to be encoded; that ends as soon as the base is loaded."""
    shutil.copytree(encoded, folder, ignore=shutil.ignore_patterns("tensors-*"), dirs_exist_ok=True)
    return folder


def work(kind: str, folder: Path) -> Any:
    """Do a stage in a folder; return its state."""
    about = {"base": folder / "base", "out": folder / "out", "progress": silent, "return_state": True}
    if kind == "cache":
        return cache(recipe=RECIPE, dataset=folder / "dataset", **about)
    return evaluate(
        recipe=RECIPE,
        trained=folder / "train",
        data=folder / "dataset",
        home=folder,
        against=NOTHING,
        rules={},
        mapper=here,
        **about,
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


@contextmanager
def slots(count: int) -> Iterator[None]:
    """Have somebody change the limit in Prefect's page, and change it back."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        client.upsert_global_concurrency_limit_by_name(limits.GPU, count)
        try:
            yield
        finally:
            client.upsert_global_concurrency_limit_by_name(limits.GPU, 1)


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("ADAPTER_FOUNDRY_SERVING_DEVICE", "cuda:0")


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize("kind", ["cache", "evaluate"])
def test_on_a_gpu_it_waits_for_its_slot(
    kind: str, server: Server, ear: Ear, encoded: Path, tmp_path: Path
) -> None:
    without_tensors(tmp_path, encoded)
    with limits.gpus(1, print):
        thread, answers = started(lambda: work(kind, tmp_path))
        assert ear.waiting.wait(_GENEROUS)
        assert answers == []
    thread.join(_GENEROUS)
    assert [state.is_failed() for state in answers] == [True], "there was nothing to work with"
    assert taken(server) == 0


@pytest.mark.usefixtures("four_gpus")
def test_who_has_nothing_to_encode_waits_for_nobody(server: Server, encoded: Path) -> None:
    with limits.gpus(1, print):
        thread, answers = started(lambda: work("cache", encoded))
        thread.join(_GENEROUS)
        assert [state.is_completed() for state in answers] == [True]
        assert answers[0].result()["reused"]
        assert taken(server) == 1


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize(("worth", "processes", "asked"), [(None, None, 1), (1, "2", 2), (1, None, 4)])
def test_encoding_takes_as_many_gpus_as_it_has_work_for_and_may_use(
    worth: int | None,
    processes: str | None,
    asked: int,
    server: Server,
    ear: Ear,
    encoded: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It waits while one slot is lacking, and goes on as soon as that is free."""
    if worth is not None:
        monkeypatch.setattr("trainer.data.cache._PER_PROCESS", worth)
    if processes is not None:
        monkeypatch.setenv("ADAPTER_FOUNDRY_FLOWS_PROCESSES", processes)
    without_tensors(tmp_path, encoded)
    with slots(4), ExitStack() as others:
        if asked < 4:
            others.enter_context(limits.gpus(4 - asked, print))
        with limits.gpus(1, print):
            thread, answers = started(lambda: work("cache", tmp_path))
            assert ear.waiting.wait(_GENEROUS)
            # Somebody else encodes all of it meanwhile: what is asked for is taken, and nothing is started.
            shutil.copytree(encoded / "out", tmp_path / "out", dirs_exist_ok=True)
            assert answers == []
        thread.join(_GENEROUS)
        assert [state.is_completed() for state in answers] == [True]
        assert answers[0].result()["reused"]
        assert taken(server) == 4 - asked
    assert taken(server) == 0


@pytest.mark.usefixtures("server")
def test_who_can_do_with_fewer_is_told_how_many() -> None:
    with limits.gpus(4, print, fewer=True) as granted:
        assert granted == 1


@pytest.mark.usefixtures("server", "four_gpus")
def test_the_stage_that_can_never_have_a_gpu_is_named(tmp_path: Path) -> None:
    with slots(0):
        state = work("evaluate", tmp_path)
    assert state.is_failed()
    with pytest.raises(FlowError, match=r"the stage evaluate takes more GPUs \(1\) .* slots \(0\)") as caught:
        state.result()
    assert "GPU_SLOTS" in caught.value.mend
    assert "PROCESSES" not in caught.value.mend, "fewer than one is no advice"


@pytest.mark.parametrize("kind", ["cache", "evaluate"])
def test_on_the_processor_it_needs_none(
    kind: str, server: Server, encoded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    without_tensors(tmp_path, encoded)
    with limits.gpus(1, print):
        thread, answers = started(lambda: work(kind, tmp_path))
        thread.join(_GENEROUS)
        assert [state.is_failed() for state in answers] == [True]
        assert taken(server) == 1
