"""What a flow leaves for people in Prefect's user interface.

What approvers decide about comes from signed statements wherever there is one: a figure in a file of the run
folder is nobody's word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.evaluation import required
from registry.index import figures

if TYPE_CHECKING:
    from registry.client import Registry
    from registry.digest import Digest
    from registry.gates import GateReport
    from registry.results import Shown
    from trainer.evaluation import EvaluationReport

MAX_PICTURE_BYTES = 300_000
"""Prefect keeps a picture in its database, as text in the artifact's row."""
_WIDEST = 1600
_QUALITIES = (88, 75, 60, 45, 30)


def show_evaluation(folder: Path, report: EvaluationReport) -> None:
    """Put an evaluation into Prefect's user interface: figures, pictures, probes, the way to its page.

    Args:
        folder: of the evaluation.
        report: that lies there.
    """
    from prefect.artifacts import create_link_artifact

    against = report.against
    now = "compared with nothing" if against is None else f"compared with {against.reference}"
    rows = compared(report.predicate(), {}, None if against is None else against.weights)
    show_table(rows, "evaluation", f"Held-out people, edited and judged; {now}.")
    if report.probes:
        probes = [{"probe": one.title, "outcome": one.outcome, "found": one.found} for one in report.probes]
        show_table(probes, "probes", "Questions that are not about quality.")
    show_pictures(folder)
    create_link_artifact((folder / "report.html").as_uri(), key="evaluation-report")


def show_pictures(folder: Path) -> None:
    """Put the pictures of an evaluation into Prefect's user interface, those that there are."""
    from trainer.evaluation.pictures import FILES

    for name, title in FILES:
        if (folder / name).is_file():
            show_picture(folder / name, Path(name).stem.replace("_", "-"), f"{title}.")


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

    from registry.manifest import WEIGHTS_NAME
    from trainer.evaluation.pictures import CONTACT_SHEET

    found = registry.show(reference)
    before = None if report.before is None else registry.show(report.alias)
    weights = None if before is None else before.manifest.file(WEIGHTS_NAME).sha256
    now = f"{report.alias} means nothing" if before is None else f"{report.alias}, {before.listed.reference}"
    show_picture(pictures / CONTACT_SHEET, "contact-sheet", f"Edits of held-out people with {reference}.")
    theirs = {} if before is None else said(before, "evaluation")
    rows = compared(evaluation_beside(found, weights), theirs, weights)
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


def evaluation_beside(found: Shown, weights: Digest | None) -> Mapping[str, Any]:
    """Return the believed evaluation that compares with some weights, or else the last one; empty if none."""
    predicates = [one.predicate for one in found.statements if one.kind == "evaluation" and one.signed]
    beside = [one for one in predicates if _compares_with(one, weights)]
    return (beside or predicates or [{}])[-1]


def _compares_with(evaluation: Mapping[str, Any], weights: Digest | None) -> bool:
    against = evaluation.get("against")
    return weights is not None and isinstance(against, Mapping) and against.get("weights") == str(weights)


def compared(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], weights: Digest | None
) -> list[dict[str, str]]:
    """Return the metrics of a signed evaluation as the rows of a table, beside what the alias means now.

    Where the evaluation itself has compared with that, the difference is the paired one with its 95 %
    interval and its p; else it is the plain one of two signed figures, and nobody knows how sure it is.

    Args:
        ours: an evaluation's predicate.
        theirs: that of what the alias means now; empty if it means nothing.
        weights: digest of the weights that the alias means now.
    """
    others = {name: value for name, value, _ in figures(theirs.get("metrics"))}
    paired = _compares_with(ours, weights)
    found = ours.get("metrics")
    known = (
        {str(row.get("name")): row for row in found if isinstance(row, Mapping)}
        if isinstance(found, list)
        else {}
    )
    rows = []
    for name, value, _ in figures(found):
        row = known.get(name, {})
        now, difference = ("-", "-")
        if paired and isinstance(row.get("difference"), Mapping):
            now, difference = _number(row, "references", "against", "value"), _gap(row["difference"])
        elif not paired and name in others:
            now, difference = f"{others[name]:.4g}", f"{value - others[name]:+.4g}"
        rows.append(
            {
                "metric": name,
                "value": f"{value:.4g}{_interval(row.get('value'))}",
                "now": now,
                "difference": difference,
                "required": required(row) or "-",
                "passed": {True: "yes", False: "NO"}.get(row.get("passed"), "-"),
            }
        )
    return rows


def _number(row: Any, *path: str, sign: str = "") -> str:
    for name in path:
        row = row.get(name) if isinstance(row, Mapping) else None
    return f"{row:{sign}.4g}" if isinstance(row, int | float) else "-"


def _interval(value: Any, sign: str = "") -> str:
    low, high = (_number(value, end, sign=sign) for end in ("low", "high"))
    return "" if "-" in (low, high) else f" ({low} to {high})"


def _gap(gap: Mapping[str, Any]) -> str:
    return f"{_number(gap, 'value', sign='+')}{_interval(gap, '+')}, p {_number(gap, 'p_holm')}"


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
