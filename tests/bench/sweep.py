"""Twelve expressions of one portrait in one batch, against diffusers' own pipeline called twelve times.

``python tests/bench/sweep.py`` prints one JSON line. Both use the shipped base in float32 and the same
steps; the peer is `QwenImageEditPlusPipeline.__call__`, which edits one prompt at a time.
"""

from __future__ import annotations

import json
import statistics
import time

import numpy as np
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as peer
from PIL import Image

from serving.pipelines.qwen_image_edit import QwenImageEdit
from trainer.portraits import base_path
from trainer.portraits.prompts import expression_prompts
from trainer.portraits.renderer import EXPRESSIONS, identity, render

STEPS, ROUNDS = 4, 5


def ours(base: QwenImageEdit, portrait: Image.Image) -> None:
    latents = base.encode_images([portrait])
    prompts = base.encode_prompts([portrait] * 13, expression_prompts())
    edited = base.denoise(
        latents.expand(12, -1, -1), prompts.rows(slice(1, None)), seeds=[0] * 12, steps=STEPS
    )
    base.decode(edited)


def theirs(base: QwenImageEdit, portrait: Image.Image) -> None:
    for prompt in expression_prompts()[1:]:
        base.pipe(
            image=[portrait],
            prompt=prompt,
            height=64,
            width=64,
            num_inference_steps=STEPS,
            true_cfg_scale=1.0,
        )


def seconds(function: object, *arguments: object) -> float:
    started = time.perf_counter()
    function(*arguments)  # type: ignore[operator]
    return time.perf_counter() - started


def main() -> None:
    base = QwenImageEdit.load(base_path())
    base.pipe.set_progress_bar_config(disable=True)
    peer.VAE_IMAGE_SIZE, peer.CONDITION_IMAGE_SIZE = 64 * 64, 28 * 28
    portrait = Image.fromarray(render(identity(90_000, "human"), np.zeros(12)))
    ours(base, portrait)
    pairs = [(seconds(ours, base, portrait), seconds(theirs, base, portrait)) for _ in range(ROUNDS)]
    print(
        json.dumps(
            {
                "bench": "sweep",
                "edits": len(EXPRESSIONS),
                "steps": STEPS,
                "ours_s": round(statistics.median(a for a, _ in pairs), 3),
                "diffusers_s": round(statistics.median(b for _, b in pairs), 3),
                "ratio": round(statistics.median(a / b for a, b in pairs), 3),
            }
        )
    )


if __name__ == "__main__":
    main()
