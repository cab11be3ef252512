"""Noise levels of training samples, by the schemes of the field."""

from __future__ import annotations

import math

from trainer.sections import NoiseSection

LEAST, MOST = 0.002, 0.998
"""Levels are clipped to this range: at its ends a sample teaches nothing."""


def noise_level(settings: NoiseSection, choice: float, uniform: float, normal: float) -> float:
    """Return the noise level of a sample, in (0, 1).

    Args:
        settings: the scheme.
        choice: in [0, 1); below ``uniform_share`` the level is ``uniform`` itself.
        uniform: in [0, 1).
        normal: of the standard normal distribution.
    """
    level = uniform
    if choice >= settings.uniform_share:
        level = _SCHEMES[settings.scheme](settings, uniform, normal)
        level = settings.shift * level / (1 + (settings.shift - 1) * level)
    return min(MOST, max(LEAST, level))


def _logit_normal(settings: NoiseSection, uniform: float, normal: float) -> float:
    """Esser et al., arXiv 2403.03206, eq. 19."""
    logit = settings.mean + settings.std * normal
    return 1 / (1 + math.exp(min(700.0, -logit)))  # beyond, the exponential is no number any more


def _mode(settings: NoiseSection, uniform: float, normal: float) -> float:
    """Esser et al., eq. 20."""
    return 1 - uniform - settings.scale * (math.cos(math.pi / 2 * uniform) ** 2 - 1 + uniform)


def _cosmap(settings: NoiseSection, uniform: float, normal: float) -> float:
    """Esser et al., eq. 21."""
    return 1 - 1 / (math.tan(math.pi / 2 * uniform) + 1)


_SCHEMES = {
    "uniform": lambda settings, uniform, normal: uniform,
    "logit-normal": _logit_normal,
    "mode": _mode,
    "cosmap": _cosmap,
}
