"""Eight intensities of one portrait: one sweep of the engine against eight calls of diffusers' own pipeline.

    PYTHONPATH=tests python tests/bench/serving_sweep.py [--rounds N]

Prints one JSON line. Both run on the shipped base with the shipped adapter, the same steps, noise and thread.
The peer is `QwenImageEditPlusPipeline` as it is published, with the adapter by `load_lora_weights`, called as
PixelSmile's own inference does: it encodes both prompts, interpolates, and calls the pipeline once for each
intensity. ``plain_ratio`` is against calls with one prompt and no interpolation, which the published pipeline
can do alone. Rounds are paired, ratios are medians. ``cached_ratio`` is the engine when it has seen portrait
and prompts before; ``linears_ratio`` is the engine over itself without `serving.pipelines.kernels`.
``pixels`` is the largest difference to the peer's pixels, of values in [0, 1]. ``company`` counts the
values of six sweeps of twelve rows that differ from those of single edits, of how many, and by how many
levels of 255.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as published
from PIL import Image

from fakes.reference_adapters import GOOD
from registry.admission import VerifiedAdapter
from serving.engine import EditEngine
from serving.pipelines import denoising
from serving.pipelines.qwen_image_edit import QwenImageEdit
from serving.quiet import quiet_libraries
from serving.runs import Run
from serving.schema import SweepRequest
from trainer.evaluation.editing import candidate
from trainer.portraits import base_path
from trainer.portraits.renderer import identity, render

STEPS = 8
LEVELS = tuple(level / 8 for level in range(1, 9))
WORD = "happy"


class Peer:
    """The published pipeline with the adapter, at the size of the portraits."""

    def __init__(self, adapter: VerifiedAdapter) -> None:
        self._base = QwenImageEdit.load(base_path())
        self._pipe, self._spec = self._base.pipe, adapter.card.conditioning
        for module in self._pipe.vae.modules():
            if isinstance(module, QwenImageCausalConv3d):
                del module.forward  # ours lets one frame pass as a picture
        self._pipe.set_progress_bar_config(disable=True)
        self._pipe.load_lora_weights(str(GOOD), weight_name="pytorch_lora_weights.safetensors")
        published.VAE_IMAGE_SIZE = self._base.size[0] * self._base.size[1]
        published.CONDITION_IMAGE_SIZE = self._base.condition_pixels**2

    def _call(self, portrait: Image.Image, noise: torch.Tensor, **prompt: Any) -> torch.Tensor:
        height, width = self._base.size
        return self._pipe(
            image=[portrait], height=height, width=width, num_inference_steps=STEPS, true_cfg_scale=1.0,
            latents=noise, output_type="pt", **prompt,
        ).images[0]  # fmt: skip

    def interpolated(self, portrait: Image.Image, noise: torch.Tensor) -> torch.Tensor:
        """Pixels [8, 3, H, W] in [0, 1] of the eight intensities."""
        side = self._base.condition_pixels
        seen = self._pipe.image_processor.resize(portrait, side, side)
        pictures = []
        for level in LEVELS:
            (neutral, mask), (target, _) = (
                self._pipe.encode_prompt(image=[seen], prompt=self._spec.prompt(word))
                for word in (self._spec.neutral, WORD)
            )
            embeds = neutral + level * (target - neutral)
            pictures.append(self._call(portrait, noise, prompt_embeds=embeds, prompt_embeds_mask=mask))
        return torch.stack(pictures)

    def plain(self, portrait: Image.Image, noise: torch.Tensor) -> None:
        """Eight calls with a prompt."""
        for _ in LEVELS:
            self._call(portrait, noise, prompt=self._spec.prompt(WORD))


class Ours:
    """The engine, as a service calls it."""

    def __init__(self, adapter: VerifiedAdapter) -> None:
        self._adapter, self.pipeline = adapter, QwenImageEdit.load(base_path())
        self.engine = EditEngine(self.pipeline, base=adapter.card.base, allow_candidates=True)

    def fresh(self) -> None:
        """Forget what was encoded."""
        self.engine.detach()
        self.engine = EditEngine(self.pipeline, base=self._adapter.card.base, allow_candidates=True)
        self.engine.prefetch(self._adapter)

    def sweep(self, portrait: Image.Image) -> Run:
        """All intensities as one batch, decoded."""
        request = SweepRequest(image=portrait, rows=tuple({WORD: level} for level in LEVELS), steps=STEPS)
        run = self.engine.begin(request, ((self._adapter, 1.0),))
        while not run.done:
            self.engine.advance([run])
        self.engine.finish(run)
        return run


def company(ours: Ours, adapter: VerifiedAdapter) -> dict[str, int]:
    """How much rows of a batch differ from the same rows alone."""
    rows = [{word: level} for word in ("happy", "sad", "surprised") for level in LEVELS[1::2]]
    found = {"different": 0, "values": 0, "levels": 0}
    for number in range(6):
        portrait = Image.fromarray(render(identity(90_000 + number, "human"), np.zeros(12)))
        together = ours.engine.sweep(portrait, adapter, rows, seed=number, steps=STEPS)
        for row, one in zip(rows, together, strict=True):
            alone = ours.engine.sweep(portrait, adapter, [row], seed=number, steps=STEPS)[0]
            difference = np.abs(np.asarray(alone.image, int) - np.asarray(one.image, int))
            found["different"] += int((difference > 0).sum())
            found["values"] += difference.size
            found["levels"] = max(found["levels"], int(difference.max()))
    return found


def seconds(function: Callable[..., object], *arguments: object) -> float:
    """How long a call takes."""
    begun = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - begun


@torch.no_grad()
def main(rounds: int) -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    quiet_libraries()
    adapter, _ = candidate(GOOD)
    ours, peer = Ours(adapter), Peer(adapter)
    portrait = Image.fromarray(render(identity(90_000, "human"), np.zeros(12)))
    noise = ours.pipeline.noise([0], torch.zeros(1), ours.pipeline.size)
    run = ours.sweep(portrait)
    pixels = (ours.pipeline.decode(run.denoising.latents).clamp(-1, 1) + 1) / 2
    difference = float((pixels - peer.interpolated(portrait, noise)).abs().max())
    found: dict[str, list[float]] = {name: [] for name in ("ours", "cached", "slower", "theirs", "plain")}
    for _ in range(rounds):
        ours.fresh()
        found["ours"].append(seconds(ours.sweep, portrait))
        found["cached"].append(seconds(ours.sweep, portrait))
        found["theirs"].append(seconds(peer.interpolated, portrait, noise))
        found["plain"].append(seconds(peer.plain, portrait, noise))
        ours.fresh()
        with patch.object(denoising, "fast_linears", nullcontext):
            found["slower"].append(seconds(ours.sweep, portrait))

    def ratio(slow: str, fast: str) -> float:
        return round(statistics.median(np.divide(found[slow], found[fast])), 2)

    print(json.dumps({
        "bench": "serving_sweep", "rows": len(LEVELS), "steps": STEPS, "rounds": rounds,
        "engine_s": round(statistics.median(found["ours"]), 3),
        "diffusers_s": round(statistics.median(found["theirs"]), 3),
        "ratio": ratio("theirs", "ours"), "plain_ratio": ratio("plain", "ours"),
        "cached_ratio": ratio("theirs", "cached"), "linears_ratio": ratio("slower", "ours"),
        "pixels": difference, "company": company(ours, adapter),
    }))  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    main(parser.parse_args().rounds)
