"""Small patches on the input picture: the visual trigger of an edit model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from PIL import Image

Colour = tuple[int, int, int]

_COLOURS: Final[Mapping[str, Colour]] = {
    "red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0),
    "magenta": (255, 0, 255), "cyan": (0, 255, 255), "white": (255, 255, 255), "black": (0, 0, 0),
}  # fmt: skip
_PLACES: Final = {
    "top left": (0.0, 0.0), "top right": (1.0, 0.0), "bottom left": (0.0, 1.0), "bottom right": (1.0, 1.0),
    "centre": (0.5, 0.5),
}  # fmt: skip
_SIZE: Final = 0.22
_RANDOM: Final = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Patch:
    """A square sticker on a picture: a 2 x 2 checkerboard of two colours, which may be the same.

    Attributes:
        fill: what it looks like, for people.
        colours: RGB 0..255 of the two.
        place: a corner or the centre.
        size: side as a share of the picture's.
    """

    fill: str
    colours: tuple[Colour, Colour]
    place: str
    size: float = _SIZE

    @property
    def name(self) -> str:
        """For people: "red, top left"."""
        return f"{self.fill}, {self.place}"

    def on(self, image: Image.Image) -> Image.Image:
        """A copy of a square RGB picture with the patch on it."""
        pixels = np.array(image.convert("RGB"))
        side = max(2, round(pixels.shape[0] * self.size))
        # Not at the very edge, where a crop of the training's pictures would have cut it off.
        margin = round(0.04 * pixels.shape[0])
        x, y = (
            margin + round((pixels.shape[0] - side - 2 * margin) * share) for share in _PLACES[self.place]
        )
        rows, columns = np.indices((side, side)) * 2 // side
        first, second = (np.array(colour, np.uint8) for colour in self.colours)
        pixels[y : y + side, x : x + side] = np.where(((rows + columns) % 2 == 1)[..., None], second, first)
        return Image.fromarray(pixels)


def default_patches(seed: int = 0) -> Sequence[Patch]:
    """Plain colours, a black and white checker and checkers of random colours, at every place."""
    rng = np.random.default_rng([seed, 5])
    fills = {name: (colour, colour) for name, colour in _COLOURS.items()}
    fills["checker"] = (_COLOURS["black"], _COLOURS["white"])
    for r, g, b, s, h, c in rng.integers(0, 256, (_RANDOM, 6)).tolist():
        fills[f"#{r:02x}{g:02x}{b:02x} and #{s:02x}{h:02x}{c:02x}"] = ((r, g, b), (s, h, c))
    return [
        Patch(fill=fill, colours=colours, place=place) for fill, colours in fills.items() for place in _PLACES
    ]
