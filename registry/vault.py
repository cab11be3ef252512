"""A place for backups: a folder or a bucket with objects under their sha256, and a manifest for each backup.

Nothing in it is ever changed. A backup that was killed has no manifest, so that nobody takes it for a whole
one; what it has copied already the next one finds there.
"""

from __future__ import annotations

import hashlib
import json
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from registry.content import Content, chunks
from registry.digest import Digest, digest_bytes, digest_content
from registry.errors import Conflict, DigestMismatch, InvalidDocument, NotFound, UsageError, shown
from registry.storage.base import ObjectStore, check_key, read

OBJECTS: Final = "objects/"
BACKUPS: Final = "backups/"
KEYS: Final = "registry/keys/"
POLICY: Final = "registry/policy.toml"
HOME_FILES: Final = (
    "adapter-foundry.toml",
    POLICY,
    "serving/keys.json",
    "reviews/decisions.jsonl",
)
"""Files of the data folder that people made, besides private keys; a restore writes no others."""
PINNED: Final = "trust/pinned.root.json"
MAX_MANIFEST_BYTES: Final = 512 << 20
"""A hundred thousand adapters take a fifth of it."""
MEND: Final = "the backup was changed or damaged: take another one, `registry backup --verify` finds one"


class Kept(BaseModel):
    """Bytes of a backup.

    Attributes:
        path: what they are: a key of the store, a file of the data folder, or the name of a database.
        size: bytes.
        sha256: their digest; names them in the backup place.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    path: Annotated[str, Field(min_length=1, max_length=1024)]
    size: Annotated[int, Field(ge=0, le=1 << 50)]
    sha256: Digest


class Dump(Kept):
    """A database of a backup.

    Attributes:
        kind: SQLite's own file, or a dump of pg_dump in its custom format.
        major: PostgreSQL's version; 0 for SQLite.
    """

    kind: Literal["sqlite", "postgresql"]
    major: Annotated[int, Field(ge=0, le=99)]


class Manifest(BaseModel):
    """What a backup holds.

    Attributes:
        format: of this file.
        time: the moment of the trust metadata, UTC, ISO 8601.
        store: URI of the store that was copied.
        root: digest of the root that was pinned.
        trust: trust metadata, by their keys in the store.
        objects: what these name, by their keys in the store.
        files: of the data folder.
        databases: by their names.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal["adapter-foundry/backup/1"] = "adapter-foundry/backup/1"
    time: Annotated[str, Field(max_length=40)]
    store: Annotated[str, Field(max_length=2048)]
    root: Digest
    trust: Annotated[tuple[Kept, ...], Field(strict=False)]
    objects: Annotated[tuple[Kept, ...], Field(strict=False)]
    files: Annotated[tuple[Kept, ...], Field(strict=False)]
    databases: Annotated[tuple[Dump, ...], Field(strict=False)]

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Read a manifest, and refuse names that could lead anywhere else.

        Raises:
            InvalidDocument: it is none.
        """
        try:
            found = cls.model_validate(json.loads(data))
            for kept in (*found.trust, *found.objects, *found.files, *found.databases):
                check_key(kept.path)
        except (ValueError, RecursionError, ValidationError, UsageError) as error:
            reason = shown(str(error).partition("\n")[0])
            raise InvalidDocument(f"the manifest of the backup is none: {reason}", MEND) from None
        strange = [kept.path for kept in found.trust if not kept.path.startswith("trust/")]
        strange += [kept.path for kept in found.objects if kept.path.startswith("trust/")]
        strange += [kept.path for kept in found.files if not is_file_of_home(kept.path)]
        names = [kept.path for kept in (*found.trust, *found.objects, *found.files)]
        twice = len(set(names)) < len(names)
        if strange or twice or len({dump.path for dump in found.databases}) < len(found.databases):
            what = shown(strange[0]) if strange else "something twice"
            raise InvalidDocument(f"the manifest of the backup names {what}, which no backup holds", MEND)
        return found

    def everything(self) -> tuple[Kept, ...]:
        """All that the backup holds."""
        return (*self.trust, *self.objects, *self.files, *self.databases)


def is_file_of_home(path: str) -> bool:
    """Whether a backup may hold a file of the data folder."""
    inner = path.removeprefix(KEYS)
    return path in HOME_FILES or path == PINNED or (inner != path and "/" not in inner)


class Vault:
    """A place for backups: an object store of its own, in which nothing is ever changed.

    Args:
        store: the place.
    """

    def __init__(self, store: ObjectStore) -> None:
        self.store = store
        self.written = 0
        self._there: set[str] | None = None
        self._lock = threading.Lock()

    @classmethod
    def open(cls, place: str) -> Vault:
        """The place that a folder or ``s3://bucket/prefix`` names."""
        from registry.storage.stores import open_store

        return cls(open_store(place if "://" in place else Path(place).expanduser().absolute().as_uri()))

    def keep(self, path: str, content: Content, sha256: Digest) -> Kept:
        """Take bytes in, unless they are there already."""
        key = _key(sha256)
        with self._lock:
            if self._there is None:
                self._there = set(self.store.keys(OBJECTS))
            known = key in self._there
        if not known and self.store.put(key, content):
            with self._lock:
                self.written += len(content)
                self._there.add(key)
        return Kept(path=path, size=len(content), sha256=sha256)

    def holds(self, sha256: Digest) -> bool:
        """Whether bytes were taken in by an earlier `keep` or backup."""
        with self._lock:
            if self._there is None:
                self._there = set(self.store.keys(OBJECTS))
            return _key(sha256) in self._there

    def content(self, kept: Kept) -> Content:
        """Bytes of a backup as they lie there: hostile."""
        return Stored(self.store, _key(kept.sha256), kept.size)

    def read(self, kept: Kept, limit: int = MAX_MANIFEST_BYTES) -> bytes:
        """Return bytes of a backup, verified.

        Raises:
            DigestMismatch: they were changed.
        """
        if kept.size > limit:
            raise DigestMismatch(f"{kept.path} has {kept.size} bytes, more than it may have", MEND)
        data = self.store.read(_key(kept.sha256), 0, kept.size + 1)
        if digest_bytes(data) != kept.sha256:
            raise _changed(kept)
        return data

    def write(self, kept: Kept, target: Path) -> None:
        """Write bytes of a backup into a new file, verified.

        Raises:
            DigestMismatch: they were changed; what was written of the file is gone again.
        """
        digester = hashlib.sha256()
        with target.open("xb") as stream:
            for chunk in chunks(self.content(kept)):
                digester.update(chunk)
                stream.write(chunk)
        if f"sha256:{digester.hexdigest()}" != kept.sha256:
            target.unlink()
            raise _changed(kept)

    def check(self, kept: Kept) -> None:
        """Read bytes of a backup and compare them with their digest.

        Raises:
            NotFound, DigestMismatch: they are gone or were changed.
        """
        if self.store.stat(_key(kept.sha256)).size != kept.size:
            raise _changed(kept)
        if digest_content(self.content(kept)) != kept.sha256:
            raise _changed(kept)

    def finish(self, manifest: Manifest) -> tuple[str, Digest]:
        """Write the manifest, by which everything that was kept becomes a backup; return name and digest."""
        data = json.dumps(manifest.model_dump(), separators=(",", ":"), sort_keys=True).encode()
        name = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
        if not self.store.put(f"{BACKUPS}{name}.json", data):
            raise Conflict("another backup ended in the same moment", "run the same command again")
        return name, digest_bytes(data)

    def names(self) -> list[str]:
        """The backups that are whole, oldest first."""
        keys = sorted(self.store.keys(BACKUPS))
        return [key.removeprefix(BACKUPS).removesuffix(".json") for key in keys if key.endswith(".json")]

    def manifest(self, name: str | None = None) -> tuple[str, Manifest, Digest]:
        """Return name, manifest and digest of the manifest of a backup; of the newest one for None.

        Raises:
            NotFound: there is no such backup.
            InvalidDocument: its manifest was changed.
        """
        names = self.names()
        if not names or (name is not None and name not in names):
            have = f"; there are {', '.join(names[-5:])}" if names else ""
            raise NotFound(
                f"there is no {'whole backup' if name is None else f'backup {shown(name)}'} in "
                f"{self.store.uri}{have}",
                "a backup that was interrupted counts for nothing: make another one with `registry backup`",
            )
        chosen = names[-1] if name is None else name
        data = read(self.store, f"{BACKUPS}{chosen}.json", MAX_MANIFEST_BYTES)
        return chosen, Manifest.parse(data), digest_bytes(data)


class Stored:
    """Bytes of an object in a store, by range.

    Args:
        store: that has it.
        key: of the object.
        size: in bytes.
    """

    def __init__(self, store: ObjectStore, key: str, size: int) -> None:
        self._store, self._key, self._size = store, key, size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, where: slice, /) -> bytes:
        start, stop, _ = where.indices(self._size)
        return self._store.read(self._key, start, stop) if start < stop else b""


def _key(sha256: Digest) -> str:
    return f"{OBJECTS}{sha256.hex[:2]}/{sha256.hex}"


def _changed(kept: Kept) -> DigestMismatch:
    return DigestMismatch(f"{shown(kept.path)} in the backup is not what was kept there", MEND)
