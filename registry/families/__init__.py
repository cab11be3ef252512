"""Facts about base-model families: what a LoRA may touch, with which shapes, under which licence.

A family is an architecture; a base is one model of it. Shapes come from the values of the denoiser's
``config.json``, so that the model with sixty blocks and the tiny portrait model are checked by the same code.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from registry.errors import UsageError, shown
from registry.families.bases import KNOWN_BASES
from registry.families.facts import BaseFacts, BaseSpec, Config, FamilyFacts, clip_shapes
from registry.families.transformers import FLUX, FLUX2_KLEIN, FLUX_KONTEXT, QWEN_IMAGE_EDIT, SD3
from registry.families.unets import SD15, SDXL

__all__ = [
    "FAMILIES",
    "KNOWN_BASES",
    "QWEN_IMAGE_EDIT",
    "BaseFacts",
    "BaseSpec",
    "FamilyFacts",
    "base_spec",
    "family",
]

FAMILIES: Final[Mapping[str, FamilyFacts]] = MappingProxyType(
    {facts.name: facts for facts in (QWEN_IMAGE_EDIT, FLUX, FLUX_KONTEXT, FLUX2_KLEIN, SD3, SDXL, SD15)}
)


def family(name: str) -> FamilyFacts:
    """Return the facts of a family.

    Raises:
        UsageError: there is no such family.
    """
    if name not in FAMILIES:
        raise UsageError(f"the family {shown(name)!r} is not known", "known families: " + ", ".join(FAMILIES))
    return FAMILIES[name]


def base_spec(
    family_name: str, config: Config, text_encoders: Mapping[str, Config] | None = None
) -> BaseSpec:
    """Return module name -> (out, in) for every module of a base that a LoRA may change.

    Args:
        family_name: a name in FAMILIES.
        config: the values of the denoiser's config.json; those that decide shapes are read.
        text_encoders: part of the pipeline -> the values of its config.json. The modules of these parts are
            named with the part in front; parts that the family does not train are left out.

    Raises:
        UsageError: the family is not known, or a value is missing or out of range.
    """
    found = family(family_name)
    spec = found.shapes(config)
    for part, values in (text_encoders or {}).items():
        if part in found.text_encoders:
            spec |= clip_shapes(part, values)
    return MappingProxyType(spec)
