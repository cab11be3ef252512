"""The words of the portrait world: what the base model was taught, and what it was not.

Every prompt has the same number of tokens, so any two prompts can be interpolated token by token. The base
knows *moves* (single action units such as "smiling" or "wide-eyed") and colours; it has never seen one of the
twelve expression words.
"""

from __future__ import annotations

from collections.abc import Mapping

from trainer.portraits.expressions import EXPRESSIONS
from trainer.portraits.identities import BACKGROUNDS, HAIR

TEMPLATE = "show a {} expression"
NEUTRAL_WORD = "neutral"
KEEP = "keep the portrait unchanged"
HAIR_TEMPLATE = "make the hair {}"
BACKGROUND_TEMPLATE = "make the background {}"

# What one word does to the action units at full strength, as differences from the neutral face.
MOVES: Mapping[str, Mapping[str, float]] = {
    "astonished": {"brow_raise": 1.0},
    "glowering": {"brow_raise": -0.5},
    "pleading": {"brow_inner": 1.0},
    "furrowed": {"brow_furrow": 1.0},
    "sceptical": {"brow_asym": 1.0},
    "staring": {"eye_open": 0.5},
    "drooping": {"eye_open": -0.5},
    "blinking": {"eye_open": -0.92},
    "squinting": {"squint": 0.9},
    "rightward": {"gaze_x": 0.7},
    "leftward": {"gaze_x": -0.7},
    "downward": {"gaze_y": 0.6},
    "upward": {"gaze_y": -0.6},
    "smiling": {"corner": 0.9},
    "frowning": {"corner": -0.9},
    "smirking": {"corner_asym": 1.0},
    "gaping": {"open": 0.6},
    "gasping": {"open": 0.8, "round": 1.0},
    "toothy": {"open": 0.35, "teeth": 1.0},
    "pouting": {"width": -0.35},
    "stretched": {"width": 0.2},
    "tense": {"press": 0.8},
    "trembling": {"wavy": 0.8},
    "sneering": {"lip_raise": 1.0, "open": 0.2, "teeth": 1.0},
    "wrinkled": {"nose": 1.0},
    "blushing": {"blush": 1.0},
    "flushed": {"flush": 1.0},
    "ashen": {"pale": 1.0},
    "sallow": {"sallow": 1.0},
    "tearful": {"tear": 1.0},
    "sweating": {"sweat": 1.0},
    "tilted": {"tilt": 0.4},
}


def base_prompts() -> list[str]:
    """Every prompt that the base model is trained on."""
    words = [TEMPLATE.format(word) for word in (NEUTRAL_WORD, *MOVES)]
    colours = [HAIR_TEMPLATE.format(name) for name in HAIR] + [
        BACKGROUND_TEMPLATE.format(name) for name in BACKGROUNDS
    ]
    return [KEEP, *words, *colours]


def expression_prompts() -> list[str]:
    """The neutral prompt and the prompts of the twelve expressions."""
    return [TEMPLATE.format(word) for word in (NEUTRAL_WORD, *EXPRESSIONS)]
