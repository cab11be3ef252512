"""Noise levels: each scheme has the density of its formula; shift and uniform share do what they say."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.noise import LEAST, MOST, noise_level
from trainer.sections import NoiseSection

SCHEMES = ("uniform", "logit-normal", "mode", "cosmap")
SAMPLES = 60_000
shares = st.floats(0, 1, exclude_max=True)
normals = st.floats(-9, 9)
sections = st.builds(
    NoiseSection,
    scheme=st.sampled_from(SCHEMES),
    mean=st.floats(-50, 50),
    std=st.floats(0.01, 200),
    scale=st.floats(-1, 1.75),
    shift=st.floats(0.01, 100),
    uniform_share=st.floats(0, 1),
)


def levels(settings: NoiseSection, choice: float | None = None) -> np.ndarray:
    """A sample of levels that is not drawn but spread evenly, so that histograms have no luck in them."""
    rng = np.random.default_rng(0)
    uniform = (np.arange(SAMPLES) + 0.5) / SAMPLES
    normal = np.sqrt(2) * erfinv(2 * uniform - 1)
    choices = rng.random(SAMPLES) if choice is None else np.full(SAMPLES, choice)
    return np.array([noise_level(settings, *row) for row in zip(choices, uniform, normal, strict=True)])


def erfinv(x: np.ndarray) -> np.ndarray:
    from scipy.special import erfinv as inverse

    return inverse(x)


@given(sections, shares, shares, normals)
def test_every_level_lies_in_the_range(
    settings: NoiseSection, choice: float, uniform: float, normal: float
) -> None:
    assert LEAST <= noise_level(settings, choice, uniform, normal) <= MOST


@given(sections, shares, st.tuples(shares, shares), st.tuples(normals, normals))
def test_levels_follow_their_input(
    settings: NoiseSection, choice: float, uniform: tuple[float, float], normal: tuple[float, float]
) -> None:
    """More is more noise; the formula of "mode" runs the other way round."""
    drawn = choice >= settings.uniform_share
    fall = drawn and settings.scheme == "mode"
    by_normal = drawn and settings.scheme == "logit-normal"
    low, high = sorted(normal if by_normal else uniform)
    first, second = (
        noise_level(settings, choice, *((0.5, one) if by_normal else (one, 0.0))) for one in (low, high)
    )
    assert (first >= second - 1e-12) if fall else (first <= second + 1e-12)


def uniform_density(settings: NoiseSection, t: np.ndarray) -> np.ndarray:
    return np.ones_like(t)


def logit_normal_density(settings: NoiseSection, t: np.ndarray) -> np.ndarray:
    """Esser et al., eq. 19."""
    exponent = -((np.log(t / (1 - t)) - settings.mean) ** 2) / (2 * settings.std**2)
    return np.exp(exponent) / (settings.std * math.sqrt(2 * math.pi) * t * (1 - t))


def mode_density(settings: NoiseSection, t: np.ndarray) -> np.ndarray:
    """Esser et al., eq. 20: |d/dt f^-1(t)|, f inverted on a fine grid."""
    u = np.linspace(0, 1, 200_001)
    f = 1 - u - settings.scale * (np.cos(math.pi / 2 * u) ** 2 - 1 + u)
    slope = 1 + settings.scale * (1 - math.pi / 2 * np.sin(math.pi * u))  # -f'(u)
    return 1 / np.interp(t, f[::-1], slope[::-1])


def cosmap_density(settings: NoiseSection, t: np.ndarray) -> np.ndarray:
    """Esser et al., eq. 21."""
    return 2 / (math.pi - 2 * math.pi * t + 2 * math.pi * t**2)


Density = Callable[[NoiseSection, np.ndarray], np.ndarray]
CASES: list[tuple[NoiseSection, Density]] = [
    (NoiseSection(scheme="uniform"), uniform_density),
    (NoiseSection(scheme="logit-normal"), logit_normal_density),
    (NoiseSection(scheme="logit-normal", mean=0.5, std=0.6), logit_normal_density),
    (NoiseSection(scheme="logit-normal", mean=-1.0, std=1.4), logit_normal_density),
    (NoiseSection(scheme="mode"), mode_density),
    (NoiseSection(scheme="mode", scale=-0.8), mode_density),
    (NoiseSection(scheme="mode", scale=0.0), uniform_density),
    (NoiseSection(scheme="cosmap"), cosmap_density),
]


def share_of_bins(density: Density, settings: NoiseSection, edges: np.ndarray) -> np.ndarray:
    """Integrate a density over bins, by the midpoint rule."""
    fine = 400
    return np.array(
        [
            density(settings, low + (high - low) * (np.arange(fine) + 0.5) / fine).mean() * (high - low)
            for low, high in pairwise(edges)
        ]
    )


@pytest.mark.parametrize(("settings", "density"), CASES)
def test_each_scheme_has_the_density_of_its_formula(settings: NoiseSection, density: Density) -> None:
    edges = np.linspace(0.02, 0.98, 25)  # away from the ends, where levels are clipped
    counted = np.histogram(levels(settings), edges)[0] / SAMPLES
    assert np.abs(counted - share_of_bins(density, settings, edges)).max() < 2e-4


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shift", [0.4, 3.0])
def test_the_shift_is_that_of_higher_resolutions(scheme: str, shift: float) -> None:
    """Esser et al., eq. 23; in logits it adds log(shift)."""
    plain = levels(NoiseSection(scheme=scheme))
    shifted = levels(NoiseSection(scheme=scheme, shift=shift))
    inner = (plain > 0.02) & (plain < 0.98) & (shifted < MOST) & (shifted > LEAST)

    def logit(x: np.ndarray) -> np.ndarray:
        return np.log(x / (1 - x))

    assert np.allclose(logit(shifted[inner]), logit(plain[inner]) + math.log(shift))


@given(sections, shares, normals, st.floats(0.2, 5))
def test_shifts_compose_and_undo_each_other(
    settings: NoiseSection, uniform: float, normal: float, shift: float
) -> None:
    def at(value: float) -> float:
        return noise_level(
            settings.model_copy(update={"shift": value, "uniform_share": 0.0}), 0.5, uniform, normal
        )

    base = at(1.0)
    if 0.01 < base < 0.99:
        moved = at(shift)
        assert moved / (1 + (1 / shift - 1) * moved) / shift == pytest.approx(base)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_share_of_the_samples_is_uniform_whatever_the_scheme(scheme: str) -> None:
    settings = NoiseSection(scheme=scheme, mean=2.0, std=0.3, shift=4.0, uniform_share=0.25)
    for choice in (0.0, 0.2499):
        assert noise_level(settings, choice, 0.37, 1.0) == 0.37
    assert noise_level(settings, 0.25, 0.37, 1.0) != 0.37
    spread = levels(settings)
    inside = 0.25 * 0.2 + 0.75 * np.mean((levels(settings, 0.9) > 0.1) & (levels(settings, 0.9) <= 0.3))
    assert np.mean((spread > 0.1) & (spread <= 0.3)) == pytest.approx(inside, abs=5e-3)
    assert np.array_equal(levels(settings.model_copy(update={"uniform_share": 1.0})), levels(NoiseSection()))
