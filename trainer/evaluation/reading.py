"""From pictures to readings: judges look at every edit, at its source and at the true answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from registry.digest import Digest
from trainer.data.blobs import Blobs
from trainer.evaluation import metrics
from trainer.evaluation.editing import Edited
from trainer.evaluation.judges import Judges
from trainer.evaluation.plan import Ask, Plan, Portrait
from trainer.evaluation.readings import VALUES, Readings
from trainer.progress import Progress

_AT_ONCE = 256


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

    seen = judges.expression([Picture(digest=digest, blobs=blobs) for digest in digests])
    empty = (np.nan,) * len(judges.expression.expressions)
    judged = np.array([one.scores or empty for one in seen], np.float64)
    columns = [judges.expression.expressions.index(name) for name in plan.judged]
    values: dict[str, list[float]] = {name: [] for name in VALUES}
    sources: dict[int, _Source] = {}
    for (index, ask), digest in zip(keys, digests, strict=True):
        if index not in sources:
            sources[index] = _Source.of(plan, judges, index)
        found = _values(plan, judges, sources[index], index, ask, blobs.pixels(digest))
        for name in VALUES:
            values[name].append(found[name])
    return Readings(
        subjects=np.array([index for index, _ in keys], np.int64),
        asks=tuple(ask for _, ask in keys),
        judged=judged[:, columns],
        values={name: np.array(found, np.float64) for name, found in values.items()},
    )


@dataclass(frozen=True, slots=True)
class _Source:
    """A subject's source picture, whose face that is, and what lies outside of the face."""

    pixels: Portrait
    face: np.ndarray | None
    outside: np.ndarray

    @classmethod
    def of(cls, plan: Plan, judges: Judges, index: int) -> _Source:
        pixels = plan.pictures.source(index)
        return cls(pixels, judges.faces.vector(pixels), plan.pictures.outside(index))


def _values(
    plan: Plan, judges: Judges, source: _Source, index: int, ask: Ask, picture: Portrait
) -> Mapping[str, float]:
    face = None if source.face is None else judges.faces.vector(picture)
    truth = plan.pictures.truth(index, ask)
    return {
        "identity": float("nan") if face is None else float(metrics.cosine(source.face, face)),
        "psnr": float("nan") if truth is None else float(metrics.psnr(picture, truth)),
        "seam": float(metrics.seam_energy(picture)),
        "seam_truth": float("nan") if truth is None else float(metrics.seam_energy(truth)),
        "background_ssim": float("nan"),
        "background_lpips": float("nan"),
    }
