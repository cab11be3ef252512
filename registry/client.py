"""The registry: one object that opens everything a registry consists of, and its verbs.

A shell around pure parts. What comes out of the store, the cache or the index is hostile until
``admission`` has judged it against trust metadata that this machine has verified. The verbs are written in
``publishing``, ``attesting``, ``promotion`` and ``pulling``; the parts are public, for commands that need
only one of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.reference import Reference
from registry.settings import Layout, layout

if TYPE_CHECKING:
    from registry.admission import Policy, VerifiedAdapter
    from registry.attestation import Kind
    from registry.gates import GateReport
    from registry.policy import RegistryPolicy
    from registry.rescanning import Rescan
    from registry.results import Attested, Listed, Promotion, Pulled, PushResult, Shown
    from registry.signing.authority import Authority
    from registry.signing.signers import KeyRing
    from registry.storage.base import ObjectStore
    from registry.storage.catalog import MlflowCatalog
    from registry.storage.ledger import Ledger
    from registry.transfer import Progress


class Registry:
    """The registry of one data folder; its parts are opened when they are first used.

    Args:
        place: where everything is.
    """

    def __init__(self, place: Layout) -> None:
        self.place = place
        self._recorded = False
        self._log_restarted = False

    @classmethod
    def open(cls, home: Path | None = None) -> Registry:
        """The registry of a data folder (default: `home()`), which need not be initialised yet.

        Raises:
            UsageError: a setting is wrong.
        """
        return cls(layout(home))

    @classmethod
    def init(cls, home: Path | None = None) -> Registry:
        """Opens the registry of a data folder, and makes it if there is none: keys, trust root, empty index.

        Raises:
            UsageError: the store belongs to another registry, or a setting is wrong.
        """
        registry = cls.open(home)
        registry.initialise()
        return registry

    # -- parts --

    @cached_property
    def store(self) -> ObjectStore:
        """The objects."""
        from registry.storage.stores import open_store

        return open_store(self.place.store_uri)

    @cached_property
    def catalog(self) -> MlflowCatalog:
        """The index for people."""
        from registry.storage.catalog import MlflowCatalog

        return MlflowCatalog(self.place.tracking_uri)

    @cached_property
    def ledger(self) -> Ledger:
        """The audit log."""
        from registry.storage.ledger import Ledger

        return Ledger(self.place.ledger_uri)

    @cached_property
    def policy(self) -> RegistryPolicy:
        """The policy file, or the policy that ships with the product."""
        from registry.policy import RegistryPolicy

        return RegistryPolicy.load(self.place.policy)

    def demands(self, alias: str | None) -> Policy:
        """What the policy demands of an adapter now: of an alias, or (None) of versions and digests."""
        return self.policy.admission(alias, datetime.now(UTC))

    @cached_property
    def keys(self) -> KeyRing:
        """The private keys of this machine."""
        from registry.signing.signers import KeyRing

        secret = self.place.settings.key_passphrase
        return KeyRing(
            folder=self.place.keys,
            uris=self.place.settings.keys,
            passphrase=secret.get_secret_value() if secret is not None else None,
        )

    @cached_property
    def authority(self) -> Authority:
        """What this machine believes, and the means to sign something new."""
        from registry.signing.authority import Authority
        from registry.signing.refresh import TrustClient

        client = TrustClient(self.store, self.place.trust, max_age=self.place.settings.trust_max_age)
        return Authority(self.store, self.keys, client, anchor=self._anchor)

    def record(
        self, action: str, subject: str, details: Mapping[str, Any], *, actor: str | None = None
    ) -> None:
        """Writes a line of the audit log; what is published next carries its digest, signed.

        Args:
            action: what is done, such as ``push``.
            subject: to what, such as ``pixelsmile:3``.
            details: JSON values.
            actor: who does it; None is who works on this machine.

        Raises:
            NetworkError: the database does not answer; the action must not go on without its line.
        """
        self.ledger.append(action, subject, details, actor or self.place.actor)
        self._recorded = True

    @contextmanager
    def recorded(self, action: str, subject: str, details: Mapping[str, Any]) -> Iterator[None]:
        """Writes a line before something is published, and another one if that failed.

        Raises:
            NetworkError: see `record`.
        """
        from registry.errors import RegistryError

        self.record(action, subject, details)
        try:
            yield
        except RegistryError as error:
            self.record(f"{action} failed", subject, {"why": error.message})
            raise

    def _anchor(self, signed: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
        """The head of the audit log for the next publication; None while this process wrote no line.

        Raises:
            DigestMismatch: the log does not continue the signed one; signing its head would hide that.
        """
        from registry.storage.ledger import LedgerHead

        if not self._recorded:
            return None
        if self._log_restarted:
            return self.ledger.head().facts()
        return self.ledger.continued(None if signed is None else LedgerHead.parse(signed)).facts()

    def require_keys(self, *roles: str) -> None:
        """Makes sure that this machine can sign for some roles, and publish, before anything is written.

        Raises:
            NotFound: a key is not on this machine.
            UsageError: a key cannot be opened.
        """
        from registry.signing.signers import ONLINE

        for role in (*roles, ONLINE):
            self.keys.signer(role)

    # -- verbs --

    def restart_log(self, reason: str) -> None:
        """Begins a new audit log after a loss; its first row names the head that was signed last.

        Args:
            reason: what happened; people will read it.

        Raises:
            UsageError: the audit log has rows, or no reason was given.
            NotFound: the online key is not on this machine.
        """
        from registry.errors import UsageError

        if not reason.strip():
            raise UsageError("a new audit log needs a reason", mend="say what happened to the old one")
        self.require_keys()
        if self.ledger.head().length:
            raise UsageError(
                f"the audit log {self.ledger.uri} has rows",
                mend="keep it as evidence, and name an empty database with ADAPTER_FOUNDRY_LEDGER",
            )
        signed = self.authority.state().ledger_anchor()
        self.record("restart", self.store.uri, {"before": signed, "reason": reason})
        self._log_restarted = True
        self.authority.publish_anchor()

    def initialise(self) -> bool:
        """Makes keys, trust root, audit log and index.

        Returns:
            False if they were there already; they are left as they are.

        Raises:
            UsageError: the store belongs to another registry.
        """
        self.catalog.require()
        made = self.authority.initialise()
        if made:
            self.record("init", self.store.uri, {"home": str(self.place.home)})
            self.authority.publish_anchor()
            self.catalog.prepare()
        return made

    def push(
        self,
        folder: Path,
        name: str,
        *,
        evaluation: Mapping[str, Any] | None = None,
        behaviour: Mapping[str, Any] | None = None,
        for_review: bool = False,
        version: int | None = None,
        progress: Progress | None = None,
    ) -> PushResult:
        """Publishes an adapter folder as a new version; see `publishing.push`."""
        from registry import publishing

        return publishing.push(
            self,
            folder,
            name,
            evaluation=evaluation,
            behaviour=behaviour,
            for_review=for_review,
            version=version,
            progress=progress,
        )

    def attest(
        self, ref: str | Reference, kind: Kind, predicate: Mapping[str, Any], role: str | None = None
    ) -> Attested:
        """Signs a statement about a published version; see `attesting.attest`."""
        from registry import attesting

        return attesting.attest(self, Reference.of(ref), kind, predicate, role)

    def waive(
        self,
        ref: str | Reference,
        *rules: str,
        by: str,
        reason: str,
        days: int,
        where: str | None = None,
    ) -> Attested:
        """Signs that findings of some rules may pass for a while; see `attesting.waive`."""
        from registry import attesting

        return attesting.waive(self, Reference.of(ref), rules, by=by, reason=reason, days=days, where=where)

    def approve(self, ref: str | Reference, by: str, reason: str, *, automatic: bool = False) -> Attested:
        """Signs that somebody approved a version; see `attesting.approve`."""
        from registry import attesting

        return attesting.approve(self, Reference.of(ref), by, reason, automatic=automatic)

    def gates(self, ref: str | Reference, alias: str) -> GateReport:
        """Tells whether a version passes the gates of an alias; see `registry.gates`."""
        from registry.gates import gates

        return gates(self, Reference.of(ref), alias)

    def promote(self, ref: str | Reference, alias: str) -> Promotion:
        """Signs that an alias means a version that passes every gate; see `promotion.promote`.

        Raises:
            RegistryError: the first gate that does not pass.
        """
        from registry import promotion

        return promotion.promote(self, self.gates(ref, alias))

    def rollback(self, name: str, alias: str, to: int | None = None) -> Promotion:
        """Points an alias back to a version that it meant before; see `promotion.rollback`."""
        from registry import promotion

        return promotion.rollback(self, name, alias, to)

    def demote(self, name: str, alias: str) -> Promotion:
        """Takes an alias away; see `promotion.demote`."""
        from registry import promotion

        return promotion.demote(self, name, alias)

    def revoke(self, ref: str | Reference, reason: str) -> Listed:
        """Signs that a version must not be loaded any more, not even from a warm cache."""
        from registry import promotion

        return promotion.revoke(self, Reference.of(ref), reason)

    def yank(self, ref: str | Reference, reason: str | None) -> Listed:
        """Hides a version from lists and promotions, or shows it again (None); it can still be pulled."""
        from registry import promotion

        return promotion.yank(self, Reference.of(ref), reason)

    def pull(
        self,
        ref: str | Reference,
        cache: Path | None = None,
        *,
        output: Path | None = None,
        progress: Progress | None = None,
    ) -> Pulled:
        """Fetches and verifies an adapter and keeps its files in the cache; see `pulling.pull`."""
        from registry import pulling

        return pulling.pull(self, Reference.of(ref), cache, output=output, progress=progress)

    def load(
        self, ref: str | Reference, cache: Path | None = None, progress: Progress | None = None
    ) -> VerifiedAdapter:
        """Pulls an adapter and admits the bytes that are read from the cache; see `pulling.load`."""
        from registry import pulling

        return pulling.load(self, Reference.of(ref), cache, progress)

    def verify(self, ref: str | Reference) -> Pulled:
        """Verifies an adapter in the store, every byte and today's scan; keeps nothing."""
        from registry import pulling

        return pulling.verify(self, Reference.of(ref))

    def verify_folder(self, folder: Path) -> Pulled:
        """Verifies a pulled folder, wherever it comes from; see `pulling.verify_folder`."""
        from registry import pulling

        return pulling.verify_folder(self, folder)

    def rescan(self, *names: str, everything: bool = False, progress: Progress | None = None) -> Rescan:
        """Scans what is released by the rules of today; see `rescanning.rescan`."""
        from registry import rescanning

        return rescanning.rescan(self, names, everything=everything, progress=progress)

    def list(self, name: str | None = None) -> tuple[Listed, ...]:
        """Every signed version with its signed aliases, or those of one adapter."""
        from registry.views import listing

        return listing(self.authority.state(), name)

    def show(self, ref: str | Reference) -> Shown:
        """What is signed about an adapter, also if it would be refused."""
        from registry.results import Shown
        from registry.storage import shelf
        from registry.views import listed, statement_view

        state = self.authority.state()
        target = state.resolve(Reference.of(ref))
        manifest, trust = shelf.read_manifest(self.store, target.digest), state.about(target)
        statements = shelf.read_statements(self.store, target.digest)
        return Shown(
            listed=listed(state, manifest.name, manifest.version, target.digest),
            manifest=manifest,
            statements=tuple(
                statement_view(trust, target.digest, key, data) for key, data in statements.items()
            ),
        )
