"""LoRA layers in a base model's transformer: fp32 weights over a frozen base of any precision."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping

import torch

from registry.families import family
from trainer.data.batches import generator
from trainer.errors import BaseModelError
from trainer.recipe import Recipe

_ADAPTER = "foundry"


def target_modules(transformer: torch.nn.Module, family_name: str, targets: tuple[str, ...]) -> list[str]:
    """Return the full names of the modules that get a LoRA, in the order of the blocks.

    Modules whose output the last block throws away are left out: they would never get a gradient.

    Raises:
        BaseModelError: a target matches no linear layer of the transformer.
    """
    facts = family(family_name)
    linear = {name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)}
    in_blocks = sorted((name for name in linear if name.startswith(facts.blocks + ".")), key=_natural)
    kinds = {facts.block_of(name)[1] for name in in_blocks}
    for target in targets:
        if target not in kinds:
            near = difflib.get_close_matches(target, kinds, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise BaseModelError(
                f"the base has no modules {target!r} for a LoRA{hint}",
                "choose from: " + ", ".join(sorted(kinds)),
            )
    last = max(facts.block_of(name)[0] for name in in_blocks)
    return [
        name
        for name in in_blocks
        for block, kind in [facts.block_of(name)]
        if kind in targets and not (block == last and kind in facts.silent_in_last_block)
    ]


def inject(transformer: torch.nn.Module, recipe: Recipe) -> dict[str, torch.nn.Parameter]:
    """Put LoRA layers into a frozen transformer.

    A starts uniform in +-1/sqrt(in) from the seed alone, B at zero, so the first step is the base itself.

    Returns:
        "<module>.lora_A.weight" and "<module>.lora_B.weight" -> fp32 parameter, in a fixed order.

    Raises:
        BaseModelError: a target matches nothing.
    """
    from peft import LoraConfig
    from peft.tuners.tuners_utils import BaseTunerLayer

    settings = recipe.lora
    names = target_modules(transformer, recipe.base.family, recipe.targets)
    transformer.requires_grad_(False)
    if any(isinstance(module, BaseTunerLayer) for module in transformer.modules()):
        raise BaseModelError("the base carries a LoRA already", "load the base again before training on it")
    transformer.add_adapter(  # type: ignore[operator]  # diffusers' PeftAdapterMixin
        LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            use_rslora=settings.scaling == "rank-stabilised",
            target_modules=names,
            init_lora_weights=True,
        ),
        adapter_name=_ADAPTER,
    )
    found: dict[str, torch.nn.Parameter] = {}
    with torch.no_grad():
        for name in names:
            layer = transformer.get_submodule(name)
            a, b = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
            a.data, b.data = a.data.float(), torch.zeros_like(b.data, dtype=torch.float32)
            bound = 1 / math.sqrt(a.shape[1])
            a.copy_((torch.rand(a.shape, generator=generator(recipe.seed, "lora", name)) * 2 - 1) * bound)
            found[f"{name}.lora_A.weight"], found[f"{name}.lora_B.weight"] = a, b
    for parameter in found.values():
        parameter.requires_grad_(True)
    return found


def remove(transformer: torch.nn.Module) -> None:
    """Take the LoRA layers out again; the base is as it was."""
    transformer.delete_adapters(_ADAPTER)  # type: ignore[operator]
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(transformer.named_modules()):
        if isinstance(module, BaseTunerLayer):
            parent, _, child = name.rpartition(".")
            owner = transformer.get_submodule(parent)
            if child.isdigit() and isinstance(owner, torch.nn.ModuleList | torch.nn.Sequential):
                owner[int(child)] = module.get_base_layer()  # type: ignore[index]
            else:
                setattr(owner, child, module.get_base_layer())
    if hasattr(transformer, "peft_config"):
        del transformer.peft_config
    transformer._hf_peft_config_loaded = False  # type: ignore[assignment]


def put(parameters: Mapping[str, torch.nn.Parameter], values: Mapping[str, torch.Tensor]) -> None:
    """Copy ``values`` into the parameters of the same names."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
