"""What a training is like on people that it does not train on: losses, and grids that people look at.

Both are made with the weights as they are and with their average. Nothing here draws from a random state that
the training uses, so a training that is looked at is the same training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from serving.pipelines.base import EditPipeline, to_images
from trainer import lora
from trainer.data.batches import TrainingSet
from trainer.losses import StepOutputs, flow_matching
from trainer.sections import LossSection
from trainer.tracking import Tracker

if TYPE_CHECKING:
    from PIL import Image

    from trainer.recipe import Recipe

PAIRS = 16
_AT_ONCE = 12


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Looks at a training from outside.

    Attributes:
        pipeline: the base with the LoRA that is trained.
        data: the validation split.
        recipe: of the training.
        folder: gets ``step-000100-raw.png`` and ``step-000100-ema.png``.
        tracker: takes the same.
        writes: whether this process writes; all processes compute, for the base may be spread over them.
    """

    pipeline: EditPipeline
    data: TrainingSet
    recipe: Recipe
    folder: Path
    tracker: Tracker
    writes: bool

    def losses(
        self, parameters: Mapping[str, torch.nn.Parameter], average: Mapping[str, torch.Tensor]
    ) -> dict[str, float]:
        """Return the prediction's loss, raw and of the average; the same samples every time."""
        found = {"validation_loss": validation_loss(self.pipeline, self.data, self.recipe)}
        with held(parameters, average):
            found["validation_loss_ema"] = validation_loss(self.pipeline, self.data, self.recipe)
        return found

    def look(
        self,
        step: int,
        parameters: Mapping[str, torch.nn.Parameter],
        average: Mapping[str, torch.Tensor],
    ) -> None:
        """Measure and draw after ``step`` steps."""
        self.tracker.metrics(step, self.losses(parameters, average))
        self._draw(step, "raw")
        with held(parameters, average):
            self._draw(step, "ema")

    def _draw(self, step: int, which: str) -> None:
        image = self._grid(f"{self.recipe.name}, step {step}", f"{which} weights, a person of the validation")
        if self.writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            image.save(self.folder / f"step-{step:06d}-{which}.png", "PNG")
            self.tracker.picture(step, f"validation-{which}", image)

    @torch.no_grad()
    def _grid(self, title: str, subtitle: str) -> Image.Image:
        """Draw every expression of one person at rising intensity."""
        import numpy as np

        from trainer.evaluation.sheets import intensity_strip
        from trainer.evaluation.suites import of_recipe

        spec = self.recipe.conditioning
        source = self.data.triplets[0].source
        levels = [level for level in (0.0, 0.25, 0.5, 0.75, 1.0) if level <= spec.strength_max]
        asked = [(name, level) for name in spec.expressions for level in levels]
        pictures: list[Image.Image] = []
        for begin in range(0, len(asked), _AT_ONCE):
            part = asked[begin : begin + _AT_ONCE]
            size, latents, prompts = self.data.ask(
                [source] * len(part), [name for name, _ in part], [level for _, level in part]
            )
            edited = self.pipeline.denoise(
                latents,
                prompts,
                seeds=[self.recipe.seed] * len(part),
                steps=of_recipe(self.recipe).steps,
                size=size,
            )
            pictures += to_images(self.pipeline.decode(edited, size))
        cells = iter(np.asarray(picture) for picture in pictures)
        strips = [(name, [next(cells) for _ in levels]) for name in spec.expressions]
        return intensity_strip(strips, levels, title=title, subtitle=subtitle).image()


@contextmanager
def held(parameters: Mapping[str, torch.nn.Parameter], values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Give the parameters other values for a while."""
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    lora.put(parameters, values)
    try:
        yield
    finally:
        lora.put(parameters, before)


@torch.no_grad()
def validation_loss(pipeline: EditPipeline, data: TrainingSet, recipe: Recipe) -> float:
    """Return the prediction's mean squared error on the validation split; the same samples every time."""
    plan = data.plan(recipe.seed, -1, PAIRS)
    at_once = recipe.running.micro_pairs or PAIRS
    total = 0.0
    for begin in range(0, PAIRS, at_once):
        batch = data.batch(plan, range(begin, min(PAIRS, begin + at_once)))
        noisy = pipeline.process.noisy(batch.target, batch.noise, batch.sigma)
        predicted = pipeline.predict(noisy, batch.source, batch.prompts, batch.sigma, batch.size)
        outputs = StepOutputs(batch=batch, noisy=noisy, predicted=predicted, pipeline=pipeline)
        total += float(flow_matching(outputs, LossSection(weight=1.0)).sum())
    return round(total / PAIRS, 6)
