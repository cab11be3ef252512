"""Trainings on a base that is small, waiting or spread, through the real launcher."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from registry.manifest import WEIGHTS_NAME
from trainer.data.cache import load_base
from trainer.launch import train
from trainer.recipe import Recipe
from trainer.sections import RunningSection


def changed(recipe: Recipe, **sections: dict[str, object]) -> Recipe:
    parts = {name: getattr(recipe, name).model_copy(update=part) for name, part in sections.items()}
    # Anew from its values: a copy would keep the digest of the original.
    return Recipe.model_validate(recipe.model_copy(update=parts).model_dump(mode="json", exclude_unset=True))


@pytest.fixture(scope="module")
def short(tiny_recipe: Recipe) -> Recipe:
    # A rate at which rounding differences stay rounding differences.
    return changed(tiny_recipe, optimiser={"learning_rate": 1e-3, "steps": 4})


@pytest.fixture(scope="module")
def run(tiny_run: Path, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory):
    def trained(recipe: Recipe, processes: int = 1):
        out = tmp_path_factory.mktemp("out")
        pipeline = load_base(tiny_base, recipe) if processes == 1 else None
        result = train(
            recipe, tiny_run / "dataset", tiny_run / "cache", tiny_base, out,
            pipeline=pipeline, processes=processes, track=False,
        )  # fmt: skip
        return result.facts, load_file(out / "adapter-raw" / WEIGHTS_NAME)

    return trained


@pytest.fixture(scope="module")
def plain(run, short: Recipe):
    return run(short)


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], atol: float) -> bool:
    return one.keys() == other.keys() and all(
        torch.allclose(one[name], other[name], atol=atol) for name in one
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stored", "dora", "running"), [("fp32", True, {}), ("nf4", False, {"checkpointing": True})]
)
def test_two_processes_share_the_base(run, short: Recipe, stored: str, dora: bool, running: dict) -> None:
    recipe = changed(short, precision={"base": stored}, lora={"dora": dora}, running=running)
    facts, weights = run(recipe)
    half, spread = run(changed(recipe, running={**running, "shard": True}), 2)
    assert 0.48 < half["base_bytes"] / facts["base_bytes"] < 0.56
    assert close(weights, spread, 2e-5)
    assert half["validation_loss"] == pytest.approx(facts["validation_loss"], rel=1e-4)


def test_what_changes_no_number_changes_no_weight(run, short: Recipe, plain) -> None:
    running = {"checkpointing": True, "offload_blocks": 1}
    facts, weights = run(changed(short, running=running))
    assert facts["waiting_bytes"] > 0
    assert facts["base_bytes"] + facts["waiting_bytes"] == plain[0]["base_bytes"]
    assert all(torch.equal(plain[1][name], value) for name, value in weights.items())


def test_a_small_base_trains_nearly_the_same(run, short: Recipe, plain) -> None:
    for stored, share in (("bf16", 0.65), ("fp8", 0.5), ("nf4", 0.4)):
        facts, weights = run(changed(short, precision={"base": stored}))
        assert facts["base_bytes"] < share * plain[0]["base_bytes"], stored
        assert facts["validation_loss"] == pytest.approx(plain[0]["validation_loss"], rel=0.05)
        assert not all(torch.equal(plain[1][name], value) for name, value in weights.items())


def test_magnitudes_train_and_are_exported(run, short: Recipe, plain) -> None:
    _, weights = run(changed(short, lora={"dora": True}))
    magnitudes = {name: value for name, value in weights.items() if name.endswith("lora_magnitude_vector")}
    assert len(magnitudes) == len(plain[1]) // 2
    assert {value.dtype for value in magnitudes.values()} == {torch.float32}


def test_spread_blocks_are_not_compiled() -> None:
    with pytest.raises(ValueError, match="shard and compile exclude each other"):
        RunningSection(shard=True, compile=True)
