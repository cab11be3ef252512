"""Short trainings for tests: one call, variants of a recipe, held at a step, and two compared to the bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from registry.manifest import WEIGHTS_NAME
from trainer import checkpoint
from trainer.job import Job
from trainer.launch import train
from trainer.recipe import Recipe

STARTER = """
import sys
from pathlib import Path
from trainer.errors import TrainerError
from trainer.job import Job
from trainer.launch import train

job = Job.read(Path(sys.argv[1]))
try:
    train(job.recipe, job.dataset, job.cache, job.base_path, job.out, processes=int(sys.argv[2]), track=False,
          progress=lambda stage, done, total, note="": print(done, flush=True))
except TrainerError as error:
    print(type(error).__name__, error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


def train_tiny(recipe: Recipe, run: Path, base: Path, pipeline, out: Path, progress=lambda *a: None):
    """Train in this process on the dataset and cache in ``run``."""
    return train(recipe, run / "dataset", run / "cache", base, out, progress, pipeline=pipeline, track=False)


def job_of(recipe: Recipe, run: Path, base: Path, out: Path) -> Path:
    """Return the file of the same training for processes of their own."""
    job = Job(
        recipe=recipe, dataset=run / "dataset", cache=run / "cache", base_path=base, out=out, track=False
    )
    return job.write()


@dataclass(frozen=True)
class Hold:
    """Holds a training between two steps for as long as a test needs.

    Its main process waits before it writes a line into its loss curve, which is to be written at every step,
    and the others wait for its next sum: until a signal comes to the main process, or the test lets go.
    """

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """What the training and whoever starts it have in their environment."""
        paths = [str(Path(__file__).with_name("held")), os.environ.get("PYTHONPATH", "")]
        return {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "TRAINING_HOLD": str(self.folder)}

    @property
    def held(self) -> bool:
        """Whether the training waits, or has waited."""
        return (self.folder / "held").exists()

    def at(self, lines: int) -> None:
        """Hold whoever comes to so many lines."""
        (self.folder / "held").unlink(missing_ok=True)
        (self.folder / "at").write_text(str(lines))

    def wait(self, process: subprocess.Popen[str], seconds: float) -> None:
        """Wait until the training is held that a process has started, or is part of."""
        end = time.monotonic() + seconds
        while not self.held:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < end, f"not held within {seconds:.0f} s"
            time.sleep(0.05)

    def release(self) -> None:
        """Let go, and hold nobody any more."""
        (self.folder / "at").unlink()


def start(job: Path, processes: int, **more: str) -> subprocess.Popen[str]:
    """Start a training in a process of its own, that tells every step on its stdout."""
    return subprocess.Popen(
        [sys.executable, "-c", STARTER, str(job), str(processes)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **more},
    )


def changed(recipe: Recipe, section: str, **values: object) -> Recipe:
    """Return a recipe with other values in one section."""
    part = getattr(recipe, section)
    return recipe.model_copy(update={section: part.model_copy(update=values)})


def weights(out: Path, which: str = "adapter") -> dict[str, torch.Tensor]:
    """Return the tensors of an exported adapter."""
    return load_file(out / which / WEIGHTS_NAME)


def key_of(out: Path) -> str:
    """Return the key of a finished training."""
    return json.loads((out / "stage.json").read_text())["key"]


def curve(out: Path) -> list[dict[str, Any]]:
    """Return the lines of a loss curve."""
    return [json.loads(line) for line in (out / "loss.jsonl").read_text().splitlines()]


def stop_at(step: int):
    """Return a progress that sends SIGTERM to this process at ``step``."""

    def tell(stage: str, done: int, total: int, note: str = "") -> None:
        if done == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return tell


def last_state(out: Path) -> checkpoint.Checkpoint:
    """Return the last checkpoint of a finished training."""
    found = checkpoint.latest(out / "checkpoints", key_of(out))
    assert found is not None
    return found


def assert_same_training(one: Path, other: Path) -> None:
    """Check that two finished trainings are the same to the bit.

    Weights, average, optimiser, policy, loss curve and both exported files.
    """
    first, second = last_state(one), last_state(other)
    assert first.step == second.step
    assert first.numbers == second.numbers
    assert_same_tensors(first.tensors, second.tensors)
    assert (one / "loss.jsonl").read_text() == (other / "loss.jsonl").read_text()
    for which in ("adapter", "adapter-raw"):
        assert_same_tensors(weights(one, which), weights(other, which))


def assert_same_tensors(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> None:
    """Check that two mappings hold the same tensors, dtypes included."""
    assert one.keys() == other.keys()
    assert [name for name in one if one[name].dtype != other[name].dtype] == []
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
