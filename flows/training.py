"""From a dataset to an adapter and its report: training and evaluation as Prefect tasks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from prefect import get_run_logger, task

from flows import limits
from flows.artifacts import show_evaluation
from flows.production import NOTHING, Standing, standing
from flows.settings import FlowSettings
from flows.stages import NOT_MAKING, Job, code_digest, made
from registry.client import Registry
from registry.digest import Digest
from trainer.parts import Mapper, here
from trainer.progress import Progress
from trainer.recipe import Recipe
from trainer.stage import StageResult
from trainer.tracking import log_evaluation

if TYPE_CHECKING:
    from registry.policy import Threshold as Rule


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
        version=triplets.digest,
        cache=encoded.folder,
        base=base,
    )


def judge(
    job: Job,
    recipe: Recipe,
    base: Path,
    trained: StageResult,
    data: StageResult,
    against: Standing = NOTHING,
    rules: Mapping[str, Rule] = MappingProxyType({}),
) -> StageResult:
    """Evaluate, and show the figures to everybody who looks at the flow and at the training's MLflow run.

    Args:
        job: the run.
        recipe: names the suite, and has thresholds of its own.
        base: folder of the base model.
        trained: what `train` made.
        data: the dataset that it was trained on, for the probe of memorisation.
        against: what it is compared with.
        rules: what the policy asks for beside the recipe's thresholds, by metric.
    """
    from serving.bases import fingerprint
    from trainer.evaluation import REPORT_NAME, EvaluationReport
    from trainer.evaluation.plan import plan_of
    from trainer.evaluation.suites import of_recipe

    suite = of_recipe(recipe)
    # Only a rule against getting worse asks whether there was anything before.
    relative = any(rule.max_regression is not None for rule in rules.values())
    lacking = relative and against.taken and against.weights is None
    evaluated = job.cached(
        evaluate,
        key={
            "code": code_digest(),
            "adapter": trained.digest,
            "base": fingerprint(base),
            "suite": suite.model_dump(mode="json"),
            "plan": str(plan_of(suite, recipe.conditioning).digest()),
            "against": "lacking" if lacking else str(against.weights),
            "rules": {name: rule.model_dump(mode="json") for name, rule in sorted(rules.items())},
            **recipe.section("evaluation", "conditioning", "release"),
        },
        recipe=recipe,
        trained=trained.folder,
        data=data.folder,
        base=base,
        home=job.home,
        against=against,
        rules=dict(rules),
        mapper=job.spread(),
    )
    report = EvaluationReport.model_validate_json((evaluated.folder / REPORT_NAME).read_bytes())
    for reason in report.verdict.reasons:
        job.display.say(f"      GATE MISSED: {reason}; the adapter will not be approved")
    for note in report.verdict.notes:
        job.display.say(f"      {note}")
    show_evaluation(evaluated.folder, report)
    problem = log_evaluation(trained.folder, evaluated)
    if problem is not None:
        job.display.say(f"      MLflow does not show this evaluation: {problem}")
    return evaluated


def judge_for_release(
    job: Job, recipe: Recipe, base: Path, trained: StageResult, data: StageResult
) -> StageResult:
    """Evaluate beside what the recipe's alias means now, by the policy's rules for it.

    Raises:
        RegistryError: what the alias means cannot be believed, or the store does not answer.
    """
    from trainer.evaluation.gates import rules_of, unknown_of

    registry = Registry.open(job.home)
    against = standing(registry, recipe, trained.folder / "adapter")
    job.display.say(f"      {against.why}")
    rules = rules_of(registry.policy, recipe.release.alias)
    left = unknown_of(registry.policy, recipe.release.alias)
    if left:
        job.display.say(f"      the policy also asks for {', '.join(left)}, which only the registry judges")
    return judge(job, recipe, base, trained, data, against, rules)


@task(name="train", description="LoRA and its moving average, resumed where it was stopped")
def train(
    recipe: Recipe, dataset: Path, version: Digest, cache: Path, base: Path, out: Path, progress: Progress
) -> dict[str, Any]:
    """Train in processes of its own, on GPUs that no other flow run has; see `flows.launching`.

    It has to be called in the flow's own thread: one that Prefect submits elsewhere is not told to stop.
    """
    from flows.launching import launch
    from trainer.job import Job as Training

    training = Training(recipe=recipe, dataset=dataset, version=version, cache=cache, base_path=base, out=out)
    return launch(training, FlowSettings.read(), progress).as_json()


@task(name="evaluate", description="edits of people that training has never seen, judged by another judge")
def evaluate(
    recipe: Recipe,
    trained: Path,
    data: Path,
    base: Path,
    home: Path,
    against: Standing,
    rules: Mapping[str, Rule],
    out: Path,
    progress: Progress,
    mapper: Mapper,
) -> dict[str, Any]:
    """Fetch and verify what it is compared with, then see `trainer.evaluation.evaluate_recipe`.

    Where it edits by itself on a GPU, no other flow run has that one.
    """
    from serving import settings
    from trainer.evaluation import evaluate_recipe

    fetched = against.fetch(Registry.open(home), progress)
    device = settings.load().device if mapper is here else "cpu"  # a Ray cluster deals out its GPUs itself
    with limits.gpus_of(device, get_run_logger().info):
        evaluate_recipe(
            recipe,
            trained / "adapter",
            base,
            out,
            raw_dir=trained / "adapter-raw",
            progress=progress,
            against=fetched,
            rules=rules,
            taken=against.taken,
            training_data=data,
            mapper=mapper,
            place=home,
        )
    return made(out).as_json()
