"""The losses by name. One with weight 0 is never called, and what it alone would need is never computed.

A loss gives one value a pair: the mean over both members, 0.5 (L_a + L_b). `combined` divides their sum by
the number of pairs that the loss looks at *in the whole step*, so micro-batches and processes only add up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from trainer.data.batches import Batch, Draw, StepPlan
from trainer.sections import LossName, LossSection

if TYPE_CHECKING:
    from serving.pipelines.base import EditPipeline, Size
    from trainer.identity import FeatureNet
    from trainer.perceptual import PerceptualNet

DECODED_AT_ONCE: Final = 1 << 19
"""Pixels of predicted pictures that are decoded together: two of 512 x 512."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """What the losses look at in a step, over all processes.

    Attributes:
        slots: which slots each active loss looks at.
        unseen: slots of the true pictures that were looked at and show no face, one for each; None if no loss
            takes faces.
    """

    slots: Mapping[LossName, tuple[int, ...]] = field(default_factory=dict)
    unseen: tuple[int, ...] | None = None


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
        checkpointing: decode again in the backward pass instead of keeping what the decoder computed.
        snr_gamma: of the denoising loss; see `trainer.sections.NoiseSection`.
        decodes: how many pictures were decoded.
    """

    batch: Batch
    noisy: torch.Tensor
    predicted: torch.Tensor
    pipeline: EditPipeline
    selection: Selection = field(default_factory=Selection)
    features: Mapping[str, FeatureNet | PerceptualNet] = field(default_factory=dict)
    checkpointing: bool = False
    snr_gamma: float = 0.0
    decodes: int = 0
    _pixels: torch.Tensor | None = None

    @property
    def unseen(self) -> int | None:
        """How many of the batch's true pictures show no face where a loss takes one; None if none does."""
        found = self.selection.unseen
        return None if found is None else sum(slot in self.batch.slots for slot in found)

    def pairs(self, name: LossName) -> list[int]:
        """Return the pairs of this batch (0..P-1) that a loss looks at, in the order of its selection."""
        place = {slot: pair for pair, slot in enumerate(self.batch.slots)}
        return [place[slot] for slot in self.selection.slots.get(name, ()) if slot in place]

    def pictures(self, name: LossName) -> tuple[list[int], torch.Tensor]:
        """Return what a loss looks at: rows of the dataset, and the predictions of them [2n, 3, H, W].

        The first n are members a, the last n their members b. Losses share one decode.
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
            self._pixels = torch.cat([self._decoded(part) for part in clean.split(self._at_once())])
            self.decodes += len(every)
        place = [shown.index(pair) for pair in wanted]
        rows = [self.batch.images[row] for row in wanted + [count + pair for pair in wanted]]
        return rows, self._pixels[place + [len(shown) + number for number in place]]

    def _at_once(self) -> int:
        height, width = self.batch.size
        return max(1, DECODED_AT_ONCE // (height * width))

    def _decoded(self, clean: torch.Tensor) -> torch.Tensor:
        """Return pictures [N, 3, H, W] of latents [N, T, C]."""
        pipeline, size = self.pipeline, self.batch.size
        if self.checkpointing and torch.is_grad_enabled():
            again = checkpoint(pipeline.decode, clean, size, use_reentrant=False, preserve_rng_state=False)
            return again.float()  # type: ignore[no-any-return]
        return pipeline.decode(clean, size).float()

    def nothing(self) -> torch.Tensor:
        """Return the values of no pair; their sum has a gradient, of zeros."""
        return self.predicted.flatten()[:0].float()


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
    return halves(squared_error(outputs))


@loss("denoising")
def denoising(outputs: StepOutputs, settings: LossSection) -> torch.Tensor:
    """Mean squared error of epsilon or v (Ho et al., arXiv 2006.11239; Salimans and Ho, arXiv 2202.00512)."""
    error = squared_error(outputs)
    if outputs.snr_gamma:
        process = outputs.pipeline.process
        error = error * min_snr(
            process.snr(outputs.batch.sigma.float()), outputs.snr_gamma, process.prediction
        )
    return halves(error)


def squared_error(outputs: StepOutputs) -> torch.Tensor:
    """Return the mean squared error of each row [2P] of what the noising process asks the model for."""
    wanted = outputs.pipeline.process.target(outputs.batch.target, outputs.batch.noise, outputs.batch.sigma)
    return (outputs.predicted.float() - wanted.float()).square().flatten(1).mean(1)


def min_snr(snr: torch.Tensor, gamma: float, prediction: str) -> torch.Tensor:
    """Return the weight of samples by their signal-to-noise ratio (min-SNR, Hang et al., arXiv 2303.09556).

    The weight of the error in x_0 is clipped at gamma. An error in epsilon is 1 / SNR, one in v 1 / (SNR + 1)
    of it, so the weights are min(SNR, gamma) / SNR and min(SNR, gamma) / (SNR + 1). Only v may have SNR 0.
    """
    return snr.clamp(max=gamma) / (snr if prediction == "epsilon" else snr + 1)


def halves(rows: torch.Tensor) -> torch.Tensor:
    """Return the mean of both members [n] of values of rows [2n]."""
    return rows.unflatten(0, (2, -1)).mean(0)


@loss("contrastive")
def contrastive(outputs: StepOutputs, settings: LossSection) -> torch.Tensor:
    """Symmetric InfoNCE within each confusing pair, on features of the predicted pictures."""
    rows, pixels = outputs.pictures("contrastive")
    if not rows:
        return outputs.nothing()
    net = outputs.features["contrastive"]
    half = len(rows) // 2
    predicted = net(pixels, rows)
    truth = net.of_truth(rows, outputs.batch.size, pixels.device)
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
    """1 - cosine of the identity embeddings of the predicted and the true picture.

    A member whose true picture shows no face is left out: the pair's value is that of the other.
    """
    rows, pixels = outputs.pictures("identity")
    if not rows:
        return outputs.nothing()
    net, size = outputs.features["identity"], outputs.batch.size
    seen = [place for place, row in enumerate(rows) if net.sees(row, size)]
    if not seen:
        return outputs.nothing()
    kept = [rows[place] for place in seen]
    away = 1 - (net(pixels[seen], kept) * net.of_truth(kept, size, pixels.device)).sum(-1)
    places = torch.tensor(seen, device=pixels.device)
    none = pixels.new_zeros(len(rows))
    members = halves(none.index_fill(0, places, 1)).clamp(min=0.5)
    return halves(none.index_put((places,), away)) / members


@loss("perceptual")
def perceptual(outputs: StepOutputs, settings: LossSection) -> torch.Tensor:
    """Perceptual distance of the predicted and the true picture (LPIPS, Zhang et al., arXiv 1801.03924)."""
    rows, pixels = outputs.pictures("perceptual")
    if not rows:
        return outputs.nothing()
    return halves(outputs.features["perceptual"].distance(pixels, rows))


def active(settings: Mapping[LossName, LossSection]) -> dict[LossName, LossSection]:
    """Return the losses that have a weight."""
    return {name: one for name, one in settings.items() if one.weight > 0}


def select(
    plan: StepPlan,
    settings: Mapping[LossName, LossSection],
    features: Mapping[str, FeatureNet | PerceptualNet] = MappingProxyType({}),
) -> Selection:
    """Return what each active loss looks at in a step; the same in every process, and in a resumed run.

    A loss on decoded pictures takes pairs with a noise level in its range, least noise first, each judged by
    its own level. Those with a member that keeps the source have nothing to contrast, and those whose true
    pictures both show no face nothing to look at.
    """
    chosen: dict[LossName, tuple[int, ...]] = {}
    unseen: list[int] = []
    for name, one in active(settings).items():
        draws, net = plan.draws, features.get(name)
        if name in DECODING:
            fit = (d for d in draws if one.min_sigma <= d.sigma <= one.max_sigma and not any(d.keeps))
            draws = tuple(islice(_shown(sorted(fit, key=_level), plan.size, net, unseen), one.pairs))
        chosen[name] = tuple(draw.slot for draw in draws)
    takes_faces = any(net.takes_faces for net in features.values())
    return Selection(slots=chosen, unseen=tuple(unseen) if takes_faces else None)


def _level(draw: Draw) -> float:
    return draw.sigma


def _shown(
    draws: Iterable[Draw], size: Size, net: FeatureNet | PerceptualNet | None, unseen: list[int]
) -> Iterator[Draw]:
    """Yield the pairs of which at least one true picture can be looked at; add the others to ``unseen``."""
    for draw in draws:
        rows = (draw.triplet.a.image, draw.triplet.b.image)
        blind = [row for row in rows if net is not None and not net.sees(row, size)]
        unseen += [draw.slot] * len(blind)
        if len(blind) < len(rows):
            yield draw


def combined(
    outputs: StepOutputs, settings: Mapping[LossName, LossSection]
) -> tuple[torch.Tensor, dict[LossName, torch.Tensor]]:
    """Return this batch's share of the step's weighted loss, and of each active loss without gradient."""
    shares = {
        name: LOSSES[name](outputs, one).sum() / max(1, len(outputs.selection.slots[name]))
        for name, one in active(settings).items()
    }
    total = sum((settings[name].weight * value for name, value in shares.items()), torch.zeros(()))
    return total, {name: value.detach() for name, value in shares.items()}
