"""The bytes of a denoiser's weights, in any format and with blocks that wait elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from serving import placement
from serving.frozen import Stored, stored_bytes
from serving.plan.machines import GIB

RESERVE: Final = 3 * GIB // 2
"""CUDA's context, the workspaces of cuBLAS and NCCL: what torch does not count as its own."""
LOST: Final = 0.05
"""Share of the activations that an allocator loses between them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseBytes:
    """Bytes of a denoiser in one format.

    Attributes:
        linear: of the linear layers of each block, in the order of the blocks; they can wait elsewhere.
        blocks: of everything in each block.
        rest: of what lies outside of the blocks.
    """

    linear: tuple[int, ...]
    blocks: tuple[int, ...]
    rest: int

    @classmethod
    def of(cls, denoiser: torch.nn.Module, stored: Stored, plain: int) -> BaseBytes:
        """Count a denoiser: linear layers of blocks as ``stored``, all else in numbers of ``plain`` bytes."""
        linear, blocks = [], []
        for _, block in placement.blocks(denoiser):
            layers = [module for module in block.modules() if isinstance(module, torch.nn.Linear)]
            weights = sum(stored_bytes(stored, one.out_features, one.in_features) for one in layers)
            biases = sum(one.out_features for one in layers if one.bias is not None) * plain
            numbers = _numbers(block) - sum(_numbers(one) for one in layers)
            linear.append(weights + biases)
            blocks.append(weights + biases + numbers * plain)
        inside = sum(_numbers(block) for _, block in placement.blocks(denoiser))
        return cls(linear=tuple(linear), blocks=tuple(blocks), rest=(_numbers(denoiser) - inside) * plain)

    def held(self, waiting: int) -> int:
        """Return the bytes that a device holds while so many blocks wait elsewhere: of two of them copies."""
        away = placement.spread(len(self.blocks), waiting)
        whole = sum(self.blocks) + self.rest
        return whole - sum(self.linear[at] for at in away) + min(2, len(away)) * max(self.linear, default=0)


def _numbers(module: torch.nn.Module) -> int:
    return sum(value.numel() for value in module.parameters())
