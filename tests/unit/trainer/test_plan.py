"""The plan of a recipe, held to the real thing: files, weights on the device, states, saved tensors, work."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel

from registry.digest import digest_bytes
from registry.families import FAMILIES, KNOWN_BASES, base_spec
from serving import pipelines
from serving.errors import BaseNotFound
from serving.pipelines.base import PromptEmbeds
from serving.placement import spread
from serving.plan import bases
from serving.plan.machines import GIB, MACHINES
from serving.plan.weights import BaseBytes
from trainer import export, lora, optimisers, placement, text_lora
from trainer import recipe as recipes
from trainer.cli import main
from trainer.plan import memory
from trainer.plan.apis import bills
from trainer.plan.command import plan
from trainer.plan.count import flop_counter
from trainer.plan.memory import Placement, on_a_gpu
from trainer.plan.reckoning import Plan, reckon
from trainer.portraits.bases import BUILDERS, build
from trainer.recipe import Recipe

PUBLISHED = {
    "Qwen/Qwen-Image-Edit-2511": 20_430_401_088,
    "black-forest-labs/FLUX.1-dev": 11_901_408_320,
    "black-forest-labs/FLUX.1-Kontext-dev": 11_901_408_320,
    "black-forest-labs/FLUX.2-klein-4B": 3_875_544_576,
    "stabilityai/stable-diffusion-3.5-medium": 2_243_171_520,
    "stabilityai/stable-diffusion-3.5-large": 8_056_627_520,
    "stabilityai/stable-diffusion-xl-base-1.0": 2_567_463_684,
    "stable-diffusion-v1-5/stable-diffusion-v1-5": 859_520_964,
}


def recipe_of(family: str = "qwen-image-edit", **sections: dict[str, Any]) -> Recipe:
    loss = "denoising" if family in ("sdxl", "sd15") else "flow_matching"
    value: dict[str, Any] = {
        "name": "tiny",
        "base": {"id": f"adapter-foundry/tiny-{family}", "revision": "1", "family": family,
                 "license": "Apache-2.0"},
        "data": {"identities": {"human": 2}, "validation": {"human": 1}, "first_identity": 1,
                 "intensities": [0.5, 1.0]},
        "lora": {"rank": 4, "alpha": 8, "targets": "full", "dtype": "F32"},
        "optimiser": {"learning_rate": 0.01, "warmup_steps": 2, "steps": 12, "batch_pairs": 4},
        "losses": {loss: {"weight": 1.0}},
        "conditioning": {"template": "show a {} expression", "expressions": ["fear", "surprised"]},
        "evaluation": {"identities": {"human": 1}, "first_identity": 900},
        "release": {"adapter": "tiny", "license": "Apache-2.0"},
        "running": {"checkpoint_every": 5},
    }  # fmt: skip
    for name, part in sections.items():
        value[name] = {**value.get(name, {}), **part}
    return Recipe.model_validate(value)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = build(family, tmp_path_factory.mktemp(family))
        return made[family]

    return folder


@pytest.fixture(scope="session")
def planned(folders: Callable[[str], Path]) -> Callable[[Recipe], Plan]:
    made: dict[Any, Plan] = {}

    def plan(recipe: Recipe) -> Plan:
        key = recipe.model_dump_json()
        if key not in made:
            made[key] = reckon(recipe, bases.load(recipe.base, folders(recipe.base.family)))
        return made[key]

    return plan


@pytest.fixture(scope="session")
def qwen() -> Plan:
    recipe = recipes.load("pixelsmile")
    return reckon(recipe, bases.load(recipe.base, None), triplets=20_000)


# -- adapters --


@pytest.mark.parametrize(
    ("family", "part"),
    [
        *((family, {}) for family in BUILDERS),
        ("qwen-image-edit", {"dtype": "BF16", "targets": "attention"}),
        ("qwen-image-edit", {"dtype": "F16", "dora": True}),
        ("sdxl", {"dtype": "BF16", "text_encoder": ["self_attn.q_proj", "mlp.fc1"]}),
    ],
)
def test_the_exported_file_has_the_size_that_was_planned(
    family: str, part: dict[str, Any], folders: Any, planned: Any, tmp_path: Path
) -> None:
    recipe = recipe_of(family, lora=part)
    pipeline = pipelines.load(family, folders(family))
    weights = lora.inject(pipeline.transformer, recipe) | text_lora.inject(pipeline, recipe)
    dataset = digest_bytes(b"any")
    card = export.card(recipe, weights, dataset, dataset, "Apache-2.0", (), None, 12)
    export.export(recipe, weights, card, tmp_path / "adapter", pipeline.size)
    plan = planned(recipe)
    assert (tmp_path / "adapter" / "pytorch_lora_weights.safetensors").stat().st_size == plan.adapter.file
    assert plan.adapter.parameters == sum(value.numel() for value in weights.values())
    assert sum(plan.adapter.kinds.values()) == plan.adapter.parameters
    if isinstance(recipe.lora.targets, str) and not recipe.lora.text_encoder:
        assert plan.presets[recipe.lora.targets] == plan.adapter


@pytest.mark.slow
def test_the_sizes_that_are_told_of_rank_64(qwen: Plan) -> None:
    sizes = {name: round(one.file / 1e6) for name, one in qwen.presets.items()}
    assert sizes == {"full": 844, "attention": 376, "image-stream": 425}
    # With the modules that never learn, as the published trainer has them:
    spec = KNOWN_BASES["Qwen/Qwen-Image-Edit-2511"].spec
    kinds = recipes.load("pixelsmile").targets
    every = [shape for name, shape in spec.items() if name.split(".", 2)[2] in kinds]
    assert len(every) == 720
    assert round(2 * 64 * sum(map(sum, every)) / 1e6) == 849
    assert qwen.adapter.modules == 716


# -- the bases --


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_shapes_are_those_of_the_base(name: str) -> None:
    known = KNOWN_BASES[name]
    recipe = recipe_of().model_copy(update={"base": recipe_of().base.model_copy(
        update={"id": name, "family": known.family})})  # fmt: skip
    base = bases.load(recipe.base, None)
    denoiser = base.build(base.denoiser, torch.bfloat16)
    assert sum(value.numel() for value in denoiser.parameters()) == PUBLISHED[name]
    texts = {part: base.parts[part] for part in known.text_encoders}
    assert base_spec(known.family, base.parts[base.denoiser], texts) == known.spec


def test_every_published_configuration_names_its_source() -> None:
    files = list((resources.files("serving.plan") / "configs").iterdir())
    values = [json.loads(item.read_text("utf-8")) for item in files]
    assert {value["base"] for value in values} == set(PUBLISHED)
    assert all(len(value["source"]) > 20 for value in values)


def test_the_own_sizes_are_those_of_the_pipelines(folders: Any) -> None:
    from serving.pipelines import flux, flux2, qwen_image_edit, sd3, unet

    assert FAMILIES["qwen-image-edit"].pixels == qwen_image_edit.DEFAULT_PIXELS
    assert FAMILIES["flux"].pixels == FAMILIES["flux-kontext"].pixels == flux.DEFAULT_PIXELS
    assert FAMILIES["flux2-klein"].pixels == flux2.DEFAULT_PIXELS
    found = {one.family: one.default_pixels for module in (sd3, unet) for one in vars(module).values()
             if isinstance(one, type) and hasattr(one, "default_pixels")}  # fmt: skip
    assert {name: FAMILIES[name].pixels for name in ("sd3", "sdxl", "sd15")}.items() <= found.items()


def test_a_base_without_shapes_is_explained(tmp_path: Path) -> None:
    with pytest.raises(BaseNotFound, match="--base"):
        bases.load(recipe_of().base, None)
    with pytest.raises(BaseNotFound, match="diffusers layout"):
        bases.load(recipe_of().base, tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(BaseNotFound, match="has no transformer, vae"):
        bases.load(recipe_of().base, tmp_path)


# -- work --


@pytest.mark.parametrize("family", BUILDERS)
def test_the_counted_work_is_that_of_the_real_pipeline(family: str, folders: Any, planned: Any) -> None:
    recipe = recipe_of(family)
    base, plan = bases.load(recipe.base, folders(family)), planned(recipe)
    pipeline = pipelines.load(family, folders(family))
    from PIL import Image

    picture = Image.new("RGB", pipeline.size)
    prompts = pipeline.encode_prompts([picture], ["show a happy expression"])
    tokens = bases.text_tokens(base)
    if family == "qwen-image-edit":  # its prompts have no fixed length; the plan takes a usual one
        prompts = PromptEmbeds(
            embeds=prompts.embeds[:, :1].expand(1, tokens, -1), mask=torch.ones(1, tokens, dtype=torch.bool)
        )
    assert prompts.embeds.shape[1] == tokens
    latents = pipeline.encode_images([picture])
    lora.inject(pipeline.transformer, recipe)
    with flop_counter() as counter, sdpa_kernel(SDPBackend.MATH):
        result = pipeline.predict(latents, latents, prompts, torch.tensor([0.5]))
        assert counter.get_total_flops() == plan.denoiser.forward
        result.sum().backward()
    assert counter.get_total_flops() - plan.denoiser.forward == pytest.approx(
        plan.denoiser.backward, rel=0.02
    )


@pytest.mark.parametrize("family", BUILDERS)
def test_the_counted_work_of_decoding_is_that_of_the_real_pipeline(family: str, folders: Any) -> None:
    recipe = recipe_of(family, losses={"identity": {"weight": 0.1}})
    plan = reckon(recipe, bases.load(recipe.base, folders(family)))
    pipeline = pipelines.load(family, folders(family))
    from PIL import Image

    latents = pipeline.encode_images([Image.new("RGB", pipeline.size)]).requires_grad_(True)
    with flop_counter() as counter, sdpa_kernel(SDPBackend.MATH):
        pixels = pipeline.decode(latents)
        assert plan.decode is not None
        assert counter.get_total_flops() == plan.decode.forward
        pixels.sum().backward()
    assert counter.get_total_flops() == plan.decode.forward + plan.decode.backward


def test_the_counted_work_is_that_of_the_formula(folders: Any, planned: Any) -> None:
    recipe = recipe_of()
    base = bases.load(recipe.base, folders("qwen-image-edit"))
    config = base.parts["transformer"]
    width = config["num_attention_heads"] * config["attention_head_dim"]
    layers, rank = config["num_layers"], recipe.lora.rank
    image, text = 2 * (base.pixels // base.downscale // 2) ** 2, bases.text_tokens(base)
    tokens = image + text
    block = tokens * 12 * width**2  # four projections of the attention and a feed-forward of four widths
    block += 2 * 6 * width**2  # shift, scale and gate of both streams, once a sample
    block += 2 * tokens**2 * width  # queries with keys, weights with values
    update = tokens * rank * (4 * 2 * width + 2 * 5 * width)
    unused = text * rank * (2 * 2 * width + 2 * 5 * width)  # the last block's text stream has no LoRA there
    outside = image * config["in_channels"] * width + text * config["joint_attention_dim"] * width
    outside += 256 * width + width**2 + 2 * width**2 + image * width * 4 * config["out_channels"]
    assert planned(recipe).denoiser.forward == 2 * (layers * (block + update) - unused + outside)


@pytest.mark.slow
def test_the_measured_work_of_the_full_size_is_found_again(qwen: Plan) -> None:
    one = qwen.denoiser
    assert one.forward / 1e12 == pytest.approx(35.6, abs=0.05)
    assert (one.forward + one.backward) / 1e12 == pytest.approx(75.8, abs=0.1)
    assert (one.forward + one.backward + one.again) / 1e12 == pytest.approx(111.4, abs=0.1)


def test_a_loss_on_pictures_decodes_what_its_levels_let_through(planned: Any) -> None:
    plain = planned(recipe_of())
    assert plain.decode is None
    assert (plain.step.decode, plain.step.pictures) == (0, 0)
    looking = {"weight": 0.1, "max_sigma": 0.5, "pairs": 100}
    half = planned(recipe_of(losses={"identity": looking}, data={"keep_share": 0.0}))
    assert half.step.pictures == pytest.approx(8 * 0.5, rel=0.05)
    few = planned(recipe_of(losses={"identity": {**looking, "pairs": 1}}))
    assert few.step.pictures == 2
    assert few.step.decode == 2 * (few.decode.forward + few.decode.backward)


# -- memory --


@pytest.mark.parametrize("family", ["qwen-image-edit", "flux2-klein", "sdxl"])
@pytest.mark.parametrize("stored", ["fp32", "bf16", "fp8", "nf4"])
def test_the_base_takes_what_the_placement_says(family: str, stored: Any, folders: Any) -> None:
    waiting = 1 if stored == "fp8" else 0
    running = {"checkpointing": True, "offload_blocks": waiting}
    recipe = recipe_of(family, precision={"base": stored, "compute": "fp32"}, running=running)
    base = bases.load(recipe.base, folders(family))
    counted = BaseBytes.of(base.build(base.denoiser, torch.float32), stored, 4)
    pipeline = pipelines.load(family, folders(family))
    with placement.training(pipeline, recipe, "cpu") as placed:
        assert placed.held_bytes + placed.waiting_bytes == sum(counted.blocks) + counted.rest
        away = spread(len(counted.blocks), waiting)
        assert placed.waiting_bytes == sum(counted.linear[at] for at in away)
    here = Placement(stored=stored, gpus=1, shard=False)
    ahead = min(2, len(away)) * max(counted.linear)
    assert on_a_gpu(counted, here, waiting) == placed.held_bytes + ahead


def test_a_shared_base_is_divided() -> None:
    counted = BaseBytes(linear=(10,) * 8, blocks=(12,) * 8, rest=7)
    alone, four = (Placement(stored="bf16", gpus=4, shard=shard) for shard in (False, True))
    assert on_a_gpu(counted, alone, 0) == 8 * 12 + 7
    assert on_a_gpu(counted, four, 0) == 8 * 12 // 4 + 7 + 2 * 12


@pytest.mark.parametrize("name", ["adamw", "adamw-8bit", "prodigy"])
def test_the_optimiser_takes_what_it_really_keeps(name: Any) -> None:
    settings = recipe_of(optimiser={"name": name}).optimiser
    values = {str(size): torch.nn.Parameter(torch.randn(size)) for size in (100, 4096, 10_000)}
    for value in values.values():
        value.grad = torch.randn_like(value)
    optimiser = optimisers.build(values, settings)
    optimiser.step()
    kept = sum(
        tensor.numel() * tensor.element_size()
        for tensors in optimiser.state.values()
        for name, tensor in tensors.items()
        if isinstance(tensor, torch.Tensor) and tensor.numel() > 1 and not name.startswith("qmap")
    )
    assert kept == memory.optimiser_bytes(name, [len(value) for value in values.values()])


@pytest.mark.parametrize("family", ["qwen-image-edit", "flux", "sdxl"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_waits_for_the_backward_pass_is_what_autograd_keeps(
    family: str, checkpointing: bool, folders: Any, planned: Any
) -> None:
    recipe = recipe_of(family, running={"checkpointing": checkpointing})
    base, plan = bases.load(recipe.base, folders(family)), planned(recipe)
    pipeline = pipelines.load(family, folders(family))
    denoiser = pipeline.transformer
    kept: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    rows = 2
    given = bases.samples(base, (base.pixels, base.pixels), rows, torch.float32)
    given = {name: real(value) for name, value in given.items()}
    with placement.training(pipeline, recipe, "cpu"):
        weights = lora.inject(denoiser, recipe)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            denoiser(**given, return_dict=False)
        known = {value.untyped_storage().data_ptr()
                 for value in (*denoiser.parameters(), *denoiser.buffers(), *weights.values())}  # fmt: skip
        lora.remove(denoiser)
    total = sum(storage.nbytes() for place, storage in kept.items() if place not in known)
    if not checkpointing:
        assert plan.denoiser.saved.of(rows) == pytest.approx(total, rel=0.1)
        return
    # Autograd tells what enters the blocks; the inside of the largest comes only in the backward pass.
    assert plan.denoiser.checkpointed.of(rows) >= 0.9 * total
    assert plan.denoiser.checkpointed.of(rows) < plan.denoiser.saved.of(rows)


def real(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: real(one) for name, one in value.items()}
    return torch.rand(value.shape, dtype=value.dtype) if isinstance(value, torch.Tensor) else value


def test_memory_by_part_and_the_gpus_that_hold_it(qwen: Plan) -> None:
    own = qwen.needs[0]
    assert own.parts["LoRA, fp32"] == own.parts["gradients, fp32"] == 4 * qwen.adapter.parameters
    assert own.parts["optimiser"] == 8 * qwen.adapter.parameters
    assert own.parts["base"] == 2 * 20_430_401_088
    assert own.total == sum(own.parts.values())
    assert own.fits == tuple(
        name for name, one in MACHINES.items() if one.memory is not None and one.memory >= own.total
    )
    by = {
        (need.placement.stored, need.placement.gpus, need.placement.shard): need.total for need in qwen.needs
    }
    assert by["nf4", 1, False] < by["fp8", 1, False] < by["bf16", 1, False]
    assert by["bf16", 8, True] < by["bf16", 4, True] < by["bf16", 2, True] < by["bf16", 1, False]


def test_an_fp8_base_with_checkpointing_fits_80_gb(qwen: Plan) -> None:
    recipe = recipes.load("pixelsmile")
    sizes = {need.placement: need for need in qwen.needs}
    need = sizes[Placement(stored="fp8", gpus=1, shard=False)]
    saved = qwen.denoiser.saved.of(2) - qwen.denoiser.checkpointed.of(2)
    assert recipe.running.micro_pairs == 1
    assert need.total - saved < 60 * GIB


# -- time and money --


def test_steps_hours_and_cost(qwen: Plan) -> None:
    assert qwen.steps == 100 * 20_000 // 16
    seconds = qwen.step.each / (989e12 * 0.4)
    assert qwen.hours == pytest.approx(qwen.steps * seconds / 3600)
    assert qwen.cost == pytest.approx(qwen.hours * 4 * 3.5)
    assert qwen.step.each == pytest.approx(qwen.step.total / 4, rel=1e-6)


def test_more_gpus_share_the_work_and_the_last_has_the_rest(folders: Any) -> None:
    recipe = recipe_of()
    base = bases.load(recipe.base, folders("qwen-image-edit"))
    machine = replace(MACHINES["H100"], price=1.0, utilisation=0.5)
    one, three = (reckon(recipe, base, gpus=count, machine=machine) for count in (1, 3))
    assert three.step.total == one.step.total
    assert three.step.each == one.step.each // 2  # four pairs on three GPUs: one of them has two
    assert three.hours == pytest.approx(one.hours / 2)
    assert three.cost == pytest.approx(one.cost * 1.5)
    assert three.pairs == 2


def test_without_the_data_a_recipe_in_epochs_has_no_hours(planned: Any) -> None:
    plan = planned(recipe_of(optimiser={"steps": None, "epochs": 3}))
    assert (plan.steps, plan.hours, plan.cost) == (None, None, None)
    assert plan.step.total > 0


# -- the command --


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(["plan", *words])
    out, err = capsys.readouterr()
    return caught.value.code or 0, out, err


def test_the_command_prints_tables_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(
        capsys, "pixelsmile-portraits", "--gpu", "RTX4090", "--price", "2", "--utilisation", "0.1"
    )
    assert code == 0
    for word in (
        "preset attention",
        "fits RTX4090",
        "gradients, fp32",
        "640 steps",
        "at 2 for each RTX4090",
        "10%",
    ):
        assert word in out
    code, out, _ = run(capsys, "pixelsmile-portraits", "--json", "--gpus", "2", "--base-precision", "nf4")
    found = json.loads(out)
    assert code == 0
    assert found["placement"] == {"stored": "nf4", "gpus": 2, "shard": False}
    assert found["steps"] == 640
    assert found["needs"][0]["total"] == sum(found["needs"][0]["parts"].values())


EPOCHS = """
name: epochs
base: {id: adapter-foundry/portraits-base, revision: "1", family: qwen-image-edit, license: Apache-2.0}
data: {source: folder, path: pictures}
lora: {rank: 4, alpha: 8, targets: attention}
optimiser: {learning_rate: 0.01, warmup_steps: 2, epochs: 6, batch_pairs: 2}
losses: {flow_matching: {weight: 1.0}}
conditioning: {template: "show a {} expression", expressions: [fear, surprised]}
release: {adapter: epochs, license: Apache-2.0}
"""


def test_the_command_plans_without_the_data_and_with_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(EPOCHS)
    code, out, _ = run(capsys, "recipe.yaml")
    assert code == 0
    assert "--triplets N" in out
    assert "1,000 steps take" in out
    assert json.loads(run(capsys, "recipe.yaml", "--json", "--triplets", "8")[1])["steps"] == 24

    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("neutral", "fear", "surprised"):
        (folder / f"{name}.png").touch()
    line = {"split": "train", "identity": "anna", "source": "neutral.png",
            "a": {"image": "fear.png", "expression": "fear", "intensity": 1.0},
            "b": {"image": "surprised.png", "expression": "surprised", "intensity": 1.0}}  # fmt: skip
    others = {**line, "split": "validation", "identity": "berta"}
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, [line, line, others])))
    found = json.loads(run(capsys, "recipe.yaml", "--json")[1])
    assert (found["triplets"], found["steps"]) == (2, 6)

    (folder / "pairs.jsonl").write_text("{}")
    code, _, err = run(capsys, "recipe.yaml")
    assert code == 1
    assert "line 1" in err


def test_blocks_that_are_alike_are_counted_once_and_the_sum_is_that_of_all(folders: Any) -> None:
    from trainer.plan import passes

    depths = {
        "qwen-image-edit": ({"num_layers": 4}, [3, 1]),
        "flux": ({"num_layers": 2, "num_single_layers": 3}, [2, 3]),
        "sd3": ({"num_layers": 6, "dual_attention_layers": [0, 1]}, [2, 3, 1]),
    }
    for family, (deep, counts) in depths.items():
        recipe = recipe_of(family)
        base = bases.load(recipe.base, folders(family))
        base = replace(base, parts={**base.parts, "transformer": {**base.parts["transformer"], **deep}})
        kinds = passes.alike(recipe, base.build("transformer", torch.float32))
        assert list(kinds.values()) == counts
        every = passes._of(recipe, base, base.pixels, torch.float32, {})
        assert passes.denoising(recipe, base, base.pixels, torch.float32) == every
    # Six blocks of the portraits' base: five and the last, whose text stream never learns.
    qwen = recipe_of("qwen-image-edit")
    tree = bases.load(qwen.base, folders("qwen-image-edit")).build("transformer", torch.float32)
    assert passes.alike(qwen, tree) == {("transformer_blocks", 0): 5, ("transformer_blocks", 5): 1}


def test_paid_apis_are_counted_before_anybody_pays() -> None:
    recipe = recipes.load("pixelsmile")
    edits, scores = bills(recipe, 10)
    faces = len(recipe.conditioning.expressions) * len(recipe.data.intensities)
    assert edits.requests == 10 * faces
    assert scores.requests == 10 * (faces + 1) * recipe.scoring.samples
    one_edit, one_score = bills(recipe, 1)
    assert edits.usd == pytest.approx(10 * (one_edit.usd or 0))
    assert scores.usd == pytest.approx(10 * (one_score.usd or 0))
    assert edits.usd is not None
    assert edits.usd > 0.134 * edits.requests, "the pictures alone take that"
    elsewhere = recipes.change(recipe, {"synthesis.endpoint": "https://models.example"})
    assert bills(elsewhere, 1)[0].usd is None, "a list price holds at the vendor's own address"
    priced = recipes.change(elsewhere, {"running.api": {"prices": {"gemini-3-pro-image": {"image": 1.0}}}})
    assert bills(priced, 1)[0].usd == faces
    assert bills(recipes.load("pixelsmile-portraits"), 1) == []


def test_the_plan_counts_the_portraits_that_are_there(tmp_path: Path) -> None:
    for number in range(4):
        Image.new("RGB", (64, 64), (number, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "license.txt").write_text("CC0-1.0\n")
    there = recipes.change(recipes.load("pixelsmile"), {"data.path": str(tmp_path)})
    file = tmp_path / "there.yaml"
    file.write_text(json.dumps(there.model_dump(mode="json", exclude_unset=True)))
    told = json.loads(CliRunner().invoke(plan, [str(file), "--json"], catch_exceptions=False).stdout)
    assert {bill["portraits"] for bill in told["apis"]} == {4}
    assert told["steps"] is not None
