"""Whether the judged intensity follows the asked one.

Curves go from 0 to 1, although a sweep may go on: at 1 an expression is there in full, so the scales of
judges end there, and an adapter that is signed for less must not look better than one that can exaggerate.
What happens beyond 1 is in the report's charts.
"""

from __future__ import annotations

import numpy as np

from trainer.evaluation.metrics.expression import Array, Floats, seen

LINEAR_LEVELS = 3
"""Fewer different intensities always lie on a line."""
_FLAT = 1e-9


def control_linearity(asked: Floats, judged: Floats) -> Array:
    """Correlation between asked and judged intensity, for each curve.

    Formula: Pearson's r over the I intensities of one subject and one expression. A response that does not
    move at all has no correlation and counts as 0.
    Range: -1 to 1, higher is better. Source: CLS-12 of PixelSmile, and CLS-6 over the basic expressions; the
    range of the sweep, 0 to 1, and the mean over curves are ours.

    Args:
        asked: [I], at least `LINEAR_LEVELS` different ones.
        judged: [C, I] judged intensity of the asked expression.

    Raises:
        ValueError: too few different intensities.
    """
    x = np.asarray(asked, np.float64)
    if np.unique(x).size < LINEAR_LEVELS:
        raise ValueError(f"control linearity needs at least {LINEAR_LEVELS} different intensities")
    y = seen(judged)
    dx, dy = x - x.mean(), y - y.mean(axis=1, keepdims=True)
    scale = np.sqrt((dx**2).sum() * (dy**2).sum(axis=1))
    r = np.where(scale > _FLAT, (dx * dy).sum(axis=1) / np.maximum(scale, _FLAT), 0.0)
    return np.clip(r, -1.0, 1.0)


def monotonicity(judged: Floats) -> Array:
    """Share of intensity steps at which the judged intensity rises, for each curve.

    Formula: mean over adjacent intensities of [judged[c, i + 1] > judged[c, i]].
    Range: 0 to 1, higher is better; noise gives 0.5. Source: score monotonicity of slider evaluations.

    Args:
        judged: [C, I], intensities in rising order, I >= 2.
    """
    return np.asarray((np.diff(seen(judged), axis=1) > 0).mean(axis=1))


def control_range(at_full: Floats, at_zero: Floats) -> Array:
    """Judged intensity of the asked expression where 1 is asked, minus that where 0 is asked.

    Range: about -1 to 1, higher is better; an adapter that spans the whole scale reaches 1. Source: ours.

    Args:
        at_full: [N].
        at_zero: [N] of the same subject and expression.
    """
    return seen(at_full) - seen(at_zero)
