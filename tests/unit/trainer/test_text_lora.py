"""LoRA in the text encoders: it trains, resumes and exports with the rest; without it they are at rest."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from registry.admission import Policy, admit_candidate
from registry.errors import NeedsReview
from registry.families import BaseFacts, family
from registry.manifest import CARD_NAME, WEIGHTS_NAME, AdapterCard
from serving.engine import EditEngine
from trainer import recipe as recipes
from trainer import text_lora
from trainer.data import cache_dataset
from trainer.data.batches import TrainingSet
from trainer.data.cache import TensorCache, View, load_base
from trainer.data.dataset import Dataset
from trainer.errors import BaseModelError, Interrupted
from trainer.launch import train
from trainer.portraits.bases import build
from trainer.recipe import Recipe

FAMILIES = "sd15", "sdxl", "sd3", "flux"
TARGETS = {"sd15": "attn2.to_q", "sdxl": "attn2.to_q", "sd3": "attn.add_v_proj", "flux": "attn.to_q"}
LOSS = {"sd15": "denoising", "sdxl": "denoising", "sd3": "flow_matching", "flux": "flow_matching"}
TEXT = "[self_attn.q_proj, self_attn.v_proj]"


def recipe_of(name: str, text: str = TEXT) -> Recipe:
    return recipes.parse(f"""
name: tiny-{name}
seed: 3
base: {{id: adapter-foundry/tiny-{name}, revision: "1", family: {name}, license: Apache-2.0}}
data:
  identities: {{human: 2, anime: 1}}
  validation: {{human: 1}}
  first_identity: 100
  intensities: [0.5, 1.0]
lora: {{rank: 4, alpha: 8, targets: ["{TARGETS[name]}"], text_encoder: {text}, dtype: F32}}
optimiser: {{learning_rate: 0.01, warmup_steps: 1, steps: 6, batch_pairs: 2}}
losses: {{{LOSS[name]}: {{weight: 1.0}}}}
conditioning: {{template: "show a {{}} expression", expressions: [fear, surprised, angry, disgust]}}
evaluation: {{identities: {{human: 1}}, first_identity: 900}}
release: {{adapter: tiny, license: Apache-2.0}}
running: {{checkpoint_every: 2}}
""")


class World:
    """The tiny base of a family, and the dataset of the tiny run encoded by it."""

    def __init__(self, name: str, run: Path, folder: Path) -> None:
        self.recipe, self.run, self.cache = recipe_of(name), run, folder / "cache"
        self.base = build(name, folder / "base")
        self.pipeline: Any = load_base(self.base, self.recipe)
        cache_dataset(self.recipe, run / "dataset", self.base, self.cache, pipeline=self.pipeline)

    def train(self, recipe: Recipe, out: Path, progress: Any = lambda *a: None) -> Any:
        return train(
            recipe, self.run / "dataset", self.cache, self.base, out, progress, pipeline=self.pipeline,
            track=False,
        )  # fmt: skip

    def encoders(self) -> dict[str, torch.nn.Module]:
        return {
            name: part
            for name, part in self.pipeline.pipe.components.items()
            if name.startswith("text_encoder") and part is not None
        }


@pytest.fixture(scope="module", params=FAMILIES)
def world(request: pytest.FixtureRequest, tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(request.param, tiny_run, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def trained(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / world.recipe.name
    world.train(world.recipe, out)
    return out


def weights(out: Path, which: str = "adapter-raw") -> dict[str, torch.Tensor]:
    return load_file(out / which / WEIGHTS_NAME)


def parts_of(name: str) -> list[str]:
    return ["text_encoder"] if name in ("sd15", "flux") else ["text_encoder", "text_encoder_2"]


def test_the_text_encoders_learn_beside_the_denoiser(world: World, trained: Path) -> None:
    lines = [json.loads(line) for line in (trained / "loss.jsonl").read_text().splitlines()]
    assert len(lines) == 6
    assert all(math.isfinite(line["loss"]) for line in lines)
    found = weights(trained)
    for part in parts_of(world.recipe.base.family):
        moved = [value for key, value in found.items() if key.startswith(part + ".") and "lora_B" in key]
        # Two layers of two kinds; SDXL does not read the last layer of its first encoder.
        assert len(moved) == (2 if (world.recipe.base.family, part) == ("sdxl", "text_encoder") else 4)
        assert all(float(value.abs().max()) > 1e-4 for value in moved)
    assert any(not key.startswith("text_encoder") for key in found)


def test_the_base_is_left_as_it_was(world: World, trained: Path) -> None:
    for encoder in world.encoders().values():
        assert not any("lora" in name for name, _ in encoder.named_modules())
        assert not any(value.requires_grad for value in encoder.parameters())


def test_stopped_and_resumed_is_the_same_bit_for_bit(world: World, trained: Path, tmp_path: Path) -> None:
    def stop_after_two(stage: str, done: int, total: int, note: str = "") -> None:
        if done == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        world.train(world.recipe, tmp_path, stop_after_two)
    assert world.train(world.recipe, tmp_path).facts["resumed_from"] == 3
    for which in ("adapter", "adapter-raw"):
        one, other = weights(trained, which), weights(tmp_path, which)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_diffusers_loads_every_module_at_full_strength(world: World, trained: Path) -> None:
    """In the denoiser and in the text encoders: the ratio is 1.000 within 1e-3."""
    file = weights(trained)
    pipe = load_base(world.base, world.recipe).pipe
    pipe.load_lora_weights(str(trained / "adapter-raw"))
    seen = 0
    for part, model in pipe.components.items():
        if not isinstance(model, torch.nn.Module):
            continue
        layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}
        for name, layer in layers.items():
            full = f"{part}.{name}"
            if part.startswith("text_encoder") and "text_model." not in name:
                full = f"{part}.text_model.{name}"
            wanted = file[f"{full}.lora_B.weight"] @ file[f"{full}.lora_A.weight"]
            applied = layer.get_delta_weight(next(iter(layer.lora_A))).detach()
            assert float((applied * wanted).sum() / (wanted * wanted).sum()) == pytest.approx(1, abs=1e-3)
            seen += 1
    assert 2 * seen == len(file)


def encoded(pipeline: Any) -> torch.Tensor:
    """One prompt in one row: its tokens, and its pooled vector, which is all that FLUX takes from CLIP."""
    found = pipeline.encode_prompts([], ["show a fear expression"])
    rest = [] if found.pooled is None else [found.pooled]
    return torch.cat([found.embeds.flatten(1), *rest], 1)


def test_the_loaded_adapter_changes_prompts_as_the_trained_one_did(world: World, trained: Path) -> None:
    pipeline: Any = load_base(world.base, world.recipe)
    with torch.no_grad():
        before = encoded(pipeline)
        put(text_lora.inject(pipeline, world.recipe), weights(trained))
        ours = encoded(pipeline)
        text_lora.remove(pipeline, world.recipe)
        assert torch.equal(encoded(pipeline), before)
        pipeline.pipe.load_lora_weights(str(trained / "adapter-raw"))
        theirs = encoded(pipeline)
    assert not torch.allclose(ours, before, atol=1e-3)
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_the_card_names_the_kinds_with_their_part(world: World, trained: Path) -> None:
    card = AdapterCard.parse((trained / "adapter" / CARD_NAME).read_bytes())
    texts = {kind for kind in card.lora.targets if kind.startswith("text_encoder")}
    kinds = ("self_attn.q_proj", "self_attn.v_proj")
    assert texts == {f"{part}.{kind}" for part in parts_of(world.recipe.base.family) for kind in kinds}


def count_calls(world: World) -> tuple[list[int], list[Any]]:
    """Count the prompts that reach a text encoder, until the hooks are removed."""
    seen: list[int] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(len(args[0] if args else kwargs["input_ids"]))

    hooks = [
        part.register_forward_pre_hook(note, with_kwargs=True) for part in [world.encoders()["text_encoder"]]
    ]
    return seen, hooks


def test_without_it_no_text_encoder_is_called_in_training(world: World, tmp_path: Path) -> None:
    seen, hooks = count_calls(world)
    try:
        world.train(recipe_of(world.recipe.base.family, "[]"), tmp_path)
    finally:
        for hook in hooks:
            hook.remove()
    assert seen == []
    assert not any(key.startswith("text_encoder") for key in weights(tmp_path))


def test_with_it_every_distinct_prompt_of_a_batch_is_encoded_once(world: World) -> None:
    data = training_set(world, text_lora.encoder(world.pipeline, world.recipe))
    seen, hooks = count_calls(world)
    try:
        batch = data.batch(data.plan(1, 0, 8), range(8))
    finally:
        for hook in hooks:
            hook.remove()
    assert seen == [1 + len(set(batch.expressions))]


def training_set(world: World, encode: Any) -> TrainingSet:
    view = View.of(world.pipeline, world.base, world.recipe)
    dataset = Dataset.open(world.run / "dataset")
    return TrainingSet(dataset, TensorCache(world.cache), view, world.recipe, encode=encode)


def test_prompts_encoded_now_are_those_of_the_cache(world: World) -> None:
    """An untrained LoRA changes nothing, so both ways have to agree, pooled vectors too."""
    cached = training_set(world, None)
    live = training_set(world, text_lora.encoder(world.pipeline, world.recipe))
    one, other = (data.batch(data.plan(1, 0, 4), range(4)).prompts for data in (cached, live))
    assert torch.allclose(one.embeds, other.embeds, atol=1e-5)
    assert torch.equal(one.mask, other.mask)
    if one.pooled is None:
        assert other.pooled is None
    else:
        assert other.pooled is not None
        assert torch.allclose(one.pooled, other.pooled, atol=1e-5)


def test_gradients_go_through_the_blend(world: World) -> None:
    """They reach every layer that has a LoRA, through the tokens or through the pooled vector."""
    parameters = text_lora.inject(world.pipeline, world.recipe)
    try:
        data = training_set(world, text_lora.encoder(world.pipeline, world.recipe))
        prompts = data.batch(data.plan(1, 0, 4), range(4)).prompts
        total = prompts.embeds.square().sum()
        if prompts.pooled is not None:
            total = total + prompts.pooled.square().sum()
        total.backward()
        grads = {name: value.grad for name, value in parameters.items() if "lora_B" in name}
        assert all(grad is not None and float(grad.abs().max()) > 0 for grad in grads.values())
    finally:
        text_lora.remove(world.pipeline, world.recipe)


def test_what_is_served_is_what_was_trained(world: World, trained: Path) -> None:
    """Admission asks for a review; then the engine conditions on prompts as the training did."""
    base, facts = world.recipe.base, family(world.recipe.base.family)
    configs = {part: read_config(world.base / part) for part in (facts.prefix, *facts.text_encoders)}
    known = BaseFacts(
        id=base.id, family=base.family, license=base.license, revision=base.revision,
        config=configs.pop(facts.prefix), text_encoders=configs,
    )  # fmt: skip
    files = {path.name: path.read_bytes() for path in (trained / "adapter-raw").iterdir()}
    with pytest.raises(NeedsReview, match="ADP-STR-016"):
        admit_candidate(files, Policy(bases={base.id: known}))
    adapter = admit_candidate(files, Policy(bases={base.id: known}, allow_review=True))
    pipeline: Any = load_base(world.base, world.recipe)
    engine = EditEngine(pipeline, base=base, allow_candidates=True)
    with torch.no_grad():
        before = encoded(pipeline)
        engine.attach(adapter)
        served = encoded(pipeline)
        engine.detach()
        assert torch.equal(encoded(pipeline), before)
        put(text_lora.inject(pipeline, world.recipe), weights(trained))
        assert torch.allclose(encoded(pipeline), served, atol=1e-5)
    assert not torch.allclose(served, before, atol=1e-3)


def read_config(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())


def put(parameters: dict[str, torch.nn.Parameter], file: dict[str, torch.Tensor]) -> None:
    """Give text encoders what a file has, which holds alpha / rank in B."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(file[name] / (2.0 if "lora_B" in name else 1.0))


@pytest.mark.parametrize(
    ("name", "kinds", "words"),
    [
        ("sd15", ("self_attn.qq_proj",), r"did you mean 'self_attn\.q_proj'"),
        ("qwen-image-edit", ("self_attn.q_proj",), "no text encoder"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    name: str, kinds: tuple[str, ...], words: str, tmp_path: Path, tiny_pipeline: Any
) -> None:
    pipeline = tiny_pipeline
    if name != "qwen-image-edit":
        pipeline = load_base(build(name, tmp_path / "base"), recipe_of(name))
    plain = recipe_of("sd15")
    recipe = plain.model_copy(
        update={
            "base": plain.base.model_copy(update={"family": name}),
            "lora": plain.lora.model_copy(update={"text_encoder": kinds}),
        }
    )
    with pytest.raises(BaseModelError, match=words):
        text_lora.inject(pipeline, recipe)
