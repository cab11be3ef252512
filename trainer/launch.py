"""The training stage: in this process on a CPU or one GPU, in one process for each of several GPUs.

`train` starts its processes with torch's elastic launcher. torchrun and `accelerate launch` start the same
module by themselves, on one machine or on several: ``-m trainer.launch JOB``, where JOB is the file that
`trainer train RECIPE --prepare-only` writes. What counts is what the main process has: it alone writes, and
what it finds in its folder is told to the others.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.digest import Digest
from registry.errors import Explained
from serving.bases import fingerprint
from trainer import encoders, news
from trainer.data.cache import TensorCache, load_base
from trainer.data.triplets import Dataset
from trainer.errors import Interrupted, ProcessLost, TrainerError
from trainer.export import card, code_version, export
from trainer.job import Job
from trainer.journal import StopSignal
from trainer.parent import end_with_parent
from trainer.progress import ConsoleProgress, Progress, silent
from trainer.provenance import provenance
from trainer.recipe import Recipe
from trainer.stage import StageResult, finished, stage_key, write_result

if TYPE_CHECKING:
    from serving.pipelines.base import EditPipeline
    from trainer.loop import Trained
    from trainer.parallel import Processes
    from trainer.tracking import Tracker

ADAPTER, RAW = "adapter", "adapter-raw"
TELL = "--tell"
_SECONDS_TO_SAVE = "300"  # a step and a checkpoint of a large model may take that long


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
        progress: is told every few steps.
        pipeline: the loaded base, if the caller has it; then everything happens in this process.
        processes: how many take part; None takes one a GPU.
        track: write an MLflow run.

    Returns:
        the result; its digest is that of the EMA weights' file, ``facts`` hold losses, speed and folders.

    Raises:
        Interrupted: SIGTERM came; a checkpoint was written.
        TrainerError: see `trainer.loop.run` and `trainer.export.export`.
    """
    from trainer import parallel

    job = Job(recipe=recipe, dataset=dataset, cache=cache, base_path=base_path, out=out, track=track)
    count = 1 if pipeline is not None else processes or parallel.gpus()
    if count == 1:
        return _train_here(job, progress, parallel.Processes(device=parallel.device()), pipeline)
    key = _key(job, job.data(), fingerprint(base_path))
    if done := finished(out, key):
        _send_rest(job)
        return done
    _divided(recipe, count)
    encoders.require(recipe.losses)
    return _launch(job, count, progress, key)


def found(job: Job) -> StageResult | None:
    """Return what this very training left in its folder, or None while it is not complete."""
    return finished(job.out, _key(job, job.data(), fingerprint(job.base_path)))


def _key(job: Job, data: Dataset, base: Digest) -> Digest:
    return stage_key("train", recipe=job.recipe.digest, dataset=data.digest, base=base, code=code_version())


def _send_rest(job: Job) -> None:
    """Send what MLflow has not got of a training that is done."""
    if job.track:
        from trainer.outbox import send_waiting

        send_waiting(job.out)


def _divided(recipe: Recipe, count: int) -> None:
    """Check that a step can be divided among ``count`` processes.

    Raises:
        TrainerError: some would have nothing to do, or with a sharded base not all the same number of passes.
    """
    pairs, at_once = recipe.optimiser.batch_pairs, recipe.running.micro_pairs
    if count > pairs:
        raise TrainerError(
            f"{count} processes cannot share a step of {pairs} pairs",
            f"start {pairs} processes or fewer, or raise optimiser.batch_pairs",
        )
    shares = {len(range(rank, pairs, count)) for rank in range(count)}
    passes = {-(-share // (at_once or share)) for share in shares}
    if recipe.running.shard and len(passes) > 1:
        raise TrainerError(
            f"with running.shard all processes make the same number of forward passes; {pairs} pairs on "
            f"{count} processes, {at_once} at once, make {min(passes)} in some and {max(passes)} in others",
            f"make optimiser.batch_pairs a multiple of {count}, or change running.micro_pairs",
        )


def _train_here(
    job: Job,
    progress: Progress,
    processes: Processes,
    pipeline: EditPipeline | None = None,
    tracked: Callable[[str], None] | None = None,
) -> StageResult:
    """Train in this process, one of several or the only one; the main one exports.

    ``tracked`` is called with the id of the MLflow run when there is one.
    """
    from trainer.loop import run

    recipe, out, main = job.recipe, job.out, processes.main
    data, base = job.data(), fingerprint(job.base_path)
    key, made = _key(job, data, base), provenance(recipe, processes.device, processes.count)
    _agreed(processes, key, made.code)
    done = finished(out, key)
    if found := processes.tell(done.as_json() if done else None):
        if main:
            _send_rest(job)
        return done or StageResult.from_json(found)
    _divided(recipe, processes.count)
    encoders.require(recipe.losses)  # before anything large is loaded
    tracker = _tracker(job, data, base, main)
    if tracker.run_id is not None and tracked is not None:
        tracked(tracker.run_id)
    status = "FAILED"
    try:
        trained = run(
            recipe,
            data,
            TensorCache(job.cache),
            job.base_path,
            out,
            key,
            progress,
            pipeline=pipeline or load_base(job.base_path, recipe),
            tracker=tracker,
            processes=processes,
            made=made,
        )
        facts = {**trained.facts, "run_id": tracker.run_id, "adapter": ADAPTER, "adapter_raw": RAW}
        result = StageResult(stage="train", folder=out, key=key, digest=data.digest, facts=facts)
        if main:
            digest = _exported(job, trained, data, base, tracker.run_id)
            result = StageResult(stage="train", folder=out, key=key, digest=digest, facts=facts)
            losses = {name: facts[name] for name in ("validation_loss", "validation_loss_ema")}
            tracker.metrics(facts["steps"], losses)
            write_result(out, result)
        status = "FINISHED"
        return result
    except BaseException as error:
        status = "KILLED" if isinstance(error, Interrupted) else status
        raise
    finally:
        tracker.close(status)


def _tracker(job: Job, data: Dataset, base: Digest, main: bool) -> Tracker:
    """Return where the figures go; nowhere from all processes but the main one."""
    from trainer.tracking import Tracker, parameters

    recipe = job.recipe
    tags = {
        "recipe.digest": recipe.digest, "dataset.digest": data.digest, "base.digest": base,
        "code.version": code_version(),
    }  # fmt: skip
    return Tracker(
        recipe.name,
        {**parameters(_tracked(recipe)), **tags},
        out=job.out,
        recipe=recipe.model_dump(mode="json"),
        enabled=job.track and main,
        tensorboard=recipe.running.tensorboard and main,
    )


def _exported(job: Job, trained: Trained, data: Dataset, base: Digest, run_id: str | None) -> Digest:
    """Write both adapters; return the digest of the averaged one."""
    about = (
        data.digest, base, data.provenance["license"], trained.ingredients, run_id, trained.facts["steps"],
        data.ingredients, trained.made,
    )  # fmt: skip
    recipe = job.recipe
    export(recipe, trained.weights, card(recipe, trained.weights, *about), job.out / RAW, trained.size)
    return export(recipe, trained.ema, card(recipe, trained.ema, *about), job.out / ADAPTER, trained.size)


def _agreed(processes: Processes, key: Digest, code: Digest) -> None:
    """Check that all processes have the same recipe, dataset, base and code.

    Raises:
        TrainerError: one has others; on all processes.
    """
    keys = processes.gather(f"{key} {code}")
    other = [rank for rank, found in enumerate(keys) if found != keys[0]]
    if other:
        raise TrainerError(
            f"process {other[0]} has another recipe, dataset, base or version of this program than process 0",
            "install the same version and run `trainer train RECIPE --prepare-only` on every machine",
        )


def _tracked(recipe: Recipe) -> dict[str, Any]:
    return recipe.section(
        "seed", "base", "data", "lora", "precision", "optimiser", "noise", "ema", "losses", "running"
    )


def _launch(job: Job, processes: int, progress: Progress, key: Digest) -> StageResult:
    """Train in several processes of this module, follow what they tell, and return what they made."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), "--module", "trainer.launch", str(job.write()), TELL]
    # When it is told to stop, torch's launcher gives its processes half a minute unless it is told otherwise.
    environment = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": _SECONDS_TO_SAVE, **os.environ}
    problems: list[Explained] = []
    with (
        StopSignal() as stop,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process,
    ):
        stop.then(process.terminate)  # the launcher passes SIGTERM on, and the training saves what it has
        try:
            for line in process.stdout or ():
                told = news.read(line) or {}
                if "error" in told:
                    problems.append(news.error_of(told))
                elif "stage" in told:
                    progress(**told)
        except BaseException:
            process.terminate()
            raise
    if done := finished(job.out, key):
        return replace(done, reused=False)
    if problems:
        raise first_cause(problems)
    if stop.received:
        raise Interrupted(
            "the training was asked to stop", f"run the same command again; it goes on from {job.out}"
        )
    raise ProcessLost(
        f"the training processes ended with status {process.returncode}",
        "look at their messages above (a process that was killed had often no memory left); run the same "
        f"command again to go on from the last checkpoint in {job.out}",
    )


def first_cause(problems: Sequence[Explained]) -> Explained:
    """Return why a training ended: of several processes, who was left alone tells that, too."""
    return min(problems, key=lambda error: isinstance(error, ProcessLost))


def _worker(arguments: list[str]) -> int:
    """Be one of the processes of a launched training; return the exit code.

    Progress and errors go to the console, or with ``--tell`` as `news` to the process that listens on stdout;
    then this one is stopped when its parent, the launcher, ends before it.
    """
    from trainer import parallel

    telling = TELL in arguments[1:]
    try:
        if telling:
            end_with_parent()
        job, processes = Job.read(Path(arguments[0])), parallel.start()
        progress: Progress = news.progress if telling else ConsoleProgress()
        told: Callable[[str], None] | None = (lambda run: news.tell(run=run)) if telling else None
        _train_here(job, progress if processes.main else silent, processes, tracked=told)
        parallel.end()
    except Explained as error:
        if telling:
            news.tell_error(error)
        else:
            print(f"Error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(_worker(sys.argv[1:]))
