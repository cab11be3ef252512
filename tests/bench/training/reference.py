"""PixelSmile's published training loop, written anew from a description of its behaviour.

It does per step what that loop does, where the two ways of training differ:

- two forward passes, one for each member of the pairs;
- every predicted and every true picture is decoded, in every step, whatever the losses need;
- features of the true pictures are computed again in every step;
- the face encoder sees picture after picture, its own weights get gradients, and so do the true pictures';
- the identity loss is switched for the whole batch by the noise level of its first pair;
- weights, gradients and moments of the LoRA have the dtype that is asked for, bf16 as published;
- numbers are read back from the device for the log in every step; there is no average of the weights.

As published it cannot finish a step: a reshape raises, its library no longer takes some of its arguments, and
it reports to a tracker called "None". That is repaired here. Samples, noise, noise levels, learning rates and
loss weights are those of our own loop, so that only the loop differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from serving.pipelines.base import EditPipeline
from trainer.data.batches import Batch
from trainer.losses import symmetric_info_nce
from trainer.sections import LossSection


@dataclass(frozen=True, kw_only=True)
class Eyes:
    """The networks that the losses look through, on pictures [N, 3, H, W] in [-1, 1].

    Attributes:
        expression: features for the contrastive loss, at ``expression_side`` pixels.
        face: identity embedding, at ``face_side`` pixels; its weights get gradients, as published.
    """

    expression: torch.nn.Module
    face: torch.nn.Module
    expression_side: int
    face_side: int


class ReferenceLoop:
    """One training of LoRA weights by the published way.

    Args:
        pipeline: the base, with LoRA layers in its transformer.
        parameters: the LoRA weights; they are cast to ``dtype``.
        eyes: for the losses.
        losses: weights, temperature, and the noise level up to which the identity loss is on.
        dtype: of weights, gradients and moments.
    """

    def __init__(
        self,
        pipeline: EditPipeline,
        parameters: Mapping[str, torch.nn.Parameter],
        eyes: Eyes,
        losses: Mapping[str, LossSection],
        dtype: torch.dtype,
        betas: tuple[float, float],
    ) -> None:
        self.pipeline, self.eyes, self.losses = pipeline, eyes, losses
        self.parameters = parameters
        for parameter in parameters.values():
            parameter.data = parameter.data.to(dtype)
        eyes.face.requires_grad_(True)
        eyes.expression.requires_grad_(False)
        self.optimiser = torch.optim.AdamW(parameters.values(), lr=1.0, betas=betas, weight_decay=0.0)
        self.decodes = 0

    def step(self, batch: Batch, rate: float) -> float:
        """Train on a batch of P pairs and return its loss."""
        pairs = len(batch.images) // 2
        members = [self._member(batch, slice(0, pairs)), self._member(batch, slice(pairs, None))]
        flow = sum(F.mse_loss(v.float(), t.float()) for v, t, _, _ in members) / 2
        seen = torch.cat([picture for _, _, picture, _ in members])
        truth = torch.cat([picture for _, _, _, picture in members])
        total = flow + self.losses["contrastive"].weight * self._contrastive(seen, truth)
        face = self._identity(seen, truth)
        if float(batch.sigma[0].item()) <= self.losses["identity"].max_sigma:
            total = total + self.losses["identity"].weight * face
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        for value in (flow, face):
            value.item()
        return float(total.item())

    def _member(self, batch: Batch, rows: slice) -> tuple[torch.Tensor, ...]:
        """Return prediction, its target, the predicted picture and the true one of one member."""
        clean, noise, level = batch.target[rows], batch.noise[rows], batch.sigma[rows]
        process = self.pipeline.process
        noisy = process.noisy(clean, noise, level)
        predicted = self.pipeline.predict(
            noisy, batch.source[rows], batch.prompts.rows(rows), level, batch.size
        )
        picture = self.pipeline.decode(process.clean(noisy, predicted, level), batch.size).float()
        with torch.no_grad():
            truth = self.pipeline.decode(clean, batch.size).float()
        self.decodes += 2 * len(clean)
        return predicted, process.target(clean, noise, level), picture, truth

    def _contrastive(self, seen: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        found, wanted = (
            F.normalize(self.eyes.expression(_resized(pictures, self.eyes.expression_side)), dim=-1, eps=1e-6)
            .unflatten(0, (2, -1))
            .transpose(0, 1)
            for pictures in (seen, truth)
        )
        return symmetric_info_nce(found, wanted, self.losses["contrastive"].temperature).mean()

    def _identity(self, seen: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        """One picture at a time, and the true ones with a graph of their own."""
        cosines = []
        for one, other in zip(seen, truth, strict=True):
            found, wanted = (
                F.normalize(self.eyes.face(_resized(picture[None], self.eyes.face_side)), dim=-1, eps=1e-6)
                for picture in (one, other)
            )
            cosines.append((found * wanted).sum())
        return (1 - torch.stack(cosines)).mean()


def _resized(pictures: torch.Tensor, side: int) -> torch.Tensor:
    if pictures.shape[-1] == side:
        return pictures
    return F.interpolate(pictures, size=(side, side), mode="bilinear", align_corners=False)
