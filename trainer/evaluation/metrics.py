"""What an adapter is judged by: pure functions from arrays to one number a subject.

Every metric returns a float64 array ``[S]``, one value for each of the S subjects (identities), so that all
of them share one estimator: the mean over subjects, with a percentile-bootstrap interval over subjects
(`estimate`). Subjects are the unit of resampling because edits of one person are not independent.

Axes: S subjects, E asked expressions, K judged expressions, I intensities, N images, D embedding width.

Definitions whose exact formula the literature leaves open (structural confusion, control linearity, blend
success) are our own and carry a version: a change of any formula must raise `DEFINITIONS_VERSION`, which
every report states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DEFINITIONS_VERSION = "1"

Array = NDArray[np.float64]

_PEAK = 255.0
_MAX_PSNR = 60.0
_MAX_SEAM = 1000.0
_FLAT = 1e-9


# -- expression ------------------------------------------------------------------------------------------


def hits(judged: NDArray[np.floating], asked: NDArray[np.integer]) -> Array:
    """Whether the strongest judged expression of each edit is the asked one.

    Formula: [argmax_k judged[n, k] == asked[n]]; a row of NaN, where the judge saw nothing, is no hit.
    Range: 0 or 1, higher is better; guessing gives 1/K on average.
    Source: expression accuracy of expression-editing benchmarks, over all K classes.

    Args:
        judged: ``[N, K]``.
        asked: ``[N]`` indices into K.
    """
    return (np.argmax(np.nan_to_num(judged, nan=-np.inf), axis=1) == np.asarray(asked)).astype(np.float64)


def top1_accuracy(judged: NDArray[np.floating], asked: Sequence[int]) -> Array:
    """Share of edits whose strongest judged expression is the asked one.

    Formula: mean over e of [argmax_k judged[s, e, k] == asked[e]].
    Range: 0 to 1, higher is better; guessing gives 1/K.
    Source: expression accuracy of expression-editing benchmarks, over all K classes.

    Args:
        judged: ``[S, E, K]`` judge's vectors of the edits at intensity 1.
        asked: ``E`` indices into K.
    """
    return (np.argmax(judged, axis=2) == np.asarray(asked)[None, :]).mean(axis=1).astype(np.float64)


def structural_confusion(
    judged: NDArray[np.floating], asked: Sequence[int], pairs: Sequence[tuple[int, int]]
) -> Array:
    """Rate at which an edit is judged as the confusing partner of what was asked.

    Formula: mean over the declared pairs {a, b} and both directions of
    [argmax_k judged[s, asked a, k] == b] and [argmax_k judged[s, asked b, k] == a].
    Range: 0 to 1, lower is better. A wrong answer outside the pair counts as an error of accuracy, not as
    confusion. Source: mean structural confusion rate of PixelSmile; the formula is ours, version 1.

    Args:
        judged: ``[S, E, K]`` judge's vectors of the edits at intensity 1.
        asked: ``E`` indices into K.
        pairs: index pairs into K; pairs whose expressions were not both asked are an error.

    Raises:
        ValueError: no pairs, or a pair that was not asked.
    """
    if not pairs:
        raise ValueError("structural confusion needs at least one confusing pair")
    row_of = {expression: row for row, expression in enumerate(asked)}
    missing = sorted({k for pair in pairs for k in pair} - row_of.keys())
    if missing:
        raise ValueError(f"confusing pairs name expressions that were not asked: indices {missing}")
    winners = np.argmax(judged, axis=2)
    rates = [winners[:, row_of[a]] == b for x, y in pairs for a, b in ((x, y), (y, x))]
    return np.stack(rates, axis=1).mean(axis=1).astype(np.float64)


def confusion_matrix(judged: NDArray[np.floating], asked: Sequence[int]) -> Array:
    """Rates ``[E, K]`` at which an edit that asked e is judged as k; rows sum to 1."""
    winners = np.argmax(judged, axis=2)
    kinds = judged.shape[2]
    return np.stack(
        [np.bincount(winners[:, row], minlength=kinds) / len(winners) for row in range(len(asked))]
    )


# -- control ---------------------------------------------------------------------------------------------


def control_linearity(asked: NDArray[np.floating], judged: NDArray[np.floating]) -> Array:
    """Correlation between asked and judged intensity.

    Formula: Pearson r over the intensities for each subject and expression, then the mean over expressions.
    A response that does not move at all has no correlation and counts as 0.
    Range: -1 to 1, higher is better. Source: control linearity score of PixelSmile; formula ours, version 1.

    Args:
        asked: ``[I]`` intensities, at least two different ones.
        judged: ``[S, E, I]`` judged intensity of the asked expression.

    Raises:
        ValueError: fewer than two different intensities.
    """
    x = np.asarray(asked, dtype=np.float64)
    if np.unique(x).size < 2:
        raise ValueError("control linearity needs at least two different intensities")
    y = np.asarray(judged, dtype=np.float64)
    dx, dy = x - x.mean(), y - y.mean(axis=2, keepdims=True)
    scale = np.sqrt((dx**2).sum() * (dy**2).sum(axis=2))
    r = np.where(scale > _FLAT, (dx * dy).sum(axis=2) / np.maximum(scale, _FLAT), 0.0)
    return np.clip(r, -1.0, 1.0).mean(axis=1)


def monotonicity(judged: NDArray[np.floating]) -> Array:
    """Share of intensity steps at which the judged intensity rises.

    Formula: mean over expressions and adjacent intensities of [judged[i+1] > judged[i]].
    Range: 0 to 1, higher is better. Source: score monotonicity of slider evaluations.

    Args:
        judged: ``[S, E, I]``, intensities in rising order, I >= 2.
    """
    steps = np.diff(np.asarray(judged, dtype=np.float64), axis=2)
    return (steps > 0).mean(axis=(1, 2)).astype(np.float64)


def control_range(judged: NDArray[np.floating]) -> Array:
    """Judged intensity at the last intensity minus that at the first, mean over expressions.

    Range: about -1 to 1; an adapter that spans the whole scale between 0 and 1 reaches 1.

    Args:
        judged: ``[S, E, I]``, first intensity 0, last intensity 1.
    """
    values = np.asarray(judged, dtype=np.float64)
    return (values[:, :, -1] - values[:, :, 0]).mean(axis=1)


def blend_success(
    judged: NDArray[np.floating], asked: NDArray[np.floating], *, present: float = 0.5
) -> Array:
    """Share of blends in which every asked component is judged present.

    Formula: mean over blends of [min over components k of judged[s, b, k] / asked[b, k] >= present].
    Range: 0 to 1, higher is better. Source: blend success of PixelSmile (both components present);
    the threshold `present`, half of what was asked, is ours, version 1.

    Args:
        judged: ``[S, B, K]`` judge's vectors of the blends.
        asked: ``[B, K]`` asked intensities, 0 where an expression is no component.
        present: share of the asked intensity from which a component counts as there.

    Raises:
        ValueError: a blend that asks for nothing.
    """
    wanted = np.asarray(asked, dtype=np.float64)
    components = wanted > 0
    if not components.any(axis=1).all():
        raise ValueError("a blend must ask for at least one expression")
    there = (np.asarray(judged) >= present * wanted[None]) | ~components[None]
    return there.all(axis=2).mean(axis=1).astype(np.float64)


# -- identity --------------------------------------------------------------------------------------------


def cosine(a: NDArray[np.floating], b: NDArray[np.floating]) -> Array:
    """Cosine along the last axis, shapes broadcast; -1 to 1, and 0 where a vector is zero."""
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    norms = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
    return np.where(norms > _FLAT, (x * y).sum(axis=-1) / np.maximum(norms, _FLAT), 0.0).clip(-1.0, 1.0)


def identity_similarity(source: NDArray[np.floating], edits: NDArray[np.floating]) -> Array:
    """Cosine between the identity embeddings of a source portrait and its edits, mean over edits.

    Range: -1 to 1, higher is better; compare with the same-person ceiling, which is the same formula on
    true renders: a person who really smiles does not score 1 either.
    Source: ArcFace similarity (Deng et al., 2019) as used by face-editing benchmarks.

    Args:
        source: ``[S, D]``.
        edits: ``[S, E, D]``.
    """
    return cosine(source[:, None, :], edits).mean(axis=1)


def identity_ratio(similarity: NDArray[np.floating], ceiling: NDArray[np.floating]) -> Array:
    """Identity similarity of the edits as a share of the same-person ceiling, for each subject.

    Range: 0 to about 1, higher is better. Above 1 the edits stay nearer to the source than truth does,
    which points to edits that are too timid.

    Raises:
        ValueError: a ceiling that is not positive, which no working identity encoder gives.
    """
    top = np.asarray(ceiling, dtype=np.float64)
    if (top <= 0).any():
        raise ValueError("the same-person ceiling must be positive: does the encoder know the renders?")
    return np.asarray(similarity, dtype=np.float64) / top


# -- pixels ----------------------------------------------------------------------------------------------


def psnr(images: NDArray[np.uint8], truth: NDArray[np.uint8]) -> Array:
    """Peak signal-to-noise ratio of each image against its true render, in dB.

    Formula: 10 log10(255^2 / MSE) over height, width and channels, cut at 60 dB (equal images).
    Range: 0 to 60 dB, higher is better. Source: the usual definition, 8-bit peak.

    Args:
        images: ``[..., H, W, C]`` uint8.
        truth: same shape.

    Raises:
        ValueError: shapes differ.
    """
    if images.shape != truth.shape:
        raise ValueError(f"paired PSNR needs equal shapes, got {images.shape} and {truth.shape}")
    difference = images.astype(np.float64) - truth.astype(np.float64)
    error = (difference**2).mean(axis=(-3, -2, -1))
    floor = _PEAK**2 / 10 ** (_MAX_PSNR / 10)
    return np.asarray(10 * np.log10(_PEAK**2 / np.maximum(error, floor)))


def seam_energy(images: NDArray[np.uint8], *, cell: int = 8) -> Array:
    """How much stronger gradients are across token borders than inside tokens.

    Formula: mean squared difference of neighbouring pixels whose border is a multiple of `cell`, over that
    of all other neighbours; rows and columns together, for each image.
    Range: 0 to 1000 (cut), 1 means no seams, lower is better; the same measure on true renders says what
    the drawing itself contributes. An image without any gradient counts as 1.
    Source: after the block boundary impairment metric of Karunasekera and Kingsbury, 1995.

    Args:
        images: ``[..., H, W, C]``, H and W larger than `cell`.
        cell: pixels a token covers in each direction.

    Raises:
        ValueError: images not larger than one cell.
    """
    if images.shape[-3] <= cell or images.shape[-2] <= cell:
        raise ValueError(
            f"seam energy needs images larger than one token ({cell} pixels), not {images.shape}"
        )
    values = images.astype(np.float64)
    across, inside = [], []
    for axis in (-3, -2):
        energy = np.moveaxis(np.diff(values, axis=axis) ** 2, axis, -1)
        energy = energy.reshape(*images.shape[:-3], -1, energy.shape[-1]).mean(axis=-2)
        border = (np.arange(energy.shape[-1]) + 1) % cell == 0
        across.append(energy[..., border])
        inside.append(energy[..., ~border])
    top = np.concatenate(across, axis=-1).mean(axis=-1)
    bottom = np.concatenate(inside, axis=-1).mean(axis=-1)
    ratio = np.where(bottom > _FLAT, top / np.maximum(bottom, _FLAT), np.where(top > _FLAT, _MAX_SEAM, 1.0))
    return np.asarray(np.minimum(ratio, _MAX_SEAM))


def seam_excess(images: NDArray[np.uint8], truth: NDArray[np.uint8], *, cell: int = 8) -> Array:
    """Seam energy of each image over that of its true render, in which no seams are.

    Formula: seam_energy(image) / seam_energy(truth), at most 1000; the lines of the drawing that happen to
    lie on a token border are in both and cancel.
    Range: 0 to 1000, 1 means no seams beyond the drawing's own lines, lower is better.
    Source: ours, version 1.

    Args:
        images: ``[..., H, W, C]`` uint8.
        truth: same shape.
        cell: pixels a token covers in each direction.

    Raises:
        ValueError: shapes differ, or images are not larger than one cell.
    """
    if images.shape != truth.shape:
        raise ValueError(f"seam excess needs equal shapes, got {images.shape} and {truth.shape}")
    own = seam_energy(truth, cell=cell)
    return np.asarray(np.minimum(seam_energy(images, cell=cell) / np.maximum(own, 1 / _MAX_SEAM), _MAX_SEAM))
