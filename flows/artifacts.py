"""What a flow leaves for people in Prefect's user interface.

What approvers decide about comes from signed statements wherever there is one: a figure in a file of the run
folder is nobody's word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.index import figures
from trainer.stage import StageResult

if TYPE_CHECKING:
    from registry.client import Registry
    from registry.gates import GateReport
    from registry.results import Shown

MAX_PICTURE_BYTES = 300_000
"""Prefect keeps a picture in its database, as text in the artifact's row."""
_WIDEST = 1600
_QUALITIES = (88, 75, 60, 45, 30)


def show_evaluation(evaluated: StageResult) -> None:
    """Put the figures of an evaluation and the way to its report into Prefect's user interface."""
    from prefect.artifacts import create_link_artifact, create_table_artifact

    rows = [{"metric": name, "value": value} for name, value in evaluated.facts.items()]
    create_table_artifact(rows, key="evaluation", description="Held-out people, edited and judged.")
    create_link_artifact((evaluated.folder / "report.html").as_uri(), key="evaluation-report")


def show_summary(summary: dict[str, Any], key: str, title: str) -> None:
    """Put what was done, and where everything lies, into Prefect's user interface."""
    from prefect.artifacts import create_markdown_artifact

    lines = [f"# {title}", "", "| stage | seconds | reused | what came out |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {row['stage']} | {row['seconds']} | {row['reused']} | {row['facts']} |"
        for row in summary["stages"]
    ]
    create_markdown_artifact("\n".join([*lines, "", f"Everything lies in `{summary['folder']}`."]), key=key)


def show_table(rows: Sequence[Mapping[str, Any]], key: str, description: str) -> None:
    """Put a table into Prefect's user interface; one without rows says that there was nothing."""
    from prefect.artifacts import create_table_artifact

    shown = [dict(row) for row in rows] or [{"result": "nothing"}]
    create_table_artifact(shown, key=key, description=description)


def show_for_approval(registry: Registry, reference: str, report: GateReport, pictures: Path) -> None:
    """Put everything that approvers should look at into Prefect's user interface.

    Args:
        registry: the registry.
        reference: ``name:version``.
        report: the gates between it and the alias.
        pictures: the folder of the evaluation, with its contact sheet and report.
    """
    from prefect.artifacts import create_link_artifact, create_markdown_artifact

    from trainer.evaluation.pictures import CONTACT_SHEET

    found = registry.show(reference)
    before = None if report.before is None else registry.show(report.alias)
    now = f"{report.alias} means nothing" if before is None else f"{report.alias}, {before.listed.reference}"
    show_picture(pictures / CONTACT_SHEET, "contact-sheet", f"Edits of held-out people with {reference}.")
    rows = compared(said(found, "evaluation"), {} if before is None else said(before, "evaluation"))
    show_table(rows, "metrics", f"Signed evaluation of {reference}; now: {now}.")
    show_table(scan_rows(said(found, "scan")), "scan", "The signed scan.")
    show_table(licence_rows(said(found, "licence")), "licences", "The signed licence decision.")
    gates = [
        {"gate": one.name, "result": one.outcome, "found": one.detail.partition("\n")[0] or "-"}
        for one in report.checks
    ]
    show_table(gates, "gates", f"Gates between {reference} and {report.alias}.")
    digest = report.manifest.digest
    command = f"registry approve {reference} --by NAME --reason WHY"
    lines = [f"# {reference} for {report.alias}", "", "An approval signs the digest of the manifest:", ""]
    lines += ["```", str(digest), "```", "", "Where the store is in reach:", "", "```", command, "```", ""]
    lines += ["Anywhere else; what it prints goes into the form:", ""]
    lines += ["```", f"{command} --digest {digest}", "```"]
    create_markdown_artifact("\n".join(lines), key="to-be-signed")
    create_link_artifact((pictures / "report.html").as_uri(), key="evaluation-report")


def show_picture(path: Path, key: str, description: str) -> None:
    """Put a picture into Prefect's user interface, small enough for its database."""
    from prefect.artifacts import create_image_artifact

    create_image_artifact(data_uri(path), key=key, description=description)


def data_uri(path: Path) -> str:
    """Return a picture of this machine as a JPEG of at most `MAX_PICTURE_BYTES` in a data URI."""
    import base64
    import io

    from PIL import Image

    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    side = _WIDEST
    while True:
        picture.thumbnail((side, side * 4))
        for quality in _QUALITIES:
            stream = io.BytesIO()
            picture.save(stream, "JPEG", quality=quality, optimize=True)
            text = f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
            if len(text) <= MAX_PICTURE_BYTES:
                return text
        side //= 2


def said(found: Shown, kind: str) -> Mapping[str, Any]:
    """Return what the last believed statement of a kind says; empty if there is none."""
    predicates = [view.predicate for view in found.statements if view.kind == kind and view.signed]
    return predicates[-1] if predicates else {}


def compared(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the metrics of one signed evaluation beside those of another, as the rows of a table.

    Args:
        ours: an evaluation's predicate.
        theirs: that of what the alias means now; empty if it means nothing.
    """
    others = {name: value for name, value, _ in figures(theirs.get("metrics"))}
    gated = _thresholds(ours.get("metrics"))
    return [
        {
            "metric": name,
            "value": f"{value:.4g}",
            "now": f"{others[name]:.4g}" if name in others else "-",
            "difference": f"{value - others[name]:+.4g}" if name in others else "-",
            **gated.get(name, {"threshold": "-", "passed": "-"}),
        }
        for name, value, _ in figures(ours.get("metrics"))
    ]


def _thresholds(metrics: Any) -> dict[str, dict[str, str]]:
    """Return the threshold of each metric that has one, and whether it passed, from a report's rows."""
    rows = [row for row in metrics if isinstance(row, Mapping)] if isinstance(metrics, list) else []
    return {
        str(row.get("name")): {
            "threshold": f"{'<=' if row.get('bound') == 'max' else '>='} {row['threshold']}",
            "passed": "yes" if row.get("passed") is True else "NO",
        }
        for row in rows
        if row.get("threshold") is not None
    }


def scan_rows(predicate: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return a signed scan as the rows of a table: its verdict, and every rule that found something."""
    from registry.scanning.rules import RULES

    rows = [{"rule": "verdict", "result": str(predicate.get("result", "missing")), "what": ""}]
    for result, key in (("block", "failedTests"), ("review", "warnedTests")):
        for rule in predicate.get(key, ()):
            title = RULES[rule].title if rule in RULES else "a rule that this version does not know"
            rows.append({"rule": str(rule), "result": result, "what": title})
    passed = len(predicate.get("passedTests", ()))
    return [*rows, {"rule": f"{passed} other rules", "result": "pass", "what": "found nothing"}]


def licence_rows(predicate: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return a signed licence decision as the rows of a table: the adapter, then what went into it."""
    whole = {
        "ingredient": "the adapter",
        "licence": str(predicate.get("license", "missing")),
        "verdict": str(predicate.get("verdict", "missing")),
        "notes": "; ".join([f"for {predicate.get('purpose')}", *map(str, predicate.get("problems", ()))]),
    }
    rows = [
        {
            "ingredient": f"{one.get('name')} ({one.get('kind')})",
            "licence": str(one.get("license")),
            "verdict": str(one.get("verdict")),
            "notes": "; ".join(map(str, [*one.get("reasons", ()), *one.get("conditions", ())])) or "-",
        }
        for one in predicate.get("ingredients", ())
    ]
    return [whole, *rows]
