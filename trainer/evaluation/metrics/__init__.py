"""What an adapter is judged by: pure functions from arrays to one value an edit, or one value a curve.

`trainer.evaluation.measure` hands them what judges said and turns their values into samples of subjects;
`trainer.evaluation.catalogue` says what each is called. Nothing here reads a file or knows a model.

Axes: N edits, K classes of the judge of expressions, C curves, I intensities. A picture in which the judge of
expressions sees nothing is a row of NaN: it shows no expression, so every intensity of it counts as 0 and
nothing wins. A picture without a face has the identity NaN: it is nobody's, so its similarity counts as 0.

The paper of PixelSmile (arXiv 2603.25728) names mSCR, Acc-6, Acc-12, CLS-6, CLS-12, HES and ID Sim. Its exact
formulas are not public to us, so ours are written down here, with a version that every report states.
"""

from trainer.evaluation.metrics.control import LINEAR_LEVELS, control_linearity, control_range, monotonicity
from trainer.evaluation.metrics.expression import (
    PRESENT,
    blend_success,
    confused,
    expression_score,
    hits,
    leakage,
    neutral_drift,
    seen,
    unjudged,
    winners,
)
from trainer.evaluation.metrics.identity import (
    LAZY_GAIN,
    LAZY_IDENTITY,
    LOST,
    LOST_SHARE,
    cosine,
    face_lost,
    harmonic_score,
    identity_kept,
    identity_ratio,
    lazy,
    over_edited,
)
from trainer.evaluation.metrics.pixels import psnr, seam_energy, seam_excess

DEFINITIONS_VERSION = "2"
"""Raised with every change of a formula or of a constant in it."""

__all__ = [
    "DEFINITIONS_VERSION",
    "LAZY_GAIN",
    "LAZY_IDENTITY",
    "LINEAR_LEVELS",
    "LOST",
    "LOST_SHARE",
    "PRESENT",
    "blend_success",
    "confused",
    "control_linearity",
    "control_range",
    "cosine",
    "expression_score",
    "face_lost",
    "harmonic_score",
    "hits",
    "identity_kept",
    "identity_ratio",
    "lazy",
    "leakage",
    "monotonicity",
    "neutral_drift",
    "over_edited",
    "psnr",
    "seam_energy",
    "seam_excess",
    "seen",
    "unjudged",
    "winners",
]
