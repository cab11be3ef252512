"""`serving credentials`: the C2PA manifests of pictures, made for trying out and checked."""

from __future__ import annotations

import json
from pathlib import Path

import click

_READABLE = click.Path(exists=True, dir_okay=False, readable=True, path_type=Path)


@click.group()
def credentials() -> None:
    """Make a signer to try out, and check what a picture says of itself."""


@credentials.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--name", required=True, help="Who signs, for example the name of your team.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def make(folder: Path, name: str, as_json: bool) -> None:
    """Write a key and certificates that only those trust who are given FOLDER/authority.pem."""
    from serving import certificates

    made = certificates.make(folder, name)
    if as_json:
        click.echo(json.dumps({"content_credentials": made.setting, "authority": str(made.authority)}))
        return
    click.echo(made.setting)
    click.echo("That is the value of content_credentials. Pictures are checked with:", err=True)
    click.echo(f"  serving credentials check PICTURE --anchors {made.authority}", err=True)


@credentials.command()
@click.argument("picture", type=_READABLE)
@click.option("--anchors", type=_READABLE, help="PEM certificates of those who vouch for signers.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def check(picture: Path, anchors: Path | None, as_json: bool) -> None:
    """Say what made PICTURE, by its C2PA manifest; ends with 12 where that does not hold."""
    from registry.errors import BadSignature, Unsigned, shown
    from serving import provenance

    media_type = provenance.media_type(picture.read_bytes()[:16])
    found = provenance.check(
        picture.read_bytes(), media_type, b"" if anchors is None else anchors.read_bytes()
    )
    if found.state == "none":
        raise Unsigned(f"{picture.name} carries no content credentials", "ask for it again from who made it")
    if found.state == "invalid" or (anchors is not None and found.state != "trusted"):
        raise BadSignature(
            f"the content credentials of {picture.name} do not hold: {', '.join(found.problems)}",
            "it was changed after it was signed, or its signer is not vouched for; see --anchors",
        )
    if as_json:
        click.echo(json.dumps(found.as_json()))
        return
    click.echo(f"{found.state}, signed by {shown(found.signer)}")
    click.echo(f"parent  sha256:{shown(found.parent)}")
    for name, value in found.facts.items():
        click.echo(f"{shown(name)}  {shown(json.dumps(value))}")
