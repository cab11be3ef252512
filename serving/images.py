"""Pictures from outside: read under limits, turned upright, stripped of metadata, made RGB and mostly square.

Everything that enters a model passes `open_portrait`, `open_picture` or `clean`; the last resize to the size
that the base works at is the pipeline's, so that training and serving resize alike.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from serving.errors import ImageRefused

if TYPE_CHECKING:
    from pathlib import Path

    from PIL import Image
    from PIL.ImageFile import ImageFile

MAX_IMAGE_BYTES = 32 << 20
MAX_IMAGE_PIXELS = 4096 * 4096
MIN_IMAGE_SIDE = 8
FORMATS = ("PNG", "JPEG", "WEBP")
TEXT_KEY = "adapter-foundry"
MAX_CHUNKS = 50_000
MAX_BESIDE = 4 << 20
"""Bytes of a PNG that are no pixels: profiles, texts, manifests."""


def open_portrait(data: bytes, size: tuple[int, int] | None = None) -> Image.Image:
    """Return the picture in ``data`` as an upright RGB image without metadata; see `open_picture`.

    Args:
        data: a file.
        size: height and width whose aspect the middle is cut out with; None is a square.
    """
    return _cut(open_picture(data), size)


def open_picture(data: bytes) -> Image.Image:
    """Return the picture in ``data`` as an upright RGB image without metadata, whatever its aspect.

    The sides are read from the header and checked before a single pixel is decoded, so that a small file that
    unfolds into gigabytes costs nothing.

    Raises:
        ImageRefused: not a PNG, JPEG or WebP picture, damaged, or over a limit.
    """
    with _opened(data) as opened:
        opened.load()
        return _upright(opened)


def read_size(data: bytes) -> tuple[int, int]:
    """Return width and height as the header of a picture says; not a pixel is decoded.

    Raises:
        ImageRefused: as `open_picture`, as far as the header tells.
    """
    with _opened(data) as opened:
        return opened.size


@contextmanager
def _opened(data: bytes) -> Iterator[ImageFile]:
    from PIL import Image

    if len(data) > MAX_IMAGE_BYTES:
        raise ImageRefused(
            f"the picture has {len(data)} bytes; at most {MAX_IMAGE_BYTES} are read", "send a smaller file"
        )
    _check_chunks(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(io.BytesIO(data), formats=FORMATS)
        with opened:
            _check_size(*opened.size)
            # Telephones write JPEG files of several pictures, of which the first is meant
            if opened.format in ("PNG", "WEBP") and getattr(opened, "is_animated", False):
                raise ImageRefused("the picture is animated", "send one of its frames")
            yield opened
    except Image.DecompressionBombError as error:
        raise ImageRefused(
            f"the picture has too many pixels; at most {MAX_IMAGE_PIXELS} are read", "send a smaller picture"
        ) from error
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError) as error:
        # Pillow tells damaged files apart by all of these
        raise ImageRefused(
            "the file is not a readable PNG, JPEG or WebP picture", "export it again in one of these formats"
        ) from error


def clean(image: Image.Image, size: tuple[int, int] | None = None) -> Image.Image:
    """Return an upright RGB copy of ``image`` that carries nothing but its pixels.

    The EXIF orientation is applied, transparency is laid on white, and the middle is cut out with the aspect
    of ``size``, height and width; None is a square.

    Raises:
        ImageRefused: the sides are outside of the limits.
    """
    return _cut(_upright(image), size)


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


def _cut(image: Image.Image, size: tuple[int, int] | None) -> Image.Image:
    """Return the middle of an image, as large as it can be with the aspect of a size."""
    tall, wide = size or (1, 1)
    width = max(1, min(image.width, image.height * wide // tall))
    height = max(1, min(image.height, image.width * tall // wide))
    if (width, height) == image.size:
        return image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


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


def _check_chunks(data: bytes) -> None:
    """Refuse a PNG that is mostly no picture: what else it carries is copied several times in reading.

    Raises:
        ImageRefused: it has too many chunks, or too much in those that are no pixels.
    """
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return
    place, beside = 8, 0
    for _ in range(MAX_CHUNKS):
        if place + 8 > len(data):
            break
        length = int.from_bytes(data[place : place + 4], "big")
        beside += length if data[place + 4 : place + 8] not in (b"IDAT", b"fdAT") else 0
        place += length + 12
    else:
        beside = MAX_BESIDE + 1
    if beside > MAX_BESIDE:
        raise ImageRefused(
            "the picture carries too much besides its pixels", "export it again without metadata"
        )


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
