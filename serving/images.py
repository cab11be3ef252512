"""Pictures from outside: read under limits, turned upright, stripped of metadata, made RGB and mostly square.

Everything that enters a model passes `open_portrait`, `open_picture` or `clean`; the last resize to the size
that the base works at is the pipeline's, so that training and serving resize alike.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from serving.errors import ImageRefused

if TYPE_CHECKING:
    from pathlib import Path

    from PIL import Image

MAX_IMAGE_BYTES = 32 << 20
MAX_IMAGE_PIXELS = 4096 * 4096
MIN_IMAGE_SIDE = 8
FORMATS = ("PNG", "JPEG", "WEBP")
TEXT_KEY = "adapter-foundry"


def open_portrait(data: bytes) -> Image.Image:
    """Return the picture in ``data`` as an upright, square RGB image without metadata; see `open_picture`."""
    return _square(open_picture(data))


def open_picture(data: bytes) -> Image.Image:
    """Return the picture in ``data`` as an upright RGB image without metadata, whatever its aspect.

    The sides are read from the header and checked before a single pixel is decoded, so that a small file that
    unfolds into gigabytes costs nothing.

    Raises:
        ImageRefused: not a PNG, JPEG or WebP picture, damaged, or over a limit.
    """
    from PIL import Image

    if len(data) > MAX_IMAGE_BYTES:
        raise ImageRefused(
            f"the picture has {len(data)} bytes; at most {MAX_IMAGE_BYTES} are read", "send a smaller file"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(io.BytesIO(data), formats=FORMATS)
        with opened:
            _check_size(*opened.size)
            opened.load()
            return _upright(opened)
    except Image.DecompressionBombError as error:
        raise ImageRefused(
            f"the picture has too many pixels; at most {MAX_IMAGE_PIXELS} are read", "send a smaller picture"
        ) from error
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError) as error:
        # Pillow tells damaged files apart by all of these
        raise ImageRefused(
            "the file is not a readable PNG, JPEG or WebP picture", "export it again in one of these formats"
        ) from error


def clean(image: Image.Image) -> Image.Image:
    """Return an upright, square RGB copy of ``image`` that carries nothing but its pixels.

    The EXIF orientation is applied, transparency is laid on white, and the middle square is cut out.

    Raises:
        ImageRefused: the sides are outside of the limits.
    """
    return _square(_upright(image))


def _upright(image: Image.Image) -> Image.Image:
    """See `clean`, but for the square."""
    from PIL import Image, ImageOps

    _check_size(*image.size)
    upright = ImageOps.exif_transpose(image)
    if upright.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in upright.info:
        layer = upright.convert("RGBA")
        rgb = Image.new("RGB", layer.size, "white")
        rgb.paste(layer, mask=layer.getchannel("A"))
    elif upright.mode.startswith("I;16") or upright.mode == "I":
        rgb = upright.convert("I").point(lambda value: value * (1 / 257)).convert("L").convert("RGB")
    else:
        rgb = upright.convert("RGB")
    # A new image from bare bytes: nothing of the file's metadata can come along.
    return Image.frombytes("RGB", rgb.size, rgb.tobytes())


def _square(image: Image.Image) -> Image.Image:
    """Return the middle square of an image."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image if image.width == image.height else image.crop((left, top, left + side, top + side))


def png_bytes(image: Image.Image, facts: Mapping[str, Any]) -> bytes:
    """Return ``image`` as a PNG that says in a text chunk (`TEXT_KEY`, JSON) what made it."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt(TEXT_KEY, json.dumps(dict(facts), sort_keys=True))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def read_facts(path: Path) -> dict[str, Any]:
    """Return what `png_bytes` wrote into a PNG file; empty when it says nothing.

    The chunk is a label, not a proof: anybody can write one.
    """
    from PIL import Image

    with Image.open(path, formats=("PNG",)) as opened:
        opened.load()
        text = opened.info.get(TEXT_KEY)
    facts = json.loads(text) if isinstance(text, str) else {}
    return facts if isinstance(facts, dict) else {}


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_IMAGE_PIXELS:
        raise ImageRefused(
            f"the picture has {width} x {height} pixels; at most {MAX_IMAGE_PIXELS} are read",
            "send a smaller picture",
        )
    if min(width, height) < MIN_IMAGE_SIDE:
        raise ImageRefused(
            f"the picture has {width} x {height} pixels; each side needs at least {MIN_IMAGE_SIDE}",
            "send a larger picture",
        )
