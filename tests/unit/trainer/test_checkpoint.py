"""Checkpoints: whole or never chosen, whatever happens to the disk or to the process that writes."""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from fakes.trainings import assert_same_tensors
from registry.manifest import Provenance
from trainer import checkpoint, optimisers
from trainer.checkpoint import Checkpoint, TrainingState
from trainer.ema import Ema
from trainer.errors import CheckpointError
from trainer.parallel import Processes
from trainer.provenance import machine
from trainer.sections import EmaSection, OptimiserSection

KEY = "sha256:" + "1" * 64
NUMBERS = {"d": 0.1 + 0.2, "least": 5e-324, "growth_rate": math.inf, "betas": [0.9, 0.98], "k": 7, "no": None}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with nothing else in it."""
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


def made(step: int, key: str = KEY, **numbers: object) -> Checkpoint:
    source = torch.Generator().manual_seed(step)
    tensors = {
        "weights/a.weight": torch.randn(8, 4, generator=source),
        "optimiser/state1/a.weight": torch.randint(0, 255, (8, 4), dtype=torch.uint8, generator=source),
        "optimiser/step/a.weight": torch.tensor(float(step)),
    }
    return Checkpoint(step=step, key=key, seconds=1.5, numbers={**NUMBERS, **numbers}, tensors=tensors)


def test_a_checkpoint_comes_back_to_the_bit(folder: Path) -> None:
    given = made(7)
    assert checkpoint.save(folder, given) == folder / "step-000007"
    assert sorted(path.name for path in (folder / "step-000007").iterdir()) == [
        "state.json", "tensors.safetensors",
    ]  # fmt: skip
    found = checkpoint.latest(folder, KEY)
    assert found is not None
    assert (found.step, found.key, found.seconds) == (7, KEY, 1.5)
    assert found.numbers == NUMBERS
    assert_same_tensors(found.tensors, given.tensors)
    assert set(found.group("optimiser")) == {"state1/a.weight", "step/a.weight"}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def other_number(path: Path) -> None:
    text = path.read_text()
    assert '"k": 7' in text
    path.write_text(text.replace('"k": 7', '"k": 8'))


def other_step(path: Path) -> None:
    path.write_text(path.read_text().replace('"step": 20', '"step": 21'))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def no_object(path: Path) -> None:
    path.write_text("[1, 2]")


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json"])
@pytest.mark.parametrize("damage", [cut, flip, empty, Path.unlink])
def test_a_damaged_checkpoint_is_never_chosen(
    name: str, damage: Callable[[Path], None], folder: Path
) -> None:
    for step in (10, 20):
        checkpoint.save(folder, made(step))
    damage(folder / "step-000020" / name)
    found = checkpoint.latest(folder, KEY)
    assert found is not None
    assert found.step == 10
    damage(folder / "step-000010" / name)
    assert checkpoint.latest(folder, KEY) is None


@pytest.mark.parametrize("damage", [other_number, other_step, no_object])
def test_a_state_that_was_changed_is_never_chosen(damage: Callable[[Path], None], folder: Path) -> None:
    for step in (10, 20):
        checkpoint.save(folder, made(step))
    damage(folder / "step-000020" / "state.json")
    found = checkpoint.latest(folder, KEY)
    assert found is not None
    assert found.step == 10


def test_tensors_of_another_checkpoint_are_never_chosen(folder: Path) -> None:
    for step in (10, 20):
        checkpoint.save(folder, made(step))
    name = "tensors.safetensors"
    shutil.copy(folder / "step-000010" / name, folder / "step-000020" / name)
    found = checkpoint.latest(folder, KEY)
    assert found is not None
    assert found.step == 10


def test_a_checkpoint_of_another_training_is_refused(folder: Path) -> None:
    checkpoint.save(folder, made(3, key="sha256:" + "0" * 64))
    with pytest.raises(CheckpointError, match="another recipe") as caught:
        checkpoint.latest(folder, KEY)
    assert "remove" in caught.value.mend


def test_the_newest_stay_and_the_order_is_that_of_numbers(folder: Path) -> None:
    (folder / "step-notes").mkdir()
    for step in (999_999, 1_000_000, 1_000_001):
        checkpoint.save(folder, made(step), keep=2)
    assert sorted(path.name for path in folder.iterdir()) == ["step-1000000", "step-1000001", "step-notes"]
    found = checkpoint.latest(folder, KEY)
    assert found is not None
    assert found.step == 1_000_001


def test_a_damaged_newer_checkpoint_never_drives_out_a_whole_one(folder: Path) -> None:
    """After a fall-back the training saves below the damaged one: that goes, the new one stays."""
    for step in (10, 20):
        checkpoint.save(folder, made(step), keep=1)
    cut(folder / "step-000020" / "state.json")
    checkpoint.save(folder, made(15), keep=1)
    assert [path.name for path in folder.iterdir()] == ["step-000015"]


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """Let writes beyond ``size`` bytes of a file fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 100, 450])
def test_a_full_disk_leaves_the_older_checkpoint(size: int, folder: Path) -> None:
    """The limits cut the tensors at once, the tensors later, and the state."""
    checkpoint.save(folder, made(10), keep=1)
    tensors = (folder / "step-000010" / "tensors.safetensors").stat().st_size
    state = (folder / "step-000010" / "state.json").stat().st_size
    assert 100 < tensors < 450 < state
    with no_file_above(size), pytest.raises(CheckpointError, match="could not be written") as caught:
        checkpoint.save(folder, made(20), keep=1)
    assert "room" in caught.value.mend
    assert [path.name for path in folder.iterdir()] == ["step-000010"]
    found = checkpoint.latest(folder, KEY)
    assert found is not None
    assert found.step == 10


def state_in(folder: Path) -> TrainingState:
    source = torch.Generator().manual_seed(0)
    parameters = {"a.weight": torch.nn.Parameter(torch.randn(64, 64, generator=source))}
    settings = OptimiserSection(learning_rate=0.1, warmup_steps=0, steps=9, batch_pairs=1)
    return TrainingState(
        parameters=parameters,
        optimiser=optimisers.build(parameters, settings),
        ema=Ema(parameters, EmaSection()),
        folder=folder,
        key=KEY,
        made=Provenance(recipe="{}", code=KEY, machine=machine()),
        processes=Processes(),
        keep=2,
    )


def step(state: TrainingState) -> None:
    for parameter in state.parameters.values():
        parameter.grad = parameter.detach().clone()
    state.optimiser.step()
    state.ema.update(state.parameters)
    state.steps = (state.steps or 0) + 1


def test_what_is_written_in_the_background_is_the_state_when_it_was_asked(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training goes on while the disk is slow; the writer has a copy of its own."""
    slow, state = threading.Event(), state_in(folder)
    step(state)
    before = {name: value.detach().clone() for name, value in state.parameters.items()}
    real = os.fsync

    def held_up(handle: int) -> None:
        slow.wait(120)
        real(handle)

    monkeypatch.setattr(os, "fsync", held_up)
    state.save(1.0, {"policy": {}}, wait=False)
    step(state)  # not held up
    assert checkpoint.latest(folder, KEY) is None
    slow.set()
    state.settle()
    found = checkpoint.latest(folder, KEY)
    assert found is not None
    assert found.step == 1
    assert_same_tensors(found.group("weights"), before)


def test_a_failed_write_is_told_and_tried_again(folder: Path) -> None:
    state = state_in(folder)
    step(state)
    with no_file_above(0):
        state.save(1.0, {}, wait=False)
        with pytest.raises(CheckpointError, match="could not be written"):
            state.settle()
    assert checkpoint.latest(folder, KEY) is None
    state.save(1.0, {})
    assert checkpoint.latest(folder, KEY) is not None


def test_only_whole_steps_are_saved_and_each_once(folder: Path) -> None:
    state = state_in(folder)
    state.save(1.0, {})
    assert list(folder.iterdir()) == []
    step(state)
    state.steps = None
    state.save(1.0, {})
    assert list(folder.iterdir()) == []
    state.steps = 1
    state.save(1.0, {})
    written = (folder / "step-000001" / "state.json").stat().st_mtime_ns
    state.save(2.0, {})
    assert (folder / "step-000001" / "state.json").stat().st_mtime_ns == written


def test_what_a_killed_process_left_is_swept_up(folder: Path) -> None:
    state = state_in(folder)
    step(state)
    state.save(1.0, {})
    left = folder / ".step-000002.4711.tmp"
    shutil.copytree(folder / "step-000001", left)
    fresh = state_in(folder)
    found = fresh.restore()
    assert found is not None
    assert fresh.steps == 1
    assert_same_tensors(fresh.parameters, state.parameters)
    assert_same_tensors(fresh.ema.values, state.ema.values)
    assert fresh.ema.updates == 1
    assert not left.exists()


def test_restoring_never_writes_to_the_checkpoint(folder: Path) -> None:
    """Its tensors are read through the file's pages; the optimiser must not work on those."""
    state = state_in(folder)
    step(state)
    state.save(1.0, {})
    before = (folder / "step-000001" / "tensors.safetensors").read_bytes()
    fresh = state_in(folder)
    fresh.restore()
    step(fresh)
    assert (folder / "step-000001" / "tensors.safetensors").read_bytes() == before
    assert json.loads((folder / "step-000001" / "state.json").read_text())["state"]["step"] == 1
