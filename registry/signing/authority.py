"""Signing trust metadata: a new registry, a new version, a moved alias, a revocation, a renewed timestamp.

Every change is built on the newest state that this machine verified, and is written in an order that an
interruption cannot spoil: what nobody points to yet first, the timestamp last. Readers therefore see the
old state or the new one.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, cast

from registry.digest import Digest
from registry.errors import BadSignature, NotFound, RegistryError, StaleTrust, UsageError
from registry.signing.refresh import TrustClient
from registry.signing.signers import ONLINE, ROOT, STATEMENT_ROLES, KeyRing
from registry.signing.trust import (
    NAMES_RENEWAL,
    PREFIX,
    REVOKED_FIELD,
    ROLES_FIELD,
    VERSIONS,
    VERSIONS_PATTERN,
    ExpiredTrust,
    TrustState,
)
from registry.storage.base import ObjectStore

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner
    from tuf.api.metadata import Root, Signed, Targets

_logger = logging.getLogger(__name__)

LIFETIMES: Mapping[str, timedelta] = {
    "root": timedelta(days=365),
    "targets": timedelta(days=90),
    VERSIONS: timedelta(days=90),
    "snapshot": timedelta(days=7),
    "timestamp": timedelta(days=1),
}
"""How long metadata of each kind is believed after it was signed."""


class Authority:
    """Changes the trust metadata of a store with the private keys of this machine."""

    def __init__(self, store: ObjectStore, keys: KeyRing, client: TrustClient) -> None:
        self._store = store
        self._keys = keys
        self._client = client

    def initialise(self) -> bool:
        """Makes keys, root and empty metadata, and pins the root on this machine.

        Returns:
            False if this machine already has a registry; nothing was changed then.

        Raises:
            UsageError: the store already belongs to a registry whose root is not pinned here.
        """
        with self._exclusive():
            started = any(True for _ in self._store.keys(PREFIX + "timestamp.json"))
            if self._client.pinned.exists() and (started or self._in_use()):
                return False
            if started or self._in_use():
                raise UsageError(
                    f"the store {self._store.uri} belongs to a registry that this machine does not trust",
                    mend="choose another store, or set ADAPTER_FOUNDRY_HOME to that registry's folder",
                )
            # Leftovers of an interrupted start: nobody can have believed them without a timestamp.
            for key in list(self._store.keys(PREFIX)):
                self._store.delete(key)
            self._client.pinned.unlink(missing_ok=True)
            self._write_first()
        self._client.refresh()
        return True

    def state(self) -> TrustState:
        """The newest verified state; renews timestamp and snapshot if the online key is on this machine.

        Raises:
            RegistryError: see `TrustClient.refresh`.
        """
        try:
            state = self._client.refresh()
        except ExpiredTrust as expired:
            if not self._keys.holds(ONLINE):
                raise
            try:
                with self._exclusive():
                    tag = self._tag()
                    self._publish(self._client.last_trusted(), tag)
            except UsageError as error:
                raise ExpiredTrust(expired.message, f"it was to be renewed, but {error}") from error
            return self._client.refresh()
        if state.renewal_due(datetime.now(UTC)) and self._keys.holds(ONLINE):
            try:
                with self._exclusive():
                    tag = self._tag()
                    self._publish(self._client.refresh(), tag)
            except RegistryError as error:
                # What was verified is still valid; only its renewal has to wait.
                _logger.warning("the trust metadata expires soon and could not be renewed: %s", error.message)
                return state
            return self._client.refresh()
        return state

    def signing_state(self) -> TrustState:
        """Like `state`, but metadata whose time is over counts too: it is about to be signed anew.

        Raises:
            RegistryError: see `TrustClient.refresh` and `TrustClient.last_trusted`.
        """
        try:
            return self.state()
        except ExpiredTrust:
            return self._client.last_trusted()

    def add_version(
        self, path: str, digest: Digest, length: int, custom: Mapping[str, Any] | None = None
    ) -> TrustState:
        """Signs that ``name:version`` is a manifest, with the publisher key.

        Raises:
            RegistryError: the version exists with another manifest.
        """

        def change(state: TrustState) -> dict[str, Signed]:
            existing = state.versions().get(path)
            if existing is not None and existing.digest != digest:
                raise RegistryError(
                    f"{path} exists already with other content", mend="push again: it gets a new number"
                )
            versions = state.version_targets
            versions.targets[path] = _target(path, digest, length, custom)
            return {VERSIONS: versions}

        return self._change(change)

    def set_alias(self, path: str, digest: Digest, length: int, custom: Mapping[str, Any]) -> TrustState:
        """Signs that ``name@alias`` is a manifest, with the approver key."""

        def change(state: TrustState) -> dict[str, Signed]:
            targets = state.targets
            targets.targets[path] = _target(path, digest, length, custom)
            return {"targets": targets}

        return self._change(change)

    def revoke(self, digest: Digest, reason: str) -> TrustState:
        """Signs that a manifest or a file must not be loaded any more, with the approver key."""

        def change(state: TrustState) -> dict[str, Signed]:
            targets = state.targets
            reasons = dict(targets.unrecognized_fields.get(REVOKED_FIELD, {}))
            targets.unrecognized_fields[REVOKED_FIELD] = reasons | {str(digest): reason}
            return {"targets": targets}

        return self._change(change)

    def _change(self, change: Callable[[TrustState], dict[str, Signed]]) -> TrustState:
        with self._exclusive():
            tag = self._tag()
            try:
                state = self._client.refresh()
            except ExpiredTrust:
                state = self._client.last_trusted()
            self._publish(state, tag, self._aging(state) | change(state))
        return self._client.refresh()

    def _aging(self, state: TrustState) -> dict[str, Signed]:
        """Signed names that expire soon and whose key is here: any publishing renews them."""
        due = datetime.now(UTC) + NAMES_RENEWAL
        aging: dict[str, Signed] = {}
        if state.targets.expires < due and self._keys.holds("approver"):
            aging["targets"] = state.targets
        if state.version_targets.expires < due and self._keys.holds("publisher"):
            aging[VERSIONS] = state.version_targets
        return aging

    def _publish(
        self, state: TrustState, tag: str | None, changed: Mapping[str, Signed] | None = None
    ) -> None:
        """Signs and writes changed names, then snapshot, then timestamp, and removes what is superseded.

        Raises:
            Conflict: the timestamp is not the one with this tag any more; what was written is named by nobody.
        """
        from tuf.api.metadata import MetaFile

        snapshot, timestamp = state.snapshot, state.timestamp
        for role, signed in (changed or {}).items():
            key_role = "publisher" if role == VERSIONS else "approver"
            data = self._write(role, signed, self._trusted_signer(state, role, key_role))
            snapshot.meta[f"{role}.json"] = MetaFile.from_data(signed.version, data, ["sha256"])
        online = self._trusted_signer(state, "timestamp", ONLINE)
        data = self._write("snapshot", snapshot, online)
        timestamp.snapshot_meta = MetaFile.from_data(snapshot.version, data, ["sha256"])
        timestamp.version += 1
        timestamp.expires = _expiry("timestamp")
        self._store.replace(PREFIX + "timestamp.json", _signed_bytes(timestamp, online), tag)
        self._prune(snapshot.version, {role: state_of.version for role, state_of in _parts(state).items()})

    def _write(self, role: str, signed: Signed, signer: CryptoSigner) -> bytes:
        """Gives metadata a new version and a new life, signs it and writes it under a new name."""
        taken = [_number(key) for key in self._store.keys(PREFIX) if key.endswith(f".{role}.json")]
        # An interrupted attempt may have left a version that no snapshot ever named; numbers may be skipped.
        signed.version = max([signed.version, *taken]) + 1
        signed.expires = _expiry(role)
        data = _signed_bytes(signed, signer)
        if not self._store.put(f"{PREFIX}{signed.version}.{role}.json", data):
            raise StaleTrust(
                "somebody else is changing the trust metadata of this store", mend="try again in a moment"
            )
        return data

    def _prune(self, snapshot: int, targets: Mapping[str, int]) -> None:
        current = {f"{PREFIX}{version}.{role}.json" for role, version in targets.items()}
        current |= {f"{PREFIX}{snapshot}.snapshot.json", PREFIX + "timestamp.json"}
        for key in list(self._store.keys(PREFIX)):
            if key not in current and not key.endswith(".root.json"):
                self._store.delete(key)

    def _trusted_signer(self, state: TrustState, tuf_role: str, key_role: str) -> CryptoSigner:
        """Opens a key and makes sure that readers will accept it, before anything is written."""
        signer = self._keys.signer(key_role)
        delegator: Root | Targets = state.targets if tuf_role == VERSIONS else state.root
        if signer.public_key.keyid not in delegator.get_delegated_role(tuf_role).keyids:
            raise BadSignature(
                f"the {key_role} key on this machine is not one that the registry trusts for {tuf_role}",
                mend=f"use the {key_role} key of this registry; a new key needs a new root",
            )
        return signer

    def _write_first(self) -> None:
        from tuf.api.metadata import DelegatedRole, Delegations, MetaFile, Root, Snapshot, Targets, Timestamp

        signers = {role: self._keys.generate(role) for role in (ROOT, *STATEMENT_ROLES, ONLINE)}
        publisher = signers["publisher"].public_key
        delegation = DelegatedRole(VERSIONS, [publisher.keyid], 1, terminating=True, paths=[VERSIONS_PATTERN])
        versions = Targets(expires=_expiry(VERSIONS))
        targets = Targets(
            expires=_expiry("targets"),
            delegations=Delegations({publisher.keyid: publisher}, {VERSIONS: delegation}),
            unrecognized_fields={REVOKED_FIELD: {}},
        )
        root = Root(expires=_expiry("root"), unrecognized_fields={ROLES_FIELD: _statement_roles(signers)})
        for tuf_role, key_role in {
            "root": ROOT,
            "targets": "approver",
            "snapshot": ONLINE,
            "timestamp": ONLINE,
        }.items():
            root.add_key(signers[key_role].public_key, tuf_role)

        root_bytes = _signed_bytes(root, signers[ROOT])
        parts = {
            "targets": _signed_bytes(targets, signers["approver"]),
            VERSIONS: _signed_bytes(versions, signers["publisher"]),
        }
        snapshot = Snapshot(
            expires=_expiry("snapshot"),
            meta={f"{role}.json": MetaFile.from_data(1, data, ["sha256"]) for role, data in parts.items()},
        )
        parts["snapshot"] = _signed_bytes(snapshot, signers[ONLINE])
        timestamp = Timestamp(
            expires=_expiry("timestamp"), snapshot_meta=MetaFile.from_data(1, parts["snapshot"], ["sha256"])
        )
        for role, data in {"root": root_bytes, **parts}.items():
            self._store.put(f"{PREFIX}1.{role}.json", data)
        self._client.pin(root_bytes)
        self._store.replace(PREFIX + "timestamp.json", _signed_bytes(timestamp, signers[ONLINE]), None)

    def _tag(self) -> str | None:
        """Which timestamp is in the store before anything is read: what is published replaces only that."""
        try:
            return self._store.stat(PREFIX + "timestamp.json").tag
        except NotFound:
            return None

    def _in_use(self) -> bool:
        return any(True for _ in self._store.keys("manifests/"))

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Lets one process of this machine sign at a time; between machines, existing names decide."""
        folder = self._keys.folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (folder / ".lock").open("a") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield


def _parts(state: TrustState) -> dict[str, Targets]:
    return {"targets": state.targets, VERSIONS: state.version_targets}


def _statement_roles(signers: Mapping[str, CryptoSigner]) -> dict[str, Any]:
    return {
        role: {"threshold": 1, "keys": {signers[role].public_key.keyid: signers[role].public_key.to_dict()}}
        for role in STATEMENT_ROLES
    }


def _target(path: str, digest: Digest, length: int, custom: Mapping[str, Any] | None) -> Any:
    from tuf.api.metadata import TargetFile

    fields = {"custom": dict(custom)} if custom else None
    return TargetFile(length, {"sha256": digest.hex}, path, fields)


def _expiry(role: str) -> datetime:
    return datetime.now(UTC).replace(microsecond=0) + LIFETIMES[role]


def _signed_bytes(signed: Signed, signer: CryptoSigner) -> bytes:
    from tuf.api.metadata import Metadata

    # TUF types metadata by its kind; which one this is does not matter for signing.
    metadata: Metadata[Any] = Metadata(cast("Any", signed))
    metadata.sign(signer)
    return metadata.to_bytes()


def _number(key: str) -> int:
    text = key.removeprefix(PREFIX).partition(".")[0]
    return int(text) if text.isdigit() else 0
