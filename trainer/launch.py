"""The training stage: in this process on a CPU or one GPU, in one process for each of several GPUs.

Processes are started with torch's elastic launcher, which `accelerate launch` starts as well; accelerate
finds them through the environment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.digest import Digest
from serving.bases import fingerprint
from trainer.data.cache import TensorCache, load_base
from trainer.data.triplets import Dataset
from trainer.errors import Interrupted, TrainerError
from trainer.export import card, code_version, export
from trainer.journal import StopSignal
from trainer.progress import Progress, silent
from trainer.recipe import Recipe
from trainer.stage import StageResult, finished, stage_key, write_result

if TYPE_CHECKING:
    from serving.pipelines.base import EditPipeline

ADAPTER, RAW = "adapter", "adapter-raw"


def train(
    recipe: Recipe,
    dataset: Path,
    cache: Path,
    base_path: Path,
    out: Path,
    progress: Progress = silent,
    *,
    pipeline: EditPipeline | None = None,
    processes: int | None = None,
    track: bool = True,
) -> StageResult:
    """Train the adapter of ``recipe`` into ``out``, from the newest checkpoint if there is one.

    Args:
        recipe: decides the training.
        dataset: output of `trainer.data.build_triplets`.
        cache: output of `trainer.data.cache_dataset` for this dataset and base.
        base_path: folder of the base model.
        out: gets ``adapter`` (the average, EMA), ``adapter-raw`` (the last weights), ``loss.jsonl``,
            ``checkpoints``.
        progress: is told every ten steps.
        pipeline: the loaded base, if the caller has it; then everything happens in this process.
        processes: how many take part; None takes one a GPU.
        track: write an MLflow run.

    Returns:
        the result; its digest is that of the EMA weights' file, ``facts`` hold losses, speed and folders.

    Raises:
        Interrupted: SIGTERM came; a checkpoint was written.
        TrainerError: see `trainer.loop.run` and `trainer.export.export`.
    """
    data, base = Dataset.open(dataset), fingerprint(base_path)
    key = stage_key("train", recipe=recipe.digest, dataset=data.digest, base=base, code=code_version())
    if done := finished(out, key):
        return done
    out.mkdir(parents=True, exist_ok=True)
    wanted = _processes(processes)
    if wanted > 1 and pipeline is None:
        _launch(wanted, recipe, dataset, cache, base_path, out, progress, track)
        result = finished(out, key)
        if result is None:
            raise TrainerError(
                "the processes ended without a result", f"look at their messages above and in {out}"
            )
        return result
    return _train_here(recipe, data, cache, base_path, out, key, base, progress, pipeline, track)


def _train_here(
    recipe: Recipe,
    data: Dataset,
    cache: Path,
    base_path: Path,
    out: Path,
    key: Digest,
    base: Digest,
    progress: Progress,
    pipeline: EditPipeline | None,
    track: bool,
) -> StageResult:
    """Train in this process, one of several or the only one; the main one exports."""
    import torch
    from accelerate import PartialState

    from trainer.loop import run
    from trainer.tracking import Tracker, parameters

    main = PartialState(cpu=not torch.cuda.is_available()).is_main_process
    tags = {
        "recipe.digest": recipe.digest,
        "dataset.digest": data.digest,
        "base.digest": base,
        "code": code_version(),
    }
    tracker = Tracker(
        recipe.name,
        {**parameters(_tracked(recipe)), **tags},
        out=out,
        recipe=recipe.model_dump(mode="json"),
        enabled=track and main,
        tensorboard=recipe.running.tensorboard and main,
    )
    status = "FAILED"
    try:
        trained = run(
            recipe,
            data,
            TensorCache(cache),
            base_path,
            out,
            key,
            progress,
            pipeline=pipeline or load_base(base_path, recipe),
            tracker=tracker,
        )
        license_of_data = data.provenance["license"]
        about = (
            data.digest, base, license_of_data, trained.ingredients, tracker.run_id,
            trained.facts["steps"],
        )  # fmt: skip
        result = StageResult(
            stage="train",
            folder=out,
            key=key,
            digest=data.digest,
            facts={**trained.facts, "run_id": tracker.run_id, "adapter": ADAPTER, "adapter_raw": RAW},
        )
        if main:
            export(recipe, trained.weights, card(recipe, trained.weights, *about), out / RAW)
            digest = export(recipe, trained.ema, card(recipe, trained.ema, *about), out / ADAPTER)
            result = StageResult(stage="train", folder=out, key=key, digest=digest, facts=result.facts)
            losses = {name: trained.facts[name] for name in ("validation_loss", "validation_loss_ema")}
            tracker.metrics(trained.facts["steps"], losses)
            write_result(out, result)
        status = "FINISHED"
        return result
    except BaseException as error:
        status = "KILLED" if type(error).__name__ == "Interrupted" else status
        raise
    finally:
        tracker.close(status)


def _tracked(recipe: Recipe) -> dict[str, Any]:
    return recipe.section(
        "seed", "base", "data", "lora", "precision", "optimiser", "noise", "ema", "losses", "running"
    )


def _processes(wanted: int | None) -> int:
    """Return how many processes to start: as many as wanted or as there are GPUs, and none by one of them."""
    import torch

    return 1 if "LOCAL_RANK" in os.environ else wanted or max(1, torch.cuda.device_count())


def _launch(
    processes: int,
    recipe: Recipe,
    dataset: Path,
    cache: Path,
    base_path: Path,
    out: Path,
    progress: Progress,
    track: bool,
) -> None:
    """Train in several processes of this module and follow their progress."""
    job = out / "job.json"
    job.write_text(
        json.dumps(
            {
                "recipe": recipe.model_dump(mode="json"),
                "dataset": str(dataset),
                "cache": str(cache),
                "base_path": str(base_path),
                "out": str(out),
                "track": track,
            }
        ),
        "utf-8",
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), "--module", "trainer.launch", str(job)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process, StopSignal() as stop:
        stop.then(process.terminate)  # the launcher passes SIGTERM on, and each process saves what it has
        try:
            for line in process.stdout or ():
                with suppress(ValueError, TypeError):
                    progress(*json.loads(line))
        except BaseException:
            process.terminate()
            raise
    if stop.received:
        raise Interrupted(
            "the training was asked to stop", f"run the same command again; it goes on from {out}"
        )
    if process.returncode:
        raise TrainerError(
            f"the training processes ended with status {process.returncode}",
            f"run the same command again to go on from the last checkpoint in {out}",
        )


def _worker(job: Path) -> None:
    """Be one of the processes of a launched training; progress goes to stdout as JSON lines."""
    value = json.loads(job.read_text("utf-8"))

    def tell(stage: str, done: int, total: int, note: str = "") -> None:
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps([stage, done, total, note]), flush=True)

    train(
        Recipe.model_validate(value["recipe"]),
        Path(value["dataset"]),
        Path(value["cache"]),
        Path(value["base_path"]),
        Path(value["out"]),
        tell,
        track=value["track"],
    )


if __name__ == "__main__":
    _worker(Path(sys.argv[1]))
