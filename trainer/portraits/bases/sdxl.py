"""A tiny Stable Diffusion XL: U-Net with two CLIPs, pooled text and size conditioning, random weights."""

from __future__ import annotations

from pathlib import Path

from trainer.portraits.bases import parts

_WIDTHS = 16, 32
_TIME = 8


def build(folder: Path, seed: int = 0) -> Path:
    """Write the base to ``folder`` and return it."""
    import torch
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    torch.manual_seed(seed)
    tokenizers = parts.clip_tokenizer(), parts.clip_tokenizer(pad="!")
    unet = UNet2DConditionModel(
        sample_size=parts.PIXELS // 8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 32),
        norm_num_groups=8,
        layers_per_block=1,
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4),  # the numbers of heads, in spite of its name
        cross_attention_dim=sum(_WIDTHS),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=_TIME,
        projection_class_embeddings_input_dim=6 * _TIME + _WIDTHS[1],
    )
    pipe = StableDiffusionXLPipeline(
        vae=parts.vae(4, scaling=0.13025),
        text_encoder=parts.clip_text(tokenizers[0], _WIDTHS[0], projection=False),
        text_encoder_2=parts.clip_text(tokenizers[1], _WIDTHS[1], projection=True),
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
        ),
        add_watermarker=False,
    )
    return parts.save(pipe, folder)
