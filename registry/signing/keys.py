"""What people do with keys: add, retire, revoke and rotate them, pin a root, and look at it all."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.errors import BadSignature, RegistryError, UsageError, shown
from registry.signing import signers
from registry.signing.authority import Authority
from registry.signing.plan import Plan
from registry.signing.refresh import TrustClient
from registry.signing.rotation import Draft, Rotation
from registry.signing.signers import ROLES, KeyRing
from registry.signing.trust import NAMES, TrustState

if TYPE_CHECKING:
    from securesystemslib.signer import SSlibKey


@dataclass(frozen=True, kw_only=True, slots=True)
class Rotated:
    """What became of this machine's key of a role.

    Attributes:
        draft: how far the new root is.
        old: id of the key that goes.
        new: id of the key that comes.
        kept: the file of the old private key, if it was moved aside.
    """

    draft: Draft
    old: str
    new: str
    kept: Path | None


def make(ring: KeyRing, role: str) -> SSlibKey:
    """Make this machine's key of a role, or find it; its public half, to be sent to who signs the root."""
    _check_role(role)
    found: SSlibKey = ring.generate(role).public_key
    return found


def add(authority: Authority, role: str, key: str, threshold: int | None = None) -> Draft:
    """List one more key for a role.

    Args:
        authority: the registry.
        role: one of `ROLES`.
        key: URI of a private key that this machine can open, or a file with a public key in PEM.
        threshold: how many keys of the role must sign from now on; None leaves that as it is.

    Raises:
        RegistryError: the key cannot be read, was revoked, or the root cannot be signed here.
    """
    _check_role(role)
    public: SSlibKey
    if signers.is_uri(key):
        public = authority.keys.open(key, role).public_key
    else:
        try:
            public = signers.public_key(Path(key).read_bytes())
        except OSError as error:
            raise UsageError(f"{key} cannot be read: {error.strerror}", "give a PEM file or a URI") from error
    plan = _plan(authority).adding(role, public.keyid, public.to_dict())
    if threshold is not None:
        plan = plan.requiring(role, threshold)
    return Rotation(authority).enact(plan)


def require(authority: Authority, role: str, threshold: int) -> Draft:
    """Change how many keys of a role must sign."""
    _check_role(role)
    return Rotation(authority).enact(_plan(authority).requiring(role, threshold))


def remove(authority: Authority, keyid: str, *, planned: bool) -> Draft:
    """Take a key out of every role.

    Args:
        authority: the registry.
        keyid: its id, or at least 8 digits of it.
        planned: it was never in wrong hands: what it signed about versions from before stays good. Otherwise
            nothing that it ever signed counts any more, and it can never come back.
    """
    state = authority.signing_state()
    plan = Plan.of(state.signed("root"))
    full = plan.find(keyid)
    if not planned:
        return Rotation(authority).enact(plan.revoking(full))
    for role, held in plan.holders.items():
        if full in held.keys:
            plan = plan.retiring(role, full, state.version("root") + 1)
    return Rotation(authority).enact(plan)


def rotate(authority: Authority, role: str, to: str | None = None) -> Rotated:
    """Replace this machine's key of a role by a new one; the same again completes what was interrupted.

    Args:
        authority: the registry.
        role: one of `ROLES`.
        to: URI of the new key; None makes a new key file, and keeps the old one aside.

    Raises:
        RegistryError: the old or the new key cannot be opened or is not listed.
    """
    _check_role(role)
    ring = authority.keys
    state = authority.signing_state()
    plan = Plan.of(state.signed("root"))
    place = ring.file(role)
    coming = ring.elsewhere(role, to or f"file:{place.with_name(place.stem + '.next.pem')}")
    # An interruption after the old key was moved aside leaves only the new one.
    moved = not ring.holds(role) and coming.holds(role)
    new = coming.generate(role).public_key
    old = new if moved else ring.signer(role).public_key
    listed = plan.holders[role].keys
    if new.keyid not in listed and old.keyid not in listed:
        raise BadSignature(
            f"the {role} key on this machine is not one that the registry lists, so it cannot be replaced",
            f"add a key with `registry trust add {role}`",
        )
    if new.keyid not in listed:
        plan = plan.adding(role, new.keyid, new.to_dict())
    if old.keyid in listed and old.keyid != new.keyid:
        plan = plan.retiring(role, old.keyid, state.version("root") + 1)
    draft = Rotation(authority, coming).enact(plan)
    kept = None
    if not draft.missing:
        if place.exists() and old.keyid != new.keyid:
            kept = place.with_name(f"{place.stem}.{old.keyid[:8]}.old.pem")
            os.replace(place, kept)
        if to is None:
            os.replace(signers.file_of(coming.uri(role)), place)
    return Rotated(draft=draft, old=old.keyid, new=new.keyid, kept=kept)


def pin(client: TrustClient, root: bytes, sha256: str | None = None) -> str:
    """Make a root the start of all trust on this machine.

    Args:
        client: this machine's trust.
        root: what ``registry trust export`` printed where the registry was made.
        sha256: the fingerprint that its owner told on another way.

    Returns:
        The fingerprint.

    Raises:
        BadSignature: it is not a root that its own keys have signed, or another one than was told.
        UsageError: another root is pinned already.
    """
    from tuf.api.exceptions import UnsignedMetadataError
    from tuf.api.metadata import Metadata, Root
    from tuf.api.serialization import DeserializationError

    mend = "get the root from its owner again, with `registry trust export`"
    root = root.rstrip()
    found = hashlib.sha256(root).hexdigest()
    if sha256 is not None and found != sha256.strip().lower().removeprefix("sha256:"):
        raise BadSignature(f"the root has the fingerprint sha256:{found}, which is not the one told", mend)
    try:
        metadata = Metadata[Root].from_bytes(root)
        if not isinstance(metadata.signed, Root):
            raise BadSignature("this is no root", mend)
        metadata.signed.verify_delegate("root", metadata.signed_bytes, metadata.signatures)
        Plan.of(copy.deepcopy(metadata.signed.to_dict())).checked()
    except (DeserializationError, UnsignedMetadataError, KeyError, TypeError, UsageError) as error:
        raise BadSignature(f"this is not a signed root of a registry: {shown(error)}", mend) from error
    client.pin(root)
    return f"sha256:{found}"


def export(state: TrustState) -> bytes:
    """The newest root, byte for byte as it was signed, for `pin` on another machine."""
    return json.dumps(state.document("root"), separators=(",", ":"), sort_keys=True).encode()


def overview(authority: Authority) -> Mapping[str, Any]:
    """What ``registry trust show`` tells, as JSON values."""
    state = authority.state()
    plan = Plan.of(state.signed("root"))
    here = {role: _held(authority.keys, role) for role in ROLES}
    try:
        draft = Rotation(authority).look()
        waiting: dict[str, Any] | None = (
            None if draft is None else {"version": draft.version, "missing": draft.missing}
        )
    except BadSignature as error:
        waiting = {"problem": error.message}
    pinned = authority.client.pinned.read_bytes()
    return {
        "root": {
            "version": state.version("root"),
            "pinned_version": json.loads(pinned)["signed"]["version"],
            "pinned_sha256": f"sha256:{hashlib.sha256(pinned).hexdigest()}",
            "draft": waiting,
        },
        "roles": {
            role: {
                "threshold": held.threshold,
                "keys": [
                    {"keyid": keyid, "type": key["keytype"], "here": keyid == here[role]}
                    for keyid, key in sorted(held.keys.items())
                ],
                "retired": sorted(held.retired),
            }
            for role, held in plan.holders.items()
        },
        "versions_signed_by": sorted(state.signed("targets")["delegations"]["keys"]),
        "expires": {
            role: state.expires(role).isoformat()
            for role in ("root", "targets", NAMES, *state.bins(), "snapshot", "timestamp")
        },
    }


def _held(ring: KeyRing, role: str) -> str | None:
    """The id of this machine's key of a role, if it has one that opens without asking anybody."""
    if not ring.holds(role) or not ring.uri(role).startswith(("file:", "env:")):
        return None
    try:
        return str(ring.signer(role).public_key.keyid)
    except RegistryError:
        return None


def _plan(authority: Authority) -> Plan:
    return Plan.of(authority.signing_state().signed("root"))


def _check_role(role: str) -> None:
    if role not in ROLES:
        raise UsageError(f"there is no role {shown(role)!r}", f"roles are: {', '.join(ROLES)}")
