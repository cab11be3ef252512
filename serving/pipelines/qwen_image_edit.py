"""Qwen-Image-Edit (the Plus pipeline of 2509 and 2511), of any size, through diffusers' own classes.

`QwenImageEditPlusPipeline.__call__` edits one prompt at a time at a fixed megapixel; training and sweeps need
batches at the size that the base was made for. This file therefore calls the pipeline's parts in the same
order with the same arithmetic. A folder may hold `resolution.json` with ``{"pixels": side,
"condition_pixels": side}``; the published weights have none and get `DEFAULT_PIXELS`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from PIL import Image

from serving.pipelines.base import PromptEmbeds, Size, pixels_of
from serving.pipelines.denoising import Batch
from serving.pipelines.flow import FlowPipeline

if TYPE_CHECKING:
    from diffusers import QwenImageEditPlusPipeline

FAMILY = "qwen-image-edit"
DEFAULT_PIXELS = 512  # PixelSmile trains at 512 x 512
DEFAULT_CONDITION_PIXELS = 384
IMAGE_PROMPT = "Picture 1: <|vision_start|><|image_pad|><|vision_end|>"


def _processor(folder: str, revision: str | None, subfolder: str = "processor") -> Any:
    """The vision-language processor; without torchvision, one that has no video part."""
    from transformers import Qwen2Tokenizer, Qwen2VLProcessor

    if importlib.util.find_spec("torchvision") is not None:
        return Qwen2VLProcessor.from_pretrained(folder, revision=revision, subfolder=subfolder)
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = Qwen2Tokenizer.from_pretrained(folder, revision=revision, subfolder="tokenizer")
    images = Qwen2VLImageProcessorPil.from_pretrained(folder, revision=revision, subfolder=subfolder)
    return image_only_processor(images, tokenizer)


def image_only_processor(image_processor: Any, tokenizer: Any) -> Any:
    """A `Qwen2VLProcessor` for text and images; the full class insists on a video part and on torchvision."""
    from transformers import Qwen2VLProcessor

    class ImageOnlyProcessor(Qwen2VLProcessor):  # type: ignore[misc]  # transformers is untyped
        @classmethod
        def get_attributes(cls) -> list[str]:
            return ["image_processor", "tokenizer"]

        def __init__(self, image_processor: Any, tokenizer: Any):
            self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
            self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids(
                [self.image_token, self.video_token]
            )
            super(Qwen2VLProcessor, self).__init__(image_processor, tokenizer)

    return ImageOnlyProcessor(image_processor, tokenizer)


def single_frame(vae: Any) -> None:
    """Let the video VAE's causal convolutions see one frame as a picture.

    Before the first frame they pad with zeros, so only the last temporal slice of a kernel meets data: a 2D
    convolution gives the same numbers for a third of the work.
    """
    from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d

    def bind(conv: Any) -> Any:
        whole, (left, _, top, *_rest) = conv.forward, conv._padding

        def forward(x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
            if x.shape[2] != 1 or cache_x is not None:
                video: torch.Tensor = whole(x, cache_x)
                return video
            flat = torch.nn.functional.conv2d(
                x[:, :, 0], conv.weight[:, :, -1], conv.bias, conv.stride[1:], (top, left)
            )
            return flat.unsqueeze(2)

        return forward

    for module in vae.modules():
        if isinstance(module, QwenImageCausalConv3d):
            module.forward = bind(module)


class QwenImageEdit(FlowPipeline):
    """`EditPipeline` on a loaded `QwenImageEditPlusPipeline`; its own size is a square of `pixels` a side."""

    family = FAMILY
    sees_image = True
    diffusers_class = "QwenImageEditPlusPipeline"
    default_pixels = DEFAULT_PIXELS

    def __init__(self, pipe: QwenImageEditPlusPipeline, pixels: int, condition_pixels: int):
        super().__init__(pipe, pixels)
        self.pixels, self.condition_pixels = pixels, condition_pixels
        single_frame(pipe.vae)
        vae = pipe.vae.config
        self._mean = torch.tensor(vae.latents_mean).view(1, -1, 1, 1, 1)
        self._std = torch.tensor(vae.latents_std).view(1, -1, 1, 1, 1)

    @classmethod
    def of(cls, pipe: Any, sizes: Mapping[str, int]) -> Self:
        """See `Loadable`."""
        condition = sizes.get("condition_pixels", DEFAULT_CONDITION_PIXELS)
        return cls(pipe, sizes.get("pixels", DEFAULT_PIXELS), condition)

    @classmethod
    def components(cls, source: str, revision: str | None) -> Mapping[str, Any]:
        """See `Loadable`."""
        return {"processor": _processor(source, revision)}

    @property
    def device(self) -> torch.device:
        return next(self.transformer.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        weights: torch.Tensor = next(self.pipe.vae.parameters())
        return weights.dtype

    @torch.no_grad()
    def encode_prompts(
        self, images: Sequence[Image.Image], prompts: Sequence[str], size: Size | None = None
    ) -> PromptEmbeds:
        """See `EditPipeline`; the template's system part is dropped as the pipeline does."""
        pipe = self.pipe
        height, width = self.condition_size(size or self.size)
        texts = [pipe.prompt_template_encode.format(IMAGE_PROMPT + prompt) for prompt in prompts]
        inputs = pipe.processor(
            text=texts,
            images=[image.resize((width, height), Image.Resampling.LANCZOS) for image in images],
            padding=True,
            return_tensors="pt",
        ).to(pipe.text_encoder.device)
        hidden = pipe.text_encoder.model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            pixel_values=inputs["pixel_values"],
            image_grid_thw=inputs["image_grid_thw"],
        ).last_hidden_state
        rows = [
            row[real.bool()][pipe.prompt_template_encode_start_idx :]
            for row, real in zip(hidden, inputs["attention_mask"], strict=True)
        ]
        embeds = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows], device=embeds.device)
        mask = torch.arange(embeds.shape[1], device=embeds.device) < lengths[:, None]
        return PromptEmbeds(embeds=embeds, mask=mask)

    def condition_size(self, size: Size) -> Size:
        """Size at which the text encoder sees a picture of ``size``: of one area, with the same aspect."""
        if size[0] == size[1]:
            return self.condition_pixels, self.condition_pixels
        vision = self.pipe.processor.image_processor
        unit = vision.patch_size * vision.merge_size
        root = (size[0] / size[1]) ** 0.5
        height, width = (
            max(unit, round(self.condition_pixels * part / unit) * unit) for part in (root, 1 / root)
        )
        return height, width

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image], size: Size | None = None) -> torch.Tensor:
        """See `EditPipeline`; the VAE's mean (argmax) as in the pipeline's control latents."""
        pixels = pixels_of(images, size or self.size).to(self.pipe.vae.device, self.dtype)
        latents = self.pipe.vae.encode(pixels.unsqueeze(2)).latent_dist.mode()
        return self.pack((latents - self._mean.to(latents)) / self._std.to(latents))

    def pack(self, latents: torch.Tensor) -> torch.Tensor:
        """[N, z, 1, h, w] -> [N, h/2 * w/2, 4 z]."""
        n, channels, _, height, width = latents.shape
        packed: torch.Tensor = self.pipe._pack_latents(latents, n, channels, height, width)
        return packed

    def predict(
        self,
        latents: torch.Tensor,
        image_latents: torch.Tensor,
        prompts: PromptEmbeds,
        level: torch.Tensor,
        size: Size | None = None,
    ) -> torch.Tensor:
        """See `EditPipeline`."""
        height, width = size or self.size
        grid = (1, height // self.multiple, width // self.multiple)
        mask = None if bool(prompts.mask.all()) else prompts.mask
        predicted: torch.Tensor = self.transformer(
            hidden_states=torch.cat([latents, image_latents], 1),
            timestep=level,
            encoder_hidden_states=prompts.embeds,
            encoder_hidden_states_mask=mask,
            img_shapes=[[grid, grid]] * len(latents),
            return_dict=False,
        )[0]
        return predicted[:, : latents.shape[1]]

    def latent_noise(self, seed: int, size: Size) -> torch.Tensor:
        """Packed noise [1, T, C] of one seed."""
        tokens = (size[0] // self.multiple) * (size[1] // self.multiple)
        shape = (1, tokens, 4 * self.pipe.vae.config.z_dim)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    def schedule(self, steps: int, size: Size) -> list[float]:
        """See `FlowPipeline`; larger pictures stay noisy longer."""
        from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_shift

        config = self.pipe.scheduler.config
        mu = calculate_shift(
            (size[0] // self.multiple) * (size[1] // self.multiple),
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )
        return self.levels(steps, mu)

    def predicted(self, batch: Batch) -> torch.Tensor:
        """See `Stepwise`; no classifier-free guidance."""
        return self.predict(batch.latents, batch.image_latents, batch.prompts, batch.level, batch.size)

    def decode(self, latents: torch.Tensor, size: Size | None = None) -> torch.Tensor:
        """See `EditPipeline`."""
        pipe = self.pipe
        unpacked = pipe._unpack_latents(latents.to(self.dtype), *(size or self.size), pipe.vae_scale_factor)
        scaled = unpacked * self._std.to(unpacked) + self._mean.to(unpacked)
        frames: torch.Tensor = pipe.vae.decode(scaled, return_dict=False)[0]
        return frames[:, :, 0]
