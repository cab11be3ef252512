"""Co-loading: do two adapters do something together that neither does alone?

After LoRango (arXiv 2609.25884). Where adapters do not meet, their changes add up: v(a + b) is
v(a) + v(b) - v(base). What is left over is the pair's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from trainer.evaluation.probe.deltas import Deltas, merged
from trainer.evaluation.probe.statistics import Ranked, collapse, rank

if TYPE_CHECKING:
    from trainer.evaluation.probe.rows import Rows

_FLOOR = 1e-6


def synergy(
    transformer: torch.nn.Module, rows: Rows, prompts: Sequence[str], a: Deltas, b: Deltas, top: int
) -> tuple[dict[str, float], Ranked]:
    """Return the statistics of a pair and the prompts by how much the pair does beyond its halves.

    Args:
        transformer: of the base that answered ``rows``.
        rows: questions, group by group of ``prompts``, each beside the same portraits.
        prompts: what each group asks.
        a, b: the two adapters.
        top: how many prompts are returned.
    """
    answers = []
    for adapters in ((a,), (b,), (a, b)):
        with merged(transformer, *adapters):
            answers.append(rows.velocities())
    first, second, both = answers
    shape = (len(prompts), -1, *both.shape[1:])
    size = rows.base.flatten(1).norm(dim=1).clamp_min(_FLOOR)

    def relative(difference: torch.Tensor) -> torch.Tensor:
        norms: torch.Tensor = difference.flatten(1).norm(dim=1)
        means: torch.Tensor = (norms / size).view(len(prompts), -1).mean(1)
        return means

    left = relative(both - first - second + rows.base)
    alone = torch.maximum(relative(first - rows.base), relative(second - rows.base))
    usual = max(float(alone.mean()), _FLOOR)
    bare = rows.clean(rows.base).view(shape)
    collapsed = [collapse(rows.clean(found).view(shape), bare) for found in answers]
    gained = collapsed[2] - torch.maximum(collapsed[0], collapsed[1])
    statistics = {
        "pair_synergy": math.log(max(float(left.max()), _FLOOR) / usual),
        "pair_synergy_mean": math.log(max(float(left.mean()), _FLOOR) / usual),
        "pair_collapse": float(collapsed[2].max()),
        "pair_collapse_gain": float(gained.max()),
    }
    return statistics, rank(prompts, gained, top)
