"""Charts of a scan as inline SVG; they take their colours from the page, in its light and its dark scheme.

Coordinates have one decimal digit, so that the same figures give the same text everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Final

from registry.scanning.figures import ModuleFigures, Spectrum

_LEFT: Final = 132
_TOP: Final = 26
_ROW: Final = 20
_FARTHEST: Final = 4
"""As many powers of ten below the leading singular value are shown at most."""
_BEYOND: Final = 1.5
"""A value farther than so many widths of the population outside of it stands at the edge, as an arrow."""


def heat_map(
    modules: Sequence[ModuleFigures], figure: Callable[[ModuleFigures], float], name: str, unit: str = ""
) -> str:
    """Kinds of modules down, blocks across; the figure is the ink. A module that is missing is hatched.

    Args:
        modules: at least one.
        figure: what is shown of a module, >= 0.
        name: of the figure, for screen readers and hints.
        unit: stands behind each number.
    """
    kinds = list(dict.fromkeys(one.kind for one in sorted(modules, key=lambda one: (one.kind, one.block))))
    blocks = 1 + max(one.block for one in modules)
    values = {(one.kind, one.block): figure(one) for one in modules}
    top = max(values.values()) or 1.0
    cell = max(10.0, min(46.0, 760 / blocks))
    every = max(1, math.ceil(26 / cell))
    parts = [
        f'<text class="mid small" x="{_n(_LEFT + (block + 0.5) * cell)}" y="{_TOP - 8}">{block}</text>'
        for block in range(0, blocks, every)
    ]
    for row, kind in enumerate(kinds):
        y = _TOP + row * _ROW
        parts.append(f'<text class="end small" x="{_LEFT - 8}" y="{y + 14}">{escape(kind)}</text>')
        for block in range(blocks):
            value = values.get((kind, block))
            parts.append(
                _cell(_LEFT + block * cell, y, cell, value, top, f"{kind}, block {block}", name, unit)
            )
    width, height = _LEFT + blocks * cell + 8, _TOP + len(kinds) * _ROW + 6
    return _svg("heat", width, height, f"{name} by block and kind of module", parts)


def _cell(
    x: float, y: float, size: float, value: float | None, top: float, where: str, name: str, unit: str
) -> str:
    box = f'x="{_n(x + 0.5)}" y="{_n(y + 0.5)}" width="{_n(size - 1)}" height="{_ROW - 1}"'
    if value is None:
        return f'<rect class="none" {box}><title>{escape(where)}: not in the file</title></rect>'
    hint = f"<title>{escape(where)}: {escape(name)} {value:.4g}{escape(unit)}</title>"
    ink = 0.04 + 0.96 * value / top if value > 0 else 0.0
    inside = ""
    if size >= 34:
        strong = " strong" if ink > 0.55 else ""
        inside = f'<text class="mid tiny{strong}" x="{_n(x + size / 2)}" y="{_n(y + 14)}">{value:.2g}</text>'
    return (
        f'<g>{hint}<rect class="cell" {box}/><rect class="hit" {box} fill-opacity="{ink:.3f}"/>{inside}</g>'
    )


def decades(curves: Sequence[Spectrum]) -> int:
    """How many powers of ten the charts of some spectra need, 1 to 4, so that all have one scale."""
    least = min(
        (value for curve in curves for value in (*curve.values, *curve.low) if value > 0), default=1.0
    )
    return min(max(math.ceil(-math.log10(least)), 1), _FARTHEST)


def spectrum(curve: Spectrum, powers: int, reference: bool) -> str:
    """How singular values fall: this adapter's line on a logarithmic scale, over the clean adapters' band.

    Args:
        curve: of one kind of module.
        powers: powers of ten that the scale has.
        reference: whether there is a population; its band may still lack this kind.
    """
    width, height, left, bottom, top = 250.0, 168.0, 34.0, 146.0, 26.0
    count = max(len(curve.values), len(curve.middle), 2)

    def x(index: int) -> float:
        return left + (width - left - 8) * index / (count - 1)

    def y(value: float) -> float:
        return top + (bottom - top) * -math.log10(min(max(value, 10.0**-powers), 1.0)) / powers

    def points(values: Sequence[float]) -> list[str]:
        return [f"{_n(x(index))},{_n(y(value))}" for index, value in enumerate(values)]

    parts = [f'<text class="name" x="{_n(left)}" y="14">{escape(curve.kind)}</text>']
    for power in range(powers + 1):
        level = y(10.0**-power)
        label = "1" if power == 0 else f"1e-{power}"
        parts.append(
            f'<line class="grid" x1="{_n(left)}" x2="{_n(width - 8)}" y1="{_n(level)}" y2="{_n(level)}"/>'
        )
        parts.append(f'<text class="end small" x="{_n(left - 5)}" y="{_n(level + 3)}">{label}</text>')
    if curve.low and curve.high:
        outline = points(curve.low) + points(curve.high)[::-1]
        parts.append(f'<polygon class="band" points="{" ".join(outline)}"/>')
        parts.append(f'<polyline class="ideal" fill="none" points="{" ".join(points(curve.middle))}"/>')
    elif reference:
        parts.append(
            f'<text class="small" x="{_n(left + 6)}" y="{_n(bottom - 6)}">no band for this kind</text>'
        )
    parts.append(f'<polyline class="line" points="{" ".join(points(curve.values))}"/>')
    parts.append(f'<text class="small" x="{_n(left)}" y="{_n(height - 6)}">1</text>')
    parts.append(f'<text class="end small" x="{_n(width - 8)}" y="{_n(height - 6)}">{count}</text>')
    return _svg("spectrum", width, height, f"singular values of {curve.kind}", parts)


def strip(name: str, value: float, population: Sequence[float], suspicious: bool) -> str:
    """Where a value lies among those of the clean adapters: a dot for each of them, a mark for this one."""
    width, height, edge = 420.0, 22.0, 10.0
    low, high = (min(population), max(population)) if population else (value, value)
    spread = (high - low) or abs(high) or 1.0
    first, last = min(value, low), max(value, high)
    first, last = max(first, low - _BEYOND * spread), min(last, high + _BEYOND * spread)
    scale = (width - 2 * edge) / ((last - first) or 1.0)

    def x(at: float) -> float:
        return edge + (min(max(at, first), last) - first) * scale

    dots = "".join(f"M{_n(x(one))} 11h.01" for one in population)
    at, kind = x(value), "out" if suspicious else "in"
    if value < first:
        mark = f'<path class="{kind}" d="M{_n(at - 8)} 11l10 -7v14z"/>'
    elif value > last:
        mark = f'<path class="{kind}" d="M{_n(at + 8)} 11l-10 -7v14z"/>'
    else:
        mark = f'<path class="{kind}" d="M{_n(at - 2)} 1h4v20h-4z"/>'
    hint = f"<title>{escape(name)}: {value:.4g}; clean adapters from {low:.4g} to {high:.4g}</title>"
    line = f'<line class="grid" x1="{_n(edge)}" x2="{_n(width - edge)}" y1="11" y2="11"/>'
    body = [hint, line, f'<path class="dots" d="{dots}"/>', mark]
    return _svg("strip", width, height, f"{name} among clean adapters", body)


def bars(rows: Mapping[str, float]) -> list[str]:
    """A bar for each score, the largest as wide as the chart; negative scores have none."""
    top = max([*rows.values(), 0.0]) or 1.0
    return [
        _svg(
            "bar",
            200,
            12,
            f"score {value:.3g}",
            [f'<rect class="hit" x="0" y="2" width="{_n(200 * max(value, 0.0) / top)}" height="8" rx="3"/>'],
        )
        for value in rows.values()
    ]


def _svg(kind: str, width: float, height: float, label: str, parts: Sequence[str]) -> str:
    # A heat map of few blocks is not blown up.
    limit = f' style="max-width:{_n(1.4 * width)}px"' if kind == "heat" else ""
    return (
        f'<svg class="chart {kind}" viewBox="0 0 {_n(width)} {_n(height)}"{limit} role="img" '
        f'aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )


def _n(value: float) -> str:
    """A coordinate with one digit, without a needless zero."""
    return f"{value:.1f}".removesuffix(".0")
