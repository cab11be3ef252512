"""What the registry asks of a place that keeps objects, of an index and of an audit log: one vendor a file.

Object keys are relative paths with ``/`` between their parts. Everything except ``trust/timestamp.json`` is
written once and never changed, so that a key that holds a digest always means the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Final, Protocol, runtime_checkable

from registry.errors import DigestMismatch, UsageError, shown
from registry.manifest import WEIGHTS_NAME

if TYPE_CHECKING:
    from registry.content import Content, Described
    from registry.digest import Digest

_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*", re.ASCII)
MAX_DOCUMENT_BYTES: Final = 8 * 1024 * 1024
"""Upper bound of what is read into memory at once: manifests, statements and trust metadata."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectStat:
    """What a store says about an object.

    Attributes:
        size: bytes.
        tag: another one whenever the object was replaced; good for `ObjectStore.replace` only.
        modified: when it was written, by the store's clock, in UTC.
    """

    size: int
    tag: str
    modified: datetime


@dataclass(frozen=True, kw_only=True, slots=True)
class Abandoned:
    """A write that somebody began and did not end.

    Attributes:
        key: the object that it was to become, or the file that holds what there is of it.
        identity: what the store calls it.
        size: bytes that it occupies.
    """

    key: str
    identity: str
    size: int


class ObjectStore(Protocol):
    """Keeps objects under keys. Implementations translate their vendor's errors into the registry's.

    All methods may be called from several threads. Everything a store answers is hostile.
    """

    @property
    def uri(self) -> str:
        """Where the store is, for people and for the index; a key is appended with ``/``."""
        ...

    def stat(self, key: str) -> ObjectStat:
        """Return the size and tag of an object.

        Raises:
            NotFound: there is no such object.
            NetworkError: the store does not answer.
        """
        ...

    def read(self, key: str, start: int, stop: int) -> bytes:
        """Return the bytes of a range, clipped to the object's end; never more than ``stop - start``.

        Raises:
            NotFound: there is no such object.
            NetworkError: the store does not answer, answers half, or takes too long.
        """
        ...

    def put(self, key: str, content: Content, sent: Callable[[int], None] | None = None) -> bool:
        """Write an object that must not exist yet, whole or not at all; big ones in parallel and resumably.

        Args:
            key: the object.
            content: its bytes; read chunk by chunk from several threads, and an error that reading raises
                ends the writing.
            sent: hears how many more bytes are done.

        Returns:
            False, and nothing was written, if the key already exists.
        """
        ...

    def replace(self, key: str, data: bytes, tag: str | None) -> None:
        """Write an object over the one that has this tag, or where there is none (None); atomically.

        Raises:
            Conflict: somebody else has replaced it meanwhile; nothing was written.
        """
        ...

    def keys(self, prefix: str) -> Iterator[str]:
        """All keys that begin with a prefix, in order."""
        ...

    def delete(self, key: str) -> None:
        """Forget an object; no error if it does not exist."""
        ...


@runtime_checkable
class Housekeeping(Protocol):
    """What a store offers to those who look after it."""

    def clock(self) -> datetime | None:
        """Return the time at the store's server, in UTC; None if it has no other clock than this machine."""
        ...

    def abandoned(self, before: datetime) -> list[Abandoned]:
        """Return the unfinished writes to which nothing has come since a time."""
        ...

    def abort(self, unfinished: Abandoned) -> None:
        """Forget an unfinished write; no error if it is not there any more."""
        ...


def check_key(key: str) -> str:
    """Return the key if it is a plain relative path.

    Raises:
        UsageError: it is not; it could leave the store.
    """
    if not _KEY.fullmatch(key):
        raise UsageError(
            f"{shown(key)!r} is not a key of an object", mend="keys are relative paths of plain names"
        )
    return key


def read(store: ObjectStore, key: str, limit: int = MAX_DOCUMENT_BYTES) -> bytes:
    """Read a small object into memory.

    Raises:
        NotFound: there is no such object.
        DigestMismatch: it is larger than `limit` bytes, which no genuine one is.
    """
    data = store.read(key, 0, limit + 1)
    if len(data) > limit:
        raise DigestMismatch(
            f"the object {key} is larger than {limit} bytes",
            mend="the store may have been tampered with; ask the publisher to push the adapter again",
        )
    return data


def file_key(entry: Described) -> str:
    """Key of a file's bytes. Weights lie where MLflow looks for them, so that they are stored once."""
    if entry.path == WEIGHTS_NAME:
        return f"{model_prefix(entry)}adapter_weights/{WEIGHTS_NAME}"
    return f"blobs/blake3/{entry.blake3}"


def model_prefix(weights: Described) -> str:
    """Common beginning of the keys of the MLflow model directory that holds the weights."""
    return f"models/{weights.blake3}/"


def manifest_key(digest: Digest) -> str:
    """Key of a manifest."""
    return f"manifests/sha256/{digest.hex}"


def statements_prefix(digest: Digest) -> str:
    """Common beginning of the keys of the statements about a manifest."""
    return f"statements/{digest.hex}/"
