"""A verified adapter on a base: attached whole or not at all, at an exact strength, removed without a trace.

The adapter's layers stand beside the base's weights and are never merged into them: detaching puts the base's
own modules back, so the base is bit for bit what it was. Tensors come from the bytes that admission verified,
their layout from the signed card; nothing that a file says about itself is believed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from registry.admission import VerifiedAdapter
from registry.families import FamilyFacts, family
from registry.formats import LoraKey, parse_key
from serving.errors import AdapterMismatch, StrengthOutOfRange, UsageError

if TYPE_CHECKING:
    import torch

    from serving.layers import Update
    from serving.pipelines.base import EditPipeline

_SHOWN = 4

Place = tuple[str, str]
"""A part of the pipeline, and the name of one of its modules there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Mounted:
    """An adapter and the layers that were built for it, by the place of the module each one wraps."""

    adapter: VerifiedAdapter
    layers: Mapping[Place, torch.nn.Module]


class AdapterSlots:
    """The place for one adapter on a pipeline: on its denoiser, and on the text encoders of its family.

    Not for concurrent use: the engine holds a lock around it.

    Args:
        pipeline: the base; one whose text encoders can be trained has them as ``text_encoders``, by part.
    """

    def __init__(self, pipeline: EditPipeline) -> None:
        self._family = family(pipeline.family)
        texts: Mapping[str, torch.nn.Module] = getattr(pipeline, "text_encoders", {})
        self._parts: dict[str, torch.nn.Module] = {
            self._family.prefix: pipeline.transformer,
            **{part: texts[part] for part in self._family.text_encoders if part in texts},
        }
        self._mounted: _Mounted | None = None

    @property
    def current(self) -> VerifiedAdapter | None:
        """The adapter that is attached."""
        return None if self._mounted is None else self._mounted.adapter

    def attach(self, adapter: VerifiedAdapter) -> None:
        """Put ``adapter`` on the base at strength 1, in the place of what was there.

        Raises:
            AdapterMismatch: a tensor is missing, unexpected or of the wrong shape, or the base carries layers
                of somebody else, or is quantised and the adapter DoRA. Whatever was attached before is still
                attached.
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
        updates = _fitting_updates(adapter, self._parts, self._family)
        previous = self._mounted
        self._unmount()
        wants_grad = [
            (parameter, parameter.requires_grad)
            for model in self._parts.values()
            for parameter in model.parameters()
        ]
        try:
            layers = self._inject(updates, adapter.card.lora.rank)
        except BaseException:
            self._unwrap()
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
        from serving import layers

        _require_finite(strength)
        if self._mounted is None:
            raise UsageError("no adapter is attached", "attach one first")
        for layer in self._mounted.layers.values():
            layers.set_strength(layer, strength)

    def _inject(self, updates: Mapping[Place, Update], rank: int) -> dict[Place, torch.nn.Module]:
        from serving import layers

        made: dict[Place, torch.nn.Module] = {}
        for part, model in self._parts.items():
            mine = {name: update for (where, name), update in updates.items() if where == part}
            if mine:
                made |= {(part, name): layer for name, layer in layers.inject(model, mine, rank).items()}
        return made

    def _mount(self, mounted: _Mounted) -> None:
        from serving import layers

        for (part, name), layer in mounted.layers.items():
            layers.replace(self._parts[part], name, layer)
        self._mounted = mounted

    def _unmount(self) -> None:
        if self._mounted is not None:
            self._unwrap()
            self._mounted = None

    def _unwrap(self) -> None:
        from serving import layers

        for model in self._parts.values():
            layers.unwrap(model)

    def _refuse_strangers(self) -> None:
        from serving import layers

        mine = set() if self._mounted is None else {id(layer) for layer in self._mounted.layers.values()}
        for part, model in self._parts.items():
            for name, module in layers.found(model).items():
                if id(module) not in mine:
                    raise AdapterMismatch(
                        f"the {part} already carries LoRA layers that were not attached here ({name})",
                        "use a freshly loaded base model",
                    )


def _require_finite(strength: float) -> None:
    if not math.isfinite(strength):
        raise StrengthOutOfRange(f"the strength {strength} is not a finite number", "use for example 1.0")


def _fitting_updates(
    adapter: VerifiedAdapter, parts: Mapping[str, torch.nn.Module], facts: FamilyFacts
) -> dict[Place, Update]:
    """Return what is done to each module; every tensor of the file has its place.

    Raises:
        AdapterMismatch: the file and the base do not fit each other.
    """
    from safetensors.torch import load

    from serving.layers import Update

    targets = _targets(adapter, parts, facts)
    rank = adapter.card.lora.rank
    found: dict[str, dict[str, torch.Tensor]] = {}
    problems: list[str] = []
    for key, tensor in load(adapter.weights).items():
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
        targets[module].place: Update(a=one["A"], b=one["B"], magnitude=one.get("magnitude"))
        for module, one in found.items()
    }


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
