"""Exponential moving average of the LoRA weights, in fp32 and by name."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from trainer.sections import EmaSection


class Ema:
    """Averages named parameters; the decay grows while warming up, so the start does not weigh for long."""

    def __init__(self, parameters: Mapping[str, torch.Tensor], settings: EmaSection) -> None:
        self._settings = settings
        self.updates = 0
        self.values = {name: value.detach().float().clone() for name, value in parameters.items()}

    def decay(self, update: int) -> float:
        """Return the decay of update number ``update``, counted from 1."""
        return min(self._settings.decay, (1 + update) / (self._settings.warmup + update))

    @torch.no_grad()
    def update(self, parameters: Mapping[str, torch.Tensor]) -> None:
        """Move the average towards the parameters, after an optimiser step."""
        self.updates += 1
        new = [parameters[name].detach().float() for name in self.values]
        torch._foreach_lerp_(list(self.values.values()), new, 1 - self.decay(self.updates))

    def load(self, values: Mapping[str, torch.Tensor], updates: int) -> None:
        """Continue from saved values."""
        self.updates = updates
        for name, value in self.values.items():
            value.copy_(values[name])
