"""Stable Diffusion 3.5 (medium and large), through diffusers' own classes: two CLIPs, and T5 if it is there.

A base whose model_index.json has null for ``text_encoder_3`` works: zeros stand for T5's tokens, as in
diffusers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from serving.pipelines.base import PromptEmbeds, Size
from serving.pipelines.process import Flow, Process
from serving.pipelines.stable_diffusion import StableDiffusion

if TYPE_CHECKING:
    from PIL import Image

DEFAULT_PIXELS = 1024


class StableDiffusion3(StableDiffusion):
    """See `StableDiffusion`; latents of 16 channels, the model itself makes tokens of 2 x 2 of them."""

    family = "sd3"
    diffusers_class = "StableDiffusion3Img2ImgPipeline"
    default_pixels = DEFAULT_PIXELS

    def __init__(self, pipe: Any, pixels: int) -> None:
        super().__init__(pipe, pixels)
        self.process: Process = Flow()
        self.multiple = pipe.vae_scale_factor * pipe.patch_size

    @staticmethod
    def _denoiser(pipe: Any) -> Any:
        return pipe.transformer

    def encode_prompts(
        self, images: Sequence[Image.Image], prompts: Sequence[str], size: Size | None = None
    ) -> PromptEmbeds:
        """See `StableDiffusion`; 77 tokens of both CLIPs, then 256 of T5."""
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            list(prompts), None, None, device=self.pipe.text_encoder.device, do_classifier_free_guidance=False
        )
        return self._embeds(embeds.to(self.dtype), pooled.to(self.dtype))

    def timestep(self, level: torch.Tensor) -> torch.Tensor:
        """See `StableDiffusion`."""
        steps: int = self.pipe.scheduler.config.num_train_timesteps
        return level.float() * steps

    def forward(
        self, latents: torch.Tensor, timestep: torch.Tensor, prompts: PromptEmbeds, size: Size
    ) -> torch.Tensor:
        """See `StableDiffusion`."""
        predicted: torch.Tensor = self.transformer(
            hidden_states=latents,
            timestep=timestep,
            encoder_hidden_states=prompts.embeds,
            pooled_projections=prompts.pooled,
            return_dict=False,
        )[0]
        return predicted

    def _shift(self, size: Size) -> Mapping[str, float]:
        """See `StableDiffusion`; a scheduler with dynamic shifting is told the shift for so many tokens."""
        from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

        config = self.pipe.scheduler.config
        if not config.get("use_dynamic_shifting"):
            return {}
        mu = calculate_shift(
            (size[0] // self.multiple) * (size[1] // self.multiple),
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.16),
        )
        return {"mu": mu}

    def _noised(self, latents: torch.Tensor, timestep: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """See `StableDiffusion`."""
        result: torch.Tensor = self.pipe.scheduler.scale_noise(latents, timestep.repeat(len(latents)), noise)
        return result
