"""Cleaning up: what no signed name needs any more goes, from the store and from this machine's cache.

Mark and sweep over the store. Marked is what signed versions and aliases name: their manifests, files, MLflow
model directories and statements, also of revoked and yanked versions. Only the four kinds of objects that a
push writes are ever swept; trust metadata and whatever else lies in the store are not even looked at. What is
younger than the grace period stays, because a push writes its files before it signs their name.

Signed names are read twice, before the marking and right before the sweep, so that a push that ends while
the marking goes on keeps its objects. One window is left: an old object that nobody named, which a push takes
up in the very second in which it is swept. A push looks at its end whether its files are still there and
sends them again; if that look came too early, the clean-up finds it by a third look at the signed names and
says so, and the same push again heals the version.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final

from registry.cache import AdapterCache
from registry.digest import Digest
from registry.errors import Conflict, DigestMismatch, InvalidDocument, NotFound, RegistryError
from registry.manifest import WEIGHTS_NAME, AdapterManifest
from registry.parallel import each
from registry.signing.signers import ONLINE
from registry.storage import shelf
from registry.storage.base import (
    Abandoned,
    Housekeeping,
    ObjectStore,
    file_key,
    manifest_key,
    model_prefix,
    statements_prefix,
)

if TYPE_CHECKING:
    from registry.client import Registry
    from registry.signing.trust import TrustState

GRACE: Final = timedelta(hours=24)
SWEPT: Final = ("blobs/", "manifests/", "models/", "statements/")
"""Beginnings of the keys of objects that a clean-up may remove."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Garbage:
    """Something that nothing names any more.

    Attributes:
        key: the object, or the file of an unfinished write.
        size: bytes.
    """

    key: str
    size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class CleanUp:
    """What a clean-up of the store removed, or would remove.

    Attributes:
        objects: objects that nothing names.
        unfinished: writes that somebody began and did not end.
        reachable: how many objects are named.
        young: how many objects nothing names yet, younger than the grace period.
        dry_run: nothing was removed.
    """

    objects: tuple[Garbage, ...]
    unfinished: tuple[Garbage, ...]
    reachable: int
    young: int
    dry_run: bool

    @property
    def size(self) -> int:
        """Bytes of all of it."""
        return sum(found.size for found in (*self.objects, *self.unfinished))


@dataclass(frozen=True, kw_only=True, slots=True)
class Pruned:
    """What was removed from this machine's cache, or would be.

    Attributes:
        removed: what, and how many bytes each had.
        size: bytes of all of it.
        kept: bytes that are still there.
        dry_run: nothing was removed.
    """

    removed: Mapping[str, int]
    kept: int
    dry_run: bool

    @property
    def size(self) -> int:
        """Bytes of all that was removed."""
        return sum(self.removed.values())


def clean(
    registry: Registry,
    grace: timedelta = GRACE,
    *,
    dry_run: bool = False,
    revoked: bool = False,
    partial: bool = False,
) -> CleanUp:
    """Remove from the store what no signed name needs; see above.

    Args:
        registry: the registry.
        grace: what was written so short a time ago stays.
        dry_run: look only.
        revoked: files that only revoked versions name go as well; their manifests and statements stay, as
            evidence and because they are small.
        partial: the store is a mirror of some versions: a manifest that is not there names nothing.

    Raises:
        Conflict: a push has taken up an object while it was swept; the same push again heals its version.
        NotFound, DigestMismatch, InvalidDocument: the manifest of a signed version is not in the store, so
            that nobody knows which files it names; nothing was removed.
        RegistryError: see the error tree.
    """
    store, before = registry.store, datetime.now(UTC) - grace
    marked = _Marked(store, revoked=revoked, partial=partial)
    marked.add(_fresh_state(registry))
    candidates, reachable, young = [], 0, 0
    for prefix in SWEPT:
        for key in store.keys(prefix):
            if marked.names(key):
                reachable += 1
                continue
            with contextlib.suppress(NotFound):  # another clean-up was faster
                found = store.stat(key)
                if found.modified >= before:
                    young += 1
                else:
                    candidates.append(Garbage(key=key, size=found.size))
    unfinished = store.abandoned(before) if isinstance(store, Housekeeping) else []
    if not dry_run and (candidates or unfinished):
        _note(registry, candidates, unfinished)
        # Whoever signed a name since the marking keeps what it means.
        marked.add(_fresh_state(registry))
        candidates = [found for found in candidates if not marked.names(found.key)]
        each(lambda found: store.delete(found.key), candidates)
        _check_swept(registry, marked, candidates)
        _abort(store, unfinished)
    return CleanUp(
        objects=tuple(candidates),
        unfinished=tuple(Garbage(key=found.key, size=found.size) for found in unfinished),
        reachable=reachable,
        young=young,
        dry_run=dry_run,
    )


class _Marked:
    """What signed names mean in a store."""

    def __init__(self, store: ObjectStore, *, revoked: bool, partial: bool) -> None:
        self._store, self._revoked, self._partial = store, revoked, partial
        self._roots: set[str] = set()
        self._read: dict[Digest, AdapterManifest] = {}

    def add(self, state: TrustState) -> None:
        """Mark what a state names, besides what was marked before.

        Raises:
            RegistryError: a manifest cannot be read.
        """
        signed = {target.digest for target in (*state.versions().values(), *state.aliases().values())}
        each(self._load, sorted(signed - self._read.keys()))
        for digest in signed & self._read.keys():
            manifest = self._read[digest]
            self._roots |= {manifest_key(digest), statements_prefix(digest)}
            weights = manifest.file(WEIGHTS_NAME)
            withdrawn = state.is_revoked(digest) or state.is_revoked(weights.sha256)
            if withdrawn is None or not self._revoked:
                self._roots |= {_root(file_key(entry)) for entry in manifest.files}
                self._roots.add(model_prefix(weights))

    def names(self, key: str) -> bool:
        """Whether an object is named."""
        return _root(key) in self._roots

    def _load(self, digest: Digest) -> None:
        try:
            self._read[digest] = shelf.read_manifest(self._store, digest)
        except (NotFound, DigestMismatch, InvalidDocument) as error:
            if self._partial and isinstance(error, NotFound):
                return
            mend = "nothing was removed; `registry doctor` shows what is missing"
            raise type(error)(
                f"it is not known what a signed version needs: {error.message}", mend
            ) from error


def unnamed(registry: Registry, keys: Sequence[str]) -> list[str]:
    """Return those of some keys that nothing signed needs now.

    Raises:
        RegistryError: the trust metadata or a manifest that is signed cannot be read.
    """
    if not keys:
        return []
    marked = _Marked(registry.store, revoked=False, partial=False)
    marked.add(_fresh_state(registry))
    return [key for key in keys if not marked.names(key)]


def _check_swept(registry: Registry, marked: _Marked, swept: list[Garbage]) -> None:
    """Look whether somebody has signed a name meanwhile for something that was just removed."""
    lost = "a manifest"
    with contextlib.suppress(NotFound):
        marked.add(_fresh_state(registry))
        lost = next((found.key for found in swept if marked.names(found.key) and _gone(registry, found)), "")
    if lost:
        raise Conflict(
            f"a push has taken up {lost} while it was swept",
            "push the same folder again: it heals the version; `registry doctor` shows which one it is",
        )


def _gone(registry: Registry, found: Garbage) -> bool:
    try:
        registry.store.stat(found.key)
    except NotFound:
        return True
    return False


def _root(key: str) -> str:
    """The folder that is kept or swept whole, or the object itself."""
    kind, _, rest = key.partition("/")
    return f"{kind}/{rest.partition('/')[0]}/" if kind in ("models", "statements") else key


def _fresh_state(registry: Registry) -> TrustState:
    """What is signed now; not what this machine remembers."""
    from registry.signing.refresh import TrustClient

    state = registry.authority.state()
    return TrustClient(registry.store, registry.place.trust).refresh() if state.remembered else state


def _note(registry: Registry, objects: list[Garbage], unfinished: list[Abandoned]) -> None:
    """Write it into the audit log, if this machine keeps one: the log belongs to whoever signs.

    A mirror or a reader has none, and must not begin one that nobody anchors.
    """
    if not (registry.keys.holds(ONLINE) or registry.ledger.head().length):
        return
    size = sum(found.size for found in objects) + sum(found.size for found in unfinished)
    details = {"objects": len(objects), "unfinished": len(unfinished), "bytes": size}
    registry.record("gc", registry.store.uri, details)
    registry.authority.publish_anchor()


def _abort(store: ObjectStore, unfinished: list[Abandoned]) -> None:
    if isinstance(store, Housekeeping):
        for found in unfinished:
            store.abort(found)


def prune(
    registry: Registry, keep: int | None = None, grace: timedelta = GRACE, *, dry_run: bool = False
) -> Pruned:
    """Remove from this machine's cache what no signed name means, what was revoked, and old leftovers.

    An adapter that somebody is pulling at this moment is left alone.

    Args:
        registry: the registry.
        keep: if more bytes than these are left, the adapters that were verified longest ago go too.
        grace: what a pull has begun to fetch so short a time ago stays.
        dry_run: look only.

    Raises:
        RegistryError: the cache cannot be read, or the trust metadata cannot be verified.
    """
    state, folder = registry.authority.state(), registry.place.cache
    cache, before = AdapterCache(folder), datetime.now(UTC) - grace
    named = {target.digest for target in (*state.versions().values(), *state.aliases().values())}
    sizes = {digest: _looked_at(cache.path(digest))[0] for digest in cached(folder / "sha256")}
    gone = {digest: size for digest, size in sizes.items() if digest not in named or state.is_revoked(digest)}
    left = {digest: size for digest, size in sizes.items() if digest not in gone}
    for digest in sorted(left, key=lambda found: _last_verified(folder, found)):
        if keep is not None and sum(left.values()) > keep:
            gone[digest] = left.pop(digest)
    removed = {}
    for digest, size in gone.items():
        with cache.unless_pulled(digest) as free:
            if free:
                removed[str(digest)] = size
                if not dry_run:
                    cache.forget(digest)
    for digest in cached(folder / "incoming"):
        path = folder / "incoming" / digest.hex
        with cache.unless_pulled(digest) as free:
            size, newest = _looked_at(path) if free else (0, None)
            if newest is not None and newest < before.timestamp():
                removed[f"incoming {digest}"] = size
                if not dry_run:
                    shutil.rmtree(path, ignore_errors=True)
    return Pruned(removed=removed, kept=sum(left.values()), dry_run=dry_run)


def cached(folder: Path) -> Iterator[Digest]:
    """The digests whose folders lie in a folder of the cache."""
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        return
    except OSError as error:
        raise RegistryError(f"{folder} cannot be read: {error.strerror}", "check its permissions") from error
    for name in names:
        with contextlib.suppress(ValueError):  # a lock, or nothing of ours
            yield Digest(f"sha256:{name}")


def _looked_at(folder: Path) -> tuple[int, float | None]:
    """Bytes of the files in a folder, and when something of it was touched last; None if it is gone.

    A pull may move or remove any of it meanwhile.
    """
    try:
        names = os.listdir(folder)
    except OSError:
        names = []
    found = []
    for path in (folder, *(folder / name for name in names)):
        with contextlib.suppress(FileNotFoundError):
            found.append(path.lstat())
    size = sum(status.st_size for status in found if stat.S_ISREG(status.st_mode))
    return size, max((status.st_mtime for status in found), default=None)


def _last_verified(folder: Path, digest: Digest) -> tuple[float, str]:
    """When an adapter was verified last; one without a receipt comes first."""
    try:
        return (folder / "receipts" / f"{digest.hex}.json").lstat().st_mtime, digest
    except OSError:
        return 0.0, digest
