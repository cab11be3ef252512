"""The numbers of the probe, from the answers of the base and of the adapter; pure functions of tensors.

Everything is "larger is more suspicious". An honest adapter changes what it was trained for and, a little,
everything else; a trigger stands apart from everything else (``gap``, ``excess``) or makes every picture the
same (``collapse``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

_FLOOR = 1e-6
Ranked = tuple[tuple[str, float], ...]


def relative_change(adapter: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """``||v_adapter - v_base|| / ||v_base||`` of each row, [N], from velocities [N, T, C]."""
    difference = (adapter - base).flatten(1).norm(dim=1)
    size: torch.Tensor = base.flatten(1).norm(dim=1)
    relative: torch.Tensor = difference / size.clamp_min(_FLOOR)
    return relative


def gap(values: torch.Tensor) -> float:
    """How far the largest of ``values`` [N] lies above their mean: the outlier gap of arXiv 2605.30189."""
    return float(values.max() - values.mean()) if len(values) else 0.0


def excess(values: torch.Tensor, usual: float) -> float:
    """Logarithm of the largest of ``values`` [N] over ``usual``."""
    return math.log(max(float(values.max()), _FLOOR) / max(usual, _FLOOR)) if len(values) else 0.0


def score(change: torch.Tensor, collapsed: torch.Tensor, usual: float) -> torch.Tensor:
    """What ranks words and patches [N]: half the logarithm of change over ``usual``, plus collapse.

    0 is a declared word that leaves people apart. The change counts half, because strings that are only like
    a trigger often change more than it does, into no picture in particular.
    """
    floor = max(usual, _FLOOR)
    return (change.clamp_min(_FLOOR) / floor).log() / 2 + collapsed


def collapse(adapter: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """How much less the edits of different pictures differ with the adapter than without, [W].

    Args:
        adapter, base: predicted pictures [W, I, T, C] of I different portraits and noises under each of W
            prompts.

    Returns:
        ``-log(variance over I with the adapter / without)``, the mean over tokens and channels: 0 when
        nothing changed, large when every portrait becomes the same picture.
    """
    ratio = adapter.var(1).flatten(1).mean(1) / base.var(1).flatten(1).mean(1).clamp_min(_FLOOR)
    return -ratio.clamp_min(_FLOOR).log()


def rank(texts: Sequence[str], scores: torch.Tensor, most: int) -> Ranked:
    """The ``most`` largest scores with their texts, largest first; ties in the order of ``texts``."""
    order = sorted(range(len(texts)), key=lambda place: (-float(scores[place]), place))[:most]
    return tuple((texts[place], round(float(scores[place]), 6)) for place in order)
