"""Sizes that a training uses, and how a picture is brought to one: cropped around its middle, then resized.

A resolution is the side of a square; its buckets have the area of that square, and aspects in steps of
2^(1/4), so a crop takes at most 2^(1/8) - 1, 9 %, of the longer side. Each picture goes to the nearest bucket
of each resolution. With `max_aspect` 1 there is one bucket, the square.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from serving.pipelines.base import Size

if TYPE_CHECKING:
    from PIL import Image

    from trainer.sections import DataSection

_STEPS = 4  # aspects to an octave


def resolutions(data: DataSection, own: Size, multiple: int) -> tuple[tuple[Size, ...], ...]:
    """Return the buckets of each resolution that a recipe trains at.

    Args:
        data: says ``sizes`` and ``max_aspect``.
        own: the base's own height and width in pixels, for recipes without ``sizes``.
        multiple: of which both sides of a bucket are multiples, in pixels.
    """
    if not data.sizes and data.max_aspect == 1:
        return ((own,),)
    sides = data.sizes or (math.sqrt(own[0] * own[1]),)
    return tuple(dict.fromkeys(_buckets(side, data.max_aspect, multiple) for side in sides))


def _buckets(side: float, max_aspect: float, multiple: int) -> tuple[Size, ...]:
    """Return heights and widths of the area of a square, the square first."""
    most = math.floor(_STEPS * math.log2(max_aspect) + 1e-9)
    found: list[Size] = []
    for step in sorted(range(-most, most + 1), key=abs):
        root = 2 ** (step / _STEPS / 2)
        height, width = (max(1, round(part / multiple)) * multiple for part in (side / root, side * root))
        longest = int(max_aspect * min(height, width) / multiple + 1e-9) * multiple
        found.append((min(height, longest), min(width, longest)))  # rounding may have gone over the limit
    return tuple(dict.fromkeys(found))


def nearest(buckets: Sequence[Size], picture: Size) -> Size:
    """Return the bucket whose aspect is nearest to that of a picture of a height and a width."""
    aspect = math.log(picture[1] / picture[0])
    return min(buckets, key=lambda size: abs(math.log(size[1] / size[0]) - aspect))


def sizes_of(picture: Size, wanted: Sequence[Sequence[Size]]) -> tuple[Size, ...]:
    """Return the sizes at which a picture is trained: one of each resolution, each once."""
    return tuple(dict.fromkeys(nearest(buckets, picture) for buckets in wanted))


def crop(image: Image.Image, size: Size) -> Image.Image:
    """Return the largest middle part of an image that has the aspect of ``size`` (to a pixel).

    It is not resized: the base's pipeline does that for its own encoder and for its text encoder, from the
    same crop, and serving does the same.
    """
    height, width = size
    wide, high = image.width * height > width * image.height, image.width * height < width * image.height
    new_width = max(1, round(image.height * width / height)) if wide else image.width
    new_height = max(1, round(image.width * height / width)) if high else image.height
    left, top = (image.width - new_width) // 2, (image.height - new_height) // 2
    if (new_width, new_height) == image.size:
        return image
    return image.crop((left, top, left + new_width, top + new_height))


def fit(image: Image.Image, size: Size) -> Image.Image:
    """Return an image cropped and resized to ``size``, as the base's pipeline sees it in training."""
    from PIL import Image

    cropped, wanted = crop(image, size), (size[1], size[0])
    return cropped if cropped.size == wanted else cropped.resize(wanted, Image.Resampling.LANCZOS)
