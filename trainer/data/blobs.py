"""Pictures by the digest of their bytes: ``blobs/<hh>/<sha256>.<png|jpg|webp>``.

The name of a file proves its content, so several writers may share a folder, a picture is kept once, and a
folder from anybody is checked without a list. Nothing is re-encoded: the bytes are those that were made or
delivered.
"""

from __future__ import annotations

import io
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from registry.digest import Digest, digest_bytes
from trainer.errors import DataError

if TYPE_CHECKING:
    import numpy as np

ENDINGS = {"image/png": "png", "image/jpeg": "jpg", "image/webp": "webp"}
"""Media types that are kept, and how their files' names end."""

_MEND = "remove the folder and run the stage that makes it again"


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
        for inside in sorted(self.folder.glob("*")):
            for path in sorted(inside.glob("*")) if inside.is_dir() and not inside.is_symlink() else [inside]:
                if path.name.startswith(".") and path.name.endswith(".tmp"):
                    continue  # somebody is writing, or was killed while writing
                digest = f"sha256:{path.stem}"
                try:
                    if path != self.path(Digest(digest)):
                        raise ValueError
                except (ValueError, DataError):
                    raise DataError(f"{path} is not a picture under its digest", _MEND) from None
                yield Digest(digest)

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
        place = self._place(digest, ENDINGS[media_type])
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
        ending = self.path(digest).suffix[1:]
        return next(kind for kind, known in ENDINGS.items() if known == ending)

    def read(self, digest: Digest) -> bytes:
        """Return the bytes of a picture, which are those that its digest names.

        Raises:
            DataError: it is missing, no plain file, larger than any picture may be, or other bytes.
        """
        from serving.images import MAX_IMAGE_BYTES

        path = self.path(digest)
        try:
            with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as stream:
                if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                    raise OSError("it is no plain file")
                data = stream.read(MAX_IMAGE_BYTES + 1)
        except OSError as error:
            raise DataError(f"the picture {path} cannot be read: {error}", _MEND) from None
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

    def link(self, digest: Digest, other: Blobs) -> None:
        """Put a picture of this folder into another one too: as a hard link, or a copy on another disk.

        Raises:
            DataError: it is not here.
        """
        here = self.path(digest)
        there = other._place(digest, here.suffix[1:])
        if _is_file(there, here.stat().st_size):
            return

        def link(temporary: Path) -> None:
            try:
                os.link(here, temporary, follow_symlinks=False)
            except OSError:
                shutil.copyfile(here, temporary)

        _complete(there, link)

    def _place(self, digest: Digest, ending: str) -> Path:
        return self.folder / digest.hex[:2] / f"{digest.hex}.{ending}"

    def _find(self, digest: Digest) -> Path | None:
        places = (self._place(digest, ending) for ending in ENDINGS.values())
        return next((place for place in places if _is_file(place)), None)


def encode_png(pixels: np.ndarray) -> bytes:
    """Return uint8 [H, W, 3] RGB pixels as the bytes of a PNG without metadata.

    The same Pillow and zlib make the same bytes of the same pixels; other versions may pack them differently.
    """
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels, "RGB").save(buffer, "PNG")
    return buffer.getvalue()


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
