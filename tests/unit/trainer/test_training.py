"""The training as a whole: what it reports, and that the export is what was trained."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from fakes.trainings import changed, key_of, train_tiny
from registry.admission import Policy, admit_candidate
from registry.families import BaseFacts
from registry.manifest import CARD_NAME, WEIGHTS_NAME, AdapterCard
from trainer import checkpoint, lora
from trainer.data.batches import TrainingSet, generator
from trainer.data.cache import TensorCache, View
from trainer.data.triplets import Dataset
from trainer.ema import Ema
from trainer.errors import BaseModelError, ExportError, NotFinite
from trainer.export import folded, strength_ratio
from trainer.launch import train
from trainer.optimisers import learning_rate
from trainer.recipe import Recipe
from trainer.sections import EmaSection, LossSection

POLICY = Policy(
    bases={
        "adapter-foundry/portraits-base": BaseFacts(
            id="adapter-foundry/portraits-base",
            family="qwen-image-edit",
            license="Apache-2.0",
            revision="1",
            config={"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16},
        )
    }
)


@pytest.fixture(scope="module")
def trained(tiny_recipe: Recipe, tiny_run: Path, tiny_base: Path, tiny_pipeline) -> Path:
    """The output of the uninterrupted training."""
    train_tiny(tiny_recipe, tiny_run, tiny_base, tiny_pipeline, tiny_run / "train")
    return tiny_run / "train"


def test_training_lowers_the_loss_and_reports_it(trained: Path) -> None:
    lines = [json.loads(line) for line in (trained / "loss.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert all(math.isfinite(line["loss"]) and line["flow_matching"] == line["loss"] for line in lines)
    facts = json.loads((trained / "stage.json").read_text())["facts"]
    assert facts["steps"] == 12
    assert facts["decodes"] == 0
    assert facts["samples_per_second"] > 0
    assert [path.name for path in sorted((trained / "checkpoints").iterdir())] == [
        "step-000010",
        "step-000012",
    ]


def test_a_finished_training_is_reused(
    trained: Path, tiny_recipe: Recipe, tiny_run: Path, tiny_base: Path, tiny_pipeline
) -> None:
    again = train_tiny(tiny_recipe, tiny_run, tiny_base, tiny_pipeline, trained)
    assert again.reused
    assert again.facts["adapter"] == "adapter"


def test_the_base_is_left_as_it_was(trained: Path, tiny_pipeline) -> None:
    assert not any("lora" in name for name, _ in tiny_pipeline.transformer.named_parameters())
    assert not any(parameter.requires_grad for parameter in tiny_pipeline.transformer.parameters())


def test_the_export_passes_the_registrys_admission(trained: Path) -> None:
    for which in ("adapter", "adapter-raw"):
        files = {path.name: path.read_bytes() for path in (trained / which).iterdir()}
        assert set(files) == {WEIGHTS_NAME, CARD_NAME}
        admitted = admit_candidate(files, POLICY)
        assert admitted.scan.verdict == "pass"


def test_the_card_says_what_was_trained(trained: Path, tiny_recipe: Recipe, tiny_run: Path) -> None:
    card = AdapterCard.parse((trained / "adapter" / CARD_NAME).read_bytes())
    assert card.training.recipe == tiny_recipe.digest
    assert card.training.dataset == Dataset.open(tiny_run / "dataset").digest
    assert card.conditioning == tiny_recipe.conditioning
    assert set(card.lora.targets) == set(tiny_recipe.lora.targets)
    assert [item.kind for item in card.ingredients] == ["base", "dataset", "identity-images"]


def test_diffusers_loads_the_export_at_full_strength(
    trained: Path, tiny_recipe: Recipe, tiny_base: Path
) -> None:
    """Every module, and an update of the trained length: the ratio is 1.000 within 1e-3."""
    from trainer.data.cache import load_base

    state = checkpoint.latest(trained / "checkpoints", key_of(trained)).group("ema")
    pipe = load_base(tiny_base, tiny_recipe).pipe
    pipe.load_lora_weights(str(trained / "adapter"))
    scale = tiny_recipe.lora.alpha / tiny_recipe.lora.rank
    modules = {name.rsplit(".lora_", 1)[0] for name in state}
    loaded = {name for name, module in pipe.transformer.named_modules() if hasattr(module, "lora_A")}
    assert loaded == modules
    for name in modules:
        layer = pipe.transformer.get_submodule(name)
        key = next(iter(layer.lora_A))
        applied = layer.get_delta_weight(key)
        wanted = scale * state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"]
        assert float(((applied * wanted).sum() / (wanted * wanted).sum()).detach()) == pytest.approx(
            1, abs=1e-3
        )


@pytest.mark.parametrize(("dtype", "tolerance"), [("F32", 1e-6), ("F16", 1e-3), ("BF16", 1e-3)])
def test_the_exported_strength_is_the_trained_one(tiny_recipe: Recipe, dtype: str, tolerance: float) -> None:
    recipe = changed(tiny_recipe, "lora", dtype=dtype)
    source = torch.Generator().manual_seed(0)
    name = "transformer_blocks.0.attn.to_q"
    given = {
        f"{name}.lora_A.weight": torch.randn(4, 64, generator=source),
        f"{name}.lora_B.weight": torch.randn(48, 4, generator=source),
    }
    file = folded(given, recipe)
    assert strength_ratio(file, given, recipe) == pytest.approx(1, abs=tolerance)
    unfolded = {key: value / 2 if "lora_B" in key else value for key, value in file.items()}
    assert strength_ratio(unfolded, given, recipe) == pytest.approx(0.5, abs=tolerance)


def test_what_a_dtype_cannot_hold_is_not_exported(tiny_recipe: Recipe) -> None:
    recipe = changed(tiny_recipe, "lora", dtype="F16")
    with pytest.raises(ExportError, match="F16 cannot hold"):
        folded({"m.lora_A.weight": torch.full((1, 1), 1e6)}, recipe)


def test_a_loss_that_is_no_number_ends_the_training(
    tiny_recipe: Recipe, tiny_run: Path, tiny_base: Path, tiny_pipeline, tmp_path: Path
) -> None:
    with pytest.raises(NotFinite, match="learning_rate"):
        train_tiny(
            tiny_recipe.model_copy(update={"losses": {"flow_matching": LossSection(weight=1e39)}}),
            tiny_run, tiny_base, tiny_pipeline, tmp_path,
        )  # fmt: skip
    assert not list((tmp_path / "checkpoints").glob("*/state.json"))


def test_all_losses_train_on_the_shipped_judges(
    tiny_recipe: Recipe, tiny_run: Path, tiny_base: Path, tiny_pipeline, tmp_path: Path
) -> None:
    losses = {
        "flow_matching": LossSection(weight=1.0),
        "contrastive": LossSection(weight=0.05, max_sigma=1.0, pairs=1),
        "identity": LossSection(weight=0.1, max_sigma=1.0, pairs=1),
    }
    recipe = changed(tiny_recipe.model_copy(update={"losses": losses}), "data", keep_share=0.0)
    result = train_tiny(recipe, tiny_run, tiny_base, tiny_pipeline, tmp_path)
    assert result.facts["decodes"] == 2 * 12
    line = json.loads((tmp_path / "loss.jsonl").read_text().splitlines()[0])
    parts = line["flow_matching"] + 0.05 * line["contrastive"] + 0.1 * line["identity"]
    assert line["loss"] == pytest.approx(parts, rel=1e-5)


def test_batches_are_the_same_on_any_number_of_processes(
    tiny_recipe: Recipe, tiny_run: Path, tiny_base: Path, tiny_pipeline
) -> None:
    data = TrainingSet(
        Dataset.open(tiny_run / "dataset"), TensorCache(tiny_run / "cache"),
        View.of(tiny_pipeline, tiny_base, tiny_recipe), tiny_recipe,
    )  # fmt: skip
    whole, second = data.batch(data.plan(3, 5, 4), range(4)), data.batch(data.plan(3, 5, 4), [1, 3])
    rows = [1, 3, 5, 7]
    assert torch.equal(whole.noise[rows], second.noise)
    assert torch.equal(whole.prompts.embeds[rows], second.prompts.embeds)
    assert [whole.images[row] for row in rows] == list(second.images)
    assert torch.equal(whole.noise[:4], whole.noise[4:])
    assert not torch.equal(data.batch(data.plan(3, 6, 4), range(4)).noise, whole.noise)
    assert bool(whole.prompts.mask.all())


def test_draws_ignore_the_global_random_state() -> None:
    torch.manual_seed(1)
    first = torch.rand(3, generator=generator(7, 2, 1))
    torch.manual_seed(2)
    assert torch.equal(first, torch.rand(3, generator=generator(7, 2, 1)))


def test_lora_is_fp32_over_a_bf16_base_and_tiny_rates_move_it(tiny_recipe: Recipe) -> None:
    from trainer.portraits.base import build_transformer

    transformer = build_transformer(width=32, layers=2, head=16).to(torch.bfloat16)
    found = lora.inject(transformer, tiny_recipe)
    assert {value.dtype for value in found.values()} == {torch.float32}
    silent = {"attn.add_q_proj", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2"}
    assert not any(
        name.startswith("transformer_blocks.1.") and any(k in name for k in silent) for name in found
    )
    name, parameter = next(iter(found.items()))
    before = parameter.detach().clone()
    parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW([parameter], 1e-6, weight_decay=0).step()
    assert float((parameter != before).float().mean()) > 0.99, name


def test_an_unknown_target_names_the_nearest(tiny_recipe: Recipe) -> None:
    from trainer.portraits.base import build_transformer

    transformer = build_transformer(width=32, layers=1, head=16)
    with pytest.raises(BaseModelError, match=r"did you mean 'attn\.to_q'"):
        lora.target_modules(transformer, "qwen-image-edit", ("attn.to_qq",))


def test_the_average_warms_up() -> None:
    value = torch.nn.Parameter(torch.zeros(1))
    ema = Ema({"x": value}, EmaSection(decay=0.9, warmup=10))
    assert ema.decay(1) == pytest.approx(2 / 11)
    assert ema.decay(1000) == 0.9
    value.data.fill_(1.0)
    ema.update({"x": value})
    assert float(ema.values["x"]) == pytest.approx(1 - 2 / 11)
    fixed = Ema({"x": torch.tensor([4.0], dtype=torch.bfloat16)}, EmaSection())
    assert fixed.values["x"].dtype == torch.float32


def test_the_learning_rate_rises_then_falls(tiny_recipe: Recipe) -> None:
    settings = tiny_recipe.optimiser.model_copy(update={"warmup_steps": 10})
    curve = [learning_rate(settings, step, 100) for step in range(100)]
    assert curve[0] == pytest.approx(0.001)
    assert max(curve) == curve[9] == curve[10] == pytest.approx(0.01)
    assert curve[10:] == sorted(curve[10:], reverse=True)
    assert curve[-1] == pytest.approx(0.01 * 0.05, rel=0.05)


def test_a_training_is_an_mlflow_run(
    tiny_recipe: Recipe, tiny_run: Path, tiny_base: Path, tiny_pipeline, tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    from registry.settings import layout

    out = tmp_path / "train"
    result = train(
        tiny_recipe, tiny_run / "dataset", tiny_run / "cache", tiny_base, out, pipeline=tiny_pipeline
    )
    client = MlflowClient(layout().tracking_uri)
    found = client.get_run(result.facts["run_id"])
    assert found.info.status == "FINISHED"
    assert found.data.params["recipe.digest"] == tiny_recipe.digest
    assert found.data.params["lora.rank"] == "4"
    assert len(client.get_metric_history(found.info.run_id, "flow_matching")) == 12
    assert found.data.metrics["validation_loss"] == pytest.approx(result.facts["validation_loss"])
    card = AdapterCard.parse((out / "adapter" / CARD_NAME).read_bytes())
    assert card.training.run_id == found.info.run_id
