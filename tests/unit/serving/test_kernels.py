"""Linear layers by oneDNN: the same numbers, where they are plain and no gradient is wanted."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from serving.pipelines.kernels import fast_linears


@pytest.mark.parametrize("shape", [(3, 8), (2, 5, 8), (1, 1, 8)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_gives_the_same_numbers(shape: tuple[int, ...], bias: bool) -> None:
    layer = torch.nn.Linear(8, 6, bias=bias)
    x = torch.randn(shape)
    with torch.no_grad():
        plain = layer(x)
        with fast_linears():
            fast = layer(x)
    assert fast.shape == plain.shape
    assert torch.allclose(fast, plain, atol=1e-6)


def test_who_wants_gradients_gets_them() -> None:
    layer, x = torch.nn.Linear(8, 6), torch.randn(3, 8)
    with fast_linears():
        layer(x).sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_numbers_than_float32_go_their_usual_way(dtype: torch.dtype) -> None:
    x, weight = torch.randn(3, 8, dtype=dtype), torch.randn(6, 8, dtype=dtype)
    with torch.no_grad():
        plain = linear(x, weight)
        with fast_linears():
            assert torch.equal(linear(x, weight), plain)


def test_vectors_and_empty_batches_go_their_usual_way() -> None:
    weight = torch.randn(6, 8)
    with torch.no_grad(), fast_linears():
        assert linear(torch.randn(8), weight).shape == (6,)
        assert linear(torch.randn(0, 8), weight).shape == (0, 6)
