"""A verified adapter on a base: attached whole or not at all, at an exact strength, removed without a trace.

The LoRA layers stand beside the base's weights and are never merged into them: detaching puts the base's own
modules back, so the base is bit for bit what it was. Tensors come from the bytes that admission verified,
their layout from the signed card; nothing that a file says about itself is believed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from registry.admission import VerifiedAdapter
from registry.families import FamilyFacts, family
from serving.errors import AdapterMismatch, StrengthOutOfRange, UsageError

if TYPE_CHECKING:
    import torch

    from serving.pipelines.base import EditPipeline

_SLOT = "verified"
_SHOWN = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class _Mounted:
    """An adapter and the LoRA layers that were built for it, by the name of the module each one wraps."""

    adapter: VerifiedAdapter
    layers: Mapping[str, torch.nn.Module]


class AdapterSlots:
    """The place for one adapter on a pipeline's transformer.

    Not for concurrent use: the engine holds a lock around it.
    """

    def __init__(self, pipeline: EditPipeline) -> None:
        self._transformer = pipeline.transformer
        self._family = family(pipeline.family)
        self._mounted: _Mounted | None = None

    @property
    def current(self) -> VerifiedAdapter | None:
        """The adapter that is attached."""
        return None if self._mounted is None else self._mounted.adapter

    def attach(self, adapter: VerifiedAdapter) -> None:
        """Put ``adapter`` on the base at strength 1, in the place of what was there.

        Raises:
            AdapterMismatch: a tensor is missing, unexpected or of the wrong shape, or the transformer carries
                layers of somebody else. Whatever was attached before is still attached.
            UsageError: ``adapter`` did not pass admission.
        """
        if type(adapter) is not VerifiedAdapter:
            raise UsageError(
                f"a {type(adapter).__name__} is not a verified adapter",
                "only what `registry pull` or admission returns can be attached",
            )
        if self._mounted is not None and self._mounted.adapter is adapter:
            self.set_strength(1.0)
            return
        self._refuse_strangers()
        tensors = _fitting_tensors(adapter, self._transformer, self._family)
        previous = self._mounted
        self._unmount()
        wants_grad = [(parameter, parameter.requires_grad) for parameter in self._transformer.parameters()]
        try:
            layers = _inject(self._transformer, tensors, adapter.card.lora.rank)
        except BaseException:
            _unwrap(self._transformer)
            if previous is not None:
                self._mount(previous)
            raise
        finally:
            # PEFT freezes the whole model; who trains on it has its own mind about that.
            for parameter, wanted in wants_grad:
                parameter.requires_grad_(wanted)
        self._mounted = _Mounted(adapter=adapter, layers=layers)

    def detach(self) -> None:
        """Leave the base alone, bit for bit as it was before the first attach."""
        self._unmount()

    def use(self, adapter: VerifiedAdapter, strength: float) -> None:
        """Attach ``adapter`` unless it is there already, and set its strength.

        Raises:
            AdapterMismatch: as `attach`.
            StrengthOutOfRange: ``strength`` is not a finite number.
        """
        _require_finite(strength)
        if self.current is not adapter:
            self.attach(adapter)
        self.set_strength(strength)

    def set_strength(self, strength: float) -> None:
        """Multiply the adapter's update by ``strength``; 1 is as trained, 0 the base alone.

        Raises:
            UsageError: no adapter is attached.
            StrengthOutOfRange: ``strength`` is not a finite number.
        """
        _require_finite(strength)
        if self._mounted is None:
            raise UsageError("no adapter is attached", "attach one first")
        for layer in self._mounted.layers.values():
            # Set, never multiplied: the strength of the request before leaves nothing behind. The exported
            # file has alpha folded into B, so the scale of PEFT's layer is the strength itself.
            layer.scaling[_SLOT] = float(strength)  # type: ignore[index, operator]

    def _mount(self, mounted: _Mounted) -> None:
        for name, layer in mounted.layers.items():
            _replace(self._transformer, name, layer)
        self._mounted = mounted

    def _unmount(self) -> None:
        if self._mounted is not None:
            _unwrap(self._transformer)
            self._mounted = None

    def _refuse_strangers(self) -> None:
        mine = set() if self._mounted is None else {id(layer) for layer in self._mounted.layers.values()}
        for name, module in _lora_layers(self._transformer).items():
            if id(module) not in mine:
                raise AdapterMismatch(
                    f"the transformer already carries LoRA layers that were not attached here ({name})",
                    "use a freshly loaded base model",
                )


def _require_finite(strength: float) -> None:
    if not math.isfinite(strength):
        raise StrengthOutOfRange(f"the strength {strength} is not a finite number", "use for example 1.0")


def _fitting_tensors(
    adapter: VerifiedAdapter, transformer: torch.nn.Module, facts: FamilyFacts
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return module name -> (A [rank, in], B [out, rank]); every tensor of the file has its place.

    Raises:
        AdapterMismatch: the file and the base do not fit each other.
    """
    from safetensors.torch import load

    tensors = load(adapter.weights)
    required, optional = _targets(adapter, transformer, facts)
    wanted = required | optional
    found: dict[str, dict[str, torch.Tensor]] = {}
    problems: list[str] = []
    for key, tensor in tensors.items():
        module, side = _split(key, facts)
        if module not in wanted:
            problems.append(f"unexpected tensor {key}")
            continue
        linear = wanted[module]
        rank = adapter.card.lora.rank
        shape = (rank, linear.in_features) if side == "A" else (linear.out_features, rank)
        if tuple(tensor.shape) != shape:
            problems.append(f"{key} has the shape {list(tensor.shape)}, not {list(shape)}")
            continue
        found.setdefault(module, {})[side] = tensor
    for module in wanted:
        sides = found.get(module, {})
        if (module in required or sides) and len(sides) < 2:
            problems += [f"missing tensor of {module} (lora_{side})" for side in "AB" if side not in sides]
    if problems:
        rest = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise AdapterMismatch(
            "the adapter does not fit the base model: " + "; ".join(problems[:_SHOWN]) + rest,
            "serve it on the base it was trained for, or export it again with every target",
        )
    return {module: (sides["A"], sides["B"]) for module, sides in found.items()}


def _targets(
    adapter: VerifiedAdapter, transformer: torch.nn.Module, facts: FamilyFacts
) -> tuple[dict[str, torch.nn.Linear], dict[str, torch.nn.Linear]]:
    """Return the modules that the signed card names: those the file must have, and those it may omit."""
    import torch

    kinds = set(adapter.card.lora.targets)
    modules: dict[str, torch.nn.Linear] = {}
    for name, module in transformer.named_modules():
        plain = name.replace(".base_layer", "")
        if isinstance(module, torch.nn.Linear) and facts.is_target(plain):
            modules[plain] = module
    absent = kinds - {facts.block_of(name)[1] for name in modules}
    if absent:
        raise AdapterMismatch(
            f"the base model has no module of the kind {', '.join(sorted(absent))}",
            "serve the adapter on the base it was trained for",
        )
    # Their output is discarded, so an exporter may leave them out and nothing changes.
    silent = facts.silent(modules)
    required: dict[str, torch.nn.Linear] = {}
    optional: dict[str, torch.nn.Linear] = {}
    for name, linear in modules.items():
        if facts.block_of(name)[1] in kinds:
            (optional if name in silent else required)[name] = linear
    return required, optional


def _split(key: str, facts: FamilyFacts) -> tuple[str, str]:
    """Return (module, "A" or "B") of a key of the file; ("", "") of any other key."""
    for side in "AB":
        suffix = f".lora_{side}.weight"
        if key.startswith(facts.prefix + ".") and key.endswith(suffix):
            return key[len(facts.prefix) + 1 : -len(suffix)], side
    return "", ""


def _inject(
    transformer: torch.nn.Module, tensors: Mapping[str, tuple[torch.Tensor, torch.Tensor]], rank: int
) -> dict[str, torch.nn.Module]:
    """Wrap the named modules in LoRA layers that hold ``tensors``; returns the layers by module name.

    Raises:
        AdapterMismatch: PEFT wrapped other modules than those named.
    """
    import torch
    from peft import LoraConfig, inject_adapter_in_model

    # lora_alpha == rank: the scale of the layer is 1 until a strength is set. The layers are made empty (on
    # the meta device), because PEFT would fill them from the global random state, which others rely on.
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=sorted(tensors), lora_dropout=0.0, bias="none",
        init_lora_weights=False,
    )  # fmt: skip
    inject_adapter_in_model(config, transformer, adapter_name=_SLOT, low_cpu_mem_usage=True)
    layers = _lora_layers(transformer)
    if layers.keys() != tensors.keys():
        raise AdapterMismatch(
            "the LoRA layers did not land on the modules of the adapter: "
            + ", ".join(sorted(layers.keys() ^ tensors.keys())[:_SHOWN]),
            "report this with the versions of peft and diffusers",
        )
    for name, layer in layers.items():
        base: Any = layer.get_base_layer()  # type: ignore[operator]
        dtype = base.weight.dtype if base.weight.is_floating_point() else torch.bfloat16
        for bank, tensor in zip((layer.lora_A, layer.lora_B), tensors[name], strict=True):
            value = tensor.to(device=base.weight.device, dtype=dtype, copy=True)
            bank[_SLOT].weight = torch.nn.Parameter(value, requires_grad=False)  # type: ignore[index, union-attr]
        layer.train(base.training)
    return layers


def _lora_layers(transformer: torch.nn.Module) -> dict[str, torch.nn.Module]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {
        name: module for name, module in transformer.named_modules() if isinstance(module, BaseTunerLayer)
    }


def _unwrap(transformer: torch.nn.Module) -> None:
    """Put the base's own modules back into their places."""
    for name, layer in _lora_layers(transformer).items():
        _replace(transformer, name, layer.get_base_layer())  # type: ignore[operator]
    if hasattr(transformer, "peft_config"):
        del transformer.peft_config


def _replace(transformer: torch.nn.Module, name: str, module: torch.nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(transformer.get_submodule(parent), leaf, module)
