"""The families whose denoiser is a transformer: Qwen-Image-Edit, FLUX.1, FLUX.2 and Stable Diffusion 3.

The shapes follow the classes of diffusers 0.42; a unit test compares every one with the real module tree, and
what never gets a gradient with a real backward pass.
"""

from __future__ import annotations

import re
from types import MappingProxyType
from typing import Final

from registry.errors import UsageError, shown
from registry.families.facts import CLIP_KINDS, Config, FamilyFacts, presets, sizes

_Shapes = dict[str, tuple[int, int]]

_LISTS: Final = re.compile(r"((?:single_)?transformer_blocks\.\d+)\.(.+)")
_IMAGE: Final = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
_TEXT: Final = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")
_ATTENTION: Final = (*_IMAGE, *_TEXT)
_SECOND: Final = ("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0")
_FF: Final = ("ff.net.0.proj", "ff.net.2")
_FF_TEXT: Final = ("ff_context.net.0.proj", "ff_context.net.2")


def _blocks(name: str, count: int, kinds: dict[str, tuple[int, int]]) -> _Shapes:
    return {f"{name}.{index}.{kind}": shape for index in range(count) for kind, shape in kinds.items()}


# -- Qwen-Image-Edit --

_IMAGE_MLP: Final = ("img_mlp.net.0.proj", "img_mlp.net.2")
_TEXT_MLP: Final = ("txt_mlp.net.0.proj", "txt_mlp.net.2")


def _qwen(config: Config) -> _Shapes:
    layers, heads, head = sizes(config, "num_layers", "num_attention_heads", "attention_head_dim")
    width = heads * head
    kinds = dict.fromkeys(_ATTENTION, (width, width))
    for up, down in (_IMAGE_MLP, _TEXT_MLP):
        kinds |= {up: (4 * width, width), down: (width, 4 * width)}
    # Shift, scale and gate of both halves of a block. DiffSynth trains them by default, we do not.
    kinds |= {"img_mod.1": (6 * width, width), "txt_mod.1": (6 * width, width)}
    return _blocks("transformer_blocks", layers, kinds)


QWEN_IMAGE_EDIT: Final = FamilyFacts(
    name="qwen-image-edit",
    prefix="transformer",
    kinds=frozenset({*_ATTENTION, *_IMAGE_MLP, *_TEXT_MLP, "img_mod.1", "txt_mod.1"}),
    presets=presets(
        full=(*_ATTENTION, *_IMAGE_MLP, *_TEXT_MLP),
        attention=_ATTENTION,
        image_stream=(*_IMAGE, *_IMAGE_MLP),
    ),
    edits=True,
    prediction="velocity",
    architecture="Qwen-Image-Edit",
    pixels=512,
    shapes=_qwen,
    lists=_LISTS,
    # The text stream ends in the last block: nothing reads it any more.
    silent_in_last_block=frozenset({"attn.add_q_proj", "attn.to_add_out", *_TEXT_MLP}),
    # The text's shift and scale reach the picture through the keys and values of the last attention. Its gate
    # and the three for the text's feed-forward do not: they act on what nothing reads any more.
    silent_rows_in_last_block=MappingProxyType({"txt_mod.1": (2, 6)}),
)


# -- FLUX.1 --


def _flux(config: Config) -> _Shapes:
    layers, singles, heads, head = sizes(
        config, "num_layers", "num_single_layers", "num_attention_heads", "attention_head_dim"
    )
    width = heads * head
    double = dict.fromkeys(_ATTENTION, (width, width))
    for up, down in (_FF, _FF_TEXT):
        double |= {up: (4 * width, width), down: (width, 4 * width)}
    double |= {"norm1.linear": (6 * width, width), "norm1_context.linear": (6 * width, width)}
    single = dict.fromkeys(_IMAGE[:3], (width, width))
    single |= {"proj_mlp": (4 * width, width), "proj_out": (width, 5 * width)}
    single |= {"norm.linear": (3 * width, width)}
    return _blocks("transformer_blocks", layers, double) | _blocks(
        "single_transformer_blocks", singles, single
    )


def _flux_family(name: str, architecture: str, *, edits: bool) -> FamilyFacts:
    # Nothing is silent: the single blocks read what the last double block makes of the text. A single block
    # has one stream for both, so the "image-stream" of it is its attention, which the text passes, too.
    single = ("proj_mlp", "proj_out")
    return FamilyFacts(
        name=name,
        prefix="transformer",
        kinds=frozenset(
            {*_ATTENTION, *_FF, *_FF_TEXT, *single, "norm1.linear", "norm1_context.linear", "norm.linear"}
        ),
        presets=presets(
            full=(*_ATTENTION, *_FF, *_FF_TEXT, *single), attention=_ATTENTION, image_stream=(*_IMAGE, *_FF)
        ),
        edits=edits,
        prediction="velocity",
        architecture=architecture,
        pixels=1024,
        shapes=_flux,
        lists=_LISTS,
        text_encoders=MappingProxyType({"text_encoder": CLIP_KINDS}),
    )


FLUX: Final = _flux_family("flux", "flux-1-dev", edits=False)
FLUX_KONTEXT: Final = _flux_family("flux-kontext", "flux-1-kontext-dev", edits=True)


# -- FLUX.2 klein --

_FF2: Final = ("ff.linear_in", "ff.linear_out")
_FF2_TEXT: Final = ("ff_context.linear_in", "ff_context.linear_out")
_FUSED: Final = ("attn.to_qkv_mlp_proj", "attn.to_out")


def _flux2(config: Config) -> _Shapes:
    layers, singles, heads, head = sizes(
        config, "num_layers", "num_single_layers", "num_attention_heads", "attention_head_dim"
    )
    ratio = config.get("mlp_ratio")
    if not isinstance(ratio, int | float) or not 0 < ratio <= 16:
        raise UsageError(
            f"the transformer's config needs mlp_ratio above 0 and up to 16, not {shown(ratio)}",
            "take the values from the base model's transformer/config.json",
        )
    width = heads * head
    inner = int(width * ratio)
    double = dict.fromkeys(_ATTENTION, (width, width))
    for gated, down in (_FF2, _FF2_TEXT):
        double |= {gated: (2 * inner, width), down: (width, inner)}
    # One product makes query, key, value and the gated feed-forward; another one joins them again.
    single = {_FUSED[0]: (3 * width + 2 * inner, width), _FUSED[1]: (width, width + inner)}
    return _blocks("transformer_blocks", layers, double) | _blocks(
        "single_transformer_blocks", singles, single
    )


FLUX2_KLEIN: Final = FamilyFacts(
    name="flux2-klein",
    prefix="transformer",
    kinds=frozenset({*_ATTENTION, *_FF2, *_FF2_TEXT, *_FUSED}),
    presets=presets(
        full=(*_ATTENTION, *_FF2, *_FF2_TEXT, *_FUSED),
        attention=(*_ATTENTION, *_FUSED),
        image_stream=(*_IMAGE, *_FF2),
    ),
    edits=True,
    prediction="velocity",
    architecture="Flux.2-klein-4b",
    pixels=1024,
    shapes=_flux2,
    lists=_LISTS,
)


# -- Stable Diffusion 3 and 3.5 --


def _sd3(config: Config) -> _Shapes:
    layers, heads, head = sizes(config, "num_layers", "num_attention_heads", "attention_head_dim")
    dual = config.get("dual_attention_layers", ())
    if not isinstance(dual, list | tuple) or not all(type(at) is int and 0 <= at < layers for at in dual):
        raise UsageError(
            f"the transformer's config needs dual_attention_layers of 0 to {layers - 1}, not {shown(dual)}",
            "take the values from the base model's transformer/config.json",
        )
    width, found = heads * head, _Shapes()
    for index in range(layers):
        last = index == layers - 1
        kinds = {kind: (width, width) for kind in _ATTENTION if not (last and kind == "attn.to_add_out")}
        kinds |= {_FF[0]: (4 * width, width), _FF[1]: (width, 4 * width)}
        kinds |= {"norm1.linear": ((9 if index in dual else 6) * width, width)}
        # The last block has no text stream behind its attention; shift and scale before it are left.
        kinds |= {"norm1_context.linear": ((2 if last else 6) * width, width)}
        if not last:
            kinds |= {_FF_TEXT[0]: (4 * width, width), _FF_TEXT[1]: (width, 4 * width)}
        if index in dual:
            kinds |= dict.fromkeys(_SECOND, (width, width))
        found |= {f"transformer_blocks.{index}.{kind}": shape for kind, shape in kinds.items()}
    return found


SD3: Final = FamilyFacts(
    name="sd3",
    prefix="transformer",
    kinds=frozenset({*_ATTENTION, *_SECOND, *_FF, *_FF_TEXT, "norm1.linear", "norm1_context.linear"}),
    presets=presets(
        full=(*_ATTENTION, *_SECOND, *_FF, *_FF_TEXT),
        attention=(*_ATTENTION, *_SECOND),
        image_stream=(*_IMAGE, *_SECOND, *_FF),
    ),
    edits=False,
    prediction="velocity",
    architecture="stable-diffusion-3",
    pixels=1024,
    shapes=_sd3,
    lists=_LISTS,
    text_encoders=MappingProxyType({"text_encoder": CLIP_KINDS, "text_encoder_2": CLIP_KINDS}),
    # The last block drops what its attention makes of the text, and with it the text's queries.
    silent_in_last_block=frozenset({"attn.add_q_proj"}),
)
