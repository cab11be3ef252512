"""What the flow-matching pipelines of the FLUX families share: loading, starting noise, Euler steps.

The noise of a seed is drawn in the layout in which diffusers draws it, so seed s here and
``generator=[torch.Generator().manual_seed(s)]`` there make the same picture.
"""

from __future__ import annotations

import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from PIL import Image

from serving.memory import keep_freed_memory
from serving.pipelines.base import OnStep, Size, pixels_of
from serving.pipelines.process import Flow, Process


class FlowPipeline(ABC):
    """Common parts of `EditPipeline` on a loaded diffusers pipeline; its own size is a square.

    A base's folder may hold ``resolution.json`` with ``{"pixels": side, "prompt_tokens": length}``; the
    published weights have none and get ``default_pixels`` and ``default_tokens``.

    Args:
        pipe: the diffusers pipeline.
        pixels: side of the base's own size.
        prompt_tokens: prompts are padded and cut to so many tokens, all of which the model attends to.
    """

    family: ClassVar[str]
    sees_image = False
    diffusers_class: ClassVar[str]
    default_pixels: ClassVar[int]
    default_tokens: ClassVar[int]

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
    def load(
        cls,
        base: str | Path,
        *,
        revision: str | None = None,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Load a base from a local folder or from a hub id at `revision`.

        Args:
            dtype: of the weights; None means float32 on a CPU and bfloat16 elsewhere.

        Raises:
            OSError: the folder or id holds no such pipeline.
        """
        import diffusers

        if device == "cpu":
            keep_freed_memory()
        folder = str(base)
        local = Path(folder) / "resolution.json"
        given = json.loads(local.read_text()) if local.is_file() else {}
        weights = dtype or (torch.float32 if device == "cpu" else torch.bfloat16)
        # Without use_safetensors a folder that holds only pickled weights would have them unpickled.
        pipe = getattr(diffusers, cls.diffusers_class).from_pretrained(
            folder, revision=revision, dtype=weights, use_safetensors=True
        )
        return cls(pipe.to(device), given.get("pixels"), given.get("prompt_tokens"))

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

    def noise(self, seeds: Sequence[int], like: torch.Tensor, size: Size) -> torch.Tensor:
        """Starting noise [N, T, C]; a row depends on its own seed alone, on every device."""
        return torch.cat([self.latent_noise(seed, size) for seed in seeds]).to(like)

    def levels(self, steps: int, shift: float) -> list[float]:
        """The scheduler's noise levels from 1 to 0, ``steps + 1`` of them.

        Args:
            shift: mu, by which schedules with dynamic shifting move towards noise.
        """
        scheduler = self.pipe.scheduler
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=shift)
        return [float(level) for level in scheduler.sigmas]

    def euler(
        self,
        latents: torch.Tensor,
        levels: Sequence[float],
        velocity: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        on_step: OnStep | None,
    ) -> torch.Tensor:
        """Latents [N, T, C] after Euler steps along ``velocity(latents, level [N])`` from level to level."""
        for step, (high, low) in enumerate(itertools.pairwise(levels)):
            latents = latents + (low - high) * velocity(latents, latents.new_full((len(latents),), high))
            if on_step is not None and not on_step(step, latents):
                break
        return latents
