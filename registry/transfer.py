"""Verified copies between a machine and an object store, chunk by chunk and in parallel.

Up: every chunk is compared with its digest when it is read for sending, so that what the store gets is what
was fingerprinted, even if somebody writes to the file meanwhile. Down: every chunk is compared with its
digest before it is written; a file gets its name when all of it is verified and flushed. Both go on where a
killed process stopped.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from registry.content import Content, Described, Outline, VerifiedContent, check_chunk
from registry.digest import FileEntry, Fingerprint, digest_content
from registry.errors import DigestMismatch, RegistryError
from registry.parallel import each
from registry.partfile import PartFile, bounds, locked_folder
from registry.storage.base import MAX_DOCUMENT_BYTES, ObjectStore, file_key


class Progress(Protocol):
    """Hears how far a transfer is."""

    def __call__(self, stage: str, done: int, total: int, /) -> None:
        """Called from any thread with the stage's name, the bytes done so far and all bytes of the stage."""


def silent(stage: str, done: int, total: int, /) -> None:
    """A `Progress` that tells nobody."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """Files that are in the store now.

    Attributes:
        entries: their digests, in the order of the contents.
        sent: bytes of the files that the store did not have before.
    """

    entries: tuple[FileEntry, ...]
    sent: int


class StoredContent:
    """The bytes of a file where the store keeps them: hostile, so read them through `VerifiedContent`."""

    def __init__(self, store: ObjectStore, entry: Described) -> None:
        self._store, self._key, self._size = store, file_key(entry), entry.size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, where: slice, /) -> bytes:
        start, stop, step = where.indices(self._size)
        assert step == 1, "content is read forwards"
        return self._store.read(self._key, start, stop) if start < stop else b""


def publish(
    store: ObjectStore,
    contents: Mapping[str, Content],
    prints: Mapping[str, Fingerprint] | None = None,
    progress: Progress = silent,
) -> Published:
    """Copies files into the store and computes their sha256 meanwhile.

    Args:
        store: where to.
        contents: content by file name.
        prints: fingerprints by file name, if the caller has taken them already.
        progress: hears about the stage "upload".

    Raises:
        DigestMismatch: a file is not what its fingerprint says any more, or the store holds something else
            under its digest. Nothing was written of that file.
        NetworkError: the store does not answer; a later call goes on from there.
    """
    known = {} if prints is None else prints
    taken = {name: known.get(name) or Fingerprint.of(content) for name, content in contents.items()}
    outlines = [
        Outline(path=name, size=found.size, blake3=found.blake3, chunks=found.chunks)
        for name, found in taken.items()
    ]
    with ThreadPoolExecutor(1, thread_name_prefix="sha256") as pool:
        # The same checked reading as for the upload: both are about the fingerprinted bytes.
        digests = [
            pool.submit(digest_content, VerifiedContent(contents[outline.path], outline))
            for outline in outlines
        ]
        try:
            sent = _upload(store, contents, outlines, progress)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        entries = tuple(
            taken[outline.path].entry(outline.path, digest.result())
            for outline, digest in zip(outlines, digests, strict=True)
        )
    return Published(entries=entries, sent=sent)


def upload(
    store: ObjectStore,
    contents: Mapping[str, Content],
    entries: Sequence[FileEntry],
    progress: Progress = silent,
) -> int:
    """Copies files whose entries are known into the store.

    Args:
        store: where to.
        contents: content by file name.
        entries: what the files must be.
        progress: hears about the stage "upload".

    Returns:
        Bytes of the files that the store did not have; 0 if it had everything. What it had is compared by
        its size only: whoever reads it verifies every byte.

    Raises:
        DigestMismatch: a file is not what its entry says, or the store holds something else under its digest.
            Nothing was written of that file.
        NetworkError: the store does not answer; a later call goes on from there.
    """
    return _upload(store, contents, entries, progress)


def fetch(store: ObjectStore, entry: FileEntry, limit: int = MAX_DOCUMENT_BYTES) -> bytes:
    """Returns a small file.

    Raises:
        NotFound: the store lacks it.
        DigestMismatch: it is not what was signed, or what was signed is larger than `limit` bytes.
    """
    if entry.size > limit:
        raise DigestMismatch(
            f"{entry.path} has {entry.size} bytes, more than the limit of {limit}",
            mend="this is not what the trainer exports; ask who published it",
        )
    data = store.read(file_key(entry), 0, entry.size + 1)
    return VerifiedContent(data, entry)[:]


def download(
    store: ObjectStore, entries: Sequence[FileEntry], folder: Path, progress: Progress = silent
) -> None:
    """Fetches files into a folder, in parallel, and verifies every chunk.

    What lies there from an earlier call is verified and kept; only chunks that are missing or wrong are
    fetched. Only one call at a time works on a folder; another one waits.

    Args:
        store: where from.
        entries: what to fetch, and what it must be.
        folder: exists, and nobody else may write to it. Files end there as ``entry.path``, read-only.
        progress: hears about the stage "download".

    Raises:
        NotFound: the store lacks a file.
        DigestMismatch: the store's bytes are not what was signed, asked twice.
        NetworkError: the store does not answer; a later call goes on from there.
        RegistryError: the folder cannot be written.
    """
    meter = _Meter("download", sum(entry.size for entry in entries), progress)
    try:
        with locked_folder(folder):
            for entry in entries:
                _download(store, entry, folder, meter)
    except OSError as error:
        raise _cannot_write(folder, error) from error


class _Meter:
    """Adds up the bytes of several threads for one `Progress`."""

    def __init__(self, stage: str, total: int, progress: Progress) -> None:
        self._stage, self._total, self._progress = stage, total, progress
        self._done = 0
        self._lock = threading.Lock()
        progress(stage, 0, total)

    def add(self, count: int) -> None:
        with self._lock:
            # What was sent and then found to be there already counts once.
            self._done = min(self._done + count, self._total)
            self._progress(self._stage, self._done, self._total)


def _upload(
    store: ObjectStore, contents: Mapping[str, Content], entries: Sequence[Described], progress: Progress
) -> int:
    meter = _Meter("upload", sum(entry.size for entry in entries), progress)
    sent = 0
    for entry in entries:
        key = file_key(entry)
        if store.put(key, VerifiedContent(contents[entry.path], entry), meter.add):
            sent += entry.size
            continue
        size = store.stat(key).size
        if size != entry.size:
            raise DigestMismatch(
                f"the store holds {size} bytes under {key}, where {entry.size} belong",
                mend="the object was tampered with or damaged; remove it from the store and push again",
            )
        meter.add(entry.size)
    return sent


def _download(store: ObjectStore, entry: FileEntry, folder: Path, meter: _Meter) -> None:
    file = PartFile(folder, entry)
    if file.is_finished():
        meter.add(entry.size)
        return
    with file:
        missing = file.missing()
        file.reserve()
        meter.add(entry.size - sum(bounds(entry, number)[1] for number in missing))

        def fetch_chunk(number: int) -> None:
            chunk = _verified_chunk(store, entry, number)
            file.write(number, chunk)
            meter.add(len(chunk))

        each(fetch_chunk, missing)
        file.finish()


def _verified_chunk(store: ObjectStore, entry: FileEntry, number: int) -> bytes:
    """A chunk from the store; a wrong one may have been damaged on its way, so it is asked for twice."""
    try:
        return _chunk(store, entry, number)
    except DigestMismatch:
        return _chunk(store, entry, number)


def _chunk(store: ObjectStore, entry: FileEntry, number: int) -> bytes:
    start, size = bounds(entry, number)
    # An object that is longer than it should be gives one byte too many at its end.
    beyond = int(start + size == entry.size)
    chunk = store.read(file_key(entry), start, start + size + beyond)
    check_chunk(chunk, entry, number)
    return chunk


def _cannot_write(folder: Path, error: OSError) -> RegistryError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        mend = "free some space and run the same command again; it goes on from there"
    else:
        mend = "check the folder and its permissions"
    return RegistryError(f"{folder} cannot be written: {error.strerror or error}", mend)
