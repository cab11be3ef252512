"""A file that is being put together from verified chunks, and gets its name when it is whole.

Until then it lies beside under the name with ``.part``. What an earlier process left there is verified and
kept, so that a killed download goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from registry.content import CHUNK_BYTES, Described, check_chunk
from registry.errors import DigestMismatch
from registry.parallel import each

SUFFIX: Final = ".part"
_UNFINISHED_MODE = 0o600
_FILE_MODE = 0o444


class PartFile:
    """One file of a folder that nobody else writes to. Errors are those of the operating system.

    Args:
        folder: where the file will be.
        entry: what it must be.
    """

    def __init__(self, folder: Path, entry: Described) -> None:
        self._entry = entry
        self._target = folder / entry.path
        self._part = folder / (entry.path + SUFFIX)
        self._descriptor = -1

    def is_finished(self) -> bool:
        """Whether the file is there under its name, whole; if it is damaged it becomes unfinished again."""
        if not _is_our_file(self._target):
            return False
        self._open(self._target, os.O_RDONLY)
        try:
            if not self.missing():
                return True
        finally:
            self._close()
        os.replace(self._target, self._part)
        return False

    def __enter__(self) -> Self:
        if _is_our_file(self._part):
            self._part.chmod(_UNFINISHED_MODE)
        self._open(self._part, os.O_RDWR | os.O_CREAT)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def missing(self) -> list[int]:
        """The numbers of the chunks that are not there or wrong, in order."""
        if os.fstat(self._descriptor).st_size != self._entry.size:
            return list(range(len(self._entry.chunks)))
        wrong = []

        def look(number: int) -> None:
            start, size = bounds(self._entry, number)
            try:
                check_chunk(os.pread(self._descriptor, size, start), self._entry, number)
            except DigestMismatch:
                wrong.append(number)

        each(look, range(len(self._entry.chunks)), workers=2)
        return sorted(wrong)

    def reserve(self) -> None:
        """Takes the space of the whole file: a disk that is too small is found out now, not at the end."""
        os.ftruncate(self._descriptor, self._entry.size)
        if self._entry.size:
            os.posix_fallocate(self._descriptor, 0, self._entry.size)

    def write(self, number: int, chunk: bytes) -> None:
        """Writes a verified chunk; called from several threads."""
        view, start = memoryview(chunk), bounds(self._entry, number)[0]
        while view:
            written = os.pwrite(self._descriptor, view, start)
            view, start = view[written:], start + written

    def finish(self) -> None:
        """Flushes the file and gives it its name; it is read-only from now on."""
        os.fchmod(self._descriptor, _FILE_MODE)
        os.fsync(self._descriptor)
        os.replace(self._part, self._target)

    def _open(self, path: Path, flags: int) -> None:
        self._descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, _UNFINISHED_MODE)

    def _close(self) -> None:
        os.close(self._descriptor)
        self._descriptor = -1


def bounds(entry: Described, number: int) -> tuple[int, int]:
    """Returns the first byte and the length of a chunk."""
    start = number * CHUNK_BYTES
    return start, min(CHUNK_BYTES, entry.size - start)


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Lets one at a time, thread or process, work on a folder; flushes its names at the end."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_our_file(path: Path) -> bool:
    """Whether a plain file with this one name is there; anything else that has the name is removed.

    A link, symbolic or hard, would let a write end somewhere else.
    """
    try:
        status = path.lstat()
    except FileNotFoundError:
        return False
    if stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and status.st_uid == os.geteuid():
        return True
    path.unlink()
    return False
