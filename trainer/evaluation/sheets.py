"""Sheets that people look at: labelled grids of portraits, drawn by PIL with its built-in font."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

Portrait = NDArray[np.uint8]

PAPER = (250, 250, 248)
INK = (38, 40, 48)
FAINT = (122, 126, 138)
BARS = (150, 152, 158)
_MARGIN = 36
_GAP = 8
_WIDE_GAP = 28
_CORNER = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One row of a sheet.

    Attributes:
        label: drawn at the left; a line break starts a second, fainter line.
        cells: ``[H, W, 3]`` uint8 portraits, None leaves a cell empty.
        captions: below the cells, one for each, or empty.
    """

    label: str
    cells: Sequence[Portrait | None]
    captions: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Sheet:
    """A grid of portraits, as pixels here and as a table of a page in `trainer.evaluation.html.faces`.

    Attributes:
        title: first line.
        subtitle: second, fainter line.
        columns: a head for each column.
        rows: each with as many cells as there are columns.
        tile: side of a cell in pixels; portraits are scaled to it by Lanczos.
        gaps_after: columns that a wider gap follows, which sets them apart.
    """

    title: str
    subtitle: str
    columns: Sequence[str]
    rows: Sequence[Row]
    tile: int = 128
    gaps_after: Sequence[int] = (0,)

    def __post_init__(self) -> None:
        count = len(self.columns)
        for row in self.rows:
            if len(row.cells) != count or (row.captions and len(row.captions) != count):
                raise ValueError(f"row {row.label!r} needs {count} cells and as many captions or none")

    def image(self) -> Image.Image:
        """The sheet as pixels on paper, with title, column heads and row labels."""
        tile, label_font = self.tile, font(15)
        label_width = max(
            (_width(line, label_font) for row in self.rows for line in row.label.split("\n")), default=0
        )
        lefts = _lefts(len(self.columns), tile, _MARGIN + label_width + 18, self.gaps_after)
        top = _MARGIN + 104
        heights = [tile + (22 if row.captions else 0) + _GAP for row in self.rows]
        width = max(
            lefts[-1] + tile,
            _MARGIN + _width(self.title, font(24)),
            _MARGIN + _width(self.subtitle, label_font),
        )
        canvas = Image.new("RGB", (width + _MARGIN, top + sum(heights) - _GAP + _MARGIN), PAPER)
        draw = ImageDraw.Draw(canvas)
        draw.text((_MARGIN, _MARGIN - 6), self.title, fill=INK, font=font(24))
        draw.text((_MARGIN, _MARGIN + 28), self.subtitle, fill=FAINT, font=label_font)
        for left, name in zip(lefts, self.columns, strict=True):
            at = (left + tile / 2, top - 18)
            draw.text(at, name, fill=INK, font=_fitting(name, tile, 15), anchor="mm")
        mask = _rounded(tile)
        for row, height in zip(self.rows, heights, strict=True):
            self._row(canvas, row, lefts, top, mask)
            top += height
        return canvas

    def _row(self, canvas: Image.Image, row: Row, lefts: Sequence[int], top: int, mask: Image.Image) -> None:
        draw, tile = ImageDraw.Draw(canvas), self.tile
        _row_label(draw, row.label, _MARGIN, top + tile // 2)
        for index, (left, cell) in enumerate(zip(lefts, row.cells, strict=True)):
            if cell is not None:
                canvas.paste(enlarge(cell, tile), (left, top), mask)
            if row.captions:
                words, at = row.captions[index], (left + tile / 2, top + tile + 10)
                draw.text(at, words, fill=FAINT, font=_fitting(words, tile, 13), anchor="mm")


def intensity_strip(
    strips: Sequence[tuple[str, Sequence[Portrait]]],
    intensities: Sequence[float],
    *,
    title: str,
    subtitle: str,
) -> Sheet:
    """One expression of one person a row, rising intensity across; a wider gap before what lies above 1."""
    columns = [f"{value:g}" for value in intensities]
    rows = [Row(label=label, cells=images) for label, images in strips]
    gaps = beyond(intensities)
    return Sheet(title=title, subtitle=subtitle, columns=columns, rows=rows, tile=160, gaps_after=gaps)


def beyond(intensities: Sequence[float]) -> tuple[int, ...]:
    """The column after which what lies above 1 begins; none where nothing does."""
    last = max((index for index, value in enumerate(intensities) if value <= 1.0), default=0)
    return (last,) if last + 1 < len(intensities) else ()


def stacked(images: Sequence[Image.Image]) -> Image.Image:
    """Pictures below each other on paper."""
    canvas = Image.new("RGB", (max(one.width for one in images), sum(one.height for one in images)), PAPER)
    top = 0
    for one in images:
        canvas.paste(one, (0, top))
        top += one.height
    return canvas


def framed(images: Sequence[Image.Image], columns: int, *, title: str, subtitle: str) -> Image.Image:
    """Charts of one size side by side on paper, ``columns`` in a row, below a title."""
    wide, high = images[0].size
    down = -(-len(images) // columns)
    width = max(columns * (wide + 2 * _GAP), _width(title, font(30)), _width(subtitle, font(19)))
    canvas = Image.new("RGB", (width + 2 * _MARGIN, 132 + down * (high + 2 * _GAP) + _MARGIN), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((_MARGIN + _GAP, _MARGIN - 6), title, fill=INK, font=font(30))
    draw.text((_MARGIN + _GAP, _MARGIN + 40), subtitle, fill=FAINT, font=font(19))
    for index, one in enumerate(images):
        left = _MARGIN + _GAP + index % columns * (wide + 2 * _GAP)
        canvas.paste(one, (left, 120 + _GAP + index // columns * (high + 2 * _GAP)))
    return canvas


def enlarge(portrait: Portrait, side: int) -> Image.Image:
    """A portrait scaled to a square of `side` pixels by Lanczos; what is no square gets bars."""
    image = Image.fromarray(portrait)
    if image.width != image.height:
        return ImageOps.pad(image, (side, side), Image.Resampling.LANCZOS, color=BARS)
    return image.resize((side, side), Image.Resampling.LANCZOS)


def png(image: Image.Image) -> bytes:
    """The image as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=4)
    return buffer.getvalue()


def webp(image: Image.Image, quality: int = 90) -> bytes:
    """The image as WebP, several times smaller than PNG, for the pages that carry it inline."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality, method=4)
    return buffer.getvalue()


def address(image: Image.Image) -> str:
    """The image as WebP in a data address, which a page carries inline."""
    return f"data:image/webp;base64,{base64.b64encode(webp(image, 82)).decode('ascii')}"


@lru_cache(maxsize=64)
def font(size: float) -> ImageFont.FreeTypeFont:
    """Pillow's own font."""
    found = ImageFont.load_default(size)
    assert isinstance(found, ImageFont.FreeTypeFont), "every build of Pillow we support has FreeType"
    return found


def _width(text: str, font: ImageFont.FreeTypeFont) -> int:
    return int(font.getlength(text)) + 1


def _fitting(text: str, room: int, size: float) -> ImageFont.FreeTypeFont:
    """The built-in font at `size`, or smaller where the text would leave its cell."""
    return font(max(9.0, min(size, size * room / max(1, _width(text, font(size))))))


def _lefts(count: int, tile: int, start: int, gaps_after: Sequence[int]) -> list[int]:
    lefts, left = [], start
    for index in range(count):
        lefts.append(left)
        left += tile + (_WIDE_GAP if index in gaps_after else _GAP)
    return lefts


def _row_label(draw: ImageDraw.ImageDraw, label: str, left: int, middle: int) -> None:
    lines = label.split("\n")
    for index, line in enumerate(lines):
        y = middle + (index - (len(lines) - 1) / 2) * 20
        draw.text((left, y), line, fill=FAINT if index else INK, font=font(15), anchor="lm")


def _rounded(side: int) -> Image.Image:
    """A mask of rounded corners, drawn four times larger and reduced so that the corners are smooth."""
    mask = Image.new("L", (side * 4, side * 4), 0)
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, side * 4 - 1, side * 4 - 1), _CORNER * 4, fill=255)
    return mask.resize((side, side), Image.Resampling.LANCZOS)
