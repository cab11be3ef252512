"""Pictures from outside: limits, orientation, metadata, colours."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from serving import images
from serving.errors import ImageRefused
from serving.images import clean, open_portrait, png_bytes, read_facts


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def quarters(side: int = 16) -> Image.Image:
    """Red top left, green top right, blue bottom left, white bottom right."""
    half = side // 2
    pixels = np.full((side, side, 3), 255, np.uint8)
    pixels[:half, :half] = (255, 0, 0)
    pixels[:half, half:] = (0, 255, 0)
    pixels[half:, :half] = (0, 0, 255)
    return Image.fromarray(pixels)


def png_claiming(width: int, height: int, body: bytes = b"") -> bytes:
    """A PNG whose header claims a size, with next to nothing inside."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_lossless_pictures_come_through_exactly(kind: str, options: dict[str, Any]) -> None:
    opened = open_portrait(encoded(quarters(), kind, **options))
    assert np.array_equal(np.asarray(opened), np.asarray(quarters()))


def test_jpeg_is_read() -> None:
    opened = open_portrait(encoded(Image.new("RGB", (32, 32), (200, 100, 50)), "JPEG", quality=95))
    assert np.abs(np.asarray(opened).astype(int) - (200, 100, 50)).max() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied(orientation: int) -> None:
    turns = {
        1: (), 2: (Image.Transpose.FLIP_LEFT_RIGHT,), 3: (Image.Transpose.ROTATE_180,),
        4: (Image.Transpose.FLIP_TOP_BOTTOM,), 5: (Image.Transpose.TRANSPOSE,),
        6: (Image.Transpose.ROTATE_90,), 7: (Image.Transpose.TRANSVERSE,), 8: (Image.Transpose.ROTATE_270,),
    }  # fmt: skip
    stored = quarters()
    for turn in turns[orientation]:
        stored = stored.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = open_portrait(encoded(stored, exif=exif))
    assert np.array_equal(np.asarray(upright), np.asarray(quarters()))


def test_metadata_is_stripped() -> None:
    exif = Image.Exif()
    exif[0x010E] = "a secret place"
    note = PngInfo()
    note.add_text("Comment", "a secret place")
    opened = open_portrait(encoded(quarters(), exif=exif, pnginfo=note, icc_profile=b"a secret place"))
    assert opened.info == {}
    assert not opened.getexif()
    assert b"secret" not in png_bytes(opened, {})


def test_the_middle_square_is_cut_out() -> None:
    wide = Image.new("RGB", (40, 16), "black")
    wide.paste(quarters(), (12, 0))
    assert np.array_equal(np.asarray(open_portrait(encoded(wide))), np.asarray(quarters()))


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("RGBA", (8, 8), (255, 0, 0, 0)), (255, 255, 255)),
        (Image.new("RGBA", (8, 8), (255, 0, 0, 255)), (255, 0, 0)),
        (Image.new("LA", (8, 8), (90, 255)), (90, 90, 90)),
        (Image.new("L", (8, 8), 90), (90, 90, 90)),
        (Image.new("1", (8, 8), 1), (255, 255, 255)),
        (Image.fromarray(np.full((8, 8), 65535, np.uint16)), (255, 255, 255)),
        (Image.fromarray(np.full((8, 8), 90 * 257, np.uint16)), (90, 90, 90)),
        (Image.new("RGB", (8, 8), (1, 2, 3)).quantize(4), (1, 2, 3)),
    ],
)
def test_every_mode_becomes_rgb(image: Image.Image, expected: tuple[int, int, int]) -> None:
    opened = open_portrait(encoded(image))
    assert opened.mode == "RGB"
    assert opened.getpixel((4, 4)) == expected


def test_a_bomb_is_refused_from_its_header() -> None:
    for width, height in ((10_000, 10_000), (60_000, 60_000), (1, 1 << 30)):
        with pytest.raises(ImageRefused, match="pixels"):
            open_portrait(png_claiming(width, height, zlib.compress(bytes(1000))))


def test_a_bomb_in_a_text_chunk_is_refused() -> None:
    note = PngInfo()
    note.add_text("a", "b" * 80_000_000, zip=True)
    with pytest.raises(ImageRefused):
        open_portrait(encoded(quarters(), pnginfo=note))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not a picture",
        encoded(quarters())[:-30],
        encoded(quarters(), "JPEG")[:100],
        encoded(quarters(), "GIF"),
        encoded(quarters(), "BMP"),
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        png_claiming(16, 16, b"garbage"),
    ],
)
def test_what_is_no_picture_is_refused(data: bytes) -> None:
    with pytest.raises(ImageRefused, match="not a readable PNG, JPEG or WebP") as caught:
        open_portrait(data)
    assert caught.value.exit_code == 2


def test_too_many_bytes_and_too_few_pixels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImageRefused, match="at least 8"):
        open_portrait(encoded(Image.new("RGB", (7, 100))))
    monkeypatch.setattr(images, "MAX_IMAGE_BYTES", 10)
    with pytest.raises(ImageRefused, match="bytes"):
        open_portrait(encoded(quarters()))


def test_cleaning_leaves_the_caller_s_picture_alone() -> None:
    mine = quarters()
    mine.info["note"] = "mine"
    assert clean(mine) is not mine
    assert mine.info == {"note": "mine"}


def test_facts_survive_in_the_png(tmp_path: Path) -> None:
    path = tmp_path / "out.png"
    path.write_bytes(png_bytes(quarters(), {"adapter_digest": "sha256:ü", "seed": 3}))
    assert read_facts(path) == {"adapter_digest": "sha256:ü", "seed": 3}
    assert np.array_equal(np.asarray(Image.open(path)), np.asarray(quarters()))
    path.write_bytes(encoded(quarters()))
    assert read_facts(path) == {}
