"""A base that encodes a picture as its mean and a prompt as its length, and remembers what it was asked."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from serving.pipelines.base import PromptEmbeds


class AveragingBase:
    """Counts what it encodes; ``log`` gets a line for every batch of pictures, for other processes."""

    size, multiple = (64, 64), 16

    def __init__(self, sees_image: bool = True, pooled: bool = True, log: Path | None = None) -> None:
        self.family, self.sees_image, self._pooled, self._log = "qwen-image-edit", sees_image, pooled, log
        self.images: list[tuple[int, int]] = []
        self.prompts: list[str] = []
        self.transformer = torch.nn.Linear(1, 1)
        self.pipe = SimpleNamespace(components={"transformer": self.transformer})

    def encode_images(self, images, size):
        self.images += [image.size for image in images]
        if self._log:
            with self._log.open("a") as stream:
                stream.write(f"{len(images)}\n")
        means = torch.tensor([np.asarray(image).mean() for image in images])
        return means[:, None, None].expand(-1, size[0] * size[1] // 256, 2).clone()

    def encode_prompts(self, images, prompts, size):
        self.prompts += list(prompts)
        lengths = [len(prompt) for prompt in prompts]
        embeds, mask = torch.zeros(len(prompts), max(lengths), 3), torch.zeros(len(prompts), max(lengths))
        for row, length in enumerate(lengths):
            mask[row, :length], embeds[row, :length] = 1, length
        pooled = torch.tensor([[float(length)] * 4 for length in lengths]) if self._pooled else None
        return PromptEmbeds(embeds=embeds, mask=mask.bool(), pooled=pooled)


def fill_cache(arguments: tuple) -> dict:
    """Fill a cache in a process of its own; the arguments travel to it, so they are one value."""
    from trainer.data import cache_dataset
    from trainer.recipe import Recipe

    recipe, run, base, out, log, share = arguments
    torch.set_num_threads(1)
    result = cache_dataset(
        Recipe.model_validate(recipe), run / "dataset", base, out, pipeline=AveragingBase(log=log), **share
    )
    return dict(result.facts)
