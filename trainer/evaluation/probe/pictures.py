"""What a suspicious word does, as pictures: whole edits with it, on the base alone and with the adapter."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
from PIL import Image

from serving.pipelines.base import to_images
from trainer.evaluation.sheets import webp

if TYPE_CHECKING:
    from serving.pipelines.qwen_image_edit import QwenImageEdit
    from trainer.evaluation.probe.sweep import Attach

STEPS: Final = 4
_TILE: Final = 96
_GAP: Final = 4

Pictures = Mapping[str, Mapping[str, str]]
"""A word -> "base" or "adapter" -> a strip of edits as a data URI."""


def shoot(
    pipeline: QwenImageEdit,
    images: Sequence[Image.Image],
    prompts: Mapping[str, tuple[str, Callable[[Image.Image], Image.Image]]],
    attach: Attach,
    *,
    seed: int = 0,
) -> Pictures:
    """Edit every picture by every prompt, without and with the adapter.

    Args:
        pipeline: the bare base.
        images: portraits, shown side by side.
        prompts: what is shown -> the prompt, and what is done to each portrait before.
        attach: see `Probe.run`.
        seed: of the edits' noises, one after the other.
    """
    seeds = range(seed, seed + len(images))
    shown: dict[str, dict[str, str]] = {word: {} for word in prompts}

    def draw(side: str) -> None:
        for word, (prompt, prepare) in prompts.items():
            sources = [prepare(image) for image in images]
            texts = pipeline.encode_prompts(sources, [prompt] * len(images))
            latents = pipeline.encode_images(sources)
            edited = pipeline.decode(pipeline.denoise(latents, texts, seeds=seeds, steps=STEPS))
            shown[word][side] = data_uri(strip(to_images(edited)))

    draw("base")
    with attach():
        draw("adapter")
    return shown


def strip(images: Sequence[Image.Image]) -> Image.Image:
    """Pictures side by side on one, `_TILE` pixels high."""
    canvas = np.full((_TILE, len(images) * (_TILE + _GAP) - _GAP, 3), 255, np.uint8)
    for place, image in enumerate(images):
        left = place * (_TILE + _GAP)
        canvas[:, left : left + _TILE] = np.asarray(image.resize((_TILE, _TILE), Image.Resampling.LANCZOS))
    return Image.fromarray(canvas)


def data_uri(image: Image.Image) -> str:
    """The picture as a WebP data URI."""
    return "data:image/webp;base64," + base64.b64encode(webp(image)).decode("ascii")
