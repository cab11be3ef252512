"""The flows that people start: a dataset, a training, a release, and all of it in one.

Each goes through the stages from the beginning and reuses what is there, so a run that was killed, suspended
or repeated goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import flow
from prefect.exceptions import Pause

from flows.artifacts import show_summary
from flows.dataset import make_dataset
from flows.display import Display
from flows.errors import FlowError
from flows.mapping import part_mapper
from flows.parameters import Approval, RecipeChoice, Runner
from flows.release import publish, refuse_automatic
from flows.server import only_logged, wait_until_recorded
from flows.settings import FlowSettings
from flows.stages import Job
from flows.training import judge_for_release, make_adapter
from registry.settings import home
from trainer.recipe import Recipe

if TYPE_CHECKING:
    from registry.manifest import BaseModelRef
    from trainer.stage import StageResult

#: How many stages a flow announces; a recipe with pictures of one's own has two fewer.
STAGES = {"dataset": 3, "training": 5, "release": 13, "pipeline": 13, "reproduce": 7}
FEWER_OF_FOLDER = 2
#: Seconds that the record of a run gets which was stopped: Prefect's worker kills it after 30.
_STOPPED_SECONDS = 5.0

_ANY_RECIPE = RecipeChoice()


@flow(name="dataset", description="recipe -> pictures, scores, filtered and deduplicated triplets")
def dataset(recipe: RecipeChoice = _ANY_RECIPE, runner: Runner = "threads") -> dict[str, Any]:
    """Make the dataset of a recipe.

    Args:
        recipe: what to make.
        runner: where parts of stages are done: on threads of the worker, or on a Ray cluster (RAY_ADDRESS;
            without it one is started on the worker's machine).

    Raises:
        Explained: a stage refused, with the reason.
    """
    wanted = recipe.load()
    with running("dataset", wanted, runner) as job:
        made = make_dataset(job, wanted)
        return _summary(job, wanted, "dataset", made.folder, digest=str(made.digest))


@flow(name="training", description="recipe -> dataset -> LoRA adapter and its moving average")
def training(recipe: RecipeChoice = _ANY_RECIPE, runner: Runner = "threads") -> dict[str, Any]:
    """Train the adapter of a recipe; its dataset is made first where it is not there.

    Args:
        recipe: what to make.
        runner: where parts of stages are done: on threads of the worker, or on a Ray cluster (RAY_ADDRESS;
            without it one is started on the worker's machine).

    Raises:
        Explained: a stage refused, with the reason.
    """
    wanted = recipe.load()
    with running("training", wanted, runner) as job:
        trained = make_adapter(job, wanted, base_folder(wanted.base, job.home), make_dataset(job, wanted))
        return _summary(job, wanted, "training", trained.folder, digest=str(trained.digest))


@flow(name="release", description="trained adapter -> evaluation, scan, signed push, approval, promotion")
def release(
    recipe: RecipeChoice = _ANY_RECIPE, approval: Approval = "ask", runner: Runner = "threads"
) -> dict[str, Any]:
    """Release what the training of a recipe made.

    Args:
        recipe: what to release.
        approval: ask: the run waits for approvers in this page. again: also for what was rejected before.
            later: it ends after the signed push, people use `registry approve` and `registry promote`.
            automatic: nobody looks; for demonstrations only, and refused here unless the worker's settings
            allow it.
        runner: where parts of stages are done: on threads of the worker, or on a Ray cluster (RAY_ADDRESS;
            without it one is started on the worker's machine).

    Raises:
        FlowError: it has not been trained.
        PolicyRefused: it must not approve by itself.
        Explained: a stage refused, with the reason.
    """
    refuse_automatic(approval, home())
    wanted = recipe.load()
    with running("release", wanted, runner) as job:
        job.reuse_only = True
        base = base_folder(wanted.base, job.home)
        data = make_dataset(job, wanted)
        trained = make_adapter(job, wanted, base, data)
        job.reuse_only = False
        return _released(job, wanted, base, trained, data, approval)


@flow(name="pipeline", description="recipe -> data -> adapter -> evaluation -> signed release -> edits")
def pipeline(
    recipe: RecipeChoice = _ANY_RECIPE, approval: Approval = "ask", runner: Runner = "threads"
) -> dict[str, Any]:
    """Do every stage of a recipe and return the summary that lies in the run folder as ``run.json``.

    Args:
        recipe: what to make.
        approval: ask: the run waits for approvers in this page. again: also for what was rejected before.
            later: it ends after the signed push, people use `registry approve` and `registry promote`.
            automatic: nobody looks; for demonstrations only, and refused here unless the worker's settings
            allow it.
        runner: where parts of stages are done: on threads of the worker, or on a Ray cluster (RAY_ADDRESS;
            without it one is started on the worker's machine).

    Raises:
        PolicyRefused: it must not approve by itself.
        Explained: a stage refused, with the reason.
    """
    refuse_automatic(approval, home())
    wanted = recipe.load()
    with running("pipeline", wanted, runner) as job:
        base = base_folder(wanted.base, job.home)
        data = make_dataset(job, wanted)
        trained = make_adapter(job, wanted, base, data)
        return _released(job, wanted, base, trained, data, approval)


def _released(
    job: Job, recipe: Recipe, base: Path, trained: StageResult, data: StageResult, approval: Approval
) -> dict[str, Any]:
    evaluated = judge_for_release(job, recipe, base, trained, data)
    summary = publish(job, recipe, trained, evaluated, approval)
    show_summary(summary, "release", f"{summary['adapter']}, `{summary['digest']}` as {summary['version']}")
    return summary


def _summary(job: Job, recipe: Recipe, key: str, folder: Path, **about: str) -> dict[str, Any]:
    summary = {**job.summary(recipe=str(recipe.digest), **about), "folder": str(folder)}
    show_summary(summary, key, f"{key} of {recipe.name}, `{about['digest']}`")
    return summary


@contextmanager
def running(name: str, recipe: Recipe, runner: Runner, root: Path | None = None) -> Iterator[Job]:
    """Give the job of a flow run; afterwards every task run of it is on record.

    A run that fails or is stopped ends by the reason for that, whether or not the record is complete.

    Args:
        name: of the flow.
        recipe: what it does.
        runner: where parts of stages are done.
        root: folder of the stages; None is the recipe's own.

    Raises:
        ServerError: the server did not record everything in time.
    """
    from prefect.logging import get_run_logger
    from prefect.settings import PREFECT_API_URL

    place = home()
    stages = STAGES[name] - (FEWER_OF_FOLDER if recipe.data.source == "folder" else 0)
    display = Display(stages, log=get_run_logger().info)
    settings = FlowSettings.read(place)
    job = Job(home=place, root=root or place / "runs" / recipe.name, display=display)
    try:
        with part_mapper(place, runner, settings, job.runs) as job.mapper:
            yield job
    except BaseException as error:
        # One that waits for approvers is not stopped: it goes on another day, with what it has used.
        patient = isinstance(error, Exception | Pause)
        if isinstance(error, Pause):
            job.keep(timedelta(seconds=settings.approval_timeout))
        with only_logged():
            wait_until_recorded(
                PREFECT_API_URL.value(), job.runs, settings.server_timeout if patient else _STOPPED_SECONDS
            )
        raise
    wait_until_recorded(PREFECT_API_URL.value(), job.runs, settings.server_timeout)


def base_folder(base: BaseModelRef, home: Path) -> Path:
    """Return the folder of a base model on this machine; the shipped one is registered by the way.

    Raises:
        FlowError: the base would have to be fetched from a hub.
    """
    from serving import bases
    from trainer.portraits import BASE_ID, base_path

    if base.id == BASE_ID:
        return bases.register(base_path(), base, home)
    place = bases.resolve(base, home)
    if not isinstance(place, Path):
        raise FlowError(
            f"the base model {base.id} is not on this machine",
            f"fetch it, then run `serving register-base FOLDER --id {base.id} --revision {base.revision}`",
        )
    return place
