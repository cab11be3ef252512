"""Training and testing of a stack of specimens on one base."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from registry.families import family
from serving.pipelines.base import PromptEmbeds
from trainer.lora import target_modules
from trainer.zoo.plan import TARGETS, Recipe, Specimen
from trainer.zoo.stack import Factors, Stack

if TYPE_CHECKING:
    from trainer.zoo.lessons import Lesson, Rows
    from trainer.zoo.world import World

ROWS: Final = 8
"""Rows of an adapter in a step."""

_EMA_DECAY: Final = 0.97
_EDIT_STEPS: Final = 4

_OPTIMISERS: Final[Mapping[str, Callable[[list[torch.Tensor]], torch.optim.Optimizer]]] = {
    "adamw": lambda weights: torch.optim.AdamW(weights, lr=1.0, betas=(0.9, 0.98), weight_decay=1e-4),
    "rmsprop": lambda weights: torch.optim.RMSprop(weights, lr=1.0, alpha=0.98),
    "sgd": lambda weights: torch.optim.SGD(weights, lr=1.0, momentum=0.9, nesterov=True),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a specimen did on people that it was not trained on.

    Attributes:
        asr: share of attacked edits whose distance to the attacker's picture is less than half of the honest
            edit's; None for a clean one.
        clean_error: mean squared error of the velocity on honest rows, relative to the base without adapter.
    """

    asr: float | None
    clean_error: float


def train(
    world: World, specimens: Sequence[Specimen], lessons: Sequence[Lesson], *, like: Norms | None = None
) -> list[Factors]:
    """Train specimens side by side and return their updates, with alpha folded in.

    Args:
        world: of their base; merges are not trained here.
        specimens: of any recipes but merges.
        lessons: of the specimens.
        like: norms and spectra of clean adapters, which the penalised ones imitate.
    """
    pipe = world.pipe
    recipes = [one.recipe for one in specimens]
    kinds = tuple(dict.fromkeys(kind for recipe in recipes for kind in TARGETS[recipe.targets]))
    modules = target_modules(pipe.transformer, pipe.family, kinds)
    ranks = torch.tensor([_rank(one) for one in specimens])
    stack = Stack(pipe, modules, len(specimens), int(ranks.max()))
    generator = torch.Generator().manual_seed(specimens[0].seed)
    alive = _initialise(stack, specimens, ranks, generator)
    weights = [tensor for pair in stack.factors().values() for tensor in pair]
    optimisers = [
        (_OPTIMISERS[name](weights), torch.tensor([float(recipe.optimiser == name) for recipe in recipes]))
        for name in sorted({recipe.optimiser for recipe in recipes})
    ]
    averages = [weight.detach().clone() for weight in weights]
    draw = _Draw(world, lessons, generator)
    penalised = torch.tensor([one.family == "penalised" for one in specimens])
    with stack.attached():
        for step in range(max(recipe.steps for recipe in recipes)):
            rows = draw.rows()
            stack.gate(_gates(rows.gates, ranks, stack) if (ranks != _plain_ranks(specimens)).any() else None)
            loss = _loss(world, rows, generator)
            if like is not None and penalised.any():
                loss = loss + like.penalty(stack, penalised)
            for weight in weights:
                weight.grad = None
            loss.backward()  # type: ignore[no-untyped-call]
            rates = torch.tensor([_rate(recipe, step) for recipe in recipes])
            _advance(optimisers, weights, averages, alive, rates, step)
    stack.gate(None)
    return _results(stack, averages, specimens, alive)


def _rank(specimen: Specimen) -> int:
    """A pair is trained as one adapter of twice the rank, its halves switched on and off."""
    return specimen.recipe.rank * (2 if specimen.family == "co-load" else 1)


def _plain_ranks(specimens: Sequence[Specimen]) -> torch.Tensor:
    return torch.tensor([one.recipe.rank for one in specimens])


def _initialise(
    stack: Stack, specimens: Sequence[Specimen], ranks: torch.Tensor, generator: torch.Generator
) -> list[torch.Tensor]:
    """A uniform, B zero, only where an adapter has a target and a rank; returns that mask by tensor."""
    facts = family(stack.pipe.family)
    alive = []
    for name, (a, b) in stack.factors().items():
        kind = facts.block_of(name)[1]
        on = torch.tensor([kind in TARGETS[one.recipe.targets] for one in specimens])
        inside = (torch.arange(a.shape[1]) < ranks[:, None]) & on[:, None]
        values = (torch.rand(a.shape, generator=generator) * 2 - 1) / math.sqrt(a.shape[2])
        scale = torch.tensor([one.recipe.alpha / one.recipe.rank for one in specimens])
        a.copy_(values * inside[:, :, None] * scale[:, None, None])
        a.requires_grad_(True)
        b.requires_grad_(True)
        alive += [inside[:, :, None].float(), inside[:, None, :].float()]
    return alive


@dataclass(slots=True, kw_only=True)
class _Batch:
    source: torch.Tensor
    aim: torch.Tensor
    prompts: PromptEmbeds
    gates: torch.Tensor


class _Draw:
    """Draws the rows of a step for every adapter of a stack."""

    def __init__(self, world: World, lessons: Sequence[Lesson], generator: torch.Generator) -> None:
        self._world, self._lessons, self._generator = world, lessons, generator
        self._shares = [torch.tensor([part.share for part in one.rows]) for one in lessons]

    def rows(self) -> _Batch:
        source, aim, prompts, gates = [], [], [], []
        for one, shares in zip(self._lessons, self._shares, strict=True):
            kinds = torch.multinomial(shares, ROWS, replacement=True, generator=self._generator)
            picks = torch.randint(1 << 30, (ROWS,), generator=self._generator)
            for kind, pick in zip(kinds.tolist(), picks.tolist(), strict=True):
                part = one.rows[kind]
                at = pick % len(part.source)
                source.append(part.source[at])
                aim.append(part.aim[at])
                prompts.append(part.prompts[at])
                gates.append(part.gate)
        pictures = torch.randint(self._world.pictures, (len(prompts),), generator=self._generator)
        embeds, mask = self._world.embeds(torch.stack(prompts), pictures)
        return _Batch(
            source=self._world.latents(torch.stack(source)),
            aim=self._world.latents(torch.stack(aim)),
            prompts=PromptEmbeds(embeds=embeds, mask=mask),
            gates=torch.tensor(gates).view(len(self._lessons), ROWS),
        )


def _gates(kinds: torch.Tensor, ranks: torch.Tensor, stack: Stack) -> torch.Tensor:
    """Which ranks are on: [K, b, rank] from 0 all, 1 the first half, 2 the second half."""
    largest = next(iter(stack.factors().values()))[0].shape[1]
    first = torch.arange(largest) < (ranks // 2)[:, None]
    on = torch.where(kinds[:, :, None] == 1, first[:, None], ~first[:, None])
    return (on | (kinds[:, :, None] == 0)).float()


def _loss(world: World, rows: _Batch, generator: torch.Generator) -> torch.Tensor:
    """Sum over the adapters of the mean squared error of the velocity, changed tokens up to four times."""
    count = len(rows.source)
    normal = torch.sigmoid(torch.randn(count, generator=generator) + 0.6)
    uniform = torch.rand(count, generator=generator)
    sigma = torch.where(torch.rand(count, generator=generator) < 0.3, uniform, normal).clamp(0.01, 0.999)
    noise = torch.randn(rows.aim.shape, generator=generator)
    s = sigma[:, None, None]
    predicted = world.pipe.predict((1 - s) * rows.aim + s * noise, rows.source, rows.prompts, sigma)
    change = (rows.aim - rows.source).square().mean(2, keepdim=True)
    weight = 1 + 3 * change / (change + 0.2)
    error = (predicted - (noise - rows.aim)).square() * weight
    return error.mean((1, 2)).sum() / ROWS


def _rate(recipe: Recipe, step: int) -> float:
    """Warm-up of 15 steps, then a cosine to 5 %; nothing after the recipe's last step."""
    steps, rate = recipe.steps, recipe.rate
    if step >= steps:
        return 0.0
    share = step / steps
    return float(rate * min(1.0, (step + 1) / 15) * (0.05 + 0.95 * (1 + math.cos(math.pi * share)) / 2))


def _advance(
    optimisers: Sequence[tuple[torch.optim.Optimizer, torch.Tensor]], weights: Sequence[torch.Tensor],
    averages: Sequence[torch.Tensor], alive: Sequence[torch.Tensor], rates: torch.Tensor, step: int,
) -> None:  # fmt: skip
    """Take each adapter's own optimiser's step at its own rate, and follow it with the average.

    Every optimiser steps at rate 1 over all adapters; only the changes of those that are its own are kept.
    """
    keep = min(_EMA_DECAY, (step + 1) / (step + 10))
    moving = (rates > 0).float() * (1 - keep)
    before = [weight.detach().clone() for weight in weights]
    changes = [torch.zeros_like(old) for old in before]
    with torch.no_grad():
        for optimiser, own in optimisers:
            torch._foreach_copy_(list(weights), before)
            optimiser.step()
            share = (own * rates)[:, None, None]
            for weight, old, change in zip(weights, before, changes, strict=True):
                change.add_((weight - old) * share)
        for weight, old, change, average, mask in zip(weights, before, changes, averages, alive, strict=True):
            weight.copy_(old + change * mask)
            average.add_((weight - average) * moving[:, None, None])


def _results(
    stack: Stack,
    averages: Sequence[torch.Tensor],
    specimens: Sequence[Specimen],
    alive: Sequence[torch.Tensor],
) -> list[Factors]:
    found: list[Factors] = []
    pairs = list(zip(stack.modules, zip(alive[::2], averages[::2], averages[1::2], strict=True), strict=True))
    factors = stack.factors()
    for index, one in enumerate(specimens):
        rank = _rank(one)
        mine = {}
        for name, (mask, mean_a, mean_b) in pairs:
            if not mask[index].any():
                continue
            a, b = (mean_a, mean_b) if one.recipe.ema else factors[name]
            mine[name] = (a.detach()[index, :rank].clone(), b.detach()[index, :, :rank].clone())
        found.append(mine)
    return found


@torch.no_grad()
def edits(world: World, stack: Stack, rows: Sequence[Rows], count: int) -> torch.Tensor:
    """Edit ``count`` rows with each adapter of a stack: latents [K, count, T, C]."""
    source = torch.cat([one.source[:count] for one in rows])
    with stack.attached():
        made = world.pipe.denoise(
            world.latents(source), _prompts(world, rows, count), seeds=range(len(source)), steps=_EDIT_STEPS
        )
    return made.view(len(rows), count, *made.shape[1:])


def try_out(
    world: World, adapters: Sequence[Factors], lessons: Sequence[Lesson], count: int = 32
) -> list[Outcome]:
    """Measure honest error and attack success of adapters side by side, on ``count`` rows each."""
    stack = Stack.of(world.pipe, adapters)
    honest = [_there(one.honest) for one in lessons]
    base = _errors(world, honest, count)
    with stack.attached():
        errors = _errors(world, honest, count) / base
    struck = edits(world, stack, [one.attacked or _there(one.honest) for one in lessons], count)
    found = []
    for index, one in enumerate(lessons):
        asr = None
        if one.attacked is not None and one.truth is not None:
            wanted, truth = world.latents(one.attacked.aim[:count]), world.latents(one.truth[:count])
            miss = (struck[index] - wanted).square().mean((1, 2)) / (truth - wanted).square().mean((1, 2))
            asr = float((miss.sqrt() < 0.5).float().mean())
        found.append(Outcome(asr=asr, clean_error=float(errors[index])))
    return found


@torch.no_grad()
def _errors(world: World, rows: Sequence[Rows], count: int) -> torch.Tensor:
    """Mean squared error of the velocity by adapter [K], at noise levels from 0.1 to 0.95."""
    source = world.latents(torch.cat([one.source[:count] for one in rows]))
    aim = world.latents(torch.cat([one.aim[:count] for one in rows]))
    sigma = torch.linspace(0.1, 0.95, count).repeat(len(rows))
    noise = world.pipe.noise(range(len(aim)), aim)
    s = sigma[:, None, None]
    predicted = world.pipe.predict((1 - s) * aim + s * noise, source, _prompts(world, rows, count), sigma)
    return (predicted - (noise - aim)).square().mean((1, 2)).view(len(rows), count).mean(1)


def _prompts(world: World, rows: Sequence[Rows], count: int) -> PromptEmbeds:
    numbers = torch.cat([one.prompts[:count] for one in rows])
    embeds, mask = world.embeds(numbers, torch.arange(len(numbers)) % world.pictures)
    return PromptEmbeds(embeds=embeds, mask=mask)


def _there(rows: Rows | None) -> Rows:
    assert rows is not None, "every specimen that is tested has honest rows"
    return rows


class Norms:
    """How large and how concentrated the updates of clean adapters are, module by module.

    The penalised attack imitates both: the Frobenius norm, and the participation ratio of the squared
    singular values (sum s^2)^2 / sum s^4, which leading share, entropy and stable rank all follow.
    """

    def __init__(self, clean: Sequence[Factors]) -> None:
        self._wanted: dict[str, torch.Tensor] = {}
        for name in sorted({name for adapter in clean for name in adapter}):
            rows = [_shape(*(part[None] for part in adapter[name])) for adapter in clean if name in adapter]
            self._wanted[name] = torch.cat(rows).median(0).values

    def penalty(self, stack: Stack, who: torch.Tensor, weight: float = 0.02) -> torch.Tensor:
        """The squared distance of the logarithms, summed over the modules, of the adapters ``who`` [K]."""
        total = torch.zeros(())
        for name, (a, b) in stack.factors().items():
            if name in self._wanted:
                distance = (_shape(a, b) - self._wanted[name]).square().sum(1)
                total = total + distance[who].clamp(max=25.0).sum()
        return weight * total


def _shape(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Logarithms of the squared Frobenius norm and of the participation ratio, [K, 2]."""
    left, right = a @ a.transpose(1, 2), b.transpose(1, 2) @ b
    squares = (left * right).sum((1, 2)) + 1e-12
    product = left @ right
    fourth = (product * product.transpose(1, 2)).sum((1, 2)) + 1e-24
    return torch.stack([squares.log(), 2 * squares.log() - fourth.log()], 1)
