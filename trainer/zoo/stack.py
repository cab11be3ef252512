"""Many LoRAs on one base in one forward pass: rows k*b .. k*b+b-1 of a batch belong to adapter k.

The base's matrices see one big batch; each adapter's low-rank update is a batched product beside them. On
models this small a step costs hardly more for twenty-four adapters than for one, and each adapter's
gradient depends on its own rows alone, so the result is that of training it alone on those rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from serving.pipelines.qwen_image_edit import QwenImageEdit

Factors = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
"""Module -> (A [rank, in], B [out, rank]), the scale folded into B."""


class _StackedLinear(torch.nn.Module):
    """A frozen linear layer with K low-rank updates beside it."""

    def __init__(self, base: torch.nn.Linear, gates: list[torch.Tensor | None]) -> None:
        super().__init__()
        self.base, self._gates = base, gates
        self.a: torch.Tensor
        self.b: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base(x)
        count = len(self.a)
        hidden = torch.bmm(x.reshape(count, -1, x.shape[-1]), self.a.transpose(1, 2))
        gate = self._gates[0]
        if gate is not None:  # [K, b, rank]: which ranks are on in which row
            tokens = hidden.shape[1] // gate.shape[1]
            hidden = hidden * gate.repeat_interleave(tokens, 1)
        return y + torch.bmm(hidden, self.b.transpose(1, 2)).view_as(y)


class Stack:
    """K adapters on a base's transformer, all of one padded rank.

    Padding stays at zero: a zero row of A and a zero column of B have zero gradients.

    Args:
        pipe: the base.
        modules: full names of the linear layers that carry an update.
        count: K.
        rank: the largest rank of the K adapters.
    """

    def __init__(self, pipe: QwenImageEdit, modules: Sequence[str], count: int, rank: int) -> None:
        self.pipe, self.modules, self.count = pipe, tuple(modules), count
        self._gates: list[torch.Tensor | None] = [None]
        self._layers: dict[str, _StackedLinear] = {}
        for name in self.modules:
            layer = _StackedLinear(pipe.transformer.get_submodule(name), self._gates)  # type: ignore[arg-type]
            layer.a = torch.zeros(count, rank, layer.base.in_features)
            layer.b = torch.zeros(count, layer.base.out_features, rank)
            self._layers[name] = layer

    @classmethod
    def of(cls, pipe: QwenImageEdit, adapters: Sequence[Factors]) -> Stack:
        """Put finished adapters side by side; modules that one lacks stay the base's."""
        modules = sorted({name for adapter in adapters for name in adapter})
        rank = max(len(a) for adapter in adapters for a, _ in adapter.values())
        stack = cls(pipe, modules, len(adapters), rank)
        for index, adapter in enumerate(adapters):
            for name, (a, b) in adapter.items():
                stack._layers[name].a[index, : len(a)] = a
                stack._layers[name].b[index, :, : len(a)] = b
        return stack

    def factors(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Module -> (A [K, rank, in], B [K, out, rank]), the tensors themselves."""
        return {name: (layer.a, layer.b) for name, layer in self._layers.items()}

    def gate(self, rows: torch.Tensor | None) -> None:
        """Switch ranks on and off by row, [K, b, rank]; None switches everything on."""
        self._gates[0] = rows

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Let the base run with the adapters; afterwards its own layers are back."""
        transformer = self.pipe.transformer
        try:
            for name, layer in self._layers.items():
                _replace(transformer, name, layer)
            yield
        finally:
            for name, layer in self._layers.items():
                _replace(transformer, name, layer.base)


def _replace(root: torch.nn.Module, name: str, module: Any) -> None:
    parent, _, child = name.rpartition(".")
    owner = root.get_submodule(parent)
    if child.isdigit():
        owner[int(child)] = module  # type: ignore[operator]
    else:
        setattr(owner, child, module)
