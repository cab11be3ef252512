"""Pictures on disk: numbered ``images-000.npy`` files, read lazily through memory maps.

A shard of pictures of one size is uint8 [n, height, width, 3]; pictures of different sizes follow each other
in a flat one. Either way picture after picture lies there row by row.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from registry.digest import Digest, digest_bytes
from trainer.errors import DataError

_SHARD = 1024
_SHARD_BYTES = 256 << 20


def pixel_digest(pixels: np.ndarray) -> Digest:
    """Return the digest of a picture's shape and pixels, uint8 [H, W, 3]."""
    return digest_bytes(f"{pixels.shape}".encode() + np.ascontiguousarray(pixels).tobytes())


def file_digest(path: Path) -> Digest:
    """Return the sha256 of a file, read piece by piece.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as stream:
        return Digest(f"sha256:{hashlib.file_digest(stream, 'sha256').hexdigest()}")


class ShardWriter:
    """Writes pictures into shards; `close` returns file name -> digest, ``counts`` file name -> pictures."""

    def __init__(self, folder: Path, per_shard: int = _SHARD) -> None:
        self._folder, self._per_shard = folder, per_shard
        self._waiting: list[np.ndarray] = []
        self._bytes = 0
        self._files: dict[str, Digest] = {}
        self.counts: dict[str, int] = {}

    def add(self, pixels: np.ndarray) -> None:
        """Append one picture, uint8 [H, W, 3]."""
        self._waiting.append(pixels)
        self._bytes += pixels.nbytes
        if len(self._waiting) == self._per_shard or self._bytes >= _SHARD_BYTES:
            self._flush()

    def close(self) -> dict[str, Digest]:
        """Write what is left."""
        if self._waiting:
            self._flush()
        return dict(self._files)

    def _flush(self) -> None:
        path = self._folder / f"images-{len(self._files):03d}.npy"
        alike = len({picture.shape for picture in self._waiting}) == 1
        flat = (picture.reshape(-1) for picture in self._waiting)
        np.save(path, np.stack(self._waiting) if alike else np.concatenate(list(flat)), allow_pickle=False)
        self._files[path.name], self.counts[path.name] = file_digest(path), len(self._waiting)
        self._waiting, self._bytes = [], 0


def flat_shard(path: Path) -> np.ndarray:
    """Return the bytes of a shard's pictures as a memory map, uint8 [n].

    Raises:
        DataError: the shard is missing or damaged.
    """
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(
            f"the pictures in {path} are damaged: {error}", "remove the folder and run again"
        ) from None
    return found.reshape(-1)


def iterate_images(folder: Path) -> Iterator[np.ndarray]:
    """Yield the pictures of a folder whose shards have one size each, uint8 [H, W, 3], one after the other.

    Raises:
        DataError: the folder has no shards, or one of them is damaged.
    """
    for path in _shards(folder):
        try:
            yield from np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise _damaged(folder, error) from None


def read_images(folder: Path) -> np.ndarray:
    """Return all pictures of a folder as one array, uint8 [N, H, W, 3].

    Raises:
        DataError: the folder has no shards, or one of them is damaged.
    """
    try:
        return np.concatenate([np.load(path, allow_pickle=False) for path in _shards(folder)])
    except (OSError, ValueError) as error:
        raise _damaged(folder, error) from None


def _shards(folder: Path) -> list[Path]:
    paths = sorted(folder.glob("images-*.npy"), key=lambda path: (len(path.name), path.name))
    if not paths:
        raise DataError(f"there are no pictures in {folder}", "run the stage that makes them again")
    return paths


def _damaged(folder: Path, error: Exception) -> DataError:
    return DataError(f"the pictures in {folder} are damaged: {error}", "remove the folder and run again")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON-lines file.

    Raises:
        DataError: the file is missing or damaged.
    """
    try:
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read: {error}", "remove its folder and run the stage again"
        ) from None
