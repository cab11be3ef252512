"""What `trainer evaluate` and `trainer compare` print: tables for people, one object for programs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.evaluation.catalogue import show
from trainer.evaluation.comparison import COMPARISON_NAME, PAGE, TRUTH, Comparison, Row
from trainer.evaluation.report import EvaluationReport, Gap, Metric

if TYPE_CHECKING:
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


def told(report: EvaluationReport, place: Path, who: Target) -> str:
    """The report for a terminal."""
    suite = report.suite
    beside = [] if report.against is None else [f"difference to {report.against.reference}"]
    rows = [["metric", "value, 95 % interval", "required", *beside, "base"]]
    for metric in report.metrics:
        rows.append(_row(metric, beside=bool(beside), subjects=len(suite.subjects)))
    lines = [
        f"{who.label} on {suite.name}: {len(suite.subjects)} people, {suite.pictures} pictures",
        "",
        table(rows),
        "",
        *(f"{probe.title}: {probe.outcome} ({probe.found})" for probe in report.probes),
        *_verdict(report),
        "",
        f"report    {place / 'report.html'}",
        f"figures   {place / 'evaluation.json'}",
    ]
    figures = place / "evaluation.json"
    if who.reference is None:
        lines.append(f"sign it   registry push {who.folder} --name NAME --evaluation {figures}")
    else:
        lines.append(f"sign it   registry attest {who.reference} --kind evaluation --predicate {figures}")
    return "\n".join(lines)


def _row(metric: Metric, *, beside: bool, subjects: int) -> list[str]:
    value, base, unit = metric.value, metric.references.get("base"), metric.unit
    required = []
    if metric.minimum is not None:
        required.append(f">= {metric.minimum:g}")
    if metric.maximum is not None:
        required.append(f"<= {metric.maximum:g}")
    if metric.max_regression is not None:
        required.append(f"at most {metric.max_regression:g} worse")
    if metric.passed is not None:
        required.append("holds" if metric.passed else "FAILS")
    people = f" of {value.n}" if value.n < subjects else ""
    cells = [
        metric.name,
        f"{show(value.value, unit)} [{show(value.low)}, {show(value.high)}]{people}",
        " ".join(required),
    ]
    if beside:
        cells.append("" if metric.difference is None else _gap(metric.difference))
    return [*cells, "" if base is None else show(base.value, unit)]


def _gap(gap: Gap) -> str:
    """A difference in one cell, with its interval and its p-value after all metrics are counted."""
    return f"{gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}] p {gap.p_holm:.3f}"


def _verdict(report: EvaluationReport) -> list[str]:
    verdict = report.verdict
    asked = sum(metric.passed is not None for metric in report.metrics)
    if verdict.passed:
        return [
            f"PASSED: all {asked} rules hold" if asked else "PASSED: no rule is set, so nothing could fail"
        ]
    return [f"REFUSED: {', '.join(verdict.failed)}", *(f"  {reason}" for reason in verdict.reasons)]


def compared(found: Comparison, place: Path) -> str:
    """A comparison for a terminal: every metric of every adapter with its rank, and who is really better."""
    names = [one.name for one in found.adapters]
    columns = [*names, *([TRUTH] if any(TRUTH in row.values for row in found.metrics) else [])]
    rows = [["metric", *columns]]
    for row in found.metrics:
        arrow = {"higher": " (+)", "lower": " (-)", "context": ""}[row.direction]
        rows.append([row.name + arrow, *(_ranked(row, name) for name in columns)])
    suite = found.suite
    lines = [
        f"{len(names)} editors on {suite.name}: {len(suite.subjects)} people, {suite.pictures} pictures each",
        "",
        table(rows),
        "",
        "#1, #2, ...: rank, 1 + how many are really better; who shares a rank cannot be told apart here.",
        "(+) higher is better, (-) lower is better. Real: interval excludes 0, and p < 0.05 over all pairs",
        "and metrics.",
        "",
    ]
    for first in names:
        for second in names:
            won = found.better(first, second)
            if won:
                lines.append(f"{first} is really better than {second} in {len(won)}: {', '.join(won)}")
    for first, second in combinations(names, 2):
        if not found.better(first, second) and not found.better(second, first):
            lines.append(f"{first} and {second} cannot be told apart on this suite")
    return "\n".join([*lines, "", f"page      {place / PAGE}", f"figures   {place / COMPARISON_NAME}"])


def _ranked(row: Row, name: str) -> str:
    value, rank = row.values.get(name), row.ranks.get(name)
    if value is None:
        return ""
    shown = f"{show(value.value, row.unit)} [{show(value.low)}, {show(value.high)}]"
    return shown if rank is None else f"{shown} #{rank}"
