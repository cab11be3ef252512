"""How large an adapter is: numbers that are trained, and bytes of the exported file to the last one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from registry.digest import digest_bytes
from registry.families import family
from trainer import export, lora, text_lora
from trainer.recipe import Recipe

Shapes = Mapping[str, tuple[int, ...]]
"""Name of a trained tensor, as `trainer.lora.inject` gives it -> its shape."""

_BYTES = {"F16": 2, "BF16": 2, "F32": 4}
_ALIGNMENT = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """What is trained of a base.

    Attributes:
        modules: linear layers with an update.
        parameters: numbers that are trained.
        kinds: kind of module -> its share of them.
        file: bytes of the exported file.
    """

    modules: int
    parameters: int
    kinds: Mapping[str, int]
    file: int

    @classmethod
    def of(cls, recipe: Recipe, shapes: Shapes, pixels: int) -> Adapter:
        """Return the adapter that a recipe makes of tensors of these shapes, on a base for ``pixels``."""
        facts, kinds = family(recipe.base.family), dict[str, int]()
        for name, shape in shapes.items():
            kind = facts.block_of(module_of(name))[1]
            kinds[kind] = kinds.get(kind, 0) + torch.Size(shape).numel()
        return cls(
            modules=len({module_of(name) for name in shapes}),
            parameters=sum(kinds.values()),
            kinds=kinds,
            file=file_bytes(recipe, shapes, pixels),
        )


def module_of(name: str) -> str:
    """Return the module of a trained tensor."""
    return name.rpartition(".lora_")[0]


def shapes_of(
    recipe: Recipe, denoiser: torch.nn.Module, targets: tuple[str, ...]
) -> dict[str, tuple[int, ...]]:
    """Return the tensors that a recipe would train with some targets.

    Args:
        recipe: its rank and kind of update count, its own targets do not.
        denoiser: without a LoRA.
        targets: kinds of modules.
    """
    names = lora.target_modules(denoiser, recipe.base.family, targets)
    return _shapes(recipe, denoiser, {name: name for name in names})


def text_shapes_of(recipe: Recipe, parts: Mapping[str, torch.nn.Module]) -> dict[str, tuple[int, ...]]:
    """Return the tensors that a recipe trains in the text encoders among some parts of its base."""
    found: dict[str, tuple[int, ...]] = {}
    for part in family(recipe.base.family).text_encoders if recipe.lora.text_encoder else ():
        if part in parts:
            component = text_lora.component_of(part, parts[part])
            names = text_lora.target_modules(parts[part], component, recipe)
            found |= _shapes(recipe, parts[part], {f"{component}.{name}": name for name in names})
    return found


def _shapes(recipe: Recipe, model: torch.nn.Module, names: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """Return the tensors of LoRA layers: full name -> name of the linear layer in ``model``."""
    rank, found = recipe.lora.rank, dict[str, tuple[int, ...]]()
    for full, name in names.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, torch.nn.Linear)
        found[f"{full}.lora_A.weight"] = (rank, layer.in_features)
        found[f"{full}.lora_B.weight"] = (layer.out_features, rank)
        if recipe.lora.dora:
            found[f"{full}.lora_magnitude_vector"] = (layer.out_features,)
    return found


def file_bytes(recipe: Recipe, shapes: Shapes, pixels: int) -> int:
    """Return the size of the exported safetensors file: eight bytes, the header, the numbers."""
    stand_in = digest_bytes(b"")  # of the dataset: all digests are of one length
    header: dict[str, object] = {"__metadata__": export.tags(recipe, stand_in, (pixels, pixels))}
    entries = []
    for name, shape in shapes.items():
        # A magnitude of DoRA is near the norm of a row of the base: rounding it would change all of it.
        dtype = "F32" if name.endswith("magnitude_vector") else recipe.lora.dtype
        entries.append((-_BYTES[dtype], export.key(recipe, name), dtype, shape))
    end = 0
    for width, key, dtype, shape in sorted(entries):  # as safetensors orders them
        start, end = end, end - width * torch.Size(shape).numel()
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-length // _ALIGNMENT) * _ALIGNMENT + end
