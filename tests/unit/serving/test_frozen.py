"""Frozen linear layers: what each format costs in exactness, and that nothing keeps the weight whole."""

from __future__ import annotations

import pytest
import torch

from serving.frozen import FrozenLinear, home_of, pack, stored_bytes, whole

STORED = ("fp32", "bf16", "fp8", "nf4")


def relative(value: torch.Tensor, truth: torch.Tensor) -> float:
    return float((value.float() - truth.float()).norm() / truth.float().norm())


@pytest.mark.parametrize(("stored", "most"), [("fp32", 0.0), ("bf16", 0.003), ("fp8", 0.03), ("nf4", 0.1)])
def test_a_weight_comes_back_within_its_format(stored, most: float) -> None:
    weight = 0.02 * torch.randn(96, 128, generator=torch.Generator().manual_seed(0))
    weight[3] *= 1000
    weight[5] = 0
    packed, scale = pack(weight, stored)
    back = whole(packed, scale, stored, weight.shape, torch.float32)
    assert relative(back, weight) <= most
    assert float(back[5].abs().max()) == 0
    assert all(relative(back[row], weight[row]) <= 1.3 * most for row in (0, 3, 95))
    held = sum(t.numel() * t.element_size() for t in (packed, scale) if t is not None)
    assert held == stored_bytes(stored, 96, 128)


def test_scales_of_fp8_rows_round_nothing_and_beat_a_plain_cast() -> None:
    weight = 0.02 * torch.randn(96, 128, generator=torch.Generator().manual_seed(0))
    packed, scale = pack(weight, "fp8")
    assert scale is not None
    assert torch.equal(torch.frexp(scale).mantissa, torch.full_like(scale, 0.5))
    largest = packed.view(torch.float8_e4m3fn).float().abs().amax(1)
    assert float(largest.min()) >= 208
    assert float(largest.max()) <= 448
    back = whole(packed, scale, "fp8", weight.shape, torch.float32)
    # In bf16 the same numbers, to the bit: neither e4m3 nor the scale needs more than bf16 has.
    assert torch.equal(back, whole(packed, scale, "fp8", weight.shape, torch.bfloat16).float())
    assert relative(back, weight) < 0.85 * relative(weight.to(torch.float8_e4m3fn), weight)
    small = weight / 4  # as wide layers have them: most of it lies below the normal numbers of e4m3
    packed, scale = pack(small, "fp8")
    rows = relative(whole(packed, scale, "fp8", small.shape, torch.float32), small)
    assert rows == pytest.approx(relative(back, weight))
    assert rows < 0.3 * relative(small.to(torch.float8_e4m3fn), small)


def test_nf4_is_that_of_bitsandbytes() -> None:
    from bitsandbytes.nn import Linear4bit, Params4bit

    linear = torch.nn.Linear(64, 32)
    theirs = Linear4bit(64, 32, quant_type="nf4", compress_statistics=False, compute_dtype=torch.float32)
    theirs.weight = Params4bit(linear.weight.data.clone(), False, quant_type="nf4", compress_statistics=False)
    theirs.bias = linear.bias
    theirs = theirs.to("cpu")
    x = torch.randn(3, 64)
    torch.testing.assert_close(FrozenLinear(linear, "nf4")(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stored", STORED)
def test_the_input_gets_the_gradient_of_the_whole_weight(stored) -> None:
    torch.manual_seed(0)
    layer = FrozenLinear(torch.nn.Linear(64, 32), stored)
    x = torch.randn(2, 5, 64, requires_grad=True)
    layer(x).square().sum().backward()
    dense = layer.dense(torch.float32)
    y = x.detach().clone().requires_grad_()
    torch.nn.functional.linear(y, dense, layer.bias.float()).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_autograd_keeps_the_small_weight() -> None:
    kept: list[torch.Tensor] = []
    layer = FrozenLinear(torch.nn.Linear(64, 32), "fp8")
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        layer(torch.randn(2, 64, requires_grad=True))
    assert {t.dtype for t in kept} == {torch.uint8, torch.float32}
    assert all(t.dtype == torch.uint8 or t.dim() == 1 for t in kept)


def test_a_layer_says_where_and_in_which_numbers_it_computes() -> None:
    linear = torch.nn.Linear(64, 32, dtype=torch.bfloat16)
    assert home_of(linear) == (torch.device("cpu"), torch.bfloat16)
    small = FrozenLinear(linear, "nf4")
    assert small.weight.dtype == torch.uint8
    assert home_of(small) == (torch.device("cpu"), torch.bfloat16)
    small.home = torch.device("meta")  # its weight waits here
    assert home_of(small) == (torch.device("meta"), torch.bfloat16)
