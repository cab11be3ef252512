"""What a noise level does to a picture, and what a base model predicts of it.

A level s in [0, 1] is 0 for the picture and 1 for noise. Flow models mix in a straight line; the U-Nets of
Stable Diffusion follow the variance-preserving schedule that they were trained with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import torch


class Process(Protocol):
    """A noising process. Latents are [N, T, C], levels [N] in [0, 1]."""

    prediction: Literal["velocity", "epsilon", "v"]

    def noisy(self, clean: torch.Tensor, noise: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """The model's input at ``level``."""

    def target(self, clean: torch.Tensor, noise: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """What the model is to predict."""

    def clean(self, noisy: torch.Tensor, predicted: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """The picture that a prediction stands for."""

    def snr(self, level: torch.Tensor) -> torch.Tensor:
        """Signal-to-noise ratio [N] of the input at ``level``: signal variance over noise variance."""


class Flow:
    """Rectified flow (Liu et al., arXiv 2209.03003): x_s = (1 - s) x_0 + s noise, predicted noise - x_0."""

    prediction: Literal["velocity", "epsilon", "v"] = "velocity"

    def noisy(self, clean: torch.Tensor, noise: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """See `Process`."""
        s = level[:, None, None]
        return (1 - s) * clean + s * noise

    def target(self, clean: torch.Tensor, noise: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """See `Process`."""
        return noise - clean

    def clean(self, noisy: torch.Tensor, predicted: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """See `Process`."""
        return noisy - level[:, None, None] * predicted

    def snr(self, level: torch.Tensor) -> torch.Tensor:
        """See `Process`; ((1 - s) / s)^2."""
        ratio: torch.Tensor = ((1 - level) / level) ** 2
        return ratio
