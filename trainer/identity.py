"""What the losses look at: who is in a picture and which face they make, as unit vectors with a gradient."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from registry.manifest import Ingredient
from trainer import encoders, onnx_module
from trainer.data.batches import as_pixels
from trainer.sections import LossSection


class FeatureNet:
    """A frozen network that turns pictures into unit vectors; remembers those of the true pictures.

    Args:
        network: from float [N, 3, side, side] in [-1, 1] to [N, D].
        side: size of its input in pixels.
        truth: uint8 [M, H, W, 3], the pictures that `of_truth` is asked about.
        ingredient: what the network is and under which licence; the adapter's card names it.
    """

    def __init__(
        self, network: torch.nn.Module, side: int, truth: np.ndarray, ingredient: Ingredient | None = None
    ) -> None:
        self._network = network.eval().requires_grad_(False)
        self._side, self._truth = side, truth
        self.ingredient = ingredient
        self._known: dict[int, torch.Tensor] = {}

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return unit vectors [N, D] of pictures [N, 3, H, W] in [-1, 1]; differentiable."""
        if pixels.shape[-1] != self._side:
            pixels = F.interpolate(
                pixels, size=(self._side, self._side), mode="bilinear", align_corners=False
            )
        return F.normalize(self._network(pixels.float()), dim=-1, eps=1e-6)

    def of_truth(self, images: Sequence[int], device: torch.device) -> torch.Tensor:
        """Return unit vectors [N, D] of true pictures by row; each is computed once."""
        new = sorted({row for row in images if row not in self._known})
        if new:
            with torch.no_grad():
                found = self(as_pixels(self._truth[new], device))
            self._known.update(zip(new, found, strict=True))
        return torch.stack([self._known[row] for row in images])


def identity_features(truth: np.ndarray, device: torch.device, settings: LossSection) -> FeatureNet:
    """Return the identity encoder that the loss asks for (ArcFace's interface) for gradients.

    Raises:
        BaseModelError: the encoder is not on this machine, or cannot be used for gradients.
        ModelLicenseError: it comes with a licence file that does not hold.
    """
    return _looking_through(encoders.identity(settings.encoder), truth, device)


def expression_features(truth: np.ndarray, device: torch.device, settings: LossSection) -> FeatureNet:
    """Return the labelling judge's features for gradients; the evaluation's is never trained against."""
    return _looking_through(encoders.expression(), truth, device, penultimate=True)


def _looking_through(
    encoder: encoders.Encoder, truth: np.ndarray, device: torch.device, *, penultimate: bool = False
) -> FeatureNet:
    network = onnx_module.load(encoder.file, penultimate=penultimate).to(device)
    return FeatureNet(network, encoder.side, truth, encoder.ingredient)
