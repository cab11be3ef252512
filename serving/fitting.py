"""Which tensor of an adapter's file belongs to which module of the base: all have a place, or none is used.

Names and shapes come from the signed card and from the base itself.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from registry.admission import VerifiedAdapter
from registry.families import FamilyFacts
from registry.formats import LoraKey, parse_key, read_header
from serving.errors import AdapterMismatch

if TYPE_CHECKING:
    import torch

    from serving.layers import Update

_SHOWN = 4

Place = tuple[str, str]
"""A part of the pipeline, and the name of one of its modules there."""


def fitting_updates(
    adapter: VerifiedAdapter, parts: Mapping[str, torch.nn.Module], facts: FamilyFacts
) -> dict[Place, tuple[Update, torch.nn.Linear]]:
    """Return what is done to each module, and the module; every tensor of the file has its place.

    Raises:
        AdapterMismatch: the file and the base do not fit each other.
    """
    from serving.layers import Update

    targets = _targets(adapter, parts, facts)
    rank = adapter.card.lora.rank
    found: dict[str, dict[str, torch.Tensor]] = {}
    problems: list[str] = []
    for key, tensor in _tensors(adapter.weights).items():
        parsed = parse_key(key)
        if parsed is None or parsed.module not in targets or not key.startswith(facts.key(parsed.module)):
            problems.append(f"unexpected tensor {key}")
            continue
        shape = _shape(parsed, targets[parsed.module].linear, rank)
        if tuple(tensor.shape) != shape:
            problems.append(f"{key} has the shape {list(tensor.shape)}, not {list(shape)}")
            continue
        found.setdefault(parsed.module, {})[parsed.factor] = tensor
    sides = {"A", "B"} | ({"magnitude"} if any("magnitude" in one for one in found.values()) else set())
    for module, target in targets.items():
        has = found.get(module, {}).keys()
        if (target.required or has) and not has >= sides:
            problems += [f"missing tensor of {module} (lora_{side})" for side in sorted(sides - has)]
    if problems:
        rest = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise AdapterMismatch(
            "the adapter does not fit the base model: " + "; ".join(problems[:_SHOWN]) + rest,
            "serve it on the base it was trained for, or export it again with every target",
        )
    return {
        (target := targets[module]).place: (
            Update(a=one["A"], b=one["B"], magnitude=one.get("magnitude")),
            target.linear,
        )
        for module, one in found.items()
    }


def _tensors(weights: bytes) -> dict[str, torch.Tensor]:
    """Return the tensors of canonical safetensors bytes, as views on those bytes: nothing is copied."""
    import torch

    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    found = {}
    with warnings.catch_warnings():
        # The bytes cannot be written to, and nobody does.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        for key, info in read_header(weights).tensors.items():
            flat = torch.frombuffer(
                weights, dtype=dtypes[info.dtype], count=math.prod(info.shape), offset=info.start
            )
            found[key] = flat.reshape(info.shape)
    return found


def _shape(key: LoraKey, linear: torch.nn.Linear, rank: int) -> tuple[int, ...]:
    if key.factor == "magnitude":
        return (linear.out_features,)
    return (rank, linear.in_features) if key.factor == "A" else (linear.out_features, rank)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Target:
    """A module that the signed card names; ``required`` unless training cannot reach it."""

    place: Place
    linear: torch.nn.Linear
    required: bool


def _targets(
    adapter: VerifiedAdapter, parts: Mapping[str, torch.nn.Module], facts: FamilyFacts
) -> dict[str, _Target]:
    """Return the modules that the signed card names, as the registry calls them."""
    import torch

    kinds = set(adapter.card.lora.targets)
    modules: dict[str, tuple[Place, torch.nn.Linear]] = {}
    for part, model in parts.items():
        start = ""
        if part != facts.prefix:
            # Newer transformers have no `text_model` around some encoders' layers; files always name it.
            start = f"{part}." if hasattr(model, "text_model") else f"{part}.text_model."
        for name, module in model.named_modules():
            plain = name.replace(".base_layer", "")
            if isinstance(module, torch.nn.Linear) and facts.is_target(start + plain):
                modules[start + plain] = (part, plain), module
    absent = kinds - {facts.block_of(name)[1] for name in modules}
    if absent:
        raise AdapterMismatch(
            f"the base model has no module of the kind {', '.join(sorted(absent))}",
            "serve the adapter on the base it was trained for",
        )
    # The output of silent modules is discarded, so an exporter may leave them out and nothing changes.
    silent = facts.silent(modules)
    return {
        name: _Target(place=place, linear=linear, required=name not in silent)
        for name, (place, linear) in modules.items()
        if facts.block_of(name)[1] in kinds
    }
