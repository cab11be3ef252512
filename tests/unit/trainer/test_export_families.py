"""What is exported is what was trained, as diffusers' own pipelines load it: every family, every module."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fakes.tiny_bases import inputs
from registry.content import FileContent
from registry.dialects import reading, writing
from registry.dialects.grammar import TAKEN
from registry.digest import digest_bytes
from registry.families import FAMILIES, BaseFacts
from registry.manifest import CARD_NAME, WEIGHTS_NAME, AdapterCard
from serving import pipelines
from serving.pipelines.base import EditPipeline
from trainer import export, lora
from trainer.errors import ExportError
from trainer.portraits.bases import BUILDERS, build
from trainer.recipe import Recipe

DIGEST = digest_bytes(b"data")


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory):
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = build(family, tmp_path_factory.mktemp(family))
        return made[family]

    return folder


def recipe_of(tiny: Recipe, family: str, **lora_values: object) -> Recipe:
    """The tiny recipe on a family, with all its kinds of modules."""
    values = tiny.model_dump(mode="json", exclude_unset=True)
    values["base"] |= {"id": f"somebody/tiny-{family}", "family": family}
    if FAMILIES[family].prediction != "velocity":
        values["losses"] = {"denoising": {"weight": 1.0}}
    values["lora"] |= {"targets": sorted(FAMILIES[family].kinds), **lora_values}
    return Recipe.model_validate(values)


def trained(
    pipeline: EditPipeline, recipe: Recipe, steps: int = 2
) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Weights after some steps on random tensors, and predictions without and with them."""
    given = inputs(pipeline, 2)
    with torch.no_grad():
        before = pipeline.predict(**given)
    parameters = lora.inject(pipeline.transformer, recipe)
    try:
        optimiser = torch.optim.AdamW(parameters.values(), 0.02)
        for _ in range(steps):
            pipeline.predict(**given).square().mean().backward()
            assert all(value.grad is not None for value in parameters.values())
            optimiser.step()
            optimiser.zero_grad()
        weights = {name: value.detach().clone() for name, value in parameters.items()}
        with torch.no_grad():
            return weights, before, pipeline.predict(**given)
    finally:
        lora.remove(pipeline.transformer)


def written(recipe: Recipe, weights: dict[str, torch.Tensor], out: Path) -> Path:
    card = export.card(recipe, weights, DIGEST, DIGEST, "Apache-2.0", (), None, 2)
    digest = export.export(recipe, weights, card, out, (64, 32))
    assert digest == digest_bytes((out / WEIGHTS_NAME).read_bytes())
    return out


def updates(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The update of each module that peft put into a model, as peft applies it."""
    return {
        name: layer.scaling[adapter] * layer.lora_B[adapter].weight @ layer.lora_A[adapter].weight
        for name, layer in model.named_modules()
        if hasattr(layer, "lora_A") and layer.lora_A
        for adapter in [next(iter(layer.lora_A))]
    }


def ratios(
    model: torch.nn.Module, weights: dict[str, torch.Tensor], scale: float
) -> dict[str, tuple[float, float]]:
    """Of each module: the strength that a loader gave it, and how far off it is, both in trained lengths."""
    found = updates(model)
    modules = {name.removesuffix(".lora_A.weight") for name in weights if name.endswith("lora_A.weight")}
    assert found.keys() == modules
    result = {}
    for name in modules:
        truth = scale * weights[f"{name}.lora_B.weight"] @ weights[f"{name}.lora_A.weight"]
        length = truth.norm()
        result[name] = (
            float((found[name] * truth).sum() / length**2), float((found[name] - truth).norm() / length)
        )  # fmt: skip
    return result


@pytest.mark.parametrize("form", ["plain", "rank-stabilised", "dora"])
@pytest.mark.parametrize("family", BUILDERS)
def test_diffusers_loads_every_module_at_full_strength(
    bases, tiny_recipe: Recipe, tmp_path: Path, family: str, form: str
) -> None:
    more = {"plain": {}, "rank-stabilised": {"scaling": form}, "dora": {"dora": True}}[form]
    recipe = recipe_of(tiny_recipe, family, **more)
    pipeline = pipelines.load(family, bases(family))
    weights, before, after = trained(pipeline, recipe)
    # Every linear layer of these kinds that has a gradient is in the file.
    facts = FAMILIES[family]
    linear = {
        name for name, module in pipeline.transformer.named_modules()
        if isinstance(module, torch.nn.Linear) and facts.is_target(name)
    }  # fmt: skip
    expected = linear - facts.silent(linear)
    assert {name.removesuffix(".lora_A.weight") for name in weights if "lora_A" in name} == expected

    written(recipe, weights, tmp_path / "adapter")
    fresh = pipelines.load(family, bases(family))
    fresh.pipe.load_lora_weights(tmp_path / "adapter")
    for name, (ratio, off) in ratios(fresh.transformer, weights, recipe.lora.scale).items():
        assert ratio == pytest.approx(1, abs=1e-5), name
        assert off < 1e-5, name
    with torch.no_grad():
        loaded = fresh.predict(**inputs(pipeline, 2))
    moved = (after - before).norm()
    assert moved > 1e-3
    assert float((loaded - after).norm() / moved) < 1e-3


@pytest.mark.parametrize(("family", "dtype"), [("qwen-image-edit", "F16"), ("sdxl", "BF16")])
def test_half_precision_keeps_the_strength(
    bases, tiny_recipe: Recipe, tmp_path: Path, family: str, dtype: str
) -> None:
    recipe = recipe_of(tiny_recipe, family, dtype=dtype, dora=dtype == "BF16")
    weights, _, _ = trained(pipelines.load(family, bases(family)), recipe)
    file = load_file(written(recipe, weights, tmp_path / "adapter") / WEIGHTS_NAME)
    for key, value in file.items():
        wanted = (
            torch.float32 if "magnitude" in key else getattr(torch, {"F16": "float16"}.get(dtype, "bfloat16"))
        )
        assert value.dtype == wanted, key
    assert export.strength_ratio(file, weights, recipe) == pytest.approx(1, abs=1e-3)
    assert export.weakest(file, weights, recipe)[1] == pytest.approx(1, abs=1e-2)


# PEFT's own names have no part of a pipeline in front, so only PEFT itself reads them.
SPELLINGS = [
    (family, dialect)
    for family, dialects in TAKEN.items()
    for dialect in sorted(dialects & {"kohya", "comfyui"})
]


@pytest.mark.parametrize(("family", "dialect"), SPELLINGS)
def test_converted_files_keep_the_strength(
    bases, tiny_recipe: Recipe, tmp_path: Path, family: str, dialect: str
) -> None:
    recipe = recipe_of(tiny_recipe, family)
    pipeline = pipelines.load(family, bases(family))
    weights, _, _ = trained(pipeline, recipe)
    out = written(recipe, weights, tmp_path / "adapter")
    config = json.loads((bases(family) / FAMILIES[family].prefix / "config.json").read_text())
    facts = BaseFacts(id=recipe.base.id, family=family, license="Apache-2.0", revision="1", config=config)
    target = tmp_path / dialect / "lora.safetensors"
    target.parent.mkdir()
    with FileContent(out / WEIGHTS_NAME) as content, target.open("wb") as sink:
        said = writing.write(reading.read(content, facts), content, dialect, sink.write)
    assert said.ratio == pytest.approx(1, abs=1e-6)
    fresh = pipelines.load(family, bases(family))
    fresh.pipe.load_lora_weights(target.parent, weight_name=target.name)
    for name, (ratio, off) in ratios(fresh.transformer, weights, recipe.lora.scale).items():
        assert ratio == pytest.approx(1, abs=1e-3), name
        assert off < 1e-3, name


def tags_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize("family", BUILDERS)
def test_the_header_says_what_the_file_is_and_no_alpha(
    tiny_recipe: Recipe, tmp_path: Path, family: str
) -> None:
    recipe = recipe_of(tiny_recipe, family)
    module = (
        "transformer_blocks.0.attn.to_q"
        if family[0] != "s" or family == "sd3"
        else ("mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    )
    weights = {f"{module}.lora_A.weight": torch.ones(4, 8), f"{module}.lora_B.weight": torch.ones(8, 4)}
    found = tags_of(written(recipe, weights, tmp_path / "adapter") / WEIGHTS_NAME)
    assert found.pop("modelspec.architecture").endswith("/lora")
    assert found.pop("modelspec.prediction_type", None) == ("epsilon" if family in ("sdxl", "sd15") else None)
    assert found == {
        "format": "pt",
        "base": f"somebody/tiny-{family}@1",
        "recipe": recipe.digest,
        "dataset": DIGEST,
        "code": export.code_version(),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "tiny",
        "modelspec.license": "Apache-2.0",
        "modelspec.resolution": "32x64",
    }


def test_architectures_have_the_names_of_the_field(tiny_recipe: Recipe) -> None:
    assert {export.architecture(recipe_of(tiny_recipe, family)) for family in FAMILIES} == {
        "Qwen-Image-Edit", "flux-1-dev", "flux-1-kontext-dev", "Flux.2-klein-4b", "stable-diffusion-3",
        "stable-diffusion-xl-v1-base", "stable-diffusion-v1",
    }  # fmt: skip
    large = recipe_of(tiny_recipe, "sd3")
    base = large.base.model_copy(update={"id": "stabilityai/stable-diffusion-3.5-large"})
    assert export.architecture(large.model_copy(update={"base": base})) == "stable-diffusion-3-5-large"


def test_equal_trainings_give_equal_bytes(tiny_recipe: Recipe, tmp_path: Path) -> None:
    """safetensors itself writes the tags in an order of chance, another one in each process."""
    recipe = recipe_of(tiny_recipe, "qwen-image-edit")
    name = "transformer_blocks.0.attn.to_q"
    weights = {f"{name}.lora_A.weight": torch.ones(4, 8), f"{name}.lora_B.weight": torch.ones(8, 4)}
    data = (written(recipe, weights, tmp_path / "one") / WEIGHTS_NAME).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert list(header["__metadata__"]) == sorted(header["__metadata__"])
    assert length % 8 == 0
    shuffled = io.BytesIO()
    save_file(load_file(tmp_path / "one" / WEIGHTS_NAME), tmp_path / "x", metadata=header["__metadata__"])
    shuffled.write(export._in_order((tmp_path / "x").read_bytes()))
    assert shuffled.getvalue() == data


def test_the_card_names_the_kinds_that_were_trained(bases, tiny_recipe: Recipe, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_recipe, "sdxl", dtype="BF16")
    weights, _, _ = trained(pipelines.load("sdxl", bases("sdxl")), recipe)
    out = written(recipe, weights, tmp_path / "adapter")
    card = AdapterCard.parse((out / CARD_NAME).read_bytes())
    assert set(card.lora.targets) == FAMILIES["sdxl"].kinds
    assert card.lora.dtype == "BF16"
    assert card.base.family == "sdxl"


def damaged(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    right = export.folded
    monkeypatch.setattr(export, "folded", lambda weights, recipe: change(right(weights, recipe)))


@pytest.mark.parametrize(
    ("factor", "only", "says"),
    [(0.5, "", "has 0.5000 of the trained strength"), (0.0, "to_v", "to_v has 0.0000 of the trained")],
)
def test_an_export_that_is_not_what_was_trained_is_refused(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float, only: str, says: str
) -> None:
    """As a whole, or in one small module that the whole would hide."""
    recipe = recipe_of(tiny_recipe, "qwen-image-edit")
    weights = {}
    for kind, size in (("to_q", 1.0), ("to_v", 0.01)):
        name = f"transformer_blocks.0.attn.{kind}"
        weights |= {
            f"{name}.lora_A.weight": torch.ones(4, 8), f"{name}.lora_B.weight": size * torch.ones(8, 4)
        }  # fmt: skip
    damaged(
        monkeypatch,
        lambda file: {k: v * factor if "lora_B" in k and only in k else v for k, v in file.items()},
    )
    with pytest.raises(ExportError, match=says):
        written(recipe, weights, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
