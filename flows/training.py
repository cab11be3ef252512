"""From a dataset to an adapter and its report: training and evaluation as Prefect tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import task

from flows.artifacts import show_evaluation
from flows.settings import FlowSettings
from flows.stages import NOT_MAKING, Job, code_digest, made
from trainer.parts import Mapper
from trainer.progress import Progress
from trainer.recipe import Recipe
from trainer.stage import StageResult


def make_adapter(job: Job, recipe: Recipe, base: Path, triplets: StageResult) -> StageResult:
    """Encode the dataset once, then train."""
    from flows.dataset import cache
    from serving.bases import fingerprint

    code, base_digest = code_digest(NOT_MAKING), fingerprint(base)
    encoded = job.cached(
        cache,
        key={
            "code": code,
            "dataset": triplets.digest,
            "base": base_digest,
            **recipe.section("conditioning", "data", "precision"),
        },
        out=job.folder("cache", code_digest((*NOT_MAKING, "trainer/portraits/"))),
        recipe=recipe,
        dataset=triplets.folder,
        base=base,
    )
    return job.cached(
        train,
        key={"code": code, "recipe": recipe.digest, "dataset": triplets.digest, "base": base_digest},
        recipe=recipe,
        dataset=triplets.folder,
        cache=encoded.folder,
        base=base,
    )


def judge(job: Job, recipe: Recipe, base: Path, trained: StageResult) -> StageResult:
    """Evaluate, and show the figures to everybody who looks at the flow."""
    from serving.bases import fingerprint
    from trainer.evaluation import REPORT_NAME, EvaluationReport

    evaluated = job.cached(
        evaluate,
        key={
            "code": code_digest(),
            "adapter": trained.digest,
            "base": fingerprint(base),
            **recipe.section("evaluation", "conditioning", "release"),
        },
        recipe=recipe,
        trained=trained.folder,
        base=base,
        mapper=job.spread(),
    )
    report = EvaluationReport.model_validate_json((evaluated.folder / REPORT_NAME).read_bytes())
    for reason in report.verdict.reasons:
        job.display.say(f"      GATE MISSED: {reason}; the adapter will not be approved")
    show_evaluation(evaluated)
    return evaluated


@task(name="train", description="LoRA and its moving average, resumed where it was stopped")
def train(
    recipe: Recipe, dataset: Path, cache: Path, base: Path, out: Path, progress: Progress
) -> dict[str, Any]:
    """Train in processes of its own, on GPUs that no other flow run has; see `flows.launching`.

    It has to be called in the flow's own thread: one that Prefect submits elsewhere is not told to stop.
    """
    from flows.launching import launch
    from trainer.job import Job as Training

    training = Training(recipe=recipe, dataset=dataset, cache=cache, base_path=base, out=out)
    return launch(training, FlowSettings.read(), progress).as_json()


@task(name="evaluate", description="edits of people that training has never seen, judged by another judge")
def evaluate(
    recipe: Recipe, trained: Path, base: Path, out: Path, progress: Progress, mapper: Mapper
) -> dict[str, Any]:
    """See `trainer.evaluation.evaluate`."""
    from trainer.evaluation import evaluate as work

    raw = trained / "adapter-raw"
    work(recipe, trained / "adapter", base, out, raw_dir=raw, progress=progress, mapper=mapper)
    return made(out).as_json()
