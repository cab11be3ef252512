"""The comparison as one HTML file: who is really better in what, figures, curves, pictures side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Final

from trainer.evaluation import html
from trainer.evaluation.catalogue import METRICS, show
from trainer.evaluation.comparison import SEEN, TRUTH, Comparison, Pair, Row
from trainer.evaluation.plan import Plan, single
from trainer.evaluation.report import Curve, Gap
from trainer.evaluation.sheets import Row as Line
from trainer.evaluation.sheets import Sheet

if TYPE_CHECKING:
    from trainer.evaluation.bench import Measured

PEOPLE: Final = 4
"""So many people are shown beside each other."""
_COLOURS: Final = ("#2f6fd0", "#c2571a", "#2c8a57", "#8a4fc7", "#b8860b", "#c23a6b", "#1b8a99", "#6b7280")
"""Told apart by people who see red and green alike too; dashes tell more of them apart."""
_DASHES: Final = ("", "6 3", "2 3")
_STYLE: Final = """
.swatch{display:inline-block;width:22px;height:0;border-top:3px solid;vertical-align:middle;margin-right:6px}
td.best{background:var(--ours-bg)}td .rank{float:right;color:var(--faint);font-size:12px;margin-left:10px}
.wins td:not(:first-child){min-width:110px;white-space:normal}.wins details{margin:0;border:0;padding:0}
.wins summary{font-size:15px;font-weight:700;cursor:pointer}
.wins ul{margin:6px 0 0;padding:0;list-style:none;font-size:12px;color:var(--faint);text-align:left}
.legend{display:flex;flex-wrap:wrap;gap:6px 20px;margin:0 0 12px}
svg.over{width:100%;max-width:300px}
.curves{display:grid;grid-template-columns:repeat(auto-fill,minmax(240px,1fr));gap:14px}
svg.over text{font:11px system-ui,sans-serif;fill:var(--faint)}
svg.over text.name{fill:var(--ink);font-weight:600}
svg.over .axis{stroke:var(--line)}svg.over .ideal{stroke:var(--faint);stroke-dasharray:4 4}
"""
_HOW: Final = (
    "A difference is real if its 95 % interval excludes 0 and its p-value, corrected for every pair and "
    f"every metric of this page, is below {SEEN:g}. The number at the right of a value is its rank: 1 + how "
    "many are really better. Who shares a rank cannot be told apart here, whatever the figures look like. "
    "Shaded: somebody is really worse, and nobody is really better."
)
_DIFFERENCES: Final = (
    "Paired differences on the same people, with 95 % intervals and corrected p-values. “sees” is the "
    "smallest true difference that these people would show in 80 % of all cases: a smaller one may be there, "
    "unseen."
)


def page(found: Comparison, plan: Plan, measured: Mapping[str, Measured]) -> str:
    """The whole comparison as one self-contained HTML document.

    Args:
        found: what the tables say.
        plan: what was asked.
        measured: by adapter, its pictures.
    """
    names = [one.name for one in found.adapters]
    parts = [
        ("who", "Who is really better", "In how many metrics; a number opens their names.",
         _wins(found, names)),
        ("metrics", "Metrics", _HOW, _metrics(found, names)),
        ("differences", f"Differences to {html.shown(names[0])}", _DIFFERENCES, _differences(found, names)),
        ("intensity", "Response to intensity", "Judged against asked intensity; grey dashes: ideal.",
         _curves(found, names)),
        ("people", "Side by side", f"The first {PEOPLE} people, every expression at intensity 1.",
         html.faces(contact(plan, measured))),
        ("provenance", "Provenance", "Digests of what was compared, on what, by what.", _provenance(found)),
    ]  # fmt: skip
    suite = found.suite
    about = (
        f"<p class='faint'>Suite {html.text(suite.name)}: {len(suite.subjects)} people, {suite.pictures} "
        f"pictures of each adapter, {suite.steps} sampling steps, seed {suite.seed}.</p>"
    )
    warning = html.verdict("warn", found.warning) if found.warning else ""
    body = [about, warning, html.contents((key, title) for key, title, *_ in parts)]
    body += [html.section(title, lead, content, anchor=key) for key, title, lead, content in parts]
    return html.document(f"Comparison of {', '.join(map(html.shown, names))}", "".join(body), _STYLE)


def contact(plan: Plan, measured: Mapping[str, Measured]) -> Sheet:
    """Every person's source, true answers where there are any, and each adapter's edits below each other."""
    rows = []
    for index, person in enumerate(plan.subjects[:PEOPLE]):
        asks = [single(name, 1.0) for name in plan.expressions]
        source = plan.pictures.source(index)
        if plan.pictures.truth(index, ()) is not None:
            answers = [plan.pictures.truth(index, ask) for ask in asks]
            rows.append(Line(label=f"{person.name}\n{TRUTH}", cells=[source, *answers]))
        for name, one in measured.items():
            edits = [one.picture(index, ask) if (index, ask) in one.edited else None for ask in asks]
            rows.append(Line(label=f"{person.name}\n{name}", cells=[source, *edits]))
    return Sheet(title="Side by side", subtitle="", columns=["source", *plan.expressions], rows=rows)


def _wins(found: Comparison, names: Sequence[str]) -> str:
    """For every two adapters, in which metrics the one at the left is really better than the one above."""
    heads = ["", *(f"than {html.text(name)}" for name in names)]
    rows = []
    for first in names:
        cells = [f"<b>{html.text(first)}</b> is really better"]
        for second in names:
            won = found.better(first, second)
            titles = "".join(f"<li>{escape(METRICS[name].title)}</li>" for name in won)
            many = f"<details><summary>{len(won)}</summary><ul>{titles}</ul></details>" if won else "0"
            cells.append("" if first == second else many)
        rows.append(html.row(cells))
    return html.table(heads, rows, kind="wide-table wins")


def _metrics(found: Comparison, names: Sequence[str]) -> str:
    columns = [*names, *([TRUTH] if any(TRUTH in row.values for row in found.metrics) else [])]
    rows, heading = [], ""
    for row in found.metrics:
        group = METRICS[row.name].group
        if group != heading:
            heading = group
            rows.append(html.group(heading, 1 + len(columns)))
        rows.append(_row(row, columns))
    return html.table(["Metric", *map(html.text, columns)], rows)


def _row(row: Row, columns: Sequence[str]) -> str:
    arrow = {"higher": "\u00a0↑", "lower": "\u00a0↓"}[row.direction]
    cells = [f"<td>{escape(row.title)}{arrow}<small>{escape(row.name)}</small></td>"]
    for name in columns:
        value = row.values.get(name)
        if value is None:
            cells.append("<td></td>")
            continue
        rank = row.ranks.get(name)
        mark = f'<span class="rank">{rank}</span>' if rank is not None else ""
        best = ' class="best"' if rank == 1 and len(set(row.ranks.values())) > 1 else ""
        low, high = show(value.low, row.unit).removesuffix(row.unit), show(value.high, row.unit)
        cells.append(
            f"<td{best}>{mark}<b>{show(value.value, row.unit)}</b><small>{low} to {high}</small></td>"
        )
    return f"<tr>{''.join(cells)}</tr>"


def _differences(found: Comparison, names: Sequence[str]) -> str:
    first, *others = names
    rows = []
    for row in found.metrics:
        pairs = {pair.second: pair for pair in row.pairs if pair.first == first}
        cells = [f"{escape(row.title)}<small>{escape(row.name)}</small>"]
        cells += [_gap(pairs[name], row.unit) if name in pairs else "" for name in others]
        if pairs:
            rows.append(html.row(cells))
    return html.table(["Metric", *(f"{html.text(name)}" for name in others)], rows)


def _gap(pair: Pair, unit: str) -> str:
    """The second of a pair minus the first, for a table of differences to the first."""
    gap = turned(pair.gap)
    tone = "faint" if pair.better is None else "ok" if pair.better == pair.second else "no"
    word = {"ok": "really better", "no": "really worse", "faint": "no real difference shown"}[tone]
    return (
        f'<span class="{tone}">{signed(gap.value, unit)}</span><small>{signed(gap.low, unit)} to '
        f"{signed(gap.high, unit)}, p {gap.p_holm:.3f}, sees {show(gap.detectable, unit)}</small>"
        f"<small>{word}</small>"
    )


def turned(gap: Gap) -> Gap:
    """The same difference, seen from the other side."""
    return gap.model_copy(update={"value": -gap.value, "low": -gap.high, "high": -gap.low})


def signed(number: float, unit: str) -> str:
    """A difference with its sign."""
    return ("−" if number < 0 else "+") + show(abs(number), unit)


def _curves(found: Comparison, names: Sequence[str]) -> str:
    legend = "".join(
        f'<span><span class="swatch" style="border-color:{colour};border-top-style:'
        f'{"dashed" if dash else "solid"}"></span>{html.text(name)}</span>'
        for name, (colour, dash) in zip(names, _lines(len(names)), strict=True)
    )
    charts = []
    for index, expression in enumerate(found.suite.expressions):
        curves = [found.curves[name][index] for name in names if index < len(found.curves[name])]
        charts.append(_overlay(expression, curves))
    return html.card(f'<div class="legend">{legend}</div><div class="curves">{"".join(charts)}</div>')


def _lines(count: int) -> list[tuple[str, str]]:
    """A colour and a dash for each adapter."""
    return [
        (_COLOURS[index % len(_COLOURS)], _DASHES[(index // len(_COLOURS)) % len(_DASHES)])
        for index in range(count)
    ]


def _overlay(expression: str, curves: Sequence[Curve]) -> str:
    """The curves of all adapters for one expression, with bars for their intervals."""
    width, height, left, bottom, top = 260, 190, 30, 158, 26
    span = max(1.0, *(max(curve.asked) for curve in curves))
    highest = max(1.1, *(value.high for curve in curves for value in curve.judged))

    def x(asked: float) -> float:
        return left + asked / span * (width - left - 12)

    def y(judged: float) -> float:
        return bottom - max(judged, -0.05) / highest * (bottom - top)

    shapes = [f'<text class="name" x="{left}" y="15">{escape(expression)}</text>']
    for tick in (0.0, 0.5, 1.0):
        shapes.append(
            f'<line class="axis" x1="{left}" x2="{width - 12}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
        )
        shapes.append(f'<text text-anchor="end" x="{left - 5}" y="{y(tick) + 4:.1f}">{tick:g}</text>')
    for asked in curves[0].asked:
        shapes.append(f'<text text-anchor="middle" x="{x(asked):.1f}" y="{bottom + 18}">{asked:g}</text>')
    shapes.append(f'<line class="ideal" x1="{x(0):.1f}" y1="{y(0):.1f}" x2="{x(1):.1f}" y2="{y(1):.1f}"/>')
    for curve, (colour, dash) in zip(curves, _lines(len(curves)), strict=True):
        points = list(zip(curve.asked, curve.judged, strict=True))
        for asked, value in points:
            at = f'x1="{x(asked):.1f}" x2="{x(asked):.1f}" y1="{y(value.low):.1f}" y2="{y(value.high):.1f}"'
            shapes.append(f'<line {at} stroke="{colour}" stroke-opacity="0.45"/>')
        line = " ".join(f"{x(asked):.1f},{y(value.value):.1f}" for asked, value in points)
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        shapes.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.8"{dashes}/>')
    return (
        f'<svg class="over" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="response of {escape(expression)}">{"".join(shapes)}</svg>'
    )


def _provenance(found: Comparison) -> str:
    entries = [(f"{one.name} ({one.reference})", str(one.weights or "no adapter")) for one in found.adapters]
    entries += [("base model", str(found.base)), ("suite and its definitions", str(found.suite_digest))]
    for name, digest in sorted(found.judge_digests.items()):
        entries.append((f"judge of {name}: {found.judges.get(name, '')}", str(digest)))
    entries += [("code", f"{found.code_version} {found.code}")]
    return html.facts((html.text(name), f"<code>{html.text(said)}</code>") for name, said in entries)
