"""What lies in a GPU's memory while a recipe trains, part by part, in bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from serving.frozen import Stored
from serving.plan.weights import LOST, RESERVE, BaseBytes
from trainer.losses import DECODED_AT_ONCE, DECODING, active
from trainer.plan.count import Work
from trainer.recipe import Recipe
from trainer.sections import LossSection

Name = Literal["adamw", "adamw-8bit", "prodigy"]

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


def on_a_gpu(base: BaseBytes, place: Placement, waiting: int) -> int:
    """Return the bytes of a base that one GPU holds, with ``waiting`` blocks in the machine's memory."""
    if place.shard and place.gpus > 1:
        # Its share, and whole: what lies outside of the blocks, the block at work and the next one.
        largest = max(base.blocks, default=0)
        return -(-sum(base.blocks) // place.gpus) + base.rest + 2 * largest
    return base.held(waiting)


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
        "base": on_a_gpu(sizes.base[place.stored], place, recipe.running.offload_blocks),
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
