"""Low-rank updates put straight into a transformer's weights, one or several at once, and taken out again.

A probe asks thousands of questions of one adapter after the other. Beside the base's weights, as serving
attaches it, each question pays for the low-rank layers; inside of them it costs what the base costs. The
saved weights are put back, not subtracted out, so the base is bit for bit what it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from registry.families import family
from trainer.errors import BaseModelError

if TYPE_CHECKING:
    import torch

    from registry.admission import VerifiedAdapter

Deltas = Mapping[str, "tuple[torch.Tensor, torch.Tensor]"]
"""Module name -> A [rank, in] and B [out, rank]; the update is B @ A, every scale folded in."""


def deltas_of(adapter: VerifiedAdapter, family_name: str) -> Deltas:
    """Return the updates of a verified adapter; its bytes are canonical and its keys were checked.

    Raises:
        BaseModelError: it is more than low-rank updates of the denoiser: DoRA, or a text encoder's.
    """
    from safetensors.torch import load

    prefix = family(family_name).prefix + "."
    tensors = load(adapter.weights)
    others = [key for key in tensors if not key.startswith(prefix) or key.endswith(".lora_magnitude_vector")]
    if others:
        raise BaseModelError(
            f"adapters are probed in pairs by their low-rank updates alone, and this one has {others[0]}",
            "probe it by itself",
        )
    return {
        key.removeprefix(prefix).removesuffix(".lora_A.weight"): (
            tensors[key],
            tensors[key.replace(".lora_A.", ".lora_B.")],
        )
        for key in sorted(tensors)
        if key.endswith(".lora_A.weight")
    }


@contextmanager
def merged(transformer: torch.nn.Module, *adapters: Deltas) -> Iterator[None]:
    """Add every update of ``adapters`` to the weights of ``transformer`` for the length of the block.

    Raises:
        BaseModelError: the transformer has no such linear layer, or one of another shape.
    """
    import torch

    saved: dict[str, torch.Tensor] = {}
    try:
        with torch.no_grad():
            for adapter in adapters:
                for name, (a, b) in adapter.items():
                    weight = _weight(transformer, name, (b.shape[0], a.shape[1]))
                    saved.setdefault(name, weight.detach().clone())
                    weight += (b.to(weight.device).float() @ a.to(weight.device).float()).to(weight.dtype)
        yield
    finally:
        with torch.no_grad():
            for name, value in saved.items():
                transformer.get_parameter(f"{name}.weight").copy_(value)


def _weight(transformer: torch.nn.Module, name: str, shape: tuple[int, int]) -> torch.Tensor:
    import torch

    try:
        module = transformer.get_submodule(name)
    except AttributeError:
        module = None
    if not isinstance(module, torch.nn.Linear) or tuple(module.weight.shape) != shape:
        raise BaseModelError(
            f"the base has no linear layer {name} of the shape {list(shape)}",
            "probe the adapter on the base that it was made for",
        )
    return module.weight
