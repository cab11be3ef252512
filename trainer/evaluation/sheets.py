"""Sheets that people look at: labelled grids of portraits, drawn by PIL with its built-in font."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Portrait = NDArray[np.uint8]

_PAPER = (250, 250, 248)
_INK = (38, 40, 48)
_FAINT = (122, 126, 138)
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


def sheet(
    title: str,
    subtitle: str,
    columns: Sequence[str],
    rows: Sequence[Row],
    *,
    tile: int = 128,
    gaps_after: Sequence[int] = (0,),
) -> Image.Image:
    """A grid of portraits with a title, column heads and row labels.

    Args:
        title: first line.
        subtitle: second, fainter line.
        columns: a head for each column.
        rows: each with as many cells as there are columns.
        tile: side of a cell in pixels; portraits are scaled to it by Lanczos.
        gaps_after: columns that a wider gap follows, which sets them apart.

    Raises:
        ValueError: a row with another number of cells or captions.
    """
    for row in rows:
        if len(row.cells) != len(columns) or (row.captions and len(row.captions) != len(columns)):
            raise ValueError(f"row {row.label!r} needs {len(columns)} cells and as many captions or none")
    label_font, small = _font(15), _font(13)
    label_width = max((_width(line, label_font) for row in rows for line in row.label.split("\n")), default=0)
    lefts = _lefts(len(columns), tile, _MARGIN + label_width + 18, gaps_after)
    head = _MARGIN + 74
    heights = [tile + (22 if row.captions else 0) + _GAP for row in rows]
    width = max(lefts[-1] + tile, _MARGIN + _width(title, _font(24)), _MARGIN + _width(subtitle, label_font))
    canvas = Image.new("RGB", (width + _MARGIN, head + 30 + sum(heights) - _GAP + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((_MARGIN, _MARGIN - 6), title, fill=_INK, font=_font(24))
    draw.text((_MARGIN, _MARGIN + 28), subtitle, fill=_FAINT, font=label_font)
    for left, name in zip(lefts, columns, strict=True):
        draw.text((left + tile / 2, head + 12), name, fill=_INK, font=_fitting(name, tile, 15), anchor="mm")
    mask, top = _rounded(tile), head + 30
    for row, height in zip(rows, heights, strict=True):
        _row_label(draw, row.label, _MARGIN, top + tile // 2)
        for index, (left, cell) in enumerate(zip(lefts, row.cells, strict=True)):
            if cell is not None:
                canvas.paste(enlarge(cell, tile), (left, top), mask)
            if row.captions:
                text = row.captions[index]
                draw.text(
                    (left + tile / 2, top + tile + 10),
                    text,
                    fill=_FAINT,
                    font=_fitting(text, tile, small.size),
                    anchor="mm",
                )
        top += height
    return canvas


def contact_sheet(
    people: Sequence[tuple[str, Portrait, Sequence[Portrait]]],
    expressions: Sequence[str],
    *,
    title: str,
    subtitle: str,
) -> Image.Image:
    """Held-out identities down, source and every expression at intensity 1 across.

    Args:
        people: name, source portrait and one edit for each expression.
        expressions: column heads after "source".
        title: of the sheet.
        subtitle: of the sheet.
    """
    rows = [Row(label=name, cells=[source, *edits]) for name, source, edits in people]
    return sheet(title, subtitle, ["source", *expressions], rows)


def intensity_strip(
    strips: Sequence[tuple[str, Sequence[Portrait]]],
    intensities: Sequence[float],
    *,
    title: str,
    subtitle: str,
) -> Image.Image:
    """One expression of one person a row, rising intensity across; a wider gap before what lies above 1."""
    columns = [f"{value:g}" for value in intensities]
    last_trained = max((index for index, value in enumerate(intensities) if value <= 1.0), default=0)
    gaps = (last_trained,) if last_trained + 1 < len(columns) else ()
    rows = [Row(label=label, cells=images) for label, images in strips]
    return sheet(title, subtitle, columns, rows, tile=160, gaps_after=gaps)


def blend_strip(
    strips: Sequence[tuple[str, str, Sequence[Portrait], Portrait]],
    weights: Sequence[float],
    both: float,
    *,
    title: str,
    subtitle: str,
) -> Image.Image:
    """From one expression to another across, and at the right both together at intensity `both`.

    Args:
        strips: first expression, second expression, one image a weight of the second, image of both.
        weights: of the second expression; the first has 1 - weight.
        both: intensity of each component in the last column.
        title: of the sheet.
        subtitle: of the sheet.
    """
    columns = [f"{1 - w:.0%} + {w:.0%}" for w in weights] + [f"both at {both:g}"]
    columns[0], columns[len(weights) - 1] = "first", "second"
    rows = []
    for first, second, images, together in strips:
        captions = [first, *[""] * (len(weights) - 2), second, f"{first} + {second}"]
        rows.append(Row(label=f"{first}\nto {second}", cells=[*images, together], captions=captions))
    return sheet(title, subtitle, columns, rows, tile=144, gaps_after=(len(weights) - 1,))


def enlarge(portrait: Portrait, side: int) -> Image.Image:
    """A portrait scaled to `side` pixels by Lanczos."""
    return Image.fromarray(portrait).resize((side, side), Image.Resampling.LANCZOS)


def png(image: Image.Image) -> bytes:
    """The image as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def webp(image: Image.Image, quality: int = 90) -> bytes:
    """The image as WebP, several times smaller than PNG, for the pages that carry it inline."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality, method=4)
    return buffer.getvalue()


def _font(size: float) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont), "every build of Pillow we support has FreeType"
    return font


def _width(text: str, font: ImageFont.FreeTypeFont) -> int:
    return int(font.getlength(text)) + 1


def _fitting(text: str, room: int, size: float) -> ImageFont.FreeTypeFont:
    """The built-in font at `size`, or smaller where the text would leave its cell."""
    return _font(max(9.0, min(size, size * room / max(1, _width(text, _font(size))))))


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
        draw.text((left, y), line, fill=_FAINT if index else _INK, font=_font(15), anchor="lm")


def _rounded(side: int) -> Image.Image:
    """A mask of rounded corners, drawn four times larger and reduced so that the corners are smooth."""
    mask = Image.new("L", (side * 4, side * 4), 0)
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, side * 4 - 1, side * 4 - 1), _CORNER * 4, fill=255)
    return mask.resize((side, side), Image.Resampling.LANCZOS)
