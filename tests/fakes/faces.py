"""Faces of five coloured dots, and detectors that find them, with inputs and outputs as InsightFace's SCRFD.

A dot is where one of ArcFace's landmarks is. The detector is a real ONNX network: nine outputs (scores, boxes
and landmarks at strides 8, 16 and 32), two anchors a place, RGB in (x - 127.5) / 128.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

#: Where ArcFace expects eyes, nose and corners of the mouth in its 112 pixels.
TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)
#: RGB of each dot. With red and blue exchanged, none of them is one of the others.
COLOURS = ((255, 0, 0), (255, 128, 0), (255, 0, 128), (255, 255, 0), (255, 255, 128))
_BACK = 60


def posed(angle: float, scale: float, centre: tuple[float, float]) -> np.ndarray:
    """Return landmarks [5, 2] of a face turned by ``angle`` degrees, ``scale`` times the template's size."""
    turn = scale * np.exp(1j * np.radians(angle))
    points = (TEMPLATE - 56) @ (1, 1j) * turn + complex(*centre)
    return np.stack([points.real, points.imag], 1)


def drawn(landmarks: np.ndarray, height: int, width: int, radius: float = 4.0) -> np.ndarray:
    """Return a picture, uint8 [H, W, 3], RGB, with a dot at each landmark."""
    picture = np.full((height, width, 3), _BACK, np.float64)
    y, x = np.mgrid[:height, :width]
    for (left, top), colour in zip(landmarks, COLOURS, strict=True):
        share = np.clip(radius + 0.5 - np.hypot(x - left, y - top), 0, 1)[..., None]
        picture = (1 - share) * picture + share * np.array(colour)
    return np.round(picture).astype(np.uint8)


def nobody(height: int, width: int) -> np.ndarray:
    """Return a picture without a face."""
    return np.full((height, width, 3), _BACK, np.uint8)


def dots(picture: torch.Tensor) -> np.ndarray:
    """Return where the dots are in one picture [3, H, W] in [-1, 1]: [5, 2], NaN where one is not."""
    return _centres(picture[None])[0].double().numpy()


def _centres(pixels: torch.Tensor) -> torch.Tensor:
    colours = torch.tensor(COLOURS, dtype=torch.float32) / 127.5 - 1
    away = (pixels[:, None] - colours[None, :, :, None, None]).square().sum(2).sqrt()
    mask = (0.4 - away).clamp(min=0)
    mass = mask.sum((2, 3))
    x, y = _axes(pixels)
    return torch.stack([(mask * x).sum((2, 3)) / mass, (mask * y).sum((2, 3)) / mass], -1)


def _axes(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    ones = torch.ones_like(pixels[:, :1])
    return ones.cumsum(3) - 1, ones.cumsum(2) - 1


class _Detector(nn.Module):
    """SCRFD's interface around a way to find five points."""

    def __init__(self, everywhere: bool) -> None:
        super().__init__()
        self.everywhere = everywhere

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, y = _axes(pixels)
        if self.everywhere:
            found = (x.max() + 1) / 112 * torch.tensor(TEMPLATE, dtype=torch.float32)[None]
        else:
            found = _centres(pixels * (128 / 127.5))
        found = torch.nan_to_num(found, nan=-1e4)
        middle = found.mean(1)
        scores, boxes, points = [], [], []
        for stride in (8, 16, 32):
            places = torch.stack([axis[0, 0, ::stride, ::stride].flatten() for axis in (x, y)], -1)
            places = torch.stack([places, places], 1).flatten(0, 1)
            near = (places - middle).abs().amax(1, keepdim=True) <= stride / 2
            scores.append(0.9 * near.float())
            low, high = found.amin(1) - 8, found.amax(1) + 8
            boxes.append(torch.cat([places - low, high - places], 1) / stride)
            points.append((found - places[:, None]).flatten(1) / stride)
        return (*scores, *boxes, *points)


def detector(file: Path, *, everywhere: bool = False) -> Path:
    """Write an ONNX detector that finds faces of dots; ``everywhere`` finds one in each picture."""
    names = [f"{part}_{stride}" for part in ("score", "bbox", "kps") for stride in (8, 16, 32)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _Detector(everywhere), (torch.zeros(1, 3, 64, 64),), str(file), dynamo=False, opset_version=17,
            input_names=["input.1"], output_names=names,
            dynamic_axes={"input.1": {2: "H", 3: "W"}} | {name: {0: name} for name in names},
        )  # fmt: skip
    return file
