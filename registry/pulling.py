"""Pulling: from a reference to verified files on this machine, or to verified bytes in memory.

Documents are judged before a file is fetched. Files are compared with the manifest chunk by chunk while
they arrive. A warm pull asks for nothing that did not change: the receipt of the cache tells by which root,
policy, rules and statements the files were admitted, and as long as all of that is the same, only revocation
has to be looked at. Nothing that loads bytes relies on a receipt: `load` admits the bytes that it read.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

from registry.admission import (
    AdmittedDocuments,
    Policy,
    VerifiedAdapter,
    admit,
    admit_documents,
    check_files,
    check_identity,
    check_revocation,
    check_transfer,
)
from registry.cache import FILE_NAMES, MANIFEST_NAME, AdapterCache
from registry.content import Content, FileContent, VerifiedContent, chunks
from registry.digest import Digest, digest_bytes
from registry.errors import DigestMismatch, NetworkError, NotFound, RegistryError, shown
from registry.licenses import POLICY_VERSION
from registry.manifest import CARD_NAME, MAX_MANIFEST_BYTES, WEIGHTS_NAME, AdapterManifest
from registry.reference import Reference
from registry.results import Pulled
from registry.scanning.rules import RULES_VERSION
from registry.storage import shelf
from registry.storage.base import statements_prefix

if TYPE_CHECKING:
    from registry.client import Registry
    from registry.signing.trust import Target, TrustState
    from registry.transfer import Progress

_logger = logging.getLogger(__name__)

_UNTIL: Final = "until"
_GATES: Final = "gates"
_NO_ALIAS: Final = "-"
"""The gate of versions and digests, in a receipt."""

TRUST_STEPS = (
    "the root of trust is the one that this machine pinned, or was signed by it",
    "timestamp, snapshot, aliases and versions are signed by the keys that the root names",
    "none of them is expired, and none is older than what this machine has seen",
    "the store shows exactly these trust metadata, byte for byte",
    "the name is a signed one, and it means this manifest",
    "every object has the digest that its name says",
)
"""What happens before admission, in order; `registry verify` tells it."""


def pull(
    registry: Registry,
    reference: Reference,
    cache: Path | None = None,
    *,
    output: Path | None = None,
    progress: Progress | None = None,
) -> Pulled:
    """Fetch and verify an adapter and keep its files in the cache; nothing is kept of one that is refused.

    Args:
        registry: where from.
        reference: the adapter.
        cache: folder to keep it in, instead of this machine's.
        output: folder that gets the files as well, as hard links.
        progress: hears about the download.

    Raises:
        RegistryError: see the error tree.
    """
    kept = AdapterCache(cache if cache is not None else registry.place.cache)
    state = registry.authority.state()
    target = state.resolve(reference)
    with _dropping(kept, target.digest):
        manifest, fetched = _warm(registry, state, kept, target.digest, reference), 0
        if manifest is None:
            manifest, fetched = _cold(registry, state, kept, target, reference, progress)
        if output is not None:
            kept.link(target.digest, output)
    return Pulled(
        reference=f"{manifest.name}:{manifest.version}",
        digest=target.digest,
        manifest=manifest,
        path=output if output is not None else kept.path(target.digest),
        fetched_bytes=fetched,
        warnings=_warnings(state, target.digest),
    )


def load(
    registry: Registry, reference: Reference, cache: Path | None = None, progress: Progress | None = None
) -> VerifiedAdapter:
    """Pull an adapter, read it from the cache and admit the bytes that were read.

    Raises:
        RegistryError: see the error tree.
    """
    kept = AdapterCache(cache if cache is not None else registry.place.cache)
    for attempt in (1, 2):
        pulled = pull(registry, reference, cache, progress=progress)
        state = registry.authority.state()
        trust = state.about(state.resolve(reference))
        policy = registry.demands(reference.alias)
        statements = kept.read_statements(pulled.digest)
        if statements is None:
            statements = tuple(shelf.read_statements(registry.store, pulled.digest).values())
        try:
            with contextlib.ExitStack() as stack:
                files = {}
                for name in (CARD_NAME, WEIGHTS_NAME):
                    content = stack.enter_context(kept.content(pulled.digest, name))
                    files[name] = content[: len(content)]
            manifest = pulled.manifest.canonical_bytes()
            return admit(manifest, files, statements, trust, policy, pulled.digest, reference)
        except (DigestMismatch, NotFound) as error:
            kept.drop(pulled.digest)
            if attempt == 2:
                raise
            _logger.warning("the cached %s is damaged and is fetched again: %s", reference, error.message)
        except RegistryError:
            kept.drop(pulled.digest)
            raise
    raise AssertionError("unreachable")


def verify(registry: Registry, reference: Reference) -> Pulled:
    """Verify an adapter in the store: every document, every byte, and the scanner of today; keep nothing.

    Raises:
        RegistryError: see the error tree.
    """
    state = registry.authority.state()
    target = state.resolve(reference)
    policy = registry.demands(reference.alias)
    documents = check_in_store(registry, state, target, reference, policy)
    return _verified(state, documents, None)


def verify_folder(registry: Registry, folder: Path) -> Pulled:
    """Verify a folder that somebody pulled: this machine's trust says whether it is what its manifest says.

    Args:
        registry: the registry that it should be from.
        folder: holds manifest.json, adapter.json and the weights.

    Raises:
        NotFound: a file is missing, or the registry has signed no such manifest.
        RegistryError: see the error tree.
    """
    with FileContent(folder / MANIFEST_NAME) as content:
        data = content[:MAX_MANIFEST_BYTES]
    extra = sorted({path.name for path in folder.iterdir()} - set(FILE_NAMES))
    if extra:
        raise DigestMismatch(
            f"{folder} has files that no manifest names: {', '.join(map(shown, extra))}",
            "a loader may read them too: remove them, or pull the adapter anew",
        )
    claimed = AdapterManifest.parse(data)
    reference = Reference(name=claimed.name, digest=digest_bytes(data))
    state = registry.authority.state()
    target = state.resolve(reference)
    policy = registry.demands(None)
    statements = shelf.read_statements(registry.store, target.digest)
    trust = state.about(target)
    documents = admit_documents(data, tuple(statements.values()), trust, policy, target.digest, reference)
    with _opened(folder) as files:
        check_files(documents, files, policy)
    return _verified(state, documents, folder)


def check_in_store(
    registry: Registry, state: TrustState, target: Target, reference: Reference, policy: Policy
) -> AdmittedDocuments:
    """Take all steps of admission but the last over what the store holds, without keeping it.

    Raises:
        RegistryError: see the error tree.
    """
    from registry.storage.catalog import check_model
    from registry.transfer import StoredContent

    documents = _documents(registry, state, target, reference, policy)[0]
    files = {entry.path: StoredContent(registry.store, entry) for entry in documents.manifest.files}
    check_files(documents, files, policy)
    check_model(registry.store, documents.manifest)
    return documents


def _documents(
    registry: Registry, state: TrustState, target: Target, reference: Reference, policy: Policy
) -> tuple[AdmittedDocuments, Mapping[str, bytes]]:
    """Read and judge what is said about an adapter; also return the envelopes by their keys."""
    manifest = shelf.read_manifest(registry.store, target.digest).canonical_bytes()
    statements = shelf.read_statements(registry.store, target.digest)
    trust, envelopes = state.about(target), tuple(statements.values())
    return admit_documents(manifest, envelopes, trust, policy, target.digest, reference), statements


def _warm(
    registry: Registry, state: TrustState, kept: AdapterCache, digest: Digest, reference: Reference
) -> AdapterManifest | None:
    """The manifest of a cached adapter to which nothing has happened since it was admitted; else None."""
    receipt = kept.receipt(digest)
    found = kept.read_documents(digest) if receipt is not None else None
    if receipt is None or found is None or digest_bytes(found.manifest) != digest:
        return None
    names = receipt.get("statements", "")
    if not state.remembered:
        names = _names(registry.store.keys(statements_prefix(digest)))
    until, gates = receipt.pop(_UNTIL, ""), receipt.pop(_GATES, "")
    if until and datetime.now(UTC) >= datetime.fromisoformat(until):
        return None
    if receipt != _receipt(registry, state, names) or _gate(reference) not in gates.split():
        return None
    manifest = AdapterManifest.parse(found.manifest)
    # What a name means may have changed since the receipt was written, and it was written for another name.
    check_identity(manifest, reference)
    check_revocation(manifest, state)
    return manifest


def _cold(
    registry: Registry,
    state: TrustState,
    kept: AdapterCache,
    target: Target,
    reference: Reference,
    progress: Progress | None,
) -> tuple[AdapterManifest, int]:
    """Admit an adapter anew; fetch the files that the cache has not, or has not whole."""
    from registry import transfer
    from registry.storage.catalog import check_model

    policy = registry.demands(reference.alias)
    documents, statements = _documents(registry, state, target, reference, policy)
    digest = target.digest
    manifest, fetched = documents.manifest, 0
    check_model(registry.store, manifest)
    with kept.incoming(digest) as folder:
        if _is_whole(kept, manifest, digest):
            with _opened(kept.path(digest)) as files:
                check_transfer(documents, files, policy)
        else:
            transfer.download(registry.store, manifest.files, folder, progress or transfer.silent)
            with _opened(folder) as files:
                check_transfer(documents, files, policy)
            kept.commit(digest, manifest.canonical_bytes())
            fetched = sum(entry.size for entry in manifest.files)
    kept.write_statements(digest, tuple(statements.values()))
    until = documents.waivers.until
    receipt = _receipt(registry, state, _names(statements))
    gates, ends = _passed_before(kept, digest, receipt)
    receipt[_GATES] = " ".join(sorted({_gate(reference), *gates}))
    if ends or until is not None:
        # What a waiver let pass has to be judged anew when it ends; another gate may count other waivers.
        receipt[_UNTIL] = min(at for at in (ends, until and until.isoformat()) if at)
    kept.write_receipt(digest, receipt)
    return manifest, fetched


def _is_whole(kept: AdapterCache, manifest: AdapterManifest, digest: Digest) -> bool:
    """Whether every byte in the cache is what the manifest says."""
    found = kept.read_documents(digest)
    if found is None:
        return False
    try:
        with _opened(kept.path(digest)) as files:
            for entry in manifest.files:
                for _ in chunks(VerifiedContent(files[entry.path], entry)):
                    pass
    except DigestMismatch as error:
        _logger.warning("the cached %s is damaged and is fetched again: %s", manifest.name, error.message)
        return False
    return found.manifest == manifest.canonical_bytes()


def _gate(reference: Reference) -> str:
    return reference.alias or _NO_ALIAS


def _passed_before(kept: AdapterCache, digest: Digest, receipt: Mapping[str, str]) -> tuple[list[str], str]:
    """The gates passed by the very same root, policy, rules and statements, and until when that counts."""
    before = kept.receipt(digest) or {}
    until, gates = before.pop(_UNTIL, ""), before.pop(_GATES, "")
    ended = until and datetime.now(UTC) >= datetime.fromisoformat(until)
    return ([], "") if ended or before != receipt else (gates.split(), until)


def _receipt(registry: Registry, state: TrustState, names: str) -> dict[str, str]:
    """By what an adapter was admitted; an adapter is judged anew when any of it changes."""
    return {
        "root": str(state.version("root")),
        "policy": str(registry.policy.digest),
        "rules": f"scanner {RULES_VERSION}, licences {POLICY_VERSION}",
        "statements": names,
    }


def _names(keys: Iterator[str] | Mapping[str, bytes]) -> str:
    return str(digest_bytes("\n".join(sorted(keys)).encode()))


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[dict[str, Content]]:
    """The files of an adapter in a folder."""
    with contextlib.ExitStack() as stack:
        yield {name: stack.enter_context(FileContent(folder / name)) for name in (CARD_NAME, WEIGHTS_NAME)}


@contextlib.contextmanager
def _dropping(kept: AdapterCache, digest: Digest) -> Iterator[None]:
    """Forget an adapter that is refused; trouble with the network or the disk refuses nothing."""
    try:
        yield
    except RegistryError as error:
        if type(error) is not RegistryError and not isinstance(error, NetworkError):
            kept.drop(digest)
        raise


def _verified(state: TrustState, documents: AdmittedDocuments, path: Path | None) -> Pulled:
    manifest = documents.manifest
    return Pulled(
        reference=f"{manifest.name}:{manifest.version}",
        digest=documents.digest,
        manifest=manifest,
        path=path,
        fetched_bytes=0,
        warnings=_warnings(state, documents.digest),
    )


def _warnings(state: TrustState, digest: Digest) -> tuple[str, ...]:
    reason = state.is_yanked(digest)
    return () if reason is None else (f"this version was yanked: {reason}; use another one for new work",)
