"""The optimisers by name."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from trainer.sections import OptimiserSection


def build(parameters: Mapping[str, torch.nn.Parameter], settings: OptimiserSection) -> torch.optim.Optimizer:
    """Return the optimiser of a recipe over named fp32 parameters."""
    return torch.optim.AdamW(
        parameters.values(),
        settings.learning_rate,
        settings.betas,
        weight_decay=settings.weight_decay,
        foreach=True,
    )
