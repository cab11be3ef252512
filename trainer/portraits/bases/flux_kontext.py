"""A tiny FLUX.1-Kontext-dev: FLUX.1's parts in the pipeline that looks at a source picture."""

from __future__ import annotations

from pathlib import Path

from trainer.portraits.bases import flux, parts


def build(folder: Path, seed: int = 1) -> Path:
    """Write the base."""
    from diffusers import FluxKontextPipeline

    pipe = flux.assemble(FluxKontextPipeline, seed)
    return parts.save(pipe, folder, prompt_tokens=parts.PROMPT_TOKENS)
