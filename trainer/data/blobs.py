"""Pictures by the digest of their bytes: ``blobs/<hh>/<sha256>.<png|jpg|webp>``.

The name of a file proves its content, so several writers may share a folder, a picture is kept once, and a
folder from anybody is checked without a list. Nothing is re-encoded: the bytes are those that were made or
delivered.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from registry.digest import Digest, digest_bytes
from trainer.errors import DataError

if TYPE_CHECKING:
    import numpy as np

ENDINGS = {"image/png": "png", "image/jpeg": "jpg", "image/webp": "webp"}
"""Media types that are kept, and how their files' names end."""

_READERS = 4
_MEND = "remove the folder and run the stage that makes it again"
_NAME = re.compile(
    rf"([0-9a-f]{{2}})/(?=([0-9a-f]{{2}}))[0-9a-f]{{64}}\.(?:{'|'.join(ENDINGS.values())})", re.ASCII
)
_TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.tmp", re.ASCII)


class Blobs:
    """A folder of pictures by digest; it is made when the first one is added."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __contains__(self, digest: Digest) -> bool:
        return self._find(digest) is not None

    def __iter__(self) -> Iterator[Digest]:
        """Yield the digests that the names of the folder's files say, in order; nothing is read.

        Raises:
            DataError: something else lies there.
        """
        for name in sorted(self.found()):
            yield Digest(f"sha256:{name[3:67]}")

    def found(self) -> dict[str, int]:
        """Return name (see `blob_name`) -> bytes of all files in the folder; nothing is read.

        Raises:
            DataError: something else lies there, such as a link.
        """
        files: dict[str, int] = {}
        try:
            if self.folder.is_symlink():
                raise OSError("it is a link")
            for inside in os.scandir(self.folder) if self.folder.is_dir() else ():
                if not inside.is_dir(follow_symlinks=False):
                    raise OSError(f"{inside.path} is no folder of pictures")
                for entry in os.scandir(inside.path):
                    name = f"{inside.name}/{entry.name}"
                    if _TEMPORARY.fullmatch(entry.name):
                        continue  # somebody is writing, or was killed while writing
                    match = _NAME.fullmatch(name)
                    if match is None or match[1] != match[2] or not entry.is_file(follow_symlinks=False):
                        raise OSError(f"{entry.path} is not a picture under its digest")
                    files[name] = entry.stat(follow_symlinks=False).st_size
        except OSError as error:
            raise DataError(f"the pictures in {self.folder} are not right: {error}", _MEND) from None
        return files

    def require(self, wanted: Mapping[str, int]) -> None:
        """Refuse a folder that does not hold exactly these files; all of them are read.

        Args:
            wanted: name (see `blob_name`) -> bytes.

        Raises:
            DataError: a file is missing, is not what its name says, or is there without being named.
        """
        files = self.found()
        for told, names in (
            ("is missing", wanted.keys() - files.keys()),
            ("is not one of the dataset's", files.keys() - wanted.keys()),
            ("has another size", {name for name in wanted if files.get(name) != wanted[name]}),
        ):
            if names:
                raise DataError(f"{self.folder / min(names)} {told}", _MEND)
        folders: dict[str, list[str]] = {}
        for name in wanted:
            folders.setdefault(name[:2], []).append(name)
        with ThreadPoolExecutor(_READERS) as pool:  # hashing does not hold the interpreter
            for _ in pool.map(self._check, folders.values()):
                pass

    def _check(self, names: Sequence[str]) -> None:
        """Read files and compare them with their names."""
        for name in names:
            path = f"{self.folder}/{name}"
            if hashlib.sha256(_bytes(path)).hexdigest() != name[3:67]:
                raise DataError(f"the picture {path} is not the one that its name says", _MEND)

    def add(self, data: bytes, media_type: str) -> Digest:
        """Keep a picture's file and return its digest; safe for several writers at the same time.

        Args:
            data: the file as it was made or delivered; it is not decoded.
            media_type: a key of `ENDINGS`.

        Raises:
            DataError: pictures of that type are not kept.
        """
        if media_type not in ENDINGS:
            raise DataError(
                f"pictures of type {media_type!r} are not kept", "deliver " + ", ".join(sorted(ENDINGS))
            )
        digest = digest_bytes(data)
        place = self.folder / blob_name(digest, media_type)
        if not _is_file(place, len(data)):
            _complete(place, lambda temporary: temporary.write_bytes(data))
        return digest

    def path(self, digest: Digest) -> Path:
        """Return where a picture lies.

        Raises:
            DataError: it is not here, or is no plain file.
        """
        found = self._find(digest)
        if found is None:
            raise DataError(f"there is no picture {digest} in {self.folder}", _MEND)
        return found

    def media_type(self, digest: Digest) -> str:
        """Return the type of a picture that is here.

        Raises:
            DataError: it is not here.
        """
        return type_of(self.path(digest))

    def read(self, digest: Digest) -> bytes:
        """Return the bytes of a picture, which are those that its digest names.

        Raises:
            DataError: it is missing, no plain file, larger than any picture may be, or other bytes.
        """
        path = self.path(digest)
        data = _bytes(str(path))
        if digest_bytes(data) != digest:
            raise DataError(f"the picture {path} is not the one that its name says", _MEND)
        return data

    def pixels(self, digest: Digest) -> np.ndarray:
        """Return a picture upright and without metadata, uint8 [H, W, 3], decoded under `serving.images`.

        Raises:
            DataError: see `read`; or it cannot be decoded within the limits.
        """
        import numpy as np

        from serving.errors import ImageRefused
        from serving.images import open_picture

        data = self.read(digest)
        try:
            return np.asarray(open_picture(data))
        except ImageRefused as error:
            raise DataError(f"the picture {digest} cannot be used: {error.message}", error.mend) from None

    def link(self, digest: Digest, other: Blobs) -> Path:
        """Put a picture of this folder into another one too: as a hard link, or a copy on another disk.

        Returns:
            where it lies there.

        Raises:
            DataError: it is not here.
        """
        here = self.path(digest)
        there = other.folder / here.parent.name / here.name
        if not _is_file(there, here.stat().st_size):
            there.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(here, there, follow_symlinks=False)
            except OSError:  # another disk, or something else lies there
                _complete(there, lambda temporary: shutil.copyfile(here, temporary))
        return there

    def _find(self, digest: Digest) -> Path | None:
        places = (self.folder / blob_name(digest, kind) for kind in ENDINGS)
        return next((place for place in places if _is_file(place)), None)


def blob_name(digest: Digest, media_type: str) -> str:
    """Return where a picture lies in a folder of blobs: ``<hh>/<sha256>.<ending>``."""
    return f"{digest.hex[:2]}/{digest.hex}.{ENDINGS[media_type]}"


def type_of(path: Path) -> str:
    """Return the media type of a picture's file by its name."""
    return next(kind for kind, ending in ENDINGS.items() if path.suffix == f".{ending}")


def media_type(data: bytes) -> str | None:
    """Return which of `ENDINGS` a file is by its first bytes, or None; the rest is not looked at."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if data.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    return "image/webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def encode_png(pixels: np.ndarray) -> bytes:
    """Return uint8 [H, W, 3] RGB pixels as the bytes of a PNG without metadata.

    The same Pillow and zlib make the same bytes of the same pixels; other versions may pack them differently.
    """
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels, "RGB").save(buffer, "PNG")
    return buffer.getvalue()


def _bytes(path: str) -> bytes:
    """Return the bytes of a picture's file.

    Raises:
        DataError: it is missing, a link, no plain file, or larger than any picture may be.
    """
    from serving.images import MAX_IMAGE_BYTES

    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            about = os.fstat(descriptor)
            if not stat.S_ISREG(about.st_mode) or about.st_size > MAX_IMAGE_BYTES:
                raise OSError(f"it is no plain file of at most {MAX_IMAGE_BYTES} bytes")
            return os.read(descriptor, about.st_size)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise DataError(f"the picture {path} cannot be read: {error}", _MEND) from None


def _is_file(path: Path, size: int | None = None) -> bool:
    """Return whether there is a plain file, not a link, of that many bytes."""
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and size in (None, found.st_size)


def _complete(place: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside its place and rename it, so that it is never seen half."""
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = place.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        write(temporary)
        temporary.replace(place)
    finally:
        temporary.unlink(missing_ok=True)
