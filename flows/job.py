"""The main job as one Prefect flow: a recipe becomes ``name@alias`` and edits portraits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import flow

from flows import dataset, release, training
from flows.display import Display
from flows.errors import FlowError
from flows.folder import gather
from flows.server import wait_until_recorded
from flows.settings import FlowSettings
from flows.stages import NOT_MAKING, Job, code_digest
from registry.settings import home as default_home
from trainer.recipe import Recipe

if TYPE_CHECKING:
    from registry.digest import Digest
    from registry.manifest import BaseModelRef
    from trainer.stage import StageResult

STAGES, STAGES_OF_FOLDER = 13, 11


@flow(name="pipeline", description="recipe -> data -> adapter -> evaluation -> signed release -> edits")
def pipeline(recipe: Recipe, home: Path | None = None) -> dict[str, Any]:
    """Do every stage of ``recipe`` and return the summary that lies in the run folder as ``run.json``.

    Args:
        recipe: decides everything.
        home: data folder; None is this machine's.

    Raises:
        Explained: a stage refused, with the reason.
    """
    from prefect.settings import PREFECT_API_URL

    home = home or default_home()
    stages = STAGES_OF_FOLDER if recipe.data.source == "folder" else STAGES
    job = Job(root=home / "runs" / recipe.name, display=Display(stages))
    try:
        base = base_folder(recipe.base, home)
        trained = make_adapter(job, recipe, base)
        evaluated = judge(job, recipe, base, trained)
        return publish(job, recipe, home, trained, evaluated)
    finally:
        wait_until_recorded(PREFECT_API_URL.value(), job.runs, FlowSettings.read(home).server_timeout)


def make_adapter(job: Job, recipe: Recipe, base: Path) -> StageResult:
    """Data and training."""
    from serving.bases import fingerprint

    code, parts, base_digest = code_digest(NOT_MAKING), recipe.section, fingerprint(base)
    triplets = _from_folder(job, recipe) if recipe.data.source == "folder" else _drawn(job, recipe, code)
    cache = job.cached(
        dataset.cache,
        key={
            "code": code,
            "dataset": triplets.digest,
            "base": base_digest,
            **parts("conditioning", "data", "precision"),
        },
        out=job.folder("cache", code_digest((*NOT_MAKING, "trainer/portraits/"))),
        recipe=recipe,
        dataset=triplets.folder,
        base=base,
    )
    return job.cached(
        training.train,
        key={"code": code, "recipe": recipe.digest, "dataset": triplets.digest, "base": base_digest},
        recipe=recipe,
        dataset=triplets.folder,
        cache=cache.folder,
        base=base,
    )


def _from_folder(job: Job, recipe: Recipe) -> StageResult:
    """The dataset of somebody's own pictures; the stage itself sees whether they are the same as before."""
    return job.always(dataset.folder, recipe=recipe, out=job.root / "folder")


def _drawn(job: Job, recipe: Recipe, code: Digest) -> StageResult:
    """The dataset of drawn pictures that a judge has looked at."""
    words = recipe.conditioning.expressions
    images = job.cached(
        dataset.synthesise, key={"code": code, **recipe.section("data"), "expressions": words}, recipe=recipe
    )
    scored = job.cached(
        dataset.score,
        key={"code": code, "images": images.digest, "expressions": words},
        recipe=recipe,
        images=images.folder,
    )
    return job.cached(
        dataset.triplets,
        key={
            "code": code,
            "images": images.digest,
            "scores": scored.digest,
            **recipe.section("data", "conditioning"),
        },
        recipe=recipe,
        images=images.folder,
        scored=scored.folder,
    )


def judge(job: Job, recipe: Recipe, base: Path, trained: StageResult) -> StageResult:
    """Evaluation, and its figures for everybody who looks at the flow."""
    from serving.bases import fingerprint
    from trainer.evaluation import REPORT_NAME, EvaluationReport

    evaluated = job.cached(
        training.evaluate,
        key={
            "code": code_digest(),
            "adapter": trained.digest,
            "base": fingerprint(base),
            **recipe.section("evaluation", "conditioning", "release"),
        },
        recipe=recipe,
        trained=trained.folder,
        base=base,
    )
    report = EvaluationReport.model_validate_json((evaluated.folder / REPORT_NAME).read_bytes())
    for reason in report.verdict.reasons:
        job.display.say(f"      GATE MISSED: {reason}; the adapter will not be approved")
    show_evaluation(evaluated)
    return evaluated


def publish(
    job: Job, recipe: Recipe, home: Path, trained: StageResult, evaluated: StageResult
) -> dict[str, Any]:
    """Scan, licences, signatures, approval, alias, verified pull, edits; then the run folder."""
    adapter = trained.folder / "adapter"
    job.always(release.scan, adapter=adapter, out=job.root / "scan")
    job.always(release.licences, home=home, adapter=adapter)
    pushed = job.always(
        release.push, home=home, adapter=adapter, evaluated=evaluated.folder, name=recipe.release.adapter
    )
    reference = pushed.facts["reference"]
    job.display.say(f"      APPROVED AUTOMATICALLY: no person looks at {reference} before it is promoted.")
    job.display.say("      That is for demonstrations only; people approve with `registry approve`.")
    job.always(release.approve, home=home, reference=reference)
    promoted = job.always(release.promote, home=home, reference=reference, alias=recipe.release.alias)
    alias = promoted.facts["reference"]
    emptied = job.root / "pulled"
    job.always(release.pull, home=home, reference=alias, out=emptied)
    job.cached(
        release.edit,
        key={
            "code": code_digest(),
            "adapter": pushed.digest,
            **recipe.section("evaluation", "conditioning", "base"),
        },
        recipe=recipe,
        home=home,
        reference=alias,
        pulled=emptied,
    )
    summary = job.summary(recipe=str(recipe.digest), adapter=alias, version=reference, digest=pushed.digest)
    folder = gather(home, job.root, {name: done.result for name, done in job.done.items()}, summary)
    show_release(folder, summary)
    return {**summary, "folder": str(folder)}


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


def show_evaluation(evaluated: StageResult) -> None:
    """Put the figures of an evaluation and the way to its report into Prefect's user interface."""
    from prefect.artifacts import create_link_artifact, create_table_artifact

    rows = [{"metric": name, "value": value} for name, value in evaluated.facts.items()]
    create_table_artifact(rows, key="evaluation", description="Held-out people, edited and judged.")
    create_link_artifact((evaluated.folder / "report.html").as_uri(), key="evaluation-report")


def show_release(folder: Path, summary: dict[str, Any]) -> None:
    """Put what was released, and where everything lies, into Prefect's user interface."""
    from prefect.artifacts import create_markdown_artifact

    lines = [f"# {summary['adapter']}", "", f"`{summary['digest']}` as {summary['version']}", ""]
    lines += ["| stage | seconds | reused |", "| --- | --- | --- |"]
    lines += [f"| {row['stage']} | {row['seconds']} | {row['reused']} |" for row in summary["stages"]]
    create_markdown_artifact("\n".join([*lines, "", f"Everything lies in `{folder}`."]), key="release")
