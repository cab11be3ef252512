"""The losses by name. One with weight 0 is never called, and what it alone would need is never computed.

A loss gives one value a pair: the mean over both members, 0.5 (L_a + L_b). `combined` divides their sum by
the number of pairs that the loss looks at *in the whole step*, so micro-batches and processes only add up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from trainer.data.batches import Batch, StepPlan
from trainer.sections import LossName, LossSection

if TYPE_CHECKING:
    from serving.pipelines.base import EditPipeline
    from trainer.identity import FeatureNet

Selection = Mapping[LossName, tuple[int, ...]]
"""Which slots of a step each active loss looks at."""


@dataclass(kw_only=True)
class StepOutputs:
    """What a part of a step predicted, and lazily what its losses need of that.

    Attributes:
        batch: what the model was given and what was wanted.
        noisy: the model's input [2P, T, C].
        predicted: its prediction [2P, T, C].
        pipeline: decodes latents and knows the noising process.
        selection: of the whole step.
        features: networks by the name of the loss that looks through them.
        decodes: how many pictures were decoded.
        unseen: pictures in which an encoder found no face.
    """

    batch: Batch
    noisy: torch.Tensor
    predicted: torch.Tensor
    pipeline: EditPipeline
    selection: Selection = field(default_factory=dict)
    features: Mapping[str, FeatureNet] = field(default_factory=dict)
    decodes: int = 0
    unseen: int = 0
    _pixels: torch.Tensor | None = None

    def pairs(self, name: LossName) -> list[int]:
        """Return the pairs of this batch (0..P-1) that a loss looks at, in the order of its selection."""
        place = {slot: pair for pair, slot in enumerate(self.batch.slots)}
        return [place[slot] for slot in self.selection.get(name, ()) if slot in place]

    def pictures(self, name: LossName) -> tuple[list[int], torch.Tensor]:
        """Return rows of the batch that a loss looks at, and their predicted pictures [2n, 3, H, W].

        The first n rows are members a, the last n their members b. Losses share one decode.
        """
        count = len(self.batch.slots)
        wanted = self.pairs(name)
        if not wanted:
            return [], self.predicted.new_empty(0)
        shown = sorted({pair for one in DECODING for pair in self.pairs(one)})
        if self._pixels is None:
            every = shown + [count + pair for pair in shown]
            clean = self.pipeline.process.clean(
                self.noisy[every], self.predicted[every].to(self.noisy), self.batch.sigma[every]
            )
            self._pixels = self.pipeline.decode(clean, self.batch.size).float()
            self.decodes += len(every)
        place = [shown.index(pair) for pair in wanted]
        rows = wanted + [count + pair for pair in wanted]
        return rows, self._pixels[place + [len(shown) + number for number in place]]

    def nothing(self) -> torch.Tensor:
        """Return the value of a loss that has nothing to look at."""
        return self.predicted.new_zeros(0, dtype=torch.float32)


Loss = Callable[[StepOutputs, LossSection], torch.Tensor]
LOSSES: dict[LossName, Loss] = {}
DECODING: frozenset[LossName] = frozenset({"contrastive", "identity", "perceptual"})
"""Losses that look at decoded pictures."""


def loss(name: LossName) -> Callable[[Loss], Loss]:
    """Register a function as the loss ``name`` of recipes."""

    def register(function: Loss) -> Loss:
        LOSSES[name] = function
        return function

    return register


@loss("flow_matching")
def flow_matching(outputs: StepOutputs, settings: LossSection) -> torch.Tensor:
    """Mean squared error of the velocity noise - x_0 (rectified flow, Liu et al., arXiv 2209.03003)."""
    wanted = outputs.pipeline.process.target(outputs.batch.target, outputs.batch.noise, outputs.batch.sigma)
    error = (outputs.predicted.float() - wanted.float()).square().flatten(1).mean(1)
    return halves(error)


def halves(rows: torch.Tensor) -> torch.Tensor:
    """Return the mean of both members [n] of values of rows [2n]."""
    return rows.unflatten(0, (2, -1)).mean(0)


@loss("denoising")
def denoising(outputs: StepOutputs, settings: LossSection) -> torch.Tensor:
    """Mean squared error of epsilon or v (Ho et al., arXiv 2006.11239; Salimans and Ho, arXiv 2202.00512)."""
    return flow_matching(outputs, settings)


@loss("contrastive")
def contrastive(outputs: StepOutputs, settings: LossSection) -> torch.Tensor:
    """Symmetric InfoNCE within each confusing pair, on features of the predicted pictures."""
    rows, pixels = outputs.pictures("contrastive")
    if not rows:
        return outputs.nothing()
    net = outputs.features["contrastive"]
    half = len(rows) // 2
    predicted = net(pixels)
    truth = net.of_truth([outputs.batch.images[row] for row in rows], pixels.device)
    return symmetric_info_nce(
        torch.stack([predicted[:half], predicted[half:]], 1),
        torch.stack([truth[:half], truth[half:]], 1),
        settings.temperature,
    )


def symmetric_info_nce(predicted: torch.Tensor, truth: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the InfoNCE loss [n] of n groups, in both directions (van den Oord et al., arXiv 1807.03748).

    Args:
        predicted: unit vectors [n, k, D]; member i belongs to member i of ``truth``, the others are
            negatives.
        truth: unit vectors [n, k, D].
        temperature: divides the cosines.
    """
    logits = torch.einsum("nid,njd->nij", predicted, truth) / temperature
    groups, members, _ = logits.shape
    right = torch.arange(members, device=logits.device).repeat(groups)
    forward = F.cross_entropy(logits.flatten(0, 1), right, reduction="none")
    backward = F.cross_entropy(logits.transpose(1, 2).flatten(0, 1), right, reduction="none")
    return ((forward + backward) / 2).view(groups, members).mean(1)


@loss("identity")
def identity(outputs: StepOutputs, settings: LossSection) -> torch.Tensor:
    """1 - cosine of the identity embeddings of the predicted and the true picture."""
    rows, pixels = outputs.pictures("identity")
    if not rows:
        return outputs.nothing()
    net = outputs.features["identity"]
    truth = net.of_truth([outputs.batch.images[row] for row in rows], pixels.device)
    return halves(1 - (net(pixels) * truth).sum(-1))


def active(settings: Mapping[LossName, LossSection]) -> dict[LossName, LossSection]:
    """Return the losses that have a weight."""
    return {name: one for name, one in settings.items() if one.weight > 0}


def select(plan: StepPlan, settings: Mapping[LossName, LossSection]) -> dict[LossName, tuple[int, ...]]:
    """Return the slots that each active loss looks at in a step.

    A loss on decoded pictures takes those with a noise level in its range, least noise first, each judged by
    its own level; pairs with a member that keeps the source have nothing to contrast.
    """
    every = tuple(range(len(plan.draws)))
    chosen: dict[LossName, tuple[int, ...]] = {}
    for name, one in active(settings).items():
        chosen[name] = every
        if name in DECODING:
            fit = [
                draw for draw in plan.draws
                if one.min_sigma <= draw.sigma <= one.max_sigma and not any(draw.keeps)
            ]  # fmt: skip
            chosen[name] = tuple(d.slot for d in sorted(fit, key=lambda draw: draw.sigma)[: one.pairs])
    return chosen


def combined(
    outputs: StepOutputs, settings: Mapping[LossName, LossSection]
) -> tuple[torch.Tensor, dict[LossName, torch.Tensor]]:
    """Return this batch's share of the step's weighted loss, and of each active loss without gradient."""
    shares = {
        name: LOSSES[name](outputs, one).sum() / max(1, len(outputs.selection[name]))
        for name, one in active(settings).items()
    }
    total = sum((settings[name].weight * value for name, value in shares.items()), torch.zeros(()))
    return total, {name: value.detach() for name, value in shares.items()}
