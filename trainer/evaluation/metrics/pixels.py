"""What pixels tell without a judge: distance to the true answer, and seams between tokens.

What changed outside of the face is in `trainer.evaluation.background`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trainer.evaluation.metrics.expression import Array, Floats

_PEAK = 255.0
_MAX_PSNR = 60.0
_MAX_SEAM = 1000.0
_FLAT = 1e-9


def psnr(images: NDArray[np.uint8], truth: NDArray[np.uint8]) -> Array:
    """Peak signal-to-noise ratio of each image against the true answer, in dB.

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


def seam_excess(seam: Floats, truth: Floats) -> Array:
    """Seam energy of each image over that of the true answer, in which no seams are.

    Formula: seam[n] / truth[n], at most 1000; lines of the picture that happen to lie on a token border are
    in both and cancel.
    Range: 0 to 1000, 1 means no seams beyond the picture's own lines, lower is better. Source: ours.

    Args:
        seam: [N] `seam_energy` of the images.
        truth: [N] that of the true answers; NaN where there is none, and then the result is NaN.
    """
    own = np.maximum(np.asarray(truth, np.float64), 1 / _MAX_SEAM)
    return np.asarray(np.minimum(np.asarray(seam, np.float64) / own, _MAX_SEAM))
