"""Facts about families, held to the real classes of diffusers and transformers and to real gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from fakes.families import CLIP
from fakes.families import CONFIGS as TINY
from registry.errors import UsageError
from registry.families import FAMILIES, KNOWN_BASES, FamilyFacts, base_spec, family


def model(name: str, config: Mapping[str, Any]) -> Any:
    """The real denoiser of a family, on the current device."""
    diffusers = pytest.importorskip("diffusers")
    heads = (
        config.get("num_attention_heads", 0) * config.get("attention_head_dim", 0)
        if "num_layers" in config
        else 0
    )
    small = heads == 32
    rest: dict[str, Any] = {}
    if name == "qwen-image-edit":
        rest = {"in_channels": 4, "out_channels": 1, "joint_attention_dim": 24, "axes_dims_rope": (4, 6, 6)}
        return diffusers.QwenImageTransformer2DModel(**config, **(rest if small else {}))
    if name in ("flux", "flux-kontext"):
        rest = {
            "in_channels": 4,
            "joint_attention_dim": 24,
            "pooled_projection_dim": 8,
            "axes_dims_rope": (4, 6, 6),
        }
        return diffusers.FluxTransformer2DModel(**config, guidance_embeds=True, **(rest if small else {}))
    if name == "flux2-klein":
        rest = {"in_channels": 4, "joint_attention_dim": 24, "axes_dims_rope": (4, 4, 4, 4)}
        return diffusers.Flux2Transformer2DModel(**config, guidance_embeds=False, **(rest if small else {}))
    if name == "sd3":
        rest = {
            "in_channels": 4, "out_channels": 4, "joint_attention_dim": 24, "pooled_projection_dim": 8,
            "sample_size": 8, "pos_embed_max_size": 8,
        }  # fmt: skip
        width = config["num_attention_heads"] * config["attention_head_dim"]
        return diffusers.SD3Transformer2DModel(
            **config, caption_projection_dim=width, qk_norm="rms_norm", **(rest if small else {})
        )
    if name == "sdxl":
        rest = {
            "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 8 * 6 + 8,
        }  # fmt: skip
    if "attention_head_dim" not in config:
        rest["attention_head_dim"] = 8
    return diffusers.UNet2DConditionModel(**config, **rest)


def forward(name: str, denoiser: Any) -> Any:
    """What the small denoiser makes of noise: a picture of 4 x 4 places and a prompt of 3 tokens."""
    import torch

    places, text, pooled = torch.randn(2, 16, 4), torch.randn(2, 3, 24), torch.randn(2, 8)
    level = torch.tensor([0.3, 0.8])
    if name == "qwen-image-edit":
        found = denoiser(
            hidden_states=places, encoder_hidden_states=text, timestep=level,
            encoder_hidden_states_mask=torch.ones(2, 3).long(), img_shapes=[[(1, 4, 4)]] * 2,
        )  # fmt: skip
    elif name in ("flux", "flux-kontext"):
        found = denoiser(
            hidden_states=places, encoder_hidden_states=text, pooled_projections=pooled, timestep=level,
            guidance=torch.ones(2), img_ids=torch.zeros(16, 3), txt_ids=torch.zeros(3, 3),
        )  # fmt: skip
    elif name == "flux2-klein":
        found = denoiser(
            hidden_states=places, encoder_hidden_states=text, timestep=level, guidance=None,
            img_ids=torch.zeros(16, 4), txt_ids=torch.zeros(3, 4),
        )  # fmt: skip
    elif name == "sd3":
        found = denoiser(
            hidden_states=torch.randn(2, 4, 8, 8), encoder_hidden_states=text, pooled_projections=pooled,
            timestep=level,
        )  # fmt: skip
    else:
        extra = {"text_embeds": pooled, "time_ids": torch.ones(2, 6)} if name == "sdxl" else None
        found = denoiser(
            torch.randn(2, 4, 8, 8), level * 1000, encoder_hidden_states=text, added_cond_kwargs=extra
        )
    return found.sample


def linear(model: Any, facts: FamilyFacts, part: str = "") -> dict[str, tuple[int, int]]:
    """The linear layers of a real model that may be trained, with their shapes."""
    import torch

    named = {f"{part}{name}": module for name, module in model.named_modules()}
    return {
        name: tuple(module.weight.shape)
        for name, module in named.items()
        if isinstance(module, torch.nn.Linear) and facts.is_target(name)
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_the_spec_is_that_of_the_real_small_model(name: str) -> None:
    import torch

    with torch.device("meta"):
        real = linear(model(name, TINY[name]), family(name))
    assert real == base_spec(name, TINY[name])


@pytest.mark.parametrize("id", [id for id in KNOWN_BASES if not id.startswith("adapter-foundry/")])
def test_the_spec_is_that_of_the_real_published_model(id: str) -> None:
    import torch

    facts = KNOWN_BASES[id]
    with torch.device("meta"):
        real = linear(model(facts.family, facts.config), family(facts.family))
    assert real == base_spec(facts.family, facts.config)
    assert len(real) >= 100


@pytest.mark.parametrize("name", FAMILIES)
def test_every_kind_is_in_a_real_model_and_every_preset_has_known_kinds(name: str) -> None:
    facts = family(name)
    assert {facts.block_of(module)[1] for module in base_spec(name, TINY[name])} == facts.kinds
    assert facts.presets
    assert all(set(kinds) <= facts.kinds for kinds in facts.presets.values())
    assert set(facts.presets["attention"]) < set(facts.presets["full"])


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_silent_is_what_gets_no_gradient(name: str) -> None:
    """A real backward pass: weights of exactly the silent modules, and of the silent rows, get none."""
    import torch

    torch.manual_seed(0)
    facts, spec = family(name), base_spec(name, TINY[name])
    denoiser = model(name, TINY[name])
    with torch.no_grad():
        for (
            parameter
        ) in denoiser.parameters():  # gates that start at zero would silence what lies behind them
            parameter.add_(torch.randn_like(parameter) * 0.1)
    forward(name, denoiser).square().sum().backward()
    gradients = {
        module: torch.zeros(shape) if (found := denoiser.get_submodule(module).weight.grad) is None else found
        for module, shape in spec.items()
    }
    assert {module for module, found in gradients.items() if not found.any()} == facts.silent(spec)
    rows = facts.silent_rows(spec)
    for module, found in gradients.items():
        quiet = ~found.any(dim=1)
        expected = torch.zeros_like(quiet)
        expected[rows.get(module, slice(0))] = True
        assert module in facts.silent(spec) or bool((quiet == expected).all()), module


def text_model(projected: bool) -> Any:
    """A real CLIP text encoder of the size of CLIP."""
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig(
        **CLIP, num_attention_heads=2, vocab_size=99, projection_dim=32, eos_token_id=98
    )
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return kind(config)


def named(encoder: Any, module: str) -> str:
    """The name of a text encoder's module in this version of transformers."""
    return module if hasattr(encoder, "text_model") else module.removeprefix("text_model.")


@pytest.mark.parametrize("projected", [False, True])
def test_the_spec_of_a_text_encoder_is_that_of_the_real_class(projected: bool) -> None:
    facts = family("sdxl")
    spec = base_spec("sdxl", TINY["sdxl"], {"text_encoder": CLIP})
    texts = {module: shape for module, shape in spec.items() if module.startswith("text_encoder.")}
    encoder = text_model(projected)
    start = "text_encoder." if projected else "text_encoder.text_model."
    assert linear(encoder, facts, start) == texts
    assert {facts.block_of(module)[1] for module in texts} == {
        f"text_encoder.{kind}" for kind in facts.text_encoders["text_encoder"]
    }


READ: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("sd15", "text_encoder"): ("last_hidden_state",),
    ("sdxl", "text_encoder"): ("the one before the last",),
    ("sdxl", "text_encoder_2"): ("the one before the last", "text_embeds"),
    ("sd3", "text_encoder"): ("the one before the last", "text_embeds"),
    ("sd3", "text_encoder_2"): ("the one before the last", "text_embeds"),
    ("flux", "text_encoder"): ("pooler_output",),
    ("flux-kontext", "text_encoder"): ("pooler_output",),
}
"""Family and part of the pipeline -> what its pipeline in diffusers reads of the encoder."""


def test_every_text_encoder_that_may_be_trained_is_read_below() -> None:
    assert set(READ) == {(name, part) for name, facts in FAMILIES.items() for part in facts.text_encoders}


@pytest.mark.parametrize(("name", "part"), READ)
def test_the_silent_layers_of_a_text_encoder_get_no_gradient(name: str, part: str) -> None:
    import torch

    torch.manual_seed(0)
    facts, encoder = family(name), text_model("text_embeds" in READ[name, part])
    spec = base_spec(name, TINY[name], {part: CLIP})
    texts = [module for module in spec if module.startswith("text_encoder")]
    states = encoder(torch.tensor([[1, 2, 98]]), output_hidden_states=True)
    read = [states.hidden_states[-2] if " " in what else getattr(states, what) for what in READ[name, part]]
    torch.cat([tensor.flatten() for tensor in read]).square().sum().backward()
    found = {
        module
        for module in texts
        for weight in [encoder.get_submodule(named(encoder, module.partition(".")[2])).weight]
        if weight.grad is None or not weight.grad.any()
    }
    assert found == {module for module in facts.silent(spec) if module.startswith("text_encoder")}


def test_blocks_have_their_place_in_the_forward_pass() -> None:
    for name in FAMILIES:
        spec = base_spec(name, TINY[name], {"text_encoder": CLIP})
        order = list(dict.fromkeys(family(name).block_of(module)[0] for module in spec))
        assert family(name).places(reversed(list(spec))) == {block: at for at, block in enumerate(order)}


@pytest.mark.parametrize(
    ("name", "module", "block"),
    [
        ("qwen-image-edit", "transformer_blocks.3.attn.to_q", ("transformer_blocks.3", "attn.to_q")),
        ("flux", "single_transformer_blocks.0.proj_mlp", ("single_transformer_blocks.0", "proj_mlp")),
        (
            "sdxl",
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
            ("down_blocks.1.attentions.0.transformer_blocks.0", "attn1.to_q"),
        ),
        ("sdxl", "mid_block.attentions.0.proj_in", ("mid_block.attentions.0", "proj_in")),
        (
            "sd3",
            "text_encoder_2.text_model.encoder.layers.7.mlp.fc1",
            ("text_encoder_2.text_model.encoder.layers.7", "text_encoder_2.mlp.fc1"),
        ),
    ],
)
def test_a_module_has_a_block_and_a_kind(name: str, module: str, block: tuple[str, str]) -> None:
    assert family(name).block_of(module) == block
    assert family(name).is_target(module)


def test_what_lies_in_no_block_is_no_target() -> None:
    for name, facts in FAMILIES.items():
        for module in ("proj_out", "time_embedding.linear_1", "text_encoder.text_projection", "", "a.b"):
            assert not facts.is_target(module), name
            with pytest.raises(ValueError, match="lies in no block"):
                facts.block_of(module)
    assert not family("flux2-klein").is_target("text_encoder.text_model.encoder.layers.0.mlp.fc1")
    assert not family("sd15").is_target("down_blocks.0.attentions.0.proj_in")


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("flux", "num_single_layers", 0),
        ("flux2-klein", "mlp_ratio", -1.0),
        ("flux2-klein", "mlp_ratio", "3"),
        ("sd3", "dual_attention_layers", [3]),
        ("sd3", "dual_attention_layers", 2),
        ("sdxl", "block_out_channels", [16]),
        ("sdxl", "block_out_channels", [16, 0]),
        ("sdxl", "down_block_types", None),
        ("sdxl", "transformer_layers_per_block", [1, "2"]),
        ("sd15", "cross_attention_dim", None),
    ],
)
def test_impossible_values_of_a_config_are_refused(name: str, key: str, value: object) -> None:
    with pytest.raises(UsageError, match="config"):
        base_spec(name, {**TINY[name], key: value})


def test_a_text_encoder_of_impossible_size_is_refused() -> None:
    with pytest.raises(UsageError, match="text_encoder's config needs hidden_size"):
        base_spec("sd15", TINY["sd15"], {"text_encoder": {**CLIP, "hidden_size": 0}})


def test_text_encoders_that_a_family_does_not_train_are_no_targets() -> None:
    plain = base_spec("flux2-klein", TINY["flux2-klein"])
    assert base_spec("flux2-klein", TINY["flux2-klein"], {"text_encoder": CLIP}) == plain
