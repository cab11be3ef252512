"""What `trainer evaluate` and `trainer compare` print: tables for people, one object for programs."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from registry.errors import shown
from trainer.evaluation.catalogue import show
from trainer.evaluation.comparison import COMPARISON_NAME, PAGE, TRUTH, Comparison, Row
from trainer.evaluation.report import EvaluationReport, Gap, Metric

if TYPE_CHECKING:
    from trainer.evaluation.bench import Bench
    from trainer.evaluation.targets import Target


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text with aligned columns, two spaces between them; a line under the first row."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *lines[1:]])


def facts(report: EvaluationReport, place: Path) -> dict[str, Any]:
    """What a program wants to know: the verdict, the figures, and where the rest lies."""
    return {
        "folder": str(place),
        "report": str(place / "report.html"),
        "evaluation": str(place / "evaluation.json"),
        "suite": report.suite.name,
        "against": None if report.against is None else report.against.reference,
        **report.verdict.model_dump(mode="json"),
        "metrics": {metric.name: _row_facts(metric) for metric in report.metrics},
        "probes": {probe.name: probe.outcome for probe in report.probes},
    }


def _row_facts(metric: Metric) -> dict[str, Any]:
    value, base = metric.value, metric.references.get("base")
    found: dict[str, Any] = {"value": value.value, "low": value.low, "high": value.high, "n": value.n}
    if base is not None:
        found["base"] = base.value
    if metric.difference is not None:
        found["difference"] = metric.difference.model_dump(mode="json")
    if metric.passed is not None:
        found |= {"passed": metric.passed, "min": metric.minimum, "max": metric.maximum}
        found["max_regression"] = metric.max_regression
    return found


def told(report: EvaluationReport, place: Path, who: Target, bench: Bench) -> str:
    """The report for a terminal."""
    suite, figures = report.suite, place / "evaluation.json"
    beside = [] if report.against is None else [f"difference to {shown(report.against.reference)}"]
    others = [name for name in ("raw", "base") if any(name in metric.references for metric in report.metrics)]
    rows = [["metric", "value, 95 % interval", "required", *beside, *others]]
    for metric in report.metrics:
        people = f" of {metric.value.n}" if metric.value.n < len(suite.subjects) else ""
        cells = [metric.name, _value(metric) + people, _required(metric)]
        cells += [_gap(metric.difference)] if beside else []
        cells += [_other(metric, name) for name in others]
        rows.append(cells)
    lines = [
        f"{shown(who.label)} on {shown(suite.name)}: {len(suite.subjects)} people, {suite.pictures} pictures",
        "",
        table(rows),
        "",
        *(_wrapped(f"{probe.title}: {probe.outcome}. {shown(probe.found, 2000)}") for probe in report.probes),
        "",
        *_verdict(report),
        "",
        f"report    {place / 'report.html'}",
        f"figures   {figures}",
        f"edits     {bench.place} ({bench.kept_bytes / 1e6:.1f} MB)",
    ]
    if who.reference is None:
        said = f"registry push {quote(str(who.folder))} --name NAME --evaluation {quote(str(figures))}"
    else:
        said = f"registry attest {who.reference} --kind evaluation --predicate {quote(str(figures))}"
    return "\n".join([*lines, f"sign it   {said}"])


def _value(metric: Metric) -> str:
    value, unit = metric.value, metric.unit
    return f"{show(value.value, unit)} [{show(value.low)}, {show(value.high)}]"


def _required(metric: Metric) -> str:
    """The rules on a metric and whether they hold."""
    words = [] if metric.minimum is None else [f">= {metric.minimum:g}"]
    words += [] if metric.maximum is None else [f"<= {metric.maximum:g}"]
    words += [] if metric.max_regression is None else [f"at most {metric.max_regression:g} worse"]
    if metric.passed is not None:
        words.append("holds" if metric.passed else "FAILS")
    return ", ".join(words)


def _gap(gap: Gap | None) -> str:
    """A difference in one cell, with its interval and its p-value after all metrics are counted."""
    return "" if gap is None else f"{gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}] p {gap.p_holm:.3f}"


def _other(metric: Metric, name: str) -> str:
    return show(metric.references[name].value, metric.unit) if name in metric.references else ""


def _verdict(report: EvaluationReport) -> list[str]:
    verdict, asked = report.verdict, sum(metric.passed is not None for metric in report.metrics)
    if verdict.passed:
        held = f"all {asked} metrics with rules hold" if asked else "no rule is set on any metric"
        head = f"PASSED: {held}, and no probe failed"
    else:
        head = f"REFUSED: {', '.join(verdict.failed)}"
    return [head, *(_wrapped(shown(text, 2000), "  ") for text in (*verdict.reasons, *verdict.notes))]


def _wrapped(text: str, margin: str = "") -> str:
    return textwrap.fill(text, 110, initial_indent=margin, subsequent_indent=margin + "  ")


def compared(found: Comparison, place: Path) -> str:
    """A comparison for a terminal: every metric of every adapter with its rank, and who is really better."""
    names = [one.name for one in found.adapters]
    said = {name: shown(name) for name in (*names, TRUTH)}
    columns = [*names, *([TRUTH] if any(TRUTH in row.values for row in found.metrics) else [])]
    rows = [["metric", *(said[name] for name in columns)]]
    for row in found.metrics:
        arrow = {"higher": " (+)", "lower": " (-)"}[row.direction]
        rows.append([row.name + arrow, *(_ranked(row, name) for name in columns)])
    suite = found.suite
    lines = [
        f"{len(names)} editors on {shown(suite.name)}: {len(suite.subjects)} people, {suite.pictures} "
        "pictures each",
        "",
        table(rows),
        "",
        "#1, #2, ...: rank, 1 + how many are really better; who shares a rank cannot be told apart here.",
        "(+) higher is better, (-) lower is better. Real: interval excludes 0, and p < 0.05 over all pairs",
        "and metrics.",
        *([_wrapped(f"Mind: {found.warning}")] if found.warning else []),
        "",
    ]
    for first in names:
        for second in names:
            won = found.better(first, second)
            if won:
                lines.append(
                    f"{said[first]} is really better than {said[second]} in {len(won)}: {', '.join(won)}"
                )
    for first, second in combinations(names, 2):
        if not found.better(first, second) and not found.better(second, first):
            lines.append(f"{said[first]} and {said[second]} cannot be told apart on this suite")
    return "\n".join([*lines, "", f"page      {place / PAGE}", f"figures   {place / COMPARISON_NAME}"])


def _ranked(row: Row, name: str) -> str:
    value, rank = row.values.get(name), row.ranks.get(name)
    if value is None:
        return ""
    found = f"{show(value.value, row.unit)} [{show(value.low)}, {show(value.high)}]"
    return found if rank is None else f"{found} #{rank}"
