"""What people see of a training: grids and losses of both weights, one MLflow run over stops, event files."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from registry.manifest import WEIGHTS_NAME
from trainer.errors import Interrupted
from trainer.launch import train
from trainer.recipe import Recipe
from trainer.validation import held


@pytest.fixture
def looked(
    tiny_recipe: Recipe, tiny_run: Path, tiny_base: Path, tiny_pipeline, tmp_path: Path
) -> tuple[Path, dict]:
    """A tracked training, looked at every six steps and stopped once on the way."""
    changes = {"validate_every": 6, "tensorboard": True}
    recipe = tiny_recipe.model_copy(update={"running": tiny_recipe.running.model_copy(update=changes)})

    def stop_after_five(stage: str, done: int, total: int, note: str = "") -> None:
        if done == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    out, given = tmp_path / "train", (tiny_run / "dataset", tiny_run / "cache", tiny_base)
    with pytest.raises(Interrupted):
        train(recipe, *given, out, stop_after_five, pipeline=tiny_pipeline)
    stopped = (out / "mlflow-run.txt").read_text()
    result = train(recipe, *given, out, pipeline=tiny_pipeline)
    return out, {**result.facts, "stopped": stopped}


def test_a_training_can_be_watched(
    looked: tuple[Path, dict],
    tiny_recipe: Recipe,
    tiny_run: Path,
    tiny_base: Path,
    tiny_pipeline,
    tmp_path: Path,
) -> None:
    """Slow to make, so one training answers all questions about what it leaves for people."""
    from mlflow import MlflowClient
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from registry.settings import home, layout

    out, facts = looked
    names = sorted(path.name for path in (out / "validation").iterdir())
    assert names == [f"step-{step:06d}-{which}.png" for step in (6, 12) for which in ("ema", "raw")]
    grids = {name: np.asarray(Image.open(out / "validation" / name)) for name in names}
    # the later grid differs from the earlier one, and the average from the weights: it is not one picture
    assert not np.array_equal(grids[names[0]], grids[names[2]])
    assert not np.array_equal(grids[names[0]], grids[names[1]])

    client = MlflowClient(layout().tracking_uri)
    run = client.get_run(facts["run_id"])
    assert facts["run_id"] == facts["stopped"], "a stopped training goes on in its own run"
    assert run.info.status == "FINISHED"
    assert run.data.params["dataset.digest"].startswith("sha256:")
    assert run.data.params["code.version"].startswith("adapter-foundry/")
    history = client.get_metric_history(facts["run_id"], "validation_loss_ema")
    assert [point.step for point in history][:2] == [6, 12]
    assert run.info.artifact_uri.startswith((home() / "registry" / "mlruns").as_uri())
    pictures = {item.path for item in client.list_artifacts(facts["run_id"], "validation-ema")}
    assert pictures == {"validation-ema/step-000006.png", "validation-ema/step-000012.png"}
    kept = json.loads(Path(client.download_artifacts(facts["run_id"], "recipe.json")).read_text())
    assert kept["lora"]["rank"] == tiny_recipe.lora.rank

    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    assert [point.step for point in events.Scalars("flow_matching")] == list(range(1, 13))
    assert [point.step for point in events.Images("validation-raw")] == [6, 12]

    alone = tmp_path / "alone"
    given = (tiny_run / "dataset", tiny_run / "cache", tiny_base)
    train(tiny_recipe, *given, alone, pipeline=tiny_pipeline, track=False)
    one, other = (load_file(folder / "adapter" / WEIGHTS_NAME) for folder in (out, alone))
    assert all(torch.equal(one[name], other[name]) for name in one), "being looked at changes nothing"


def test_held_values_are_given_back() -> None:
    parameter = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    seen: list[list[float]] = []

    def fail() -> None:
        with held({"x": parameter}, {"x": torch.zeros(2)}):
            seen.append(parameter.tolist())
            raise KeyError("x")

    with pytest.raises(KeyError):
        fail()
    assert seen == [[0.0, 0.0]]
    assert parameter.tolist() == [1.0, 2.0]
