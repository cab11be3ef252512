"""Stable Diffusion 1.5 and XL: U-Nets that predict noise or v, through diffusers' own classes.

The safety checker of version 1.5 is not loaded: it looks at finished pictures, and training has none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from serving.pipelines.base import PromptEmbeds, Size
from serving.pipelines.process import Process, VariancePreserving
from serving.pipelines.stable_diffusion import StableDiffusion

if TYPE_CHECKING:
    from PIL import Image

DEFAULT_PIXELS = {"sd15": 512, "sdxl": 1024}


class StableDiffusion15(StableDiffusion):
    """See `StableDiffusion`; one CLIP."""

    family = "sd15"
    diffusers_class = "StableDiffusionImg2ImgPipeline"
    default_pixels = DEFAULT_PIXELS["sd15"]

    def __init__(self, pipe: Any, pixels: int) -> None:
        super().__init__(pipe, pixels)
        self._process = VariancePreserving.of_scheduler(pipe.scheduler)
        self.process: Process = self._process
        # Every level of the U-Net but the last halves the latents.
        self.multiple = pipe.vae_scale_factor * 2 ** (len(pipe.unet.config.block_out_channels) - 1)

    @staticmethod
    def _denoiser(pipe: Any) -> Any:
        return pipe.unet

    @classmethod
    def components(cls, source: str, revision: str | None) -> Mapping[str, Any]:
        """See `Loadable`."""
        without = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}
        return {**without, "requires_safety_checker": False}

    def encode_prompts(
        self, images: Sequence[Image.Image], prompts: Sequence[str], size: Size | None = None
    ) -> PromptEmbeds:
        """See `StableDiffusion`; 77 tokens."""
        embeds, _ = self.pipe.encode_prompt(list(prompts), self.pipe.text_encoder.device, 1, False)
        return self._embeds(embeds.to(self.dtype), None)

    def timestep(self, level: torch.Tensor) -> torch.Tensor:
        """See `StableDiffusion`; the one that the process noises with."""
        return self._process.timestep(level)

    def forward(
        self, latents: torch.Tensor, timestep: torch.Tensor, prompts: PromptEmbeds, size: Size
    ) -> torch.Tensor:
        """See `StableDiffusion`."""
        predicted: torch.Tensor = self.transformer(
            sample=latents,
            timestep=timestep,
            encoder_hidden_states=prompts.embeds,
            added_cond_kwargs=self._added(prompts, size),
            return_dict=False,
        )[0]
        return predicted

    def _added(self, prompts: PromptEmbeds, size: Size) -> Mapping[str, torch.Tensor] | None:
        """Conditioning besides the prompt's tokens."""
        return None


class StableDiffusionXL(StableDiffusion15):
    """See `StableDiffusion`; two CLIPs, a pooled vector, and sizes as Fourier features."""

    family = "sdxl"
    diffusers_class = "StableDiffusionXLImg2ImgPipeline"
    default_pixels = DEFAULT_PIXELS["sdxl"]

    @classmethod
    def components(cls, source: str, revision: str | None) -> Mapping[str, Any]:
        """See `Loadable`."""
        return {"feature_extractor": None, "image_encoder": None, "add_watermarker": False}

    def encode_prompts(
        self, images: Sequence[Image.Image], prompts: Sequence[str], size: Size | None = None
    ) -> PromptEmbeds:
        """See `StableDiffusion`; 77 tokens of both CLIPs side by side."""
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            list(prompts), device=self.pipe.text_encoder.device, do_classifier_free_guidance=False
        )
        return self._embeds(embeds.to(self.dtype), pooled.to(self.dtype))

    def _added(self, prompts: PromptEmbeds, size: Size) -> Mapping[str, torch.Tensor] | None:
        """The pooled prompt, and the size as original and target size with nothing cropped off.

        (original height, width, crop top, left, target height, width): Podell et al., arXiv 2307.01952, 2.2.
        """
        pooled = prompts.pooled
        if pooled is None:
            return None
        ids = torch.tensor([[*size, 0, 0, *size]], dtype=pooled.dtype, device=pooled.device)
        return {"text_embeds": pooled, "time_ids": ids.expand(len(pooled), -1)}
