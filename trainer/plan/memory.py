"""What lies in a GPU's memory while a recipe trains, part by part, in bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

import torch

from trainer import placement
from trainer.frozen import Stored, stored_bytes
from trainer.losses import DECODED_AT_ONCE, DECODING, active
from trainer.plan.count import Work
from trainer.plan.machines import GIB
from trainer.recipe import Recipe
from trainer.sections import LossSection

Name = Literal["adamw", "adamw-8bit", "prodigy"]

RESERVE: Final = 3 * GIB // 2
"""CUDA's context, the workspaces of cuBLAS and NCCL: what torch does not count as its own."""
LOST: Final = 0.05
"""Share of the activations that an allocator loses between them."""

_NETWORKS: Final[Mapping[str, int]] = {
    # fp32 weights of what losses look through: R100, R50, ViT-L/14 (picture side), AlexNet and VGG-16.
    "portraits": 4 << 20,
    "antelopev2": 261 << 20,
    "buffalo_l": 174 << 20,
    "clip-vit-l-14": 1_216_000_000,
    "lpips-alex": 10 << 20,
    "lpips-vgg": 59 << 20,
}
_8BIT_FROM, _8BIT_BLOCK = 4096, 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """How a recipe's base lies on the machines.

    Attributes:
        stored: how its linear weights are stored.
        gpus: how many take part.
        shard: whether they share one base, or each has its own.
    """

    stored: Stored
    gpus: int
    shard: bool


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

    def on_a_gpu(self, place: Placement, waiting: int) -> int:
        """Return the bytes that one GPU holds, with ``waiting`` blocks in the machine's memory."""
        whole, largest = sum(self.blocks) + self.rest, max(self.blocks, default=0)
        if place.shard and place.gpus > 1:
            # Its share, and whole: what lies outside of the blocks, the block at work and the next one.
            return -(-sum(self.blocks) // place.gpus) + self.rest + 2 * largest
        away = placement.spread(len(self.blocks), waiting)
        return whole - sum(self.linear[at] for at in away) + min(2, len(away)) * max(self.linear, default=0)


def _numbers(module: torch.nn.Module) -> int:
    return sum(value.numel() for value in module.parameters())


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """What memory is reckoned from.

    Attributes:
        base: how the base is stored -> its bytes.
        vae, text_encoders: bytes.
        tensors: numbers in each trained tensor.
        denoiser: work of the denoiser.
        decode: work of decoding a picture, if a loss looks at any.
    """

    base: Mapping[Stored, BaseBytes]
    vae: int
    text_encoders: int
    tensors: tuple[int, ...]
    denoiser: Work
    decode: Work | None


def optimiser_bytes(name: Name, tensors: Iterable[int]) -> int:
    """Return the bytes of an optimiser's states for fp32 parameters of so many numbers each.

    AdamW keeps two moments; in 8 bits each with a scale for every 256, except for small tensors; Prodigy
    keeps four.
    """
    if name == "prodigy":
        return 16 * sum(tensors)
    if name == "adamw":
        return 8 * sum(tensors)
    return sum(
        2 * (count + 4 * -(-count // _8BIT_BLOCK)) if count >= _8BIT_FROM else 8 * count for count in tensors
    )


def parts(recipe: Recipe, sizes: Sizes, place: Placement, pairs: int, pixels: int) -> dict[str, int]:
    """Return part -> bytes on one GPU at the worst moment, between the forward and the backward pass.

    Args:
        recipe: says what is trained, and whether activations are kept.
        sizes: of everything.
        place: where the base lies.
        pairs: of one pass through the denoiser.
        pixels: of a training picture.
    """
    weights = 4 * sum(sizes.tensors)
    again, work = recipe.running.checkpointing, sizes.denoiser
    kept = (work.checkpointed if again else work.saved).of(2 * pairs)
    decoded = 0
    if sizes.decode is not None:
        pictures = 2 * min(pairs, most_pairs(recipe))
        decoded = sizes.decode.saved.of(
            min(pictures, max(1, DECODED_AT_ONCE // pixels)) if again else pictures
        )
    found = {
        "base": sizes.base[place.stored].on_a_gpu(place, recipe.running.offload_blocks),
        "VAE": sizes.vae,
        "text encoders": sizes.text_encoders if recipe.lora.text_encoder else 0,
        "networks of the losses": sum(_NETWORKS[one.encoder] for one in looking(recipe)),
        "LoRA, fp32": weights,
        "gradients, fp32": weights,
        "optimiser": optimiser_bytes(recipe.optimiser.name, sizes.tensors),
        "EMA, fp32": weights,
        "activations": kept,
        "decoded pictures": decoded,
        "reserve": RESERVE + int(LOST * (kept + decoded)),
    }
    return {name: size for name, size in found.items() if size}


def looking(recipe: Recipe) -> list[LossSection]:
    """Return the active losses that look at decoded pictures."""
    return [one for name, one in active(recipe.losses).items() if name in DECODING]


def most_pairs(recipe: Recipe) -> int:
    """Return how many pairs of a step are decoded at most."""
    return max((one.pairs for one in looking(recipe)), default=0)
