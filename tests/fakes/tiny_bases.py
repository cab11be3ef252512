"""What the tiny base of any family can be asked, without a data set."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

from serving.pipelines.base import EditPipeline, PromptEmbeds


def inputs(pipeline: EditPipeline, rows: int = 4) -> dict[str, Any]:
    """What `predict` is given for a batch, with padding in no row."""
    picture = Image.new("RGB", pipeline.size, (90, 120, 60))
    prompts = pipeline.encode_prompts([picture], ["show a happy expression"])
    latents = pipeline.encode_images([picture])
    draw = torch.Generator().manual_seed(5)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw)

    return {
        "latents": noise(rows, *latents.shape[1:]),
        "image_latents": latents.float().expand(rows, -1, -1),
        "prompts": PromptEmbeds(
            embeds=prompts.embeds.float() + 0.1 * noise(rows, *prompts.embeds.shape[1:]),
            mask=prompts.mask.expand(rows, -1),
            pooled=None if prompts.pooled is None else prompts.pooled.float().expand(rows, -1),
        ),
        "level": torch.linspace(0.2, 0.9, rows),
    }
