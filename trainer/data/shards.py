"""Pictures on disk: numbered ``images-000.npy`` files of uint8 [n, height, width, 3], read lazily."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from registry.digest import Digest, digest_bytes
from trainer.errors import DataError

_SHARD = 1024


def pixel_digest(pixels: np.ndarray) -> Digest:
    """Return the digest of a picture's shape and pixels, uint8 [H, W, 3]."""
    return digest_bytes(f"{pixels.shape}".encode() + np.ascontiguousarray(pixels).tobytes())


class ShardWriter:
    """Writes pictures of one size into shards; `close` returns file name -> digest."""

    def __init__(self, folder: Path, per_shard: int = _SHARD) -> None:
        self._folder, self._per_shard = folder, per_shard
        self._waiting: list[np.ndarray] = []
        self._files: dict[str, Digest] = {}

    def add(self, pixels: np.ndarray) -> None:
        """Append one picture, uint8 [H, W, 3]."""
        self._waiting.append(pixels)
        if len(self._waiting) == self._per_shard:
            self._flush()

    def close(self) -> dict[str, Digest]:
        """Write what is left."""
        if self._waiting:
            self._flush()
        return dict(self._files)

    def _flush(self) -> None:
        path = self._folder / f"images-{len(self._files):03d}.npy"
        np.save(path, np.stack(self._waiting), allow_pickle=False)
        self._files[path.name] = digest_bytes(path.read_bytes())
        self._waiting = []


def read_images(folder: Path) -> np.ndarray:
    """Return all pictures of a folder as one array, uint8 [N, H, W, 3].

    Raises:
        DataError: the folder has no shards, or one of them is damaged.
    """
    paths = sorted(folder.glob("images-*.npy"))
    if not paths:
        raise DataError(f"there are no pictures in {folder}", "run the stage that makes them again")
    try:
        return np.concatenate([np.load(path, allow_pickle=False) for path in paths])
    except (OSError, ValueError) as error:
        raise DataError(
            f"the pictures in {folder} are damaged: {error}", "remove the folder and run again"
        ) from None


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
