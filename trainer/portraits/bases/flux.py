"""A tiny FLUX.1-dev: text-to-image with a guidance embedding, CLIP and T5, at 64 x 64 pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer.portraits.bases import parts

_WIDTH = 32


def assemble(pipeline: Any, seed: int) -> Any:
    """A pipeline of the class ``pipeline`` with random parts of FLUX.1's layout."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

    torch.manual_seed(seed)
    clip, t5 = parts.clip_tokenizer(), parts.t5_tokenizer()
    return pipeline(
        # The published schedule's values, see FLUX.1-dev's scheduler_config.json.
        scheduler=FlowMatchEulerDiscreteScheduler(
            num_train_timesteps=1000, shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15
        ),
        vae=parts.vae(16, scaling=0.3611, shift=0.1159, quant_conv=False),
        text_encoder=parts.clip_text(clip, _WIDTH, projection=False),
        tokenizer=clip,
        text_encoder_2=parts.t5(t5, _WIDTH),
        tokenizer_2=t5,
        transformer=FluxTransformer2DModel(
            in_channels=64,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=_WIDTH,
            pooled_projection_dim=_WIDTH,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        ).eval(),
    )


def build(folder: Path, seed: int = 0) -> Path:
    """Write the base."""
    from diffusers import FluxPipeline

    pipe = assemble(FluxPipeline, seed)
    return parts.save(pipe, folder, prompt_tokens=parts.PROMPT_TOKENS)
