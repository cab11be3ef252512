"""Commands that change a registry: init, push, approve, promote, revoke."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from registry.commands import Answer, command, read_json
from registry.commands.using import listed

if TYPE_CHECKING:
    from registry.transfer import Progress


@command
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


@command
@click.argument("folder", type=click.Path(exists=True, file_okay=False))
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

    report = None if evaluation is None else read_json(Path(evaluation), "the evaluation.json of a run")
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


@command
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


@command
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


@command
@click.argument("reference")
@click.option("--reason", required=True, help="Why; people will read it.")
def revoke(reference: str, reason: str) -> Answer:
    """Withdraw REFERENCE, even from warm caches."""
    from registry.client import Registry

    row = Registry.open().revoke(reference, reason)
    return Answer(listed(row), f"{row.reference}  {row.digest}\nRevoked: {reason}")


COMMANDS = (init, push, approve, promote, revoke)
