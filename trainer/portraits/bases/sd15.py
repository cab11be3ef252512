"""A tiny Stable Diffusion 1.5: U-Net with one CLIP, epsilon prediction, PNDM scheduler, random weights."""

from __future__ import annotations

from pathlib import Path

from trainer.portraits.bases import parts


def build(folder: Path, seed: int = 0, prediction: str = "epsilon") -> Path:
    """Write the base to ``folder`` and return it.

    Args:
        prediction: "epsilon" as published, or "v_prediction" as in the 768-pixel models of version 2.
    """
    import torch
    from diffusers import PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    torch.manual_seed(seed)
    tokenizer = parts.clip_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=parts.PIXELS // 8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(16, 32),
        norm_num_groups=8,
        layers_per_block=1,
        attention_head_dim=2,  # the number of heads, in spite of its name
        cross_attention_dim=32,
    )
    pipe = StableDiffusionPipeline(
        vae=parts.vae(4, scaling=0.18215),
        text_encoder=parts.clip_text(tokenizer, 32, projection=False),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=PNDMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            skip_prk_steps=True,
            steps_offset=1,
            prediction_type=prediction,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return parts.save(pipe, folder)
