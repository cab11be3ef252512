"""Commands against loss: backup, restore."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from registry.commands import Answer, command, table

if TYPE_CHECKING:
    from registry.backup import Made
    from registry.restoring import Restored
    from registry.transfer import Progress

_DATABASE = click.option(
    "--database", "databases", multiple=True, metavar="NAME=URI",
    help="A further database: sqlite:////file or postgresql://user@host/name; env:VARIABLE holds its URI.",
)  # fmt: skip
_AT = click.option("--at", metavar="NAME", help="Which backup; without it the newest one.")


@command
@click.argument("place", metavar="DIR")
@_DATABASE
@click.option("--without-keys", is_flag=True, help="Leave private keys out, to keep them elsewhere.")
@click.option("--verify", is_flag=True, help="Make none: read every byte of one and verify what is signed.")
@_AT
def backup(
    place: str, databases: Sequence[str], without_keys: bool, verify: bool, at: str | None, progress: Progress
) -> Answer:
    """Back up all of this registry that could not be made again, into DIR or s3://bucket/prefix.

    Trust metadata, private keys as they lie, settings, policy, every signed version, the audit log, MLflow's
    database if it is a file here, and every --database. Others may work meanwhile. A second backup into the
    same place copies what is new. The digest that is printed stands for all of it: keep it elsewhere, and
    give it to `registry restore --sha256`.
    """
    from registry import backup as backups
    from registry.client import Registry
    from registry.errors import UsageError
    from registry.vault import Vault

    vault = Vault.open(place)
    if verify:
        if databases or without_keys:
            raise UsageError("--verify makes no backup", "leave the other options out")
        return _made(place, backups.verify(vault, at, progress), "whole and verified")
    if at is not None:
        raise UsageError("a new backup gets its own name", "--at is for --verify")
    made = backups.make(Registry.open(), vault, _named(databases), keys=not without_keys, progress=progress)
    for warning in made.warnings:
        click.echo(f"Warning: {warning}", err=True)
    return _made(place, made, f"{made.new} bytes are new")


@command
@click.argument("place", metavar="DIR")
@_DATABASE
@_AT
@click.option("--sha256", metavar="DIGEST", help="What `registry backup` printed; covers what nobody signs.")
@click.option("--overwrite", is_flag=True, help="Replace the registry that is there.")
@click.option("--only", multiple=True, metavar="NAME", help="Restore just this database, and nothing else.")
@click.option("--older", is_flag=True, help="Though this machine has seen newer; that is lost.")
def restore(
    place: str,
    databases: Sequence[str],
    at: str | None,
    sha256: str | None,
    overwrite: bool,
    only: Sequence[str],
    older: bool,
    progress: Progress,
) -> Answer:
    """Restore a registry from a backup, on the servers that the settings or the environment name.

    Everything is verified before anything is written. An interrupted restore is gone on with by the same
    command. Databases go where --database says, or NAME=skip leaves one out; the audit log goes to the
    ledger of the settings. Without --sha256, settings that come from the backup may not lead out of the data
    folder. At the end every byte is verified again; the exit code tells the first problem.
    """
    from registry import doctor, restoring
    from registry.digest import Digest
    from registry.settings import home
    from registry.vault import Vault

    digest = None if sha256 is None else Digest.parse(sha256)
    found = restoring.restore(
        home(), Vault.open(place), _named(databases), name=at, digest=digest, overwrite=overwrite,
        older=older, only=only, progress=progress,
    )  # fmt: skip
    if digest is None:
        click.echo(
            "Warning: without --sha256 settings, policy, keys and MLflow's database are as trustworthy as "
            f"the backup. Compare the fingerprint of the root with one that you know: {found.root}",
            err=True,
        )
    for warning in found.warnings:
        click.echo(f"Warning: {warning}", err=True)
    return Answer(_facts(place, found), _told(place, found), doctor.exit_code(found.findings))


def _named(databases: Sequence[str]) -> dict[str, str]:
    from registry.errors import UsageError, shown
    from registry.storage.database import masked

    found: dict[str, str] = {}
    for text in databases:
        name, equals, uri = text.partition("=")
        if not equals or not name.isascii() or not name.isidentifier() or name in found:
            raise UsageError(
                f"{shown(masked(text))!r} does not name a database",
                "write NAME=URI, such as mlflow=postgresql://mlflow@db.example.org/mlflow, each name once",
            )
        found[name] = uri
    return found


def _made(place: str, made: Made, what: str) -> Answer:
    manifest = made.manifest
    data: dict[str, Any] = {
        "place": place,
        "name": made.name,
        "sha256": made.digest,
        "time": manifest.time,
        "root": manifest.root,
        "store": manifest.store,
        "objects": len(manifest.objects),
        "files": [kept.path for kept in manifest.files],
        "databases": {dump.path: dump.kind for dump in manifest.databases},
        "bytes": made.size,
        "new_bytes": made.new,
        "warnings": [*made.warnings],
    }
    rows = [
        ("WHAT", "HOW MANY", "BYTES"),
        ("trust metadata", str(len(manifest.trust)), _bytes(manifest.trust)),
        ("objects", str(len(manifest.objects)), _bytes(manifest.objects)),
        ("files", str(len(manifest.files)), _bytes(manifest.files)),
        *((f"database {dump.path}", dump.kind, str(dump.size)) for dump in manifest.databases),
    ]
    lines = [
        table(rows),
        "",
        f"Backup {made.name} of {manifest.time} in {place}: {made.size} bytes, {what}.",
        f"Keep its digest elsewhere: {made.digest}",
    ]
    return Answer(data, "\n".join(lines))


def _bytes(kept: Sequence[Any]) -> str:
    return str(sum(one.size for one in kept))


def _facts(place: str, found: Restored) -> Mapping[str, Any]:
    from registry import doctor

    return {
        "place": place,
        "name": found.name,
        "time": found.time,
        "root": found.root,
        "versions": found.versions,
        "new_objects": found.objects,
        "databases": [*found.databases],
        "files": [*found.files],
        "replaced": [*found.replaced],
        "lost": [*found.lost],
        "warnings": [*found.warnings],
        "findings": [
            {"check": one.check, "outcome": one.outcome, "detail": one.detail, "mend": one.mend}
            for one in found.findings
        ],
        "healthy": doctor.exit_code(found.findings) == 0,
    }


def _told(place: str, found: Restored) -> str:
    from registry import doctor
    from registry.errors import shown

    marks = {"ok": "ok", "warn": "warning", "fail": "PROBLEM"}
    rows = [("CHECK", "RESULT", "FOUND")]
    rows += [(shown(one.check, 60), marks[one.outcome], shown(one.detail, 300)) for one in found.findings]
    lines = [table(rows), ""]
    todo = [f"  {line}" for line in doctor.to_do(found.findings)]
    lines += ["What to do:", *todo, ""] if todo else []
    lines += [f"Kept what said something else: {name}" for name in found.replaced]
    lines += [f"This machine has seen newer: {line}" for line in found.lost]
    if not found.files:
        return "\n".join(
            [*lines, f"Restored {', '.join(found.databases)} as of {found.time}, and nothing else."]
        )
    lines += [
        f"Restored {found.versions} versions from {place}: the registry is back at {found.time}.",
        "What was published, promoted or revoked after that is gone; revoke again what has to be.",
        "Then let readers who have seen something newer follow: `registry trust renew --ahead`.",
    ]
    return "\n".join(lines)


COMMANDS = (backup, restore)
