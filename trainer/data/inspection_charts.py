"""Charts of a dataset as inline SVG; their colours are the page's, in its light and its dark scheme."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from trainer.data.inspection import BINS, Distribution, Expression


def histogram(title: str, spread: Distribution) -> str:
    """How a measure is spread: bars, a mark at the median and the ends below."""
    width, height, left, top, bottom = 250.0, 148.0, 8.0, 24.0, 112.0
    step, most = (width - 2 * left) / BINS, max(spread.bins)
    bars = "".join(
        f'<rect class="hit" x="{_n(left + at * step + 0.5)}" y="{_n(bottom - tall)}" '
        f'width="{_n(step - 1)}" height="{_n(tall)}"><title>{count} pictures</title></rect>'
        for at, count in enumerate(spread.bins)
        if (tall := max(1.0, (bottom - top) * count / most) if count else 0.0)
    )
    middle = left + (spread.median - spread.low) / (spread.high - spread.low) * (width - 2 * left)
    missing = f", {spread.missing} without" if spread.missing else ""
    return _svg(
        f"histogram of {title}", width, height,
        f'<text class="name" x="{left}" y="14">{escape(title)}</text>{bars}'
        f'<line class="ideal" x1="{_n(middle)}" x2="{_n(middle)}" y1="{top}" y2="{bottom}"/>'
        f'<line class="grid" x1="{left}" x2="{width - left}" y1="{bottom}" y2="{bottom}"/>'
        f'<text class="small" x="{left}" y="{bottom + 13}">{_short(spread.low)}</text>'
        f'<text class="end small" x="{width - left}" y="{bottom + 13}">{_short(spread.high)}</text>'
        f'<text class="small" x="{left}" y="{bottom + 29}">median {_short(spread.median)}, 5–95 %: '
        f"{_short(spread.p5)}–{_short(spread.p95)}{missing}</text>",
    )  # fmt: skip


def response(one: Expression) -> str:
    """What the scorer sees against what was asked for: median, and 10th to 90th percentile as a band."""
    width, height, left, top, bottom, right = 250.0, 168.0, 30.0, 26.0, 142.0, 12.0
    span = max([1.0, *(level.asked for level in one.levels)])

    def x(asked: float) -> float:
        return left + asked / span * (width - left - right)

    def y(seen: float) -> float:
        return bottom - seen * (bottom - top)

    ticks = "".join(
        f'<line class="grid" x1="{left}" x2="{width - right}" y1="{_n(y(tick))}" y2="{_n(y(tick))}"/>'
        f'<text class="end small" x="{left - 5}" y="{_n(y(tick) + 3.5)}">{tick:g}</text>'
        for tick in (0.0, 0.5, 1.0)
    )
    feet = "".join(
        f'<text class="mid small" x="{_n(x(level.asked))}" y="{bottom + 15}">{level.asked:g}</text>'
        for level in one.levels
    )
    upper = [f"{_n(x(level.asked))},{_n(y(level.p90))}" for level in one.levels]
    lower = [f"{_n(x(level.asked))},{_n(y(level.p10))}" for level in reversed(one.levels)]
    line = " ".join(f"{_n(x(level.asked))},{_n(y(level.median))}" for level in one.levels)
    dots = "".join(
        f'<circle class="hit" cx="{_n(x(level.asked))}" cy="{_n(y(level.median))}" r="3">'
        f"<title>{level.pictures} pictures</title></circle>"
        for level in one.levels
    )
    return _svg(
        f"scores of {one.name}", width, height,
        f'<text class="name" x="{left}" y="15">{escape(one.name)}</text>{ticks}{feet}'
        f'<line class="ideal" x1="{_n(x(0))}" y1="{_n(y(0))}" x2="{_n(x(1))}" y2="{_n(y(1))}"/>'
        f'<polygon class="band" points="{" ".join(upper + lower)}"/>'
        f'<polyline class="line" points="{line}"/>{dots}',
    )  # fmt: skip


def shares(parts: Sequence[float]) -> str:
    """One bar cut into parts, each a share of 0 to 1: the first in strong colour."""
    places, at = [], 0.0
    for number, share in enumerate(parts):
        if share > 0:
            places.append(
                f'<rect class="{"hit" if number == 0 else "band"}" x="{_n(400 * at)}" y="1" '
                f'width="{_n(max(1.0, 400 * share))}" height="12" rx="2"/>'
            )
        at += share
    return _svg("share", 400, 14, "".join(places), "bar")


def _svg(label: str, width: float, height: float, content: str, kind: str = "curve") -> str:
    return (
        f'<svg class="chart {kind}" viewBox="0 0 {_n(width)} {_n(height)}" role="img" '
        f'aria-label="{escape(label)}">{content}</svg>'
    )


def _n(value: float) -> str:
    """A coordinate with one digit, without a needless zero."""
    return f"{value:.1f}".removesuffix(".0")


def _short(value: float) -> str:
    """A figure with three digits, and no power of ten where a whole number will do."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
