"""Pretraining of the tiny transformer as a general portrait editor.

It learns to keep a portrait, to make the neutral face, to set moves (`prompts.MOVES`) at any amount and mix,
and to recolour hair and background. A mix is asked for by the very formula that serving uses for expressions,
E = E_neutral + sum_k a_k (E_k - E_neutral), so that interpolating text moves the face evenly. The twelve
expression words are never shown: they are what an adapter adds.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from serving.pipelines.base import PromptEmbeds
from trainer.portraits.autoencoder import psnr
from trainer.portraits.identities import BACKGROUNDS, HAIR
from trainer.portraits.prompts import (
    BACKGROUND_TEMPLATE,
    HAIR_TEMPLATE,
    KEEP,
    NEUTRAL_WORD,
    TEMPLATE,
    base_prompts,
)
from trainer.portraits.renderer import render_units
from trainer.portraits.samples import before, draw_identity, draw_moves, draw_pose, dyed, units_of

if TYPE_CHECKING:
    from serving.pipelines.qwen_image_edit import QwenImageEdit

FACES = 4  # faces with moves drawn of each person, beside the neutral and the recoloured one
NEUTRAL_SLOT, COLOUR_SLOT = 0, FACES + 1
_PROMPTS = base_prompts()
_INDEX = {prompt: i for i, prompt in enumerate(_PROMPTS)}
_NEUTRAL = _INDEX[TEMPLATE.format(NEUTRAL_WORD)]


@dataclass(slots=True, kw_only=True)
class Crowd:
    """P people, each drawn 6 times: neutral, four with moves, one recoloured."""

    latents: torch.Tensor
    """float16 [P, 6, T, C]."""
    mixes: torch.Tensor
    """Amounts of every base prompt that ask for each picture, [P, 6, prompts]."""
    colour_source: torch.Tensor
    """Which picture the recoloured one starts from, [P]."""


def _draw_person(rng: np.random.Generator) -> tuple[list[np.ndarray], np.ndarray, int]:
    person, place = draw_identity(rng), draw_pose(rng)
    moves: list[dict[str, float]] = [{}] + [draw_moves(rng) for _ in range(FACES)]
    pictures = [render_units(person, units_of(amounts), 64, place) for amounts in moves]
    mixes = np.zeros((FACES + 2, len(_PROMPTS)), np.float32)
    for row, amounts in zip(mixes, moves, strict=False):
        for name, amount in amounts.items():
            row[_INDEX[TEMPLATE.format(name)]] = amount
    origin = int(rng.integers(FACES + 1))
    if rng.random() < 0.5:
        name = str(rng.choice(list(HAIR)))
        changed, prompt = dyed(person, name), HAIR_TEMPLATE.format(name)
    else:
        name = str(rng.choice(list(BACKGROUNDS)))
        changed, prompt = before(person, name), BACKGROUND_TEMPLATE.format(name)
    pictures.append(render_units(changed, units_of(moves[origin]), 64, place))
    mixes[COLOUR_SLOT, _INDEX[prompt]] = 1.0
    return pictures, mixes, origin


def draw_crowd(pipe: QwenImageEdit, people: int, seed: int) -> Crowd:
    """Draw and encode `people` new people."""
    rng = np.random.default_rng([seed, 11])
    drawn = [_draw_person(rng) for _ in range(people)]
    pictures = [Image.fromarray(picture) for row, _, _ in drawn for picture in row]
    latents = torch.cat(
        [pipe.encode_images(pictures[i : i + 96]).half() for i in range(0, len(pictures), 96)]
    )
    return Crowd(
        latents=latents.view(people, FACES + 2, *latents.shape[1:]),
        mixes=torch.from_numpy(np.stack([mix for _, mix, _ in drawn])).to(latents.device),
        colour_source=torch.tensor([origin for _, _, origin in drawn], device=latents.device),
    )


def prompt_bank(pipe: QwenImageEdit, pictures: int = 32) -> torch.Tensor:
    """Embeddings [pictures, prompts, L, D] of every base prompt beside some pictures.

    The prompt's picture token depends on the source image; training on other pictures' tokens teaches the
    transformer to take the words from the text and the person from the control latents.
    """
    rng = np.random.default_rng(5)
    rows = []
    for _ in range(pictures):
        picture = Image.fromarray(
            render_units(draw_identity(rng), units_of(draw_moves(rng)), 64, draw_pose(rng))
        )
        prompts = pipe.encode_prompts([picture] * len(_PROMPTS), _PROMPTS)
        if not bool(prompts.mask.all()):
            raise ValueError("the base prompts differ in length, so they cannot be interpolated")
        rows.append(prompts.embeds)
    return torch.stack(rows)


@dataclass(slots=True, kw_only=True)
class Batch:
    source: torch.Tensor
    target: torch.Tensor
    embeds: torch.Tensor


def draw_batch(crowd: Crowd, bank: torch.Tensor, size: int, generator: torch.Generator) -> Batch:
    """`size` edits: 74 % moves, 8 % back to neutral, 8 % keep, 10 % recolour."""
    device = crowd.latents.device

    def integers(high: int) -> torch.Tensor:
        return torch.randint(high, (size,), generator=generator).to(device)

    person, kind = integers(len(crowd.latents)), torch.rand(size, generator=generator).to(device)
    source = torch.where(torch.rand(size, generator=generator).to(device) < 0.65, 0, integers(FACES + 1))
    target = 1 + integers(FACES)
    target = torch.where(kind < 0.26, torch.zeros_like(target), target)
    keep, colour = kind < 0.08, (kind >= 0.08) & (kind < 0.18)
    target = torch.where(keep, source, target)
    source = torch.where(colour, crowd.colour_source[person], source)
    target = torch.where(colour, torch.full_like(target, COLOUR_SLOT), target)
    mix = crowd.mixes[person, target]
    kept = torch.zeros_like(mix)
    kept[:, _INDEX[KEEP]] = 1.0
    mix = torch.where(keep[:, None], kept, mix)
    words = bank[integers(len(bank))]
    neutral = words[:, _NEUTRAL]
    embeds = neutral + torch.einsum("np,npld->nld", mix, words - neutral[:, None])
    return Batch(
        source=crowd.latents[person, source].float(),
        target=crowd.latents[person, target].float(),
        embeds=embeds,
    )


def flow_loss(pipe: Any, batch: Batch, sigma: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Weighted squared error of the velocity; tokens that the edit changes count up to three times."""
    s = sigma[:, None, None]
    everything = torch.ones(batch.embeds.shape[:2], dtype=torch.bool, device=batch.embeds.device)
    with torch.autocast(batch.source.device.type, torch.bfloat16):
        predicted = pipe.predict(
            (1 - s) * batch.target + s * noise,
            batch.source,
            PromptEmbeds(embeds=batch.embeds, mask=everything),
            sigma,
        ).float()
    change = (batch.target - batch.source).square().mean(2, keepdim=True)
    weight = 1 + 2 * (change / (change + 0.05))
    return (weight * (predicted - (noise - batch.target)).square()).mean()


def draw_sigma(size: int, generator: torch.Generator) -> torch.Tensor:
    """Noise levels [size]: mostly logit-normal, shifted to the noisy side, a fifth uniform."""
    normal = torch.sigmoid(torch.randn(size, generator=generator) + 0.6)
    uniform = torch.rand(size, generator=generator)
    return torch.where(torch.rand(size, generator=generator) < 0.2, uniform, normal).clamp(0.002, 0.998)


def open_gates(transformer: torch.nn.Module) -> None:
    """Start with zero modulation but open gates, so that every block works from the first step."""
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "_mod.1" in name or "norm_out.linear" in name or "proj_out" in name:
                parameter.zero_()
        for block in transformer.transformer_blocks:  # type: ignore[union-attr]
            for modulation in (block.img_mod[1], block.txt_mod[1]):
                modulation.bias.view(6, -1)[[2, 5]] = 0.3


@torch.no_grad()
def held_out(pipe: QwenImageEdit, crowd: Crowd, bank: torch.Tensor, steps: int = 6) -> dict[str, float]:
    """Velocity loss and paired PSNR (dB, against the true picture) of edits on people never trained on."""
    generator = torch.Generator().manual_seed(99)
    batch = draw_batch(crowd, bank, 96, generator)
    sigma = torch.linspace(0.05, 0.95, 96, device=batch.source.device)
    noise = torch.randn(batch.target.shape, generator=generator).to(batch.source)
    result = {"loss": float(flow_loss(pipe, batch, sigma, noise))}
    neutral = bank[0, _NEUTRAL]
    words = bank[0][None] - neutral
    for name, slot, mix in (
        ("moves_psnr", 1, crowd.mixes[:48, 1]),
        ("neutral_psnr", 0, crowd.mixes[:48, 0]),
        ("keep_psnr", 0, torch.eye(len(_PROMPTS), device=neutral.device)[_INDEX[KEEP]].expand(48, -1)),
    ):
        origin = 2 if name == "neutral_psnr" else 0
        embeds = neutral + torch.einsum("np,npld->nld", mix, words.expand(len(mix), -1, -1, -1))
        everything = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        edited = pipe.denoise(
            crowd.latents[:48, origin].float(),
            PromptEmbeds(embeds=embeds, mask=everything),
            seeds=range(48),
            steps=steps,
        )
        truth = pipe.decode(crowd.latents[:48, slot].float())
        result[name] = psnr(pipe.decode(edited), truth)
    return result


@dataclass(slots=True, kw_only=True)
class Schedule:
    """Learning-rate factor over the share of the time budget: warm-up, plateau, linear decay."""

    warm_steps: int = 60
    plateau: float = 0.45
    floor: float = 0.02

    def factor(self, step: int, share: float) -> float:
        decay = 1.0 if share < self.plateau else max(self.floor, (1 - share) / (1 - self.plateau))
        return min(1.0, (step + 1) / self.warm_steps) * decay


def optimisers(transformer: torch.nn.Module) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Muon (Jordan et al., 2024) for the blocks' matrices, AdamW for the rest."""
    matrices = [
        p
        for name, p in transformer.named_parameters()
        if p.dim() == 2 and "transformer_blocks" in name and "_mod" not in name
    ]
    chosen = {id(p) for p in matrices}
    rest = [p for p in transformer.parameters() if id(p) not in chosen]
    return (
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.01, momentum=0.95, ns_steps=4),
        torch.optim.AdamW(rest, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0),
    )


def _load_state(
    path: Path, transformer: Any, ema: dict[str, torch.Tensor], optimiser: Any
) -> tuple[int, float]:
    state = torch.load(path, weights_only=True, map_location=next(transformer.parameters()).device)
    transformer.load_state_dict(state["weights"])
    for name, value in state["ema"].items():
        ema[name].copy_(value)
    for one, saved in zip(optimiser, state["optimisers"], strict=True):
        one.load_state_dict(saved)
    return int(state["step"]), float(state["seconds"])


def train_editor(
    pipe: QwenImageEdit,
    minutes: float,
    state_path: Path,
    log: Path,
    *,
    batch: int = 32,
    people: int = 768,
    renew: int = 64,
    round_seconds: float = 20.0,
    say: Callable[[str], None] = print,
) -> None:
    """Train `pipe.transformer` for `minutes` in all and leave its EMA weights in it.

    Args:
        state_path: training state, written every three minutes; a run continues from it.
        people: size of the pool of drawn people, of which `renew` are replaced every `round_seconds`.
    """
    transformer = pipe.transformer.requires_grad_(True).train()
    bank = prompt_bank(pipe)
    unseen = draw_crowd(pipe, 64, 0)
    optimiser = optimisers(transformer)
    base_rates = [one.param_groups[0]["lr"] for one in optimiser]
    ema = {name: p.detach().clone() for name, p in transformer.named_parameters()}
    step, spent = _load_state(state_path, transformer, ema, optimiser) if state_path.exists() else (0, 0.0)
    crowd = draw_crowd(pipe, people, 1 + step)
    schedule, generator = Schedule(), torch.Generator().manual_seed(step + 1)
    begun = reported = renewed = time.monotonic()
    losses: list[float] = []
    while (share := (spent + time.monotonic() - begun) / 60 / minutes) < 1:
        if time.monotonic() - renewed > round_seconds:
            fresh = draw_crowd(pipe, renew, step + 1_000_000)
            slots = torch.randperm(people, generator=generator)[:renew].to(crowd.latents.device)
            crowd.latents[slots], crowd.mixes[slots] = fresh.latents, fresh.mixes
            crowd.colour_source[slots] = fresh.colour_source
            renewed = time.monotonic()
        drawn = draw_batch(crowd, bank, batch, generator)
        sigma = draw_sigma(batch, generator).to(drawn.source.device)
        noise = torch.randn(drawn.target.shape, generator=generator).to(drawn.source)
        loss = flow_loss(pipe, drawn, sigma, noise)
        transformer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(optimiser[1].param_groups[0]["params"], 1.0)
        for one, rate in zip(optimiser, base_rates, strict=True):
            one.param_groups[0]["lr"] = rate * schedule.factor(step, share)
            one.step()
        step += 1
        losses.append(loss.item())
        if step % 4 == 0:
            keep = min(0.995, step / (step + 60))
            torch._foreach_lerp_(list(ema.values()), [p.detach() for p in transformer.parameters()], 1 - keep)
        if time.monotonic() - reported > 180:
            reported = time.monotonic()
            seconds = spent + reported - begun
            _report(pipe, ema, unseen, bank, losses, step, seconds, share, batch, log, say)
            state = {"weights": transformer.state_dict(), "ema": ema, "step": step, "seconds": seconds,
                     "optimisers": [one.state_dict() for one in optimiser]}  # fmt: skip
            torch.save(state, state_path.with_suffix(".part"))
            state_path.with_suffix(".part").replace(state_path)
            losses.clear()
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            parameter.copy_(ema[name])
    transformer.requires_grad_(False).eval()


def _report(
    pipe: Any,
    ema: dict[str, torch.Tensor],
    unseen: Crowd,
    bank: torch.Tensor,
    losses: list[float],
    step: int,
    seconds: float,
    share: float,
    batch: int,
    log: Path,
    say: Callable[[str], None],
) -> None:
    """Judge the EMA weights on unseen people, print a line and append it to the training log."""
    raw = [p.detach().clone() for p in pipe.transformer.parameters()]
    with torch.no_grad():
        for name, parameter in pipe.transformer.named_parameters():
            parameter.copy_(ema[name])
        numbers = held_out(pipe, unseen, bank)
        for parameter, value in zip(pipe.transformer.parameters(), raw, strict=True):
            parameter.copy_(value)
    left = seconds * (1 / max(share, 1e-6) - 1) / 60
    entry = {"part": "editor", "minutes": round(seconds / 60, 1), "step": step, "samples": step * batch,
             "train_loss": round(math.fsum(losses) / max(1, len(losses)), 4),
             **{name: round(value, 4) for name, value in numbers.items()}}  # fmt: skip
    with log.open("a") as lines:
        lines.write(json.dumps(entry) + "\n")
    text = "  ".join(f"{name} {value}" for name, value in entry.items() if name != "part")
    say(f"editor {100 * share:3.0f} %  {text}  ({left:.0f} min left)")
