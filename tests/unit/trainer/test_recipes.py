"""The shipped recipes: every one is right, its targets are in the real model, and its GPU holds it."""

from __future__ import annotations

from importlib import resources
from typing import Any

import pytest
import torch

from registry.families import KNOWN_BASES, family
from serving.plan import bases
from serving.plan.machines import MACHINES
from trainer import lora
from trainer import recipe as recipes
from trainer.plan.reckoning import Plan, reckon
from trainer.portraits import BASE_ID, base_path

SHIPPED = sorted(
    item.name.removesuffix(".yaml")
    for item in (resources.files("trainer") / "recipes").iterdir()
    if item.name.endswith(".yaml")
)
FAMILIES = {"qwen-image-edit", "flux", "flux-kontext", "flux2-klein", "sd3", "sdxl", "sd15"}


def base_of(recipe: recipes.Recipe) -> bases.Base:
    return bases.load(recipe.base, base_path() if recipe.base.id == BASE_ID else None)


def test_there_is_one_for_every_family() -> None:
    assert {recipes.load(name).base.family for name in SHIPPED} == FAMILIES


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_is_right_and_its_targets_are_in_the_real_model(name: str) -> None:
    recipe = recipes.load(name)
    assert recipe.name == name
    known = KNOWN_BASES[recipe.base.id]
    assert (recipe.base.family, recipe.base.license) == (known.family, known.license)
    base = base_of(recipe)
    denoiser = base.build(base.denoiser, torch.bfloat16)
    names = lora.target_modules(denoiser, recipe.base.family, recipe.targets)
    found = {family(recipe.base.family).block_of(module)[1] for module in names}
    assert found == set(recipe.targets)
    for module in names:
        layer: Any = denoiser.get_submodule(module)
        assert known.spec[module] == (layer.out_features, layer.in_features)


def test_the_recipe_of_the_paper_is_as_published() -> None:
    recipe = recipes.load("pixelsmile")
    assert (recipe.lora.rank, recipe.lora.alpha, len(recipe.targets)) == (64, 128, 12)
    settings = recipe.optimiser
    assert (settings.learning_rate, settings.schedule, settings.epochs) == (1e-4, "cosine", 100)
    assert settings.batch_pairs == 4 * recipe.running.count
    assert recipe.running.gpu == "H200"
    weights = {name: loss.weight for name, loss in recipe.losses.items()}
    assert weights == {"flow_matching": 1.0, "contrastive": 0.05, "identity": 0.1}
    assert recipe.losses["contrastive"].temperature == 0.07
    assert (recipe.noise.scheme, recipe.noise.shift) == ("uniform", 1.0)
    assert recipe.conditioning.expressions == recipes.load("pixelsmile-portraits").conditioning.expressions
    assert recipe.conditioning.prompt("fear") == "Edit the person to show a fear expression"


def plan_of(name: str) -> Plan:
    recipe = recipes.load(name)
    return reckon(recipe, base_of(recipe), triplets=1000)


SMALL = {"pixelsmile-portraits", "sd15"}


@pytest.mark.parametrize(
    "name", [name if name in SMALL else pytest.param(name, marks=pytest.mark.slow) for name in SHIPPED]
)
def test_the_gpu_of_a_recipe_holds_it(name: str) -> None:
    plan = plan_of(name)
    own = plan.needs[0]
    assert own.placement == plan.placement
    assert own.total > 0
    if MACHINES[plan.machine.name].memory is not None:
        assert plan.machine.name in own.fits
