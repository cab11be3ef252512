"""Denoising a step at a time, so that pictures that began at different times go through the model together.

A step takes one noise level for each row, so rows need not be equally far: one that has just begun joins
those that are half done. What a row becomes does not depend on its company, up to the rounding of sums.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from serving.pipelines.base import OnStep, PromptEmbeds, Size
from serving.pipelines.kernels import fast_linears


@dataclass(kw_only=True, slots=True, eq=False)
class Denoising:
    """N pictures that began together.

    Attributes:
        latents: [N, T, C], as they are now.
        image_latents: of the source pictures [N, T, C].
        prompts: N of them.
        levels: the noise levels of the steps, 1 to 0, one more than there are steps; where a family's own
            scheduler knows them, its timesteps and a last one that nobody reads.
        size: height and width.
        step: steps that are done.
        clean: latents of the picture that the last step headed for.
        scheduler: the family's own, in the state of this run.
        sources: random numbers of each row, for schedulers that add noise on the way.
    """

    latents: torch.Tensor
    image_latents: torch.Tensor
    prompts: PromptEmbeds
    levels: tuple[float, ...]
    size: Size
    step: int = 0
    clean: torch.Tensor | None = None
    scheduler: Any = None
    sources: list[torch.Generator] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def steps(self) -> int:
        """How many steps it takes."""
        return len(self.levels) - 1

    @property
    def done(self) -> bool:
        """Whether the picture is finished."""
        return self.step >= self.steps

    @property
    def shape(self) -> Hashable:
        """What has to be equal for runs to share a step: the size, and the length of the prompts."""
        return (self.size, self.prompts.embeds.shape[1])

    @property
    def level(self) -> float:
        """The noise level of the next step."""
        return self.levels[self.step]


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """The rows of several runs, one after another; ``level`` [N] is that of the next step of each."""

    latents: torch.Tensor
    image_latents: torch.Tensor
    prompts: PromptEmbeds
    level: torch.Tensor
    size: Size

    @classmethod
    def of(cls, runs: Sequence[Denoising]) -> Batch:
        """Put runs together that have one shape."""
        first = runs[0]
        assert all(run.shape == first.shape for run in runs)
        levels = [run.level for run in runs for _ in range(len(run))]
        return cls(
            latents=_joined([run.latents for run in runs]),
            image_latents=_joined([run.image_latents for run in runs]),
            prompts=PromptEmbeds.join([run.prompts for run in runs]),
            level=torch.tensor(levels, dtype=first.latents.dtype, device=first.latents.device),
            size=first.size,
        )


class Stepwise(ABC):
    """The part of an `EditPipeline` that denoises, from how a family begins and what one step of it is."""

    @abstractmethod
    def begin(
        self,
        image_latents: torch.Tensor,
        prompts: PromptEmbeds,
        *,
        seeds: Sequence[int],
        steps: int,
        size: Size | None = None,
        shift: float | None = None,
    ) -> Denoising:
        """See `EditPipeline`."""

    @abstractmethod
    def predicted(self, batch: Batch) -> torch.Tensor:
        """What the model says of each row [N, T, C], as it is asked at inference."""

    @abstractmethod
    def follow(self, run: Denoising, predicted: torch.Tensor) -> None:
        """Take one step of a run by what the model said of it."""

    def batch(self, runs: Sequence[Denoising]) -> Batch:
        """The model's inputs for the next step of some runs."""
        return Batch.of(runs)

    @torch.no_grad()
    def advance(self, runs: Sequence[Denoising]) -> None:
        """See `EditPipeline`."""
        batch = self.batch(runs)
        with fast_linears():
            predicted = self.predicted(batch)
        for run, part in zip(runs, torch.split(predicted, [len(run) for run in runs]), strict=True):
            self.follow(run, part)
            run.step += 1

    @torch.no_grad()
    def denoise(
        self,
        image_latents: torch.Tensor,
        prompts: PromptEmbeds,
        *,
        seeds: Sequence[int],
        steps: int,
        on_step: OnStep | None = None,
        size: Size | None = None,
    ) -> torch.Tensor:
        """See `EditPipeline`."""
        run = self.begin(image_latents, prompts, seeds=seeds, steps=steps, size=size)
        while not run.done:
            self.advance([run])
            if on_step is not None and not on_step(run.step - 1, run.latents):
                break
        return run.latents


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
