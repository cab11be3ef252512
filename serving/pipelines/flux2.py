"""FLUX.2-klein-4B, through diffusers' own classes: edits with the source picture as a reference.

The text conditioning is three layers of a Qwen3 beside each other, with padding that is attended to as in
`Flux2KleinPipeline`. The VAE's latents are patchified and normalised by the running statistics of its batch
norm. The 4B is distilled to few steps and takes no guidance.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image

from serving.pipelines.base import PromptEmbeds, Size
from serving.pipelines.denoising import Batch
from serving.pipelines.flow import FlowPipeline

DEFAULT_PIXELS = 1024
DEFAULT_TOKENS = 512
TEXT_LAYERS = (9, 18, 27)
REFERENCE_TIME = 10  # time coordinate of the first reference picture; that of the picture to make is 0


class Flux2Klein(FlowPipeline):
    """`EditPipeline` on a loaded `Flux2KleinPipeline`."""

    family = "flux2-klein"
    diffusers_class = "Flux2KleinPipeline"
    default_pixels = DEFAULT_PIXELS
    default_tokens = DEFAULT_TOKENS

    def encode_prompts(
        self, images: Sequence[Image.Image], prompts: Sequence[str], size: Size | None = None
    ) -> PromptEmbeds:
        """See `EditPipeline`; the pictures are not looked at.

        The inner model is called: the pipeline's way also computes the logits of every token, in vain.
        """
        tokenizer, encoder = self.pipe.tokenizer, self.pipe.text_encoder
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}],
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=False,
            )
            for prompt in prompts
        ]
        inputs = tokenizer(
            texts, return_tensors="pt", padding="max_length", truncation=True, max_length=self.prompt_tokens
        ).to(next(encoder.parameters()).device)
        hidden = encoder.model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            output_hidden_states=True,
            use_cache=False,
        ).hidden_states
        embeds = torch.cat([hidden[layer] for layer in TEXT_LAYERS], -1)
        return PromptEmbeds(embeds=embeds, mask=embeds.new_ones(embeds.shape[:2], dtype=torch.bool))

    def _statistics(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and deviation [1, 4 z, 1, 1] of patchified latents."""
        norm = self.pipe.vae.bn
        mean, variance = (value.view(1, -1, 1, 1) for value in (norm.running_mean, norm.running_var))
        return mean.to(like), torch.sqrt(variance + self.pipe.vae.config.batch_norm_eps).to(like)

    def pack(self, latents: torch.Tensor) -> torch.Tensor:
        """The VAE's latents [N, z, h, w], normalised and packed: [N, h/2 * w/2, 4 z]."""
        patches = self.pipe._patchify_latents(latents)
        mean, deviation = self._statistics(patches)
        packed: torch.Tensor = self.pipe._pack_latents((patches - mean) / deviation)
        return packed

    def latent_noise(self, seed: int, size: Size) -> torch.Tensor:
        """Packed noise [1, T, C] of one seed, drawn as the diffusers pipeline draws it."""
        channels = 4 * self.pipe.vae.config.latent_channels
        shape = (1, channels, size[0] // self.multiple, size[1] // self.multiple)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        packed: torch.Tensor = self.pipe._pack_latents(noise)
        return packed

    def positions(self, size: Size, tokens: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids (time, row, column, place) of the text [L, 4] and of both pictures [2T, 4]; cached."""
        key = (size, tokens, device)
        if key not in self._positions:
            rows, columns = (torch.arange(side // self.multiple) for side in size)
            one = torch.zeros(1, dtype=torch.long)
            text = torch.cartesian_prod(one, one, one, torch.arange(tokens))
            pictures = [torch.cartesian_prod(one + time, rows, columns, one) for time in (0, REFERENCE_TIME)]
            self._positions[key] = text.to(device), torch.cat(pictures).to(device)
        return self._positions[key]

    def predict(
        self,
        latents: torch.Tensor,
        image_latents: torch.Tensor,
        prompts: PromptEmbeds,
        level: torch.Tensor,
        size: Size | None = None,
    ) -> torch.Tensor:
        """See `EditPipeline`."""
        text, pictures = self.positions(size or self.size, prompts.embeds.shape[1], latents.device)
        predicted: torch.Tensor = self.transformer(
            hidden_states=torch.cat([latents, image_latents], 1),
            timestep=level,
            guidance=None,
            encoder_hidden_states=prompts.embeds,
            txt_ids=text,
            img_ids=pictures,
            return_dict=False,
        )[0]
        return predicted[:, : latents.shape[1]]

    def schedule(self, steps: int, size: Size) -> list[float]:
        """See `FlowPipeline`."""
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

        tokens = (size[0] // self.multiple) * (size[1] // self.multiple)
        return self.levels(steps, compute_empirical_mu(tokens, steps))

    def predicted(self, batch: Batch) -> torch.Tensor:
        """See `Stepwise`."""
        return self.predict(batch.latents, batch.image_latents, batch.prompts, batch.level, batch.size)

    def decode(self, latents: torch.Tensor, size: Size | None = None) -> torch.Tensor:
        """See `EditPipeline`."""
        vae = self.pipe.vae
        rows, columns = (side // self.multiple for side in size or self.size)
        weights: torch.Tensor = next(vae.parameters())
        patches = latents.to(weights).transpose(1, 2).reshape(len(latents), -1, rows, columns)
        mean, deviation = self._statistics(patches)
        pixels: torch.Tensor = vae.decode(
            self.pipe._unpatchify_latents(patches * deviation + mean), return_dict=False
        )[0]
        return pixels
