"""What tells a copy: the picture by its perceptual hash, the person by the face. Pure functions of pictures.

PDQ hashes tell copies of a picture, blended, recoloured or scaled ones too, and lie in every dataset: 60,000
training pictures are compared without opening one. What a hash of the whole picture does not tell, a training
person in another picture, the identity encoder does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from registry.digest import Digest
from trainer.data.measures import BITS, MIN_QUALITY, packed, perceptual_hash

if TYPE_CHECKING:
    from trainer.data.dataset import Dataset
    from trainer.data.likeness import Faces
    from trainer.evaluation.plan import Portrait

MATCH: Final = 31
"""Bits of 256 up to which PDQ's authors call two pictures the same."""
MOST_PEOPLE: Final = 2000
"""Training people whose faces are compared; of more every n-th."""
SAME_PEOPLE: Final = 256
"""Training pictures that tell how like one person is to itself."""
_AT_ONCE = 256
_PAIRS = 1 << 21  # comparisons at once: 16 MiB for a word of the hashes


@dataclass(frozen=True, kw_only=True, slots=True)
class Pictures:
    """N pictures as the probe sees them.

    Attributes:
        hashes: PDQ, uint64 [N, 4].
        clear: [N], False where the hash is of too little quality to be compared.
        faces: unit vectors, float32 [N, D], NaN where no face was found; None where nobody looked.
    """

    hashes: NDArray[np.uint64]
    clear: NDArray[np.bool_]
    faces: NDArray[np.float32] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """What was trained on.

    Attributes:
        hashes: PDQ of the pictures, uint64 [N, 4].
        files: their digests.
        faces: of the people, a neutral picture each, float32 [P, D].
        same: cosine from which a face is that person's own: 95 % of the people's other pictures have it.
    """

    hashes: NDArray[np.uint64]
    files: tuple[Digest, ...]
    faces: NDArray[np.float32]
    same: float


def apart(first: NDArray[np.uint64], second: NDArray[np.uint64]) -> NDArray[np.int64]:
    """In how many bits hashes [N, 4] and [N, 4] differ, [N]."""
    found: NDArray[np.int64] = np.bitwise_count(first ^ second).sum(axis=1, dtype=np.int64)
    return found


def nearest(pictures: Pictures, training: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The place of each picture's nearest training picture, the first of several, and its distance in bits.

    All pairs are compared, in blocks of bounded memory. A picture whose hash is of too little quality is
    `BITS` away from everything.

    Args:
        pictures: N of them.
        training: hashes [M, 4], at least one.
    """
    count = len(pictures.hashes)
    places, bits = np.zeros(count, np.int64), np.full(count, BITS, np.int64)
    step = max(1, _PAIRS // len(training))
    for start in range(0, count, step):
        some = pictures.hashes[start : start + step]
        away = np.zeros((len(some), len(training)), np.uint16)
        for word in range(training.shape[1]):
            away += np.bitwise_count(some[:, None, word] ^ training[None, :, word])
        places[start : start + step] = away.argmin(axis=1)
        bits[start : start + step] = away.min(axis=1)
    return places, np.where(pictures.clear, bits, BITS)


def remembered(bits: NDArray[np.int64], own: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which edits are copies of a training picture: within `MATCH` bits, and nearer than their source is.

    Args:
        bits: [N] to the nearest training picture.
        own: [N] to the source.
    """
    return (bits <= MATCH) & (bits < own)


def shows_another(
    edits: NDArray[np.float32] | None,
    sources: NDArray[np.float32] | None,
    whose: NDArray[np.int64],
    training: Training,
    trusted: NDArray[np.bool_],
) -> tuple[float, NDArray[np.bool_]]:
    """Which edits show the face of a training person rather than their own.

    Such a face is more like a training person's than like its own source's, as like it as 95 % of the
    training people's own pictures are, and more like it than any of the suite's people is to anybody of them.

    Args:
        edits: unit vectors [N, D], NaN where there is no face; None where there is none at all.
        sources: the same of the S sources.
        whose: [N] which source.
        training: has the people.
        trusted: [S], False for sources that are in the training data.

    Returns:
        the cosine from which a face is a training person's, and which edits [N] show one.
    """
    if edits is None or sources is None or not len(training.faces):
        return 1.0, np.zeros(len(whose), bool)
    others = (sources @ training.faces.T).max(axis=1)[trusted]
    limit = max(training.same, float(np.max(others, initial=-1.0, where=np.isfinite(others))))
    alike, own = (edits @ training.faces.T).max(axis=1), (edits * sources[whose]).sum(axis=1)
    return limit, (alike > own) & (alike >= limit)


def seen(pictures: Sequence[Portrait], faces: Faces | None = None) -> Pictures:
    """Pictures as the probe sees them.

    Args:
        pictures: each uint8 [H, W, 3] RGB.
        faces: the encoder; None looks at no face.
    """
    hashes = [perceptual_hash(pixels) for pixels in pictures]
    return Pictures(
        hashes=packed([found for found, _ in hashes]),
        clear=np.array([quality >= MIN_QUALITY for _, quality in hashes], bool),
        faces=None if faces is None else _vectors(pictures, faces),
    )


def _vectors(pictures: Sequence[Portrait], faces: Faces) -> NDArray[np.float32] | None:
    """Unit vectors [N, D], NaN where there is no face; None where there is none in any picture."""
    found = faces.vectors(pictures)
    width = next((len(one) for one in found if one is not None), None)
    if width is None:
        return None
    return np.stack([np.full(width, np.nan, np.float32) if one is None else one for one in found])


def joined(parts: Sequence[Pictures]) -> Pictures:
    """The pictures of all parts, in their order."""
    width = next((part.faces.shape[1] for part in parts if part.faces is not None), None)
    faces = [
        np.full((len(part.hashes), width or 0), np.nan, np.float32) if part.faces is None else part.faces
        for part in parts
    ]
    return Pictures(
        hashes=np.concatenate([part.hashes for part in parts]),
        clear=np.concatenate([part.clear for part in parts]),
        faces=None if width is None else np.concatenate(faces),
    )


def trained_on(data: Dataset, faces: Faces) -> Training:
    """What an adapter was trained on: not the pictures of the validation.

    Raises:
        DataError: a picture is gone.
    """
    table = data.table("images").select(["split", "identity", "expression", "pdq", "pdq_quality"]).to_pydict()
    who, expressions = table["identity"], table["expression"]
    trained = [row for row, split in enumerate(table["split"]) if split == "train"]
    clear = [row for row in trained if table["pdq_quality"][row] >= MIN_QUALITY]
    neutral = {who[row]: row for row in reversed(trained) if expressions[row] is None}
    people = _vectors_of(data, faces, _some(list(neutral.values()), MOST_PEOPLE))
    of = {who[row]: vector for row, vector in people.items()}
    others = [row for row in trained if expressions[row] is not None and who[row] in of]
    again = _vectors_of(data, faces, _some(others, SAME_PEOPLE))
    alike = [float(vector @ of[who[row]]) for row, vector in again.items()]
    return Training(
        hashes=packed([table["pdq"][row] for row in clear]),
        files=tuple(data.files[row] for row in clear),
        faces=np.stack(list(people.values())) if people else np.zeros((0, 0), np.float32),
        same=float(np.quantile(alike, 0.05)) if alike else 1.0,
    )


def _vectors_of(data: Dataset, faces: Faces, rows: Sequence[int]) -> dict[int, NDArray[np.float32]]:
    """Row -> unit vector of a dataset's pictures that show a face."""
    found: dict[int, NDArray[np.float32]] = {}
    for start in range(0, len(rows), _AT_ONCE):
        some = rows[start : start + _AT_ONCE]
        for row, vector in zip(some, faces.vectors(data.pictures(some)), strict=True):
            if vector is not None:
                found[row] = vector
    return found


def _some(rows: Sequence[int], most: int) -> Sequence[int]:
    """All of them, or every n-th so that there are at most ``most``."""
    return rows[:: -(-len(rows) // most)] if rows else rows
