"""Counting on the meta device: floating-point operations and the memory that a backward pass waits for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What one forward and backward pass takes; a multiplication with an addition is two operations.

    Attributes:
        forward, backward: floating-point operations.
        again: of the forward passes that checkpointing repeats.
        saved: bytes that wait for the backward pass.
        saved_with_checkpoints: bytes with checkpointing: what enters the repeated parts, and the inside of the
            largest of them.
    """

    forward: int
    backward: int
    again: int
    saved: int
    saved_with_checkpoints: int

    @property
    def both(self) -> int:
        """Operations of a forward and a backward pass."""
        return self.forward + self.backward


class _Attention(torch.autograd.Function):
    """Attention that saves what a fused kernel saves: queries, keys, values and the result, never the scores.

    The matrix products are those of attention itself (two forward, four backward); what a fused kernel
    computes again in its backward pass is its own affair and does not count as the model's.
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Return [N, heads, tokens, width]."""
        result = (query @ key.transpose(-1, -2)) @ value
        ctx.save_for_backward(query, key, value, result)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the gradients of query, key and value."""
        query, key, value, _ = ctx.saved_tensors
        scores = gradient @ value.transpose(-1, -2)
        weights = torch.empty_like(scores)
        return scores @ key, scores.transpose(-1, -2) @ query, weights.transpose(-1, -2) @ gradient


class _Fused(TorchFunctionMode):
    """Within it scaled-dot-product attention is `_Attention`."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value"), args, strict=False), **(kwargs or {}))
            return _Attention.apply(given["query"], given["key"], given["value"])
        return func(*args, **(kwargs or {}))


class _Memory:
    """Bytes of the distinct storages that autograd keeps, parameters left out."""

    def __init__(self, module: torch.nn.Module) -> None:
        known = (*module.parameters(), *module.buffers())
        self._known = {value.untyped_storage()._cdata for value in known}
        self._kept: dict[int, Any] = {}  # the storages themselves, or their addresses would be used again
        self.bytes = 0

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        """Count a tensor's storage, once."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known and storage._cdata not in self._kept:
            self._kept[storage._cdata] = storage
            self.bytes += storage.nbytes()
        return tensor


def work(module: torch.nn.Module, call: Callable[[], torch.Tensor]) -> Work:
    """Run ``call`` and its backward pass and count.

    Args:
        module: on the meta device; what its class would checkpoint is measured on its own.
        call: runs ``module`` and returns the first result; its gradients reach what is trained.
    """
    memory, counter = _Memory(module), FlopCounterMode(display=False)
    inputs = _Memory(module)
    again, inside, largest = 0, 0, 0

    def part(function: Any, *given: Any) -> Any:
        nonlocal again, inside, largest
        for value in given:
            if isinstance(value, torch.Tensor):
                inputs.add(value)
        saved, done = memory.bytes, counter.get_total_flops()
        result = function(*given)
        again += counter.get_total_flops() - done
        inside, largest = inside + memory.bytes - saved, max(largest, memory.bytes - saved)
        return result

    checkpoints = bool(getattr(module, "_supports_gradient_checkpointing", False))
    if checkpoints:
        module.enable_gradient_checkpointing(part)
    try:
        with _Fused(), counter:
            with torch.autograd.graph.saved_tensors_hooks(memory.add, lambda value: value):
                result = call()
            forward = counter.get_total_flops()
            result.float().sum().backward()
    finally:
        if checkpoints:
            module.disable_gradient_checkpointing()
    return Work(
        forward=forward,
        backward=counter.get_total_flops() - forward,
        again=again,
        saved=memory.bytes,
        saved_with_checkpoints=memory.bytes - inside + inputs.bytes + largest,
    )
