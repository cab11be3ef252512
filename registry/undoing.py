"""What a publication that failed has written: noted while it is written, and removed when it fails.

A push that fails can always be repeated, and takes up what it finds; `registry gc` removes what nobody takes
up. Who publishes by machine may not want to leave that for a day. What is removed is what this very push has
written and no signed name needs: another push of the same bytes may have been faster. One that finds such an
object and names it in the very second in which it is removed sends it again at its end, as after a `gc`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from registry.errors import NotFound, RegistryError
from registry.upkeep import SWEPT, unnamed

if TYPE_CHECKING:
    from registry.client import Registry
    from registry.content import Content
    from registry.storage.base import ObjectStat, ObjectStore

_logger = logging.getLogger(__name__)


class NotingStore:
    """A store that notes which objects are new; see `registry.storage.base.ObjectStore`.

    Attributes:
        written: keys in the order in which they were written.
    """

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self.written: list[str] = []

    @property
    def uri(self) -> str:
        """See `ObjectStore.uri`."""
        return self._store.uri

    def stat(self, key: str) -> ObjectStat:
        """See `ObjectStore.stat`."""
        return self._store.stat(key)

    def read(self, key: str, start: int, stop: int) -> bytes:
        """See `ObjectStore.read`."""
        return self._store.read(key, start, stop)

    def put(self, key: str, content: Content, sent: Callable[[int], None] | None = None) -> bool:
        """See `ObjectStore.put`; noted before, for a write may have happened though its answer was lost."""
        try:
            self._store.stat(key)
        except NotFound:
            self.written.append(key)
        return self._store.put(key, content, sent)

    def replace(self, key: str, data: bytes, tag: str | None) -> None:
        """See `ObjectStore.replace`."""
        self._store.replace(key, data, tag)

    def keys(self, prefix: str) -> Iterator[str]:
        """See `ObjectStore.keys`."""
        return self._store.keys(prefix)

    def delete(self, key: str) -> None:
        """See `ObjectStore.delete`."""
        self._store.delete(key)


@contextlib.contextmanager
def undone_if_it_fails(registry: Registry) -> Iterator[None]:
    """Remove what is written in this block if it ends with an error; a block that is cancelled can go on.

    What cannot be removed, because the store does not answer either, is logged and left for `registry gc`.
    """
    # The authority keeps the store as it is: trust metadata are never undone.
    store = registry.authority.store
    registry.store = noting = NotingStore(store)
    try:
        yield
    except Exception:
        registry.store = store
        _remove(registry, noting.written)
        raise
    finally:
        registry.store = store


def _remove(registry: Registry, written: list[str]) -> None:
    keys = [key for key in written if key.startswith(SWEPT)]
    try:
        for key in unnamed(registry, keys):
            registry.store.delete(key)
    except RegistryError as error:
        _logger.warning("what a failed push has written stays until `registry gc`: %s", error.message)
