"""Charts are drawn once: a list of shapes, SVG in a page, and pixels where only pictures are taken.

A shape has a kind, which says its colour. In a page the kind is a CSS class, so that a chart follows the
page's light or dark scheme; as pixels it has the colours of the light one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from typing import TYPE_CHECKING, Final, Literal

from registry.errors import shown

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

Point = tuple[float, float]
Anchor = Literal["start", "middle", "end"]

LIGHT: Final[Mapping[str, str]] = {
    "paper": "#fafaf8", "card": "#fff", "ink": "#26282f", "faint": "#6c7080", "line": "#e4e4e0",
    "cell": "#f1f1ee", "good": "#1a7f4b", "accent": "#3266c8", "out": "#d2563f",
    "beside": "#b06a00", "white": "#fff",
}  # fmt: skip
"""The colours of the style sheets' light scheme, by the names of their variables."""


@dataclass(frozen=True, slots=True)
class Paint:
    """How a kind of shape looks: names of colours, width of its outline, how much it covers, dashes."""

    fill: str = ""
    stroke: str = ""
    width: float = 1.0
    opacity: float = 1.0
    dash: tuple[float, float] | None = None


PAINTS: Final[Mapping[str, Paint]] = {
    "ink": Paint(fill="ink"),
    "bold": Paint(fill="ink"),
    "faded": Paint(fill="faint"),
    "strong": Paint(fill="white"),
    "cell": Paint(fill="cell"),
    "unasked": Paint(fill="cell", opacity=0.45),
    "hit": Paint(fill="accent"),
    "miss": Paint(fill="out"),
    "right": Paint(fill="good"),
    "ours": Paint(fill="accent"),
    "beside": Paint(fill="beside"),
    "grid": Paint(stroke="line"),
    "ideal": Paint(stroke="faint", dash=(4, 4)),
    "outline": Paint(stroke="out", width=1.6, dash=(4, 3)),
    "band": Paint(fill="accent", opacity=0.18),
    "bandbeside": Paint(fill="beside", opacity=0.13),
    "line": Paint(stroke="accent", width=2),
    "linebeside": Paint(stroke="beside", width=1.6, dash=(5, 3)),
    "whisker": Paint(stroke="accent", width=3),
    "whiskerbeside": Paint(stroke="beside", width=2),
    "rule": Paint(stroke="ink", width=1.8),
    "rulefailed": Paint(stroke="out", width=1.8),
    "alone": Paint(stroke="faint", width=1.5),
    "best": Paint(stroke="good", width=1.5),
    "forbidden": Paint(fill="out", opacity=0.1),
}


def css() -> str:
    """The rules that give every kind its colours in a page."""
    rules = []
    for name, paint in PAINTS.items():
        fill = "none" if not paint.fill else "#fff" if paint.fill == "white" else f"var(--{paint.fill})"
        stroke = f";stroke:var(--{paint.stroke});stroke-width:{paint.width:g}" if paint.stroke else ""
        dash = f";stroke-dasharray:{paint.dash[0]:g} {paint.dash[1]:g}" if paint.dash else ""
        cover = f";opacity:{paint.opacity:g}" if paint.opacity < 1 else ""
        rules.append(f"svg.drawing .{name}{{fill:{fill}{stroke}{dash}{cover}}}")
    return "".join(rules)


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """One shape.

    Attributes:
        form: "rect" and "picture" have two corners, "line" and "polygon" any number of points, "dot" a middle
            and a radius in `size`, "text" a point on its base line.
        kind: see `PAINTS`.
        points: x to the right, y down.
        size: of a text or a dot; how round a rectangle's corners are.
        opacity: of this shape alone.
        words: of a text; what a picture shows.
        anchor: which end of a text is at its point.
        angle: degrees that a text is turned, clockwise.
        picture: pixels.
    """

    form: Literal["rect", "line", "polygon", "dot", "text", "picture"]
    kind: str
    points: tuple[Point, ...]
    size: float = 0.0
    opacity: float = 1.0
    words: str = ""
    anchor: Anchor = "start"
    angle: float = 0.0
    picture: Image.Image | None = None


@dataclass(kw_only=True, slots=True)
class Drawing:
    """A chart of some width and height.

    Attributes:
        name: what a reader who cannot see it is told.
        layout: CSS class that says how narrow a page may make it.
    """

    width: float
    height: float
    name: str
    layout: str = ""
    shapes: list[Shape] = field(default_factory=list)

    def rect(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        kind: str,
        *,
        round_: float = 5,
        opacity: float = 1,
    ) -> None:
        corners = ((x, y), (x + width, y + height))
        self.shapes.append(Shape(form="rect", kind=kind, points=corners, size=round_, opacity=opacity))

    def line(self, points: Sequence[Point], kind: str) -> None:
        self.shapes.append(Shape(form="line", kind=kind, points=tuple(points)))

    def polygon(self, points: Sequence[Point], kind: str) -> None:
        self.shapes.append(Shape(form="polygon", kind=kind, points=tuple(points)))

    def dot(self, x: float, y: float, radius: float, kind: str) -> None:
        self.shapes.append(Shape(form="dot", kind=kind, points=((x, y),), size=radius))

    def text(
        self, x: float, y: float, words: object, kind: str = "ink", *, size: float = 12,
        anchor: Anchor = "start", angle: float = 0,
    ) -> None:  # fmt: skip
        self.shapes.append(
            Shape(
                form="text",
                kind=kind,
                points=((x, y),),
                size=size,
                words=shown(words),
                anchor=anchor,
                angle=angle,
            )
        )

    def picture(self, x: float, y: float, side: float, picture: Image.Image, words: str) -> None:
        corners = ((x, y), (x + side, y + side))
        self.shapes.append(
            Shape(form="picture", kind="", points=corners, words=shown(words), picture=picture)
        )

    def svg(self) -> str:
        """The drawing as an element of a page that has the rules of `css`."""
        parts = "".join(_element(shape) for shape in self.shapes)
        return (
            f'<svg class="chart drawing {self.layout}" viewBox="0 0 {self.width:g} {self.height:g}" '
            f'role="img" aria-label="{escape(shown(self.name))}">{parts}</svg>'
        )

    def image(self, scale: float = 2.0) -> Image.Image:
        """The drawing as pixels on a card, ``scale`` pixels a unit."""
        from PIL import Image, ImageDraw

        fine = 2 * scale  # drawn twice as large and reduced, so that edges are smooth
        size = round(self.width * fine), round(self.height * fine)
        canvas = Image.new("RGB", size, LIGHT["card"])
        pen = ImageDraw.Draw(canvas, "RGBA")
        for shape in self.shapes:
            _paint(canvas, pen, shape, fine)
        return canvas.resize((size[0] // 2, size[1] // 2), Image.Resampling.BOX)


def _element(shape: Shape) -> str:
    kind = f'class="{shape.kind}"'
    if shape.opacity < 1:
        kind += f' fill-opacity="{shape.opacity:.3f}"'
    (x, y), (right, bottom) = shape.points[0], shape.points[-1]
    match shape.form:
        case "rect":
            size = f'x="{x:.1f}" y="{y:.1f}" width="{right - x:.1f}" height="{bottom - y:.1f}"'
            return f'<rect {kind} {size} rx="{shape.size:g}"/>'
        case "dot":
            return f'<circle {kind} cx="{x:.1f}" cy="{y:.1f}" r="{shape.size:g}"/>'
        case "text":
            turned = f' transform="rotate({shape.angle:g} {x:.1f} {y:.1f})"' if shape.angle else ""
            at = "" if shape.anchor == "start" else f' text-anchor="{shape.anchor}"'
            heavy = ' font-weight="600"' if shape.kind == "bold" else ""
            return (
                f'<text {kind} x="{x:.1f}" y="{y:.1f}" font-size="{shape.size:g}"{at}{heavy}{turned}>'
                f"{escape(shape.words)}</text>"
            )
        case "picture":
            from trainer.evaluation.sheets import address

            assert shape.picture is not None, "a picture has pixels"
            size = f'x="{x:.1f}" y="{y:.1f}" width="{right - x:.1f}" height="{bottom - y:.1f}"'
            return (
                f'<image {size} href="{address(shape.picture)}"><title>{escape(shape.words)}</title></image>'
            )
        case _:
            element = "polyline" if shape.form == "line" else "polygon"
            points = " ".join(f"{px:.1f},{py:.1f}" for px, py in shape.points)
            return f'<{element} {kind} points="{points}"/>'


def _paint(canvas: Image.Image, pen: ImageDraw.ImageDraw, shape: Shape, scale: float) -> None:
    points = [(x * scale, y * scale) for x, y in shape.points]
    if shape.form == "picture":
        assert shape.picture is not None, "a picture has pixels"
        side = round(points[1][0] - points[0][0])
        canvas.paste(
            shape.picture.convert("RGB").resize((side, side)), (round(points[0][0]), round(points[0][1]))
        )
        return
    paint = PAINTS[shape.kind]
    fill = _colour(paint.fill, paint.opacity * shape.opacity)
    stroke, width = _colour(paint.stroke, paint.opacity), round(paint.width * scale)
    if shape.form == "text":
        _write(canvas, shape, points[0], scale)
    elif shape.form == "rect" and paint.dash is None:
        pen.rounded_rectangle(
            (*points[0], *points[1]), shape.size * scale, fill=fill, outline=stroke, width=width
        )
    elif shape.form == "dot":
        radius, (x, y) = shape.size * scale, points[0]
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill, outline=stroke, width=width)
    elif shape.form == "polygon":
        pen.polygon(points, fill=fill)
    else:
        if shape.form == "rect":
            (x, y), (right, bottom) = points
            points = [(x, y), (right, y), (right, bottom), (x, bottom), (x, y)]
        for piece in _dashes(points, paint.dash, scale):
            pen.line(piece, fill=stroke, width=width, joint="curve")


def _dashes(points: Sequence[Point], dash: tuple[float, float] | None, scale: float) -> Iterator[list[Point]]:
    """The pieces of a line that are drawn; dashes begin anew at each point."""
    if dash is None:
        yield list(points)
        return
    on, period = dash[0] * scale, sum(dash) * scale
    for (x, y), (right, bottom) in pairwise(points):
        length = max(1e-9, ((right - x) ** 2 + (bottom - y) ** 2) ** 0.5)
        at = 0.0
        while at < length:
            ends = (at / length, min(1.0, (at + on) / length))
            yield [(x + (right - x) * end, y + (bottom - y) * end) for end in ends]
            at += period


def _write(canvas: Image.Image, shape: Shape, at: Point, scale: float) -> None:
    """Write a text; a turned one is written beside and turned around its point."""
    from PIL import Image, ImageDraw

    from trainer.evaluation.sheets import font

    letters, colour = font(shape.size * scale), _colour(PAINTS[shape.kind].fill, 1.0)
    assert colour is not None, "letters have a colour"
    heavy = scale * 0.22 if shape.kind == "bold" else 0
    where = {"start": "ls", "middle": "ms", "end": "rs"}[shape.anchor]
    if not shape.angle:
        ImageDraw.Draw(canvas).text(at, shape.words, colour, letters, anchor=where, stroke_width=heavy)
        return
    reach = int(letters.getlength(shape.words)) + round(shape.size * scale)
    mask = Image.new("L", (2 * reach, 2 * reach), 0)
    ImageDraw.Draw(mask).text((reach, reach), shape.words, 255, letters, anchor=where, stroke_width=heavy)
    turned = mask.rotate(-shape.angle, Image.Resampling.BICUBIC)
    canvas.paste(
        Image.new("RGB", turned.size, colour[:3]), (round(at[0]) - reach, round(at[1]) - reach), turned
    )


def _colour(name: str, opacity: float) -> tuple[int, int, int, int] | None:
    if not name:
        return None
    from PIL import ImageColor

    return (*ImageColor.getrgb(LIGHT[name])[:3], round(255 * opacity))
