"""The base models that adapters may be made for: their licences and what decides their shapes.

The configs hold the values of the published config.json files that decide shapes, and no others.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from registry.families.facts import BaseFacts

_CLIP_L: Final = MappingProxyType({"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12})
_CLIP_G: Final = MappingProxyType({"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32})
_BOTH: Final = MappingProxyType({"text_encoder": _CLIP_L, "text_encoder_2": _CLIP_G})


def _portraits(name: str, layers: int, heads: int, head: int) -> BaseFacts:
    return BaseFacts(
        id=f"adapter-foundry/portraits-{name}",
        family="qwen-image-edit",
        license="Apache-2.0",
        revision="1",
        config={"num_layers": layers, "num_attention_heads": heads, "attention_head_dim": head},
    )


def _flux(name: str, family: str) -> BaseFacts:
    return BaseFacts(
        id=f"black-forest-labs/{name}",
        family=family,
        license="LicenseRef-FLUX-1-dev-Non-Commercial",
        revision="main",
        config={
            "num_layers": 19, "num_single_layers": 38, "num_attention_heads": 24, "attention_head_dim": 128,
        },
        text_encoders={"text_encoder": _CLIP_L},
    )  # fmt: skip


def _sd35(size: str, layers: int, heads: int, dual: int) -> BaseFacts:
    return BaseFacts(
        id=f"stabilityai/stable-diffusion-3.5-{size}",
        family="sd3",
        license="LicenseRef-Stability-AI-Community",
        revision="main",
        config={
            "num_layers": layers, "num_attention_heads": heads, "attention_head_dim": 64,
            "dual_attention_layers": list(range(dual)),
        },
        text_encoders=_BOTH,
    )  # fmt: skip


KNOWN_BASES: Final[Mapping[str, BaseFacts]] = MappingProxyType(
    {
        facts.id: facts
        for facts in (
            BaseFacts(
                id="Qwen/Qwen-Image-Edit-2511",
                family="qwen-image-edit",
                license="Apache-2.0",
                revision="main",
                config={"num_layers": 60, "num_attention_heads": 24, "attention_head_dim": 128},
            ),
            _portraits("base", 6, 4, 32),
            # The bases of the scanner's zoo; `trainer.zoo.bases` makes them.
            _portraits("small-1", 3, 2, 32),
            _portraits("small-2", 2, 4, 16),
            _portraits("small-3", 2, 2, 32),
            _flux("FLUX.1-dev", "flux"),
            _flux("FLUX.1-Kontext-dev", "flux-kontext"),
            BaseFacts(
                id="black-forest-labs/FLUX.2-klein-4B",
                family="flux2-klein",
                license="Apache-2.0",
                revision="main",
                config={
                    "num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24,
                    "attention_head_dim": 128, "mlp_ratio": 3.0,
                },
            ),
            _sd35("medium", 24, 24, 13),
            _sd35("large", 38, 38, 0),
            BaseFacts(
                id="stabilityai/stable-diffusion-xl-base-1.0",
                family="sdxl",
                license="LicenseRef-CreativeML-OpenRAIL-PlusPlus-M",
                revision="main",
                config={
                    "block_out_channels": [320, 640, 1280], "layers_per_block": 2,
                    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
                    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
                    "transformer_layers_per_block": [1, 2, 10], "cross_attention_dim": 2048,
                    "use_linear_projection": True,
                },
                text_encoders=_BOTH,
            ),
            BaseFacts(
                id="stable-diffusion-v1-5/stable-diffusion-v1-5",
                family="sd15",
                license="LicenseRef-CreativeML-OpenRAIL-M",
                revision="main",
                config={
                    "block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2,
                    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
                    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
                    "cross_attention_dim": 768,
                },
                text_encoders={"text_encoder": _CLIP_L},
            ),
        )
    }
)  # fmt: skip
