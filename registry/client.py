"""The registry: push, attest, approve, promote, pull, verify.

A shell around pure parts. What comes out of the store, the cache or the index is hostile until
``admission`` has judged it against trust metadata that this machine has verified. Every writing step can be
interrupted and repeated: blobs, then manifest, then statements, then the signed name, and last the index.
The file is longer than others because the whole shell is one class.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from registry import attestation
from registry.admission import Policy, VerifiedAdapter, admit, admit_candidate
from registry.attestation import ROLE_OF, Kind
from registry.cache import AdapterCache, Parcel
from registry.digest import Digest, file_entry
from registry.errors import (
    DigestMismatch,
    NotFound,
    RegistryError,
    UsageError,
    shown,
)
from registry.manifest import CARD_NAME, WEIGHTS_NAME, AdapterManifest
from registry.reference import Reference, check_alias, check_name
from registry.results import Attested, Listed, Promotion, PushResult, Shown, StatementView
from registry.settings import Layout, layout
from registry.signing import envelope
from registry.signing.authority import Authority
from registry.signing.refresh import TrustClient
from registry.signing.signers import KeyRing
from registry.signing.trust import Target, TrustState
from registry.storage import shelf
from registry.storage.base import Catalog, ObjectStore
from registry.storage.catalog import MlflowCatalog, check_model, write_model
from registry.storage.local import LocalObjects
from registry.transfer import Progress, silent, upload
from registry.views import listing, statement_view

_logger = logging.getLogger(__name__)

TRUST_STEPS = (
    "the root of trust is the one that this machine pinned, or was signed by it",
    "timestamp, snapshot, aliases and versions are signed by the keys that the root names",
    "none of them is expired, and none is older than what this machine has seen",
    "the store shows exactly these trust metadata, byte for byte",
    "the name is a signed one, and it means this manifest",
    "every object has the digest that its name says",
)
"""What happens before admission, in order; `registry verify` tells it."""

BUILDER = "https://adapter-foundry.dev/builder/registry-push/v1"


class Registry:
    """The registry of one data folder.

    Args:
        place: where everything is.
        store: the objects.
        catalog: the index.
    """

    def __init__(self, place: Layout, store: ObjectStore, catalog: Catalog) -> None:
        secret = place.settings.key_passphrase
        self._store = store
        self._catalog = catalog
        self._cache = place.cache
        self._policy = Policy(allow_review=place.settings.allow_review)
        self._keys = KeyRing(
            folder=place.keys,
            uris=place.settings.keys,
            passphrase=secret.get_secret_value() if secret is not None else None,
        )
        self._authority = Authority(store, self._keys, TrustClient(store, place.trust))

    @classmethod
    def open(cls, home: Path | None = None) -> Registry:
        """The registry of a data folder (default: `home()`), which need not be initialised yet.

        Raises:
            UsageError: a setting is wrong.
        """
        place = layout(home)
        return cls(place, LocalObjects(place.objects), MlflowCatalog(place.tracking_uri))

    @classmethod
    def init(cls, home: Path | None = None) -> Registry:
        """Opens the registry of a data folder, and makes it if there is none: keys, trust root, empty index.

        Raises:
            UsageError: the store belongs to another registry, or a setting is wrong.
        """
        registry = cls.open(home)
        registry.initialise()
        return registry

    def initialise(self) -> bool:
        """Makes keys, trust root and index.

        Returns:
            False if they were there already; they are left as they are.

        Raises:
            UsageError: the store belongs to another registry.
        """
        self._catalog.require()
        made = self._authority.initialise()
        if made:
            self._catalog.prepare()
        return made

    # -- publishing --

    def push(
        self,
        folder: Path,
        name: str,
        *,
        evaluation: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
    ) -> PushResult:
        """Publishes an adapter folder as a new version, or finds the version that it already is.

        Scan and licence policy come first; nothing is written if they refuse. The training, licence and scan
        statements are signed, and the evaluation statement if there is an evaluation.

        Args:
            folder: holds the weights and the adapter card; other files are left alone.
            name: name of the adapter.
            evaluation: an evaluation report with a "verdict".
            progress: hears about the upload.

        Raises:
            PolicyRefused: the scan or the licences refuse.
            RegistryError: see the error tree.
        """
        check_name(name)
        self._catalog.require()
        files = read_folder(folder)
        candidate = admit_candidate(files, self._policy)
        entries = tuple(file_entry(path, data) for path, data in files.items())
        state = self._authority.signing_state()
        draft = AdapterManifest.make(candidate.card, name=name, version=1, files=entries)
        known = _version_with(state, draft)
        version = known or max(state.versions_of(name), default=0) + 1
        manifest = AdapterManifest.make(candidate.card, name=name, version=version, files=entries)

        uploaded = upload(self._store, files, manifest.files, progress or silent)
        shelf.put_manifest(self._store, manifest)
        for kind, predicate in self._push_predicates(candidate, evaluation):
            self._sign(manifest, kind, predicate)
        source = write_model(self._store, manifest, manifest.digest)
        reference = f"{name}:{version}"
        if known is None or state.renewal_of_names_due(datetime.now(UTC)):
            size = len(manifest.canonical_bytes())
            self._authority.add_version(reference, manifest.digest, size, {"content": str(draft.digest)})
        self._catalog.record(manifest, manifest.digest, source)
        return PushResult(
            reference=reference,
            version=version,
            digest=manifest.digest,
            uploaded_bytes=uploaded,
            reused=known is not None,
        )

    def attest(
        self, ref: str | Reference, kind: Kind, predicate: Mapping[str, Any], role: str | None = None
    ) -> Attested:
        """Signs a statement about a published version.

        Args:
            ref: the version.
            kind: what is attested.
            predicate: the statement's content.
            role: whose key signs; the role that the kind needs is the only one that will be believed.

        Raises:
            UsageError: the role cannot sign such statements, or the predicate is not valid.
            RegistryError: see the error tree.
        """
        if kind not in ROLE_OF:
            raise UsageError(
                f"there is no statement of the kind {shown(kind)!r}", mend=f"kinds are: {', '.join(ROLE_OF)}"
            )
        if role is not None and role != ROLE_OF[kind]:
            raise UsageError(
                f"a statement of the kind {kind!r} is only believed from the {ROLE_OF[kind]}",
                mend=f"sign it as {ROLE_OF[kind]}",
            )
        target = self._authority.state().resolve(_reference(ref))
        return self._sign(shelf.read_manifest(self._store, target.digest), kind, predicate)

    def approve(self, ref: str | Reference, by: str, reason: str, *, automatic: bool = False) -> Attested:
        """Signs that somebody approved a version, after everything else about it was verified.

        Args:
            ref: the version.
            by: who approves.
            reason: why; people will read it.
            automatic: no person looked at it.

        Raises:
            RegistryError: the version would not pass admission even with an approval.
        """
        if not by.strip() or not reason.strip():
            raise UsageError("an approval needs a name and a reason", mend="say who approves and why")
        state = self._authority.state()
        target = state.resolve(_reference(ref))
        needed = tuple(kind for kind in self._policy.required if kind != "approval")
        adapter = self._admit(state, target, _reference(ref), replace(self._policy, required=needed))
        manifest = _manifest_of(adapter)
        said = {"by": by, "reason": reason, "automatic": automatic}
        for view in self._views(state, manifest.digest):
            if view.kind == "approval" and view.signed and said.items() <= view.predicate.items():
                return Attested(
                    reference=str(adapter.reference),
                    kind="approval",
                    digest=manifest.digest,
                    statement=view.key,
                    reused=True,
                )
        at = datetime.now(UTC).isoformat(timespec="seconds")
        predicate = attestation.approval_predicate(by=by, reason=reason, at=at, automatic=automatic)
        return self._sign(manifest, "approval", predicate)

    def promote(self, ref: str | Reference, alias: str) -> Promotion:
        """Signs that an alias means a version that passes every check; MLflow is told afterwards.

        Raises:
            Unsigned: the evaluation, the approval or another statement is missing.
            RegistryError: see the error tree.
        """
        check_alias(alias)
        reference = _reference(ref)
        self._catalog.require()
        state = self._authority.signing_state()
        target = state.resolve(reference)
        manifest = _manifest_of(self._admit(state, target, reference, self._policy))
        path = f"{manifest.name}@{alias}"
        before = state.aliases().get(path)
        reused = before is not None and before.digest == manifest.digest
        if not reused or state.renewal_of_names_due(datetime.now(UTC)):
            size = len(manifest.canonical_bytes())
            self._authority.set_alias(path, manifest.digest, size, {"version": manifest.version})
        self._catalog.point(manifest.name, alias, manifest.digest)
        return Promotion(
            reference=path,
            version=manifest.version,
            digest=manifest.digest,
            previous=None if before is None else before.custom.get("version"),
            reused=reused,
        )

    def revoke(self, ref: str | Reference, reason: str) -> Listed:
        """Signs that a version must not be loaded any more, not even from a warm cache.

        Raises:
            RegistryError: see the error tree.
        """
        if not reason.strip():
            raise UsageError("a revocation needs a reason", mend="say why; people will read it")
        target = self._authority.signing_state().resolve(_reference(ref))
        state = self._authority.revoke(target.digest, reason)
        return next(found for found in listing(state) if found.digest == target.digest)

    # -- using --

    def pull(
        self, ref: str | Reference, cache: Path | None = None, progress: Progress | None = None
    ) -> VerifiedAdapter:
        """Fetches an adapter, verifies everything about it and keeps it in the cache.

        A cached adapter is verified again, against the newest trust metadata; if the cache was damaged, it is
        fetched anew. Nothing is kept of an adapter that is refused.

        Args:
            ref: the adapter.
            cache: folder to keep it in, instead of this machine's.
            progress: hears about the download.

        Raises:
            RegistryError: see the error tree.
        """
        reference = _reference(ref)
        state = self._authority.state()
        target = state.resolve(reference)
        kept = AdapterCache(cache if cache is not None else self._cache)
        warm = kept.read(target.digest)
        if warm is not None:
            try:
                statements = shelf.read_statements(self._store, target.digest)
                warm = replace(warm, statements=tuple(statements.values()))
                return self._judge(state, target, reference, self._policy, warm)
            except DigestMismatch as error:
                _logger.warning("the cached %s is damaged and is fetched again: %s", reference, error.message)
            except RegistryError:
                kept.drop(target.digest)
                raise
        kept.drop(target.digest)
        parcel = shelf.fetch(self._store, target.digest, progress or silent)
        adapter = self._judge(state, target, reference, self._policy, parcel)
        check_model(self._store, _manifest_of(adapter), target.digest)
        kept.write(target.digest, parcel)
        return adapter

    def cached(self, adapter: VerifiedAdapter, cache: Path | None = None) -> Path:
        """The folder where `pull` keeps an adapter."""
        return AdapterCache(cache if cache is not None else self._cache).path(adapter.digest)

    def verify(self, ref: str | Reference) -> VerifiedAdapter:
        """Verifies an adapter in the store exactly as a pull into an empty cache would, and keeps nothing.

        Raises:
            RegistryError: see the error tree.
        """
        reference = _reference(ref)
        state = self._authority.state()
        target = state.resolve(reference)
        adapter = self._admit(state, target, reference, self._policy)
        check_model(self._store, _manifest_of(adapter), target.digest)
        return adapter

    def list(self) -> tuple[Listed, ...]:
        """Every signed version with its signed aliases.

        Raises:
            RegistryError: see the error tree.
        """
        return listing(self._authority.state())

    def show(self, ref: str | Reference) -> Shown:
        """What is signed about an adapter, also if it would be refused.

        Raises:
            RegistryError: see the error tree.
        """
        state = self._authority.state()
        target = state.resolve(_reference(ref))
        listed = next(found for found in listing(state) if found.digest == target.digest)
        manifest = shelf.read_manifest(self._store, target.digest)
        return Shown(listed=listed, manifest=manifest, statements=self._views(state, target.digest))

    # -- parts --

    def _push_predicates(
        self, candidate: VerifiedAdapter, evaluation: Mapping[str, Any] | None
    ) -> Iterable[tuple[Kind, Mapping[str, Any]]]:
        from registry import licenses

        base = self._policy.bases.get(candidate.card.base.id)
        verdict = licenses.judge(candidate.card, None if base is None else base.license)
        yield "training", attestation.training_predicate(candidate.card, builder=BUILDER)
        yield "licence", attestation.licence_predicate(verdict, candidate.card)
        yield "scan", attestation.scan_predicate(candidate.scan)
        if evaluation is not None:
            yield "evaluation", attestation.evaluation_predicate(evaluation)

    def _sign(self, manifest: AdapterManifest, kind: Kind, predicate: Mapping[str, Any]) -> Attested:
        subject = f"{manifest.name}:{manifest.version}"
        payload = attestation.statement(kind, subject, manifest.digest, predicate)
        data = envelope.sign(payload, [self._keys.signer(ROLE_OF[kind])])
        key, new = shelf.put_statement(self._store, manifest.digest, kind, data)
        return Attested(reference=subject, kind=kind, digest=manifest.digest, statement=key, reused=not new)

    def _judge(
        self, state: TrustState, target: Target, reference: Reference, policy: Policy, parcel: Parcel
    ) -> VerifiedAdapter:
        return admit(
            parcel.manifest, parcel.files, parcel.statements, state, policy, target.digest, reference
        )

    def _admit(
        self, state: TrustState, target: Target, reference: Reference, policy: Policy
    ) -> VerifiedAdapter:
        return self._judge(state, target, reference, policy, shelf.fetch(self._store, target.digest))

    def _views(self, state: TrustState, digest: Digest) -> tuple[StatementView, ...]:
        statements = shelf.read_statements(self._store, digest)
        return tuple(statement_view(state, key, data) for key, data in statements.items())


def read_folder(folder: Path) -> dict[str, bytes]:
    """Reads the files of an adapter folder.

    Raises:
        NotFound: the folder is no adapter folder.
        RegistryError: a file cannot be read.
    """
    files = {}
    for name in (CARD_NAME, WEIGHTS_NAME):
        try:
            files[name] = (folder / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise NotFound(
                f"{folder} has no {name}",
                mend=f"an adapter folder holds {WEIGHTS_NAME} and {CARD_NAME}, as the trainer writes them",
            ) from None
        except OSError as error:
            raise RegistryError(
                f"{folder / name} cannot be read: {error.strerror}", mend="check the file"
            ) from error
    return files


def _reference(ref: str | Reference) -> Reference:
    return ref if isinstance(ref, Reference) else Reference.parse(ref)


def _manifest_of(adapter: VerifiedAdapter) -> AdapterManifest:
    assert adapter.manifest is not None, "an adapter of a registry has a manifest"
    return adapter.manifest


def _version_with(state: TrustState, draft: AdapterManifest) -> int | None:
    """The signed version that holds the same content, whatever its number."""
    for version, target in state.versions_of(draft.name).items():
        if target.custom.get("content") == draft.digest:
            return version
    return None
