"""Verified copies between a machine and an object store.

Up: bytes that the store already has are compared with it instead of being sent again. Down: files come in
    parallel,
are hashed while they arrive, and are handed out only when size and both digests are right.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO, Protocol

from registry.digest import Digester, FileEntry
from registry.errors import DigestMismatch
from registry.storage.base import ObjectStore, blob_key

CHUNK_BYTES = 4 * 1024 * 1024
WORKERS = 4


class Progress(Protocol):
    """Hears how far a transfer is."""

    def __call__(self, stage: str, done: int, total: int, /) -> None:
        """Called from any thread with the stage's name, the bytes done so far and all bytes of the stage."""


def silent(stage: str, done: int, total: int, /) -> None:
    """A `Progress` that tells nobody."""


def upload(
    store: ObjectStore, files: Mapping[str, bytes], entries: Sequence[FileEntry], progress: Progress = silent
) -> int:
    """Copies files into the store under their digests.

    Args:
        store: where to.
        files: content by file name.
        entries: what the files must be.
        progress: hears about the stage "upload".

    Returns:
        How many bytes were sent; 0 if the store had everything.

    Raises:
        DigestMismatch: a file is not what its entry says, or the store holds other bytes under its digest.
    """
    meter = _Meter("upload", sum(entry.size for entry in entries), progress)
    sent = 0
    for entry in entries:
        if store.put(blob_key(entry.sha256), _checked(io.BytesIO(files[entry.path]), entry, meter)):
            sent += entry.size
            continue
        with store.open(blob_key(entry.sha256)) as stream:
            for _ in _checked(stream, entry, meter):
                pass
    return sent


def download(
    store: ObjectStore, entries: Sequence[FileEntry], progress: Progress = silent
) -> dict[str, bytes]:
    """Fetches files in parallel and verifies them.

    Args:
        store: where from.
        entries: what to fetch, and what it must be.
        progress: hears about the stage "download".

    Returns:
        Content by file name.

    Raises:
        NotFound: the store lacks a file.
        DigestMismatch: the store's bytes are not what was signed.
    """
    meter = _Meter("download", sum(entry.size for entry in entries), progress)

    def fetch(entry: FileEntry) -> bytes:
        buffer = io.BytesIO()
        with store.open(blob_key(entry.sha256)) as stream:
            buffer.writelines(_checked(stream, entry, meter))
        return buffer.getvalue()

    with ThreadPoolExecutor(max_workers=WORKERS, thread_name_prefix="download") as pool:
        return dict(zip((entry.path for entry in entries), pool.map(fetch, entries), strict=True))


class _Meter:
    """Adds up the bytes of several threads for one `Progress`."""

    def __init__(self, stage: str, total: int, progress: Progress) -> None:
        self._stage, self._total, self._progress = stage, total, progress
        self._done = 0
        self._lock = threading.Lock()
        progress(stage, 0, total)

    def add(self, count: int) -> None:
        with self._lock:
            self._done += count
            self._progress(self._stage, self._done, self._total)


def _checked(stream: BinaryIO, entry: FileEntry, meter: _Meter) -> Iterator[bytes]:
    """Yields a stream in chunks; raises at its end, or as soon as it is too long, if it is wrong."""
    digester = Digester()
    left = entry.size
    while chunk := stream.read(CHUNK_BYTES):
        left -= len(chunk)
        if left < 0:
            break
        digester.update(chunk)
        meter.add(len(chunk))
        yield chunk
    if left < 0 or digester.entry(entry.path) != entry:
        raise DigestMismatch(
            f"the bytes of {entry.path} are not {entry.sha256}",
            mend="they were tampered with or damaged; nothing was loaded. Restore the object from a backup, "
            "or remove it from the store and push the adapter again",
        )
