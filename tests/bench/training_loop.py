"""Our training loop against the published one of PixelSmile: same base, data, losses, samples and noise.

    PYTHONPATH=tests python tests/bench/training_loop.py [--steps 300] [--pairs 4] [--table] [--keep DIR]

Prints one JSON line. First both train ``--steps`` steps: samples a second, and the loss on held-out people
afterwards. Then both get the same time, with a schedule that ends with it, and the portraits suite judges
what came out. ``bench.training.reference`` says what the published loop does. Ours is measured as shipped (at
most ``pairs`` pairs of a step are decoded), and again with every pair that the gates let through.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from bench.training.reference import Eyes, ReferenceLoop
from serving.bases import fingerprint
from serving.memory import keep_freed_memory
from trainer import encoders, lora, onnx_module
from trainer import recipe as recipes
from trainer.data import Dataset, build_triplets, cache_dataset
from trainer.data.batches import TrainingSet
from trainer.data.cache import TensorCache, View, load_base
from trainer.evaluation import evaluate_recipe
from trainer.export import card, export
from trainer.launch import train
from trainer.loop import learning_rate
from trainer.portraits import base_path
from trainer.progress import ConsoleProgress
from trainer.recipe import Recipe
from trainer.scoring import score
from trainer.synthesis import synthesise
from trainer.validation import validation_loss

JUDGED = ("top1_accuracy", "structural_confusion", "control_linearity", "identity_ratio", "paired_psnr")


class Bench:
    """The same base and data for every training."""

    def __init__(self, pairs: int, folder: Path) -> None:
        whole = recipes.load("pixelsmile-portraits")
        self.recipe = changed(whole, "optimiser", batch_pairs=pairs)
        self.folder, self.progress = folder, ConsoleProgress()
        synthesise(whole, folder / "images", self.progress)
        score(whole, folder / "images", folder / "scored", self.progress)
        build_triplets(whole, folder / "images", folder / "scored", folder / "dataset", self.progress)
        self.pipeline = load_base(base_path(), whole)
        cache_dataset(
            whole, folder / "dataset", base_path(), folder / "cache", self.progress, pipeline=self.pipeline
        )
        self.dataset = Dataset.open(folder / "dataset")

    def ours(self, name: str, steps: int, pairs: int | None = None) -> dict[str, Any]:
        """Train by our loop; ``pairs`` overrides how many pairs of a step are decoded."""
        wanted = changed(self.recipe, "optimiser", steps=steps)
        if pairs is not None:
            losses = {
                loss: settings.model_copy(update={"pairs": pairs}) for loss, settings in wanted.losses.items()
            }
            wanted = wanted.model_copy(update={"losses": losses})
        out, place = self.folder / name, self.folder
        started = time.monotonic()
        result = train(
            wanted, place / "dataset", place / "cache", base_path(), out, self.progress,
            pipeline=self.pipeline, track=False,
        )  # fmt: skip
        return {
            "seconds": time.monotonic() - started,
            "samples_per_s": result.facts["samples_per_second"],
            "validation_loss": result.facts["validation_loss"],
            "decodes": result.facts["decodes"],
            "adapter": out / "adapter",
        }

    def theirs(self, name: str, steps: int, dtype: torch.dtype) -> dict[str, Any]:
        """Train by the published loop and export what it has, at full strength."""
        wanted = changed(self.recipe, "optimiser", steps=steps)
        view = View.of(self.pipeline, base_path(), wanted)
        read = (self.dataset, TensorCache(self.folder / "cache"), view, wanted)
        data = TrainingSet(*read)
        with injected(self.pipeline.transformer, wanted) as parameters:
            loop = ReferenceLoop(
                self.pipeline, parameters, eyes(), wanted.losses, dtype, wanted.optimiser.betas
            )
            started = time.monotonic()
            for step in range(steps):
                plan = data.plan(wanted.seed, step, wanted.optimiser.batch_pairs)
                batch = data.batch(plan, range(wanted.optimiser.batch_pairs))
                loss = loop.step(batch, learning_rate(wanted.optimiser, step, steps))
                if step % 10 == 9:
                    self.progress(name, step + 1, steps, f"loss {loss:.4f}")
            seconds = time.monotonic() - started
            held_out = TrainingSet(*read, split="validation")
            validation = validation_loss(self.pipeline, held_out, wanted)
            weights = {key: value.detach().float().clone() for key, value in parameters.items()}
        base = fingerprint(base_path())
        about = card(wanted, weights, self.dataset.digest, base, "Apache-2.0", (), None, steps)
        export(wanted, weights, about, self.folder / name)
        return {
            "seconds": seconds,
            "samples_per_s": round(2 * wanted.optimiser.batch_pairs * steps / seconds, 1),
            "validation_loss": validation,
            "decodes": loop.decodes,
            "adapter": self.folder / name,
        }

    def judged(self, name: str, trained: dict[str, Any]) -> dict[str, float]:
        """Return the suite's figures of an adapter."""
        out = self.folder / f"judged-{name}"
        place = self.folder / "data"
        report = evaluate_recipe(
            self.recipe, trained["adapter"], base_path(), out, progress=self.progress, place=place
        )
        found = report.scalars()
        return {metric: round(found[metric], 4) for metric in JUDGED}


@contextmanager
def injected(transformer: Any, recipe: Recipe) -> Iterator[dict[str, torch.nn.Parameter]]:
    """Put the LoRA layers of peft in, with our starting weights, and take them out again."""
    from peft import LoraConfig

    start = lora.inject(transformer, recipe)
    values = {name: parameter.detach().clone() for name, parameter in start.items()}
    lora.remove(transformer)
    names = [name.removesuffix(".lora_A.weight") for name in values if name.endswith("lora_A.weight")]
    settings = recipe.lora
    transformer.add_adapter(LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=names), "x")
    found = {
        name.replace(".x.weight", ".weight"): parameter
        for name, parameter in transformer.named_parameters()
        if parameter.requires_grad
    }
    try:
        lora.put(found, values)
        yield found
    finally:
        transformer.delete_adapters("x")
        for name in names:
            parent, _, child = name.rpartition(".")
            setattr(
                transformer.get_submodule(parent), child, transformer.get_submodule(name).get_base_layer()
            )
        vars(transformer).pop("peft_config", None)
        transformer._hf_peft_config_loaded = False


def changed(recipe: Recipe, section: str, **values: Any) -> Recipe:
    """Return a recipe with other values in a section."""
    part = getattr(recipe, section).model_copy(update=values)
    return recipe.model_copy(update={section: part})


def eyes(device: str = "cpu") -> Eyes:
    """Return the networks that our own losses look through."""
    expression, face = encoders.expression(), encoders.identity("portraits")
    return Eyes(
        expression=onnx_module.load(expression.file, penultimate=True).to(device),
        face=onnx_module.load(face.file).to(device),
        expression_side=expression.side,
        face_side=face.side,
    )


def measure(bench: Bench, steps: int) -> dict[str, Any]:
    """Return everything that the line says."""
    peer = bench.theirs("published", steps, torch.bfloat16)
    shipped = bench.ours("shipped", steps)
    every = bench.ours("every-pair", steps, pairs=bench.recipe.optimiser.batch_pairs)
    in_time = max(40, int(steps * peer["seconds"] / shipped["seconds"]))
    runs = {
        "published": peer, "shipped": shipped, "every_pair": every,
        "equal_time": bench.ours("equal-time", in_time),
    }  # fmt: skip
    judged = {name: bench.judged(name, runs[name]) for name in ("published", "shipped", "equal_time")}
    return {
        "bench": "trainer",
        "steps": steps,
        "pairs": bench.recipe.optimiser.batch_pairs,
        "ratio": round(shipped["samples_per_s"] / peer["samples_per_s"], 2),
        "ratio_every_pair": round(every["samples_per_s"] / peer["samples_per_s"], 2),
        "runs": {
            name: {
                "samples_per_s": one["samples_per_s"],
                "seconds": round(one["seconds"], 1),
                "validation_loss": one["validation_loss"],
                "decodes": one["decodes"],
            }
            for name, one in runs.items()
        },
        "equal_time_steps": in_time,
        "judged": judged,
    }


def table(line: dict[str, Any]) -> str:
    """Return the figures as Markdown."""
    rows = ["| | samples/s | held-out loss | pictures decoded |", "| --- | --- | --- | --- |"]
    rows += [
        f"| {name} | {one['samples_per_s']} | {one['validation_loss']:.4f} | {one['decodes']} |"
        for name, one in line["runs"].items()
    ]
    rows += ["", "| | " + " | ".join(JUDGED) + " |", "| --- |" + " --- |" * len(JUDGED)]
    rows += [
        f"| {name} | " + " | ".join(f"{one[metric]:.3f}" for metric in JUDGED) + " |"
        for name, one in line["judged"].items()
    ]
    return "\n".join(rows)


def main(arguments: list[str] | None = None) -> None:
    """Measure and print the line."""
    parser = argparse.ArgumentParser(description="Our training loop against the published one.")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--pairs", type=int, default=4, help="pairs in a step; the published batch has 4")
    parser.add_argument("--table", action="store_true", help="write tables to stderr")
    parser.add_argument("--keep", type=Path, help="folder for data and adapters; a temporary one by default")
    asked = parser.parse_args(arguments)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as temporary:
        line = measure(Bench(asked.pairs, asked.keep or Path(temporary)), asked.steps)
    if asked.table:
        print(table(line), file=sys.stderr)
    print(json.dumps(line))


if __name__ == "__main__":
    main()
