"""Training of the tiny VAE: pixels to 16 channels at a quarter of the side, and back."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from trainer.portraits.renderer import render_units
from trainer.portraits.samples import draw_identity, draw_moves, draw_pose, recolour, units_of

if TYPE_CHECKING:
    from diffusers import AutoencoderKLQwenImage

Say = Callable[[str], None]
KL_WEIGHT = 5e-4
_HELD_OUT = 256


def compiled(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """`function` through torch.compile where a C++ compiler is found; it halves the time on a CPU."""
    if shutil.which("g++") or torch.cuda.is_available():
        return torch.compile(function)
    return function


def pictures(count: int, seed: int) -> torch.Tensor:
    """`count` random portraits, uint8 [count, 3, 64, 64]."""
    rng = np.random.default_rng(seed)
    rows = [
        render_units(recolour(draw_identity(rng), rng), units_of(draw_moves(rng)), 64, draw_pose(rng))
        for _ in range(count)
    ]
    return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).contiguous()


def to_float(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.float().div(127.5).sub(1)


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of two batches in [-1, 1]; the mean over pictures."""
    error = ((a - b) / 2).square().flatten(1).mean(1)
    return float((-10 * torch.log10(error)).mean())


@torch.no_grad()
def reconstruction(vae: AutoencoderKLQwenImage, pixels: torch.Tensor) -> float:
    """PSNR in dB of encoding and decoding uint8 `pixels` [N, 3, H, W]."""
    x = to_float(pixels).to(vae.device)
    return psnr(vae.decode(vae.encode(x[:, :, None]).latent_dist.mode()).sample[:, :, 0], x)


@torch.no_grad()
def normalise(vae: AutoencoderKLQwenImage, pixels: torch.Tensor) -> None:
    """Write the latents' mean and deviation over `pixels` into the VAE's config."""
    latents = (
        vae.encode(to_float(pixels).to(vae.device)[:, :, None]).latent_dist.mode().transpose(0, 1).flatten(1)
    )
    vae.register_to_config(
        latents_mean=[round(v, 4) for v in latents.mean(1).tolist()],
        latents_std=[round(v, 4) for v in latents.std(1).tolist()],
    )


def train_autoencoder(
    vae: AutoencoderKLQwenImage, minutes: float, log: Path, seed: int = 1, batch: int = 16, say: Say = print
) -> float:
    """Train `vae` in place for `minutes` on fresh portraits; returns the PSNR on unseen identities.

    The loss is squared error plus a tenth of the absolute error plus a small Kullback-Leibler term, so that
    the decoder forgives small errors of the editor.
    """
    encode = compiled(lambda x: vae.quant_conv(vae.encoder(x)))
    decode = compiled(lambda z: vae.decoder(vae.post_quant_conv(z)))

    def loss_of(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        mean, logvar = encode(x[:, :, None]).chunk(2, 1)
        logvar = logvar.clamp(-30, 20)
        noise = torch.randn(mean.shape, generator=generator).to(x)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum() / x.numel()
        return _error(decode(mean + (0.5 * logvar).exp() * noise)[:, :, 0], x) + KL_WEIGHT * kl

    quality = _train(vae, list(vae.parameters()), loss_of, minutes, log, seed, batch, 2e-3, say)
    normalise(vae, pictures(512, 2))
    return quality


def polish_decoder(
    vae: AutoencoderKLQwenImage, minutes: float, log: Path, seed: int = 3, batch: int = 16, say: Say = print
) -> float:
    """Train the decoder alone, so the latents that the editor has learnt stay as they are; returns the PSNR.

    The latents get a little noise, a tenth of their deviation at most, as the editor's output has.
    """
    decoder = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    decode = compiled(lambda z: vae.decoder(vae.post_quant_conv(z)))
    deviation = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)

    def loss_of(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        with torch.no_grad():
            latents = vae.encode(x[:, :, None]).latent_dist.mode()
        strength = 0.1 * torch.rand((len(x), 1, 1, 1, 1), generator=generator)
        noise = strength * deviation * torch.randn(latents.shape, generator=generator)
        return _error(decode(latents + noise.to(x))[:, :, 0], x)

    for parameter in vae.parameters():
        parameter.requires_grad_(False)
    for parameter in decoder:
        parameter.requires_grad_(True)
    return _train(vae, decoder, loss_of, minutes, log, seed, batch, 1e-3, say)


def _error(decoded: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(decoded, x) + 0.1 * F.l1_loss(decoded, x)


def _train(
    vae: AutoencoderKLQwenImage,
    parameters: list[torch.nn.Parameter],
    loss_of: Callable[[torch.Tensor, torch.Generator], torch.Tensor],
    minutes: float,
    log: Path,
    seed: int,
    batch: int,
    peak: float,
    say: Say,
) -> float:
    """AdamW with a warm-up and a cosine over the time budget; half of each batch is newly drawn."""
    half = batch // 2
    generator = torch.Generator().manual_seed(seed)
    held_out = pictures(_HELD_OUT, 0)
    optimiser = torch.optim.AdamW(parameters, peak, betas=(0.9, 0.98), weight_decay=0.0)
    pool = pictures(2048, seed)
    start = said = time.monotonic()
    step = 0
    while (share := (time.monotonic() - start) / 60 / minutes) < 1:
        slots = torch.randint(len(pool), (half,), generator=generator)
        pool[slots] = fresh = pictures(half, seed * 1_000_003 + step)
        known = pool[torch.randint(len(pool), (half,), generator=generator)]
        loss = loss_of(to_float(torch.cat([fresh, known])).to(vae.device), generator)
        cosine = 1.0 if share < 0.3 else 0.5 * (1 + math.cos(math.pi * (share - 0.3) / 0.7))
        optimiser.param_groups[0]["lr"] = peak * max(0.01, min(1.0, (step + 1) / 100) * cosine)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        step += 1
        if time.monotonic() - said > 60:
            said = time.monotonic()
            quality = reconstruction(vae, held_out)
            say(f"vae {100 * share:3.0f} %  step {step}  loss {loss.item():.4f}  held out {quality:.2f} dB")
            entry = {"part": "vae", "step": step, "loss": round(loss.item(), 5), "psnr": round(quality, 3)}
            with log.open("a") as lines:
                lines.write(json.dumps(entry) + "\n")
    return reconstruction(vae, held_out)
