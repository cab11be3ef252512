"""The pictures of answers: encoded, labelled with what made them, and signed where that is set up.

Everything here blocks for some milliseconds; routes call it in a thread.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from serving.errors import ImageRefused
from serving.images import png_bytes, read_size

if TYPE_CHECKING:
    from PIL import Image

    from serving.provenance import ContentCredentials
    from serving.schema import EditResult

Kind = Literal["png", "jpeg", "webp"]
MEDIA_TYPES: dict[Kind, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
PREVIEW_QUALITY = 80


def require_readable(data: bytes, max_pixels: int) -> None:
    """Refuse what is no picture, or has too many pixels, by its header; not a pixel is decoded.

    Raises:
        ImageRefused: and why.
    """
    width, height = read_size(data)
    if width * height > max_pixels:
        raise ImageRefused(
            f"the picture has {width} x {height} pixels; this service reads at most {max_pixels}",
            "send a smaller picture",
        )


def encode(
    result: EditResult,
    *,
    parent: bytes,
    credentials: ContentCredentials | None = None,
    kind: Kind = "png",
    quality: int = 95,
) -> bytes:
    """Return the picture of a result as a file.

    Args:
        result: what was made; a PNG says all of it in a text chunk.
        parent: the file that was edited, which a C2PA manifest names as the ingredient.
        credentials: signs the file; None does not.
        kind: the format.
        quality: of JPEG and WebP, 0 to 100.
    """
    data = png_bytes(result.image, result.facts()) if kind == "png" else _plain(result.image, kind, quality)
    return data if credentials is None else credentials.sign(data, MEDIA_TYPES[kind], result, parent)


def encode_all(
    results: Sequence[EditResult],
    *,
    parent: bytes,
    credentials: ContentCredentials | None,
    kind: Kind = "png",
    quality: int = 95,
) -> list[str]:
    """Return the pictures of several results as base64 text."""
    return [
        text(encode(result, parent=parent, credentials=credentials, kind=kind, quality=quality))
        for result in results
    ]


def previews(pictures: Sequence[Image.Image]) -> list[str]:
    """Return small pictures of unfinished rows as base64 text of JPEG files; they carry no label."""
    return [plain_text(picture, "jpeg") for picture in pictures]


def plain_text(picture: Image.Image, kind: Kind) -> str:
    """Return an unfinished picture as base64 text of a file; it carries no label."""
    return text(_plain(picture, kind, PREVIEW_QUALITY))


def text(data: bytes) -> str:
    """Return a file as base64 text."""
    return base64.b64encode(data).decode("ascii")


def _plain(image: Image.Image, kind: Kind, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind.upper(), quality=quality)
    return buffer.getvalue()
