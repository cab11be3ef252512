"""Adapters that this machine has pulled, by the digest of their manifest.

    <cache>/sha256/<manifest hex>/     manifest.json, adapter.json and the weights; whole or not there at all
    <cache>/incoming/<manifest hex>/   what a pull is putting together; private, and found again after a kill
    <cache>/receipts/<manifest hex>.json   what the files looked like when they were verified
    <cache>/receipts/<manifest hex>.statements.json   the envelopes by which it was admitted

A cached file is never believed by whoever loads it: loading runs admission over the very bytes it uses. A
receipt only saves `registry pull` from reading 850 MB again to say that nothing changed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import stat
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from registry.content import FileContent
from registry.digest import Digest
from registry.errors import NetworkError, NotFound, RegistryError, UsageError
from registry.manifest import CARD_NAME, MAX_CARD_BYTES, MAX_MANIFEST_BYTES, WEIGHTS_NAME

MANIFEST_NAME: Final = "manifest.json"
FILE_NAMES: Final = (MANIFEST_NAME, CARD_NAME, WEIGHTS_NAME)
"""What the folder of an adapter holds."""
_MAX_RECEIPT_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Documents:
    """The small files of a cached adapter, as hostile bytes.

    Attributes:
        manifest: the manifest.
        card: the adapter card.
    """

    manifest: bytes
    card: bytes


class AdapterCache:
    """A folder of pulled adapters.

    Args:
        folder: where it is; made when something is kept.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()

    def path(self, digest: Digest) -> Path:
        """Where an adapter is kept, whether or not it is there."""
        return self._folder / "sha256" / digest.hex

    def read_documents(self, digest: Digest) -> Documents | None:
        """Returns the small files of an adapter, unverified; None unless all of it is there.

        Raises:
            RegistryError: the cache cannot be read, or somebody else could write to it.
        """
        try:
            self._check_folders("sha256", digest)
            with self.content(digest, WEIGHTS_NAME):
                return Documents(
                    manifest=self._small(digest, MANIFEST_NAME, MAX_MANIFEST_BYTES),
                    card=self._small(digest, CARD_NAME, MAX_CARD_BYTES),
                )
        except (FileNotFoundError, NotFound):
            return None
        except OSError as error:
            raise _cannot(self.path(digest), error) from error

    def content(self, digest: Digest, name: str) -> FileContent:
        """Opens a file of an adapter; its bytes are hostile.

        Raises:
            NotFound: it is not there.
            RegistryError: it cannot be read, or is no plain file.
        """
        return FileContent(self.path(digest) / name)

    @contextlib.contextmanager
    def incoming(self, digest: Digest) -> Iterator[Path]:
        """Gives the private folder in which a pull puts an adapter together; one pull at a time, others wait.

        Whoever had to wait should look into the cache again before fetching anything. The folder outlives a
        kill and errors of the network or the disk, so that the next pull goes on from there; it is removed
        when the adapter is refused.

        Raises:
            RegistryError: the folder cannot be made, or somebody else could write to it.
        """
        folder = self._incoming(digest)
        try:
            for made in (self._folder, folder.parent):
                made.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._check_folders("incoming")
            lock = os.open(self._lock(digest), _LOCK_FLAGS | os.O_CREAT, 0o600)
        except OSError as error:
            raise _cannot(folder, error) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            # Not before: whoever held the lock until now has moved the folder into its place or removed it.
            with self._made(digest):
                yield folder
        finally:
            os.close(lock)

    @contextlib.contextmanager
    def unless_pulled(self, digest: Digest) -> Iterator[bool]:
        """Keeps others from pulling an adapter meanwhile; False if somebody is at it."""
        try:
            lock = os.open(self._lock(digest), _LOCK_FLAGS)
        except OSError:
            yield True  # nobody has ever locked it, or it is no lock that a pull would take
            return
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except BlockingIOError:
            free = False
        try:
            yield free
        finally:
            os.close(lock)

    def commit(self, digest: Digest, manifest: bytes) -> Path:
        """Moves what was put together into its place; call it inside `incoming`, after admission.

        Args:
            digest: the adapter.
            manifest: its manifest, written beside the files.

        Returns:
            The folder in the cache.

        Raises:
            RegistryError: the folder cannot be written.
        """
        folder, target = self._incoming(digest), self.path(digest)
        try:
            _write(folder / MANIFEST_NAME, manifest)
            target.parent.mkdir(mode=0o700, exist_ok=True)
            self._check_folders("sha256")
            if target.is_symlink():
                target.unlink()
            shutil.rmtree(target, ignore_errors=True)  # damaged, or `incoming` would not have been asked for
            folder.chmod(0o755)
            os.rename(folder, target)
            _flush_folder(target.parent)
        except OSError as error:
            raise _cannot(target, error) from error
        return target

    def drop(self, digest: Digest) -> None:
        """Forgets an adapter that was refused, and what a pull has begun to fetch of it.

        What another pull fetches at this moment stays: that one judges it itself, perhaps by a gate that lets
        it pass, and removes it if it refuses it, too.
        """
        self.forget(digest)
        with self.unless_pulled(digest) as free:
            if free:
                _remove(self._incoming(digest))

    def forget(self, digest: Digest) -> None:
        """Removes an adapter from its place, and not what a pull has begun to fetch of it."""
        self._receipt(digest).unlink(missing_ok=True)
        self._statements(digest).unlink(missing_ok=True)
        _remove(self.path(digest))

    def link(self, digest: Digest, output: Path) -> None:
        """Puts the files of a cached adapter into a folder, as hard links or, across disks, as copies.

        Args:
            digest: the adapter.
            output: the folder; made if it is not there. What it already holds of the adapter stays.

        Raises:
            UsageError: a file of the same name with other bytes is there; nothing was changed.
            RegistryError: the folder cannot be written.
        """
        source = self.path(digest)
        facts = self.receipt(digest)
        try:
            output.mkdir(parents=True, exist_ok=True)
            missing = [name for name in FILE_NAMES if not _is_there(source / name, output / name)]
            for name in missing:
                _link_or_copy(source / name, output / name)
            _flush_folder(output)
        except OSError as error:
            raise RegistryError(
                f"{output} cannot be written: {error.strerror or error}",
                mend="choose another folder for --output, or check its permissions and free space",
            ) from error
        if facts is not None and missing:
            # A new link changes the time of the status, which the receipt has noted.
            self.write_receipt(digest, facts)

    def write_receipt(self, digest: Digest, facts: Mapping[str, str]) -> None:
        """Notes that the files of an adapter were just verified.

        Args:
            digest: the adapter.
            facts: what the verification depended on, such as the version of the scanner's rules.

        Raises:
            RegistryError: the note cannot be written.
        """
        path = self._receipt(digest)
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            self._check_folders("receipts")
            note = {"facts": dict(facts), "files": self._appearance(digest)}
            _write(path, json.dumps(note, sort_keys=True).encode())
        except OSError as error:
            raise _cannot(path, error) from error

    def receipt(self, digest: Digest) -> dict[str, str] | None:
        """Returns the facts of the last receipt; None if a file looks different from when it was written."""
        try:
            self._check_folders("receipts")
            self._check_folders("sha256", digest)
            with FileContent(self._receipt(digest)) as content:
                note = json.loads(content[:_MAX_RECEIPT_BYTES])
            if note["files"] != self._appearance(digest):
                return None
            return {str(key): str(value) for key, value in note["facts"].items()}
        except (OSError, RegistryError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None

    def write_statements(self, digest: Digest, statements: Sequence[bytes]) -> None:
        """Keeps the envelopes about an adapter, so that it can be loaded while the store is down.

        Raises:
            RegistryError: they cannot be written.
        """
        path = self._statements(digest)
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            self._check_folders("receipts")
            _write(path, json.dumps([data.decode("latin-1") for data in statements]).encode())
        except OSError as error:
            raise _cannot(path, error) from error

    def read_statements(self, digest: Digest) -> tuple[bytes, ...] | None:
        """Returns the envelopes that were kept, as hostile bytes; None if there are none."""
        try:
            self._check_folders("receipts")
            with FileContent(self._statements(digest)) as content:
                kept = json.loads(content[: len(content)])
            return tuple(str(text).encode("latin-1") for text in kept)
        except (OSError, RegistryError, ValueError, TypeError, RecursionError):
            return None

    def _incoming(self, digest: Digest) -> Path:
        return self._folder / "incoming" / digest.hex

    def _lock(self, digest: Digest) -> Path:
        return self._incoming(digest).with_suffix(".lock")

    @contextlib.contextmanager
    def _made(self, digest: Digest) -> Iterator[None]:
        """Makes the folder of a pull that holds the lock, and removes it if it is empty or was refused."""
        folder = self._incoming(digest)
        try:
            try:
                folder.mkdir(mode=0o700, exist_ok=True)
                self._check_folders("incoming", digest)
            except OSError as error:
                raise _cannot(folder, error) from error
            yield
        except RegistryError as error:
            # A plain RegistryError is a full disk or the like; its more exact kinds are refusals.
            if not isinstance(error, NetworkError) and type(error) is not RegistryError:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            with contextlib.suppress(OSError):  # left empty, or moved
                folder.rmdir()

    def _statements(self, digest: Digest) -> Path:
        return self._folder / "receipts" / f"{digest.hex}.statements.json"

    def _appearance(self, digest: Digest) -> dict[str, list[int]]:
        """What changes when somebody changes a file: a write sets the times, an exchange the inode."""
        found = {}
        for name in FILE_NAMES:
            status = os.lstat(self.path(digest) / name)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(f"{name} is not a plain file")
            found[name] = [
                status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns,
            ]  # fmt: skip
        return found

    def _small(self, digest: Digest, name: str, limit: int) -> bytes:
        with self.content(digest, name) as content:
            # One byte more than allowed is enough for admission to refuse it.
            return content[: limit + 1]

    def _receipt(self, digest: Digest) -> Path:
        return self._folder / "receipts" / f"{digest.hex}.json"

    def _check_folders(self, kind: str, digest: Digest | None = None) -> None:
        """Refuses folders below the cache through which somebody else could reach our files.

        Raises:
            FileNotFoundError: one is not there.
            RegistryError: one is a symbolic link, or belongs to or can be written by somebody else.
        """
        top = self._folder / kind
        for folder in (top,) if digest is None else (top, top / digest.hex):
            status = folder.lstat()
            sound = stat.S_ISDIR(status.st_mode) and status.st_uid in (os.geteuid(), 0)
            if not sound or status.st_mode & 0o022:
                raise RegistryError(
                    f"{folder} in the cache is a link, or somebody else can write to it",
                    mend=f"look who made it, then remove {folder}; everything in it can be pulled again",
                )


_LOCK_FLAGS: Final = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.unlink()  # rmtree leaves a symbolic link alone


def _write(path: Path, data: bytes) -> None:
    """Writes a small file whole, over what had the name."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    temporary.unlink(missing_ok=True)
    try:
        with temporary.open("xb") as stream:
            os.fchmod(stream.fileno(), 0o444)
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _is_there(source: Path, target: Path) -> bool:
    """Whether the target is the source already, by link or by its bytes.

    Raises:
        UsageError: it is something else.
    """
    if not os.path.lexists(target):
        return False
    with contextlib.suppress(RegistryError), FileContent(source) as ours, FileContent(target) as theirs:
        same = os.path.samestat(os.stat(source), os.stat(target))
        if same or (len(ours) == len(theirs) and _equal(ours, theirs)):
            return True
    raise UsageError(
        f"{target} is there already and is something else",
        mend="choose an empty folder for --output, or remove that file",
    )


def _equal(one: FileContent, other: FileContent) -> bool:
    from registry.content import chunks

    return all(left == right for left, right in zip(chunks(one), chunks(other), strict=True))


def _link_or_copy(source: Path, target: Path) -> None:
    """Gives a file a second name, which must be free; copies it where the disk cannot do that."""
    try:
        os.link(source, target, follow_symlinks=False)
    except FileExistsError:
        raise
    except OSError:
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        temporary.unlink(missing_ok=True)
        try:
            with FileContent(source) as content, temporary.open("xb") as stream:
                os.fchmod(stream.fileno(), 0o444)
                for start in range(0, len(content), 1 << 20):
                    stream.write(content[start : start + (1 << 20)])
                stream.flush()
                os.fsync(stream.fileno())
            os.rename(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cannot(folder: Path, error: OSError) -> RegistryError:
    return RegistryError(
        f"the cache {folder} cannot be used: {error.strerror or error}",
        mend="check the folder and its free space, or choose another with ADAPTER_FOUNDRY_CACHE",
    )
