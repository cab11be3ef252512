"""From a recipe to a dataset that a training can read: the first four stages as Prefect tasks."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from prefect import get_run_logger, task

from flows import limits
from flows.settings import FlowSettings
from flows.stages import NOT_MAKING, Job, code_digest
from registry.digest import Digest
from trainer.parts import Mapper
from trainer.progress import Progress
from trainer.recipe import Recipe
from trainer.stage import StageResult


def make_dataset(job: Job, recipe: Recipe) -> StageResult:
    """Do every stage up to the dataset: pictures drawn, edited or one's own."""
    code, words = code_digest(NOT_MAKING), recipe.conditioning.expressions
    if recipe.data.source == "folder":
        from trainer.data import folder_key

        pictures = folder_key(recipe)
        return job.cached(folder, key={"code": code, "pictures": pictures}, recipe=recipe, pictures=pictures)
    from trainer import scoring, synthesis

    require_terms(job.home, recipe)
    images = job.cached(
        synthesise,
        key={"code": code, **synthesis.inputs(recipe, job.home)},
        recipe=recipe,
        mapper=job.shared(asks=recipe.synthesis is not None),
    )
    scored = job.cached(
        score,
        key={
            "code": code,
            "images": images.digest,
            "expressions": words,
            **recipe.section("scoring"),
            **scoring.inputs(recipe, job.home),
        },
        recipe=recipe,
        images=images.folder,
        mapper=job.shared(asks=recipe.scoring.scorer != "judge"),
    )
    return job.cached(
        triplets,
        key={
            "code": code,
            "images": images.digest,
            "scores": scored.digest,
            "scorer": scored.facts["ingredients"],  # the same numbers may stand under other terms
            **recipe.section("data", "conditioning"),
        },
        recipe=recipe,
        images=images.folder,
        scored=scored.folder,
        mapper=job.shared(asks=False),
    )


def require_terms(home: Path, recipe: Recipe) -> None:
    """Let no API be paid for pictures or scores whose terms the registry would refuse afterwards.

    Raises:
        registry.errors.LicenseRefused: it would.
    """
    from registry.admission import judge_licences
    from registry.client import Registry
    from registry.licenses import require
    from trainer.terms import asks_paid, card_ahead

    if asks_paid(recipe):
        require(judge_licences(card_ahead(recipe), Registry.open(home).policy.admission(None)))


@task(name="synthesise", description="people, neutral and with each expression at each intensity")
def synthesise(recipe: Recipe, out: Path, progress: Progress, mapper: Mapper) -> dict[str, Any]:
    """See `trainer.synthesis.synthesise`."""
    from trainer.synthesis import synthesise as work

    return work(recipe, out, progress, mapper=mapper).as_json()


@task(name="score", description="what the labelling judge sees in each picture, twelve numbers")
def score(recipe: Recipe, images: Path, out: Path, progress: Progress, mapper: Mapper) -> dict[str, Any]:
    """See `trainer.scoring.score`."""
    from trainer.scoring import score as work

    return work(recipe, images, out, progress, mapper=mapper).as_json()


@task(name="triplets", description="a person, and the same person with two expressions that look alike")
def triplets(
    recipe: Recipe, images: Path, scored: Path, out: Path, progress: Progress, mapper: Mapper
) -> dict[str, Any]:
    """See `trainer.data.build_triplets`."""
    from trainer.data import build_triplets

    return build_triplets(recipe, images, scored, out, progress, mapper=mapper).as_json()


@task(name="folder", description="pictures of one's own, each looked at before it is believed")
def folder(recipe: Recipe, pictures: Digest, out: Path, progress: Progress) -> dict[str, Any]:
    """See `trainer.data.read_folder`."""
    from trainer.data import read_folder

    return read_folder(recipe, out, progress, wanted=pictures).as_json()


@task(name="cache", description="latents of the pictures and embeddings of the prompts, once and for all")
def cache(recipe: Recipe, dataset: Path, base: Path, out: Path, progress: Progress) -> dict[str, Any]:
    """See `trainer.data.cache_dataset`; on GPUs that no other flow run has, if something is missing."""
    import torch

    from trainer.data import cache_dataset

    device = "cuda" if torch.cuda.is_available() else "cpu"
    allowed, log = FlowSettings.read().processes, get_run_logger().info

    def room(processes: int) -> AbstractContextManager[int]:
        return limits.gpus_of(device, log, most=min(processes, allowed or processes))

    return cache_dataset(recipe, dataset, base, out, progress, room=room).as_json()
