"""``python -m infra.docs.diagram`` draws the way of an adapter into docs/images/way-of-an-adapter.svg.

Plain SVG, because the site loads no script that could draw. Its colours hold on light and on dark pages.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

TARGET = Path(__file__).resolve().parents[2] / "docs" / "images" / "way-of-an-adapter.svg"
#: Each box: its title, what it says below, and the colour of its floor.
MAKE = (
    ("recipe", "one YAML file"),
    ("data", "people, scores, filters"),
    ("training", "LoRA and its average"),
    ("evaluation", "verdict with intervals"),
    ("scan", "licences, backdoors"),
)
RELEASE = (
    ("push", "signed, immutable"),
    ("approval", "k of n people's keys"),
    ("promotion", "name@prod → digest"),
    ("admission", "14 numbered checks"),
    ("serving", "answers name digests"),
)
UNTRUSTED = (
    "S3, MLflow, database, network: convenient, never believed. They carry bytes; keys decide what counts."
)
_WIDTH, _BOX, _HIGH, _GAP = 996, 168, 64, 24
_TEAL, _BLUE, _INK, _PAPER = "#00897b", "#3f51b5", "#263238", "#fafafa"


def svg() -> str:
    """The picture as text."""
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} 330" role="img" '
        'font-family="sans-serif">',
        "<title>The way of an adapter, from a recipe to an answer</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto">'
        f'<path d="M0 0 8 4 0 8z" fill="{_INK}"/></marker></defs>',
        f'<rect width="{_WIDTH}" height="330" rx="12" fill="{_PAPER}"/>',
        _text(30, 34, "made and judged", _TEAL, 15),
        *_row(MAKE, 50, _TEAL),
        f'<path d="M{_middle(4)} 114V132H{_middle(0)}V152" fill="none" stroke="{_INK}" stroke-width="1.6" '
        'marker-end="url(#tip)"/>',
        _text(
            _middle(0) + 14,
            148,
            "released and used: each step is signed, and each is checked again",
            _BLUE,
            15,
        ),
        *_row(RELEASE, 156, _BLUE),
        f'<rect x="30" y="252" width="{_WIDTH - 60}" height="46" rx="8" fill="none" stroke="{_INK}" '
        'stroke-dasharray="5 4"/>',
        _text(_WIDTH / 2, 280, UNTRUSTED, _INK, 15, "middle"),
        *(
            f'<path d="M{_middle(at)} 220V250" stroke="{_INK}" stroke-dasharray="3 3" fill="none"/>'
            for at in range(5)
        ),
        "</svg>",
    ]
    return "\n".join(out) + "\n"


def _row(boxes: tuple[tuple[str, str], ...], top: int, colour: str) -> list[str]:
    out = []
    for at, (title, said) in enumerate(boxes):
        left = 30 + at * (_BOX + _GAP)
        out.append(f'<rect x="{left}" y="{top}" width="{_BOX}" height="{_HIGH}" rx="8" fill="{colour}"/>')
        out.append(_text(left + _BOX / 2, top + 28, title, "#fff", 17, "middle", bold=True))
        out.append(_text(left + _BOX / 2, top + 49, said, "#fff", 13, "middle"))
        if at:
            out.append(
                f'<path d="M{left - _GAP} {top + _HIGH // 2}h{_GAP - 3}" stroke="{_INK}" stroke-width="1.6" '
                'marker-end="url(#tip)"/>'
            )
    return out


def _middle(at: int) -> int:
    return 30 + at * (_BOX + _GAP) + _BOX // 2


def _text(
    x: float, y: float, text: str, colour: str, size: int, anchor: str = "start", *, bold: bool = False
) -> str:
    weight = ' font-weight="600"' if bold else ""
    place = f'x="{x:g}" y="{y}" text-anchor="{anchor}"'
    return f'<text {place} fill="{colour}" font-size="{size}"{weight}>{escape(text)}</text>'


if __name__ == "__main__":
    TARGET.write_text(svg(), "utf-8")
