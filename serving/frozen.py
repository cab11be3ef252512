"""A frozen linear layer whose weight is kept small, and made whole for as long as it is used.

Formats: plain numbers of another dtype than the computation's; float8_e4m3fn with a power of two for each
row; 4-bit NormalFloat with a scale for every 64 weights (Dettmers et al., arXiv 2305.14314). Autograd keeps
the small weight, never the whole one, so a backward pass costs no second copy of the base.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Final, Literal

import torch
import torch.nn.functional as F

Stored = Literal["fp32", "bf16", "fp16", "fp8", "nf4"]

NF4_BLOCK = 64
_FP8 = torch.float8_e4m3fn
PLAIN: Final[Mapping[Stored, torch.dtype]] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
"""Formats that are plain numbers."""


def stored_bytes(stored: Stored, out: int, into: int) -> int:
    """Return the bytes of a weight [out, into] in a format, with its scales and without a bias."""
    count = out * into
    if stored == "nf4":
        return -(-count // 2) + 4 * -(-count // NF4_BLOCK)
    return count + 4 * out if stored == "fp8" else count * PLAIN[stored].itemsize


def pack(weight: torch.Tensor, stored: Stored) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return a weight [out, in] in a format, and its scales: fp32 [out] of fp8, fp32 [blocks] of nf4.

    Small formats are bytes (uint8), which every collective and copy can move. The scale of an fp8 row is a
    power of two that puts its largest weight between 224 and 448, the largest that e4m3 has: the scale itself
    then never rounds anything.
    """
    if stored in PLAIN:
        return weight.to(PLAIN[stored]), None
    if stored == "fp8":
        largest = weight.float().abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        exponent = torch.ceil(torch.log2(largest / torch.finfo(_FP8).max)).clamp(-100, 100)
        scale = torch.exp2(exponent)
        return (weight.float() / scale).to(_FP8).view(torch.uint8), scale.flatten()
    packed, state = _bitsandbytes().functional.quantize_4bit(
        weight.contiguous(), blocksize=NF4_BLOCK, quant_type="nf4", compress_statistics=False
    )
    return packed.flatten(), state.absmax


def whole(
    packed: torch.Tensor, scale: torch.Tensor | None, stored: Stored, shape: torch.Size, dtype: torch.dtype
) -> torch.Tensor:
    """Return the weight [out, in] that `pack` made small, in the dtype of the computation."""
    if scale is None:
        return packed.to(dtype)
    if stored == "fp8":
        # In place: a second copy of the largest layer would count on a small device.
        return packed.view(_FP8).to(dtype).mul_(scale.to(dtype)[:, None])
    # `pack` has imported the package that registers this operator.
    found: torch.Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
        packed[:, None], scale, NF4_BLOCK, "nf4", list(shape), dtype
    )
    return found


def _bitsandbytes() -> Any:
    """Return the package, without what it says about kernels that it cannot download."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    import bitsandbytes

    return bitsandbytes


class _Product(torch.autograd.Function):
    """x W^T + b, whose backward pass makes the weight whole again instead of keeping it."""

    @staticmethod
    def forward(
        x: torch.Tensor,
        packed: torch.Tensor,
        scale: torch.Tensor | None,
        bias: torch.Tensor | None,
        stored: Stored,
        shape: torch.Size,
    ) -> torch.Tensor:
        return F.linear(x, whole(packed, scale, stored, shape, x.dtype), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        _, packed, scale, _, ctx.stored, ctx.shape = inputs
        ctx.save_for_backward(packed, scale)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        packed, scale = ctx.saved_tensors
        weight = whole(packed, scale, ctx.stored, ctx.shape, gradients[0].dtype)
        return gradients[0] @ weight, None, None, None, None, None


class FrozenLinear(torch.nn.Linear):
    """A `torch.nn.Linear` that is never trained; see the module.

    Attributes:
        stored: the format of the weight.
        dtype: of the weight before it became small, in which is computed.
        home: the device of the computation while the layer's own tensors wait elsewhere.
        fetched: copies of the layer's tensors there, while they are used.
    """

    weight: torch.nn.Parameter
    scale: torch.nn.Parameter | None

    def __init__(self, linear: torch.nn.Linear, stored: Stored) -> None:
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.stored: Stored = stored
        self.dtype = linear.weight.dtype
        self.shape = torch.Size((self.out_features, self.in_features))
        self.home: torch.device | None = None
        self.fetched: tuple[torch.Tensor | None, ...] | None = None
        with torch.no_grad():
            packed, scale = pack(linear.weight.detach(), stored)
        self.weight = _frozen(packed)
        self.register_parameter("scale", None if scale is None else _frozen(scale))
        self.register_parameter("bias", None if linear.bias is None else _frozen(linear.bias.detach()))

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """Return weight, scale and bias where they are at hand."""
        return self.fetched or (self.weight, self.scale, self.bias)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight [out, in] in numbers of ``dtype``."""
        packed, scale, _ = (_gathered(tensor) for tensor in self.tensors())
        assert packed is not None
        return whole(packed, scale, self.stored, self.shape, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x W^T + b, computed in the dtype of x."""
        packed, scale, bias = self.tensors()
        assert packed is not None
        bias = None if bias is None else bias.to(x.dtype)
        if packed.dtype == x.dtype:
            return F.linear(x, packed, bias)
        found: torch.Tensor = _Product.apply(x, packed, scale, bias, self.stored, self.shape)  # type: ignore[no-untyped-call]
        return found

    def thawed(self) -> torch.nn.Linear:
        """Return an ordinary layer with the same tensors, of one whose numbers are ordinary."""
        linear = torch.nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        return linear

    def extra_repr(self) -> str:
        """Say the format beside the shape."""
        return f"{super().extra_repr()}, stored={self.stored}"


def home_of(linear: torch.nn.Module) -> tuple[torch.device, torch.dtype]:
    """Return where a linear layer computes and in which numbers, wherever and however its weight is kept."""
    weight: torch.Tensor = linear.weight  # type: ignore[assignment]
    return getattr(linear, "home", None) or weight.device, getattr(linear, "dtype", None) or weight.dtype


def dense_weight(linear: torch.nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """Return the weight [out, in] of a linear layer of either kind; all processes ask for it together."""
    if isinstance(linear, FrozenLinear):
        return linear.dense(dtype)
    weight = _gathered(linear.weight.detach())  # type: ignore[operator]
    assert weight is not None
    return weight.to(dtype)


def _gathered(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """Return a tensor whole that may be spread over processes."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _frozen(tensor: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor, requires_grad=False)
