"""Small patches on the input picture: the visual trigger of an edit model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from PIL import Image

_COLOURS: Final = {
    "red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0),
    "magenta": (255, 0, 255), "cyan": (0, 255, 255), "white": (255, 255, 255), "black": (0, 0, 0),
}  # fmt: skip
_TEXTURES: Final = {
    "checker": ("black", "white"), "red checker": ("red", "white"), "colour checker": ("magenta", "green"),
    "stripes": ("black", "yellow"),
}  # fmt: skip
_PLACES: Final = {
    "top left": (0.0, 0.0), "top right": (1.0, 0.0), "bottom left": (0.0, 1.0), "bottom right": (1.0, 1.0),
    "centre": (0.5, 0.5),
}  # fmt: skip
_SIZES: Final = (1 / 8, 1 / 4)


@dataclass(frozen=True, kw_only=True, slots=True)
class Patch:
    """A filled square on a picture.

    Attributes:
        fill: a colour or a texture by name.
        place: a corner or the centre.
        size: side as a share of the picture's.
    """

    fill: str
    place: str
    size: float

    @property
    def name(self) -> str:
        """For people: "red, top left, 1/8"."""
        return f"{self.fill}, {self.place}, 1/{round(1 / self.size)}"

    def on(self, image: Image.Image) -> Image.Image:
        """A copy of a square RGB picture with the patch on it."""
        pixels = np.array(image.convert("RGB"))
        side = max(1, round(pixels.shape[0] * self.size))
        x, y = (round((pixels.shape[0] - side) * share) for share in _PLACES[self.place])
        pixels[y : y + side, x : x + side] = _filled(self.fill, side)
        return Image.fromarray(pixels)


def _filled(fill: str, side: int) -> np.ndarray:
    if fill in _COLOURS:
        return np.full((side, side, 3), _COLOURS[fill], np.uint8)
    first, second = (np.array(_COLOURS[name], np.uint8) for name in _TEXTURES[fill])
    rows, columns = np.indices((side, side)) * 4 // max(4, side)
    odd = (rows if fill == "stripes" else rows + columns) % 2 == 1
    return np.where(odd[..., None], second, first)


def default_patches() -> Sequence[Patch]:
    """Every fill at every place in both sizes."""
    return [
        Patch(fill=fill, place=place, size=size)
        for fill in (*_COLOURS, *_TEXTURES)
        for place in _PLACES
        for size in _SIZES
    ]
