"""The report as one HTML file: style, charts and pictures inside it, nothing fetched from anywhere."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from PIL import Image

from trainer.evaluation import charts
from trainer.evaluation.gates import show
from trainer.evaluation.report import Case, EvaluationReport, Metric, Value
from trainer.evaluation.sheets import Portrait, enlarge, webp

_STYLE = """
:root{color-scheme:light dark;--paper:#fafaf8;--card:#fff;--ink:#26282f;--faint:#6c7080;--line:#e4e4e0;
--good:#1a7f4b;--good-bg:#e5f4ec;--bad:#b3261e;--bad-bg:#fbe9e7;--accent:#3266c8;--cell:#f1f1ee;--warm:#d2563f}
@media(prefers-color-scheme:dark){:root{--paper:#16171b;--card:#1f2127;--ink:#e8e8ea;--faint:#a0a4b2;
--line:#33363f;--good:#6fd3a0;--good-bg:#173326;--bad:#ff9d91;--bad-bg:#3d1d1a;--accent:#7aa5f7;--cell:#272a31;
--warm:#ee8a75}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:15px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1120px;margin:0 auto;padding:40px 24px 80px}
h1{font-size:27px;line-height:1.2;margin:0 0 6px}h2{font-size:19px;margin:44px 0 6px}
p{margin:4px 0 14px;max-width:78ch}.faint,small{color:var(--faint)}small{font-size:12.5px;line-height:1.4}
.verdict{border-radius:12px;padding:16px 20px;margin:20px 0 8px}.verdict strong{font-size:17px}
.verdict ul{margin:8px 0 0;padding-left:20px}
.pass{background:var(--good-bg)}.pass strong,.ok{color:var(--good)}
.fail{background:var(--bad-bg)}.fail strong,.no{color:var(--bad)}
.card{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:16px;overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th{font-weight:600;font-size:13px;color:var(--faint);text-align:right;padding:4px 10px 8px;white-space:nowrap}
td{border-top:1px solid var(--line);padding:10px;text-align:right;vertical-align:top;white-space:nowrap}
th:first-child,td:first-child{text-align:left;white-space:normal;min-width:270px;padding-left:2px}
td small{display:block}.mark{font-weight:600}
img{max-width:100%;display:block;border-radius:8px}
.wide{width:min(1500px,100vw - 48px);margin-left:50%;transform:translateX(-50%)}.wide img{margin:0 auto}
.curves{display:grid;grid-template-columns:repeat(auto-fill,minmax(210px,1fr));gap:8px}
.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(310px,1fr));gap:14px}
.gallery figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:12px;padding:12px}
.trio{display:grid;grid-template-columns:repeat(3,1fr);gap:6px}.trio span{font-size:12px;color:var(--faint)}
figcaption{font-size:13px;margin-top:8px}
dl{display:grid;grid-template-columns:max-content 1fr;gap:6px 18px;margin:0}dt{color:var(--faint)}
dd{margin:0;overflow-wrap:anywhere}code{font:12.5px ui-monospace,SFMono-Regular,Menlo,monospace}
svg.chart{width:100%;height:auto;font:12px system-ui,sans-serif;fill:var(--ink)}
svg.heat{max-width:740px;margin:0 auto;display:block}
.end{text-anchor:end}.mid{text-anchor:middle}.small{font-size:10px;fill:var(--faint)}
.name{font-size:13px;font-weight:600}
.cell{fill:var(--cell)}.cell.pair{stroke:var(--warm);stroke-width:1.5;stroke-dasharray:3 2}
.hit{fill:var(--accent)}.miss{fill:var(--warm)}.strong{fill:#fff}
.grid{stroke:var(--line)}.ideal{stroke:var(--faint);stroke-dasharray:4 4}.band{fill:var(--accent);opacity:.18}
.line{fill:none;stroke:var(--accent);stroke-width:2}.dot{fill:var(--accent)}
@media print{main{padding:0}h2{break-after:avoid}figure,svg{break-inside:avoid}}
"""

_COLUMNS = (("raw", "Without EMA"), ("base", "Base alone"), ("renders", "True renders"))


@dataclass(frozen=True, kw_only=True, slots=True)
class CasePictures:
    """A case with its three portraits."""

    case: Case
    source: Portrait
    edit: Portrait
    truth: Portrait


def page(
    report: EvaluationReport,
    *,
    subject: str,
    contact: Image.Image,
    intensities: Image.Image,
    blends: Image.Image | None,
    worst: Sequence[CasePictures],
) -> str:
    """The whole report as one self-contained HTML document.

    Args:
        report: what the tables, charts and the verdict say.
        subject: name of the adapter, for the title.
        contact: contact sheet.
        intensities: intensity strip.
        blends: blend strip, None where the suite blends nothing.
        worst: the worst edits with their pictures.
    """
    sheets = [
        _section(
            "Contact sheet",
            "Every expression at intensity 1.",
            f'<div class="wide">{_picture(contact, "contact sheet")}</div>',
        ),
        _section(
            "Intensity", "From none to beyond what was trained.", _picture(intensities, "intensity strip")
        ),
    ]
    if blends is not None:
        lead = "From one expression to another, and both at once."
        sheets.append(_section("Blends", lead, _picture(blends, "blend strip")))
    heading = f"Evaluation of {escape(subject)}"
    body = "".join(
        [
            f"<h1>{heading}</h1>",
            _summary(report),
            *sheets,
            _charts(report),
            _section("Worst cases first", "Wrong expression before low PSNR.", _gallery(worst)),
            _section("Provenance", "Digests of what was judged, on what, and by what.", _provenance(report)),
        ]
    )
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width,initial-scale=1'>"
        f"<title>{heading}</title><style>{_STYLE}</style></head><body><main>{body}</main></body></html>\n"
    )


def _summary(report: EvaluationReport) -> str:
    suite = report.suite
    asked = (
        f"{len(suite.identities)} held-out identities, {len(suite.expressions)} expressions, intensities "
        f"{', '.join(f'{x:g}' for x in suite.intensities)}; {suite.steps} sampling steps, seed {suite.seed}. "
        "No identity was part of training. Intervals: 95 % bootstrap over identities."
    )
    metrics = _section(
        "Metrics",
        "What the adapter reaches, what is required, and the same measure on the weights without "
        "EMA, on the base alone, and on true renders: the judge's own ceiling.",
        f'<div class="card">{_metrics_table(report.metrics)}</div>',
    )
    return (
        f"<p class='faint'>Suite {escape(suite.name)}, definitions version {escape(suite.definitions)}. "
        f"{asked}</p>{_verdict(report)}{metrics}"
    )


def _charts(report: EvaluationReport) -> str:
    suite = report.suite
    heat = charts.confusion_heat_map(report.confusion, suite.expressions, suite.judged, suite.confusing_pairs)
    response = _section(
        "Response to intensity",
        "Judged against asked; dashed: ideal; band: 95 % interval.",
        f'<div class="card curves">{"".join(map(charts.response_curve, report.curves))}</div>',
    )
    confusion = _section(
        "Confusion",
        "Asked down, judged across, per cent of edits at intensity 1. Dashed outlines: declared "
        "confusing pairs.",
        f'<div class="card">{heat}</div>',
    )
    return response + confusion


def _section(title: str, lead: str, content: str) -> str:
    return f"<section><h2>{title}</h2><p class='faint'>{lead}</p>{content}</section>"


def _picture(image: Image.Image, name: str) -> str:
    data = base64.b64encode(webp(image)).decode("ascii")
    return (
        f'<img alt="{escape(name)}" width="{image.width}" height="{image.height}" style="height:auto" '
        f'src="data:image/webp;base64,{data}">'
    )


def _verdict(report: EvaluationReport) -> str:
    gated = sum(metric.passed is not None for metric in report.metrics)
    if report.verdict.passed:
        text = f"all {gated} gates hold" if gated else "no gate is set"
        return f'<div class="verdict pass"><strong>Passed</strong>: {text}.</div>'
    reasons = "".join(f"<li>{escape(reason)}</li>" for reason in report.verdict.reasons)
    failed = len(report.verdict.failed)
    return (
        f'<div class="verdict fail"><strong>Refused</strong>: {failed} of {gated} gates '
        f"{'does' if failed == 1 else 'do'} not hold.<ul>{reasons}</ul></div>"
    )


def _metrics_table(metrics: Sequence[Metric]) -> str:
    shown = [(key, title) for key, title in _COLUMNS if any(key in metric.references for metric in metrics)]
    heads = "".join(f"<th>{title}</th>" for _, title in shown)
    rows = "".join(_metric_row(metric, [key for key, _ in shown]) for metric in metrics)
    return (
        f"<table><thead><tr><th>Metric</th><th>Adapter</th><th>Required</th><th>Gate</th>{heads}</tr></thead>"
        f"<tbody>{rows}</tbody></table>"
    )


def _metric_row(metric: Metric, references: Sequence[str]) -> str:
    required, mark = "", ""
    if metric.threshold is not None:
        required = f"{'≥' if metric.bound == 'min' else '≤'} {show(metric.threshold, metric.unit)}"
        mark = (
            '<span class="mark ok">✓ holds</span>'
            if metric.passed
            else '<span class="mark no">✗ fails</span>'
        )
    arrow = {"higher": "\u00a0↑", "lower": "\u00a0↓", "context": ""}[metric.direction]
    others = "".join(
        f"<td>{_value(metric.references[key], metric.unit) if key in metric.references else ''}</td>"
        for key in references
    )
    return (
        f"<tr><td>{escape(metric.title)}{arrow}<small>{escape(metric.definition)}</small></td>"
        f"<td>{_value(metric.value, metric.unit, counts=True)}</td><td>{required}</td><td>{mark}</td>"
        f"{others}</tr>"
    )


def _value(value: Value, unit: str, *, counts: bool = False) -> str:
    sizes = f"<small>{value.n} people, {value.samples} images</small>" if counts else ""
    low, high = show(value.low, unit).removesuffix(unit), show(value.high, unit)
    return f"{show(value.value, unit)}<small>{low} to {high}</small>{sizes}"


def _gallery(worst: Sequence[CasePictures]) -> str:
    figures = []
    for entry in worst:
        case = entry.case
        trio = "".join(
            f"<div>{_picture(enlarge(picture, 128), name)}<span>{name}</span></div>"
            for name, picture in (
                ("source", entry.source),
                ("edit", entry.edit),
                ("true render", entry.truth),
            )
        )
        right = case.judged_as == case.expression
        judged = (
            f'<span class="{"ok" if right else "no"}">judged {escape(case.judged_as)}</span> '
            f"(asked one read at {case.judged_intensity:.2f})"
        )
        figures.append(
            f'<figure><div class="trio">{trio}</div>'
            f"<figcaption><b>{escape(case.expression)}</b>, {judged}<br>"
            f'<span class="faint">{escape(case.identity)} · PSNR {case.paired_psnr:.1f} dB · identity '
            f"{case.identity_similarity:.2f}</span></figcaption></figure>"
        )
    return f'<div class="gallery">{"".join(figures)}</div>'


def _provenance(report: EvaluationReport) -> str:
    digests = report.digests
    entries = [
        ("adapter weights", digests.adapter),
        ("weights without EMA", digests.raw or "not evaluated"),
        ("base model", digests.base),
        ("suite", digests.suite),
        ("code", report.code_version),
    ]
    entries[3:3] = [(f"judge: {name}", digest) for name, digest in sorted(digests.judges.items())]
    items = "".join(
        f"<dt>{escape(name)}</dt><dd><code>{escape(digest)}</code></dd>" for name, digest in entries
    )
    return f'<div class="card"><dl>{items}</dl></div>'
