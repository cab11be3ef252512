"""Charts as inline SVG: they take their colours from the page, so they follow its light or dark scheme."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from trainer.evaluation.report import Curve

_CELL = 46
_LEFT = 92
_TOP = 84


def confusion_heat_map(
    matrix: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    pairs: Sequence[tuple[str, str]] = (),
) -> str:
    """Asked expressions down, judged ones across; the rate is the ink, right answers blue, wrong ones red.

    Args:
        matrix: rates, rows sum to 1.
        rows: asked expressions.
        columns: judged expressions.
        pairs: declared confusing pairs, outlined.
    """
    partners = {pair for a, b in pairs for pair in ((a, b), (b, a))}
    parts = []
    for i, column in enumerate(columns):
        x = _LEFT + i * _CELL + _CELL / 2
        parts.append(
            f'<text x="{x}" y="{_TOP - 10}" transform="rotate(-42 {x} {_TOP - 10})">{escape(column)}</text>'
        )
    for j, (asked, rates) in enumerate(zip(rows, matrix, strict=True)):
        y = _TOP + j * _CELL
        parts.append(f'<text class="end" x="{_LEFT - 10}" y="{y + _CELL / 2 + 4}">{escape(asked)}</text>')
        for i, (judged, rate) in enumerate(zip(columns, rates, strict=True)):
            kind = "hit" if asked == judged else "miss"
            outline = " pair" if (asked, judged) in partners else ""
            x = _LEFT + i * _CELL
            parts.append(
                f'<rect class="cell{outline}" x="{x + 1}" y="{y + 1}" width="{_CELL - 2}" '
                f'height="{_CELL - 2}" rx="5"/>'
            )
            if rate > 0:
                parts.append(
                    f'<rect class="{kind}" x="{x + 1}" y="{y + 1}" width="{_CELL - 2}" '
                    f'height="{_CELL - 2}" rx="5" fill-opacity="{0.12 + 0.88 * rate:.3f}"/>'
                )
                strong = " strong" if rate > 0.55 else ""
                parts.append(
                    f'<text class="mid{strong}" x="{x + _CELL / 2}" y="{y + _CELL / 2 + 4}">'
                    f"{round(rate * 100)}</text>"
                )
    width, height = _LEFT + len(columns) * _CELL + 56, _TOP + len(rows) * _CELL + 8
    return (
        f'<svg class="chart heat" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="confusion matrix">{"".join(parts)}</svg>'
    )


def response_curve(curve: Curve) -> str:
    """One expression: judged against asked intensity, its interval as a band, the ideal as a dashed line."""
    width, height, left, bottom, top = 220, 168, 30, 140, 26
    span = max(1.0, max(curve.asked))
    highest = max(1.1, max(value.high for value in curve.judged))

    def x(asked: float) -> float:
        return left + asked / span * (width - left - 12)

    def y(judged: float) -> float:
        return bottom - max(judged, -0.05) / highest * (bottom - top)

    line = " ".join(f"{x(a):.1f},{y(v.value):.1f}" for a, v in zip(curve.asked, curve.judged, strict=True))
    upper = [f"{x(a):.1f},{y(v.high):.1f}" for a, v in zip(curve.asked, curve.judged, strict=True)]
    lower = [f"{x(a):.1f},{y(v.low):.1f}" for a, v in zip(curve.asked, curve.judged, strict=True)]
    ticks = "".join(
        f'<line class="grid" x1="{left}" x2="{width - 12}" y1="{y(t):.1f}" y2="{y(t):.1f}"/>'
        f'<text class="end small" x="{left - 5}" y="{y(t) + 3.5:.1f}">{t:g}</text>'
        for t in (0.0, 0.5, 1.0)
    )
    feet = "".join(
        f'<text class="mid small" x="{x(a):.1f}" y="{bottom + 15}">{a:g}</text>' for a in curve.asked
    )
    dots = "".join(
        f'<circle class="dot" cx="{x(a):.1f}" cy="{y(v.value):.1f}" r="3"/>'
        for a, v in zip(curve.asked, curve.judged, strict=True)
    )
    return (
        f'<svg class="chart curve" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="response of {escape(curve.expression)}">'
        f'<text class="name" x="{left}" y="15">{escape(curve.expression)}</text>{ticks}{feet}'
        f'<line class="ideal" x1="{x(0):.1f}" y1="{y(0):.1f}" x2="{x(1):.1f}" y2="{y(1):.1f}"/>'
        f'<polygon class="band" points="{" ".join(upper + lower[::-1])}"/>'
        f'<polyline class="line" points="{line}"/>{dots}</svg>'
    )
