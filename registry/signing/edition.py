"""The next edition of the trust metadata: changed in tuf's own objects, signed, and written in order.

It is written in an order that an interruption cannot spoil: what nobody points to yet first, the timestamp
last, and that only if it is still the one that was read. Readers therefore see the old state or the new one,
and of two machines that publish at once one wins.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, cast

from registry.errors import BadSignature, Conflict, NotFound, RegistryError
from registry.signing.signers import KeyRing
from registry.signing.trust import (
    EXPIRES_FIELD,
    LEDGER_FIELD,
    NAMES,
    PREFIX,
    Document,
    TrustState,
    key_role,
)
from registry.storage.base import MAX_DOCUMENT_BYTES, ObjectStore

if TYPE_CHECKING:
    from securesystemslib.signer import Signer
    from tuf.api.metadata import Metadata, Signed, Targets

TIMESTAMP = PREFIX + "timestamp.json"

LIFETIMES: Final[dict[str, timedelta]] = {
    "root": timedelta(days=365),
    "targets": timedelta(days=90),
    "versions": timedelta(days=90),
    "snapshot": timedelta(days=7),
    "timestamp": timedelta(days=1),
}
"""How long metadata of each kind is believed after it was signed; "versions" are the names and all bins."""

_MAX_DIGITS: Final = 9

SignersOf = Callable[[str], Sequence["Signer"]]
"""Who signs metadata of a TUF role."""


class Edition:
    """What shall become the newest state: the parts that were touched, as tuf objects.

    Args:
        state: the verified state that is changed.

    Attributes:
        lifetime: how long snapshot and timestamp shall be believed; None is as long as usual.
        ahead: by how much more than one every number grows.
    """

    def __init__(self, state: TrustState) -> None:
        self.state = state
        self.lifetime: timedelta | None = None
        self.ahead = 0
        self.parts: dict[str, Targets] = {}

    def part(self, role: str) -> Targets:
        """Targets, names or a bin, to be changed and signed anew; an empty one if there is none yet."""
        from tuf.api.metadata import Targets

        if role not in self.parts:
            try:
                self.parts[role] = Targets.from_dict(copy.deepcopy(dict(self.state.signed(role))))
            except NotFound:
                self.parts[role] = Targets(expires=expiry(role))
                self.parts[role].version = 0
        return self.parts[role]

    def renew_aging(self, keys: KeyRing) -> None:
        """Adds signed names that expire soon and whose key is here: any publishing renews them."""
        for role, _ in self.state.expiring(datetime.now(UTC)):
            if role != "root" and keys.holds(key_role(role)):
                self.part(role)


def publish(
    store: ObjectStore,
    edition: Edition,
    tag: str | None,
    signers: SignersOf,
    anchor: Mapping[str, Any] | None = None,
) -> None:
    """Sign and write the changed parts, then snapshot, then timestamp, and remove what is superseded.

    Args:
        store: where to.
        edition: what has changed; nothing for a mere renewal.
        tag: of the timestamp that the edition is built on.
        signers: who signs.
        anchor: head of the audit log; None keeps the one that is signed.

    Raises:
        Conflict: somebody else has published meanwhile; what was written is named by nobody.
        RegistryError: a key is missing or not trusted, or metadata would be larger than readers take; what
            was written is named by nobody.
    """
    from tuf.api.metadata import MetaFile, Snapshot, Timestamp

    state = edition.state
    snapshot = Snapshot.from_dict(copy.deepcopy(dict(state.signed("snapshot"))))
    timestamp = Timestamp.from_dict(copy.deepcopy(dict(state.signed("timestamp"))))
    signing = {role: signers(role) for role in (*edition.parts, "snapshot", "timestamp")}
    taken = _taken(store)
    for signed in (*edition.parts.values(), snapshot, timestamp):
        signed.version += edition.ahead
    for role, signed in edition.parts.items():
        data = _write(store, role, signed, signing[role], taken)
        snapshot.meta[f"{role}.json"] = _meta(role, signed, data)
    if anchor is not None:
        snapshot.unrecognized_fields[LEDGER_FIELD] = dict(anchor)
    data = _write(store, "snapshot", snapshot, signing["snapshot"], taken, edition.lifetime)
    timestamp.snapshot_meta = MetaFile.from_data(snapshot.version, data, ["sha256"])
    timestamp.version += 1
    timestamp.expires = expiry("timestamp", edition.lifetime)
    store.replace(TIMESTAMP, signed_bytes(timestamp, signing["timestamp"]), tag)
    _prune(store, state)


def publish_first(
    store: ObjectStore, root: bytes, parts: Mapping[str, bytes], signer: Signer, pin: Callable[[], None]
) -> None:
    """Write the first root, targets and names, pin the root, and then make them visible."""
    from tuf.api.metadata import MetaFile, Snapshot, Timestamp

    meta = {f"{role}.json": MetaFile.from_data(1, data, ["sha256"]) for role, data in parts.items()}
    snapshot = signed_bytes(Snapshot(expires=expiry("snapshot"), meta=meta), [signer])
    timestamp = Timestamp(
        expires=expiry("timestamp"), snapshot_meta=MetaFile.from_data(1, snapshot, ["sha256"])
    )
    for role, data in {"root": root, **parts, "snapshot": snapshot}.items():
        store.put(f"{PREFIX}1.{role}.json", data)
    pin()
    store.replace(TIMESTAMP, signed_bytes(timestamp, [signer]), None)


def trusted_signer(state: TrustState, keys: KeyRing, role: str) -> Signer:
    """Open the key of this machine for a TUF role and make sure that readers will accept it.

    Raises:
        BadSignature: the registry lists another key for that.
        RegistryError: the key cannot be opened.
    """
    whose = key_role(role)
    signer = keys.signer(whose)
    if signer.public_key.keyid not in listed_keyids(state, role):
        raise BadSignature(
            f"the {whose} key on this machine is not one that the registry trusts for {role}",
            mend=f"use a {whose} key of this registry; a new key is added with `registry trust add {whose}`",
        )
    return signer


def listed_keyids(state: TrustState, role: str) -> Sequence[str]:
    """The keys that readers accept for metadata of a TUF role."""
    roles = state.signed("root")["roles"]
    if role in roles:
        found: Sequence[str] = roles[role]["keyids"]
        return found
    delegated = state.signed("targets")["delegations"]["roles"]
    return next((entry["keyids"] for entry in delegated if entry["name"] == role), ())


def tag_of(store: ObjectStore) -> str | None:
    """Which timestamp is in the store. Asked before anything is read: only that one will be replaced."""
    try:
        return store.stat(TIMESTAMP).tag
    except NotFound:
        return None


def expiry(role: str, lifetime: timedelta | None = None) -> datetime:
    """When metadata of a role that is signed now stops being believed."""
    lifetime = lifetime or LIFETIMES.get(role, LIFETIMES["versions"])
    return datetime.now(UTC).replace(microsecond=0) + lifetime


def signed_bytes(signed: Signed, signers: Sequence[Signer]) -> bytes:
    """Metadata with the signatures of all signers, as it is stored."""
    from tuf.api.metadata import Metadata

    # TUF types metadata by its kind; which one this is does not matter for signing.
    metadata: Metadata[Any] = Metadata(cast("Any", signed))
    for signer in signers:
        metadata.sign(signer, append=True)
    return metadata.to_bytes()


def metadata_of(document: Document) -> Metadata[Any]:
    """A verified document as tuf's object."""
    from tuf.api.metadata import Metadata

    return Metadata.from_dict(copy.deepcopy(dict(document)))


def _write(
    store: ObjectStore,
    role: str,
    signed: Signed,
    signers: Sequence[Signer],
    taken: Mapping[str, int],
    lifetime: timedelta | None = None,
) -> bytes:
    """Give metadata a new version and a new life, sign it and write it under a new name."""
    # An interrupted attempt may have left a version that no snapshot ever named; numbers may be skipped.
    signed.version = max(signed.version, taken.get(role, 0)) + 1
    signed.expires = expiry(role, lifetime)
    data = signed_bytes(signed, signers)
    if len(data) > MAX_DOCUMENT_BYTES:  # nobody could read it any more, not even to make it smaller again
        raise RegistryError(
            f"the trust metadata {role} would have {len(data)} bytes; readers take {MAX_DOCUMENT_BYTES}",
            mend="take away aliases that nobody uses (`registry demote`), or begin another registry; "
            "docs/operations/capacity.md tells how much fits",
        )
    if not store.put(f"{PREFIX}{signed.version}.{role}.json", data):
        raise Conflict("somebody else is publishing to this store", "run the same command again")
    return data


def _meta(role: str, signed: Targets, data: bytes) -> Any:
    from tuf.api.metadata import MetaFile

    meta = MetaFile.from_data(signed.version, data, ["sha256"])
    if role not in ("targets", NAMES):
        meta.unrecognized_fields[EXPIRES_FIELD] = signed.expires.isoformat()
    return meta


def _taken(store: ObjectStore) -> dict[str, int]:
    """The highest number of each role's metadata in the store, whoever wrote it."""
    taken: dict[str, int] = {}
    for key in store.keys(PREFIX):
        number, role = _parsed(key)
        taken[role] = max(taken.get(role, 0), number)
    return taken


def _prune(store: ObjectStore, before: TrustState) -> None:
    """Remove what was superseded before the edition that was just replaced.

    That edition itself stays, for readers who are in the middle of it, and so does everything newer: it may
    belong to somebody who is publishing at this moment.
    """
    meta = before.signed("snapshot")["meta"]
    needed = {name.removesuffix(".json"): entry["version"] for name, entry in meta.items()}
    needed["snapshot"] = before.version("snapshot")
    for key in list(store.keys(PREFIX)):
        number, role = _parsed(key)
        if number < needed.get(role, 0):
            store.delete(key)


def _parsed(key: str) -> tuple[int, str]:
    """Number and role of ``trust/3.targets.json``; 0 for anything else, drafts and the timestamp included."""
    number, _, name = key.removeprefix(PREFIX).partition(".")
    # The store is hostile: a number of a thousand digits would be in every name that is signed from then on.
    genuine = number.isascii() and number.isdecimal() and len(number) <= _MAX_DIGITS
    return (int(number), name.removesuffix(".json")) if genuine else (0, "")
