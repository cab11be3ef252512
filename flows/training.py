"""From a dataset to an adapter and its report: training and evaluation as Prefect tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import task

from flows.stages import made
from trainer.progress import Progress
from trainer.recipe import Recipe


@task(name="train", description="LoRA and its moving average, resumed where it was stopped")
def train(
    recipe: Recipe, dataset: Path, cache: Path, base: Path, out: Path, progress: Progress
) -> dict[str, Any]:
    """See `trainer.launch.train`."""
    from trainer.launch import train as work

    return work(recipe, dataset, cache, base, out, progress).as_json()


@task(name="evaluate", description="edits of people that training has never seen, judged by another judge")
def evaluate(recipe: Recipe, trained: Path, base: Path, out: Path, progress: Progress) -> dict[str, Any]:
    """See `trainer.evaluation.evaluate`."""
    from trainer.evaluation import evaluate as work

    work(recipe, trained / "adapter", base, out, raw_dir=trained / "adapter-raw", progress=progress)
    return made(out).as_json()
