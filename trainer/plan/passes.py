"""The work of a base: of its denoiser with the LoRA of a recipe in it, and of its decoder.

Blocks that are alike do alike work. So a transformer is counted with one block of each kind, and again with
two of a kind, which tells what every further one adds; that is exact, and sixty blocks take no longer than
two. U-Nets are counted as they are.
"""

from __future__ import annotations

from itertools import groupby

import torch

from serving.plan.bases import Base, latents, samples
from trainer import lora
from trainer.plan.count import Work, work
from trainer.recipe import Recipe

Kind = tuple[str, int]
"""A list of blocks, and the first of blocks that are alike in it."""


def denoising(recipe: Recipe, base: Base, side: int, dtype: torch.dtype) -> Work:
    """Return the work of the denoiser on pictures with ``side`` pixels a side."""
    kinds = alike(recipe, base.build(base.denoiser, dtype))
    one = _of(recipe, base, side, dtype, dict.fromkeys(kinds, 1))
    total = one
    for kind, count in kinds.items():
        if count > 1:
            two = _of(recipe, base, side, dtype, {**dict.fromkeys(kinds, 1), kind: 2})
            total = total.plus(count - 1, two, one)
    return total


def alike(recipe: Recipe, denoiser: torch.nn.Module) -> dict[Kind, int]:
    """Return how many blocks in a row are alike: of the same layers, of which the same get a LoRA."""
    targets = set(lora.target_modules(denoiser, recipe.base.family, recipe.targets))
    found: dict[Kind, int] = {}
    for name, blocks in denoiser.named_children():
        if isinstance(blocks, torch.nn.ModuleList) and name.endswith("transformer_blocks"):
            shapes = [
                tuple(
                    (part, module.out_features, module.in_features, f"{name}.{index}.{part}" in targets)
                    for part, module in block.named_modules()
                    if isinstance(module, torch.nn.Linear)
                )
                for index, block in enumerate(blocks)
            ]
            for _, row in groupby(range(len(blocks)), key=shapes.__getitem__):
                first, *others = row
                found[name, first] = 1 + len(others)
    return found


def _of(recipe: Recipe, base: Base, side: int, dtype: torch.dtype, chosen: dict[Kind, int]) -> Work:
    """Return the work of the denoiser with so many blocks of each kind; without any kinds, as it is."""
    denoiser = base.build(base.denoiser, dtype)
    for name in dict.fromkeys(name for name, _ in chosen):
        blocks = denoiser.get_submodule(name)
        assert isinstance(blocks, torch.nn.ModuleList)
        kept = [
            blocks[first + number]
            for (where, first), count in chosen.items()
            if where == name
            for number in range(count)
        ]
        setattr(denoiser, name, torch.nn.ModuleList(kept))
    lora.inject(denoiser, recipe)

    def predict(count: int) -> torch.Tensor:
        given = samples(base, (side, side), count, dtype)
        result: torch.Tensor = denoiser(**given, return_dict=False)[0]
        return result

    return work(denoiser, predict)


def decoding(base: Base, side: int, dtype: torch.dtype) -> Work:
    """Return the work of decoding pictures with ``side`` pixels a side."""
    vae = base.build("vae", dtype)
    if base.family == "qwen-image-edit":
        from serving.pipelines.qwen_image_edit import single_frame

        single_frame(vae)

    def decode(count: int) -> torch.Tensor:
        given = latents(base, (side, side), count, dtype).requires_grad_(True)
        pictures: torch.Tensor = vae.decode(given, return_dict=False)[0]  # type: ignore[operator]  # of diffusers
        return pictures

    return work(vae, decode)
