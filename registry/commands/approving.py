"""Commands of approvers: approve, accept, reject."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from registry.commands import Answer, command
from registry.errors import shown

if TYPE_CHECKING:
    from typing import BinaryIO


@command
@click.argument("reference")
@click.option("--by", required=True, help="Who approves.")
@click.option("--reason", required=True, help="Why; people will read it.")
@click.option("--digest", help="Sign without a store: digest of the manifest of REFERENCE, a name:version.")
@click.option("--envelope", type=click.Path(dir_okay=False, allow_dash=True), help="Where --digest writes.")
def approve(reference: str, by: str, reason: str, digest: str | None, envelope: str | None) -> Answer:
    """Sign that a person approves REFERENCE.

    Everything else about it is verified first: statements, licences, files, scan.

    With --digest nothing is verified and no store is needed: the signed envelope is written to --envelope
    (default: stdout), for the form of a release that waits or for `registry accept`.
    """
    from registry.client import Registry
    from registry.errors import UsageError

    if digest is not None:
        return _apart(reference, by, reason, digest, envelope)
    if envelope is not None:
        raise UsageError("--envelope belongs to --digest", "say which digest is signed, or leave both out")
    result = Registry.open().approve(reference, by, reason)
    data = {"reference": result.reference, "digest": str(result.digest), "by": by, "reused": result.reused}
    return Answer(data, f"{result.reference}  {result.digest}\nApproved by {by}.")


def _apart(reference: str, by: str, reason: str, digest: str, envelope: str | None) -> Answer:
    from pathlib import Path

    from registry.approving import sign_apart
    from registry.client import Registry
    from registry.digest import Digest
    from registry.reference import Reference

    of = Digest.parse(digest)
    text = sign_apart(Registry.open().keys, Reference.parse(reference), of, by, reason).decode()
    if envelope is not None and envelope != "-":
        Path(envelope).write_text(text + "\n")
    told = text if envelope in (None, "-") else f"{reference}  {of}\nApproved by {by} in {envelope}."
    return Answer({"reference": reference, "digest": str(of), "by": by, "envelope": text}, told)


@command
@click.argument("reference")
@click.argument("envelope", type=click.File("rb"))
def accept(reference: str, envelope: BinaryIO) -> Answer:
    """Keep an approval of REFERENCE that an approver has signed on another machine.

    ENVELOPE is a file that `registry approve --digest` wrote, or - for stdin.
    """
    from registry import approving
    from registry.client import Registry
    from registry.reference import Reference
    from registry.signing.envelope import MAX_ENVELOPE_BYTES

    data = envelope.read(MAX_ENVELOPE_BYTES + 1)
    result = approving.accept(Registry.open(), Reference.parse(reference), data)
    by = str(result.predicate.get("by"))
    told = {"reference": result.reference, "digest": str(result.digest), "by": by, "reused": result.reused}
    verb = "was kept before" if result.reused else "is kept"
    return Answer(told, f"{result.reference}  {result.digest}\nThe approval by {shown(by)} {verb}.")


@command
@click.argument("reference")
@click.option("--by", required=True, help="Who rejects.")
@click.option("--reason", required=True, help="Why; people will read it.")
def reject(reference: str, by: str, reason: str) -> Answer:
    """Sign that an approver rejects REFERENCE, for good: it can be neither pulled nor promoted any more.

    A signed rejection is never outvoted, however many approve.
    """
    from registry import approving
    from registry.client import Registry
    from registry.reference import Reference

    result = approving.reject(Registry.open(), Reference.parse(reference), by, reason)
    data = {"reference": result.reference, "digest": str(result.digest), "by": by, "reused": result.reused}
    return Answer(data, f"{result.reference}  {result.digest}\nRejected by {by}: {reason}")


COMMANDS = (approve, accept, reject)
