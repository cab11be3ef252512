"""From pictures to readings: judges look at every edit, at its source and at the true answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from registry.digest import Digest
from trainer.data.blobs import Blobs
from trainer.evaluation import metrics
from trainer.evaluation.background import background_ssim
from trainer.evaluation.editing import Edited
from trainer.evaluation.judges import Judges
from trainer.evaluation.plan import Ask, Plan, Portrait
from trainer.evaluation.readings import VALUES, Readings
from trainer.progress import Progress

Array = NDArray[np.float64]

_AT_ONCE = 256
"""Pictures that the judge of expressions is shown together: one over a network is asked in parallel."""
_PIXELS = 1 << 24
"""Pixels that are open together."""


def read(plan: Plan, judges: Judges, edited: Edited, blobs: Blobs, progress: Progress) -> Readings:
    """What the judges say of each edit, in the order of ``edited``.

    Raises:
        DataError: a picture is missing or damaged.
        ApiError: a paid judge refuses its key, cannot be reached, or its budget is spent.
    """
    keys, parts = list(edited), list[Readings]()
    for start in range(0, len(keys), _AT_ONCE):
        progress("judge", start, len(keys), "pictures")
        part = keys[start : start + _AT_ONCE]
        parts.append(_read_some(plan, judges, part, [edited[key] for key in part], blobs))
    progress("judge", len(keys), len(keys), "pictures")
    return Readings.joined(parts)


def _read_some(
    plan: Plan, judges: Judges, keys: Sequence[tuple[int, Ask]], digests: Sequence[Digest], blobs: Blobs
) -> Readings:
    from trainer.scoring.scorer import Picture

    blobs = _Opened(blobs.folder)
    seen = judges.expression([Picture(digest=digest, blobs=blobs) for digest in digests])
    empty = (np.nan,) * len(judges.expression.expressions)
    judged = np.array([one.scores or empty for one in seen], np.float64)
    columns = [judges.expression.expressions.index(name) for name in plan.judged]
    values: dict[str, list[Array]] = {name: [] for name in VALUES}
    for rows in _alike([index for index, _ in keys]):
        index, pictures = keys[rows[0]][0], [blobs.pixels(digests[row]) for row in rows]
        asks = [keys[row][1] for row in rows]
        for found in _of_subject(plan, judges, index, asks, pictures):
            for name in VALUES:
                values[name].append(found[name])
    return Readings(
        subjects=np.array([index for index, _ in keys], np.int64),
        asks=tuple(ask for _, ask in keys),
        judged=judged[:, columns],
        values={name: np.concatenate(found) for name, found in values.items()},
    )


class _Opened(Blobs):
    """Keeps the pixels of its first pictures: the judges look at the same ones."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._kept: dict[Digest, Portrait] = {}

    def pixels(self, digest: Digest) -> Portrait:
        """See `Blobs`."""
        found = self._kept.get(digest)
        if found is None:
            found = super().pixels(digest)
            if (len(self._kept) + 1) * found.size <= 3 * _PIXELS:
                self._kept[digest] = found
        return found


def _alike(subjects: Sequence[int]) -> Iterator[list[int]]:
    """Cut rows into runs of one subject."""
    start = 0
    for row in range(1, len(subjects) + 1):
        if row == len(subjects) or subjects[row] != subjects[start]:
            yield list(range(start, row))
            start = row


def _of_subject(
    plan: Plan, judges: Judges, index: int, asks: Sequence[Ask], pictures: Sequence[Portrait]
) -> Iterator[Mapping[str, Array]]:
    """The values of a subject's pictures, some of them at a time."""
    source = _Source.of(plan, judges, index, (pictures[0].shape[0], pictures[0].shape[1]))
    size = max(1, _PIXELS // (source.pixels.shape[0] * source.pixels.shape[1]))
    for start in range(0, len(pictures), size):
        edits = np.stack(pictures[start : start + size])
        yield _values(plan, judges, source, index, asks[start : start + size], edits)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Source:
    """A subject's source picture in the size of its edits.

    Attributes:
        pixels: uint8 [H, W, 3].
        outside: [H, W], True outside of the face.
        face: whose face that is; None if there is none.
    """

    pixels: Portrait
    outside: NDArray[np.bool_]
    face: NDArray[np.float32] | None

    @classmethod
    def of(cls, plan: Plan, judges: Judges, index: int, size: tuple[int, int]) -> _Source:
        pixels = resized(plan.pictures.source(index), size)
        outside = resized(plan.pictures.outside(index).astype(np.uint8) * 255, size) > 127
        (face,) = _faces(judges, pixels[None], outside)
        return cls(pixels=pixels, outside=outside, face=face)


def _values(
    plan: Plan,
    judges: Judges,
    source: _Source,
    index: int,
    asks: Sequence[Ask],
    edits: NDArray[np.uint8],
) -> Mapping[str, Array]:
    """The values [N] of some edits [N, H, W, 3] of one subject."""
    nothing = np.full(len(edits), np.nan)
    found: dict[str, Array] = {
        "source_face": np.full(len(edits), float(source.face is not None)),
        "identity": nothing,
        "psnr": nothing,
        "seam": metrics.seam_energy(edits),
        "seam_truth": nothing,
        "background_ssim": background_ssim(source.pixels, edits, source.outside),
        "background_lpips": nothing,
    }
    if source.face is not None:
        faces = [np.full_like(source.face, np.nan) if one is None else one
                 for one in _faces(judges, edits, source.outside)]  # fmt: skip
        found["identity"] = np.clip(np.stack(faces).astype(np.float64) @ source.face, -1.0, 1.0)
    truths = [plan.pictures.truth(index, ask) for ask in asks]
    known = [resized(one, edits.shape[1:3]) for one in truths if one is not None]
    if len(known) == len(edits):
        truth = np.stack(known)
        found["psnr"], found["seam_truth"] = metrics.psnr(edits, truth), metrics.seam_energy(truth)
    if judges.background is not None:
        found["background_lpips"] = judges.background.distance(source.pixels, edits, source.outside)
    return found


def _faces(
    judges: Judges, pictures: NDArray[np.uint8], outside: NDArray[np.bool_]
) -> list[NDArray[np.float32] | None]:
    """Whose faces pictures [N, H, W, 3] show; an encoder that looks for one looks where the subject's is."""
    if judges.faces.finds and not outside.all():
        down, across = (_around((~outside).any(axis=axis)) for axis in (1, 0))
        pictures = pictures[:, down, across]
    return judges.faces.vectors(list(pictures))


def _around(inside: NDArray[np.bool_]) -> slice:
    """The stretch of a face with a quarter of it on either side: detectors want to see what is around."""
    places = inside.nonzero()[0]
    more = (places[-1] + 1 - places[0]) // 4
    return slice(max(0, places[0] - more), places[-1] + 1 + more)


def resized(pixels: NDArray[np.uint8], size: tuple[int, ...]) -> NDArray[np.uint8]:
    """A picture or mask, uint8 [H, W] or [H, W, 3], in another size (height, width); Lanczos."""
    if pixels.shape[:2] == tuple(size):
        return pixels
    from PIL import Image

    wide = Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling.LANCZOS)
    return np.asarray(wide, np.uint8)
