"""Nothing is lost: a training that was stopped, however, ends as the one that never was, to the bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fakes.trainings import (
    STARTER,
    assert_same_training,
    changed,
    curve,
    job_of,
    key_of,
    last_state,
    stop_at,
    train_tiny,
)
from trainer import checkpoint
from trainer.errors import CheckpointError, Interrupted
from trainer.recipe import Recipe
from trainer.sections import LossSection

LOOKING = {
    "flow_matching": LossSection(weight=1.0),
    "contrastive": LossSection(weight=0.05, max_sigma=1.0, pairs=2),
    "identity": LossSection(weight=0.1, max_sigma=1.0, pairs=2),
}


def variant(recipe: Recipe, name: str) -> Recipe:
    recipe = changed(recipe, "running", log_every=1)
    if name == "micro-batches":
        return changed(changed(recipe, "optimiser", batch_pairs=3), "running", log_every=1, micro_pairs=2)
    if name == "all losses":
        return recipe.model_copy(update={"losses": LOOKING})
    if name == "adamw-8bit":  # wide enough that moments are kept in 8 bits
        recipe = changed(recipe, "lora", rank=128)
    return changed(recipe, "optimiser", name=name, learning_rate=1.0 if name == "prodigy" else 0.01)


@pytest.mark.parametrize("name", ["adamw", "adamw-8bit", "prodigy", "micro-batches", "all losses"])
def test_stopped_twice_is_the_same_to_the_bit(
    name: str, tiny_recipe: Recipe, tiny_run: Path, tiny_base: Path, tiny_pipeline, tmp_path: Path
) -> None:
    recipe, whole, parts = variant(tiny_recipe, name), tmp_path / "whole", tmp_path / "parts"
    train_tiny(recipe, tiny_run, tiny_base, tiny_pipeline, whole)
    for step in (3, 7):
        with pytest.raises(Interrupted, match=f"after step {step + 1} of 12") as caught:
            train_tiny(recipe, tiny_run, tiny_base, tiny_pipeline, parts, stop_at(step))
        assert caught.value.exit_code == 143
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        found = checkpoint.latest(parts / "checkpoints", key_of(whole))
        assert found is not None
        assert found.step == step + 1
    result = train_tiny(recipe, tiny_run, tiny_base, tiny_pipeline, parts)
    assert result.facts["resumed_from"] == 8
    assert_same_training(whole, parts)
    if name == "adamw-8bit":
        kept = last_state(whole).group("optimiser")
        assert {"torch.uint8", "torch.float32"} <= {str(value.dtype) for value in kept.values()}
    if name == "all losses":
        assert {"contrastive", "identity"} <= curve(whole)[0].keys()


def test_an_error_in_the_middle_costs_no_step(
    tiny_recipe: Recipe, tiny_run: Path, tiny_base: Path, tiny_pipeline, tmp_path: Path
) -> None:
    """Whatever it is, the last whole step is saved first: here Ctrl-C, at a step without a checkpoint."""
    recipe, whole, parts = variant(tiny_recipe, "adamw"), tmp_path / "whole", tmp_path / "parts"
    train_tiny(recipe, tiny_run, tiny_base, tiny_pipeline, whole)

    def breaks(stage: str, done: int, total: int, note: str = "") -> None:
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_tiny(recipe, tiny_run, tiny_base, tiny_pipeline, parts, breaks)
    result = train_tiny(recipe, tiny_run, tiny_base, tiny_pipeline, parts)
    assert result.facts["resumed_from"] == 8
    assert_same_training(whole, parts)


def test_a_curve_that_ran_ahead_or_broke_off_is_cut_back(
    tiny_recipe: Recipe, tiny_run: Path, tiny_base: Path, tiny_pipeline, tmp_path: Path
) -> None:
    recipe, whole, parts = variant(tiny_recipe, "adamw"), tmp_path / "whole", tmp_path / "parts"
    train_tiny(recipe, tiny_run, tiny_base, tiny_pipeline, whole)
    with pytest.raises(Interrupted):
        train_tiny(recipe, tiny_run, tiny_base, tiny_pipeline, parts, stop_at(4))
    with (parts / "loss.jsonl").open("a") as stream:
        stream.write('{"step": 6, "loss": 1.0}\n{"step": 7, "lo')
    train_tiny(recipe, tiny_run, tiny_base, tiny_pipeline, parts)
    assert_same_training(whole, parts)


def test_running_may_change_and_the_recipe_may_not(
    tiny_recipe: Recipe, tiny_run: Path, tiny_base: Path, tiny_pipeline, tmp_path: Path
) -> None:
    recipe = variant(tiny_recipe, "adamw")
    with pytest.raises(Interrupted):
        train_tiny(recipe, tiny_run, tiny_base, tiny_pipeline, tmp_path, stop_at(4))
    other = changed(recipe, "optimiser", learning_rate=0.02)
    with pytest.raises(CheckpointError, match="another recipe"):
        train_tiny(other, tiny_run, tiny_base, tiny_pipeline, tmp_path)
    smaller = changed(recipe, "running", micro_pairs=1, keep_checkpoints=1)
    result = train_tiny(smaller, tiny_run, tiny_base, tiny_pipeline, tmp_path)
    assert result.facts["resumed_from"] == 5
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000012"]


DIES = """
import os, signal

real = os.fsync

def fsync(handle):
    real(handle)
    path = os.readlink(f"/proc/self/fd/{handle}")
    if "step-000010" in path and path.endswith(WHERE):
        os.kill(os.getpid(), signal.SIGKILL)

os.fsync = fsync
"""


@pytest.mark.slow
@pytest.mark.parametrize("where", ["tensors.safetensors", "state.json"])
def test_killed_in_the_middle_of_a_save_and_resumed_is_the_same(
    where: str, tiny_recipe: Recipe, tiny_run: Path, tiny_base: Path, tiny_pipeline, tmp_path: Path
) -> None:
    """SIGKILL falls when that file of the second checkpoint is on the disk and has no name yet."""
    recipe, whole, parts = variant(tiny_recipe, "adamw"), tmp_path / "whole", tmp_path / "parts"
    train_tiny(recipe, tiny_run, tiny_base, tiny_pipeline, whole)
    code = DIES.replace("WHERE", repr(where)) + STARTER
    job = job_of(recipe, tiny_run, tiny_base, parts)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(job), "1"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = [path.name for path in (parts / "checkpoints").iterdir()]
    assert "step-000005" in left
    assert "step-000010" not in left
    assert any(name.startswith(".step-000010.") for name in left)
    result = train_tiny(recipe, tiny_run, tiny_base, tiny_pipeline, parts)
    assert result.facts["resumed_from"] == 5
    assert_same_training(whole, parts)
    assert not list((parts / "checkpoints").glob(".step*"))
