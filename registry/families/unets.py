"""The families whose denoiser is a U-Net: Stable Diffusion 1.5 and SDXL.

Only linear layers are targets; Stable Diffusion 1.5 projects into and out of its transformers with
convolutions, which are none. Time embeddings and the residual blocks' are left alone, too.
"""

from __future__ import annotations

import re
from types import MappingProxyType
from typing import Any, Final

from registry.errors import UsageError, shown
from registry.families.facts import CLIP_KINDS, Config, FamilyFacts, presets, sizes

_LISTS: Final = re.compile(
    r"((?:down_blocks\.\d+|mid_block|up_blocks\.\d+)\.attentions\.\d+(?:\.transformer_blocks\.\d+)?)\.(.+)"
)
_SELF: Final = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0")
_CROSS: Final = ("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0")
_FF: Final = ("ff.net.0.proj", "ff.net.2")
_PROJECTIONS: Final = ("proj_in", "proj_out")
_PRESETS: Final = presets(full=(*_SELF, *_CROSS, *_FF), attention=(*_SELF, *_CROSS), cross_attention=_CROSS)
_MAX_BLOCKS: Final = 16


def _shapes(config: Config) -> dict[str, tuple[int, int]]:
    text, layers = sizes(config, "cross_attention_dim", "layers_per_block", limit=1 << 16, where="unet")
    widths = _row(config, "block_out_channels", int)
    downs, ups = _row(config, "down_block_types", str), _row(config, "up_block_types", str)
    depth = config.get("transformer_layers_per_block", 1)
    depths = [depth] * len(widths) if type(depth) is int else depth
    depths = _row({"transformer_layers_per_block": depths}, "transformer_layers_per_block", int)
    if not len(widths) == len(downs) == len(ups) == len(depths):
        raise UsageError(
            "the unet's config has lists of blocks of several lengths",
            "take the values from the base model's unet/config.json",
        )
    linear = config.get("use_linear_projection") is True
    found: dict[str, tuple[int, int]] = {}
    for at, (kind, width, depth) in enumerate(zip(downs, widths, depths, strict=True)):
        if kind.startswith("CrossAttn"):
            for index in range(layers):
                found |= _attention(f"down_blocks.{at}.attentions.{index}", width, text, depth, linear)
    found |= _attention("mid_block.attentions.0", widths[-1], text, depths[-1], linear)
    for at, (kind, width, depth) in enumerate(zip(ups, widths[::-1], depths[::-1], strict=True)):
        if kind.startswith("CrossAttn"):
            for index in range(layers + 1):
                found |= _attention(f"up_blocks.{at}.attentions.{index}", width, text, depth, linear)
    return found


def _attention(name: str, width: int, text: int, depth: int, linear: bool) -> dict[str, tuple[int, int]]:
    """The modules of one transformer of a U-Net: ``depth`` blocks between two projections."""
    found = dict.fromkeys((f"{name}.{kind}" for kind in _PROJECTIONS), (width, width)) if linear else {}
    kinds = dict.fromkeys((*_SELF, *_CROSS), (width, width))
    kinds |= {"attn2.to_k": (width, text), "attn2.to_v": (width, text)}
    kinds |= {_FF[0]: (8 * width, width), _FF[1]: (width, 4 * width)}  # gated: twice four times the width
    for index in range(depth):
        found |= {f"{name}.transformer_blocks.{index}.{kind}": shape for kind, shape in kinds.items()}
    return found


def _row(config: Config, key: str, kind: type) -> list[Any]:
    values: Any = config.get(key)
    if (
        not isinstance(values, list | tuple)
        or not 1 <= len(values) <= _MAX_BLOCKS
        or not all(type(value) is kind for value in values)
        or (kind is int and not all(1 <= value <= 1 << 16 for value in values))
    ):
        raise UsageError(
            f"the unet's config needs {key} with one value a block, not {shown(values)}",
            "take the values from the base model's unet/config.json",
        )
    return list(values)


# A latent is 8 pixels wide and a token 2 latents; the U-Nets halve their latents two or three times more.
SDXL: Final = FamilyFacts(
    name="sdxl",
    prefix="unet",
    kinds=frozenset({*_SELF, *_CROSS, *_FF, *_PROJECTIONS}),
    presets=_PRESETS,
    edits=False,
    prediction="epsilon",
    architecture="stable-diffusion-xl-v1-base",
    pixels=1024,
    multiple=32,
    shapes=_shapes,
    lists=_LISTS,
    text_encoders=MappingProxyType({"text_encoder": CLIP_KINDS, "text_encoder_2": CLIP_KINDS}),
    # The first encoder is read before its last layer, and its pooled vector not at all.
    silent_last_layers=frozenset({"text_encoder"}),
)

SD15: Final = FamilyFacts(
    name="sd15",
    prefix="unet",
    kinds=frozenset({*_SELF, *_CROSS, *_FF}),
    presets=_PRESETS,
    edits=False,
    prediction="epsilon",
    architecture="stable-diffusion-v1",
    pixels=512,
    multiple=64,
    shapes=_shapes,
    lists=_LISTS,
    text_encoders=MappingProxyType({"text_encoder": CLIP_KINDS}),
)
