"""What the flow-matching pipelines share: loading, starting noise, Euler steps without a second pass.

The noise of a seed is drawn in the layout in which diffusers draws it, so seed s here and
``generator=[torch.Generator().manual_seed(s)]`` there make the same picture.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch
from PIL import Image

from serving.pipelines.base import PromptEmbeds, Size, pixels_of
from serving.pipelines.denoising import Denoising, Stepwise
from serving.pipelines.loading import Loadable
from serving.pipelines.process import Flow, Process
from serving.schedules import shifted


class FlowPipeline(Loadable, Stepwise):
    """Common parts of `EditPipeline` on a loaded diffusers pipeline; its own size is a square.

    A base's folder may hold ``resolution.json`` with ``{"pixels": side, "prompt_tokens": length}``; the
    published weights have none and get ``default_pixels`` and ``default_tokens``.

    Args:
        pipe: the diffusers pipeline.
        pixels: side of the base's own size.
        prompt_tokens: prompts are padded and cut to so many tokens, all of which the model attends to.
    """

    sees_image = False
    default_pixels: ClassVar[int]
    default_tokens: ClassVar[int] = 512

    def __init__(self, pipe: Any, pixels: int | None = None, prompt_tokens: int | None = None):
        side = pixels or self.default_pixels
        self.pipe, self.size = pipe, (side, side)
        self.prompt_tokens = prompt_tokens or self.default_tokens
        self.transformer: torch.nn.Module = pipe.transformer
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.requires_grad_(False).eval()
        self.process: Process = Flow()
        self.multiple: int = 2 * pipe.vae_scale_factor
        self._positions: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}

    @classmethod
    def of(cls, pipe: Any, sizes: Mapping[str, int]) -> Self:
        """See `Loadable`."""
        return cls(pipe, sizes.get("pixels"), sizes.get("prompt_tokens"))

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image], size: Size | None = None) -> torch.Tensor:
        """See `EditPipeline`; the mean that the VAE gives, never a sample of it."""
        weights: torch.Tensor = next(self.pipe.vae.parameters())
        pixels = pixels_of(images, size or self.size).to(weights)
        return self.pack(self.pipe.vae.encode(pixels).latent_dist.mode())

    @abstractmethod
    def pack(self, latents: torch.Tensor) -> torch.Tensor:
        """The VAE's latents [N, z, h, w], normalised and packed: [N, h/2 * w/2, 4 z]."""

    @abstractmethod
    def latent_noise(self, seed: int, size: Size) -> torch.Tensor:
        """Packed noise [1, T, C] of one seed, drawn as the diffusers pipeline draws it."""

    def noise(self, seeds: Sequence[int], like: torch.Tensor, size: Size | None = None) -> torch.Tensor:
        """Starting noise [N, T, C]; a row depends on its own seed alone, on every device."""
        return torch.cat([self.latent_noise(seed, size or self.size) for seed in seeds]).to(like)

    def levels(self, steps: int, shift: float) -> list[float]:
        """The scheduler's noise levels from 1 to 0, ``steps + 1`` of them.

        Args:
            shift: mu, by which schedules with dynamic shifting move towards noise.
        """
        scheduler = self.pipe.scheduler
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=shift)
        return [float(level) for level in scheduler.sigmas]

    @abstractmethod
    def schedule(self, steps: int, size: Size) -> list[float]:
        """The ``steps + 1`` noise levels of an edit, 1 to 0."""

    def start(
        self, image_latents: torch.Tensor, noise: torch.Tensor, levels: list[float]
    ) -> tuple[torch.Tensor, list[float]]:
        """The latents that denoising starts from, and the levels that are left of ``levels``."""
        return noise, levels

    @torch.no_grad()
    def begin(
        self,
        image_latents: torch.Tensor,
        prompts: PromptEmbeds,
        *,
        seeds: Sequence[int],
        steps: int,
        size: Size | None = None,
        shift: float | None = None,
    ) -> Denoising:
        """See `EditPipeline`."""
        place = size or self.size
        noise = self.noise(seeds, image_latents, place)
        levels = self.schedule(steps, place) if shift is None else shifted(steps, shift)
        latents, levels = self.start(image_latents, noise, levels)
        return Denoising(
            latents=latents, image_latents=image_latents, prompts=prompts, levels=tuple(levels), size=place
        )

    def follow(self, run: Denoising, predicted: torch.Tensor) -> None:
        """See `Stepwise`; an Euler step along the velocity."""
        high, low = run.levels[run.step : run.step + 2]
        run.clean = run.latents - high * predicted
        run.latents = run.latents + (low - high) * predicted
