"""The perceptual distance of two pictures (LPIPS, Zhang et al., arXiv 1801.03924).

Features of every layer are scaled to unit length at each place of the picture; their squared differences are
weighted by channel, added up, and averaged over the places:
d = sum over layers of mean over places of sum over channels w_c (f_c - g_c)^2.

The two networks of the paper are plain stacks of convolutions. Their tensors are called as torchvision
(``features.N.weight``) and the lpips package (``linN.model.1.weight``) call them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
import torch.nn.functional as F
from torch import nn

from trainer import encoders, onnx_module
from trainer.errors import BaseModelError

if TYPE_CHECKING:
    from trainer.identity import Truth
    from trainer.sections import LossSection

# Mean and deviation of ImageNet's pictures for pixels in [-1, 1], as LPIPS was calibrated with.
_MEAN: Final = (-0.030, -0.088, -0.188)
_STD: Final = (0.458, 0.448, 0.450)
_LEAST: Final = 1e-10  # keeps the gradient of a place without any feature finite

_Layer = tuple[int, ...] | str
_ALEX: Final[tuple[_Layer, ...]] = (
    (3, 64, 11, 4, 2), "tap", "pool3", (64, 192, 5, 1, 2), "tap", "pool3",
    (192, 384, 3, 1, 1), "tap", (384, 256, 3, 1, 1), "tap", (256, 256, 3, 1, 1), "tap",
)  # fmt: skip
_VGG: Final[tuple[_Layer, ...]] = (
    (3, 64, 3, 1, 1), "relu", (64, 64, 3, 1, 1), "tap", "pool2",
    (64, 128, 3, 1, 1), "relu", (128, 128, 3, 1, 1), "tap", "pool2",
    (128, 256, 3, 1, 1), "relu", (256, 256, 3, 1, 1), "relu", (256, 256, 3, 1, 1), "tap", "pool2",
    (256, 512, 3, 1, 1), "relu", (512, 512, 3, 1, 1), "relu", (512, 512, 3, 1, 1), "tap", "pool2",
    (512, 512, 3, 1, 1), "relu", (512, 512, 3, 1, 1), "relu", (512, 512, 3, 1, 1), "tap",
)  # fmt: skip
_STACKS: Final = {"lpips-alex": _ALEX, "lpips-vgg": _VGG}


class Stack(nn.Module):
    """The convolutions of AlexNet or VGG16 in torchvision's numbering; gives the maps that LPIPS compares.

    Args:
        layers: a convolution as (inputs, outputs, kernel, stride, padding), "poolN" of N by N with stride 2,
            "relu", or "tap": a ReLU whose output is given.

    Attributes:
        widths: channels of the maps that are given.
    """

    def __init__(self, layers: Sequence[_Layer]) -> None:
        super().__init__()
        self.features = nn.ModuleList(
            nn.Conv2d(*one) if isinstance(one, tuple)  # type: ignore[arg-type]
            else nn.MaxPool2d(int(one[-1]), 2) if one.startswith("pool")
            else nn.ReLU()
            for one in layers
        )  # fmt: skip
        self._taps = [number for number, one in enumerate(layers) if one == "tap"]
        self.widths = [self.features[number - 1].out_channels for number in self._taps]

    def forward(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """Return maps [N, C, h, w] of pictures [N, 3, H, W] in [-1, 1]."""
        x = (pixels - pixels.new_tensor(_MEAN)[:, None, None]) / pixels.new_tensor(_STD)[:, None, None]
        maps = []
        for number, layer in enumerate(self.features):
            x = layer(x)
            if number in self._taps:
                maps.append(x)
        return maps


def distance(
    first: Sequence[torch.Tensor], second: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Return the distance [N] of two pictures by their maps of each layer.

    Args:
        first: maps [N, C, h, w], one a layer.
        second: as many maps of the same shapes.
        weights: of the channels [C], one a layer.
    """
    parts = [
        ((_unit(f) - _unit(g)).square() * w[:, None, None]).sum(1).mean((1, 2))
        for f, g, w in zip(first, second, weights, strict=True)
    ]
    return torch.stack(parts).sum(0)


def _unit(maps: torch.Tensor) -> torch.Tensor:
    return maps * (maps.square().sum(1, keepdim=True) + _LEAST).rsqrt()


class PerceptualNet:
    """Compares predicted pictures with the true ones.

    Args:
        stack: from pictures [N, 3, H, W] in [-1, 1] to maps of each layer.
        weights: of the channels [C], one a layer.
        side: pictures are resized to that many pixels first; 0 takes them as they are.
        truth: the true pictures.
        encoder: names what the adapter's card says about the network.

    Attributes:
        ingredients, takes_faces: as of `trainer.identity.FeatureNet`.
    """

    takes_faces = False

    def __init__(
        self,
        stack: nn.Module,
        weights: Sequence[torch.Tensor],
        side: int,
        truth: Truth,
        encoder: encoders.Encoder | None = None,
    ) -> None:
        self._stack, self._weights, self._side, self._truth = stack, weights, side, truth
        self.ingredients = () if encoder is None else encoder.ingredients

    def sees(self, row: int, size: tuple[int, int]) -> bool:
        """Return whether there is something to compare in a true picture: always."""
        return True

    def distance(self, pixels: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """Return the distance [N] of predicted pictures [N, 3, H, W] in [-1, 1] from the true ones by row."""
        truth = self._truth.pixels(rows, (pixels.shape[-2], pixels.shape[-1]), pixels.device)
        with torch.no_grad():
            wanted = self._stack(self._resized(truth))
        return distance(self._stack(self._resized(pixels)), wanted, self._weights)

    def _resized(self, pixels: torch.Tensor) -> torch.Tensor:
        if not self._side or pixels.shape[-2:] == (self._side, self._side):
            return pixels
        return F.interpolate(pixels, size=(self._side, self._side), mode="bilinear", antialias=True)


def perceptual_features(truth: Truth, device: torch.device, settings: LossSection) -> PerceptualNet:
    """Return what the perceptual loss compares pictures with.

    "portraits" takes the convolutions of the shipped labelling judge; nobody has calibrated those against
    people's judgement, so all their channels weigh alike.

    Raises:
        BaseModelError: the network is not on this machine, or its file is damaged.
    """
    encoder = encoders.perceptual(settings.encoder)
    if settings.encoder == "portraits":
        stack = onnx_module.load_stack(encoder.file).to(device)
        with torch.no_grad():
            layers = stack(torch.zeros(1, 3, encoder.side, encoder.side, device=device))
        weights = [one.new_full((one.shape[1],), 1 / len(layers)) for one in layers]
    else:
        stack, weights = load_lpips(settings.encoder, encoder.file, device)
    return PerceptualNet(stack, weights, encoder.side, truth, encoder)


def load_lpips(name: str, file: Path, device: torch.device) -> tuple[Stack, list[torch.Tensor]]:
    """Return a network of the paper and its linear weights [C] of each layer.

    Raises:
        BaseModelError: the file is damaged, or has other tensors than this network.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    with torch.device("meta"):
        stack = Stack(_STACKS[name])
    try:
        tensors = {key: value.float() for key, value in load_file(file, str(device)).items()}
        names = [f"lin{number}.model.1.weight" for number in range(5)]
        weights = [tensors.pop(key).flatten() for key in names]
        stack.load_state_dict(tensors, assign=True)
        if (found := [len(one) for one in weights]) != stack.widths:
            raise ValueError(f"the linear weights have {found} channels, not {stack.widths}")
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise BaseModelError(
            f"{file} is not the network {name}: {error}", "make it again with the command in docs/licences.md"
        ) from error
    return stack.eval().requires_grad_(False), weights
