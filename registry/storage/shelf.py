"""The documents of one adapter in a store: its manifest and its statements.

Everything read here is still hostile, but it is at least what its name says: every key holds a digest, and
bytes that do not have it are refused. Whether they are believed is decided by admission.
"""

from __future__ import annotations

from registry.digest import Digest, digest_bytes
from registry.errors import DigestMismatch
from registry.manifest import MAX_MANIFEST_BYTES, AdapterManifest
from registry.signing.envelope import MAX_ENVELOPE_BYTES
from registry.storage.base import ObjectStore, manifest_key, read, statements_prefix

MAX_STATEMENTS = 64
"""As many statements about one adapter are read; admission allows no more either."""

_MEND = "it was tampered with or damaged; nothing was loaded. Restore the object from a backup, or push again"


def put_manifest(store: ObjectStore, manifest: AdapterManifest) -> None:
    """Writes a manifest, or makes sure that it is there.

    Raises:
        DigestMismatch: the store holds other bytes under its digest.
    """
    data = manifest.canonical_bytes()
    key = manifest_key(manifest.digest)
    if not store.put(key, data) and read(store, key) != data:
        raise DigestMismatch(f"the store holds other bytes under {key}", _MEND)


def read_manifest(store: ObjectStore, digest: Digest) -> AdapterManifest:
    """Reads a manifest.

    Raises:
        NotFound: the store lacks it.
        DigestMismatch: the store holds other bytes under its digest.
        InvalidDocument: it is no manifest.
    """
    data = read(store, manifest_key(digest), MAX_MANIFEST_BYTES)
    if digest_bytes(data) != digest:
        raise DigestMismatch(f"the manifest in the store is not {digest}", _MEND)
    return AdapterManifest.parse(data)


def put_statement(store: ObjectStore, digest: Digest, kind: str, envelope: bytes) -> tuple[str, bool]:
    """Writes a statement under its own digest, so that the same statement gets the same name again.

    Returns:
        Its key, and whether it is new.
    """
    key = f"{statements_prefix(digest)}{kind}.{digest_bytes(envelope).hex}.json"
    return key, store.put(key, envelope)


def read_statements(store: ObjectStore, digest: Digest) -> dict[str, bytes]:
    """Reads the envelopes about a manifest, by their key.

    Raises:
        DigestMismatch: an envelope is not what its name says, or there are too many.
    """
    keys = list(store.keys(statements_prefix(digest)))
    if len(keys) > MAX_STATEMENTS:
        raise DigestMismatch(
            f"the store holds {len(keys)} statements about {digest}; at most {MAX_STATEMENTS} are read",
            mend="somebody has filled the store with statements; remove those that are not genuine",
        )
    found = {}
    for key in keys:
        data = read(store, key, MAX_ENVELOPE_BYTES)
        if not key.endswith(f".{digest_bytes(data).hex}.json"):
            raise DigestMismatch(f"the statement {key} is not what its name says", _MEND)
        found[key] = data
    return found
