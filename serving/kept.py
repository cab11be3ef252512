"""Admitted versions in memory, and the room that they may take there."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from registry.digest import Digest
    from registry.reference import Reference
    from serving.versions import Version

_Key = tuple["Digest", str, str | None]
"""What was admitted, as which adapter, and for which alias; None is for versions and digests.

Each alias has a gate of its own, so what was admitted for one is not thereby admitted for another.
"""


class Kept:
    """Versions by what they were admitted for, the one that was used longest ago first; for one thread.

    Args:
        memory: bytes that versions may take that nobody follows.
        limit: how many of them there may be.
    """

    def __init__(self, memory: int, limit: int) -> None:
        self._memory = memory
        self._limit = limit
        self._versions: OrderedDict[_Key, Version] = OrderedDict()

    def get(self, digest: Digest, reference: Reference) -> Version | None:
        """Return what was admitted under a digest for a reference."""
        return self._versions.get(_key(digest, reference))

    def put(self, version: Version, reference: Reference) -> None:
        """Keep a version that was admitted for a reference."""
        self._versions[_key(version.digest, reference)] = version

    def touch(self, version: Version, reference: Reference) -> None:
        """Note that a version is wanted; no error if it is not kept any more."""
        key = _key(version.digest, reference)
        if key in self._versions:
            self._versions.move_to_end(key)

    def drop(self, digest: Digest, reference: Reference) -> None:
        """Forget a version; no error if it is not kept."""
        self._versions.pop(_key(digest, reference), None)

    def with_digest(self, digest: Digest) -> Version | None:
        """Return a version with a digest, whatever it was admitted for."""
        return next((version for version in self._versions.values() if version.digest == digest), None)

    def make_room(self, followed: Collection[Version]) -> list[Version]:
        """Forget what is too much, the newest one never, and return it.

        Args:
            followed: versions that are served to who follows them: they stay and do not count.
        """
        served = {version.digest for version in followed}
        others = [key for key, version in self._versions.items() if version.digest not in served]
        gone = []
        while len(others) > 1 and (len(others) > self._limit or self._size(others) > self._memory):
            gone.append(self._versions.pop(others.pop(0)))
        return gone

    def _size(self, keys: Collection[_Key]) -> int:
        """Bytes of some versions; those of one digest share them."""
        return sum({key[0]: self._versions[key].size for key in keys}.values())


def _key(digest: Digest, reference: Reference) -> _Key:
    return digest, reference.name, reference.alias
