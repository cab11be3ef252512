"""A whole small training: an untrained base of two blocks, four people, four expressions, a scorer."""

from __future__ import annotations

from pathlib import Path

import pytest

from fakes.datasets import drawn, true_scores, write_stages
from trainer import recipe as recipes
from trainer.data import build_triplets, cache_dataset
from trainer.recipe import Recipe

TINY = """
name: tiny
seed: 3
base: {id: adapter-foundry/portraits-base, revision: "1", family: qwen-image-edit, license: Apache-2.0}
data:
  identities: {human: 2, anime: 1}
  validation: {human: 1}
  first_identity: 100
  intensities: [0.5, 1.0]
lora:
  rank: 4
  alpha: 8
  targets: [attn.to_q, attn.to_v, attn.add_q_proj, attn.to_add_out, img_mlp.net.0.proj, txt_mlp.net.2]
  dtype: F32
optimiser: {learning_rate: 0.01, warmup_steps: 2, steps: 12, batch_pairs: 2}
noise: {scheme: logit-normal, mean: 0.6, uniform_share: 0.2}
losses:
  flow_matching: {weight: 1.0}
conditioning:
  template: show a {} expression
  expressions: [fear, surprised, angry, disgust]
evaluation: {identities: {human: 1}, first_identity: 900}
release: {adapter: tiny, license: Apache-2.0}
running: {checkpoint_every: 5}
"""


@pytest.fixture(scope="session")
def tiny_recipe() -> Recipe:
    return recipes.parse(TINY)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from trainer.portraits.base import build

    return build(tmp_path_factory.mktemp("base"), width=32, layers=2, head=16)


@pytest.fixture(scope="session")
def tiny_pipeline(tiny_base: Path, tiny_recipe: Recipe):
    from trainer.data.cache import load_base

    return load_base(tiny_base, tiny_recipe)


@pytest.fixture(scope="session")
def tiny_run(
    tiny_recipe: Recipe, tiny_base: Path, tiny_pipeline, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with ``images``, ``scored``, ``dataset`` and ``cache`` of the tiny recipe."""
    run = tmp_path_factory.mktemp("run")
    people = {"human-100": "train", "human-101": "train", "anime-102": "train", "human-103": "validation"}
    rows = drawn(people, tiny_recipe.conditioning.expressions, tiny_recipe.data.intensities)
    scores = true_scores(rows, tiny_recipe.conditioning.expressions)
    write_stages(run, rows, scores, tiny_recipe.conditioning.expressions)
    build_triplets(tiny_recipe, run / "images", run / "scored", run / "dataset")
    cache_dataset(tiny_recipe, run / "dataset", tiny_base, run / "cache", pipeline=tiny_pipeline)
    return run
