"""Commands that read a registry: pull, verify, list, show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from registry.commands import DIGEST_SHOWN, Answer, command, table

if TYPE_CHECKING:
    from registry.results import Listed, Pulled, StatementView
    from registry.transfer import Progress


@command
@click.argument("reference")
@click.option("--output", type=click.Path(file_okay=False), help="Folder that gets the files as well.")
@click.option("--cache", type=click.Path(file_okay=False), help="Folder to keep it in.")
def pull(reference: str, output: str | None, cache: str | None, progress: Progress) -> Answer:
    """Fetch and verify REFERENCE, keep it in the cache.

    Nothing is kept of an adapter that is refused. An interrupted pull goes on where it was.
    """
    from pathlib import Path

    from registry.client import Registry

    pulled = Registry.open().pull(
        reference,
        None if cache is None else Path(cache),
        output=None if output is None else Path(output),
        progress=progress,
    )
    _warn(pulled)
    data = _pulled(reference, pulled) | {"path": str(pulled.path), "fetched_bytes": pulled.fetched_bytes}
    return Answer(data, f"{reference}  {pulled.digest}\n{pulled.path}")


@command
@click.argument("reference")
def verify(reference: str) -> Answer:
    """Verify REFERENCE in the store, or a pulled folder; say what was checked.

    REFERENCE is name@alias, name:version, name@sha256:<hex>, or the path of a folder with a manifest.json.
    """
    from pathlib import Path

    from registry.admission import STEPS
    from registry.client import Registry
    from registry.pulling import TRUST_STEPS

    registry, folder = Registry.open(), Path(reference)
    is_folder = "/" in reference or folder.is_dir()
    pulled = registry.verify_folder(folder) if is_folder else registry.verify(reference)
    _warn(pulled)
    # The last step makes the bytes that are loaded, and nothing is loaded here.
    checks = [
        {"number": number, "check": check, "passed": True}
        for number, check in enumerate((*TRUST_STEPS, *STEPS[:-1]), start=1)
    ]
    lines = [f"{reference}  {pulled.digest}", "The following checks were performed and passed:"]
    lines += [f"  {check['number']:2}. {check['check']}" for check in checks]
    return Answer(_pulled(reference, pulled) | {"checks": checks}, "\n".join(lines))


@command
@click.option("--all", "everything", is_flag=True, help="Show yanked versions too.")
def list(everything: bool) -> Answer:
    """List every signed version and its aliases."""
    from registry.client import Registry

    return _rows(Registry.open().list(), everything)


@command
@click.argument("name")
def versions(name: str) -> Answer:
    """List the versions of the adapter NAME, yanked ones too."""
    from registry.client import Registry
    from registry.errors import NotFound
    from registry.reference import check_name

    found = Registry.open().list(check_name(name))
    if not found:
        raise NotFound(f"there is no adapter {name}", "`registry list` shows what there is")
    return _rows(found, True)


@command
@click.argument("words", nargs=-1, required=True)
def search(words: tuple[str, ...]) -> Answer:
    """List the versions whose name, base, licence or description holds all WORDS.

    What is searched is what the publisher signed, not the index.
    """
    from registry.client import Registry

    def matches(row: Listed) -> bool:
        text = " ".join((row.reference, *map(str, row.facts.values()))).lower()
        return all(word.lower() in text for word in words)

    return _rows([row for row in Registry.open().list() if matches(row)], False)


@command
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
    data = listed(found.listed) | {"manifest": manifest.model_dump(mode="json"), "statements": statements}
    training = manifest.training
    rows = [
        ("reference", found.listed.reference),
        ("digest", str(found.listed.digest)),
        ("aliases", ", ".join(found.listed.aliases) or "-"),
        ("revoked", found.listed.revoked or "no"),
        ("yanked", found.listed.yanked or "no"),
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
    text = table(rows)
    if attestations:
        from registry.telling import told_all

        text += "\n\n" + told_all(found.statements)
    return Answer(data, text)


def _rows(found: Sequence[Listed], everything: bool) -> Answer:
    """A table of versions; yanked ones only if they are asked for."""
    shown = [row for row in found if everything or row.yanked is None]
    rows = [("REFERENCE", "ALIASES", "DIGEST", "LICENCE", "")]
    for row in shown:
        state = f"REVOKED: {row.revoked}" if row.revoked else f"yanked: {row.yanked}" if row.yanked else ""
        aliases = ", ".join(row.aliases) or "-"
        rows.append((row.reference, aliases, row.digest[:DIGEST_SHOWN], row.facts.get("license", "-"), state))
    text = table(rows) if shown else "There are no such adapters; `registry push` publishes one."
    return Answer({"adapters": [listed(row) for row in shown]}, text)


def _warn(pulled: Pulled) -> None:
    for warning in pulled.warnings:
        click.echo(f"Warning: {warning}", err=True)


def _pulled(reference: str, pulled: Pulled) -> dict[str, Any]:
    manifest = pulled.manifest
    return {
        "reference": reference,
        "resolved": pulled.reference,
        "version": manifest.version,
        "digest": str(pulled.digest),
        "license": manifest.license,
        "base": {"id": manifest.base.id, "revision": manifest.base.revision},
        "warnings": [*pulled.warnings],
    }


def listed(row: Listed) -> dict[str, Any]:
    """Return a signed version as JSON values."""
    return {
        "reference": row.reference,
        "digest": str(row.digest),
        "aliases": [*row.aliases],
        "revoked": row.revoked,
        "yanked": row.yanked,
        **row.facts,
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


COMMANDS = (pull, verify, list, versions, search, show)
