"""Objects in a folder: the store of the embedded default.

A file appears under its key only when it is complete and flushed to the disk. Objects are read-only files,
so that an accident does not change them; that is no protection against an attacker, and none is claimed:
signatures are.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from registry.content import Content, chunks
from registry.errors import Conflict, DigestMismatch, NotFound, RegistryError
from registry.storage.base import Abandoned, ObjectStat, check_key

_OBJECT_MODE = 0o444
_UNFINISHED = ".incoming-"


class LocalObjects:
    """An `ObjectStore` in a folder of this machine."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()

    @property
    def uri(self) -> str:
        """The folder as a ``file://`` URI."""
        return self._folder.as_uri()

    def path(self, key: str) -> Path:
        """The file that holds an object."""
        return self._folder / check_key(key)

    def stat(self, key: str) -> ObjectStat:
        """See `ObjectStore.stat`. Every replacement is a new file, so its number and time are its tag."""
        with self._opened(key) as descriptor:
            status = os.fstat(descriptor)
        tag = f"{status.st_ino}-{status.st_mtime_ns}-{status.st_size}"
        modified = datetime.fromtimestamp(status.st_mtime, UTC)
        return ObjectStat(size=status.st_size, tag=tag, modified=modified)

    def read(self, key: str, start: int, stop: int) -> bytes:
        """See `ObjectStore.read`."""
        pieces = []
        with self._opened(key) as descriptor:
            while start < stop and (piece := os.pread(descriptor, stop - start, start)):
                pieces.append(piece)
                start += len(piece)
        return b"".join(pieces)

    def put(self, key: str, content: Content, sent: Callable[[int], None] | None = None) -> bool:
        """See `ObjectStore.put`."""
        target = self.path(key)
        if target.exists():
            return False
        with _temporary(target) as (temporary, stream):
            for chunk in chunks(content):
                stream.write(chunk)
                if sent is not None:
                    sent(len(chunk))
            _flush(stream)
            try:
                # A link fails if the name exists, where a rename would silently replace it.
                os.link(temporary, target)
            except FileExistsError:
                return False
        _flush_folder(target.parent)
        return True

    def replace(self, key: str, data: bytes, tag: str | None) -> None:
        """See `ObjectStore.replace`."""
        target = self.path(key)
        with _temporary(target) as (temporary, stream), self._alone():
            try:
                found = self.stat(key).tag
            except NotFound:
                found = None
            if found != tag:
                raise Conflict(f"somebody else has just replaced {key}", "run the same command again")
            stream.write(data)
            _flush(stream)
            os.replace(temporary, target)
        _flush_folder(target.parent)

    def keys(self, prefix: str) -> Iterator[str]:
        """See `ObjectStore.keys`; files that are still being written are left out."""
        # Only the folder that the prefix names is walked, not the whole store.
        folder = self._folder / prefix.rpartition("/")[0]
        found = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
        for key in sorted(path.relative_to(self._folder).as_posix() for path in found):
            if key.startswith(prefix):
                yield key

    def delete(self, key: str) -> None:
        """See `ObjectStore.delete`."""
        try:
            self.path(key).unlink(missing_ok=True)
        except OSError as error:
            raise _io_error(f"the object {key} cannot be deleted", error) from error

    def clock(self) -> datetime | None:
        """See `Housekeeping.clock`: a folder has no clock of its own."""
        return None

    def abandoned(self, before: datetime) -> list[Abandoned]:
        """See `Housekeeping.abandoned`: the hidden files that killed processes have left."""
        found = []
        for path in sorted(self._folder.rglob(f"{_UNFINISHED}*")):
            try:
                status = path.lstat()
            except FileNotFoundError:
                continue  # its writer has just ended
            if status.st_mtime < before.timestamp():
                key = path.relative_to(self._folder).as_posix()
                found.append(Abandoned(key=key, identity=path.name, size=status.st_size))
        return found

    def abort(self, unfinished: Abandoned) -> None:
        """See `Housekeeping.abort`."""
        path = self._folder / unfinished.key
        if path.name != unfinished.identity or not path.name.startswith(_UNFINISHED):
            return
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise _io_error(f"{path} cannot be removed", error) from error

    @contextlib.contextmanager
    def _opened(self, key: str) -> Iterator[int]:
        """A descriptor of an object. Symbolic links are not followed: a store holds files only."""
        try:
            descriptor = os.open(self.path(key), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            raise NotFound(
                f"the store has no object {key}", mend=f"is {self.uri} the right store, and is it complete?"
            ) from None
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise DigestMismatch(
                    f"the object {key} is a symbolic link, and links are not followed",
                    mend="somebody changed the store; put the object back, or push the adapter again",
                ) from None
            raise _io_error(f"the object {key} cannot be read", error) from error
        try:
            yield descriptor
        except OSError as error:
            raise _io_error(f"the object {key} cannot be read", error) from error
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Lets one writer at a time compare and replace."""
        with (self._folder / ".lock").open("a") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield


@contextlib.contextmanager
def _temporary(target: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """A hidden file beside the target that is gone afterwards, whatever happened."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=_UNFINISHED, delete=False) as stream:
            try:
                os.fchmod(stream.fileno(), _OBJECT_MODE)
                yield stream.name, stream.file
            finally:
                Path(stream.name).unlink(missing_ok=True)
    except OSError as error:
        raise _io_error(f"{target} cannot be written", error) from error


def _flush(stream: IO[bytes]) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def _flush_folder(folder: Path) -> None:
    """Makes a new name in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _io_error(what: str, error: OSError) -> RegistryError:
    return RegistryError(
        f"{what}: {error.strerror or error}", mend="check the disk and the permissions of the folder"
    )
