"""A mirror archive: a tar file with one spelling, read in place as a store that cannot be written.

Every member is a plain file whose name is the key of an object. There are no links, devices, folders,
extended headers, owners or times, members come in one order, each once, and nothing follows the end: the
header of a member is compared, byte for byte, with the one that we would write. So there is nothing for an
attacker to choose but keys, sizes and bytes; keys are checked here, and bytes by whoever reads them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from registry.content import Content, FileContent, chunks
from registry.errors import DigestMismatch, NotFound, PolicyRefused, UsageError, shown
from registry.formats import MAX_WEIGHTS_BYTES
from registry.manifest import MAX_CARD_BYTES, MAX_MANIFEST_BYTES
from registry.signing.envelope import MAX_ENVELOPE_BYTES
from registry.storage.base import MAX_DOCUMENT_BYTES, ObjectStat, check_key

MAX_MEMBERS: Final = 500_000
LIMITS: Final[Mapping[str, int]] = {
    "trust": MAX_DOCUMENT_BYTES,
    "manifests": MAX_MANIFEST_BYTES,
    "statements": MAX_ENVELOPE_BYTES,
    "blobs": MAX_CARD_BYTES,
    "models": MAX_WEIGHTS_BYTES,
}
"""First part of the keys of members, in their order, and the most bytes that one of them may have."""

_BLOCK: Final = 512
_NAME_BYTES: Final = 100
_END: Final = bytes(2 * _BLOCK)
_KINDS: Final[Mapping[bytes, str]] = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"5": "a folder",
    b"6": "a pipe",
    b"g": "an extended header",
    b"x": "an extended header",
    b"L": "an extended header",
    b"K": "an extended header",
    b"S": "a sparse file",
}
_OCTAL: Final = re.compile(rb"[0-7]{11}\0")
_NAMES: Final = ((0, _NAME_BYTES), (345, 500))
"""Where a header holds the end and the beginning of a name."""


def order(key: str) -> tuple[int, str]:
    """Where a key comes in an archive: what is needed first comes first."""
    return [*LIMITS].index(key.partition("/")[0]), key


class ArchiveWriter:
    """Writes an archive, member by member.

    Args:
        write: takes the pieces of the archive in order, all of each.
    """

    def __init__(self, write: Callable[[bytes], object]) -> None:
        self._write = write

    def add(self, key: str, content: Content, sent: Callable[[int], object] | None = None) -> None:
        """Write a member; keys must come in `order`.

        Args:
            key: the object.
            content: its bytes; a chunk of them is held at a time.
            sent: hears how many more bytes are done.
        """
        self._write(_header(key, len(content)))
        for chunk in chunks(content):
            self._write(chunk)
            if sent is not None:
                sent(len(chunk))
        self._write(bytes(-len(content) % _BLOCK))

    def close(self) -> None:
        """Write the end."""
        self._write(_END)


class ArchiveObjects:
    """An `ObjectStore` that reads from an archive; it is opened once, and looked through completely.

    Args:
        path: the archive.

    Raises:
        NotFound: there is no such file.
        DigestMismatch: it is not one that `ArchiveWriter` wrote.
        PolicyRefused: it has too many members, or one that is too large.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._content = FileContent(path)
        try:
            self._members = dict(_members(self._content))
        except BaseException:
            self._content.close()
            raise

    @property
    def uri(self) -> str:
        """The archive as a ``file://`` URI."""
        return self._path.absolute().as_uri()

    def content(self, key: str) -> Content:
        """The bytes of a member, read in place; hostile.

        Raises:
            NotFound: there is no such member.
        """
        start, size = self._member(key)
        return _Member(self._content, start, size)

    def stat(self, key: str) -> ObjectStat:
        """See `ObjectStore.stat`."""
        return ObjectStat(size=self._member(key)[1], tag=key, modified=datetime.fromtimestamp(0, UTC))

    def read(self, key: str, start: int, stop: int) -> bytes:
        """See `ObjectStore.read`."""
        return self.content(key)[start:stop]

    def put(self, key: str, content: Content, sent: Callable[[int], None] | None = None) -> bool:
        """Refused: an archive is read only.

        Raises:
            UsageError: always.
        """
        raise UsageError(f"{key} cannot be written into an archive", "export a new one")

    def replace(self, key: str, data: bytes, tag: str | None) -> None:
        """Refused: an archive is read only.

        Raises:
            UsageError: always.
        """
        self.put(key, data)

    def keys(self, prefix: str) -> Iterator[str]:
        """See `ObjectStore.keys`."""
        return (key for key in self._members if key.startswith(prefix))

    def delete(self, key: str) -> None:
        """Refused: an archive is read only.

        Raises:
            UsageError: always.
        """
        self.put(key, b"")

    def close(self) -> None:
        """Give the file back."""
        self._content.close()

    def _member(self, key: str) -> tuple[int, int]:
        try:
            return self._members[key]
        except KeyError:
            raise NotFound(f"the archive {self._path} has no {shown(key)}", "export it again") from None


class _Member:
    """A part of an archive."""

    def __init__(self, archive: Content, start: int, size: int) -> None:
        self._archive, self._start, self._size = archive, start, size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, where: slice, /) -> bytes:
        start, stop, step = where.indices(self._size)
        assert step == 1, "content is read forwards"
        return self._archive[self._start + start : self._start + max(start, stop)]


def _members(content: Content) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield the key of each member, where its bytes begin and how many they are."""
    at, last = 0, (-1, "")
    for _ in range(MAX_MEMBERS + 1):
        header = content[at : at + _BLOCK]
        if header == bytes(_BLOCK):
            if content[at : at + len(_END) + 1] != _END or at == 0:
                raise _foreign("something is behind its end" if at else "it is empty")
            return
        key, size = _parse(header)
        place = order(key)
        if place <= last:
            raise _foreign(f"{shown(key)} is there twice, or in the wrong place")
        last, start = place, at + _BLOCK
        at = start + size + -size % _BLOCK
        if any(content[start + size : at]):
            raise _foreign(f"something is hidden behind {shown(key)}")
        yield key, (start, size)
    raise PolicyRefused(f"the archive has more than {MAX_MEMBERS} members", "export fewer adapters at once")


def _parse(header: bytes) -> tuple[str, int]:
    """The key and size that a header names, if it is spelled as we would."""
    if len(header) != _BLOCK or header[257:263] != b"ustar\0":
        raise _foreign("it is no tar file, or is cut off")
    kind, octal = header[156:157], header[124:136]
    if kind != b"0":
        raise _foreign(f"it holds {_KINDS.get(kind, 'something that is no plain file')}")
    try:
        name, prefix = (header[start:stop].rstrip(b"\0").decode("ascii") for start, stop in _NAMES)
        key = check_key(f"{prefix}/{name}" if prefix else name)
    except (UnicodeDecodeError, UsageError):
        raise _foreign(f"a member is called {shown(header[:100].rstrip(bytes(1)))}") from None
    limit = LIMITS.get(key.partition("/")[0])
    if limit is None:
        raise _foreign(f"{shown(key)} does not belong into a mirror archive")
    if not _OCTAL.fullmatch(octal):
        raise _foreign(f"{shown(key)} has no size")
    size = int(octal[:-1], 8)
    if size > limit:
        raise PolicyRefused(
            f"{shown(key)} in the archive has {size} bytes, more than the limit of {limit}",
            "this is not what a registry holds; ask who exported it",
        )
    if header != _header(key, size):
        raise _foreign(f"the header of {shown(key)} is not spelled as an export spells it")
    return key, size


def _header(key: str, size: int) -> bytes:
    """The ustar header of a member (POSIX.1-1988): mode 0444, nobody's, of no time."""
    name, prefix = check_key(key).encode("ascii"), b""
    if len(name) > _NAME_BYTES:
        cut = name.index(b"/", len(name) - _NAME_BYTES - 1)
        prefix, name = name[:cut], name[cut + 1 :]
    owner, device, time = b"0000000\0" * 2, b"0000000\0" * 2, b"%011o\0" % 0
    before = b"%b0000444\0%b%011o\0%b" % (name.ljust(_NAME_BYTES, b"\0"), owner, size, time)
    after = b"0%bustar\00000%b%b%b" % (bytes(100), bytes(64), device, prefix.ljust(155, b"\0")) + bytes(12)
    # The sum counts itself as eight spaces.
    return before + b"%06o\0 " % (sum(before) + sum(after) + 8 * 32) + after


def _foreign(why: str) -> DigestMismatch:
    return DigestMismatch(
        f"this is no archive that `registry mirror export` wrote: {why}",
        mend="it was tampered with or damaged, and nothing of it was taken; export it again",
    )
