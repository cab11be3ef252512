"""The full-size Qwen-Image-Edit transformer on one GPU: training and serving against what is published.

    PYTHONPATH=tests python tests/gpu/full_size.py [--steps 9] [--small] [--only NAME ...] [--serve NAME ...]
        [--out FILE]

``--only`` chooses trainings and ``--serve`` runs of serving (`serving_runs`); without both, everything runs.

Twenty billion random weights are made on the device; pictures are drawn at 512 x 512, four pairs a step,
rank 64, all twelve kinds of modules. Every run trains a few steps through `trainer.launch.train`, with the
product's own placement, cache, losses and loop; its speed is that of the steps after the first third. Prints
one JSON line: step time, peak memory, model FLOP utilisation (FLOP of forward and backward without
recomputation, over the peak of the device's dense bf16), and the ratio to the published loop.

``--small`` does the same with a model of two narrow blocks at 64 x 64, on whatever device there is: it proves
that the script works, and its figures mean nothing.

The auxiliary networks are the small ones that ship with the portraits: what they cost is left out on both
sides, which favours the published loop, that calls them more often.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from random_base import FULL, SMALL, Size, random_base
from serving_runs import SERVED, Service, ratios

from bench.training.reference import ReferenceLoop
from bench.training_loop import eyes, injected
from trainer import recipe as recipes
from trainer.data import Dataset, build_triplets, cache_dataset
from trainer.data.batches import TrainingSet
from trainer.data.cache import TensorCache, View
from trainer.launch import train
from trainer.recipe import Recipe, change
from trainer.scoring import score
from trainer.synthesis import synthesise

PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
"""Dense bf16, from NVIDIA's data sheets."""


RUNS: dict[str, dict[str, Any]] = {
    "whole-batch": {"checkpointing": True},
    "micro-batches": {"micro_pairs": 1},
    "compiled": {"micro_pairs": 1, "compile": True},
    "fp8": {"micro_pairs": 1, "checkpointing": True, "base": "fp8"},
}


class Stand:
    """Model, data and cache that every run shares."""

    def __init__(self, size: Size, steps: int, folder: Path) -> None:
        self.size, self.folder = size, folder
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        self.recipe = self._recipe(steps)
        self.base = folder / "base"
        self.pipeline = random_base(size, self.device, self.dtype, self.base)
        self._data()

    def _recipe(self, steps: int) -> Recipe:
        """The portraits' recipe with the sizes of this stand."""
        found = recipes.load("pixelsmile-portraits")
        size = self.size
        return change(
            found,
            {
                "data.identities": {"human": 3},
                "data.validation": {"human": 1},
                "data.intensities": [0.5, 1.0],
                "data.size": size.pixels,
                "data.filters": {"min_score": 0.0},
                "lora.rank": size.rank,
                "lora.alpha": 2.0 * size.rank,
                "optimiser.steps": steps,
                "optimiser.warmup_steps": 1,
                "optimiser.batch_pairs": size.pairs,
                "optimiser.learning_rate": 1e-4,
                "running.log_every": max(1, steps // 3),
                "running.checkpoint_every": 10 * steps,
            },
        )

    def _data(self) -> None:
        recipe, place = self.recipe, self.folder
        synthesise(recipe, place / "images")
        score(recipe, place / "images", place / "scored")
        build_triplets(recipe, place / "images", place / "scored", place / "dataset")
        cache_dataset(recipe, place / "dataset", self.base, place / "cache", pipeline=self.pipeline)

    def ours(self, name: str, options: dict[str, Any]) -> dict[str, Any]:
        """Train by our loop with some of `running` and the base's precision changed."""
        running = {key: value for key, value in options.items() if key != "base"}
        recipe = self.recipe.model_copy(
            update={
                "running": self.recipe.running.model_copy(update=running),
                "precision": self.recipe.precision.model_copy(
                    update={"base": options.get("base", "auto"), "compute": "auto"}
                ),
            }
        )
        marks: list[tuple[int, float]] = []

        def note(stage: str, done: int, total: int, text: str = "") -> None:
            self._wait()
            marks.append((done, time.perf_counter()))

        place = self.folder
        self._reset()
        train(
            recipe, place / "dataset", place / "cache", self.base, place / name, note,
            pipeline=self.pipeline, track=False,
        )  # fmt: skip
        (first, begun), (last, ended) = marks[0], marks[-1]
        return self._facts((ended - begun) / (last - first))

    def theirs(self, dtype: torch.dtype) -> dict[str, Any]:
        """Train by the published loop, with the checkpointing that its recipe has on."""
        recipe, pairs = self.recipe, self.size.pairs
        read = (Dataset.open(self.folder / "dataset"), TensorCache(self.folder / "cache"))
        data = TrainingSet(*read, View.of(self.pipeline, self.base, recipe), recipe, device=self.device)
        self._reset()
        seconds = []
        transformer: Any = self.pipeline.transformer
        transformer.enable_gradient_checkpointing()
        try:
            with injected(transformer, recipe) as parameters:
                loop = ReferenceLoop(
                    self.pipeline, parameters, eyes(self.device), recipe.losses, dtype, recipe.optimiser.betas
                )
                transformer.train()
                for step in range(recipe.optimiser.steps or 1):
                    started = time.perf_counter()
                    loop.step(data.batch(data.plan(recipe.seed, step, pairs), range(pairs)), 1e-4)
                    self._wait()
                    seconds.append(time.perf_counter() - started)
        finally:
            transformer.eval()
            transformer.disable_gradient_checkpointing()
        return self._facts(statistics.median(seconds[len(seconds) // 3 :]))

    def _facts(self, seconds: float) -> dict[str, Any]:
        facts: dict[str, Any] = {
            "step_s": round(seconds, 3),
            "samples_per_s": round(2 * self.size.pairs / seconds, 2),
        }
        if self.device == "cuda":
            facts["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
            name = torch.cuda.get_device_name()
            peak = next((value for key, value in PEAK_FLOPS.items() if key in name), None)
            if peak is not None:
                facts["utilisation"] = round(self.step_flop() / seconds / peak, 3)
        return facts

    def step_flop(self) -> float:
        """FLOP of forward and backward of the full-size transformer in a step, without recomputation."""
        from serving.plan import bases
        from trainer.plan.reckoning import reckon

        whole = recipes.load("pixelsmile")
        optimiser = whole.optimiser.model_copy(update={"batch_pairs": self.size.pairs})
        step = reckon(
            whole.model_copy(update={"optimiser": optimiser}),
            bases.load(whole.base, None),
            triplets=1,
            gpus=1,
        ).step
        return float(step.forward + step.backward)

    def _reset(self) -> None:
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def attempt(name: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what a run measured, or why it ended; one that fails leaves the others their time."""
    print(f"{name} …", file=sys.stderr, flush=True)
    try:
        found = run()
    except Exception as error:
        traceback.print_exc()
        found = {"failed": f"{type(error).__name__}: {error}"[:300]}
    print(f"{name}: {found}", file=sys.stderr, flush=True)
    return found


def trained(size: Size, steps: int, wanted: list[str]) -> dict[str, Any]:
    """Train by our loop in each way, and by the published one."""
    with tempfile.TemporaryDirectory() as temporary:
        stand = Stand(size, steps, Path(temporary))
        runs = {
            name: attempt(name, lambda name=name: stand.ours(name, RUNS[name]))  # type: ignore[misc]
            for name in RUNS
            if name in wanted and name != "fp8"
        }
        if "published" in wanted:
            runs["published"] = attempt("published", lambda: stand.theirs(torch.bfloat16))
        if "fp8" in wanted:  # last: the base does not come back from eight bits
            runs["fp8"] = attempt("fp8", lambda: stand.ours("fp8", RUNS["fp8"]))
        count = sum(p.numel() for p in stand.pipeline.transformer.parameters())
    found: dict[str, Any] = {"parameters": count, "runs": runs}
    peer = runs.get("published", {}).get("step_s")
    if peer:
        found["ratios"] = {
            name: round(peer / one["step_s"], 2) for name, one in runs.items() if one.get("step_s")
        }
    return found


def served(size: Size, steps: int, wanted: list[str]) -> dict[str, Any]:
    """Serve on the same base: each run of `serving_runs` that is wanted, in its order."""
    with tempfile.TemporaryDirectory() as temporary:
        service = Service(size, steps, Path(temporary))
        runs = {name: attempt(name, run) for name, run in service.runs().items() if name in wanted}
    return {"runs": runs, "ratios": ratios(runs)}


def main(arguments: list[str] | None = None) -> None:
    """Measure and print the line."""
    ours = [*RUNS, "published"]
    parser = argparse.ArgumentParser(description="The full-size transformer on one GPU.")
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--small", action="store_true", help="a tiny model: proves that the script works")
    parser.add_argument("--only", action="append", choices=ours, help="trainings to do")
    parser.add_argument("--serve", action="append", choices=SERVED, help="runs of serving to do")
    parser.add_argument("--out", type=Path, help="also write the line to this file")
    asked = parser.parse_args(arguments)
    everything = not asked.only and not asked.serve
    size = SMALL if asked.small else FULL
    line: dict[str, Any] = {
        "bench": "full-size",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "small": asked.small,
    }
    if asked.serve or everything:
        line["serving"] = served(size, asked.steps, asked.serve or list(SERVED))
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if asked.only or everything:
        line |= trained(size, asked.steps, asked.only or ours)
    text = json.dumps(line)
    if asked.out:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(text + "\n", "utf-8")
    print(text)


if __name__ == "__main__":
    main()
