"""Identities: everything about a drawn person that an edit must keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Domain = Literal["human", "anime"]
Colour = tuple[float, float, float]
DOMAINS: tuple[Domain, ...] = ("human", "anime")

SKINS = ((255, 224, 196), (244, 205, 170), (230, 180, 140), (200, 146, 104), (160, 108, 72), (112, 72, 50))
HUMAN_HAIR = {
    "black": (35, 28, 28), "brown": (84, 54, 34), "chestnut": (128, 78, 42), "blond": (214, 172, 96),
    "red": (165, 62, 36), "grey": (150, 150, 155), "white": (235, 232, 225),
}  # fmt: skip
ANIME_HAIR = {
    "navy": (60, 60, 120), "pink": (235, 110, 150), "blue": (90, 170, 220), "yellow": (250, 210, 90),
    "purple": (130, 90, 190), "green": (90, 190, 140), "orange": (230, 110, 60),
}  # fmt: skip
HAIR = HUMAN_HAIR | ANIME_HAIR
BACKGROUNDS = {
    "sky": (190, 215, 235), "sand": (235, 215, 200), "mint": (205, 230, 205), "lilac": (225, 210, 235),
    "cream": (240, 230, 190), "silver": (200, 200, 210), "teal": (150, 190, 200), "rose": (235, 190, 190),
}  # fmt: skip
CLOTHES = {
    "denim": (60, 90, 150), "crimson": (170, 60, 60), "forest": (60, 130, 90), "violet": (90, 70, 130),
    "mustard": (220, 180, 70), "charcoal": (60, 60, 70), "ivory": (230, 230, 235), "coral": (210, 120, 80),
}  # fmt: skip
_HUMAN_EYES = ((70, 45, 30), (110, 75, 40), (70, 120, 80), (60, 110, 170), (110, 120, 130))
_ANIME_EYES = ((190, 60, 70), (60, 120, 220), (60, 170, 110), (140, 80, 200), (220, 150, 40))
HAIR_STYLES = ("short", "parted", "long", "buzz", "curly", "swept", "bun", "fringe")


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """A drawn person. Lengths are in head units (the face is about 1.5 wide and 1.9 high); colours are RGB
    0..255.
    """

    seed: int
    domain: Domain
    skin: Colour
    face_width: float
    face_height: float
    jaw: float
    eye_x: float
    eye_y: float
    eye_width: float
    eye_height: float
    eye_slant: float
    eye_colour: Colour
    brow_thickness: float
    brow_length: float
    brow_height: float
    nose_length: float
    nose_width: float
    mouth_y: float
    mouth_width: float
    lip_thickness: float
    lip_colour: Colour
    ear: float
    hair: Colour
    hair_style: str
    hairline: float
    background: Colour
    clothes: Colour
    glasses: bool
    freckles: bool
    beard: bool
    earring: bool
    mole_x: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pose:
    """Where the head sits in the picture: shifts as a share of the side, scale factor, tilt in radians."""

    shift_x: float = 0.0
    shift_y: float = 0.0
    scale: float = 1.0
    tilt: float = 0.0


def _mix(a: Colour, b: Colour, share: float) -> Colour:
    return (a[0] + (b[0] - a[0]) * share, a[1] + (b[1] - a[1]) * share, a[2] + (b[2] - a[2]) * share)


def _scaled(colour: Colour, factor: float) -> Colour:
    return (min(255.0, colour[0] * factor), min(255.0, colour[1] * factor), min(255.0, colour[2] * factor))


def identity(seed: int, domain: Domain) -> Identity:
    """The person of `seed` (a non-negative integer) in `domain`; the same arguments give the same person."""
    anime = domain == "anime"
    rng = np.random.default_rng([seed, DOMAINS.index(domain)])
    u = rng.uniform

    def pick(values: tuple[Colour, ...]) -> Colour:
        return values[int(rng.integers(len(values)))]

    skin = _mix(pick(SKINS), pick(SKINS), u(0, 0.6))
    lip = _mix(pick(((190, 85, 80), (205, 60, 80), (165, 70, 75))), skin, u(0.2, 0.45))
    style = HAIR_STYLES[int(rng.integers(len(HAIR_STYLES)))]
    if anime:
        skin = _mix(skin, (255, 226, 206), 0.6)
    return Identity(
        seed=seed,
        domain=domain,
        skin=skin,
        face_width=u(0.70, 0.80) if anime else u(0.66, 0.80),
        face_height=u(0.86, 0.94) if anime else u(0.88, 1.0),
        jaw=u(0.5, 0.8) if anime else u(0.05, 0.55),
        eye_x=u(0.31, 0.36) if anime else u(0.28, 0.35),
        eye_y=u(0.04, 0.10) if anime else u(-0.12, 0.0),
        eye_width=u(0.19, 0.24) if anime else u(0.155, 0.205),
        eye_height=u(0.19, 0.25) if anime else u(0.105, 0.145),
        eye_slant=u(-0.03, 0.03),
        eye_colour=pick(_ANIME_EYES if anime else _HUMAN_EYES),
        brow_thickness=u(0.032, 0.048) if anime else u(0.04, 0.075),
        brow_length=u(0.85, 1.15),
        brow_height=u(0.34, 0.40) if anime else u(0.22, 0.28),
        nose_length=u(0.08, 0.12) if anime else u(0.16, 0.28),
        nose_width=0.03 if anime else u(0.06, 0.13),
        mouth_y=u(0.50, 0.56) if anime else u(0.44, 0.53),
        mouth_width=u(0.19, 0.26) if anime else u(0.24, 0.34),
        lip_thickness=u(0.024, 0.034) if anime else u(0.035, 0.075),
        lip_colour=(60, 40, 50) if anime else lip,
        ear=u(0.10, 0.16),
        hair=_scaled(pick(tuple((ANIME_HAIR if anime else HUMAN_HAIR).values())), u(0.85, 1.1)),
        hair_style=style,
        hairline=u(0.50, 0.64),
        background=_scaled(pick(tuple(BACKGROUNDS.values())), u(0.9, 1.05)),
        clothes=pick(tuple(CLOTHES.values())),
        glasses=bool(u() < 0.16),
        freckles=bool(u() < 0.15),
        beard=bool(u() < 0.3) and not anime and style in ("short", "buzz", "swept"),
        earring=bool(u() < 0.15),
        mole_x=u(-0.4, 0.4) if u() < 0.12 else None,
    )


def pose(seed: int) -> Pose:
    """A small random placement of the head, the same for the same `seed`."""
    u = np.random.default_rng([seed, 7]).uniform
    return Pose(shift_x=u(-0.02, 0.02), shift_y=u(-0.02, 0.02), scale=u(0.96, 1.04), tilt=u(-0.03, 0.03))
