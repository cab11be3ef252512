"""Portraits drawn from an identity and a continuous expression vector.

Drawing is vector graphics in head units (x to the right, y down, the face about 1.5 wide and 1.9 high) on a
supersampled canvas that is box-filtered down, so every edge is anti-aliased and the same arguments give the
same pixels. Later shapes cover earlier ones: back hair, body, head, features, front hair. The file is long
because it is one drawing: each function draws one part of the face.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw

from trainer.portraits.expressions import CONFUSING_PAIRS, EXPRESSIONS, action_units, one_hot
from trainer.portraits.identities import DOMAINS, Domain, Identity, Pose, identity, pose

__all__ = [
    "CONFUSING_PAIRS", "DOMAINS", "EXPRESSIONS", "Domain", "Identity", "Pose", "identity", "one_hot", "pose",
    "render", "render_units",
]  # fmt: skip

_HEAD_UNITS_PER_SIDE = 2.62
_ANGLES = np.linspace(0, 2 * math.pi, 33)[:-1]
_COS, _SIN = np.cos(_ANGLES), np.sin(_ANGLES)
_ALONG = np.linspace(-1, 1, 15)
_CURVE = np.linspace(0, 1, 13)[:, None]
_CURVE_WEIGHTS = ((1 - _CURVE) ** 2, 2 * _CURVE * (1 - _CURVE), _CURVE**2)

WHITE = np.array([255.0, 255.0, 255.0])
Point = Sequence[float]


def _quad(start: Point, control: Point, end: Point) -> np.ndarray:
    """A quadratic Bezier curve as points [13, 2]."""
    a, b, c = _CURVE_WEIGHTS
    return a * np.asarray(start) + b * np.asarray(control) + c * np.asarray(end)


def _oval(x: float, y: float, rx: float, ry: float) -> np.ndarray:
    return np.stack([x + rx * _COS, y + ry * _SIN], 1)


class _Canvas:
    """Filled shapes and strokes in head units; colours are RGB arrays 0..255."""

    def __init__(self, side: int, place: Pose, tilt: float, background: np.ndarray):
        self.side = side
        self.scale = side / _HEAD_UNITS_PER_SIDE * place.scale
        self.centre = np.array([side * (0.5 + place.shift_x), side * (0.54 + place.shift_y)])
        cos, sin = math.cos(tilt), math.sin(tilt)
        self._turn = np.array([[cos, sin], [-sin, cos]]) * self.scale
        self._pivot = np.array([0.0, 0.75])
        self._turned_origin = self._pivot * self.scale + self.centre
        self.image = Image.new("RGB", (side, side), self._ink(background))
        self._draw = ImageDraw.Draw(self.image)
        halo = side * np.array([0.08, 0.02, 0.92, 0.86])
        self._draw.ellipse(halo.tolist(), fill=self._ink(background * 1.07))

    @staticmethod
    def _ink(colour: np.ndarray) -> tuple[int, int, int]:
        r, g, b = colour
        return (
            min(255, max(0, int(r + 0.5))),
            min(255, max(0, int(g + 0.5))),
            min(255, max(0, int(b + 0.5))),
        )

    def _pixels(self, points: np.ndarray, upright: bool) -> np.ndarray:
        if upright:
            return points * self.scale + self.centre
        return (points - self._pivot) @ self._turn + self._turned_origin

    def fill(self, points: np.ndarray, colour: np.ndarray, upright: bool = False) -> None:
        self._draw.polygon(self._pixels(points, upright).ravel().tolist(), fill=self._ink(colour))

    def stroke(self, points: np.ndarray, width: float, colour: np.ndarray) -> None:
        pixels = self._pixels(points, False)
        thickness = width * self.scale
        if thickness < 0.75:
            return
        ink = self._ink(colour)
        self._draw.line(pixels.ravel().tolist(), fill=ink, width=max(1, round(thickness)), joint="curve")
        r = thickness / 2
        for x, y in (pixels[0], pixels[-1]):
            self._draw.ellipse((x - r, y - r, x + r, y + r), fill=ink)

    def oval(self, x: float, y: float, rx: float, ry: float, colour: np.ndarray) -> None:
        self.fill(_oval(x, y, rx, ry), colour)


class _Face:
    """Colours and positions shared by the parts of one drawing."""

    def __init__(self, person: Identity, units: Mapping[str, float]):
        self.person, self.units = person, units
        self.anime = person.domain == "anime"
        skin = np.array(person.skin)
        for unit, share, tint in (
            ("flush", 0.28, (228, 70, 55)),
            ("pale", 0.30, (226, 232, 246)),
            ("sallow", 0.24, (150, 186, 96)),
        ):
            skin = skin + (np.array(tint, float) - skin) * share * min(1.4, max(0.0, units[unit]))
        self.skin = skin
        self.shade = skin * 0.80
        self.line = np.array([60.0, 40.0, 50.0]) if self.anime else skin * 0.42
        self.hair = np.array(person.hair)
        self.hair_dark = self.hair * 0.78

    def over_skin(self, colour: np.ndarray | Sequence[float], share: float) -> np.ndarray:
        return self.skin + (np.asarray(colour, float) - self.skin) * min(1.0, max(0.0, share))

    def crown(self, wide: float, high: float, rise: float = 0.0) -> np.ndarray:
        """The upper half of an oval around the head, from left to right over the top, [17, 2]."""
        whole = np.stack(
            [self.person.face_width * wide * _COS, self.person.face_height * high * _SIN + rise], 1
        )
        return np.concatenate([whole[16:], whole[:1]])


def _back_hair(canvas: _Canvas, face: _Face) -> None:
    p = face.person
    w, h, style = p.face_width, p.face_height, p.hair_style
    length = {"parted": 0.75, "long": 1.45, "fringe": 1.0}.get(style)
    if length is not None:
        sides = [[w * 1.22, length * 0.6], [w * 1.12, length], [-w * 1.12, length], [-w * 1.22, length * 0.6]]
        canvas.fill(np.concatenate([face.crown(1.24, 1.16, -0.05), np.array(sides)]), face.hair_dark)
    elif style == "curly":
        for k in range(12):
            turn = math.pi * (1 + k / 11)
            r = 0.26 + 0.04 * ((p.seed * 7 + k * 5) % 3)
            canvas.oval(w * 1.1 * math.cos(turn), h * 1.02 * math.sin(turn) - 0.02, r, r, face.hair_dark)
    elif style == "bun":
        canvas.oval(0, -h * 1.15, 0.27, 0.25, face.hair_dark)


def _body(canvas: _Canvas, face: _Face) -> None:
    canvas.fill(_oval(0, 1.48, 1.0, 0.62), np.array(face.person.clothes), upright=True)
    neck = np.array([[-0.26, 0.5], [0.26, 0.5], [0.30, 1.08], [-0.30, 1.08]])
    canvas.fill(neck, face.shade, upright=True)
    canvas.fill(_oval(0, 1.03, 0.30, 0.16), face.shade, upright=True)


def _head(canvas: _Canvas, face: _Face) -> None:
    p = face.person
    w, h = p.face_width, p.face_height
    for side in (-1, 1):
        canvas.oval(side * w, 0.06, p.ear, p.ear * 1.35, face.skin)
        canvas.oval(side * w * 1.02, 0.07, p.ear * 0.5, p.ear * 0.8, face.shade)
        if p.earring:
            canvas.oval(side * w * 1.04, 0.06 + p.ear * 1.4, 0.05, 0.05, np.array([250.0, 215.0, 90.0]))
    below = np.maximum(0, _SIN)
    drop = 1 + 0.03 * max(0.0, face.units["open"])
    outline = np.stack(
        [w * _COS * (1 - p.jaw * 0.42 * below**2), h * _SIN * np.where(_SIN > 0, drop, 1.0)], 1
    )
    if face.anime:
        canvas.fill(outline * 1.025, face.line)
    canvas.fill(outline, face.skin)
    rim = np.concatenate([outline[:17], (outline[:17] * np.array([0.97, 0.9]))[::-1]])
    canvas.fill(rim, face.over_skin(face.shade, 0.4))
    if p.beard:
        inner = np.stack([outline[:17, 0] * 0.72, outline[:17, 1] * 0.62 + 0.10], 1)
        canvas.fill(np.concatenate([outline[:17], inner[::-1]]), face.over_skin(face.hair_dark, 0.8))


def _cheeks(canvas: _Canvas, face: _Face) -> None:
    p, blush = face.person, min(1.5, max(0.0, face.units["blush"]))
    y = p.eye_y + p.eye_height + 0.20
    faint = 0.10 if face.anime else 0.07
    for side in (-1, 1):
        x = side * p.face_width * 0.60
        canvas.oval(x, y, 0.20, 0.12, face.over_skin((240, 90, 95), faint + 0.42 * blush))
        if blush > 0.05:
            size = min(1.0, blush)
            canvas.oval(x, y, 0.14 * size, 0.08 * size, face.over_skin((240, 80, 95), faint + 0.56 * blush))
        if p.freckles:
            for k in range(4):
                canvas.oval(
                    side * (p.face_width * 0.42 + 0.065 * k),
                    y - 0.06 + 0.05 * (k % 2),
                    0.02,
                    0.02,
                    face.shade,
                )


def _nose(canvas: _Canvas, face: _Face) -> None:
    p, wrinkle = face.person, min(1.4, max(0.0, face.units["nose"]))
    y = p.eye_y + p.nose_length + 0.12 - 0.035 * wrinkle
    half = p.nose_width * (1 + 0.25 * wrinkle)
    if face.anime:
        canvas.stroke(np.array([[0.0, y - 0.04], [0.0, y]]), 0.028, face.shade * 0.8)
    else:
        canvas.stroke(_quad((-half, y - 0.01), (0, y + 0.085), (half, y - 0.01)), 0.03, face.shade * 0.78)
        canvas.stroke(
            np.array([[half * 0.35, y - p.nose_length * 0.75], [half * 0.55, y - 0.05]]), 0.022, face.shade
        )
    if wrinkle > 0:
        ink = face.over_skin(face.shade * 0.72, wrinkle)
        for side in (-1, 1):
            fold = _quad(
                (side * half * 1.3, y - 0.05),
                (side * (half + 0.10), y + 0.03),
                (side * (half + 0.13), y + 0.17),
            )
            canvas.stroke(fold, 0.030 * min(1, wrinkle), ink)
            canvas.stroke(
                np.array([[side * 0.02, y - 0.18], [side * 0.09, y - 0.22]]), 0.028 * min(1, wrinkle), ink
            )
        canvas.stroke(np.array([[-0.06, y - 0.24], [0.06, y - 0.24]]), 0.026 * min(1, wrinkle), ink)


def _eye(canvas: _Canvas, face: _Face, side: int) -> None:
    p, units = face.person, face.units
    x, y, half, high = side * p.eye_x, p.eye_y, p.eye_width, p.eye_height
    opening, squint = max(0.0, units["eye_open"]), max(0.0, units["squint"])
    arch = 1 - np.abs(_ALONG) ** 2.2
    slant = -p.eye_slant * side * _ALONG
    # A closing lid sinks to the lower lid's line, which a squint lifts.
    droop = max(0.0, 0.75 - opening)
    upper = y + slant + arch * high * (0.42 * droop - opening)
    lower = y + slant + arch * high * (0.78 - 0.66 * min(1.2, squint) + 0.12 * max(0.0, opening - 1))
    upper = np.minimum(upper, lower)
    xs = x + half * _ALONG
    canvas.fill(np.concatenate([np.stack([xs, upper], 1), np.stack([xs, lower], 1)[::-1]]), WHITE)

    iris = high * 0.9 * (1 - 0.2 * max(0.0, min(0.5, opening - 1)))
    iris_x, iris_y = x + units["gaze_x"] * half * 0.42, y + units["gaze_y"] * high * 0.5
    aspect = 0.78 if face.anime else 0.92

    def clipped(rx: float, ry: float, dx: float = 0.0, dy: float = 0.0) -> np.ndarray:
        px = np.clip(iris_x + dx + rx * _COS, xs[0], xs[-1])
        py = iris_y + dy + ry * _SIN
        return np.stack([px, np.clip(py, np.interp(px, xs, upper), np.interp(px, xs, lower))], 1)

    canvas.fill(clipped(iris * aspect, iris), np.array(p.eye_colour))
    canvas.fill(clipped(iris * aspect * 0.55, iris * 0.55), np.array([20.0, 15.0, 20.0]))
    canvas.fill(clipped(iris * 0.26, iris * 0.28, iris * 0.3, -iris * 0.35), WHITE)
    lid = np.stack([xs, upper], 1)
    canvas.stroke(lid, 0.05 if face.anime else 0.038, face.line * 0.75)
    strain = min(1.0, squint)
    canvas.stroke(
        np.stack([xs, lower], 1)[2:-2], 0.018 + 0.014 * strain, face.over_skin(face.line, 0.45 + 0.4 * strain)
    )
    if droop > 0:
        crease = np.stack([xs, upper - high * (0.25 + 0.3 * droop) * arch - 0.02], 1)[2:-2]
        canvas.stroke(crease, 0.022, face.over_skin(face.shade * 0.8, 2.2 * droop))


def _brow(canvas: _Canvas, face: _Face, side: int) -> None:
    p, units = face.person, face.units
    alone = units["brow_asym"]
    y = p.eye_y - p.brow_height - 0.135 * units["brow_raise"] - (0.17 * alone if side > 0 else -0.05 * alone)
    furrow, inner_up = units["brow_furrow"], units["brow_inner"]
    inner = (
        side * (p.eye_x - p.eye_width * 0.95 * p.brow_length - 0.045 * furrow),
        y + 0.155 * furrow - 0.125 * inner_up,
    )
    outer = (
        side * (p.eye_x + p.eye_width * 1.15 * p.brow_length),
        y + 0.02 - 0.02 * furrow + 0.075 * inner_up,
    )
    lift = 0.075 - 0.05 * max(0.0, furrow) + (0.05 * alone if side > 0 else 0.0)
    middle = (side * p.eye_x, (inner[1] + outer[1]) / 2 - lift)
    dark = face.hair_dark * 0.75 if face.hair.sum() < 480 else face.hair * 0.62
    canvas.stroke(_quad(inner, middle, outer), p.brow_thickness, dark)


def _forehead(canvas: _Canvas, face: _Face) -> None:
    p, furrow = face.person, min(1.3, max(0.0, face.units["brow_furrow"]))
    if furrow > 0:
        for side in (-1, 1):
            x, y = side * 0.045, p.eye_y - p.brow_height
            line = np.array([[x * 0.8, y + 0.02], [x, y + 0.14]])
            canvas.stroke(line, 0.026 * min(1, furrow), face.over_skin(face.shade * 0.75, furrow))


def _lips(face: _Face) -> tuple[np.ndarray, np.ndarray, float]:
    """Upper and lower lip lines [13, 2] and the mouth's half width."""
    p, units = face.person, face.units
    jaw, corner, lopsided = max(0.0, units["open"]), units["corner"], units["corner_asym"]
    roundness = units["round"] * jaw
    half = p.mouth_width * units["width"] * (1 - 0.28 * roundness)
    y, bow = p.mouth_y, 0.15 * corner
    left = (-half, y - 0.13 * corner + 0.02 * lopsided)
    right = (half * (1 + 0.1 * max(0.0, lopsided)), y - 0.13 * corner - 0.16 * lopsided)
    upper = _quad(left, (0, y + bow - 0.16 * units["lip_raise"] - 0.16 * roundness), right)
    lower = _quad(left, (0, y + bow + 0.62 * jaw + 0.01 + 0.05 * units["lip_raise"]), right)
    wave = units["wavy"] * 0.045 * np.sin(_CURVE[:, 0] * math.pi * 4)
    upper[:, 1] += wave
    lower[:, 1] += wave
    share = min(1.0, max(0.0, roundness * 1.3))
    if share > 0:
        height = 0.34 * jaw + 0.03
        turn = _CURVE[:, 0] * math.pi
        ring_x = -half * np.cos(turn)
        upper = upper * (1 - share) + np.stack([ring_x, y + 0.03 - height * 0.7 * np.sin(turn)], 1) * share
        lower = lower * (1 - share) + np.stack([ring_x, y + 0.03 + height * np.sin(turn)], 1) * share
    return upper, lower, half


def _mouth(canvas: _Canvas, face: _Face) -> None:
    p, units = face.person, face.units
    upper, lower, half = _lips(face)
    gap = float((lower[:, 1] - upper[:, 1]).max())
    thick = p.lip_thickness * (1 - 0.55 * max(0.0, min(1.2, units["press"])))
    lip = face.line if face.anime else np.array(p.lip_colour)
    if gap > 0.03:
        canvas.fill(np.concatenate([upper, lower[::-1]]), np.array([95.0, 25.0, 30.0]))
        teeth = min(1.0, max(0.0, units["teeth"]))
        if teeth > 0:
            share = 0.45 + 0.4 * max(0.0, min(1.0, units["lip_raise"]))
            edge = np.minimum(lower[:, 1], upper[:, 1] + share * gap * teeth)
            canvas.fill(
                np.concatenate([upper, np.stack([upper[:, 0], edge], 1)[::-1]]),
                np.array([250.0, 250.0, 248.0]),
            )
        tongue = min(1.0, max(0.0, (gap - 0.14) * 4))
        if tongue > 0:
            xs = np.clip(0.55 * half * _COS, lower[0, 0], lower[-1, 0])
            ys = np.clip(
                lower[6, 1] + 0.3 * gap * tongue * _SIN, None, np.interp(xs, lower[:, 0], lower[:, 1])
            )
            canvas.fill(np.stack([xs, ys], 1), np.array([225.0, 100.0, 105.0]))
        canvas.stroke(lower, thick * 1.1, lip)
        canvas.stroke(upper, thick, lip)
    else:
        canvas.stroke(upper, thick * 1.25, lip)
        canvas.stroke(upper, 0.026, face.line if face.anime else lip * 0.55)
    for side, end in ((-1, upper[0]), (1, upper[-1])):
        fold = min(1.3, max(0.0, units["corner"] - 0.3) * 1.2 + max(0.0, side * units["corner_asym"]))
        if fold > 0:
            steps = np.array([[0.05 * side, -0.06], [0.10 * side, 0.0], [0.05 * side, 0.07]])
            bracket = _quad(*(end + steps))
            canvas.stroke(bracket, 0.026 * min(1, fold), face.over_skin(face.shade * 0.8, fold))
    if p.mole_x is not None:
        canvas.oval(p.mole_x, p.mouth_y - 0.13, 0.028, 0.028, face.line)


def _glasses(canvas: _Canvas, face: _Face) -> None:
    p = face.person
    frame = np.array([45.0, 40.0, 50.0])
    reach = p.eye_width * 1.35
    for side in (-1, 1):
        rim = _oval(side * p.eye_x, p.eye_y + 0.02, reach, max(p.eye_height * 1.35, 0.17))
        canvas.stroke(np.concatenate([rim, rim[:1]]), 0.032, frame)
    canvas.stroke(np.array([[-p.eye_x + reach, p.eye_y], [p.eye_x - reach, p.eye_y]]), 0.032, frame)


def _drops(canvas: _Canvas, face: _Face) -> None:
    """Tear and sweat, drawn last: a sweat drop hidden by hair would hide the expression."""
    p, water, glint = face.person, np.array([105.0, 180.0, 245.0]), np.array([240.0, 250.0, 255.0])
    tear = min(1.3, max(0.0, face.units["tear"]))
    if tear > 0:
        x, y = -p.eye_x - 0.02, p.eye_y + p.eye_height * 0.8 + 0.13 * tear
        canvas.oval(x, y, 0.065 * tear, 0.12 * tear, water)
        canvas.oval(x - 0.015 * tear, y - 0.02 * tear, 0.02 * tear, 0.035 * tear, glint)
    sweat = min(1.3, max(0.0, face.units["sweat"]))
    if sweat > 0:
        x, y = p.face_width * 0.80, -0.22
        drop = _oval(x, y, 0.085 * sweat, 0.10 * sweat)
        drop = np.where((_SIN < -0.9)[:, None], np.array([[x - 0.01, y - 0.23 * sweat]]), drop)
        canvas.fill(drop, water)
        canvas.oval(x - 0.02 * sweat, y + 0.02 * sweat, 0.022 * sweat, 0.034 * sweat, glint)


def _front_hair(canvas: _Canvas, face: _Face) -> None:
    p = face.person
    w, h, f, style = p.face_width, p.face_height, p.hairline, p.hair_style
    cap = face.crown(1.10, 1.13, -0.03)
    edges: Mapping[str, list[list[float]]] = {
        "short": [[w * 0.98, 0.02], [w * 0.9, -f * 0.55], [w * 0.3, -f * 1.05], [-w * 0.4, -f * 0.95],
                  [-w * 0.92, -f * 0.5], [-w * 0.98, 0.02]],
        "buzz": [[w * 0.99, -0.12], [w * 0.86, -f], [0, -f * 1.22], [-w * 0.86, -f], [-w * 0.99, -0.12]],
        "swept": [[w * 0.99, 0.05], [w * 0.9, -f * 0.75], [-w * 0.45, -f * 1.2], [-w * 0.8, -f * 0.45],
                  [-w * 1.03, 0.08]],
        "bun": [[w * 0.98, 0], [w * 0.84, -f * 0.8], [0, -f * 1.18], [-w * 0.84, -f * 0.8], [-w * 0.98, 0]],
        "fringe": [[w * 1.02, 0.25], [w * 0.92, -f * 0.5],
                   *[[w * (0.92 - 1.84 * (k + 0.5) / 6), -f * (0.82 if k % 2 else 0.98)] for k in range(6)],
                   [-w * 0.92, -f * 0.5], [-w * 1.02, 0.25]],
        "parted": [[w * 1.16, 0.6], [w * 0.98, 0.62], [w * 0.86, -f * 0.6], [0.1, -f * 1.1],
                   [-w * 0.6, -f * 0.8], [-w * 0.86, -f * 0.4], [-w * 0.98, 0.62], [-w * 1.16, 0.6],
                   [-w * 1.10, -0.03]],
        "long": [[w * 1.2, 1.0], [w * 0.98, 1.0], [w * 0.90, -f * 0.3], [0.02, -f * 1.2],
                 [-w * 0.90, -f * 0.3], [-w * 0.98, 1.0], [-w * 1.2, 1.0], [-w * 1.10, -0.03]],
    }  # fmt: skip
    if style == "curly":
        for k in range(10):
            turn = math.pi * (1.06 + 0.88 * k / 9)
            r = 0.20 + 0.035 * ((p.seed * 3 + k * 7) % 3)
            canvas.oval(w * 0.98 * math.cos(turn), h * 0.95 * math.sin(turn) - 0.02, r, r, face.hair)
    else:
        colour = face.over_skin(face.hair, 0.6) if style == "buzz" else face.hair
        canvas.fill(np.concatenate([cap, np.array(edges[style])]), colour)
    if style == "bun":
        canvas.oval(0, -h * 1.17, 0.22, 0.20, face.hair)
    if style != "buzz":
        turn = math.pi * (1.18 + 0.3 * _CURVE[:, 0])
        shine = np.stack([w * 0.75 * np.cos(turn), h * np.sin(turn)], 1)
        canvas.stroke(shine, 0.05, np.minimum(255, face.hair * 1.18 + 14))


def render_units(
    person: Identity, units: Mapping[str, float], size: int = 64, place: Pose | None = None
) -> np.ndarray:
    """Draw `person` with action units (names of `expressions.UNITS`).

    Returns:
        uint8 [size, size, 3] RGB.

    Raises:
        ValueError: `size` is not within 64..512.
    """
    if not 64 <= size <= 512:
        raise ValueError(f"portraits are drawn at 64 to 512 pixels, not {size}")
    place = place or Pose()
    oversample = 4 if size < 128 else 3 if size < 256 else 2
    canvas = _Canvas(size * oversample, place, units["tilt"] * 0.5 + place.tilt, np.array(person.background))
    face = _Face(person, units)
    _back_hair(canvas, face)
    _body(canvas, face)
    _head(canvas, face)
    _cheeks(canvas, face)
    _nose(canvas, face)
    for side in (-1, 1):
        _eye(canvas, face, side)
        _brow(canvas, face, side)
    _forehead(canvas, face)
    _mouth(canvas, face)
    if person.glasses:
        _glasses(canvas, face)
    _front_hair(canvas, face)
    _drops(canvas, face)
    return np.asarray(canvas.image.reduce(oversample))


def render(
    person: Identity, expression: Sequence[float] | np.ndarray, size: int = 64, place: Pose | None = None
) -> np.ndarray:
    """Draw `person` with a 12-vector of intensities in the order of `EXPRESSIONS`.

    Args:
        expression: 12 numbers, 0 (absent) to 1 (full); up to 1.5 exaggerates.
        size: side in pixels, 64 to 512.
        place: head placement; None draws it centred.

    Returns:
        uint8 [size, size, 3] RGB, the same pixels for the same arguments.
    """
    return render_units(person, action_units(expression), size, place)
