"""The losses by name. One with weight 0 is never called, and what it alone would need is never computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from trainer.data.batches import Batch
from trainer.recipe import LossSection

if TYPE_CHECKING:
    from serving.pipelines.base import EditPipeline
    from trainer.identity import FeatureNet


@dataclass(kw_only=True)
class StepOutputs:
    """What a step predicted, and lazily what its losses need of that.

    Attributes:
        batch: what the model was given and what was wanted.
        velocity: prediction [2P, T, C].
        pipeline: decodes latents.
        features: networks by the name of the loss that looks through them.
        selected: pairs (numbers 0..P-1) whose predicted pictures may be decoded, least noise first.
        decodes: how many pictures were decoded.
    """

    batch: Batch
    velocity: torch.Tensor
    pipeline: EditPipeline
    features: Mapping[str, FeatureNet] = field(default_factory=dict)
    selected: list[int] = field(default_factory=list)
    decodes: int = 0
    _pixels: torch.Tensor | None = None

    def rows(self, settings: LossSection) -> tuple[list[int], torch.Tensor]:
        """Return rows of the batch that a loss may look at, and their predicted pictures [2n, 3, H, W].

        The first n rows are members a, the last n their members b. Both are empty if every pair has too much
        noise.
        """
        count = len(self.batch.images) // 2
        pairs = [p for p in self.selected if float(self.batch.sigma[p]) <= settings.max_sigma][
            : settings.pairs
        ]
        if not pairs:
            return [], self.velocity.new_empty(0)
        if self._pixels is None:
            every = self.selected + [count + pair for pair in self.selected]
            sigma = self.batch.sigma[every][:, None, None]
            clean = self.batch.noisy[every] - sigma * self.velocity[every]
            self._pixels = self.pipeline.decode(clean).float()
            self.decodes += len(every)
        place = [self.selected.index(pair) for pair in pairs]
        shown = self._pixels[place + [len(self.selected) + number for number in place]]
        return pairs + [count + pair for pair in pairs], shown


Loss = Callable[[StepOutputs, LossSection], torch.Tensor]
LOSSES: dict[str, Loss] = {}
DECODING = frozenset({"contrastive", "identity"})
"""Losses that look at decoded pictures."""


def loss(name: str) -> Callable[[Loss], Loss]:
    """Register a function as the loss ``name`` of recipes."""

    def register(function: Loss) -> Loss:
        LOSSES[name] = function
        return function

    return register


@loss("flow_matching")
def flow_matching(outputs: StepOutputs, settings: LossSection) -> torch.Tensor:
    """Mean squared error of the velocity noise - x_0 (rectified flow, Liu et al., arXiv 2209.03003)."""
    return F.mse_loss(outputs.velocity.float(), (outputs.batch.noise - outputs.batch.target).float())


@loss("contrastive")
def contrastive(outputs: StepOutputs, settings: LossSection) -> torch.Tensor:
    """Symmetric InfoNCE within each confusing pair, on features of the predicted pictures."""
    rows, pixels = outputs.rows(settings)
    if not rows:
        return outputs.velocity.new_zeros(())
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
    """Return the InfoNCE loss of n groups, in both directions (van den Oord et al., arXiv 1807.03748).

    Args:
        predicted: unit vectors [n, k, D]; member i belongs to member i of ``truth``, the others are
            negatives.
        truth: unit vectors [n, k, D].
        temperature: divides the cosines.
    """
    logits = torch.einsum("nid,njd->nij", predicted, truth) / temperature
    groups, members, _ = logits.shape
    right = torch.arange(members, device=logits.device).repeat(groups)
    forward = F.cross_entropy(logits.flatten(0, 1), right)
    backward = F.cross_entropy(logits.transpose(1, 2).flatten(0, 1), right)
    return (forward + backward) / 2


@loss("identity")
def identity(outputs: StepOutputs, settings: LossSection) -> torch.Tensor:
    """1 - cosine of the identity embeddings of the predicted and the true picture."""
    rows, pixels = outputs.rows(settings)
    if not rows:
        return outputs.velocity.new_zeros(())
    net = outputs.features["identity"]
    truth = net.of_truth([outputs.batch.images[row] for row in rows], pixels.device)
    return (1 - (net(pixels) * truth).sum(-1)).mean()


def active(settings: Mapping[str, LossSection]) -> dict[str, LossSection]:
    """Return the losses that have a weight."""
    return {name: one for name, one in settings.items() if one.weight > 0}


def select_pairs(batch: Batch, settings: Mapping[str, LossSection]) -> list[int]:
    """Return the pairs whose predicted pictures some loss will look at, least noise first.

    Each pair is judged by its own noise level; pairs with a member that keeps the source have nothing to
    contrast.
    """
    looking = [one for name, one in active(settings).items() if name in DECODING]
    if not looking:
        return []
    count = len(batch.images) // 2
    most, highest = max(one.pairs for one in looking), max(one.max_sigma for one in looking)
    sigma = batch.sigma[:count].tolist()
    found = [
        p for p in range(count) if sigma[p] <= highest and not (batch.keeps[p] or batch.keeps[count + p])
    ]
    return sorted(found, key=lambda pair: sigma[pair])[:most]


def combined(
    outputs: StepOutputs, settings: Mapping[str, LossSection]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the weighted sum, and each active loss by name without gradient."""
    parts = {name: LOSSES[name](outputs, one) for name, one in active(settings).items()}
    total = sum(
        (settings[name].weight * value for name, value in parts.items()), outputs.velocity.new_zeros(())
    )
    return total, {name: value.detach() for name, value in parts.items()}
