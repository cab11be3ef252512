"""Several answers about one picture: their median, how far they lie apart, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trainer.portraits.expressions import EXPRESSIONS
from trainer.scoring.answer import Sample
from trainer.scoring.scorer import Scored


def combine(samples: Sequence[Sample], max_disagreement: float) -> Scored:
    """Return what n answers say together.

    Formulas, over n samples with scores s[i, e] and stated confidences c[i], all in 0 to 1: score = median
    over i of s[i, e]; disagreement = max over e of (max over i - min over i of s[i, e]), 0 for one sample;
    confidence = median over i of c[i] times (1 - disagreement). So a model that is sure of itself and says
    something else each time is not believed.

    Args:
        samples: at least one.
        max_disagreement: above it a person has to look.

    Raises:
        ValueError: there are no samples.
    """
    if not samples:
        raise ValueError("at least one sample is needed")
    rows = np.array([sample.scores for sample in samples], np.float64)
    spread = rows.max(axis=0) - rows.min(axis=0)
    widest = int(spread.argmax())
    disagreement = float(spread[widest])
    stated = float(np.median([sample.confidence for sample in samples]))
    # Scores are decimal fractions: 0.75 - 0.5 may come out as 0.25000000000000006.
    apart = disagreement > max_disagreement + 1e-9
    return Scored(
        scores=tuple(np.median(rows, axis=0).tolist()),
        confidence=stated * (1 - disagreement),
        disagreement=disagreement,
        samples=tuple(sample.scores for sample in samples),
        status="review" if apart else "scored",
        reason=f"samples differ by {disagreement:.2f} in {EXPRESSIONS[widest]}" if apart else None,
    )
