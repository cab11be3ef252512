"""Small bases of every family: configs that the real classes take, and adapters for them made with numpy."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from fakes.adapters import Factors, card, container, factors
from registry.families import FAMILIES, BaseFacts

_FLUX = {"num_layers": 2, "num_single_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}
_UNET = {
    "block_out_channels": [16, 32],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "cross_attention_dim": 24,
    "attention_head_dim": [2, 4],
    "norm_num_groups": 8,
}
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "qwen-image-edit": {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16},
    "flux": _FLUX,
    "flux-kontext": _FLUX,
    "flux2-klein": {**_FLUX, "mlp_ratio": 3.0},
    "sd3": {
        "num_layers": 3,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "dual_attention_layers": [0, 1],
    },
    "sdxl": {**_UNET, "transformer_layers_per_block": [1, 2], "use_linear_projection": True},
    "sd15": _UNET,
}
"""Family -> values of a small config.json; nothing about it is special but its size."""

CLIP = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
"""The same of a text encoder."""

SMALL: Mapping[str, BaseFacts] = {
    name: BaseFacts(
        id=f"tests/{name}",
        family=name,
        license="Apache-2.0",
        revision="1",
        config=CONFIGS[name],
        text_encoders=dict.fromkeys(facts.text_encoders, CLIP),
    )
    for name, facts in FAMILIES.items()
}
"""Family -> a small base of it."""

BY_ID: Mapping[str, BaseFacts] = {base.id: base for base in SMALL.values()}
"""For ``Policy(bases=...)`` and ``scan(..., bases=...)``."""


def denoiser(name: str) -> tuple[str, ...]:
    """The kinds of a family's preset "full"."""
    return tuple(sorted(FAMILIES[name].presets["full"]))


def with_text(name: str) -> tuple[str, ...]:
    """These and all kinds of its text encoders."""
    facts = FAMILIES[name]
    return tuple(sorted({*facts.presets["full"], *facts.all_kinds - facts.kinds}))


def trained(name: str, kinds: Collection[str] | None = None) -> Factors:
    """A plausible trained adapter of a family."""
    return factors(SMALL[name], kinds=denoiser(name) if kinds is None else kinds)


def folder_of(
    name: str, values: Factors | None = None, kinds: Collection[str] | None = None
) -> tuple[bytes, dict[str, Any]]:
    """The weights and the card of an adapter of a family."""
    targets = denoiser(name) if kinds is None else kinds
    made = trained(name, targets) if values is None else values
    return container(made), card(SMALL[name], targets=sorted(targets))
