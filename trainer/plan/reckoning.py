"""The plan of a recipe: what `trainer plan` prints, as values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch

from registry.families import family
from serving.frozen import Stored
from serving.plan.bases import Base, text_tokens
from serving.plan.machines import MACHINES, Machine
from serving.plan.weights import BaseBytes
from trainer.data.batches import generator
from trainer.noise import noise_level
from trainer.plan import memory
from trainer.plan.adapter import Adapter, shapes_of, text_shapes_of
from trainer.plan.count import Work
from trainer.plan.memory import Placement, Sizes
from trainer.plan.passes import decoding, denoising
from trainer.recipe import Recipe

STORED: Final[tuple[Stored, ...]] = ("bf16", "fp8", "nf4")
GPUS: Final = (1, 2, 4, 8)
_DRAWS = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """Floating-point operations of one optimiser step, over all GPUs.

    Attributes:
        forward, backward: of the denoiser.
        again: of the forward passes that checkpointing repeats; 0 without.
        decode: of decoding the pictures that losses look at, and back.
        pictures: how many that are, on the average of many steps: only samples with little noise count.
        each: all operations of the GPU with the most samples.
    """

    forward: int
    backward: int
    again: int
    decode: int
    pictures: float
    each: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.forward + self.backward + self.again + self.decode


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """Memory of one GPU.

    Attributes:
        placement: how the base lies.
        parts: part -> bytes.
        fits: names of the machines that hold it.
    """

    placement: Placement
    parts: Mapping[str, int]
    fits: tuple[str, ...]

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a recipe takes.

    Attributes:
        recipe, base: names.
        pixels: side of a training picture.
        tokens: text tokens of a prompt.
        rank, adapter: of the recipe.
        presets: the family's presets at that rank.
        weights: part of the base -> its parameters.
        machine, placement: what it is reckoned for.
        pairs: of one pass through the denoiser on one GPU.
        denoiser: work of one sample.
        decode: work of one decoded picture, if a loss looks at any.
        step: work of an optimiser step.
        needs: memory in the recipe's placement, then in others.
        triplets, steps, hours, cost: of the training; None where the data is not known. US dollars.
    """

    recipe: str
    base: str
    pixels: int
    tokens: int
    rank: int
    adapter: Adapter
    presets: Mapping[str, Adapter]
    weights: Mapping[str, int]
    machine: Machine
    placement: Placement
    pairs: int
    denoiser: Work
    decode: Work | None
    step: Step
    needs: tuple[Need, ...]
    triplets: int | None
    steps: int | None
    hours: float | None
    cost: float | None

    def as_json(self) -> dict[str, Any]:
        """Return the plan as JSON values: bytes, floating-point operations, hours, US dollars."""
        value = asdict(self)
        value["step"]["total"] = self.step.total
        for need, told in zip(self.needs, value["needs"], strict=True):
            told["total"] = need.total
        return value


def reckon(
    recipe: Recipe,
    base: Base,
    *,
    triplets: int | None = None,
    machine: Machine | None = None,
    gpus: int | None = None,
    stored: Stored | None = None,
) -> Plan:
    """Return the plan of ``recipe`` on ``base``.

    Args:
        recipe: what is to be trained.
        base: its shapes.
        triplets: of the dataset; without them a recipe that counts in epochs has no steps and no hours.
        machine, gpus: in the place of ``running.gpu`` and ``running.count``.
        stored: in the place of ``precision.base``.
    """
    machine, count = machine or MACHINES[recipe.running.gpu], gpus or recipe.running.count
    plain: Stored = "fp32" if machine.memory is None else "bf16"
    asked = recipe.precision.base
    placement = Placement(
        stored=stored or (plain if asked == "auto" else asked), gpus=count, shard=recipe.running.shard
    )
    side = max(recipe.data.sizes, default=base.pixels)
    sizes, weights, adapter, presets = _count(recipe, base, side, plain)
    step = _step(recipe, sizes, count)
    known = recipe.optimiser.steps is not None or triplets is not None
    steps = recipe.optimiser.total_steps(triplets or 0) if known else None
    hours = None if steps is None else steps * step.each / (machine.peak * machine.utilisation) / 3600
    return Plan(
        recipe=recipe.name,
        base=recipe.base.id,
        pixels=side,
        tokens=text_tokens(base),
        rank=recipe.lora.rank,
        adapter=adapter,
        presets=presets,
        weights=weights,
        machine=machine,
        placement=placement,
        pairs=_pass_pairs(recipe, count),
        denoiser=sizes.denoiser,
        decode=sizes.decode,
        step=step,
        needs=_needs(recipe, sizes, placement, side, machine),
        triplets=triplets,
        steps=steps,
        hours=hours,
        cost=None if hours is None else hours * count * machine.price,
    )


def _count(
    recipe: Recipe, base: Base, side: int, plain: Stored
) -> tuple[Sizes, dict[str, int], Adapter, dict[str, Adapter]]:
    """Build the base and count."""
    dtype = torch.float32 if "fp32" in (plain, recipe.precision.compute) else torch.bfloat16
    parts = {name: base.build(name, dtype) for name in (base.denoiser, "vae", *base.text_encoders)}
    weights = {name: sum(value.numel() for value in module.parameters()) for name, module in parts.items()}
    denoiser = parts[base.denoiser]
    shapes = shapes_of(recipe, denoiser, recipe.targets) | text_shapes_of(recipe, parts)
    presets = {
        name: Adapter.of(recipe, shapes_of(recipe, denoiser, kinds), base.pixels)
        for name, kinds in family(base.family).presets.items()
    }
    sizes = Sizes(
        base={kind: BaseBytes.of(denoiser, kind, dtype.itemsize) for kind in (*STORED, plain)},
        vae=weights["vae"] * dtype.itemsize,
        text_encoders=sum(weights[name] for name in base.text_encoders) * dtype.itemsize,
        tensors=tuple(torch.Size(shape).numel() for shape in shapes.values()),
        denoiser=denoising(recipe, base, side, dtype),
        decode=decoding(base, side, dtype) if memory.looking(recipe) else None,
    )
    return sizes, weights, Adapter.of(recipe, shapes, base.pixels), presets


def _pass_pairs(recipe: Recipe, gpus: int) -> int:
    """Return how many pairs go through the denoiser at once on the GPU that has the most."""
    mine = -(-recipe.optimiser.batch_pairs // gpus)
    return min(mine, recipe.running.micro_pairs or mine)


def _step(recipe: Recipe, sizes: Sizes, gpus: int) -> Step:
    one, again = sizes.denoiser, recipe.running.checkpointing
    pairs = recipe.optimiser.batch_pairs
    pictures = 2 * _looked_at(recipe)
    decode = 0
    if sizes.decode is not None:
        forward, backward = sizes.decode.forward, sizes.decode.backward
        decode = round(pictures * (forward * (2 if again else 1) + backward))
    sample = one.forward + one.backward + (one.again if again else 0)
    return Step(
        forward=2 * pairs * one.forward,
        backward=2 * pairs * one.backward,
        again=2 * pairs * one.again if again else 0,
        decode=decode,
        pictures=pictures,
        each=2 * -(-pairs // gpus) * sample + decode // gpus,
    )


def _looked_at(recipe: Recipe) -> float:
    """Return how many pairs of a step are decoded on the average."""
    losses = memory.looking(recipe)
    if not losses:
        return 0.0
    source = generator("plan")
    uniform = torch.rand(_DRAWS, 2, generator=source).tolist()
    normal = torch.randn(_DRAWS, generator=source).tolist()
    levels = [
        noise_level(recipe.noise, choice, level, one)
        for (choice, level), one in zip(uniform, normal, strict=True)
    ]
    pairs, keep = recipe.optimiser.batch_pairs, (1 - recipe.data.keep_share) ** 2
    fit = [sum(one.min_sigma <= level <= one.max_sigma for level in levels) for one in losses]
    return max(
        min(float(one.pairs), pairs * keep * count / _DRAWS) for one, count in zip(losses, fit, strict=True)
    )


def _needs(recipe: Recipe, sizes: Sizes, own: Placement, side: int, machine: Machine) -> tuple[Need, ...]:
    """Return the memory of a GPU in the recipe's placement, then with other bases and numbers of GPUs."""
    wanted = [own]
    if machine.memory is not None:
        for gpus, shard in [(own.gpus, own.shard), (1, False), *((count, True) for count in GPUS[1:])]:
            wanted += [Placement(stored=stored, gpus=gpus, shard=shard) for stored in STORED]
    found = []
    for placement in dict.fromkeys(wanted):
        parts = memory.parts(recipe, sizes, placement, _pass_pairs(recipe, placement.gpus), side * side)
        if machine.memory is None:
            del parts["reserve"]  # of CUDA
        total = sum(parts.values())
        fits = tuple(one.name for one in MACHINES.values() if one.memory is not None and one.memory >= total)
        found.append(Need(placement=placement, parts=parts, fits=fits))
    return tuple(found)
