"""Edits of a suite through the engine against diffusers' own pipeline, and the seconds of a whole suite.

    PYTHONPATH=tests python tests/bench/evaluation.py [PEOPLE]

Prints one JSON line. First both edit the same person as often, with the shipped base, the same adapter, steps
and threads: ours in one batch of `EditEngine.sweep`, the peer by `QwenImageEditPlusPipeline.__call__`, a call
for each picture. Rounds are paired, and the ratio is the median of theirs; `linears_ratio` is the engine over
itself without `serving.pipelines.kernels`. Then `trainer.evaluation.evaluate` judges the shipped adapter on
portraits-v1, on all its people or so many: edits of adapter and base, judges, report.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as peer
from PIL import Image

from fakes.reference_adapters import GOOD
from registry.admission import VerifiedAdapter
from serving.engine import EditEngine
from serving.pipelines import qwen_image_edit
from serving.pipelines.qwen_image_edit import QwenImageEdit
from trainer import recipe as recipes
from trainer.evaluation import evaluate
from trainer.evaluation.bench import Bench
from trainer.evaluation.editing import candidate
from trainer.evaluation.evaluating import Wanted
from trainer.evaluation.gates import thresholds
from trainer.evaluation.judges import judges_of
from trainer.evaluation.plan import plan_of
from trainer.evaluation.suites import of_recipe
from trainer.portraits import base_path
from trainer.portraits.renderer import identity, render

ROUNDS = 3
LEVELS = (0.25, 0.5, 0.75, 1.0)


def by_engine(engine: EditEngine, adapter: VerifiedAdapter, portrait: Image.Image, steps: int) -> int:
    """Edit a person at all intensities, as a suite does."""
    asks = [{}, *({name: level} for name in adapter.card.conditioning.expressions for level in LEVELS)]
    return len(engine.sweep(portrait, adapter, asks, steps=steps))


def by_diffusers(base: QwenImageEdit, adapter: VerifiedAdapter, portrait: Image.Image, steps: int) -> int:
    """Edit the same person as often, a call for each picture; diffusers knows no intensities."""
    spec = adapter.card.conditioning
    words = [spec.neutral, *(name for name in spec.expressions for _ in LEVELS)]
    height, width = base.size
    for word in words:
        base.pipe(
            image=[portrait], prompt=spec.prompt(word), height=height, width=width,
            num_inference_steps=steps, true_cfg_scale=1.0,
        )  # fmt: skip
    return len(words)


def rate(function: Callable[..., int], *arguments: object) -> float:
    """Pictures a second."""
    begun = time.perf_counter()
    return function(*arguments) / (time.perf_counter() - begun)


def engine_against_diffusers(steps: int) -> dict[str, float]:
    """Paired rounds of both, with the same base, adapter and threads."""
    base = QwenImageEdit.load(base_path())
    base.pipe.set_progress_bar_config(disable=True)
    peer.VAE_IMAGE_SIZE, peer.CONDITION_IMAGE_SIZE = base.size[0] * base.size[1], base.condition_pixels**2
    adapter, _ = candidate(GOOD)
    engine = EditEngine(base, base=adapter.card.base, allow_candidates=True)
    engine.attach(adapter)
    portrait = Image.fromarray(render(identity(90_000, "human"), np.zeros(12)))
    by_engine(engine, adapter, portrait, steps)
    rounds = []
    for _ in range(ROUNDS):
        ours = rate(by_engine, engine, adapter, portrait, steps)
        with patch.object(qwen_image_edit, "fast_linears", nullcontext):
            slower = rate(by_engine, engine, adapter, portrait, steps)
        rounds.append((ours, slower, rate(by_diffusers, base, adapter, portrait, steps)))
    return {
        "engine_pictures_s": round(statistics.median(ours for ours, _, _ in rounds), 1),
        "diffusers_pictures_s": round(statistics.median(theirs for _, _, theirs in rounds), 1),
        "ratio": round(statistics.median(ours / theirs for ours, _, theirs in rounds), 2),
        "linears_ratio": round(statistics.median(ours / slower for ours, slower, _ in rounds), 2),
    }


def whole_suite(people: int | None) -> dict[str, float]:
    """Seconds of `trainer.evaluation.evaluate` for one adapter, and where they went by its own progress."""
    recipe = recipes.load("pixelsmile-portraits")
    suite = of_recipe(recipe)
    if people is not None:
        third = people // 3
        suite = suite.model_copy(update={"identities": {"human": people - third, "anime": third}})
    begun = last = time.perf_counter()
    spent = dict[str, float]()

    def progress(stage: str, done: int, total: int, note: str = "") -> None:
        """Count the time since the last word as that of what is now done."""
        nonlocal last
        now = time.perf_counter()
        spent[note] = spent.get(note, 0.0) + now - last
        last = now

    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(
            plan=plan_of(suite, recipe.conditioning), judges=judges_of(suite, Path(folder)), base=recipe.base,
            base_path=base_path(), place=Path(folder) / "measured", progress=progress,
        )  # fmt: skip
        rules = thresholds(recipe.evaluation.thresholds)
        report = evaluate(bench, Wanted(adapter=GOOD, rules=rules), Path(folder) / "report")
    ended = time.perf_counter()
    spent["report"] = ended - last
    pictures = sum(len(one.asks) + len(one.full_strength) for one in bench.plan.subjects)
    return {
        "people": len(bench.plan.subjects), "pictures": pictures, "passed": report.verdict.passed,
        "suite_s": round(ended - begun, 1), "pictures_s": round(pictures / (ended - begun), 1),
        **{f"{name} s": round(seconds, 1) for name, seconds in spent.items()},
    }  # fmt: skip


def main() -> None:
    """Print the line."""
    people = int(sys.argv[1]) if sys.argv[1:] else None
    found = engine_against_diffusers(steps=4)
    print(
        json.dumps(
            {"bench": "evaluation", "threads": torch.get_num_threads(), **found, **whole_suite(people)}
        )
    )


if __name__ == "__main__":
    main()
