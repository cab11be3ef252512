"""Digests of files and of pixels."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from registry.digest import Digest, digest_bytes

if TYPE_CHECKING:
    import numpy as np


def file_digest(path: Path) -> Digest:
    """Return the sha256 of a file, read piece by piece.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as stream:
        return Digest(f"sha256:{hashlib.file_digest(stream, 'sha256').hexdigest()}")


def pixel_digest(pixels: np.ndarray) -> Digest:
    """Return the digest of a picture's shape and pixels, uint8 [H, W, 3]."""
    import numpy as np

    return digest_bytes(f"{pixels.shape}".encode() + np.ascontiguousarray(pixels).tobytes())
