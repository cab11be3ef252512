"""Counting on the meta device: floating-point operations and the memory that a backward pass waits for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """Bytes that wait for the backward pass: ``fixed``, and ``each`` for every sample."""

    fixed: int
    each: int

    def of(self, samples: int) -> int:
        """Return the bytes of a pass of so many samples."""
        return self.fixed + samples * self.each

    def plus(self, times: int, more: Kept, less: Kept) -> Kept:
        """Return these and so many times what ``more`` has over ``less``."""
        return Kept(
            fixed=self.fixed + times * (more.fixed - less.fixed),
            each=self.each + times * (more.each - less.each),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What a forward and backward pass takes; a multiplication with an addition is two operations.

    Attributes:
        forward, backward: floating-point operations of one sample.
        again: of the forward passes that checkpointing repeats, of one sample.
        saved: what waits for the backward pass.
        entering: the same with checkpointing, which keeps what enters the repeated parts.
        largest: what the largest of these parts keeps inside, for as long as it is repeated.
    """

    forward: int
    backward: int
    again: int
    saved: Kept
    entering: Kept
    largest: Kept

    @property
    def checkpointed(self) -> Kept:
        """What waits for the backward pass with checkpointing, at the worst moment."""
        return self.entering.plus(1, self.largest, Kept(fixed=0, each=0))

    def plus(self, times: int, more: Work, less: Work) -> Work:
        """Return this work and so many times what ``more`` has over ``less``."""
        ops = {name: getattr(self, name) + times * (getattr(more, name) - getattr(less, name))
               for name in ("forward", "backward", "again")}  # fmt: skip
        return Work(
            **ops,
            saved=self.saved.plus(times, more.saved, less.saved),
            entering=self.entering.plus(times, more.entering, less.entering),
            largest=max(self.largest, more.largest, key=lambda kept: kept.of(2)),
        )


class _Attention(torch.autograd.Function):
    """Attention that saves what a fused kernel saves: queries, keys, values and the result, never the scores.

    The matrix products are those of attention itself (two forward, four backward); what a fused kernel
    computes again in its backward pass is its own affair and does not count as the model's.
    """

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
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
            return _Attention.apply(given["query"], given["key"], given["value"])  # type: ignore[no-untyped-call]
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


def flop_counter() -> FlopCounterMode:
    """Return torch's counter of floating-point operations, which overlooks products added in place."""
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _added_product})


def _added_product(added: torch.Size, left: torch.Size, right: torch.Size, **_: Any) -> int:
    """Return the operations of ``added += left @ right`` from the shapes."""
    return 2 * left[0] * left[1] * right[1]


class _Passes:
    """Counts what a model does in forward passes, and in the parts that its class would checkpoint."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.counter = flop_counter()
        self.again = 0
        self._saved, self._inputs = _Memory(module), _Memory(module)
        self._inside = self._largest = 0

    def part(self, function: Callable[..., Any], *given: Any, **named: Any) -> Any:
        """Run a part that would be checkpointed."""
        for value in (*given, *named.values()):
            if isinstance(value, torch.Tensor):
                self._inputs.add(value)
        saved, done = self._saved.bytes, self.counter.get_total_flops()
        result = function(*given, **named)
        inside = self._saved.bytes - saved
        self.again += self.counter.get_total_flops() - done
        self._inside, self._largest = self._inside + inside, max(self._largest, inside)
        return result

    def forward(self, call: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Run a forward pass; the graph of its result is whole."""
        with torch.autograd.graph.saved_tensors_hooks(self._saved.add, lambda value: value):
            return call()

    @property
    def kept(self) -> tuple[int, int, int]:
        """Bytes that wait for the backward pass; those that enter repeated parts; those of the largest."""
        return self._saved.bytes, self._saved.bytes - self._inside + self._inputs.bytes, self._largest


def work(module: torch.nn.Module, call: Callable[[int], torch.Tensor]) -> Work:
    """Run a module and its backward pass and count.

    Args:
        module: on the meta device.
        call: runs ``module`` on so many samples and returns the result; its gradients reach what is trained.
    """
    one, two = _Passes(module), _Passes(module)
    checkpoints = bool(getattr(module, "_supports_gradient_checkpointing", False))
    with _Fused():
        try:
            if checkpoints:
                module.enable_gradient_checkpointing(one.part)  # type: ignore[operator]  # of diffusers
            with one.counter:
                result = one.forward(lambda: call(1))
                forward = one.counter.get_total_flops()
                result.float().sum().backward()  # type: ignore[no-untyped-call]
            if checkpoints:
                module.enable_gradient_checkpointing(two.part)  # type: ignore[operator]
            two.forward(lambda: call(2))
        finally:
            if checkpoints:
                module.disable_gradient_checkpointing()  # type: ignore[operator]
    saved, entering, largest = (
        Kept(fixed=2 * first - second, each=second - first)
        for first, second in zip(one.kept, two.kept, strict=True)
    )
    return Work(
        forward=forward,
        backward=one.counter.get_total_flops() - forward,
        again=one.again,
        saved=saved,
        entering=entering,
        largest=largest,
    )
