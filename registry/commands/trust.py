"""Commands about keys: ``registry trust show | add | rotate | revoke-key | renew | sign`` and more.

On the machines of a team ``registry trust export`` and ``registry trust pin`` say whom to believe.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from registry.commands import Answer, command, table

if TYPE_CHECKING:
    from registry.client import Registry
    from registry.signing.authority import Authority
    from registry.signing.rotation import Draft

ROLES = ("root", "publisher", "scanner", "evaluator", "approver", "online")
_SHOWN = 12
_RENEW = (
    "run `registry trust renew` where a publisher key is kept that stays, then where an approver key is kept"
)


def show() -> Answer:
    """Show roles, keys, thresholds, expiry and the pinned root."""
    from registry.signing import keys

    data = keys.overview(_authority())
    root = data["root"]
    lines = [
        f"root version {root['version']}",
        f"pinned version {root['pinned_version']}, {root['pinned_sha256']}",
        "",
        table([("ROLE", "NEEDS", "KEY", "TYPE", ""), *_key_rows(data["roles"])]),
        "",
        table([("METADATA", "EXPIRES"), *_expiry_rows(data["expires"])]),
    ]
    if set(data["versions_signed_by"]) != {key["keyid"] for key in data["roles"]["publisher"]["keys"]}:
        lines += ["", f"Who signs versions is not yet who the root lists: {_RENEW}."]
    if root["draft"] is not None:
        lines += ["", "A new root waits for signatures: `registry trust sign` shows it."]
    return Answer(data, "\n".join(lines))


@click.argument("role", type=click.Choice(ROLES))
@click.option("--output", type=click.Path(dir_okay=False), help="Write the public key there.")
def key(role: str, output: str | None) -> Answer:
    """Make this machine's key of ROLE, or find it, and print its public half.

    Send that to who holds the root key, who lists it: registry trust add ROLE key.pem
    """
    from pathlib import Path

    from registry.client import Registry
    from registry.signing import keys, signers

    public = keys.make(Registry.open().keys, role)
    pem = signers.pem_of(public)
    if output is not None:
        Path(output).write_text(pem)
    return Answer({"role": role, "keyid": public.keyid, "type": public.keytype, "pem": pem}, pem.rstrip())


@click.argument("role", type=click.Choice(ROLES))
@click.argument("key")
@click.option("--threshold", type=click.IntRange(min=1), help="How many keys of the role must sign.")
def add(role: str, key: str, threshold: int | None) -> Answer:
    """List KEY for ROLE: a public key file (PEM), or a URI such as awskms:alias/approver."""
    from registry.signing import keys

    registry = _recorded("add", role, key=key, threshold=threshold)
    return _told(keys.add(registry.authority, role, key, threshold))


@click.argument("role", type=click.Choice(ROLES))
@click.argument("number", type=click.IntRange(min=1))
def threshold(role: str, number: int) -> Answer:
    """Let ROLE need the signatures of NUMBER different keys."""
    from registry.signing import keys

    registry = _recorded("threshold", role, threshold=number)
    return _told(keys.require(registry.authority, role, number))


@click.argument("role", type=click.Choice(ROLES))
@click.option("--to", help="URI of the new key; without it a new key file is made.")
def rotate(role: str, to: str | None) -> Answer:
    """Replace this machine's key of ROLE by a new one.

    What the old key signed about versions from before stays good. A key that may have been in wrong hands is
    not rotated but revoked: registry trust revoke-key
    """
    from registry.signing import keys

    result = keys.rotate(_recorded("rotate", role, to=to).authority, role, to)
    answer = _told(result.draft)
    kept = None if result.kept is None else str(result.kept)
    if kept is not None:
        click.echo(f"The old private key is in {kept}; destroy it when nobody needs it.", err=True)
    if to is not None:
        click.echo(f"Set the key of {role} to {to} in the settings ([registry.keys]).", err=True)
    return Answer({**answer.data, "old": result.old, "new": result.new, "kept": kept}, answer.text)


@click.argument("keyid")
@click.option("--planned", is_flag=True, help="It was never in wrong hands: what it signed stays good.")
def revoke_key(keyid: str, planned: bool) -> Answer:
    """Take KEYID (its first 8 digits or more) out of every role, for good."""
    from registry.signing import keys

    registry = _recorded("revoke-key", keyid, planned=planned)
    return _told(keys.remove(registry.authority, keyid, planned=planned))


@click.option("--ahead", is_flag=True, help="After a restore: let readers believe it who have seen newer.")
def renew(ahead: bool) -> Answer:
    """Give a new life to the root and to everything whose key is on this machine.

    With --ahead the root stays, and all other numbers grow by 100,000: what was restored from a backup is
    then newer than what any reader has seen. Roots that a restore has kept are published, if their keys are
    here. Revoke first what has to stay revoked. Run it where each key
    is kept.
    """
    from registry.errors import RegistryError
    from registry.signing import following
    from registry.signing.rotation import Rotation

    if not ahead:
        return _told(Rotation(_recorded("renew", "root").authority).renew())
    registry = _recorded("renew", "ahead", ahead=True)
    try:
        if following.follow(registry.authority, registry.place.trust):
            following.settle(registry.authority)
    except RegistryError as error:  # the numbers help everybody who has not seen those roots
        click.echo(f"Warning: a root from after the backup waits for its keys: {error.message}", err=True)
    left = Rotation(registry.authority).advance()
    kinds = sorted({"versions" if role.startswith("versions-") else role for role in left})
    text = "Readers who have seen newer metadata believe these now."
    if kinds:
        text = f"Not yet: the key of {', '.join(kinds)} is on another machine. Run the same command there."
    return Answer({"ahead": not kinds, "left": kinds}, text)


@click.option("--drop", is_flag=True, help="Forget the draft.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def sign(drop: bool, yes: bool) -> Answer:
    """Sign the new root that somebody else has begun, after showing what it changes."""
    from registry.client import Registry
    from registry.errors import NotFound
    from registry.signing.rotation import Rotation

    registry = Registry.open()
    rotation = Rotation(registry.authority)
    if drop:
        registry.record("trust", "root", {"command": "sign --drop"})
        rotation.drop()
        return Answer({"dropped": True}, "The draft is dropped.")
    draft = rotation.look()
    if draft is None:
        raise NotFound("no draft of a root waits for signatures", "`registry trust show` tells the keys")
    click.echo(f"Root version {draft.version} would change:", err=True)
    for line in draft.changes or ("nothing but its time",):
        click.echo(f"  {line}", err=True)
    if not yes:
        click.confirm("Sign it?", abort=True, err=True)
    registry.record(
        "trust", "root", {"command": "sign", "version": draft.version, "changes": [*draft.changes]}
    )
    return _told(rotation.sign(draft.digest))


@click.option("--dry-run", is_flag=True, help="Only tell.")
def sweep(dry_run: bool) -> Answer:
    """Remove statements that no listed key has signed, after a key was revoked.

    They lock their adapters until somebody else has signed anew what they said.
    """
    from registry.client import Registry
    from registry.errors import shown
    from registry.sweep import sweep as remove

    found = remove(Registry.open(), dry_run=dry_run)
    data = {
        "dry_run": dry_run,
        "versions": [{"reference": one.reference, "statements": list(one.keys)} for one in found],
    }
    verb = "Would remove" if dry_run else "Removed"
    lines = [f"{verb} {len(one.keys)} of {one.reference}: {shown(one.problems[0])}" for one in found]
    return Answer(data, "\n".join(lines) or "Every statement is signed by a listed key.")


def export() -> Answer:
    """Print the newest root, for `registry trust pin` on another machine."""
    import hashlib

    from registry.signing import keys

    root = keys.export(_authority().state())
    digest = hashlib.sha256(root).hexdigest()
    click.echo(f"Tell its fingerprint on another way: sha256:{digest}", err=True)
    return Answer({"root": root.decode(), "sha256": f"sha256:{digest}"}, root.decode())


@click.argument("root", type=click.File("rb"))
@click.option("--sha256", help="Fingerprint that its owner told.")
def pin(root: Any, sha256: str | None) -> Answer:
    """Believe ROOT (a file, or - for stdin) on this machine from now on."""
    from registry.signing import keys

    found = keys.pin(_authority().client, root.read(), sha256)
    if sha256 is None:
        click.echo("Compare this fingerprint with the one that the registry's owner tells you.", err=True)
    return Answer({"sha256": found}, f"Pinned a root with the fingerprint {found}")


def _authority() -> Authority:
    from registry.client import Registry

    return Registry.open().authority


def _recorded(subcommand: str, subject: str, **details: Any) -> Registry:
    """The registry, after the audit log has got a line: no key changes without one, tried ones included."""
    from registry.client import Registry

    registry = Registry.open()
    registry.record("trust", subject, {"command": subcommand, **details})
    return registry


def _told(draft: Draft) -> Answer:
    data = {"root": draft.version, "changes": list(draft.changes), "missing": draft.missing}
    changes = "".join(f"\n  {line}" for line in draft.changes)
    if draft.missing:
        text = (
            f"Root version {draft.version} waits for {draft.missing} more signatures: "
            f"`registry trust sign` where another root key is kept.{changes}"
        )
    else:
        text = f"Root version {draft.version} is in force.{changes}"
    return Answer(data, text)


def _key_rows(roles: Mapping[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for role in ROLES:
        held = roles[role]
        needs = f"{held['threshold']} of {len(held['keys'])}"
        for number, one in enumerate(held["keys"]):
            label = (role, needs) if number == 0 else ("", "")
            here = "on this machine" if one["here"] else ""
            rows.append((*label, one["keyid"][:_SHOWN], one["type"], here))
        rows += [("", "", keyid[:_SHOWN], "", "retired") for keyid in held["retired"]]
    return rows


def _expiry_rows(expires: Mapping[str, str]) -> list[tuple[str, ...]]:
    """One row a kind; of the bins of versions the one that ends first."""
    first: dict[str, str] = {}
    for name, when in expires.items():
        kind = "versions" if name.startswith("versions-") else name
        first[kind] = min(when, first.get(kind, when))
    return list(first.items())


@click.group()
def trust() -> None:
    """Keys and the trust root: who may publish, scan, evaluate, approve and promote."""


for _function in (show, key, add, threshold, rotate, revoke_key, renew, sign, sweep, export, pin):
    trust.add_command(command(_function, _function.__name__.replace("_", "-")))

COMMANDS = (trust,)
"""What ``registry.cli`` collects."""
