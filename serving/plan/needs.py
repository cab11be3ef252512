"""The memory that serving a base takes, in each format and with each way to let parts of it wait."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch

from registry.families import base_spec, family
from serving.frozen import Stored
from serving.pipelines import Offload
from serving.pipelines.loading import Weights
from serving.plan.bases import Base, Size, latents, samples
from serving.plan.live import peak
from serving.plan.machines import MACHINES
from serving.plan.weights import LOST, RESERVE, BaseBytes

_STORED: Final[Mapping[Weights, Stored]] = {"whole": "bf16", "fp8": "fp8", "nf4": "nf4"}
_OFFLOADS: Final[tuple[Offload, ...]] = ("none", "models", "blocks")
DECODED_TOGETHER: Final = 16
"""Pictures that the engine decodes at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """Memory of one way to serve a base.

    Attributes:
        weights, offload: the settings.
        parts: part -> bytes on the device, at the worst moment.
        waiting: bytes in the machine's memory.
        fits: names of the machines that hold it.
    """

    weights: Weights
    offload: Offload
    parts: Mapping[str, int]
    waiting: int
    fits: tuple[str, ...]

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class _Counted:
    """Bytes of a base in bfloat16 and of its passes."""

    denoiser: torch.nn.Module
    texts: int
    vae: int
    step: int
    decode: int
    adapters: int


def needs(base: Base, *, rows: int, size: Size, rank: int, adapters: int) -> list[Need]:
    """Return the memory of every format and way to wait.

    Weights are bfloat16 but for the denoiser's own format. What text encoders keep within a forward pass is
    not counted: it is small beside a denoiser that is away meanwhile.

    Args:
        base: its shapes.
        rows: pictures in a step.
        size: height and width of them.
        rank: of resident adapters.
        adapters: how many are resident; each has all kinds of modules of the family's preset "full".
    """
    counted = _count(base, rows, size, rank, adapters)
    return [_need(counted, weights, offload) for weights in _STORED for offload in _OFFLOADS]


def _count(base: Base, rows: int, size: Size, rank: int, adapters: int) -> _Counted:
    dtype = torch.bfloat16
    parts = {name: base.build(name, dtype) for name in (base.denoiser, "vae", *base.text_encoders)}
    nbytes = {name: sum(value.nbytes for value in part.parameters()) for name, part in parts.items()}
    denoiser, vae = parts[base.denoiser], parts["vae"]
    if base.family == "qwen-image-edit":
        from serving.pipelines.qwen_image_edit import single_frame

        single_frame(vae)
    together = min(rows, DECODED_TOGETHER)
    facts = family(base.family)
    spec = base_spec(base.family, base.parts[base.denoiser])
    kinds = facts.presets["full"]
    numbers = sum(
        rank * (out + into) for name, (out, into) in spec.items() if facts.block_of(name)[1] in kinds
    )
    decoder: Any = vae
    return _Counted(
        denoiser=denoiser,
        texts=sum(nbytes[name] for name in base.text_encoders),
        vae=nbytes["vae"],
        step=peak(lambda: denoiser(**samples(base, size, rows, dtype), return_dict=False)),
        decode=peak(lambda: decoder.decode(latents(base, size, together, dtype), return_dict=False)),
        adapters=adapters * numbers * dtype.itemsize,
    )


def _need(counted: _Counted, weights: Weights, offload: Offload) -> Need:
    plain = torch.bfloat16.itemsize
    held = BaseBytes.of(counted.denoiser, _STORED[weights], plain)
    whole = sum(held.blocks) + held.rest
    here = held.held(len(held.blocks)) if offload == "blocks" else whole
    step = counted.step
    if weights != "whole":
        # A small weight is made whole for as long as it is used.
        linears = (one for one in counted.denoiser.modules() if isinstance(one, torch.nn.Linear))
        step += max(one.out_features * one.in_features * plain for one in linears)
    common = {"adapters": counted.adapters}
    texts, vae = {"text encoders": counted.texts}, {"VAE": counted.vae}
    denoiser = {"denoiser": here}
    if offload == "none":
        moments = [{**texts, **vae, **denoiser, "activations": max(step, counted.decode)}]
    else:
        moments = [
            {**texts, **({"denoiser": held.rest} if offload == "blocks" else {})},
            {**denoiser, "activations": step},
            {**denoiser, **vae, "activations": counted.decode},
        ]
    worst = max(moments, key=lambda moment: sum(moment.values()))
    lost = int(LOST * worst.get("activations", 0))
    parts = {**worst, **common, "reserve": RESERVE + lost}
    parts = {name: nbytes for name, nbytes in parts.items() if nbytes}
    total = sum(parts.values())
    return Need(
        weights=weights,
        offload=offload,
        parts=parts,
        waiting=0 if offload == "none" else counted.texts + counted.vae + whole - (
            held.rest if offload == "blocks" else 0
        ),
        fits=tuple(one.name for one in MACHINES.values() if one.memory is not None and one.memory >= total),
    )  # fmt: skip
