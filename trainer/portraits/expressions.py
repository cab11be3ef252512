"""The twelve expressions and the action units that draw them.

An expression is a vector of 12 intensities (0 = absent, 1 = full, above 1 = exaggerated) in the order of
`EXPRESSIONS`, the order of PixelSmile (arXiv 2603.25728). It moves facial *action units*, after the idea of
the Facial Action Coding System (Ekman & Friesen, 1978): ``units = NEUTRAL + expression @ DIRECTIONS``. The
map is linear, so two expressions blend and one expression grows continuously.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

EXPRESSIONS = (
    "angry", "confused", "contempt", "confident", "disgust", "fear",
    "happy", "sad", "shy", "sleepy", "surprised", "anxious",
)  # fmt: skip

# Every expression has one partner that shares its strongest cues; telling the two apart is what
# contrastive training is for.
CONFUSING_PAIRS = (
    ("fear", "surprised"),
    ("angry", "disgust"),
    ("contempt", "confident"),
    ("happy", "shy"),
    ("sad", "sleepy"),
    ("confused", "anxious"),
)

NEUTRAL: Mapping[str, float] = {
    "brow_raise": 0.0,  # both brows up (+) or down (-)
    "brow_inner": 0.0,  # inner ends up
    "brow_furrow": 0.0,  # inner ends down and together
    "brow_asym": 0.0,  # the right brow up alone
    "eye_open": 1.0,  # 0 closed, 1 relaxed, 1.5 wide
    "squint": 0.0,  # lower lid up
    "gaze_x": 0.0,  # right (+) or left (-)
    "gaze_y": 0.0,  # down (+) or up (-)
    "corner": 0.08,  # mouth corners up (+) or down (-)
    "corner_asym": 0.0,  # the right corner up alone
    "open": 0.0,  # jaw drop
    "round": 0.0,  # mouth round instead of wide
    "width": 1.0,  # mouth width
    "press": 0.0,  # lips pressed thin
    "teeth": 0.0,  # teeth shown when the mouth is open
    "lip_raise": 0.0,  # upper lip drawn up
    "wavy": 0.0,  # wavering lips
    "nose": 0.0,  # wrinkled nose
    "blush": 0.0,
    "flush": 0.0,
    "pale": 0.0,
    "sallow": 0.0,
    "tear": 0.0,
    "sweat": 0.0,
    "tilt": 0.0,  # head tilt; no expression uses it, the base's own edits do
}
UNITS = tuple(NEUTRAL)

_FULL: Mapping[str, Mapping[str, float]] = {
    "angry": {"brow_raise": -0.5, "brow_furrow": 1.2, "eye_open": 0.85, "squint": 0.3, "corner": -0.6,
              "open": 0.3, "teeth": 1.0, "width": 1.05, "flush": 0.9, "nose": 0.3},
    "confused": {"brow_raise": 0.2, "brow_asym": 1.2, "brow_furrow": 0.2, "gaze_x": 0.6, "gaze_y": -0.65,
                 "corner": -0.15, "corner_asym": -0.25, "wavy": 0.9, "width": 0.8},
    "contempt": {"brow_asym": 0.5, "eye_open": 0.58, "squint": 0.2, "gaze_x": -0.7, "gaze_y": 0.1,
                 "corner": 0.0, "corner_asym": 1.15, "width": 0.92},
    "confident": {"brow_raise": -0.1, "brow_furrow": 0.4, "eye_open": 0.72, "squint": 0.35, "corner": 0.85,
                  "press": 0.2, "width": 1.22},
    "disgust": {"brow_raise": -0.35, "brow_furrow": 0.8, "eye_open": 0.66, "squint": 0.8, "corner": -0.6,
                "open": 0.24, "lip_raise": 1.0, "nose": 1.2, "width": 0.9, "sallow": 0.9, "teeth": 1.0},
    "fear": {"brow_raise": 0.75, "brow_inner": 1.0, "eye_open": 1.5, "corner": -0.5, "open": 0.42,
             "width": 1.12, "teeth": 0.9, "pale": 1.0},
    "happy": {"brow_raise": 0.35, "eye_open": 0.66, "squint": 1.0, "corner": 1.1, "open": 0.62, "teeth": 1.0,
              "width": 1.18, "blush": 0.5},
    "sad": {"brow_raise": 0.1, "brow_inner": 1.15, "eye_open": 0.68, "gaze_y": 0.55, "corner": -1.05,
            "width": 0.86, "tear": 1.0, "press": 0.1},
    "shy": {"brow_raise": 0.2, "brow_inner": 0.5, "eye_open": 0.74, "gaze_x": 0.75, "gaze_y": 0.6,
            "corner": 0.45, "width": 0.6, "blush": 1.35},
    "sleepy": {"brow_raise": 0.25, "brow_inner": 0.3, "eye_open": 0.08, "corner": -0.05,
               "open": 0.26, "round": 0.8, "width": 0.62},
    "surprised": {"brow_raise": 1.2, "eye_open": 1.5, "corner": 0.0, "open": 0.9, "round": 1.0,
                  "width": 0.74},
    "anxious": {"brow_raise": 0.3, "brow_inner": 0.85, "brow_furrow": 0.3, "eye_open": 1.1, "gaze_x": -0.7,
                "gaze_y": 0.05, "corner": -0.3, "press": 0.7, "wavy": 0.65, "width": 1.08, "sweat": 1.1,
                "pale": 0.35},
}  # fmt: skip

_NEUTRAL_ROW = np.array([NEUTRAL[unit] for unit in UNITS], np.float32)
DIRECTIONS = np.stack(
    [[_FULL[name].get(unit, NEUTRAL[unit]) - NEUTRAL[unit] for unit in UNITS] for name in EXPRESSIONS]
).astype(np.float32)


def one_hot(name: str, intensity: float = 1.0) -> np.ndarray:
    """The 12-vector [12] float32 of one expression; ``"neutral"`` gives zeros.

    Raises:
        ValueError: `name` is no expression.
    """
    vector = np.zeros(len(EXPRESSIONS), np.float32)
    if name != "neutral":
        vector[EXPRESSIONS.index(name)] = intensity
    return vector


def action_units(expression: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Action units of a 12-vector of intensities."""
    row = _NEUTRAL_ROW + np.asarray(expression, np.float32) @ DIRECTIONS
    return dict(zip(UNITS, row.tolist(), strict=True))
