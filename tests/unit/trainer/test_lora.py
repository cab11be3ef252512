"""LoRA layers: they start as the base, train in fp32 over any base, and leave no trace."""

from __future__ import annotations

import copy

import pytest
import torch

from serving.frozen import FrozenLinear
from trainer import lora
from trainer.errors import BaseModelError
from trainer.sections import LoraSection

NAMES = ("a", "deep.0")


def settings(**values: object) -> LoraSection:
    return LoraSection.model_validate({"rank": 2, "alpha": 8, "targets": "full", **values})


def model(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)

    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = torch.nn.Linear(64, 48)
            self.deep = torch.nn.ModuleList([torch.nn.Linear(48, 64, bias=False)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.deep[0](torch.nn.functional.silu(self.a(x)))

    return Two().to(dtype)


def data(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("stored", ["fp32", "bf16", "fp8", "nf4", None])
def test_the_first_step_is_the_base_itself(stored, dora: bool) -> None:
    base, x = model(), data()
    if stored:
        base.a = FrozenLinear(base.a, stored)
    expected = base(x)
    found = lora.wrap(base, NAMES, settings(dora=dora), 3)
    assert torch.equal(base(x), expected)
    assert len(found) == 2 * (2 + dora)
    assert {value.dtype for value in found.values()} == {torch.float32}


@pytest.mark.parametrize("scaling", ["standard", "rank-stabilised"])
@pytest.mark.parametrize("dora", [False, True])
def test_the_arithmetic_is_that_of_peft(scaling: str, dora: bool) -> None:
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    ours, theirs, x = model(), model(), data().requires_grad_()
    found = lora.wrap(ours, NAMES, settings(scaling=scaling, dora=dora), 3)
    with torch.no_grad():
        for name, value in found.items():
            value.add_(0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name))))
    config = LoraConfig(
        r=2, lora_alpha=8, use_rslora=scaling == "rank-stabilised", use_dora=dora, target_modules=list(NAMES)
    )
    inject_adapter_in_model(config, theirs)
    set_peft_model_state_dict(theirs, {name: value.detach() for name, value in found.items()})
    one, other = ours(x), theirs(x)
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(one, model()(x), atol=1e-2)
    one.square().sum().backward()
    other.square().sum().backward()
    named = {
        name.replace(".default", ""): value.grad
        for name, value in theirs.named_parameters() if value.grad is not None
    }  # fmt: skip
    for name, value in found.items():
        theirs_grad = named[name + ".weight" if name.endswith("vector") else name]
        torch.testing.assert_close(value.grad, theirs_grad, rtol=1e-4, atol=1e-5)


def test_dora_trains_magnitudes_and_starts_them_at_the_norms() -> None:
    base = model()
    norms = base.a.weight.detach().norm(dim=1)
    found = lora.wrap(base, NAMES, settings(dora=True), 3)
    torch.testing.assert_close(found["a.lora_magnitude_vector"].detach(), norms)
    base(data()).sum().backward()
    assert all(value.grad is not None for value in found.values())


@pytest.mark.parametrize("stored", ["bf16", "fp8", "nf4"])
def test_a_tiny_rate_moves_every_weight_over_a_small_base(stored) -> None:
    base, x = model(torch.bfloat16), data(torch.bfloat16)
    for name in NAMES:
        parent, _, child = name.rpartition(".")
        setattr(base.get_submodule(parent), child, FrozenLinear(base.get_submodule(name), stored))
    found = lora.wrap(base, NAMES, settings(), 3)
    optimiser = torch.optim.AdamW(found.values(), 1e-6, weight_decay=0)
    for step in range(2):
        before = {name: value.detach().clone() for name, value in found.items()}
        output = base(x)
        assert output.dtype == torch.bfloat16
        output.float().square().mean().backward()
        assert {value.grad.dtype for value in found.values()} == {torch.float32}
        optimiser.step()
        optimiser.zero_grad()
        assert {s.dtype for p in found.values() for s in optimiser.state[p].values()} == {torch.float32}
        # At the first step B is zero, so A has no gradient yet.
        for name, value in found.items():
            moved = float((value.detach() != before[name]).float().mean())
            assert moved > 0.99 or (step == 0 and "lora_A" in name), (name, moved)


def test_removed_it_leaves_the_base_to_the_bit() -> None:
    base = model(torch.bfloat16)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    identities = [id(base.a), id(base.deep[0])]
    found = lora.wrap(base, NAMES, settings(dora=True), 3)
    base(data(torch.bfloat16)).float().sum().backward()
    lora.remove(base)
    after = base.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert [id(base.a), id(base.deep[0])] == identities
    assert not any(parameter.requires_grad for parameter in base.parameters())
    assert found


def test_a_part_beside_the_denoiser_is_named_in_front() -> None:
    one = lora.wrap(model(), ("a",), settings(), 3, "text_encoder")
    other = lora.wrap(model(), ("a",), settings(), 3)
    assert list(one) == ["text_encoder.a.lora_A.weight", "text_encoder.a.lora_B.weight"]
    # Two parts with modules of one name do not start alike.
    assert not torch.equal(one["text_encoder.a.lora_A.weight"], other["a.lora_A.weight"])


def test_a_second_lora_is_refused() -> None:
    base = model()
    lora.wrap(base, ("a",), settings(), 3)
    with pytest.raises(BaseModelError, match="carries a LoRA already"):
        lora.wrap(base, ("a",), settings(), 3)


def test_it_can_be_counted_without_memory() -> None:
    with torch.device("meta"):
        base = model()
    found = lora.wrap(base, NAMES, settings(dora=True), 3)
    assert {value.device.type for value in found.values()} == {"meta"}
    assert sum(value.numel() for value in found.values()) == 2 * 2 * (64 + 48) + 48 + 64


def test_its_weights_lie_where_they_are_asked_for_and_not_where_the_base_waits() -> None:
    base = model()
    found = lora.wrap(base, NAMES, settings(dora=True), 3, device="meta")
    assert {value.device.type for value in found.values()} == {"meta"}
    assert base.a.squares.device.type == "meta"
    assert base.a.base_layer.weight.device.type == "cpu"


def test_put_copies_by_name() -> None:
    base = model()
    found = lora.wrap(base, NAMES, settings(), 3)
    values = {name: torch.full_like(value, 0.5) for name, value in copy.copy(found).items()}
    lora.put(found, values)
    assert all(float(value.detach().min()) == 0.5 for value in found.values())
