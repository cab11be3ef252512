"""A tiny Stable Diffusion 3.5: MMDiT with two CLIPs and T5, dual attention in its first block."""

from __future__ import annotations

from pathlib import Path

from trainer.portraits.bases import parts

_CLIP = 16, 32
_T5 = 48


def build(folder: Path, seed: int = 0, with_t5: bool = True) -> Path:
    """Write the base to ``folder`` and return it; without T5, its entries in model_index.json are null."""
    import torch
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    torch.manual_seed(seed)
    tokenizers = parts.clip_tokenizer(), parts.clip_tokenizer(pad="!")
    t5_tokenizer = parts.t5_tokenizer() if with_t5 else None
    transformer = SD3Transformer2DModel(
        sample_size=parts.PIXELS // 8,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=_T5,
        caption_projection_dim=32,
        pooled_projection_dim=sum(_CLIP),
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        vae=parts.vae(16, scaling=1.5305, shift=0.0609, quant_conv=False),
        text_encoder=parts.clip_text(tokenizers[0], _CLIP[0], projection=True),
        text_encoder_2=parts.clip_text(tokenizers[1], _CLIP[1], projection=True),
        text_encoder_3=parts.t5(t5_tokenizer, _T5) if t5_tokenizer is not None else None,
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        tokenizer_3=t5_tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0),
    )
    return parts.save(pipe, folder)
