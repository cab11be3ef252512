"""The command that scans adapters without publishing them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from registry.commands import Answer, as_text, command, table

if TYPE_CHECKING:
    from registry.scanning.explained import Explanation
    from registry.scanning.subjects import Scanned
    from registry.transfer import Progress

FORMATS = ("text", "json", "sarif", "html")
_SUFFIXES = {".json": "json", ".sarif": "sarif", ".html": "html", ".htm": "html"}
_WIDTH = 96


@command
@click.argument("target", required=False)
@click.option(
    "--format",
    "form",
    type=click.Choice(FORMATS),
    help="Form of the report; by default that of the name of --output, else text.",
)
@click.option("--output", type=click.Path(dir_okay=False), help="File that gets the report.")
@click.option("--base", metavar="ID", help="Base model of a file that comes without a card.")
@click.option(
    "--population",
    type=click.Path(exists=True, dir_okay=False),
    help="Figures of clean adapters to compare the weights with, instead of those that ship.",
)
@click.option(
    "--behaviour",
    type=click.Path(exists=True, dir_okay=False),
    help="Result of `trainer probe` to show in the HTML report; it decides nothing.",
)
@click.option("--explain", metavar="RULE", help="Explain a rule, or list them: all.")
def scan(
    target: str | None,
    form: str | None,
    output: str | None,
    base: str | None,
    population: str | None,
    behaviour: str | None,
    explain: str | None,
    progress: Progress,
) -> Answer:
    """Scan TARGET without publishing it.

    TARGET is an adapter folder, a .safetensors file, a folder of many adapters, s3://bucket/key or a prefix,
    or an adapter of the registry such as pixelsmile@prod. The exit code is 0 if it passes, 14 if it is
    blocked, 17 if it needs a review, and 1 if the scan did not finish, which is never a pass. Of many
    adapters the worst decides.
    """
    from registry.errors import UsageError

    if (target is None) == (explain is None):
        raise UsageError("say what to scan, or which rule to explain", "`registry scan DIR` scans a folder")
    if explain is not None:
        return _explained(explain)
    assert target is not None
    from registry.scanning.population import load
    from registry.scanning.targets import Options, scan_target

    form = form or _SUFFIXES.get(Path(output or "").suffix.lower(), "text")
    if behaviour is not None and form != "html":
        raise UsageError("only the HTML report shows a behaviour", "add --format html")
    clean = None if population is None else load(Path(population))
    scanned = scan_target(target, Options(base=base, population=clean, progress=progress))
    document = _document(scanned, form, behaviour)
    text = scanned_text(scanned)
    if output is None:
        text = document
    else:
        _write(Path(output), document)
        text += f"{form} report: {output}"
    return Answer(scanned.to_json(), text.rstrip("\n"), scanned.exit_code)


def scanned_text(scanned: Scanned) -> str:
    """Return what was found for a terminal: the report of one adapter, or a table of many."""
    if not scanned.many and scanned.subjects[0].report is not None:
        return scanned.subjects[0].report.text()
    rows = [("ADAPTER", "OUTCOME", "FINDINGS", "")]
    for subject in scanned.subjects:
        report = subject.report
        rules = [] if report is None else sorted({found.rule for found in report.findings})
        count = "-" if report is None else str(len(report.findings) + report.omitted)
        rows.append((subject.name, subject.outcome, count, ", ".join(rules) or subject.problem))
    counts = ", ".join(
        f"{sum(subject.outcome == outcome for subject in scanned.subjects)} {outcome}"
        for outcome in dict.fromkeys(subject.outcome for subject in scanned.subjects)
    )
    return f"{table(rows)}\n{len(scanned.subjects)} adapters: {counts}\n"


def _document(scanned: Scanned, form: str, behaviour: str | None) -> str:
    if form == "json":
        return as_text(scanned.to_json())
    if form == "sarif":
        from registry.scanning.sarif import sarif

        return as_text(sarif(scanned))
    if form == "html":
        from registry.scanning.page import page
        from registry.scanning.probed import Probed

        return page(scanned, None if behaviour is None else Probed.read(Path(behaviour)))
    return scanned_text(scanned)


def _write(path: Path, document: str) -> None:
    from registry.errors import RegistryError

    try:
        path.write_text(document.rstrip("\n") + "\n", "utf-8")
    except OSError as error:
        raise RegistryError(
            f"the report cannot be written to {path}: {error.strerror}",
            "check the folder and its permissions",
        ) from None


def _explained(name: str) -> Answer:
    from registry.scanning.explained import explain
    from registry.scanning.rules import RULES

    if name == "all":
        rules = [RULES[rule] for rule in sorted(RULES)]
        rows = [(rule.id, rule.severity, rule.layer, rule.title) for rule in rules]
        head = ("RULE", "SEVERITY", "LAYER", "FINDS")
        return Answer({"rules": [_facts(explain(rule.id)) for rule in rules]}, table([head, *rows]))
    found = explain(name)
    return Answer(_facts(found), _paragraphs(found))


def _facts(found: Explanation) -> dict[str, Any]:
    rule = found.rule
    return {
        "rule": rule.id,
        "layer": rule.layer,
        "severity": rule.severity,
        "title": rule.title,
        "why": rule.help,
        "do": found.do,
        "example": found.example,
        "limits": found.limits,
    }


def _paragraphs(found: Explanation) -> str:
    import textwrap

    rule = found.rule
    parts = [
        ("Why", rule.help),
        ("What to do", found.do),
        ("Evidence looks like", found.example),
        ("Limits", found.limits),
    ]
    lines = [f"{rule.id}: {rule.title}", f"layer {rule.layer}, severity {rule.severity}"]
    for title, words in parts:
        if words:
            lines += [
                "",
                f"{title}:",
                textwrap.fill(words, _WIDTH, initial_indent="  ", subsequent_indent="  "),
            ]
    return "\n".join(lines)


COMMANDS = (scan,)
