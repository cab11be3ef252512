"""Fresh, endless pictures for training the portrait world's own models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from trainer.portraits.expressions import NEUTRAL
from trainer.portraits.identities import BACKGROUNDS, CLOTHES, HAIR, Domain, Identity, Pose, identity
from trainer.portraits.prompts import MOVES

TRAINING_SEEDS = range(1_000_000, 1_000_000_000)  # identities below are free for data sets and held-out tests


def draw_identity(rng: np.random.Generator) -> Identity:
    """A random person of either domain."""
    domain: Domain = "human" if rng.random() < 0.62 else "anime"
    return identity(int(rng.integers(TRAINING_SEEDS.start, TRAINING_SEEDS.stop)), domain)


def draw_pose(rng: np.random.Generator) -> Pose:
    """A random placement, within the range of `identities.pose`."""
    u = rng.uniform
    return Pose(shift_x=u(-0.02, 0.02), shift_y=u(-0.02, 0.02), scale=u(0.96, 1.04), tilt=u(-0.03, 0.03))


def draw_moves(rng: np.random.Generator) -> dict[str, float]:
    """A random mix of up to ten moves with amounts 0..1.4; often one alone at full strength."""
    count = int(rng.choice([1, 1, 1, 2, 2, 3, 4, 5, 6, 7, 8, 9, 10]))
    names = rng.choice([name for name in MOVES if name != "tilted"], size=count, replace=False)
    amounts = {str(name): float(rng.uniform(0.15, 1.4)) for name in names}
    if count == 1 and rng.random() < 0.5:
        amounts = dict.fromkeys(amounts, 1.0)
    if rng.random() < 0.03:
        amounts["tilted"] = float(rng.uniform(-1, 1))
    return amounts


def units_of(amounts: Mapping[str, float]) -> dict[str, float]:
    """Action units of the neutral face after `amounts` of moves."""
    units = dict(NEUTRAL)
    for name, amount in amounts.items():
        for unit, change in MOVES[name].items():
            units[unit] += amount * change
    return units


def recolour(person: Identity, rng: np.random.Generator) -> Identity:
    """`person` before another background and in other clothes."""
    backgrounds, clothes = list(BACKGROUNDS.values()), list(CLOTHES.values())
    shade = rng.uniform(0.9, 1.05)
    r, g, b = backgrounds[int(rng.integers(len(backgrounds)))]
    return replace(
        person,
        background=(min(255, r * shade), min(255, g * shade), min(255, b * shade)),
        clothes=clothes[int(rng.integers(len(clothes)))],
    )


def dyed(person: Identity, name: str) -> Identity:
    """`person` with the hair colour `name`."""
    return replace(person, hair=HAIR[name])


def before(person: Identity, name: str) -> Identity:
    """`person` before the background `name`."""
    return replace(person, background=BACKGROUNDS[name])
