"""What the registry asks of a place that keeps objects, and of an index: small protocols, one vendor a file.

Object keys are relative paths with ``/`` between their parts. Everything except ``trust/timestamp.json`` is
written once and never changed, so that a key that holds a digest always means the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, BinaryIO, Protocol

from registry.errors import DigestMismatch, UsageError, shown

if TYPE_CHECKING:
    from registry.digest import Digest
    from registry.manifest import AdapterManifest

_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*", re.ASCII)
MAX_DOCUMENT_BYTES = 8 * 1024 * 1024
"""Upper bound of what is read into memory at once: manifests, statements and trust metadata."""


class ObjectStore(Protocol):
    """Keeps objects under keys. Implementations translate their vendor's errors into the registry's."""

    @property
    def uri(self) -> str:
        """Where the store is, for people and for the index; a key is appended with ``/``."""

    def open(self, key: str) -> BinaryIO:
        """Opens an object for reading.

        Raises:
            NotFound: there is no such object.
        """

    def put(self, key: str, chunks: Iterable[bytes]) -> bool:
        """Writes an object that must not exist yet, whole or not at all.

        Returns:
            False, and nothing was written, if the key already exists.
        """

    def replace(self, key: str, data: bytes) -> None:
        """Writes an object over an older one, whole or not at all; only for ``trust/timestamp.json``."""

    def copy(self, source: str, key: str) -> bool:
        """Gives an object a second key without moving its bytes; False if the key exists."""

    def keys(self, prefix: str) -> Iterator[str]:
        """All keys below a prefix, in order."""

    def delete(self, key: str) -> None:
        """Forgets an object; no error if it does not exist."""


class Catalog(Protocol):
    """An index for people and other tools. It is written after the fact and never read for a decision."""

    def require(self) -> None:
        """Checks that the index can be used, before anything else is written."""

    def prepare(self) -> None:
        """Makes an empty index, so that people can look at it from the start."""

    def record(self, manifest: AdapterManifest, digest: Digest, source: str) -> None:
        """Makes a version known, or known again with the same content."""

    def point(self, name: str, alias: str, digest: Digest) -> None:
        """Mirrors a signed alias, which names the manifest with this digest."""


def check_key(key: str) -> str:
    """Returns the key if it is a plain relative path.

    Raises:
        UsageError: it is not; it could leave the store.
    """
    if not _KEY.fullmatch(key):
        raise UsageError(
            f"{shown(key)!r} is not a key of an object", mend="keys are relative paths of plain names"
        )
    return key


def read(store: ObjectStore, key: str, limit: int = MAX_DOCUMENT_BYTES) -> bytes:
    """Reads a small object into memory.

    Raises:
        NotFound: there is no such object.
        DigestMismatch: it is larger than `limit` bytes, which no genuine one is.
    """
    with store.open(key) as stream:
        data = stream.read(limit + 1)
    if len(data) > limit:
        raise DigestMismatch(
            f"the object {key} is larger than {limit} bytes",
            mend="the store may have been tampered with; ask the publisher to push the adapter again",
        )
    return data


def blob_key(digest: Digest) -> str:
    """Key of a file's bytes."""
    return f"blobs/sha256/{digest.hex}"


def manifest_key(digest: Digest) -> str:
    """Key of a manifest."""
    return f"manifests/sha256/{digest.hex}"


def statements_prefix(digest: Digest) -> str:
    """Common beginning of the keys of the statements about a manifest."""
    return f"statements/{digest.hex}/"


def model_prefix(digest: Digest) -> str:
    """Common beginning of the keys of the MLflow model directory of a manifest."""
    return f"models/{digest.hex}/"
