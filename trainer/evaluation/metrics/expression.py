"""Whether an edit shows what was asked, and what it shows beside that."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Floats = NDArray[np.floating]
Indices = NDArray[np.integer]

PRESENT = 0.5
"""Share of the asked intensity from which a component of a blend counts as there."""


def seen(judged: Floats) -> Array:
    """Judged intensities with 0 where the judge saw nothing, the shape of ``judged``."""
    found = np.asarray(judged, np.float64)
    return np.where(np.isfinite(found), found, 0.0)


def unjudged(judged: Floats) -> Array:
    """Whether the judge of expressions saw nothing in an edit.

    Formula: [a score of judged[n] is missing]. Range: 0 or 1, lower is better. Source: ours; such an edit
    counts as showing no expression, and the rate says how many figures rest on that.

    Args:
        judged: [N, K].
    """
    missing = ~np.isfinite(np.asarray(judged, np.float64))
    return np.asarray(missing.any(axis=1), np.float64)


def winners(judged: Floats, among: Sequence[int] | None = None) -> NDArray[np.int64]:
    """The strongest judged expression of each edit.

    Formula: argmax_k judged[n, k]; -1 where two share the highest value, or the judge saw nothing: whoever
    lists the classes in another order must get the same answer.

    Args:
        judged: [N, K].
        among: the classes that can win; None is all of them.

    Returns:
        [N] indices into K, or -1.
    """
    found = np.asarray(judged, np.float64)
    columns = np.arange(found.shape[1]) if among is None else np.asarray(among, np.int64)
    own = seen(found)[:, columns]
    best = own.max(axis=1, keepdims=True)
    clear = ((own == best).sum(axis=1) == 1) & np.isfinite(found).any(axis=1)
    return np.where(clear, columns[own.argmax(axis=1)], -1)


def hits(judged: Floats, asked: Indices, among: Sequence[int] | None = None) -> Array:
    """Whether the asked expression is judged strongest.

    Formula: [winner(n) == asked[n]]. With all K classes the mean is accuracy over 12, with ``among`` the six
    basic ones it is accuracy over 6: then only edits that ask for one of the six belong here.
    Range: 0 or 1, higher is better; guessing gives 1/K, or 1/6.
    Source: Acc-12 and Acc-6 of PixelSmile. That the winner is looked for among the six alone, and that a tie
    is no hit, is ours.

    Args:
        judged: [N, K].
        asked: [N] indices into K.
        among: see `winners`.
    """
    return np.asarray(winners(judged, among) == np.asarray(asked), np.float64)


def confused(judged: Floats, partner: Indices) -> Array:
    """Whether an edit is judged as the confusing partner of what it asks for.

    Formula: [winner(n) == partner[n]] over all K classes. The mean structural confusion rate is the mean over
    the declared pairs {a, b} and both directions of the rates at which a is taken for b, and b for a. A wrong
    answer outside of the pair is an error of accuracy and no confusion.
    Range: 0 or 1, lower is better. Source: mSCR of PixelSmile; which pairs are declared and the mean are
    ours.

    Args:
        judged: [N, K].
        partner: [N] indices into K.
    """
    return hits(judged, partner)


def expression_score(judged: Floats, asked: Indices) -> Array:
    """Judged intensity of the asked expression, cut to 0 to 1; exaggeration earns nothing.

    Args:
        judged: [N, K].
        asked: [N] indices into K.
    """
    return np.clip(seen(judged)[np.arange(len(asked)), np.asarray(asked)], 0.0, 1.0)


def leakage(judged: Floats, asked: Indices, expected: Floats | None = None) -> Array:
    """How much of the expressions that were not asked for an edit shows, above what the true answer shows.

    Formula: mean over the K - 1 classes k other than asked[n] of max(0, judged[n, k] - max(0, expected[n,
    k])).
    Range: 0 to about 1, lower is better. Source: ours. Expressions share cues, so that even a true answer is
    judged to show a little of others; what is above that was changed without being asked.

    Args:
        judged: [N, K].
        asked: [N] indices into K.
        expected: [N, K] the judge on the true answers; None counts them as 0.
    """
    above = np.maximum(seen(judged) - (0.0 if expected is None else np.maximum(seen(expected), 0.0)), 0.0)
    above[np.arange(len(above)), np.asarray(asked)] = 0.0
    return np.asarray(above.sum(axis=1) / max(1, above.shape[1] - 1))


def neutral_drift(judged: Floats, expected: Floats | None = None) -> Array:
    """The expression that an edit shows although it asks for none.

    Formula: max_k max(0, judged[n, k] - max(0, expected[n, k])).
    Range: 0 to about 1, lower is better. Source: ours.

    Args:
        judged: [N, K] of edits that ask for nothing.
        expected: [N, K] the judge on the true answers; None counts them as 0.
    """
    above = seen(judged) - (0.0 if expected is None else np.maximum(seen(expected), 0.0))
    return np.asarray(np.maximum(above.max(axis=1), 0.0))


def blend_success(judged: Floats, asked: Floats, *, present: float = PRESENT) -> Array:
    """Whether every component of a blend is judged present.

    Formula: [min over components k of judged[n, k] / asked[n, k] >= present].
    Range: 0 or 1, higher is better. Source: blends of PixelSmile, where both components must be there; that
    half of what was asked counts as there is ours.

    Args:
        judged: [N, K].
        asked: [N, K] asked intensities, 0 where an expression is no component.
        present: share of the asked intensity from which a component counts as there.

    Raises:
        ValueError: a blend that asks for nothing.
    """
    wanted = np.asarray(asked, np.float64)
    components = wanted > 0
    if not components.any(axis=1).all():
        raise ValueError("a blend must ask for at least one expression")
    there = (seen(judged) >= present * wanted) | ~components
    return np.asarray(there.all(axis=1), np.float64)
