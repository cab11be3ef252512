"""How a file or an object is read for a scan: by range, within bounds, and each byte as it was hashed."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from registry.content import CHUNK_BYTES, Content, FileContent, VerifiedContent
from registry.digest import Digest, file_entry
from registry.errors import DigestMismatch, NotFound, RegistryError, ScanRefused, shown
from registry.formats import MAX_WEIGHTS_BYTES
from registry.manifest import WEIGHTS_NAME

if TYPE_CHECKING:
    from registry.storage.base import ObjectStore
    from registry.transfer import Progress

MAX_SMALL_BYTES: Final = 1 << 20
_CACHED_CHUNKS: Final = 8
_MAX_READINGS: Final = 6
"""An object is fetched at most so many times over; an honest file needs two."""

Opener = Callable[[], Content]


class ObjectContent:
    """The bytes of an object, read chunk by chunk; the chunks that were read last are kept.

    Args:
        store: where it is, hostile.
        key: of the object.

    Raises:
        NotFound: there is no such object.
        DigestMismatch: it became shorter while it was read.
        RegistryError: it would be fetched over and over again.
    """

    def __init__(self, store: ObjectStore, key: str) -> None:
        self._store, self._key, self._size = store, key, store.stat(key).size
        self._left = _MAX_READINGS * self._size + _CACHED_CHUNKS * CHUNK_BYTES
        self._kept: OrderedDict[int, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, where: slice, /) -> bytes:
        start, stop, step = where.indices(self._size)
        assert step == 1, "content is read forwards"
        pieces = []
        for number in range(start // CHUNK_BYTES, -(-stop // CHUNK_BYTES) if stop > start else 0):
            origin = number * CHUNK_BYTES
            with self._lock:  # a scan reads from several threads
                chunk = self._chunk(number)
            pieces.append(chunk[max(start - origin, 0) : stop - origin])
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _chunk(self, number: int) -> bytes:
        if number in self._kept:
            self._kept.move_to_end(number)
            return self._kept[number]
        start, stop = number * CHUNK_BYTES, min((number + 1) * CHUNK_BYTES, self._size)
        self._left -= stop - start
        if self._left < 0:
            raise RegistryError(f"{shown(self._key)} is laid out so that it would be fetched again and again")
        data = self._store.read(self._key, start, stop)
        if len(data) != stop - start:
            raise DigestMismatch(
                f"{shown(self._key)} became shorter while it was read",
                "wait until nobody writes to it any more, and try again",
            )
        self._kept[number] = data
        if len(self._kept) > _CACHED_CHUNKS:
            self._kept.popitem(last=False)
        return data


class Metered:
    """Content that tells how much of it was read; a scan reads it twice."""

    def __init__(self, content: Content, progress: Progress) -> None:
        self._content, self._progress, self._done = content, progress, 0

    def __len__(self) -> int:
        return len(self._content)

    def __getitem__(self, where: slice, /) -> bytes:
        data = self._content[where]
        self._done += len(data)
        total = 2 * len(self._content)
        self._progress("scan", min(self._done, total), total)
        return data


@contextmanager
def opened(opener: Opener | None, name: str) -> Iterator[Content]:
    """The content of a file.

    Raises:
        RegistryError: it is no plain file, or cannot be read.
    """
    if opener is None:
        raise RegistryError(f"{shown(name)} is a link or another thing that is no plain file")
    content = opener()
    try:
        yield content
    finally:
        if isinstance(content, FileContent):
            content.close()


@contextmanager
def checked(opener: Opener | None, name: str, progress: Progress) -> Iterator[tuple[Content, Digest]]:
    """The bytes of a weights file, held to the digest that is yielded with them.

    Raises:
        ScanRefused: it is larger than any adapter; it is not even hashed.
        DigestMismatch: it became another one between hashing and judging it.
    """
    with opened(opener, name) as content:
        if len(content) > MAX_WEIGHTS_BYTES:
            raise ScanRefused(
                f"{shown(name)} has {len(content)} bytes; at most {MAX_WEIGHTS_BYTES} are allowed",
                "export it with a smaller rank or fewer targets",
            )
        metered = Metered(content, progress)
        entry = file_entry(WEIGHTS_NAME, metered)
        yield VerifiedContent(metered, entry), entry.sha256


def small(opener: Opener | None, name: str) -> bytes | None:
    """A configuration file; None if there is none."""
    if opener is None:
        return None
    try:
        with opened(opener, name) as content:
            return content[: MAX_SMALL_BYTES + 1]
    except NotFound:
        return None
