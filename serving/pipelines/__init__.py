"""Base-model families: one file each, behind the one protocol of `serving.pipelines.base`."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from serving.errors import BaseNotFound, UsageError

if TYPE_CHECKING:
    import torch

    from serving.pipelines.base import EditPipeline
    from serving.pipelines.loading import Weights

Offload = Literal["none", "models", "blocks"]
"""What of a base waits in the machine's memory until it is used: nothing, whole models, or the denoiser's
blocks as well."""

# Family -> module and class, as text: naming a family must not import torch.
_CLASSES = {
    "qwen-image-edit": ("serving.pipelines.qwen_image_edit", "QwenImageEdit"),
    "flux": ("serving.pipelines.flux", "Flux"),
    "flux-kontext": ("serving.pipelines.flux", "FluxKontext"),
    "flux2-klein": ("serving.pipelines.flux2", "Flux2Klein"),
    "sd3": ("serving.pipelines.sd3", "StableDiffusion3"),
    "sdxl": ("serving.pipelines.unet", "StableDiffusionXL"),
    "sd15": ("serving.pipelines.unet", "StableDiffusion15"),
}


def load(
    family: str,
    source: str | Path,
    *,
    revision: str | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    weights: Weights = "whole",
    offload: Offload = "none",
) -> EditPipeline:
    """Load a base model of ``family`` from a local folder or from a hub id at ``revision``.

    Args:
        family: of the base.
        source: folder or hub id.
        revision: of the hub id.
        device: that computes.
        dtype: of the weights; None means float32 on a CPU and bfloat16 elsewhere.
        weights: how the denoiser's are kept.
        offload: what waits in the machine's memory until it is used; see `serving.placement`.

    Raises:
        UsageError: there is no pipeline for the family, or NF4 is asked for without bitsandbytes.
        BaseNotFound: nothing that can be loaded is at ``source``.
    """
    if family not in _CLASSES:
        raise UsageError(
            f"no pipeline serves the family {family!r}", "families that can be served: " + ", ".join(_CLASSES)
        )
    module, name = _CLASSES[family]
    loader = getattr(importlib.import_module(module), name)
    try:
        place = device if offload == "none" else "cpu"
        pipeline = loader.load(
            source, revision=revision, device=place, dtype=dtype, weights=weights, compute=device
        )
    except OSError as error:
        # transformers and diffusers say with OSError that files are missing or the hub cannot be reached
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BaseNotFound(
            f"the base model at {source} cannot be loaded: {first_line[:300]}",
            "register a local copy of it with `serving register-base`, or check the network and try again",
        ) from error
    if offload == "none":
        return cast("EditPipeline", pipeline)
    import torch

    from serving.placement import Offloaded

    return cast("EditPipeline", Offloaded(pipeline, torch.device(device), stream=offload == "blocks"))
