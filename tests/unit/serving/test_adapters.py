"""Attaching and detaching is exact, atomic and leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from registry.admission import VerifiedAdapter
from serving import layers
from serving.adapters import AdapterSlots
from serving.errors import AdapterMismatch, StrengthOutOfRange, UsageError
from serving.pipelines.base import PromptEmbeds

Make = Callable[..., VerifiedAdapter]


@pytest.fixture
def velocity(pipeline: Any) -> Callable[[], torch.Tensor]:
    """One forward pass of the transformer on fixed random inputs."""
    noise = torch.Generator().manual_seed(0)
    latents, control = (torch.randn(2, 64, 64, generator=noise) for _ in range(2))
    embeds = torch.randn(2, 17, 128, generator=noise)
    prompts = PromptEmbeds(embeds=embeds, mask=torch.ones(2, 17, dtype=torch.bool))

    def run() -> torch.Tensor:
        with torch.no_grad():
            return pipeline.predict(latents, control, prompts, torch.tensor([0.3, 0.8]))

    return run


def state(transformer: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in transformer.state_dict().items()}


def test_attach_changes_and_detach_restores_bit_by_bit(
    pipeline: Any, make_adapter: Make, velocity: Callable[[], torch.Tensor]
) -> None:
    modules = {name: id(module) for name, module in pipeline.transformer.named_modules()}
    weights, before = state(pipeline.transformer), velocity()
    slots = AdapterSlots(pipeline)
    for seed in range(3):
        slots.attach(make_adapter(seed))
        assert not torch.equal(velocity(), before)
    slots.detach()
    assert torch.equal(velocity(), before)
    after = state(pipeline.transformer)
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], weights[name]) for name in weights)
    assert {name: id(module) for name, module in pipeline.transformer.named_modules()} == modules
    assert not hasattr(pipeline.transformer, "peft_config")
    assert slots.current is None


@pytest.mark.parametrize("rank", [1, 4])
def test_the_update_is_b_times_a_times_strength(
    pipeline: Any, make_adapter: Make, velocity: Callable[[], torch.Tensor], rank: int
) -> None:
    from safetensors.torch import load

    adapter = make_adapter(1, rank=rank)
    slots = AdapterSlots(pipeline)
    slots.use(adapter, 0.7)
    with_layers = velocity()
    slots.detach()
    tensors, weights = load(adapter.weights), state(pipeline.transformer)
    for key, a in tensors.items():
        if key.endswith(".lora_A.weight"):
            b = tensors[key.replace("lora_A", "lora_B")]
            name = key.removeprefix("transformer.").replace(".lora_A", "")
            pipeline.transformer.get_parameter(name).data += 0.7 * b @ a
    try:
        torch.testing.assert_close(with_layers, velocity(), rtol=1e-4, atol=1e-5)
    finally:
        pipeline.transformer.load_state_dict(weights)


def test_swap_then_strength_equals_a_fresh_attach(
    pipeline: Any, make_adapter: Make, velocity: Callable[[], torch.Tensor]
) -> None:
    big, small = make_adapter(1, rank=8), make_adapter(2, rank=2, targets=("attn.to_q", "img_mlp.net.2"))
    slots = AdapterSlots(pipeline)
    slots.use(small, 0.6)
    fresh = velocity()
    slots.detach()
    slots.use(big, 1.4)
    slots.set_strength(0.1)
    slots.use(small, 1.3)
    slots.use(small, 0.6)
    assert torch.equal(velocity(), fresh)


def test_strength_equals_scaled_weights(
    pipeline: Any, make_adapter: Make, velocity: Callable[[], torch.Tensor]
) -> None:
    slots = AdapterSlots(pipeline)
    slots.use(make_adapter(5, scale=0.4), 0.5)
    halved = velocity()
    slots.use(make_adapter(5, scale=0.2), 1.0)
    torch.testing.assert_close(velocity(), halved, rtol=1e-5, atol=1e-6)


def test_strength_zero_is_the_base_bit_by_bit(
    pipeline: Any, make_adapter: Make, velocity: Callable[[], torch.Tensor]
) -> None:
    before = velocity()
    AdapterSlots(pipeline).use(make_adapter(1), 0.0)
    assert torch.equal(velocity(), before)


def test_half_precision_weights_land_exactly(pipeline: Any, make_adapter: Make) -> None:
    from safetensors.torch import load

    adapter = make_adapter(1, dtype="F16")
    AdapterSlots(pipeline).attach(adapter)
    for key, tensor in load(adapter.weights).items():
        name, _, factor = key.removeprefix("transformer.").removesuffix(".weight").rpartition(".lora_")
        placed = pipeline.transformer.get_submodule(name).updates[str(adapter.digest)]
        assert torch.equal(placed.a if factor == "A" else placed.b, tensor.float())


def test_text_outputs_of_the_last_block_may_be_left_out(pipeline: Any, make_adapter: Make) -> None:
    silent = ("attn.add_q_proj", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")
    adapter = make_adapter(
        1, keep=lambda key: not ("blocks.1." in key and any(name in key for name in silent))
    )
    slots = AdapterSlots(pipeline)
    slots.attach(adapter)
    assert slots.current is adapter


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"num_layers": 3}, "unexpected tensor transformer.transformer_blocks.2."),
        ({"num_layers": 1}, "missing tensor of transformer_blocks.0.attn.add_q_proj|missing tensor of"),
        ({"num_attention_heads": 4}, "has the shape"),
    ],
)
def test_what_does_not_fit_is_refused_and_the_adapter_before_keeps_serving(
    pipeline: Any,
    make_adapter: Make,
    velocity: Callable[[], torch.Tensor],
    other: dict[str, int],
    says: str,
) -> None:
    tiny = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}
    slots = AdapterSlots(pipeline)
    first = make_adapter(1)
    slots.use(first, 0.8)
    before = velocity()
    with pytest.raises(AdapterMismatch, match=says) as caught:
        slots.use(make_adapter(2, config={**tiny, **other}), 1.0)
    assert caught.value.exit_code == 14
    assert slots.current is first
    assert torch.equal(velocity(), before)


def test_a_failure_in_the_middle_leaves_the_adapter_before_serving(
    pipeline: Any, make_adapter: Make, velocity: Callable[[], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    slots = AdapterSlots(pipeline)
    first = make_adapter(1, targets=("attn.to_q",))
    slots.use(first, 0.8)
    before = velocity()
    whole, put = layers.replace, []

    def dies_halfway(model: Any, name: str, module: Any) -> None:
        put.append(name)
        if len(put) == 9:
            raise MemoryError("no memory for one more layer")
        whole(model, name, module)

    with monkeypatch.context() as patched:
        patched.setattr(layers, "replace", dies_halfway)
        with pytest.raises(MemoryError):
            slots.attach(make_adapter(2))
    assert slots.current is first
    assert slots.residents == (first,)
    assert torch.equal(velocity(), before)
    slots.detach()
    assert not layers.found(pipeline.transformer)


def test_gradients_wanted_before_are_wanted_after(pipeline: Any, make_adapter: Make) -> None:
    parameters = dict(pipeline.transformer.named_parameters())
    some = list(parameters.values())[::3]
    for parameter in some:
        parameter.requires_grad_(True)
    try:
        wanted = {name: parameter.requires_grad for name, parameter in parameters.items()}
        slots = AdapterSlots(pipeline)
        slots.attach(make_adapter(1))
        assert {name: parameter.requires_grad for name, parameter in parameters.items()} == wanted
        slots.detach()
        assert {name: parameter.requires_grad for name, parameter in parameters.items()} == wanted
    finally:
        pipeline.transformer.requires_grad_(False)


def test_the_global_random_state_is_left_alone(pipeline: Any, make_adapter: Make) -> None:
    adapter = make_adapter(1)
    before = torch.get_rng_state()
    AdapterSlots(pipeline).attach(adapter)
    assert torch.equal(torch.get_rng_state(), before)


def test_layers_of_somebody_else_are_not_touched(pipeline: Any, make_adapter: Make) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q"]), pipeline.transformer, "trained")
    with pytest.raises(AdapterMismatch, match="already carries LoRA layers"):
        AdapterSlots(pipeline).attach(make_adapter(1))
    assert any("trained" in name for name, _ in pipeline.transformer.named_modules())


@pytest.mark.parametrize("strength", [float("nan"), float("inf")])
def test_a_strength_has_to_be_a_number(pipeline: Any, make_adapter: Make, strength: float) -> None:
    slots = AdapterSlots(pipeline)
    with pytest.raises(StrengthOutOfRange):
        slots.use(make_adapter(1), strength)
    assert slots.current is None


def test_a_strength_needs_an_adapter(pipeline: Any) -> None:
    with pytest.raises(UsageError, match="no adapter is attached"):
        AdapterSlots(pipeline).set_strength(1.0)
