"""``registry``: the command line of the signed registry.

Data goes to stdout, progress and hints to stderr, progress bars only to a terminal. With ``--json`` every
command prints exactly one object on stdout, also when it fails: ``{"error": {"kind", "exit_code",
"message", "mend"}}``. Exit codes are those of ``registry.errors``; only click is imported before a command
runs. The file is as long as there are commands, one function each.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from registry.command import run

if TYPE_CHECKING:
    from pathlib import Path

    from registry.admission import VerifiedAdapter
    from registry.results import Listed, StatementView
    from registry.transfer import Progress

_DIGEST_SHOWN = 19  # "sha256:" and twelve digits tell versions apart for people


class Answer(NamedTuple):
    """What a command says: an object for programs, text for people, and its exit code."""

    data: Mapping[str, Any]
    text: str
    exit_code: int = 0


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="adapter-foundry", prog_name="registry")
def cli() -> None:
    """Publish, approve, verify and fetch signed LoRA adapters.

    Adapters are named name@alias, name:version or name@sha256:<hex>; there is no implicit latest.
    """


def _command(function: Callable[..., Answer]) -> click.Command:
    """Makes a command of a function that answers; prints the answer or the error as the user asked for."""

    @functools.wraps(function)
    def run(*, as_json: bool, **options: Any) -> None:
        with _progress(show=not as_json and sys.stderr.isatty()) as progress:
            wanted = {"progress": progress} if "progress" in function.__annotations__ else {}
            answer = function(**options, **wanted)
        _print(answer, as_json)
        if answer.exit_code:
            raise click.exceptions.Exit(answer.exit_code)

    flag = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
    return cli.command()(flag(run))


def _folder_argument(function: Callable[..., Answer]) -> Callable[..., Answer]:
    return click.argument("folder", type=click.Path(exists=True, file_okay=False))(function)


@_command
def init() -> Answer:
    """Make a registry in the data folder.

    That is private keys, a trust root and an empty index. A registry that is there already is left as it is.
    """
    from registry.client import Registry
    from registry.settings import layout

    place = layout()
    made = Registry.open().initialise()
    data = {
        "created": made,
        "home": str(place.home),
        "store": place.objects.as_uri(),
        "keys": str(place.keys),
        "mlflow_tracking_uri": place.tracking_uri,
    }
    if not made:
        return Answer(data, f"The registry in {place.home} is there already; nothing was changed.")
    if place.settings.key_passphrase is None:
        click.echo("The key files are not encrypted; ADAPTER_FOUNDRY_KEY_PASSPHRASE would do that.", err=True)
    text = (
        f"Made a registry in {place.home}\n"
        f"  keys   {place.keys} (private: keep them, and keep root.pem offline)\n"
        f"  index  mlflow ui --backend-store-uri {place.tracking_uri}"
    )
    return Answer(data, text)


@_command
@_folder_argument
@click.option("--name", required=True, help="Name of the adapter.")
@click.option(
    "--evaluation",
    type=click.Path(exists=True, dir_okay=False),
    help='Evaluation report (JSON with a "verdict") to sign along.',
)
def push(folder: str, name: str, evaluation: str | None, progress: Progress) -> Answer:
    """Publish an adapter FOLDER as the next version of a name.

    Scans it, checks its licences, signs it. The same adapter pushed again is found, not duplicated.
    """
    from pathlib import Path

    from registry.client import Registry

    report = None if evaluation is None else _read_json(Path(evaluation))
    result = Registry.open().push(Path(folder), name, evaluation=report, progress=progress)
    data = {
        "reference": result.reference,
        "version": result.version,
        "digest": str(result.digest),
        "uploaded_bytes": result.uploaded_bytes,
        "reused": result.reused,
    }
    if result.reused:
        text = f"{result.reference}  {result.digest}\nIt was published before; nothing new was made."
    else:
        text = f"{result.reference}  {result.digest}\nPublished; {result.uploaded_bytes} bytes were sent."
    return Answer(data, text)


@_command
@click.argument("reference")
@click.option("--by", required=True, help="Who approves.")
@click.option("--reason", required=True, help="Why; people will read it.")
def approve(reference: str, by: str, reason: str) -> Answer:
    """Sign that a person approves REFERENCE.

    Everything else about it is verified first: statements, licences, files, scan.
    """
    from registry.client import Registry

    result = Registry.open().approve(reference, by, reason)
    data = {"reference": result.reference, "digest": str(result.digest), "by": by, "reused": result.reused}
    return Answer(data, f"{result.reference}  {result.digest}\nApproved by {by}.")


@_command
@click.argument("reference")
@click.argument("alias")
def promote(reference: str, alias: str) -> Answer:
    """Sign that ALIAS means REFERENCE, if it passes every check.

    Example: registry promote pixelsmile:3 prod
    """
    from registry.client import Registry

    result = Registry.open().promote(reference, alias)
    data = {
        "reference": result.reference,
        "version": result.version,
        "digest": str(result.digest),
        "previous": result.previous,
        "reused": result.reused,
    }
    before = "" if result.previous is None else f", which meant version {result.previous} before"
    verb = "already means" if result.reused else "now means"
    return Answer(
        data, f"{result.reference}  {result.digest}\nThe alias {verb} version {result.version}{before}."
    )


@_command
@click.argument("reference")
@click.option("--cache", type=click.Path(file_okay=False), help="Folder to keep it in.")
def pull(reference: str, cache: str | None, progress: Progress) -> Answer:
    """Fetch and verify REFERENCE, keep it in the cache.

    Nothing is kept of an adapter that is refused.
    """
    from pathlib import Path

    from registry.client import Registry

    registry, folder = Registry.open(), None if cache is None else Path(cache)
    adapter = registry.pull(reference, folder, progress)
    path = registry.cached(adapter, folder)
    data = _adapter(reference, adapter) | {"path": str(path)}
    return Answer(data, f"{reference}  {adapter.digest}\n{path}")


@_command
@click.argument("reference")
def verify(reference: str) -> Answer:
    """Verify REFERENCE in the store; say what was checked."""
    from registry.admission import STEPS
    from registry.client import TRUST_STEPS, Registry

    adapter = Registry.open().verify(reference)
    checks = [
        {"number": number, "check": check, "passed": True}
        for number, check in enumerate((*TRUST_STEPS, *STEPS), start=1)
    ]
    lines = [f"{reference}  {adapter.digest}", "The following checks were performed and passed:"]
    lines += [f"  {check['number']:2}. {check['check']}" for check in checks]
    return Answer(_adapter(reference, adapter) | {"checks": checks}, "\n".join(lines))


@_command
def list() -> Answer:
    """List every signed version and its aliases."""
    from registry.client import Registry

    found = Registry.open().list()
    rows = [("REFERENCE", "ALIASES", "DIGEST", "")]
    rows += [
        (row.reference, ", ".join(row.aliases) or "-", row.digest[:_DIGEST_SHOWN], f"REVOKED: {row.revoked}")
        if row.revoked
        else (row.reference, ", ".join(row.aliases) or "-", row.digest[:_DIGEST_SHOWN], "")
        for row in found
    ]
    text = _table(rows) if found else "There are no adapters yet; `registry push` publishes one."
    return Answer({"adapters": [_listed(row) for row in found]}, text)


@_command
@click.argument("reference")
@click.option("--attestations", is_flag=True, help="Show what every statement says.")
def show(reference: str, attestations: bool) -> Answer:
    """Show what is signed about REFERENCE.

    Also works for an adapter that a pull would refuse.
    """
    from registry.client import Registry

    found = Registry.open().show(reference)
    manifest = found.manifest
    statements = [_statement(view, whole=attestations) for view in found.statements]
    data = _listed(found.listed) | {"manifest": manifest.model_dump(mode="json"), "statements": statements}
    training = manifest.training
    rows = [
        ("reference", found.listed.reference),
        ("digest", str(found.listed.digest)),
        ("aliases", ", ".join(found.listed.aliases) or "-"),
        ("revoked", found.listed.revoked or "no"),
        ("licence", manifest.license),
        ("base", f"{manifest.base.id} at {manifest.base.revision} ({manifest.base.license})"),
        ("lora", f"rank {manifest.lora.rank}, alpha {manifest.lora.alpha:g}, {manifest.lora.dtype}"),
        ("expressions", ", ".join(manifest.conditioning.expressions)),
        ("training", f"seed {training.seed}, {training.steps} steps, code {training.code_version}"),
        ("recipe", str(training.recipe)),
        ("dataset", str(training.dataset)),
        *(("file", f"{entry.path}, {entry.size} bytes, {entry.sha256}") for entry in manifest.files),
        *(("statement", _statement_line(view)) for view in found.statements),
    ]
    text = _table(rows)
    if attestations:
        text += "".join(f"\n\n{view.kind}:\n{_json(dict(view.predicate))}" for view in found.statements)
    return Answer(data, text)


@_command
@_folder_argument
def scan(folder: str) -> Answer:
    """Scan an adapter FOLDER without publishing it.

    The exit code is 14 if it is blocked and 17 if it needs a review.
    """
    from pathlib import Path

    from registry.client import read_folder
    from registry.errors import NeedsReview, ScanRefused
    from registry.manifest import CARD_NAME, WEIGHTS_NAME, AdapterCard
    from registry.scanning import scan as scan_weights

    files = read_folder(Path(folder))
    report = scan_weights(files[WEIGHTS_NAME], AdapterCard.parse(files[CARD_NAME]))
    codes = {"pass": 0, "review": NeedsReview.exit_code, "block": ScanRefused.exit_code}
    return Answer(report.to_json(), report.text().rstrip(), codes[report.verdict])


@_command
@click.argument("reference")
@click.option("--reason", required=True, help="Why; people will read it.")
def revoke(reference: str, reason: str) -> Answer:
    """Withdraw REFERENCE, even from warm caches."""
    from registry.client import Registry

    row = Registry.open().revoke(reference, reason)
    return Answer(_listed(row), f"{row.reference}  {row.digest}\nRevoked: {reason}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits with its code."""
    run(cli, "registry", arguments)


def _print(answer: Answer, as_json: bool) -> None:
    click.echo(_json(answer.data) if as_json else answer.text)


def _json(data: Mapping[str, Any]) -> str:
    import json

    return json.dumps(data, indent=2, ensure_ascii=True)


def _read_json(path: Path) -> Mapping[str, Any]:
    import json

    from registry.errors import UsageError

    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path} cannot be read as JSON: {error}", "give the evaluation.json of a run"
        ) from None
    if not isinstance(content, dict):
        raise UsageError(f"{path} is not an evaluation report", "give the evaluation.json of a run")
    return content


def _adapter(reference: str, adapter: VerifiedAdapter) -> dict[str, Any]:
    return {
        "reference": reference,
        "resolved": adapter.reference,
        "version": None if adapter.manifest is None else adapter.manifest.version,
        "digest": str(adapter.digest),
        "license": adapter.card.license,
        "base": {"id": adapter.card.base.id, "revision": adapter.card.base.revision},
        "scan": adapter.scan.verdict,
    }


def _listed(row: Listed) -> dict[str, Any]:
    return {
        "reference": row.reference,
        "digest": str(row.digest),
        "aliases": [*row.aliases],
        "revoked": row.revoked,
    }


def _statement(view: StatementView, *, whole: bool) -> dict[str, Any]:
    data = {
        "kind": view.kind,
        "role": view.role,
        "signed": view.signed,
        "problem": view.problem,
        "key_ids": [*view.key_ids],
    }
    return data | {"predicate": dict(view.predicate)} if whole else data


def _statement_line(view: StatementView) -> str:
    if not view.signed:
        return f"{view.kind}, NOT BELIEVED: {view.problem}"
    return f"{view.kind}, signed by the {view.role} key {', '.join(keyid[:12] for keyid in view.key_ids)}"


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


@contextlib.contextmanager
def _progress(*, show: bool) -> Iterator[Progress]:
    """A bar on a terminal, silence elsewhere."""
    if not show:
        yield _silent
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def report(stage: str, done: int, total: int, /) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield report


def _silent(stage: str, done: int, total: int, /) -> None:
    """Tells nobody; the command line does not import the transfer for that."""


if __name__ == "__main__":
    main()
