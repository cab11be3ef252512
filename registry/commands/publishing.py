"""Commands that change a registry: init, push, promote, revoke."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from registry.commands import Answer, command, read_json, table
from registry.commands.using import listed

if TYPE_CHECKING:
    from pathlib import Path

    from registry.gates import GateCheck, GateReport
    from registry.results import Promotion
    from registry.transfer import Progress


@command
@click.option("--server", is_flag=True, help="For a team: objects in S3, index and audit log on servers.")
@click.option("--store", help="Object store of the team, such as s3://bucket/prefix.")
@click.option("--mlflow", help="MLflow server of the team, such as https://mlflow.example.org.")
@click.option("--ledger", help="Audit log, such as postgresql+psycopg://user@host/database.")
def init(server: bool, store: str | None, mlflow: str | None, ledger: str | None) -> Answer:
    """Make a registry: private keys, a trust root, an audit log and an empty index.

    Without options everything is in the data folder. For a team, name the servers; the settings are kept in
    the data folder, credentials stay in the environment (AWS_*, MLFLOW_TRACKING_*, PGPASSWORD). A registry
    that is there already is left as it is; other machines join it by `registry trust pin`.
    """
    from registry.client import Registry
    from registry.settings import home, layout

    _team(server, {"store": store, "mlflow_tracking_uri": mlflow, "ledger": ledger}, home())
    place = layout()
    made = Registry.open().initialise()
    data = {
        "created": made,
        "home": str(place.home),
        "store": place.store_uri,
        "keys": str(place.keys),
        "mlflow_tracking_uri": place.tracking_uri,
        "ledger": place.ledger_uri,
    }
    if not made:
        return Answer(data, f"The registry in {place.home} is there already; nothing was changed.")
    if place.settings.key_passphrase is None:
        click.echo("The key files are not encrypted; ADAPTER_FOUNDRY_KEY_PASSPHRASE would do that.", err=True)
    index = place.tracking_uri
    shown_index = index if index.startswith("http") else f"mlflow ui --backend-store-uri {index}"
    text = (
        f"Made a registry in {place.home}\n"
        f"  store  {place.store_uri}\n"
        f"  keys   {place.keys} (private: keep them, and keep root.pem offline)\n"
        f"  log    {place.ledger_uri}\n"
        f"  index  {shown_index}"
    )
    return Answer(data, text)


def _team(server: bool, given: Mapping[str, str | None], folder: Path) -> None:
    """Keep where a team's servers are; all of them are needed, or none."""
    from registry.errors import UsageError
    from registry.settings import save

    values = {key: value for key, value in given.items() if value is not None}
    if server and len(values) < len(given):
        missing = ", ".join(f"--{key.partition('_')[0]}" for key in given if key not in values)
        raise UsageError(f"a registry for a team also needs {missing}", "name all three servers")
    if values and not server:
        raise UsageError("--store, --mlflow and --ledger belong to --server", "add --server")
    if values:
        save(folder, values)


@command
@click.argument("folder", type=click.Path(exists=True, file_okay=False))
@click.option("--name", required=True, help="Name of the adapter.")
@click.option(
    "--evaluation",
    type=click.Path(exists=True, dir_okay=False),
    help='Evaluation report (JSON with a "verdict") to sign along.',
)
@click.option(
    "--behaviour",
    type=click.Path(exists=True, dir_okay=False),
    help="Report of `trainer probe` about these weights, to sign along.",
)
@click.option("--for-review", is_flag=True, help="Publish also what the scanner wants a person to look at.")
@click.option("--version", type=click.IntRange(1), help="Number that it must get; default: the next one.")
def push(
    folder: str,
    name: str,
    evaluation: str | None,
    behaviour: str | None,
    for_review: bool,
    version: int | None,
    progress: Progress,
) -> Answer:
    """Publish an adapter FOLDER as the next version of a name.

    Scans it, checks its licences, signs it. The same adapter pushed again is found, not duplicated; a version
    that exists is never overwritten. An interrupted push is completed by the next one. With --for-review an
    adapter with findings that ask for a person is published as well; nobody can pull it before approvers have
    waived every one of them with `registry waive`.
    """
    from pathlib import Path

    from registry.client import Registry

    result = Registry.open().push(
        Path(folder),
        name,
        evaluation=_report(evaluation, "the evaluation.json of a run"),
        behaviour=_report(behaviour, "what `trainer probe` wrote"),
        for_review=for_review,
        version=version,
        progress=progress,
    )
    data = {
        "reference": result.reference,
        "version": result.version,
        "digest": str(result.digest),
        "uploaded_bytes": result.uploaded_bytes,
        "reused": result.reused,
        "findings": [*result.findings],
    }
    if result.findings:
        rules = " ".join(result.findings)
        click.echo(f"A person has to look: registry waive {result.reference} {rules} --reason ...", err=True)
    if result.reused:
        text = f"{result.reference}  {result.digest}\nIt was published before; nothing new was made."
    else:
        text = f"{result.reference}  {result.digest}\nPublished; {result.uploaded_bytes} bytes were sent."
    return Answer(data, text)


def _report(path: str | None, what: str) -> Mapping[str, Any] | None:
    from pathlib import Path

    return None if path is None else read_json(Path(path), what)


@command
@click.argument("reference")
@click.option("--to", "alias", required=True, help="The alias that shall mean it, such as prod.")
@click.option("--dry-run", is_flag=True, help="Look at the gates and change nothing.")
def promote(reference: str, alias: str, dry_run: bool) -> Answer:
    """Sign that an alias means REFERENCE, if it passes every gate.

    All gates are shown, also behind one that fails. Example: registry promote pixelsmile:3 --to prod
    """
    from registry.client import Registry
    from registry.promotion import promote as promote_reported

    registry = Registry.open()
    report = registry.gates(reference, alias)
    shown = _gates(report)
    data = {
        "reference": report.alias,
        "version": report.manifest.version,
        "digest": str(report.manifest.digest),
        "checks": [_check(check) for check in report.checks],
    }
    if report.refusal is not None:
        error = report.refusal
        text = f"{shown}\n{report.reference} is not promoted: {error}"
        refusal = {"kind": type(error).__name__, "message": error.message, "mend": error.mend}
        return Answer(data | {"promoted": False, "error": refusal}, text, error.exit_code)
    if dry_run:
        return Answer(data | {"promoted": False}, f"{shown}\n{report.alias} could mean {report.reference}.")
    result = promote_reported(registry, report)
    more = {"promoted": True, "previous": result.previous, "reused": result.reused}
    return Answer(data | more, f"{shown}\n{_moved(result)}")


@command
@click.argument("reference")
@click.option("--to", "version", type=click.IntRange(1), help="A version that it meant; default: the last.")
def rollback(reference: str, version: int | None) -> Answer:
    """Point the alias of REFERENCE (name@alias) back to a version that it meant before.

    That version has to pass the gates of today.
    """
    from registry.client import Registry

    name, alias = _name_and_alias(reference)
    result = Registry.open().rollback(name, alias, version)
    data = {
        "reference": result.reference,
        "version": result.version,
        "digest": str(result.digest),
        "previous": result.previous,
    }
    return Answer(data, _moved(result))


@command
@click.argument("reference")
def demote(reference: str) -> Answer:
    """Take the alias of REFERENCE (name@alias) away; versions stay."""
    from registry.client import Registry

    name, alias = _name_and_alias(reference)
    result = Registry.open().demote(name, alias)
    data = {"reference": result.reference, "version": None, "previous": result.previous}
    return Answer(data, f"{result.reference} means nothing any more; it meant version {result.previous}.")


@command
@click.argument("reference")
@click.option("--reason", required=True, help="Why; people will read it.")
def revoke(reference: str, reason: str) -> Answer:
    """Withdraw REFERENCE, even from warm caches."""
    from registry.client import Registry

    row = Registry.open().revoke(reference, reason)
    return Answer(listed(row), f"{row.reference}  {row.digest}\nRevoked: {reason}")


@command
@click.argument("reference")
@click.option("--reason", help="Why; people will read it.")
@click.option("--undo", is_flag=True, help="Show it again.")
def yank(reference: str, reason: str | None, undo: bool) -> Answer:
    """Hide REFERENCE from lists and promotions; pulling it by version still works, with a warning."""
    from registry.client import Registry
    from registry.errors import UsageError

    if undo == (reason is not None):
        raise UsageError("a yank needs either --reason or --undo", "say why, or take it back")
    row = Registry.open().yank(reference, reason)
    said = "Shown again." if undo else f"Yanked: {reason}"
    return Answer(listed(row), f"{row.reference}  {row.digest}\n{said}")


def _check(check: GateCheck) -> dict[str, Any]:
    """One gate as JSON; one about a metric with the rule and the figure."""
    told: dict[str, Any] = {"name": check.name, "outcome": check.outcome, "detail": check.detail}
    if check.metric is None:
        return told
    from dataclasses import asdict

    figure = None if check.metric.figure is None else asdict(check.metric.figure)
    rule = check.metric.rule.model_dump(mode="json", exclude_none=True)
    return told | {"metric": {"name": check.metric.name, "rule": rule, "figure": figure}}


def _gates(report: GateReport) -> str:
    marks = {"pass": "pass", "fail": "FAIL", "missing": "MISSING"}
    rows = [("GATE", "RESULT", "FOUND")]
    rows += [
        (check.name, marks[check.outcome], check.detail.partition("\n")[0] or "-") for check in report.checks
    ]
    return table(rows)


def _moved(result: Promotion) -> str:
    before = "" if result.previous is None else f", which meant version {result.previous} before"
    verb = "already means" if result.reused else "now means"
    return f"{result.reference}  {result.digest}\nThe alias {verb} version {result.version}{before}."


def _name_and_alias(text: str) -> tuple[str, str]:
    from registry.errors import UsageError
    from registry.reference import Reference

    reference = Reference.parse(text)
    if reference.alias is None:
        raise UsageError(f"{text} names no alias", "write name@alias, for example pixelsmile@prod")
    return reference.name, reference.alias


COMMANDS = (init, push, promote, rollback, demote, revoke, yank)
