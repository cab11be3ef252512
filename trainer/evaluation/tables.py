"""The tables of the report: metrics with what they are compared with, the paper's figures, definitions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Final

from trainer.evaluation import html, paper
from trainer.evaluation.catalogue import METRICS, show
from trainer.evaluation.report import EvaluationReport, Gap, Metric, Value

SEEN: Final = 0.05
"""A corrected p-value below this is a difference that is coloured."""
_ARROWS: Final = {"higher": "\u00a0↑", "lower": "\u00a0↓"}
_BETTER: Final = {"higher": "higher is better", "lower": "lower is better"}


def grouped(metrics: Sequence[Metric]) -> list[tuple[str, list[Metric]]]:
    """Title and metrics of each group that has any, in the catalogue's order."""
    found: dict[str, list[Metric]] = {}
    for metric in metrics:
        facts = METRICS.get(metric.name)
        found.setdefault("Others" if facts is None else facts.group, []).append(metric)
    return list(found.items())


def metrics_table(report: EvaluationReport) -> str:
    """Every metric: the adapter, the rule, the difference, the same measure on what it is compared with."""
    against = "" if report.against is None else report.against.reference
    references = {
        "raw": "Without EMA",
        "against": html.text(against),
        "base": "Base alone",
        "renders": "True answers",
    }
    there = {key for metric in report.metrics for key in metric.references}
    columns = [key for key in references if key in there]
    gaps = any(metric.difference is not None for metric in report.metrics)
    heads = ["Metric", "Adapter", "Required"]
    heads += [f"Difference<small>to {html.text(against)}</small>"] if gaps else []
    heads += [references[key] for key in columns]
    rows = []
    for title, metrics in grouped(report.metrics):
        rows.append(html.group(title, len(heads)))
        for metric in metrics:
            cells = [_name(metric), value(metric.value, metric.unit), required(metric)]
            cells += [difference(metric)] if gaps else []
            cells += [
                value(metric.references[key], metric.unit) if key in metric.references else ""
                for key in columns
            ]
            rows.append(html.row(cells))
    return html.table(heads, rows)


def _name(metric: Metric) -> str:
    link = f'<a href="#definition-{escape(metric.name)}">{escape(metric.title)}</a>'
    sizes = f"{metric.value.n} people, {metric.value.samples} values"
    return f"{link}{_ARROWS[metric.direction]}<small>{sizes}</small>"


def value(found: Value, unit: str) -> str:
    """A value above its interval."""
    low, high = show(found.low, unit).removesuffix(f" {unit}"), show(found.high, unit)
    return f"<b>{show(found.value, unit)}</b><small>{low} to {high}</small>"


def rules(metric: Metric) -> list[str]:
    """The rules on a metric, in words."""
    found = []
    if metric.minimum is not None:
        found.append(f"≥ {show(metric.minimum, metric.unit)}")
    if metric.maximum is not None:
        found.append(f"≤ {show(metric.maximum, metric.unit)}")
    if metric.max_regression is not None:
        found.append(f"at most {show(metric.max_regression, metric.unit)} worse")
    return found


def required(metric: Metric) -> str:
    """The rules on a metric and whether they hold."""
    if metric.passed is None:
        return "<br>".join(map(escape, rules(metric)))
    mark = '<span class="ok">✓ holds</span>' if metric.passed else '<span class="no">✗ fails</span>'
    return f"{'<br>'.join(map(escape, rules(metric)))}<small>{mark}</small>"


def difference(metric: Metric) -> str:
    """The paired difference with interval, corrected p-value, and what these subjects could have shown."""
    gap = metric.difference
    if gap is None:
        return ""
    unit = metric.unit
    low, high = signed(gap.low, unit).removesuffix(f" {unit}"), signed(gap.high, unit)
    return (
        f'<span class="{_tone(gap, metric.direction)}">{signed(gap.value, unit)}</span>'
        f"<small>{low} to {high}</small>"
        f"<small>p {escape(_p(gap.p_holm))}, sees {show(gap.detectable, unit)}</small>"
    )


def signed(number: float, unit: str) -> str:
    """A difference with its sign."""
    words = show(abs(number), unit)
    if not any(digit in words for digit in "123456789"):
        return words
    return ("+" if number > 0 else "−") + words


def _tone(gap: Gap, direction: str) -> str:
    if gap.p_holm >= SEEN or gap.value == 0:
        return "faint"
    return "ok" if (gap.value > 0) == (direction == "higher") else "no"


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def paper_tables(report: EvaluationReport, subject: str) -> str:
    """The paper's two tables with the adapter's line below theirs, and how to read them."""
    ours = {metric.name: metric for metric in report.metrics}
    editing = _paper_table(paper.EDITING, paper.EDITING_FIGURES, ours, subject)
    control = _paper_table(paper.CONTROL, paper.CONTROL_FIGURES, ours, subject)
    blends = f"Blends of two basic expressions: {paper.BLENDS} for PixelSmile in the paper"
    if report.blends:
        done = sum(one.success > 0.5 for one in report.blends)
        blends += f"; {done} of {len(report.blends)} pairs here, where most of the blends of a pair succeed"
    return (
        f"<p><b>{escape(paper.CAVEAT)}</b></p><h3>Editing</h3>{editing}<h3>Control of intensity</h3>{control}"
        f"<p>{escape(blends)}.</p><p class='faint'>Source: {escape(paper.SOURCE)}.</p>"
    )


def _paper_table(
    columns: Sequence[paper.Column], figures: paper.Figures, ours: Mapping[str, Metric], subject: str
) -> str:
    heads = ["Editor"]
    for column in columns:
        title = METRICS[column.metric].title if column.metric in METRICS else column.metric
        heads.append(f"{escape(column.title)}{_ARROWS[column.direction]}<small>{escape(title)}</small>")
    rows = [
        html.row([escape(name), *("–" if one is None else f"{one:.4f}" for one in found)])
        for name, found in figures.items()
    ]
    metrics = [ours.get(column.metric) for column in columns]
    lines = [(html.text(subject), [None if one is None else one.value for one in metrics], "ours")]
    for key, title in (("base", "its base alone"), ("renders", "true answers, by the same judges")):
        found = [None if one is None else one.references.get(key) for one in metrics]
        if any(one is not None for one in found):
            lines.append((f"{title}<small>here</small>", found, ""))
    lines[0] = (f"{lines[0][0]}<small>here, by our formulas</small>", *lines[0][1:])
    for name, values, kind in lines:
        cells = ["–" if one is None else f"{one.value:.4f}" for one in values]
        rows.append(html.row([name, *cells], kind=kind))
    return html.table(heads, rows)


def definitions(report: EvaluationReport) -> str:
    """What each metric of the report is."""
    return html.facts(
        (
            f'<span id="definition-{escape(metric.name)}">{escape(metric.title)}</span>',
            f"{escape(metric.definition)} <span class='faint'>{_BETTER[metric.direction]}; "
            f"<code>{escape(metric.name)}</code></span>",
        )
        for metric in report.metrics
    )
