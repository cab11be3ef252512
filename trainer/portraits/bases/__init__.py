"""Tiny bases of every family: the real classes of diffusers and transformers with random weights.

They load through the code that loads the published weights, so training, export, serving and the scanner can
be tested on each architecture in seconds and without a network. None of them draws anything sensible; the one
that does is `trainer.portraits.base`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final, cast

# Family -> "module:function", as text: naming a family must not import torch.
BUILDERS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "qwen-image-edit": "trainer.portraits.base:build",
        "flux": "trainer.portraits.bases.flux:build",
        "flux-kontext": "trainer.portraits.bases.flux_kontext:build",
        "flux2-klein": "trainer.portraits.bases.flux2_klein:build",
        "sd3": "trainer.portraits.bases.sd3:build",
        "sdxl": "trainer.portraits.bases.sdxl:build",
        "sd15": "trainer.portraits.bases.sd15:build",
    }
)


def build(family: str, folder: Path) -> Path:
    """Write the tiny base of ``family`` to ``folder`` in diffusers layout, the same bytes every time.

    Raises:
        KeyError: there is no tiny base of the family.
    """
    module, function = BUILDERS[family].split(":")
    return cast(Path, getattr(importlib.import_module(module), function)(folder))
