"""The benchmark as one HTML file: curves, histograms and tables inside it, nothing fetched from anywhere."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from bench.detecting import measuring, rates, tables
from bench.detecting.judges import Ranking
from bench.detecting.measuring import Measured

_STYLE = """
:root{color-scheme:light dark;--paper:#fafaf8;--card:#fff;--ink:#26282f;--faint:#6c7080;--line:#e4e4e0;
--good:#1a7f4b;--bad:#b3261e;--clean:#7b93b8;--a:#3266c8;--b:#d2563f;--c:#1a7f4b;--d:#8a5cc2;--e:#b07d12;--f:#6c7080}
@media(prefers-color-scheme:dark){:root{--paper:#16171b;--card:#1f2127;--ink:#e8e8ea;--faint:#a0a4b2;
--line:#33363f;--good:#6fd3a0;--bad:#ff9d91;--clean:#5f7596;--a:#7aa5f7;--b:#ee8a75;--c:#6fd3a0;--d:#bb98ea;
--e:#dcb25c;--f:#a0a4b2}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:15px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1120px;margin:0 auto;padding:40px 24px 80px}
h1{font-size:27px;line-height:1.2;margin:0 0 6px}h2{font-size:19px;margin:44px 0 6px}
h3{font-size:14px;margin:0 0 6px}p{margin:4px 0 14px;max-width:78ch}.faint{color:var(--faint)}
.card{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:16px;overflow-x:auto}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(320px,1fr));gap:14px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th{font-weight:600;font-size:13px;color:var(--faint);text-align:right;padding:4px 10px 8px}
td{border-top:1px solid var(--line);padding:8px 10px;text-align:right;white-space:nowrap}
td small{display:block;color:var(--faint);font-size:12px}
th:first-child,td:first-child{text-align:left;padding-left:2px}
.yes{color:var(--good);font-weight:600}.no{color:var(--bad);font-weight:600}
svg{width:100%;height:auto;font:11px system-ui,sans-serif;fill:var(--ink)}
.axis{stroke:var(--line)}.rule{stroke:var(--faint);stroke-dasharray:4 4}.small{fill:var(--faint)}
.end{text-anchor:end}.mid{text-anchor:middle}.curve{fill:none;stroke-width:2}
.clean{fill:var(--clean);opacity:.75}.bad{fill:var(--b);opacity:.75}
.key{display:flex;flex-wrap:wrap;gap:4px 16px;font-size:13px;margin:8px 0 0}
.key i{display:inline-block;width:12px;height:12px;border-radius:3px;margin-right:6px;vertical-align:-1px}
@media print{main{padding:0}h2{break-after:avoid}svg,.card{break-inside:avoid}}
"""
_COLOURS = ("a", "b", "c", "d", "e", "f")
_LEAST = 1e-3


def page(measured: Measured, found: Mapping[str, Any]) -> str:
    """The benchmark as one self-contained HTML document.

    Args:
        measured: the answers of the detectors, for curves and histograms.
        found: the result of `measuring.result`, for the tables.
    """
    clean = found["clean"]
    lead = (
        f"{clean['calibration']} clean adapters for calibration, {clean['test']} for testing, on "
        f"{len(found['bases'])} bases. Thresholds come from clean calibration adapters only. Intervals: 95 % "
        f"bootstrap over adapters within each base ({found['bootstrap_rounds']} rounds); shares: Clopper "
        "and Pearson."
    )
    body = [
        f"<h1>Does the scanner find backdoors?</h1><p class='faint'>{lead}</p>",
        _section("Targets", "To reach by both layers together.", _table(tables.targets_table(found))),
        _section("Zoo", "Only implants that work count.", _table(tables.zoo_table(found))),
    ]
    for protocol, title in measuring.PROTOCOLS.items():
        key = f"leave_one_{protocol}_out"
        body.append(_section(title.capitalize(), "", _table(tables.overview_table(found, key))))
        body.append(f'<div class="grid">{_curves(measured, protocol)}</div>{_legend(measured, protocol)}')
    body += [
        _section("AUROC by attack", "", _table(tables.family_table(found, "auroc"))),
        _section("Detected by attack", "Threshold for 1 %.", _table(tables.family_table(found, "tpr"))),
        _section(
            "Scores",
            "Clean test adapters (blue) and implants (red), each side scaled to its own number; the dashed "
            "line is the threshold for 1 % false positives, the outermost bars hold everything beyond.",
            f'<div class="grid">{_histograms(measured)}</div>',
        ),
        _section("By base", "Macro AUROC.", _table(tables.base_table(found))),
        _section("Matched norm", "Every implant beside a clean adapter of its norm.",
                 _table(tables.matched_table(found))),
        _section("Matched length", "Against clean adapters that were trained as long as implants.",
                 _table(tables.length_table(found))),
        _section("The scanner's own verdicts", "", _table(tables.deployed_table(found))),
        _section("Named triggers", "", _table(tables.naming_table(found))),
    ]  # fmt: skip
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width,initial-scale=1'>"
        f"<title>Scanner benchmark</title><style>{_STYLE}</style></head><body><main>{''.join(body)}</main>"
        "</body></html>\n"
    )


def _section(title: str, lead: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2><p class='faint'>{escape(lead)}</p>{content}</section>"


def _table(markdown: str) -> str:
    """A table of `tables` as HTML; its note, if any, below it."""
    lines = [line for line in markdown.splitlines() if line]
    rows = [
        [cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines if line.startswith("|")
    ]
    notes = "".join(f"<p class='faint'>{escape(line)}</p>" for line in lines if not line.startswith("|"))
    if not rows:
        return notes
    head = "".join(f"<th>{escape(cell)}</th>" for cell in rows[0])
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows[2:])
    return (
        f"<div class='card'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{notes}"
    )


def _cell(text: str) -> str:
    if text in ("yes", "no"):
        return f'<td class="{text}">{text}</td>'
    # The interval goes below the figure.
    shown = re.sub(r"^(-?[\d.]+) \((-?[\d.]+ to -?[\d.]+)\)", r"\1<small>\2</small>", escape(text))
    return f"<td>{shown}</td>"


def _legend(measured: Measured, protocol: str) -> str:
    names = measured.rankings[protocol]
    keys = "".join(
        f"<span><i style='background:var(--{colour})'></i>{escape(name)}</span>"
        for colour, name in zip(_COLOURS, names, strict=False)
    )
    return f'<p class="key">{keys}</p>'


def _curves(measured: Measured, protocol: str) -> str:
    """One ROC figure for each attack, with a logarithmic axis of false positives."""
    found = {
        name: measuring.cases(measured.zoo, ranking) for name, ranking in measured.rankings[protocol].items()
    }
    return "".join(
        _curve_figure(family, [values.get(family) for values in found.values()])
        for family in measured.zoo.families
    )


def _curve_figure(family: str, detectors: Sequence[tuple[rates.Cases, rates.Cases] | None]) -> str:
    left, right, top, bottom = 34, 318, 10, 190

    def x(rate: float) -> float:
        return left + (right - left) * (1 + np.log10(max(rate, _LEAST)) / -np.log10(_LEAST))

    def y(rate: float) -> float:
        return bottom - (bottom - top) * rate

    parts = [
        f'<line class="axis" x1="{x(rate):.1f}" x2="{x(rate):.1f}" y1="{top}" y2="{bottom}"/>'
        f'<text class="small mid" x="{x(rate):.1f}" y="{bottom + 14}">{rate:.3g}</text>'
        for rate in (0.001, 0.01, 0.1, 1.0)
    ]
    parts += [
        f'<line class="axis" x1="{left}" x2="{right}" y1="{y(rate):.1f}" y2="{y(rate):.1f}"/>'
        f'<text class="small end" x="{left - 4}" y="{y(rate) + 3:.1f}">{rate:.1f}</text>'
        for rate in (0.0, 0.5, 1.0)
    ]
    for colour, pair in zip(_COLOURS, detectors, strict=False):
        if pair is not None:
            false, true = rates.roc(pair[0].scores, pair[1].scores)
            points: list[str] = []
            for at in range(len(false)):
                if at:
                    points.append(f"{x(false[at]):.1f},{y(true[at - 1]):.1f}")
                points.append(f"{x(false[at]):.1f},{y(true[at]):.1f}")
            parts.append(
                f'<polyline class="curve" style="stroke:var(--{colour})" points="{" ".join(points)}"/>'
            )
    return (
        f'<div class="card"><h3>{escape(family)}</h3><svg viewBox="0 0 340 212" role="img" '
        f'aria-label="ROC of {escape(family)}">{"".join(parts)}</svg></div>'
    )


def _histograms(measured: Measured) -> str:
    """Scores of each attack beside the clean ones, by the detectors of the scanner."""
    parts = []
    for name in ("weights", "behaviour", "both"):
        if name in measured.rankings["attack"]:
            ranking = measured.rankings["attack"][name]
            limits = {pairs: _threshold(measured, ranking, pairs) for pairs in (False, True)}
            parts += [
                _histogram(f"{family}: {name}", *pair, limits[family in measured.zoo.paired])
                for family, pair in measuring.cases(measured.zoo, ranking).items()
            ]
    return "".join(parts)


def _threshold(measured: Measured, ranking: Ranking, pairs: bool) -> float:
    clean = measured.zoo.clean("calibration", pairs=pairs)
    scores = np.array([ranking.calibration[one.id] for one in clean], dtype=float)
    return rates.threshold(scores[~np.isnan(scores)])


def _histogram(title: str, bad: rates.Cases, clean: rates.Cases, limit: float) -> str:
    left, right, middle, height, bins = 10, 330, 90, 70, 40
    edges_of = np.concatenate([clean.scores, [limit] if np.isfinite(limit) else []])
    low, high = float(edges_of.min()), float(edges_of.max())
    span = max(high - low, 1e-9)
    edges = np.linspace(low, high + span, bins + 1)

    def x(value: float) -> float:
        return left + (right - left) * (value - edges[0]) / (edges[-1] - edges[0])

    parts = [f'<line class="axis" x1="{left}" x2="{right}" y1="{middle}" y2="{middle}"/>']
    for kind, sign, cases in (("clean", -1, clean), ("bad", 1, bad)):
        counts = np.histogram(np.clip(cases.scores, edges[0], edges[-1]), edges)[0]
        for at in np.flatnonzero(counts):
            tall = height * counts[at] / counts.max()
            y = middle - tall if sign < 0 else middle
            parts.append(
                f'<rect class="{kind}" x="{x(edges[at]):.1f}" y="{y:.1f}" '
                f'width="{(right - left) / bins - 0.6:.1f}" height="{tall:.1f}"/>'
            )
    if np.isfinite(limit):
        parts.append(f'<line class="rule" x1="{x(limit):.1f}" x2="{x(limit):.1f}" y1="14" y2="166"/>')
    return (
        f'<div class="card"><h3>{escape(title)}</h3><svg viewBox="0 0 340 172" role="img" '
        f'aria-label="scores, {escape(title)}">{"".join(parts)}</svg></div>'
    )
