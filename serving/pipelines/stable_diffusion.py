"""What the Stable Diffusion families share: latents of one VAE, and edits that start from the noised source.

The families know no source picture, so an edit is SDEdit (Meng et al., arXiv 2108.01073): the source's
latents are noised to ``strength`` of the schedule and denoised from there by the base's own scheduler, with
the arithmetic of diffusers' image-to-image pipelines and without classifier-free guidance. A seed gives the
very noise that those pipelines draw from a generator of that seed. Latents [N, C, h, w] travel as
[N, h w, C]. Each part works where it lies: in training, text encoders, VAE and denoiser may be on different
devices.
"""

from __future__ import annotations

import copy
import inspect
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

import torch

from serving.errors import UsageError
from serving.pipelines.base import PromptEmbeds, Size, pixels_of
from serving.pipelines.denoising import Batch, Denoising, Stepwise
from serving.pipelines.loading import Loadable
from serving.pipelines.process import Process

if TYPE_CHECKING:
    from PIL import Image

STRENGTH = 0.6
"""How much of the schedule an edit runs, unless `StableDiffusion.strength` is set otherwise."""


class StableDiffusion(Loadable, Stepwise):
    """An `EditPipeline` around one of diffusers' image-to-image pipelines.

    Attributes:
        pipe: the diffusers pipeline; a component that the base lacks is None.
        strength: share of the schedule in (0, 1] that an edit runs; 1 keeps the least of the source.
    """

    sees_image = False
    default_pixels: int
    process: Process
    multiple: int

    def __init__(self, pipe: Any, pixels: int) -> None:
        taken, given = self._denoiser(pipe).config.in_channels, pipe.vae.config.latent_channels
        if taken != given:
            raise UsageError(
                f"the base's denoiser takes {taken} channels, a latent has {given}",
                "take a text-to-image base; those for inpainting and depth are of another kind",
            )
        self.pipe, self.size, self.strength = pipe, (pixels, pixels), STRENGTH
        self.transformer: torch.nn.Module = self._denoiser(pipe)
        # Read before anything is quantised: latents and embeddings come in the denoiser's own numbers.
        self.dtype: torch.dtype = self._denoiser(pipe).dtype
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.requires_grad_(False).eval()
        if self.dtype == torch.float16 and pipe.vae.config.force_upcast:
            pipe.vae.to(torch.float32)  # its activations overflow in float16

    @staticmethod
    @abstractmethod
    def _denoiser(pipe: Any) -> Any:
        """The part that LoRA layers go into."""

    @classmethod
    def of(cls, pipe: Any, sizes: Mapping[str, int]) -> Self:
        """See `Loadable`."""
        return cls(pipe, sizes.get("pixels", cls.default_pixels))

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return next(self.transformer.parameters()).device

    @property
    def text_encoders(self) -> Mapping[str, torch.nn.Module]:
        """The CLIP text encoders, that LoRA layers may go into, by their part of the pipeline."""
        found = {name: getattr(self.pipe, name, None) for name in ("text_encoder", "text_encoder_2")}
        return {name: part for name, part in found.items() if part is not None}

    @abstractmethod
    def encode_prompts(
        self, images: Sequence[Image.Image], prompts: Sequence[str], size: Size | None = None
    ) -> PromptEmbeds:
        """See `EditPipeline`; the pictures are not looked at.

        Padding is attended to as in diffusers, so every token counts as real. Differentiable where a text
        encoder has weights that want gradients; the frozen ones keep nothing for a backward pass.
        """

    def _embeds(self, embeds: torch.Tensor, pooled: torch.Tensor | None) -> PromptEmbeds:
        mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        return PromptEmbeds(embeds=embeds, mask=mask, pooled=pooled)

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image], size: Size | None = None) -> torch.Tensor:
        """See `EditPipeline`; the mean of the VAE's distribution."""
        vae = self.pipe.vae
        pixels = pixels_of(images, size or self.size).to(vae.device, vae.dtype)
        shift, scale = self._affine(pixels)
        return self.pack(((vae.encode(pixels).latent_dist.mode() - shift) * scale).to(self.dtype))

    def _affine(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Shift and scale [1, C or 1, 1, 1] with which normal latents are (z - shift) scale."""
        config = self.pipe.vae.config
        shift, scale = like.new_tensor(config.shift_factor or 0.0), like.new_tensor(config.scaling_factor)
        if config.latents_mean is not None and config.latents_std is not None:
            shift = shift + like.new_tensor(config.latents_mean)
            scale = scale / like.new_tensor(config.latents_std)
        return shift.view(1, -1, 1, 1), scale.view(1, -1, 1, 1)

    def pack(self, latents: torch.Tensor) -> torch.Tensor:
        """[N, C, h, w] -> [N, h w, C]."""
        return latents.flatten(2).transpose(1, 2).contiguous()

    def unpack(self, latents: torch.Tensor, size: Size | None = None) -> torch.Tensor:
        """[N, h w, C] -> [N, C, h, w] of a picture of ``size``."""
        height, width = (side // self.pipe.vae_scale_factor for side in size or self.size)
        return latents.transpose(1, 2).contiguous().view(len(latents), -1, height, width)

    @abstractmethod
    def forward(
        self, latents: torch.Tensor, timestep: torch.Tensor, prompts: PromptEmbeds, size: Size
    ) -> torch.Tensor:
        """Prediction [N, C, h, w] for latents [N, C, h, w] at the scheduler's timesteps [N]."""

    @abstractmethod
    def timestep(self, level: torch.Tensor) -> torch.Tensor:
        """The scheduler's timesteps [N] of noise levels [N]."""

    def predict(
        self,
        latents: torch.Tensor,
        image_latents: torch.Tensor,
        prompts: PromptEmbeds,
        level: torch.Tensor,
        size: Size | None = None,
    ) -> torch.Tensor:
        """See `EditPipeline`; ``image_latents`` are not looked at."""
        whole = size or self.size
        return self.pack(self.forward(self.unpack(latents, whole), self.timestep(level), prompts, whole))

    def _schedule(self, steps: int, size: Size, device: torch.device) -> torch.Tensor:
        """Set the scheduler to the timesteps of an edit, and return them."""
        self.pipe.scheduler.set_timesteps(steps, device=device, **self._shift(size))
        # At least one step, also where steps * strength rounds down to none.
        share = max(self.strength, 1.01 / steps)
        timesteps: torch.Tensor = self.pipe.get_timesteps(steps, share, device)[0]
        return timesteps

    def _shift(self, size: Size) -> Mapping[str, float]:
        """What the scheduler wants to know of a size."""
        return {}

    def _noised(self, latents: torch.Tensor, timestep: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Latents [N, C, h, w] with the noise of a timestep [1], in the scheduler's scale."""
        result: torch.Tensor = self.pipe.scheduler.add_noise(latents, noise, timestep.repeat(len(latents)))
        return result

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
        """See `EditPipeline`; about ``strength * steps`` of the scheduler's ``steps`` will be taken.

        Raises:
            UsageError: there is a ``shift``, which these schedulers do not know.
        """
        if shift is not None:
            raise UsageError(
                f"the schedule of a {self.family} base has no shift",
                "take the shift out of the setting schedules; steps may stay",
            )
        whole = size or self.size
        latents = self.unpack(image_latents, whole)
        sources = [torch.Generator().manual_seed(seed) for seed in seeds]
        noise = torch.stack([torch.randn(latents.shape[1:], generator=source) for source in sources])
        timesteps = self._schedule(steps, whole, latents.device)
        return Denoising(
            latents=self.pack(self._noised(latents, timesteps[:1], noise.to(latents))),
            image_latents=image_latents,
            prompts=prompts,
            levels=(*timesteps.tolist(), 0.0),
            size=whole,
            # A scheduler counts steps and some remember predictions, so that each run has its own.
            scheduler=copy.deepcopy(self.pipe.scheduler),
            sources=sources,
        )

    def batch(self, runs: Sequence[Denoising]) -> Batch:
        """See `Stepwise`; in the scale that each scheduler wants."""
        batch = super().batch(runs)
        parts = torch.split(batch.latents, [len(run) for run in runs])
        scaled = [
            run.scheduler.scale_model_input(part, timestep)
            if hasattr(run.scheduler, "scale_model_input") else part
            for run, part, timestep in zip(runs, parts, map(_timestep, runs), strict=True)
        ]  # fmt: skip
        level = torch.cat([_timestep(run).expand(len(run)) for run in runs])
        return replace(batch, latents=torch.cat(scaled), level=level)

    def predicted(self, batch: Batch) -> torch.Tensor:
        """See `Stepwise`."""
        latents = self.unpack(batch.latents, batch.size)
        return self.pack(self.forward(latents, batch.level, batch.prompts, batch.size))

    def follow(self, run: Denoising, predicted: torch.Tensor) -> None:
        """See `Stepwise`; a step of the run's own scheduler."""
        # Schedulers that add noise on the way draw it from the same generators, one a row.
        takes = inspect.signature(run.scheduler.step).parameters
        extra = {"generator": run.sources} if "generator" in takes else {}
        # A denoiser that computes in fewer bits than the latents have must not take them away.
        same = self.unpack(predicted.to(run.latents.dtype), run.size)
        latents = self.unpack(run.latents, run.size)
        stepped = run.scheduler.step(same, _timestep(run), latents, **extra)
        clean = getattr(stepped, "pred_original_sample", None)
        run.clean = None if clean is None else self.pack(clean)
        run.latents = self.pack(stepped.prev_sample)

    def decode(self, latents: torch.Tensor, size: Size | None = None) -> torch.Tensor:
        """See `EditPipeline`."""
        vae = self.pipe.vae
        whole = self.unpack(latents, size).to(vae.dtype)
        shift, scale = self._affine(whole)
        pixels: torch.Tensor = vae.decode(whole / scale + shift, return_dict=False)[0]
        return pixels


def _timestep(run: Denoising) -> torch.Tensor:
    """The timestep of a run's next step, as its scheduler has it."""
    timesteps: torch.Tensor = run.scheduler.timesteps
    return timesteps[len(timesteps) - run.steps + run.step]
