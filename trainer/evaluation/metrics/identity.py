"""Whether an edit still shows the same person, and what it costs in expression."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trainer.evaluation.metrics.expression import Array, Floats

LAZY_IDENTITY = 0.95
"""An edit at least this near to its source, of what a true answer is, may have copied it."""
LAZY_GAIN = 0.2
"""Less than this of the asked intensity is no expression."""
LOST_SHARE = 0.6
"""An edit below this share of the true answer's similarity shows somebody else."""
LOST = 0.3
"""The same where no true answer exists: a cosine at which encoders take two photographs for two people."""
_FLAT = 1e-9


def cosine(a: Floats, b: Floats) -> Array:
    """Cosine along the last axis, shapes broadcast; -1 to 1, and 0 where a vector is zero.

    Between the embeddings of a source and its edit it is identity similarity, higher is better. Compare it
    with the same-person ceiling, the same cosine of the true answer: a person who really smiles does not
    score 1 either.
    Source: ArcFace similarity (Deng et al., 2019), "ID Sim" of PixelSmile.
    """
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    norms = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
    return np.where(norms > _FLAT, (x * y).sum(axis=-1) / np.maximum(norms, _FLAT), 0.0).clip(-1.0, 1.0)


def identity_kept(similarity: Floats) -> Array:
    """Identity similarity [N] with 0 where no face was found: nobody's face is nobody's."""
    found = np.asarray(similarity, np.float64)
    return np.where(np.isfinite(found), found, 0.0)


def face_lost(similarity: Floats) -> Array:
    """Whether no face was found in an edit.

    Formula: [similarity[n] is missing]. Range: 0 or 1, lower is better. Source: ours.

    Args:
        similarity: [N].
    """
    return np.asarray(~np.isfinite(np.asarray(similarity, np.float64)), np.float64)


def identity_ratio(similarity: Floats, ceiling: Floats) -> Array:
    """Identity similarity as a share of the same-person ceiling.

    Formula: similarity[n] / ceiling[n], the ceiling being the mean similarity of the subject's own true
    answers.
    Range: 0 to about 1, higher is better. Above 1 edits stay nearer to the source than truth does, which
    points to edits that are too timid. Source: ours.

    Args:
        similarity: [N]; NaN (no face) counts as 0.
        ceiling: [N] positive.

    Raises:
        ValueError: a ceiling that is not positive, which no encoder gives that knows the people.
    """
    top = np.asarray(ceiling, np.float64)
    if not (top > 0).all():
        raise ValueError("the same-person ceiling must be positive: does the encoder know these people?")
    return identity_kept(similarity) / top


def harmonic_score(expression: Floats, similarity: Floats) -> Array:
    """Expression and identity in one figure, which neither can carry alone.

    Formula: 2 E I / (E + I) with E the judged intensity of the asked expression and I the identity
    similarity, both cut to 0 to 1; 0 where both are 0.
    Range: 0 to 1, higher is better. A copy of the source has E = 0, another person's smile has I = 0; both
    score 0.
    Source: HES of PixelSmile; taking it for each edit at intensity 1, and then the mean, is ours.

    Args:
        expression: [N].
        similarity: [N]; NaN (no face) counts as 0.
    """
    e = np.clip(np.nan_to_num(np.asarray(expression, np.float64)), 0.0, 1.0)
    i = np.clip(identity_kept(similarity), 0.0, 1.0)
    total = e + i
    return np.where(total > _FLAT, 2 * e * i / np.maximum(total, _FLAT), 0.0)


def lazy(gain: Floats, similarity: Floats, ceiling: Floats | None = None) -> Array:
    """Whether an edit copied its source: the person is all there and the expression is not.

    Formula: [gain[n] < LAZY_GAIN and similarity[n] >= LAZY_IDENTITY * ceiling[n]].
    Range: 0 or 1, lower is better. Source: lazy edits of PixelSmile; both bounds are ours.

    Args:
        gain: [N] judged intensity of the asked expression at 1 minus that at 0.
        similarity: [N]; NaN (no face) is no copy.
        ceiling: [N] similarity of the true answers; None, or NaN in it, is 1.
    """
    near = identity_kept(similarity) >= LAZY_IDENTITY * _ceiling(ceiling, similarity)
    return (near & (np.nan_to_num(np.asarray(gain, np.float64)) < LAZY_GAIN)).astype(np.float64)


def over_edited(similarity: Floats, ceiling: Floats | None = None) -> Array:
    """Whether an edit lost the person, with or without the expression.

    Formula: [similarity[n] < LOST_SHARE * ceiling[n]], or [similarity[n] < LOST] where there is no true
    answer.
    Range: 0 or 1, lower is better. Source: over-edits of PixelSmile; both bounds are ours.

    Args:
        similarity: [N]; NaN (no face) is lost.
        ceiling: [N] similarity of the true answers; None, or NaN in it, where there is none.
    """
    found = identity_kept(similarity)
    top = np.full(found.shape, np.nan) if ceiling is None else np.asarray(ceiling, np.float64)
    bound = np.where(np.isfinite(top), LOST_SHARE * np.nan_to_num(top), LOST)
    return (found < bound).astype(np.float64)


def _ceiling(ceiling: Floats | None, like: Floats) -> NDArray[np.float64]:
    if ceiling is None:
        return np.ones(np.shape(like))
    top = np.asarray(ceiling, np.float64)
    return np.where(np.isfinite(top), top, 1.0)
