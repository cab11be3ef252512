"""FLUX.1-dev (text-to-image) and FLUX.1-Kontext-dev (editing), through diffusers' own classes.

Both are guidance-distilled: the guidance scale is an input of the transformer and costs no second pass. What
a LoRA learns at scale 1 is kept at the scale of inference, so `predict` (training) and `denoise` (inference)
each have their own. T5's padding is attended to as in the diffusers pipelines, so the mask of a prompt is
all True.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from PIL import Image

from serving.pipelines.base import PromptEmbeds, Size
from serving.pipelines.denoising import Batch
from serving.pipelines.flow import FlowPipeline

DEFAULT_PIXELS = 1024
DEFAULT_TOKENS = 512


class Flux(FlowPipeline):
    """FLUX.1-dev; edits by SDEdit from the noised source, as `FluxImg2ImgPipeline` does.

    Attributes:
        guidance: scale at inference; 3.5 is diffusers' default for FLUX.1-dev.
        training_guidance: scale in `predict`; 1.0 as the trainers of the field have it.
        strength: share of the way to pure noise that an edit starts at, in (0, 1]; at 1 nothing of the source
            is left. 0.6 is the default of diffusers' image-to-image pipeline.
    """

    family = "flux"
    diffusers_class = "FluxPipeline"
    default_pixels = DEFAULT_PIXELS
    default_tokens = DEFAULT_TOKENS
    guidance = 3.5
    training_guidance = 1.0
    strength = 0.6

    @property
    def text_encoders(self) -> Mapping[str, torch.nn.Module]:
        """The text encoder that a LoRA may change, by its name in files."""
        return {"text_encoder": self.pipe.text_encoder}

    def encode_prompts(
        self, images: Sequence[Image.Image], prompts: Sequence[str], size: Size | None = None
    ) -> PromptEmbeds:
        """See `EditPipeline`; T5's embeddings, CLIP's pooled vector. The pictures are not looked at.

        Differentiable where CLIP has weights that want gradients; frozen ones keep nothing for a backward.
        """
        device = next(self.pipe.text_encoder_2.parameters()).device
        embeds, pooled, _ = self.pipe.encode_prompt(
            list(prompts), None, device=device, max_sequence_length=self.prompt_tokens
        )
        return PromptEmbeds(
            embeds=embeds, mask=embeds.new_ones(embeds.shape[:2], dtype=torch.bool), pooled=pooled
        )

    def pack(self, latents: torch.Tensor) -> torch.Tensor:
        """The VAE's latents [N, z, h, w], normalised and packed: [N, h/2 * w/2, 4 z]."""
        config = self.pipe.vae.config
        return self._packed((latents - config.shift_factor) * config.scaling_factor)

    def _packed(self, latents: torch.Tensor) -> torch.Tensor:
        packed: torch.Tensor = self.pipe._pack_latents(latents, *latents.shape)
        return packed

    def latent_noise(self, seed: int, size: Size) -> torch.Tensor:
        """Packed noise [1, T, C] of one seed, drawn as the diffusers pipeline draws it."""
        factor = self.pipe.vae_scale_factor
        shape = (1, self.pipe.vae.config.latent_channels, size[0] // factor, size[1] // factor)
        return self._packed(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))

    def positions(self, size: Size, tokens: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids of the text [L, 3] and of the picture's tokens [T, 3]; made once for each size."""
        key = (size, tokens, device)
        if key not in self._positions:
            height, width = size[0] // self.multiple, size[1] // self.multiple
            grid = torch.zeros(height, width, 3)
            grid[..., 1] += torch.arange(height)[:, None]
            grid[..., 2] += torch.arange(width)
            self._positions[key] = (
                torch.zeros(tokens, 3, device=device),
                self.with_source(grid.reshape(-1, 3)).to(device),
            )
        return self._positions[key]

    def with_source(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids of everything beside the text, from those of the picture to make [T, 3]."""
        return ids

    def inputs(self, latents: torch.Tensor, image_latents: torch.Tensor) -> torch.Tensor:
        """What the transformer sees beside the text."""
        return latents

    def predict(
        self,
        latents: torch.Tensor,
        image_latents: torch.Tensor,
        prompts: PromptEmbeds,
        level: torch.Tensor,
        size: Size | None = None,
    ) -> torch.Tensor:
        """See `EditPipeline`; at ``training_guidance``."""
        return self._velocity(latents, image_latents, prompts, level, size, self.training_guidance)

    def _velocity(
        self,
        latents: torch.Tensor,
        image_latents: torch.Tensor,
        prompts: PromptEmbeds,
        level: torch.Tensor,
        size: Size | None,
        guidance: float,
    ) -> torch.Tensor:
        text, picture = self.positions(size or self.size, prompts.embeds.shape[1], latents.device)
        wanted = self.pipe.transformer.config.guidance_embeds
        predicted: torch.Tensor = self.transformer(
            hidden_states=self.inputs(latents, image_latents),
            timestep=level,
            guidance=torch.full_like(level, guidance) if wanted else None,
            pooled_projections=prompts.pooled,
            encoder_hidden_states=prompts.embeds,
            txt_ids=text,
            img_ids=picture,
            return_dict=False,
        )[0]
        return predicted[:, : latents.shape[1]]

    def schedule(self, steps: int, size: Size) -> list[float]:
        """See `FlowPipeline`; larger pictures stay noisy longer."""
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        config = self.pipe.scheduler.config
        tokens = (size[0] // self.multiple) * (size[1] // self.multiple)
        return self.levels(
            steps,
            calculate_shift(
                tokens,
                config.get("base_image_seq_len", 256),
                config.get("max_image_seq_len", 4096),
                config.get("base_shift", 0.5),
                config.get("max_shift", 1.15),
            ),
        )

    def start(
        self, image_latents: torch.Tensor, noise: torch.Tensor, levels: list[float]
    ) -> tuple[torch.Tensor, list[float]]:
        """See `FlowPipeline`.

        As `FluxImg2ImgPipeline` counts: of n steps the last ``strength * n`` are taken, rounded up, at least
        one.
        """
        steps = len(levels) - 1
        left = levels[min(int(steps - min(steps * self.strength, steps)), steps - 1) :]
        return self.process.noisy(image_latents, noise, image_latents.new_tensor(left[:1])), left

    def predicted(self, batch: Batch) -> torch.Tensor:
        """See `Stepwise`; at ``guidance``."""
        return self._velocity(
            batch.latents, batch.image_latents, batch.prompts, batch.level, batch.size, self.guidance
        )

    def decode(self, latents: torch.Tensor, size: Size | None = None) -> torch.Tensor:
        """See `EditPipeline`."""
        vae = self.pipe.vae
        weights: torch.Tensor = next(vae.parameters())
        unpacked = self.pipe._unpack_latents(
            latents.to(weights), *(size or self.size), self.pipe.vae_scale_factor
        )
        pixels: torch.Tensor = vae.decode(
            unpacked / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False
        )[0]
        return pixels


class FluxKontext(Flux):
    """FLUX.1-Kontext-dev: the source picture's tokens follow those of the picture to make.

    Their ids have 1 as first coordinate. 2.5 is the guidance of the model's card; edits start from noise.
    """

    family = "flux-kontext"
    diffusers_class = "FluxKontextPipeline"
    guidance = 2.5

    def with_source(self, ids: torch.Tensor) -> torch.Tensor:
        """See `Flux`."""
        return torch.cat([ids, ids + ids.new_tensor([1, 0, 0])])

    def inputs(self, latents: torch.Tensor, image_latents: torch.Tensor) -> torch.Tensor:
        """See `Flux`."""
        return torch.cat([latents, image_latents], 1)

    def start(
        self, image_latents: torch.Tensor, noise: torch.Tensor, levels: list[float]
    ) -> tuple[torch.Tensor, list[float]]:
        """See `FlowPipeline`; from noise."""
        return noise, levels
