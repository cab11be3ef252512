"""The layers that hold an adapter beside a base's own modules: put in, found again, taken out.

Plain LoRA layers are PEFT's. DoRA has a layer of ours: PEFT's computes the lengths of the rows anew in every
forward pass, and at strength 0 it is not the base.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer

from serving.errors import AdapterMismatch

SLOT = "verified"
"""The name of the adapter in PEFT's layers."""

SHOWN = 4
"""How many of several problems a message names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """What an adapter does to one module.

    Attributes:
        a: [rank, in].
        b: [out, rank].
        magnitude: with DoRA the lengths [out] of the rows of the weight that B A was added to, fp32.
    """

    a: torch.Tensor
    b: torch.Tensor
    magnitude: torch.Tensor | None = None


class RescaledLinear(torch.nn.Module):
    """A linear layer and DoRA's update of it, at a strength.

    The trained weight is W' = m (W + B A) / |W + B A|, row by row (Liu et al., arXiv 2402.09353, eq. 5), and
    the output W x + strength (W' - W) x + bias: the base at strength 0, as trained at 1.

    Args:
        base: the base's own layer, of floating-point weights.
        update: with a magnitude.
    """

    def __init__(self, base: torch.nn.Linear, update: Update) -> None:
        super().__init__()
        weight = base.weight
        assert update.magnitude is not None
        self.base_layer = base
        self.strength = 1.0
        a, b, magnitude = (
            tensor.to(weight.device, torch.float32) for tensor in (update.a, update.b, update.magnitude)
        )
        self.register_buffer("lora_A", a.to(weight.dtype), persistent=False)
        self.register_buffer("lora_B", b.to(weight.dtype), persistent=False)
        with torch.no_grad():
            lengths = (weight.float() + b @ a).norm(dim=1)
        # A row of zeros has no direction to give a length to.
        gain = torch.where(lengths > 0, magnitude / lengths.clamp_min(torch.finfo(torch.float32).tiny), 1.0)
        self.register_buffer("gain", gain, persistent=False)
        self.train(base.training)

    @property
    def weight(self) -> torch.Tensor:
        """The base's weight: some models ask a layer for its dtype."""
        return self.base_layer.weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The base's bias."""
        return self.base_layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's output with the update."""
        output: torch.Tensor = self.base_layer(x)
        gain = self.get_buffer("gain")
        plain = output if self.bias is None else output - self.bias
        update = F.linear(F.linear(x, self.get_buffer("lora_A")), self.get_buffer("lora_B"))
        # gain - 1 is taken in fp32: what is left of a gain near 1 in bf16 would be one of 256 steps.
        change = (gain - 1).to(x.dtype) * plain + gain.to(x.dtype) * update
        return output + self.strength * change


def inject(model: torch.nn.Module, updates: Mapping[str, Update], rank: int) -> dict[str, torch.nn.Module]:
    """Wrap linear layers of a model in layers that hold ``updates``; returns the layers by module name.

    Raises:
        AdapterMismatch: PEFT wrapped other modules than those named, or the base is quantised and the update
            DoRA.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if any(update.magnitude is not None for update in updates.values()):
        made: dict[str, torch.nn.Module] = {
            name: _rescaled(model.get_submodule(name), update) for name, update in updates.items()
        }
        for name, layer in made.items():
            replace(model, name, layer)
        return made
    # lora_alpha == rank: the scale of the layer is 1 until a strength is set. The layers are made empty (on
    # the meta device), because PEFT would fill them from the global random state, which others rely on.
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=sorted(updates), lora_dropout=0.0, bias="none",
        init_lora_weights=False,
    )  # fmt: skip
    inject_adapter_in_model(config, model, adapter_name=SLOT, low_cpu_mem_usage=True)
    layers = found(model)
    if layers.keys() != updates.keys():
        raise AdapterMismatch(
            "the LoRA layers did not land on the modules of the adapter: "
            + ", ".join(sorted(layers.keys() ^ updates.keys())[:SHOWN]),
            "report this with the versions of peft and diffusers",
        )
    for name, layer in layers.items():
        base: Any = _base_of(layer)
        dtype = base.weight.dtype if base.weight.is_floating_point() else torch.bfloat16
        update = updates[name]
        for bank, tensor in ((layer.lora_A, update.a), (layer.lora_B, update.b)):
            value = tensor.to(device=base.weight.device, dtype=dtype, copy=True)
            bank[SLOT].weight = torch.nn.Parameter(value, requires_grad=False)  # type: ignore[index, union-attr]
        layer.train(base.training)
    return layers


def _rescaled(base: torch.nn.Module, update: Update) -> RescaledLinear:
    if not isinstance(base, torch.nn.Linear) or base.weight.dtype not in (
        torch.float32, torch.bfloat16, torch.float16,
    ):  # fmt: skip
        raise AdapterMismatch(
            "the adapter is DoRA, which needs the lengths of the base's rows, and the base is quantised",
            "serve it on the base in bfloat16, or train a plain LoRA",
        )
    return RescaledLinear(base, update)


def set_strength(layer: torch.nn.Module, strength: float) -> None:
    """Set what a layer's update is multiplied with."""
    if isinstance(layer, RescaledLinear):
        layer.strength = float(strength)
    else:
        # Set, never multiplied: the strength of the request before leaves nothing behind. The exported file
        # has alpha folded into B, so the scale of PEFT's layer is the strength itself.
        layer.scaling[SLOT] = float(strength)  # type: ignore[index, operator]


def found(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Return every layer that wraps one of the base's with an update, ours or anybody's, by module name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) or (hasattr(module, "base_layer") and hasattr(module, "lora_A"))
    }


def unwrap(model: torch.nn.Module) -> None:
    """Put the base's own modules back into their places."""
    for name, layer in found(model).items():
        replace(model, name, _base_of(layer))
    if hasattr(model, "peft_config"):
        del model.peft_config


def replace(model: torch.nn.Module, name: str, module: torch.nn.Module) -> None:
    """Put a module into the place of another."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _base_of(layer: torch.nn.Module) -> torch.nn.Module:
    base: Any = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer.base_layer
    return base  # type: ignore[no-any-return]
