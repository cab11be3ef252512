"""Measuring many pictures, in parts that any process can do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from registry.digest import Digest
from trainer.data.blobs import Blobs
from trainer.data.candidates import Candidates
from trainer.data.dataset import BLOBS_NAME
from trainer.data.digests import pixel_digest
from trainer.data.measures import BITS, look

_AT_LEAST: Final = 512
"""Pictures in one part: measuring one takes a millisecond, so fewer would be more overhead than work."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measures:
    """Measures of N pictures; those that were left out before hold nothing.

    Attributes:
        pixels: digest of shape and pixels.
        sizes: int32 [N, 2], height and width.
        sharpness: float64 [N].
        pdq: uint8 [N, 32].
        quality: int8 [N], of the hash; -1 where nobody looked.
        face: int8 [N]: 1 there is a face, 0 there is none, -1 nobody looked for one.
        similarity: float64 [N]: cosine to the source's face, NaN where there is none.
    """

    pixels: list[str | None]
    sizes: np.ndarray
    sharpness: np.ndarray
    pdq: np.ndarray
    quality: np.ndarray
    face: np.ndarray
    similarity: np.ndarray

    @classmethod
    def empty(cls, count: int) -> Measures:
        """Return measures of nothing."""
        return cls(
            pixels=[None] * count,
            sizes=np.zeros((count, 2), np.int32),
            sharpness=np.zeros(count),
            pdq=np.zeros((count, BITS // 8), np.uint8),
            quality=np.full(count, -1, np.int8),
            face=np.full(count, -1, np.int8),
            similarity=np.full(count, np.nan),
        )

    def distance(self, first: int, second: int) -> int:
        """Return in how many bits two pictures' hashes differ."""
        return int(np.bitwise_count(self.pdq[first] ^ self.pdq[second]).sum(dtype=np.int64))

    def take(self, rows: Sequence[int], answer: dict[str, Any]) -> None:
        """Fill in what `measure` answered for some rows."""
        for row, digest in zip(rows, answer["pixels"], strict=True):
            self.pixels[row] = digest
        places = list(rows)
        self.sizes[places] = answer["sizes"]
        self.sharpness[places] = answer["sharpness"]
        self.pdq[places] = np.frombuffer(bytes.fromhex("".join(answer["pdq"])), np.uint8).reshape(
            -1, BITS // 8
        )
        self.quality[places] = answer["quality"]
        self.face[places] = [-1 if one is None else int(one) for one in answer["face"]]
        self.similarity[places] = [np.nan if one is None else one for one in answer["similarity"]]

    def row(self, row: int, source: int) -> dict[str, Any]:
        """Return the values of a picture for images.parquet."""
        similarity, face = float(self.similarity[row]), int(self.face[row])
        height, width = self.sizes[row].tolist()
        return {
            "pixels": self.pixels[row],
            "height": height,
            "width": width,
            "sharpness": float(self.sharpness[row]),
            "pdq": self.pdq[row].tobytes().hex(),
            "pdq_quality": int(self.quality[row]),
            "pdq_distance": None if source in (-1, row) else self.distance(row, source),
            "face": None if face < 0 else bool(face),
            "similarity": None if np.isnan(similarity) else similarity,
        }


def measure(
    folder: Path, *, images: str, encoder: str | None, pictures: list[str], sources: list[str | None]
) -> dict[str, Any]:
    """Measure some pictures: a part of a stage (see `trainer.parts`); nothing is written.

    Args:
        folder: of the parts.
        images: folder of the images stage.
        encoder: who looks at faces; None looks at none.
        pictures: digests of the files.
        sources: digest of each one's neutral picture, to compare the faces with; None compares nothing.

    Raises:
        DataError: a picture is missing, damaged or over the limits.
    """
    blobs = Blobs(Path(images) / BLOBS_NAME)
    told: dict[str, list[Any]] = {
        name: [] for name in ("pixels", "sizes", "sharpness", "pdq", "quality", "face", "similarity")
    }
    known: dict[str, np.ndarray | None] = {}
    for picture, source in zip(pictures, sources, strict=True):
        pixels = blobs.pixels(Digest(picture))
        found = look(pixels)
        face, similarity = None, None
        if encoder is not None:
            face, similarity = _compared(encoder, blobs, known, picture, pixels, source)
        values = (pixel_digest(pixels), list(pixels.shape[:2]), found.sharpness, found.pdq, found.quality)
        for name, value in zip(told, (*values, face, similarity), strict=True):
            told[name].append(value)
    return told


def parts(
    images: Path, seen: Candidates, rows: Sequence[int], encoder: str | None, batch: int
) -> list[dict[str, Any]]:
    """Return what `measure` is asked for the pictures of ``rows``."""
    from trainer.parts import portions

    asked = []
    for begin, end in portions(len(rows), max(batch, _AT_LEAST)):
        some = rows[begin:end]
        with_source = [int(seen.sources[row]) for row in some]
        asked.append(
            {
                "images": str(images),
                "encoder": encoder,
                "pictures": [seen.images[row] for row in some],
                "sources": [None if encoder is None or source in (-1, row) else seen.images[source]
                            for row, source in zip(some, with_source, strict=True)],
            }
        )  # fmt: skip
    return asked


def _compared(
    encoder: str, blobs: Blobs, known: dict[str, np.ndarray | None], picture: str, pixels: np.ndarray,
    source: str | None,
) -> tuple[bool | None, float | None]:  # fmt: skip
    """Return whether a picture has a face, and its cosine to the source's; 4 digits, as machines differ."""
    from trainer.data.likeness import faces

    looks = faces(encoder)
    vector = looks.vector(pixels)
    if source is None:
        known[picture] = vector
    elif source not in known:
        known[source] = looks.vector(blobs.pixels(Digest(source)))
    face = (vector is not None) if looks.finds else None
    other = None if source is None else known[source]
    if vector is None or other is None:
        return face, None
    return face, round(float(vector @ other), 4)
