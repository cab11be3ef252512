"""Commands about signed statements: attest, waive, export."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from registry.commands import Answer, command, read_json

if TYPE_CHECKING:
    from pathlib import Path

    from registry.exporting import Exported
    from registry.transfer import Progress

KINDS = ("training", "evaluation", "scan", "licence", "behaviour", "reproduction")
"""Kinds that `attest` signs; an approval is signed by `approve`, which verifies everything else first."""

FORMATS = ("bundle", "cyclonedx", "model-signing")


@command
@click.argument("reference")
@click.option("--kind", required=True, type=click.Choice(KINDS), help="What is attested.")
@click.option(
    "--predicate",
    required=True,
    type=click.Path(exists=True, dir_okay=False),
    help="JSON file with what is attested: the report of an evaluation, for example.",
)
@click.option("--role", help="Whose key signs; each kind is believed from one role only.")
def attest(reference: str, kind: str, predicate: str, role: str | None) -> Answer:
    """Sign a statement about REFERENCE.

    A statement that says no is signed as well, and keeps the adapter from being pulled. The same statement
    signed again by the same key is found, not doubled. Approvals are signed by `registry approve`, waivers by
    `registry waive`.
    """
    from pathlib import Path
    from typing import cast

    from registry.attestation import ROLE_OF, Kind, Statement, evaluation_predicate
    from registry.behaviour import behaviour_predicate
    from registry.client import Registry

    told = read_json(Path(predicate), f"the predicate of the {kind} statement")
    if kind == "evaluation":
        told = evaluation_predicate(told)
    if kind == "behaviour":
        told = behaviour_predicate(told)
    wanted = cast(Kind, kind)
    result = Registry.open().attest(reference, wanted, told, role)
    found = Statement(kind=wanted, subject_name=result.reference, digest=result.digest, predicate=told)
    if found.outcome != "pass" and kind == "reproduction":
        half = " in half of what is compared" if told.get("outcome") == "equivalent" else ""
        click.echo(
            f"It says {told.get('outcome')!r}{half}: aliases whose gates ask for a reproduction refuse it.",
            err=True,
        )
    elif found.outcome != "pass":
        unless = ", unless approvers waive it" if found.outcome == "review" else ""
        click.echo(
            f"It says {found.outcome!r}, so that pulls of {result.reference} are refused{unless}.", err=True
        )
    data = {
        "reference": result.reference,
        "digest": str(result.digest),
        "kind": kind,
        "role": ROLE_OF[wanted],
        "outcome": found.outcome,
        "statement": result.statement,
        "reused": result.reused,
    }
    verb = "This statement was signed before" if result.reused else f"Signed by the {ROLE_OF[wanted]}"
    return Answer(data, f"{result.reference}  {result.digest}\n{verb}: {kind}, {found.outcome}.")


@command
@click.argument("reference")
@click.argument("rules", nargs=-1, required=True)
@click.option("--reason", required=True, help="Why; people will read it.")
@click.option("--by", help="Who decides; default: who works on this machine.")
@click.option("--days", type=click.IntRange(1), default=30, show_default=True, help="How long it counts.")
@click.option("--where", help="Only findings at this place, as the scan names it.")
def waive(
    reference: str, rules: tuple[str, ...], reason: str, by: str | None, days: int, where: str | None
) -> Answer:
    """Sign that findings of RULES in REFERENCE may pass for a while.

    Only rules that ask for a review can be waived, only for these bytes, and it counts when as many approvers
    have signed as an approval needs.

    Example: registry waive pixelsmile:3 ADP-WGT-001 --reason "trained on few images" --days 30
    """
    from registry.client import Registry

    registry = Registry.open()
    result = registry.waive(
        reference, *rules, by=by or registry.place.actor, reason=reason, days=days, where=where
    )
    told = result.predicate
    data = {
        "reference": result.reference,
        "digest": str(result.digest),
        "rules": told["rules"],
        "where": where,
        "by": told["by"],
        "expires": told["expires"],
        "statement": result.statement,
        "reused": result.reused,
    }
    said = f"A waiver of {', '.join(told['rules'])} is signed; it ends on {told['expires']}."
    return Answer(data, f"{result.reference}  {result.digest}\n{said}")


@command
@click.argument("reference")
@click.option(
    "--format",
    "form",
    required=True,
    type=click.Choice(FORMATS),
    help="bundle: statements for cosign and in-toto. cyclonedx: a bill of materials with a model card. "
    "model-signing: files with an OpenSSF signature.",
)
@click.option(
    "--output", type=click.Path(), help="New folder; for cyclonedx a file, or nothing to print the bill."
)
@click.option("--key", help="model-signing: ECDSA private key that signs, file:<path>.")
def export(reference: str, form: str, output: str | None, key: str | None, progress: Progress) -> Answer:
    """Export what is signed about REFERENCE for other people's tools.

    Example: registry export pixelsmile@prod --format bundle --output statements
    """
    from pathlib import Path

    from registry import exporting
    from registry.client import Registry
    from registry.errors import UsageError
    from registry.reference import Reference

    place = None if output is None else Path(output)
    if place is None and form != "cyclonedx":
        raise UsageError(f"--format {form} writes a folder", "name it with --output")
    if (key is None) == (form == "model-signing"):
        raise UsageError(
            "--key goes with --format model-signing, and the other way round",
            "give the ECDSA key that signs as --key file:<path>",
        )
    registry, wanted = Registry.open(), Reference.of(reference)
    if form == "bundle":
        assert place is not None
        found = exporting.export_bundle(registry, wanted, place)
    elif form == "cyclonedx":
        found = exporting.export_bom(registry, wanted, place)
    else:
        assert place is not None
        assert key is not None
        found = exporting.export_signed(registry, wanted, place, key, progress)
    return _answer(found, form, place)


def _answer(found: Exported, form: str, place: Path | None) -> Answer:
    import json

    for warning in found.warnings:
        click.echo(warning, err=True)
    data = {
        "reference": found.reference,
        "digest": str(found.digest),
        "format": form,
        "output": None if place is None else str(place),
        "files": [*found.files],
        "warnings": [*found.warnings],
    }
    if form == "cyclonedx":
        data["bom"] = json.loads(found.content)
    if place is None:
        return Answer(data, found.content.decode().rstrip())
    lines = [f"{found.reference}  {found.digest}", str(place)]
    hint = "" if form == "cyclonedx" else f"\n{place / 'README.md'} tells how others verify it."
    return Answer(data, "\n".join(lines) + hint)


COMMANDS = (attest, waive, export)
