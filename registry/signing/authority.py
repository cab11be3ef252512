"""Signing trust metadata: a new registry, a new version, a moved alias, a revocation, a renewed timestamp.

Every change is built on the newest state that this machine verified; if another machine publishes at the
same moment, it is built anew on what that one has written.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from registry.digest import Digest
from registry.errors import Conflict, RegistryError, UsageError
from registry.signing import edition as editions
from registry.signing.edition import Edition
from registry.signing.refresh import TrustClient
from registry.signing.signers import ONLINE, ROOT, STATEMENT_ROLES, KeyRing
from registry.signing.trust import (
    NAMES,
    NAMES_FIELD,
    NAMES_PATTERN,
    PREFIX,
    REVOKED_FIELD,
    REVOKED_KEYS_FIELD,
    ROLES_FIELD,
    ROOT_FIELD,
    YANKED_FIELD,
    ExpiredTrust,
    TrustState,
    all_bins,
    bin_pattern,
    bin_role,
    key_role,
    version_path,
)
from registry.storage.base import ObjectStore

if TYPE_CHECKING:
    from securesystemslib.signer import Key, Signer

_logger = logging.getLogger(__name__)

_ATTEMPTS = 30
_PAUSE_S = 0.5


class Authority:
    """Changes the trust metadata of a store with the private keys of this machine.

    Args:
        store: holds the metadata.
        keys: the private keys of this machine.
        client: what this machine believes.
        anchor: is given the head of the audit log that is signed now, and returns the one that a publication
            shall carry in its signed snapshot (None keeps it).
    """

    def __init__(
        self,
        store: ObjectStore,
        keys: KeyRing,
        client: TrustClient,
        anchor: Callable[[Mapping[str, Any] | None], Mapping[str, Any] | None] = lambda signed: None,
    ) -> None:
        self.store = store
        self.keys = keys
        self.client = client
        self._anchor = anchor

    def initialise(self) -> bool:
        """Makes keys, root and empty metadata, and pins the root on this machine.

        Returns:
            False if this machine already has a registry; nothing was changed then.

        Raises:
            UsageError: the store already belongs to a registry whose root is not pinned here.
        """
        with self.exclusive():
            started = editions.tag_of(self.store) is not None
            if self.client.pinned.exists() and (started or self._in_use()):
                return False
            if started or self._in_use():
                raise UsageError(
                    f"the store {self.store.uri} belongs to a registry that this machine does not trust",
                    mend="choose another store, set ADAPTER_FOUNDRY_HOME to that registry's folder, or pin "
                    "its root with `registry trust pin`",
                )
            # Leftovers of an interrupted start: nobody can have believed them without a timestamp.
            for key in list(self.store.keys(PREFIX)):
                self.store.delete(key)
            self.client.pinned.unlink(missing_ok=True)
            self._write_first()
        self.client.refresh()
        return True

    # -- reading --

    def state(self) -> TrustState:
        """The newest verified state; renews timestamp and snapshot if the online key is on this machine.

        What a person has to renew is logged as a warning while there is time.

        Raises:
            RegistryError: see `TrustClient.current`.
        """
        try:
            state = self.client.current()
        except ExpiredTrust as expired:
            if not self.keys.holds(ONLINE):
                raise
            try:
                self._renew()
            except UsageError as error:
                raise ExpiredTrust(expired.message, f"it was to be renewed, but {error}") from error
            state = self.client.refresh()
        if state.renewal_due(datetime.now(UTC)) and self.keys.holds(ONLINE):
            try:
                self._renew()
                state = self.client.refresh()
            except RegistryError as error:
                # What was verified is still valid; only its renewal has to wait.
                _logger.warning("the trust metadata expires soon and could not be renewed: %s", error.message)
        warn_of_expiry(state)
        return state

    def signing_state(self) -> TrustState:
        """Like `state`, but always asked of the store, and metadata whose time is over counts too.

        Raises:
            RegistryError: see `TrustClient.refresh` and `TrustClient.last_trusted`.
        """
        try:
            return self.client.refresh(signing=True)
        except ExpiredTrust:
            return self.client.last_trusted()

    # -- writing --

    def add_version(
        self, path: str, digest: Digest, length: int, custom: Mapping[str, Any] | None = None
    ) -> TrustState:
        """Signs that ``name:version`` is a manifest, with the publisher key.

        Raises:
            Conflict: the version exists with another manifest.
        """
        name, _, number = path.partition(":")

        def change(edition: Edition) -> None:
            known = edition.state.versions_of(name).get(int(number))
            if known is not None and known.digest != digest:
                raise Conflict(
                    f"{path} exists already with other content", "push again: it gets a new number"
                )
            root = known.root if known is not None else edition.state.version("root")
            entry = _target(version_path(path), digest, length, custom)
            entry.unrecognized_fields[ROOT_FIELD] = root
            edition.part(bin_role(name)).targets[entry.path] = entry
            if name not in edition.state.names():
                names = edition.part(NAMES)
                names.unrecognized_fields[NAMES_FIELD] = sorted({*edition.state.names(), name})

        return self.change(change)

    def set_alias(
        self,
        path: str,
        digest: Digest,
        length: int,
        custom: Mapping[str, Any],
        expected: Digest | None,
        beside: Mapping[str, Digest | None] | None = None,
    ) -> TrustState:
        """Signs that ``name@alias`` is a manifest, with the approver key.

        Args:
            path: the alias.
            digest: the manifest that it shall mean.
            length: bytes of the manifest.
            custom: what else is said about it, such as its "version".
            expected: the manifest that the alias meant when the caller decided; None if there was no alias.
            beside: the same of other aliases on which the decision rests.

        Raises:
            Conflict: somebody has moved the alias, or one of the others, meanwhile.
        """

        def change(edition: Edition) -> None:
            found = edition.state.aliases().get(path)
            if found is not None and found.digest == digest:
                return
            doing = f"promoting version {custom.get('version', digest)}"
            for name, meant in {path: expected, **(beside or {})}.items():
                _expect(edition.state, name, meant, doing)
            edition.part("targets").targets[path] = _target(path, digest, length, custom)

        return self.change(change)

    def remove_alias(self, path: str, expected: Digest) -> TrustState:
        """Signs that an alias means nothing any more, with the approver key.

        Raises:
            Conflict: somebody has moved or removed the alias meanwhile.
        """

        def change(edition: Edition) -> None:
            _expect(edition.state, path, expected, "removing the alias")
            del edition.part("targets").targets[path]

        return self.change(change)

    def revoke(self, digest: Digest, reason: str) -> TrustState:
        """Signs that a manifest or a file must not be loaded any more, with the approver key."""
        return self.change(lambda edition: _note(edition, REVOKED_FIELD, digest, reason))

    def yank(self, digest: Digest, reason: str) -> TrustState:
        """Signs that a manifest is hidden from lists and promotions, with the approver key."""
        return self.change(lambda edition: _note(edition, YANKED_FIELD, digest, reason))

    def unyank(self, digest: Digest) -> TrustState:
        """Signs that a manifest is not yanked any more, with the approver key."""
        return self.change(lambda edition: _note(edition, YANKED_FIELD, digest, None))

    def publish_anchor(self) -> TrustState:
        """Signs the head of the audit log, though no name changes; the next publication does without the key.

        Returns:
            The newest state, changed or not: the online key need not be on this machine.
        """
        if not self.keys.holds(ONLINE):
            return self.client.refresh()
        return self.change(lambda edition: None, always=True)

    def publish_for(self, lifetime: timedelta) -> TrustState:
        """Signs snapshot and timestamp for a longer time, for a site that cannot ask for new ones.

        Whoever holds that edition can show it to readers for so long, without anything that is signed later,
        as long as they have seen nothing newer: so publish an ordinary one behind it.

        Raises:
            NotFound: the online key is not on this machine.
        """

        def change(edition: Edition) -> None:
            edition.lifetime = lifetime

        return self.change(change, always=True)

    def change(
        self,
        change: Callable[[Edition], None],
        *,
        signers: editions.SignersOf | None = None,
        always: bool = False,
    ) -> TrustState:
        """Publishes a change of the newest state; if somebody else publishes meanwhile, of theirs.

        Args:
            change: touches the parts of an edition; called again for every attempt.
            signers: who signs each TUF role; None is the key of this machine that the registry lists.
            always: publish though nothing was touched.

        Raises:
            Conflict: the change does not fit the newest state, or others keep publishing.
        """
        with self.exclusive():
            for attempt in range(_ATTEMPTS):
                tag = editions.tag_of(self.store)
                edition = Edition(self.signing_state())
                change(edition)
                edition.renew_aging(self.keys)
                if not edition.parts and not always:
                    return edition.state
                try:
                    self._publish(edition, tag, signers)
                    break
                except Conflict:
                    if attempt == _ATTEMPTS - 1:
                        raise
                    time.sleep(random.SystemRandom().uniform(0, _PAUSE_S))
            return self.client.refresh()

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Lets one process of this machine sign at a time; between machines, the timestamp's tag decides."""
        folder = self.keys.folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (folder / ".lock").open("a") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield

    def _renew(self) -> None:
        """Signs snapshot and timestamp anew, unless somebody else did while this one came to it."""
        with self.exclusive():
            tag = editions.tag_of(self.store)
            state = self.signing_state()
            if state.renewal_due(datetime.now(UTC)):
                # Conflict: another machine has just renewed it.
                with contextlib.suppress(Conflict):
                    self._publish(Edition(state), tag, None)

    def _publish(self, edition: Edition, tag: str | None, signers: editions.SignersOf | None) -> None:
        def own(role: str) -> Sequence[Signer]:
            return [editions.trusted_signer(edition.state, self.keys, role)]

        editions.publish(
            self.store, edition, tag, signers or own, self._anchor(edition.state.ledger_anchor())
        )

    def _write_first(self) -> None:
        from tuf.api.metadata import Root, Targets

        signers = {role: self.keys.generate(role) for role in (ROOT, *STATEMENT_ROLES, ONLINE)}
        targets = Targets(
            expires=editions.expiry("targets"),
            delegations=delegations({"publisher": signers["publisher"].public_key}.values()),
            unrecognized_fields={REVOKED_FIELD: {}, YANKED_FIELD: {}},
        )
        names = Targets(expires=editions.expiry(NAMES), unrecognized_fields={NAMES_FIELD: []})
        root = Root(
            expires=editions.expiry("root"),
            unrecognized_fields={ROLES_FIELD: _statement_roles(signers), REVOKED_KEYS_FIELD: []},
        )
        for role in ("root", "targets", "snapshot", "timestamp"):
            root.add_key(signers[key_role(role)].public_key, role)
        root_bytes = editions.signed_bytes(root, [signers[ROOT]])
        parts = {
            "targets": editions.signed_bytes(targets, [signers["approver"]]),
            NAMES: editions.signed_bytes(names, [signers["publisher"]]),
        }
        editions.publish_first(
            self.store, root_bytes, parts, signers[ONLINE], lambda: self.client.pin(root_bytes)
        )

    def _in_use(self) -> bool:
        return any(True for _ in self.store.keys("manifests/"))


def delegations(publishers: Any) -> Any:
    """TUF's delegation of names and all bins to publisher keys, any one of which may sign."""
    from tuf.api.metadata import DelegatedRole, Delegations

    keys: dict[str, Key] = {key.keyid: key for key in publishers}
    patterns = {NAMES: NAMES_PATTERN} | {role: bin_pattern(role) for role in all_bins()}
    roles = {
        role: DelegatedRole(role, sorted(keys), 1, terminating=True, paths=[pattern])
        for role, pattern in patterns.items()
    }
    return Delegations(keys, roles)


def warn_of_expiry(state: TrustState) -> None:
    """Logs what people have to sign anew soon."""
    ends = [(expires, role) for role, expires in state.expiring(datetime.now(UTC))]
    if ends:
        expires, role = min(ends)
        _logger.warning(
            "the trust metadata %s expires on %s: run `registry trust renew` where the %s key is kept",
            ", ".join(sorted({_kind(role) for _, role in ends})),
            expires.date().isoformat(),
            key_role(role),
        )


def _kind(role: str) -> str:
    return "versions" if role.startswith("versions-") else role


def _expect(state: TrustState, path: str, expected: Digest | None, doing: str) -> None:
    found = state.aliases().get(path)
    if (None if found is None else found.digest) == expected:
        return
    if found is None:
        happened = f"{path} was removed"
    else:
        happened = f"{path} was moved to version {found.custom.get('version', found.digest)}"
    raise Conflict(f"{happened} while you were {doing}", "look at it with `registry show`, and decide again")


def _note(edition: Edition, kind: str, digest: Digest, reason: str | None) -> None:
    fields = edition.part("targets").unrecognized_fields
    reasons = {known: why for known, why in fields.get(kind, {}).items() if known != digest}
    fields[kind] = reasons if reason is None else reasons | {str(digest): reason}


def _statement_roles(signers: Mapping[str, Signer]) -> dict[str, Any]:
    return {
        role: {"threshold": 1, "keys": {signers[role].public_key.keyid: signers[role].public_key.to_dict()}}
        for role in STATEMENT_ROLES
    }


def _target(path: str, digest: Digest, length: int, custom: Mapping[str, Any] | None) -> Any:
    from tuf.api.metadata import TargetFile

    return TargetFile(length, {"sha256": digest.hex}, path, {"custom": dict(custom)} if custom else None)
