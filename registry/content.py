"""Bytes that are read in any order without being in memory: a file, or what a manifest says of one.

``bytes`` are a ``Content`` already. A ``FileContent`` opens its path once and reads from that descriptor, so
that a file exchanged behind the path changes nothing; one that shrinks while it is read is an error, and what
is appended is not seen. A ``VerifiedContent`` compares every chunk with its digest each time it is read:
bytes that were checked are the bytes that are used.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol, Self

from registry.errors import DigestMismatch, NotFound, RegistryError, shown

CHUNK_BYTES: Final = 8 << 20
"""Bytes of a chunk, the unit of verification and transfer; the last chunk of a file may be shorter."""


class Content(Protocol):
    """Bytes with a length that can be read by range; slices have a step of 1 and non-negative bounds."""

    def __len__(self) -> int:
        """Return the number of bytes."""
        ...

    def __getitem__(self, where: slice, /) -> bytes:
        """Return the bytes of a range, clipped to the length as for ``bytes``."""
        ...


class Described(Protocol):
    """What the bytes of a file must be: a `FileEntry`, or the half of one that is known before its sha256."""

    @property
    def path(self) -> str:
        """The file's name."""
        ...

    @property
    def size(self) -> int:
        """Bytes."""
        ...

    @property
    def blake3(self) -> str:
        """Hex digits of the whole file's digest."""
        ...

    @property
    def chunks(self) -> tuple[str, ...]:
        """Hex digits of each chunk's digest."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Outline:
    """See `Described`: what is known of a file before its sha256 is."""

    path: str
    size: int
    blake3: str
    chunks: tuple[str, ...]


class FileContent:
    """The bytes of a file, opened once; symbolic links are not followed.

    Raises:
        NotFound: there is no such file.
        RegistryError: it cannot be read, or is not a plain file.
        DigestMismatch: it became shorter while it was read.
    """

    def __init__(self, path: Path) -> None:
        import stat

        self._path = path
        self._descriptor = -1
        try:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
            self._descriptor = os.open(path, flags)
        except (FileNotFoundError, NotADirectoryError):
            raise NotFound(f"there is no file {path}", "check the path") from None
        except OSError as error:
            raise _unreadable(path, error.strerror or str(error)) from error
        status = os.fstat(self._descriptor)
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise _unreadable(path, "it is not a plain file")
        self._size = status.st_size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, where: slice, /) -> bytes:
        start, stop, step = where.indices(self._size)
        assert step == 1, "content is read forwards"
        pieces, at = [], start
        while at < stop:
            try:
                piece = os.pread(self._descriptor, stop - at, at)
            except OSError as error:
                raise _unreadable(self._path, error.strerror or str(error)) from error
            if not piece:
                raise DigestMismatch(
                    f"{self._path} became shorter while it was read",
                    "wait until nobody writes to it any more, and try again",
                )
            pieces.append(piece)
            at += len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def close(self) -> None:
        """Give the file back; reading is an error afterwards."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class VerifiedContent:
    """Content that gives out no byte whose chunk has not the digest that a file entry names.

    The chunk that was read last is kept, so that reading forwards in small steps verifies each chunk once.

    Args:
        content: hostile bytes.
        entry: what they must be.

    Raises:
        DigestMismatch: the length or a chunk is another one.
    """

    def __init__(self, content: Content, entry: Described) -> None:
        if len(content) != entry.size:
            raise DigestMismatch(
                f"{entry.path} has {len(content)} bytes, {entry.size} were signed",
                "the bytes were tampered with or damaged; fetch the adapter again",
            )
        self._content = content
        self._entry = entry
        self._kept: tuple[int, bytes] | None = None

    def __len__(self) -> int:
        return self._entry.size

    def __getitem__(self, where: slice, /) -> bytes:
        start, stop, step = where.indices(self._entry.size)
        assert step == 1, "content is read forwards"
        pieces = []
        for number in range(start // CHUNK_BYTES, -(-stop // CHUNK_BYTES) if stop > start else 0):
            origin = number * CHUNK_BYTES
            chunk = self._chunk(number)
            pieces.append(chunk[max(start - origin, 0) : stop - origin])
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _chunk(self, number: int) -> bytes:
        # One tuple, read and replaced at once: threads may share the content.
        kept = self._kept
        if kept is not None and kept[0] == number:
            return kept[1]
        chunk = self._content[number * CHUNK_BYTES : (number + 1) * CHUNK_BYTES]
        check_chunk(chunk, self._entry, number)
        self._kept = (number, chunk)
        return chunk


def chunks(content: Content) -> Iterator[bytes]:
    """Yield all of a content, chunk by chunk."""
    for start in range(0, len(content), CHUNK_BYTES):
        yield content[start : start + CHUNK_BYTES]


def check_chunk(chunk: bytes, entry: Described, number: int) -> None:
    """Compare a chunk with its digest in a file entry.

    Raises:
        DigestMismatch: it is another one.
    """
    from blake3 import blake3

    if blake3(chunk).hexdigest() != entry.chunks[number]:
        raise DigestMismatch(
            f"bytes {number * CHUNK_BYTES} to {number * CHUNK_BYTES + len(chunk)} of {shown(entry.path)} "
            "are not the bytes that were signed",
            "they were tampered with or damaged; nothing was loaded. Restore the object from a backup, or "
            "push the adapter again",
        )


def _unreadable(path: Path, why: str) -> RegistryError:
    return RegistryError(f"{path} cannot be read: {why}", "check the file and its permissions")
