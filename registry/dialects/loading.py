"""What the loaders make of a LoRA file: which modules they change, and how strongly.

`reading` says what a file means. A loader that gets the same file may do something else without a word: it
multiplies two alphas, drops modules, or takes defaults for a configuration that it has not understood. This
follows what the pinned versions do, step by step: diffusers 0.42 (`QwenImageLoraLoaderMixin.lora_state_dict`
in ``loaders/lora_pipeline.py``, ``_convert_non_diffusers_qwen_lora_to_diffusers`` in
``loaders/lora_conversion_utils.py``, `load_lora_adapter` in ``loaders/peft.py``) and, for PEFT's own layout,
PEFT 0.21 (`PeftModel.from_pretrained`). ``tests/contract/test_loader_truth.py`` holds it to what they inject.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from registry.dialects import strength
from registry.dialects.grammar import (
    COMFYUI,
    DENOISER,
    DIFFSYNTH,
    DIFFUSERS,
    KOHYA,
    OLD_DIFFUSERS,
    PEFT,
    PIXELSMILE,
    RENAMED_KINDS,
    DialectError,
)
from registry.dialects.reading import LoraFile
from registry.families import FAMILIES, QWEN_IMAGE_EDIT

_CONVERTED: Final = (KOHYA.prefix, COMFYUI.prefix, DIFFSYNTH.prefix)
"""What stands before modules in the files that diffusers' conversion ends with the right names of."""

_PEFT_DEFAULT: Final = 8
"""Rank and alpha of a `LoraConfig` that is told neither."""

_NAME = re.compile(r"[A-Za-z0-9_.]{1,200}", re.ASCII)
_KNOWN_LIBRARY = re.compile(r"(diffusers|transformers|peft)(\.[a-z0-9_]+)*", re.ASCII)


@dataclass(frozen=True, kw_only=True, slots=True)
class Applied:
    """What a loader does with a file.

    Attributes:
        loader: whose.
        scales: module -> the factor of its B @ A; empty when the loader refuses the file or finds nothing of
            it to inject.
        whole: whether all modules of the file are among them.
        why: why they are not; empty otherwise.
    """

    loader: Literal["diffusers", "PEFT"]
    scales: Mapping[str, float]
    whole: bool = True
    why: str = ""


def applied(lora: LoraFile, config: bytes | None = None) -> Applied:
    """Return what the loader of its dialect makes of a LoRA file.

    Args:
        lora: what `reading.read` understood of it.
        config: the ``adapter_config.json`` beside it, if there is one.

    Raises:
        DialectError: a configuration asks the loader for what could hang it, import a module that the file
            names, or change more than the layers of this file.
        InvalidDocument: a configuration cannot be read.
    """
    if lora.dialect == PEFT.dialect:
        return _by_peft(lora, config)
    reason = _unread(lora)
    if reason:
        return Applied(loader="diffusers", scales={}, whole=False, why=reason)
    if lora.dialect == PIXELSMILE:
        return _in_part(lora)
    part = _part(lora)
    factors = [update.factors for update in lora.updates]
    scales = {item.module: lora.alphas.get(item.module, item.rank) / item.rank for item in factors}
    if strength.HEADER_CONFIG in lora.metadata:
        values = strength.header_config(lora.metadata)
        where = f"the header's {strength.HEADER_CONFIG}"
        _check_plain(values, where, part)
        kept = {name.removeprefix(part): value for name, value in values.items() if name.startswith(part)}
        kept = {"r": _PEFT_DEFAULT, "lora_alpha": _PEFT_DEFAULT} | kept
        for module, scale in strength.configured(kept, where, factors).items():
            scales[module] *= scale
    return Applied(loader="diffusers", scales=scales)


def is_stabilised(lora: LoraFile, config: bytes | None = None) -> bool:
    """Return whether the file's configuration asks for rank-stabilised LoRA, alpha / sqrt(rank); raises as
    `applied`."""
    values: Mapping[str, Any] = {}
    if strength.HEADER_CONFIG in lora.metadata:
        values = strength.header_config(lora.metadata)
    elif lora.dialect == PEFT.dialect and config is not None:
        values = strength.config_values(config, strength.CONFIG_NAME)
    return values.get("use_rslora", values.get(_part(lora) + "use_rslora")) is True


def _part(lora: LoraFile) -> str:
    """The name of the denoiser in the pipeline, with a dot."""
    return FAMILIES[lora.base.family].prefix + "."


def _unread(lora: LoraFile) -> str:
    """Return why diffusers injects nothing of a file; empty if it does."""
    spellings = lora.spellings
    prefix = next(iter(spellings)).prefix
    default = any(spelling.a.endswith(".default.weight") for spelling in spellings)
    converts = bool(lora.alphas) or default or prefix in (KOHYA.prefix, COMFYUI.prefix)
    if lora.base.family != QWEN_IMAGE_EDIT.name and (converts or spellings != {DIFFUSERS}):
        return f"what it makes of this layout for the family {lora.base.family} is not known here"
    if prefix not in (DENOISER, *_CONVERTED):
        return "it knows no such prefix"
    if converts:
        return "" if prefix in _CONVERTED else f"it refuses alpha or an adapter's name behind {DENOISER!r}"
    if prefix != DENOISER:
        return "it takes keys without a prefix only with alpha or an adapter's name in them"
    known = spellings <= {DIFFUSERS, OLD_DIFFUSERS}
    return "" if known else "it does not know these names of the factors"


def _in_part(lora: LoraFile) -> Applied:
    """PixelSmile's release: the first key of the file decides how all keys are read."""
    ends = tuple("." + kind for kind in RENAMED_KINDS)
    modules = [update.factors.module for update in lora.updates]
    first = min(lora.updates, key=lambda update: min(update.factors.a.start, update.factors.b.start)).factors
    # With "lora_A" in its name nothing is converted; otherwise the keys of the old spelling are.
    whole = first.module.endswith(ends) or first.b.start < first.a.start
    kept = [module for module in modules if whole or not module.endswith(ends)]
    lost = f"drops the image stream's attention ({len(modules) - len(kept)} modules) and "
    return Applied(
        loader="diffusers",
        scales=dict.fromkeys(kept, 1.0),
        whole=whole,
        why=f"it {'' if whole else lost}applies B @ A at alpha = rank, half of the training's strength",
    )


def _by_peft(lora: LoraFile, config: bytes | None) -> Applied:
    if config is None:
        why = f"it needs {strength.CONFIG_NAME} beside the file"
        return Applied(loader="PEFT", scales={}, whole=False, why=why)
    values = strength.config_values(config, strength.CONFIG_NAME)
    _check_plain(values, strength.CONFIG_NAME)
    # PEFT makes layers for its targets, whether the file has them or not: they must start at zero.
    if values.get("init_lora_weights", True) not in (True, "gaussian"):
        raise DialectError(
            f"{strength.CONFIG_NAME} lets layers that the file lacks start with random updates"
        )
    factors = [update.factors for update in lora.updates]
    scales = strength.configured(values, strength.CONFIG_NAME, factors)
    targets = values.get("target_modules")
    names = targets if isinstance(targets, list) else []
    ends = tuple("." + name for name in names)
    dropped = [item.module for item in factors if item.module not in names and not item.module.endswith(ends)]
    if dropped and targets != "all-linear":
        raise DialectError(
            f"{strength.CONFIG_NAME} has other targets, so that PEFT drops these", keys=dropped
        )
    return Applied(loader="PEFT", scales=scales)


def _check_plain(values: Mapping[str, Any], where: str, part: str = DENOISER) -> None:
    """Demand of a configuration that a loader which obeys it does nothing surprising.

    As regular expressions, the targets of a stranger could run for ever; names of libraries are imported.
    """
    fields = {name.removeprefix(part): value for name, value in values.items()}
    wrong = [
        name
        for name in ("exclude_modules", "layers_to_transform", "layers_pattern")
        if fields.get(name) not in (None, [], "", {})
    ]
    targets = fields.get("target_modules")
    names = targets if isinstance(targets, list) else [] if targets in (None, "all-linear") else None
    if names is None or not all(isinstance(name, str) and _NAME.fullmatch(name) for name in names):
        wrong.append("target_modules")
    if fields.get("megatron_core") not in (None, "megatron.core"):
        wrong.append("megatron_core")
    mapping = fields.get("auto_mapping")
    library = mapping.get("parent_library", "diffusers") if isinstance(mapping, dict) else mapping
    if library is not None and not (isinstance(library, str) and _KNOWN_LIBRARY.fullmatch(library)):
        wrong.append("auto_mapping")
    if wrong:
        raise DialectError(f"{where} steers loaders by more than the names of modules", keys=wrong)
