"""The charts of evaluations and calibrations; see `trainer.evaluation.drawing`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from math import floor, log10
from typing import TYPE_CHECKING, Final

from trainer.evaluation.catalogue import show
from trainer.evaluation.drawing import Drawing
from trainer.evaluation.report import Blend, Curve, Metric, Value

if TYPE_CHECKING:
    from PIL import Image

CONFUSION_CELL: Final = 46
BLEND_CELL: Final = 78
_LEFT: Final = 96
_TOP: Final = 84


def confusion(
    matrix: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    pairs: Sequence[tuple[str, str]] = (),
) -> Drawing:
    """Asked expressions down, judged ones across; the rate is the ink, right answers blue, wrong ones red.

    Args:
        matrix: rates; a row sums to 1, or to less where the judge saw nothing in some edits. A row of zeros
            was not asked for, and is grey.
        rows: asked expressions.
        columns: judged expressions.
        pairs: declared confusing pairs, outlined.
    """
    partners = {pair for a, b in pairs for pair in ((a, b), (b, a))}
    cell = CONFUSION_CELL
    drawing = Drawing(
        width=_LEFT + len(columns) * cell + 62,
        height=_TOP + len(rows) * cell + 8,
        name="confusion matrix",
        layout="heat",
    )
    for i, column in enumerate(columns):
        drawing.text(_LEFT + (i + 0.5) * cell, _TOP - 10, column, angle=-42)
    for j, (asked, rates) in enumerate(zip(rows, matrix, strict=True)):
        y, known = _TOP + j * cell, any(rate > 0 for rate in rates)
        drawing.text(_LEFT - 10, y + cell / 2 + 4, asked, "ink" if known else "faded", anchor="end")
        for i, (judged, rate) in enumerate(zip(columns, rates, strict=True)):
            x, kind = _LEFT + i * cell, "hit" if asked == judged else "miss"
            box = (x + 1, y + 1, cell - 2, cell - 2)
            drawing.rect(*box, "cell" if known else "unasked")
            if rate > 0:
                drawing.rect(*box, kind, opacity=0.12 + 0.88 * min(rate, 1))
            if (asked, judged) in partners:
                drawing.rect(*box, "outline")
            if rate > 0:
                words = round(rate * 100) or "<1"
                drawing.text(
                    x + cell / 2, y + cell / 2 + 4, words, "strong" if rate > 0.55 else "ink", anchor="middle"
                )
    return drawing


def response(curve: Curve, beside: Curve | None = None) -> Drawing:
    """One expression: judged against asked intensity, its interval as a band, the ideal as a dashed line.

    Args:
        curve: of the adapter.
        beside: of the adapter that it is compared with, in another colour.
    """
    width, height, left, bottom, top = 220, 172, 30, 140, 28
    both = [curve] if beside is None else [beside, curve]
    span = max(1.0, *(max(one.asked, default=1.0) for one in both))
    highest = max(1.1, *(max((value.high for value in one.judged), default=1.1) for one in both))
    drawing = Drawing(width=width, height=height, name=f"response of {curve.expression}", layout="curve")

    def x(asked: float) -> float:
        return left + asked / span * (width - left - 12)

    def y(judged: float) -> float:
        return bottom - max(judged, -0.05) / highest * (bottom - top)

    drawing.text(left, 16, curve.expression, "bold", size=13)
    for tick in (0.0, 0.5, 1.0):
        drawing.line([(left, y(tick)), (width - 12, y(tick))], "grid")
        drawing.text(left - 5, y(tick) + 3.5, f"{tick:g}", "faded", size=10.5, anchor="end")
    for asked in curve.asked:
        drawing.text(x(asked), bottom + 16, f"{asked:g}", "faded", size=9.5, anchor="middle")
    drawing.line([(x(0), y(0)), (x(1), y(1))], "ideal")
    for one in both:
        other = one is beside
        points = list(zip(one.asked, one.judged, strict=True))
        upper = [(x(a), y(v.high)) for a, v in points]
        lower = [(x(a), y(v.low)) for a, v in points]
        if len(points) > 1:
            drawing.polygon([*upper, *lower[::-1]], "bandbeside" if other else "band")
            drawing.line([(x(a), y(v.value)) for a, v in points], "linebeside" if other else "line")
        for asked, value in points:
            drawing.dot(x(asked), y(value.value), 2.2 if other else 3, "beside" if other else "ours")
    return drawing


def blends(
    found: Sequence[Blend],
    expressions: Sequence[str],
    pictures: Mapping[tuple[str, str], Image.Image],
) -> Drawing:
    """Every pair of expressions: success and both judged halves below the diagonal, a picture above it.

    Args:
        found: pairs that were asked for; all others are grey.
        expressions: rows and columns.
        pictures: by the two expressions in the order of ``expressions``; the same name twice is the
            expression alone.
    """
    cell, known = BLEND_CELL, {frozenset(one.expressions): one for one in found}
    size = len(expressions) * cell
    drawing = Drawing(width=_LEFT + size + 50, height=_TOP + size + 8, name="blend matrix", layout="matrix")
    for i, column in enumerate(expressions):
        drawing.text(_LEFT + (i + 0.5) * cell, _TOP - 10, column, size=13, angle=-36)
        drawing.text(_LEFT - 10, _TOP + (i + 0.5) * cell + 4, column, size=13, anchor="end")
    for j, down in enumerate(expressions):
        for i, across in enumerate(expressions):
            x, y = _LEFT + i * cell + 2, _TOP + j * cell + 2
            one = known.get(frozenset((down, across)))
            picture = pictures.get((down, across))
            if j <= i and picture is not None:
                drawing.picture(x, y, cell - 4, picture, f"{down} and {across}" if i != j else down)
            elif j > i and one is not None:
                _halves(drawing, one, (down, across), x, y)
            else:
                drawing.rect(x, y, cell - 4, cell - 4, "cell")
    return drawing


def _halves(drawing: Drawing, one: Blend, order: tuple[str, str], x: float, y: float) -> None:
    side = BLEND_CELL - 4
    judged = dict(zip(one.expressions, one.judged, strict=True))
    if one.success > 0:
        drawing.rect(x, y, side, side, "right", opacity=0.1 + 0.5 * one.success)
    else:
        drawing.rect(x, y, side, side, "miss", opacity=0.16)
    drawing.text(
        x + side / 2, y + 28, f"{one.success:.0%}".replace("%", " %"), "bold", size=15, anchor="middle"
    )
    for line, name in enumerate(order):
        drawing.text(
            x + side / 2, y + 48 + 14 * line, f"{_fit(name, 9)} {judged[name]:.2f}", size=10, anchor="middle"
        )


def summary(groups: Sequence[tuple[str, Sequence[Metric]]], against: str = "") -> Drawing:
    """Metrics with intervals, each on its own scale: what is required, and what it is compared with.

    Args:
        groups: title and metrics.
        against: reference of the adapter that it is compared with, where there is one.
    """
    step, head, width = 40, 64, 860
    count = sum(len(metrics) for _, metrics in groups)
    drawing = Drawing(
        width=width, height=head + step * count + 34 * len(groups) + 10, name="metrics", layout="rows"
    )
    there = {which for _, metrics in groups for metric in metrics for which in metric.references}
    _legend(drawing, against, there)
    y = float(head)
    for title, metrics in groups:
        drawing.text(16, y + 20, title, "bold", size=14)
        y += 34
        for metric in metrics:
            _metric(drawing, metric, y)
            y += step
    return drawing


def _legend(drawing: Drawing, against: str, there: Collection[str]) -> None:
    x, y = 16.0, 30.0
    entries = [("ours", "adapter, 95 % interval"), ("rule", "required, the red side fails")]
    if against:
        entries.append(("beside", _fit(against, 28)))
    entries += [("alone", "base alone")] if "base" in there else []
    entries += [("best", "true answers")] if "renders" in there else []
    entries.append(("faded", "better"))
    for kind, words in entries:
        if kind == "rule":
            drawing.line([(x + 6, y - 8), (x + 6, y + 8)], "rule")
        elif kind in ("ours", "beside"):
            drawing.line([(x - 2, y), (x + 14, y)], "whisker" if kind == "ours" else "whiskerbeside")
            drawing.dot(x + 6, y, 5 if kind == "ours" else 3.5, kind)
        elif kind == "faded":
            drawing.polygon([(x + 6, y - 4), (x + 2, y + 3), (x + 10, y + 3)], kind)
        else:
            drawing.dot(x + 6, y, 4.5, kind)
        drawing.text(x + 20, y + 4, words, "faded", size=12)
        x += 40 + 6.2 * len(words)


_TRACK: Final = (290.0, 700.0)


def _metric(drawing: Drawing, metric: Metric, y: float) -> None:
    start, end = _TRACK
    low, high = scale(metric)

    def x(value: float) -> float:
        return start + (min(max(value, low), high) - low) / (high - low) * (end - start)

    middle = y + 14
    drawing.text(16, middle + 4, _fit(metric.title, 42), size=12)
    up = -1 if metric.direction == "higher" else 1
    tip, foot = (start - 20, middle + 4 * up), middle - 3 * up
    drawing.polygon([tip, (start - 24, foot), (start - 16, foot)], "faded")
    for bound, reach in ((metric.minimum, low), (metric.maximum, high)):
        if bound is not None:
            left, right = sorted((x(bound), x(reach)))
            drawing.rect(left, middle - 11, right - left, 22, "forbidden", round_=2)
    drawing.line([(start, middle), (end, middle)], "grid")
    for value, words in ((low, f"{low:g}"), (high, f"{high:g}")):
        drawing.line([(x(value), middle - 4), (x(value), middle + 4)], "grid")
        drawing.text(x(value), middle + 21, words, "faded", size=9.5, anchor="middle")
    for bound in (metric.minimum, metric.maximum):
        if bound is not None:
            drawing.line([(x(bound), middle - 11), (x(bound), middle + 11)], "rule")
    for which, kind in (("base", "alone"), ("renders", "best")):
        if which in metric.references:
            drawing.dot(x(metric.references[which].value), middle, 4.5, kind)
    if "against" in metric.references:
        _whisker(drawing, metric.references["against"], x, middle + 5, beside=True)
    _whisker(drawing, metric.value, x, middle - (3 if "against" in metric.references else 0), beside=False)
    mark = {True: "right", False: "miss", None: "ink"}[metric.passed]
    drawing.text(end + 22, middle + 4, show(metric.value.value, metric.unit), "bold", size=13)
    words = {True: "holds", False: "fails", None: ""}[metric.passed]
    drawing.text(end + 96, middle + 4, words, mark, size=12)


def _whisker(drawing: Drawing, value: Value, x: Callable[[float], float], y: float, *, beside: bool) -> None:
    drawing.line([(x(value.low), y), (x(value.high), y)], "whiskerbeside" if beside else "whisker")
    drawing.dot(x(value.value), y, 3.5 if beside else 5, "beside" if beside else "ours")


def scale(metric: Metric) -> tuple[float, float]:
    """The ends of a metric's axis: from 0, or below where something is, to the next round number."""
    shown = [metric.value.low, metric.value.high, *(one.value for one in metric.references.values())]
    shown += [bound for bound in (metric.minimum, metric.maximum) if bound is not None]
    low, high = min(0.0, *shown), max(0.0, *shown)
    return 0.0 - _round(-low), _round(high) or 1.0


def _round(value: float) -> float:
    """The smallest of 1, 1.5, 2, 3, 5, 8, 10 … and their parts that is not below a number; 0 for 0."""
    if value <= 0:
        return 0.0
    power = 10.0 ** floor(log10(value))
    steps = (power * step for step in (1, 1.5, 2, 3, 5, 8, 10))
    return next(round(step, 12) for step in steps if value <= step * (1 + 1e-9))


def _fit(words: str, most: int) -> str:
    return words if len(words) <= most else f"{words[: most - 2]}.."
