"""What the losses look at: who is in a picture and which face they make, as unit vectors with a gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
import torch.nn.functional as F

from serving.pipelines.base import Size
from trainer import encoders, onnx_module
from trainer.data.batches import as_pixels
from trainer.sections import LossSection

if TYPE_CHECKING:
    from registry.digest import Digest

_REMEMBERED: Final = 1 << 16
"""That many vectors of true pictures are kept: 512 numbers each are 128 MiB."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Truth:
    """The true pictures of a dataset, read when they are looked at.

    Attributes:
        fitted: from rows of the dataset and a size to their pictures as they are trained at that size, uint8
            [N, H, W, 3].
        digests: of every picture, for messages.
    """

    fitted: Callable[[Sequence[int], Size], np.ndarray]
    digests: Sequence[Digest]

    def pixels(self, rows: Sequence[int], size: Size, device: torch.device) -> torch.Tensor:
        """Return pictures [N, 3, H, W] in [-1, 1]."""
        return as_pixels(self.fitted(rows, size), device)


class FeatureNet:
    """A frozen network that turns pictures into unit vectors; remembers those of the true pictures.

    Args:
        network: from float [N, 3, side, side] in [-1, 1] to [N, D].
        side: size of its input in pixels; 0 takes pictures as they are.
        truth: the pictures that `of_truth` is asked about.
        encoder: names what the adapter's card says about the network.

    Attributes:
        ingredients: what the network is and under which licence; the adapter's card names it.
        takes_faces: whether it looks at a face in the picture, and only at true pictures that show one.
    """

    takes_faces = False

    def __init__(
        self, network: torch.nn.Module, side: int, truth: Truth, encoder: encoders.Encoder | None = None
    ) -> None:
        self._network = network.eval().requires_grad_(False)
        self._side, self._truth = side, truth
        self.ingredients = () if encoder is None else encoder.ingredients
        self._known: dict[tuple[int, Size], torch.Tensor] = {}

    def __call__(self, pixels: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """Return unit vectors [N, D] of pictures [N, 3, H, W] in [-1, 1]; differentiable.

        Args:
            pixels: the pictures.
            rows: the true picture that each is meant to be; `sees` says whether one can be looked at.
        """
        return F.normalize(self._network(self._input(pixels.float())), dim=-1, eps=1e-6)

    def sees(self, row: int, size: Size) -> bool:
        """Return whether there is something to look at in a true picture; always, unless it takes a face."""
        return True

    def of_truth(self, rows: Sequence[int], size: Size, device: torch.device) -> torch.Tensor:
        """Return unit vectors [N, D] of true pictures by row; each is computed once, and by itself.

        Together with others it would be rounded otherwise, and a resumed run would not be the same run.
        """
        for row in sorted({row for row in rows if (row, size) not in self._known}):
            with torch.no_grad():
                self._known[row, size] = self(self._truth.pixels([row], size, device), [row])[0]
        vectors = torch.stack([self._known[row, size] for row in rows])
        while len(self._known) > _REMEMBERED:
            del self._known[next(iter(self._known))]
        return vectors

    def _input(self, pixels: torch.Tensor) -> torch.Tensor:
        side = (self._side, self._side)
        if not self._side or pixels.shape[-2:] == side:
            return pixels
        return F.interpolate(pixels, size=side, mode="bilinear", antialias=True)


def identity_features(truth: Truth, device: torch.device, settings: LossSection) -> FeatureNet:
    """Return the identity encoder that the loss asks for (ArcFace's interface) for gradients.

    Raises:
        BaseModelError: the encoder is not on this machine, or cannot be used for gradients.
        ModelLicenseError: it comes with a licence file that does not hold.
    """
    encoder = encoders.identity(settings.encoder)
    network = onnx_module.load(encoder.file).to(device)
    if encoder.detector is None:
        return FeatureNet(network, encoder.side, truth, encoder)
    from trainer.faces import Detector, FaceNet

    return FaceNet(network, Detector(encoder.detector), truth, encoder)


def contrastive_features(truth: Truth, device: torch.device, settings: LossSection) -> FeatureNet:
    """Return the encoder of pictures that the contrastive loss asks for, for gradients.

    "portraits" is the last but one layer of the labelling judge; the evaluation's is never trained against.

    Raises:
        BaseModelError: the encoder is not on this machine, or its files are damaged.
    """
    encoder = encoders.contrastive(settings.encoder)
    if settings.encoder == "portraits":
        network = onnx_module.load(encoder.file, penultimate=True).to(device)
        return FeatureNet(network, encoder.side, truth, encoder)
    from trainer.clip import ClipVision

    return FeatureNet(ClipVision.load(encoder.file.parent).to(device), 0, truth, encoder)
