"""From judged pictures to values: the same measurement for adapters, the base and true renders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.evaluation import metrics
from trainer.evaluation.metrics import Array
from trainer.evaluation.plan import NEUTRAL, Ask, Plan, single, vector
from trainer.evaluation.report import Case, Curve, Value
from trainer.evaluation.sheets import Portrait
from trainer.portraits.renderer import EXPRESSIONS

Pixels = NDArray[np.uint8]
Judge = Callable[[Pixels], NDArray[np.float32]]
"""Images [N, H, W, 3] to one row each: 12 intensities, or a unit embedding."""

Key = tuple[int, Ask]


@dataclass(frozen=True, kw_only=True, slots=True)
class Gallery:
    """Pictures of people by what was asked, with what the judges say of them.

    Attributes:
        images: by index of the person and request.
        judged: intensities [12] of each picture.
        faces: identity embedding of each picture.
    """

    images: Mapping[Key, Portrait]
    judged: Mapping[Key, NDArray[np.float32]]
    faces: Mapping[Key, NDArray[np.float32]]

    @classmethod
    def of(
        cls, images: Mapping[Key, Portrait], expression: Judge, identity: Judge, batch: int = 256
    ) -> Gallery:
        """Judge all pictures, `batch` at a time."""
        keys = list(images)
        judged: dict[Key, NDArray[np.float32]] = {}
        faces: dict[Key, NDArray[np.float32]] = {}
        for start in range(0, len(keys), batch):
            part = keys[start : start + batch]
            pixels = np.stack([images[key] for key in part])
            judged |= zip(part, expression(pixels), strict=True)
            faces |= zip(part, identity(pixels), strict=True)
        return cls(images=images, judged=judged, faces=faces)

    def pictures(self, people: Sequence[int], asks: Sequence[Ask]) -> Pixels:
        """Pictures [S, A, H, W, 3] of people and requests."""
        return np.stack([[self.images[index, ask] for ask in asks] for index in people])

    def intensities(self, people: Sequence[int], asks: Sequence[Ask]) -> NDArray[np.float32]:
        """Judged intensities [S, A, 12]."""
        return np.stack([[self.judged[index, ask] for ask in asks] for index in people])

    def embeddings(self, people: Sequence[int], asks: Sequence[Ask]) -> NDArray[np.float32]:
        """Identity embeddings [S, A, D]."""
        return np.stack([[self.faces[index, ask] for ask in asks] for index in people])


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """Values of one metric by subject, and how many pictures (or curves) they rest on."""

    values: Array
    samples: int


def asked_indices(plan: Plan) -> list[int]:
    """Where the plan's expressions lie in the judge's vector."""
    return [EXPRESSIONS.index(name) for name in plan.expressions]


def full_strength(plan: Plan, edits: Gallery, truth: Gallery) -> dict[str, Measured]:
    """Metrics of the edits at intensity 1; `truth` holds the sources and the true renders."""
    people, asks = range(len(plan.subjects)), [single(name, 1.0) for name in plan.expressions]
    asked, judged = asked_indices(plan), edits.intensities(people, asks)
    pictures, renders = edits.pictures(people, asks), truth.pictures(people, asks)
    source = truth.embeddings(people, [NEUTRAL])[:, 0]
    found = {
        "top1_accuracy": metrics.top1_accuracy(judged, asked),
        "identity_similarity": metrics.identity_similarity(source, edits.embeddings(people, asks)),
        "paired_psnr": metrics.psnr(pictures, renders).mean(axis=1),
        "seam_energy": metrics.seam_energy(pictures).mean(axis=1),
        "seam_excess": metrics.seam_excess(pictures, renders).mean(axis=1),
    }
    counts = dict.fromkeys(found, len(people) * len(asks))
    if plan.pairs:
        pairs = [(EXPRESSIONS.index(a), EXPRESSIONS.index(b)) for a, b in plan.pairs]
        found["structural_confusion"] = metrics.structural_confusion(judged, asked, pairs)
        counts["structural_confusion"] = len(people) * 2 * len(pairs)
    return {name: Measured(values=values, samples=counts[name]) for name, values in found.items()}


def control(plan: Plan, edits: Gallery) -> dict[str, Measured]:
    """Metrics of the response to intensity, and of blends."""
    curves = _curves(plan, edits)
    levels = np.array(plan.intensities)
    one = plan.intensities.index(1.0) + 1
    found = {
        "control_linearity": metrics.control_linearity(levels, curves),
        "monotonicity": metrics.monotonicity(curves),
        "control_range": metrics.control_range(curves[:, :, :one]),
    }
    subjects, expressions, intensities = curves.shape
    pictures = subjects * (expressions * (intensities - 1) + 1)  # all expressions share the neutral picture
    result = {name: Measured(values=values, samples=pictures) for name, values in found.items()}
    if plan.blended:
        judged = edits.intensities(plan.blended, plan.blends)
        success = metrics.blend_success(judged, np.stack([vector(blend) for blend in plan.blends]))
        result["blend_success"] = Measured(values=success, samples=judged.shape[0] * judged.shape[1])
    return result


def value(measured: Measured, plan: Plan) -> Value:
    """The report's value: mean and interval over subjects."""
    return Value.of(metrics.estimate(measured.values, seed=plan.seed), measured.samples)


def response_curves(plan: Plan, edits: Gallery) -> tuple[Curve, ...]:
    """Judged intensity of each expression at every asked one, with intervals."""
    curves = _curves(plan, edits)
    people = curves.shape[0]
    return tuple(
        Curve(
            expression=name,
            asked=plan.intensities,
            judged=tuple(
                value(Measured(values=curves[:, row, level], samples=people), plan)
                for level in range(len(plan.intensities))
            ),
        )
        for row, name in enumerate(plan.expressions)
    )


def confusion(plan: Plan, edits: Gallery) -> tuple[tuple[float, ...], ...]:
    """Rates at which an expression asked at intensity 1 (row) is judged as another (column, all 12)."""
    asks = [single(name, 1.0) for name in plan.expressions]
    matrix = metrics.confusion_matrix(edits.intensities(range(len(plan.subjects)), asks), asked_indices(plan))
    return tuple(tuple(round(rate, 6) for rate in row) for row in matrix.tolist())


def cases(plan: Plan, edits: Gallery, truth: Gallery) -> list[tuple[int, Case]]:
    """Every edit at intensity 1 with its person, the worst first: wrong expression, then lowest PSNR."""
    found = []
    for index, subject in enumerate(plan.subjects):
        source = truth.faces[index, NEUTRAL]
        for name in plan.expressions:
            key = (index, single(name, 1.0))
            judged = edits.judged[key]
            case = Case(
                identity=subject.name,
                expression=name,
                judged_as=EXPRESSIONS[int(np.argmax(judged))],
                judged_intensity=float(judged[EXPRESSIONS.index(name)]),
                identity_similarity=float(metrics.cosine(source, edits.faces[key])),
                paired_psnr=float(metrics.psnr(edits.images[key], truth.images[key])),
            )
            found.append((index, case))
    return sorted(found, key=lambda item: (item[1].judged_as == item[1].expression, item[1].paired_psnr))


def _curves(plan: Plan, edits: Gallery) -> Array:
    """Judged intensity [S, E, I] of the asked expression."""
    people, columns = range(len(plan.subjects)), []
    for name in plan.expressions:
        asks = [single(name, level) for level in plan.intensities]
        columns.append(edits.intensities(people, asks)[:, :, EXPRESSIONS.index(name)])
    return np.stack(columns, axis=1).astype(np.float64)
