"""Adapters that this machine has pulled, by the digest of their manifest.

A folder appears in the cache whole or not at all, and only after admission. It is not believed afterwards
either: whoever loads from it runs admission again over the very bytes that were read.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from registry.digest import Digest
from registry.errors import RegistryError
from registry.manifest import CARD_NAME, WEIGHTS_NAME

MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Parcel:
    """Everything that admission judges about one adapter, as hostile bytes.

    Attributes:
        manifest: the manifest.
        files: the adapter's files by name.
        statements: DSSE envelopes. The cache does not keep them: they are always asked for anew, so that
            a later refusal is heard.
    """

    manifest: bytes
    files: Mapping[str, bytes]
    statements: Sequence[bytes] = ()


class AdapterCache:
    """A folder of pulled adapters."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, digest: Digest) -> Path:
        """Where an adapter is kept, whether or not it is there."""
        return self._folder / "sha256" / digest.hex

    def read(self, digest: Digest) -> Parcel | None:
        """What the cache holds under a digest, unverified; None if that is not complete."""
        folder = self.path(digest)
        try:
            return Parcel(
                manifest=(folder / MANIFEST_NAME).read_bytes(),
                files={name: (folder / name).read_bytes() for name in (WEIGHTS_NAME, CARD_NAME)},
            )
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise _cannot(folder, error) from error

    def write(self, digest: Digest, parcel: Parcel) -> Path:
        """Keeps an admitted adapter; if another process was faster, its folder stays.

        Returns:
            The folder.

        Raises:
            RegistryError: the folder cannot be written; nothing is left behind.
        """
        target = self.path(digest)
        try:
            with _incoming(target.parent) as folder:
                _write(folder / MANIFEST_NAME, parcel.manifest)
                for name, data in parcel.files.items():
                    _write(folder / name, data)
                folder.chmod(0o755)
                with contextlib.suppress(FileExistsError):
                    _rename(folder, target)
        except OSError as error:
            raise _cannot(target, error) from error
        return target

    def drop(self, digest: Digest) -> None:
        """Forgets an adapter."""
        shutil.rmtree(self.path(digest), ignore_errors=True)


@contextlib.contextmanager
def _incoming(parent: Path) -> Iterator[Path]:
    """A hidden folder that is gone afterwards unless it was renamed; so are parents that stayed empty."""
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".incoming-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    path.chmod(0o444)


def _rename(folder: Path, target: Path) -> None:
    try:
        os.rename(folder, target)
    except OSError as error:
        if target.is_dir():  # renaming onto a folder that is not empty fails with an errno that varies
            raise FileExistsError from error
        raise
    descriptor = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cannot(folder: Path, error: OSError) -> RegistryError:
    return RegistryError(
        f"the cache {folder} cannot be used: {error.strerror or error}",
        mend="check the folder and its free space, or choose another with ADAPTER_FOUNDRY_CACHE",
    )
