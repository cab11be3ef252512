"""The published Qwen-Image-Edit denoiser with random weights, made where it computes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from serving.pipelines.qwen_image_edit import QwenImageEdit
from trainer.portraits import base as portraits


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of the model and of its pictures."""

    layers: int
    heads: int
    head: int
    text: int
    pixels: int
    condition: int
    pairs: int
    rank: int


FULL = Size(layers=60, heads=24, head=128, text=3584, pixels=512, condition=384, pairs=4, rank=64)
SMALL = Size(layers=2, heads=2, head=32, text=128, pixels=64, condition=28, pairs=2, rank=8)


def random_base(size: Size, device: str, dtype: torch.dtype, folder: Path) -> QwenImageEdit:
    """Return the pipeline; what the cache of a training is named after is written to ``folder``."""
    from diffusers import AutoencoderKLQwenImage, QwenImageEditPlusPipeline, QwenImageTransformer2DModel

    template = QwenImageEditPlusPipeline(**dict.fromkeys(portraits.PARTS)).prompt_template_encode
    tokenizer = portraits.build_tokenizer(template)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            side = size.head * 3 // 8
            transformer = QwenImageTransformer2DModel(
                patch_size=2, in_channels=64, out_channels=16, num_layers=size.layers,
                attention_head_dim=size.head, num_attention_heads=size.heads, zero_cond_t=True,
                joint_attention_dim=size.text, axes_dims_rope=(size.head - 2 * side, side, side),
            )  # fmt: skip
            vae = AutoencoderKLQwenImage() if size is FULL else portraits.build_vae()
    finally:
        torch.set_default_dtype(before)
    text_encoder = portraits.build_text_encoder(tokenizer, size.text).to(device, dtype)
    parts = {"vae": vae, "transformer": transformer, "tokenizer": tokenizer, "text_encoder": text_encoder}
    pipe = portraits.assemble(parts)
    vision = pipe.processor.image_processor
    vision.size = {"shortest_edge": size.condition**2, "longest_edge": size.condition**2}
    for name in ("vae", "tokenizer"):
        parts[name].save_pretrained(folder / name)
    return QwenImageEdit(pipe, size.pixels, size.condition)
