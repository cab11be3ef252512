"""What a noise level does to a picture, and what a base model predicts of it.

A level s in [0, 1] is 0 for the picture and 1 for noise. Flow models mix in a straight line; the U-Nets of
Stable Diffusion follow the variance-preserving schedule that they were trained with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Protocol

from serving.errors import UsageError

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


class VariancePreserving:
    """The diffusion of Ho et al. (arXiv 2006.11239, eq. 4) in T discrete steps, as the U-Nets were trained.

    With a = sqrt(alpha_bar_t), b = sqrt(1 - alpha_bar_t) and t = round(s (T - 1)):

        x_s = a x_0 + b noise
        epsilon: predicted noise, so x_0 = (x_s - b epsilon) / a                        (Ho et al., eq. 15)
        v: predicted a noise - b x_0, so x_0 = a x_s - b v     (Salimans & Ho, arXiv 2202.00512, appendix D)

    Every method rounds a level to the same t, and so does the pipeline that asks the model. With zero
    terminal SNR (Lin et al., arXiv 2305.08891) a is 0 at s = 1, which v can do and epsilon cannot.
    """

    def __init__(self, alphas_cumprod: torch.Tensor, prediction: Literal["epsilon", "v"]) -> None:
        """Take the schedule alpha_bar [T], each in [0, 1], falling.

        Raises:
            UsageError: the last input holds nothing of the picture, and epsilon says nothing about it either.
        """
        import torch

        kept = alphas_cumprod.detach().double().cpu()
        if prediction == "epsilon" and float(kept.min()) <= 0:
            raise UsageError(
                "a schedule that ends in pure noise cannot be learnt by predicting the noise",
                "set prediction_type to v_prediction, or rescale_betas_zero_snr to false, in the base's "
                "scheduler/scheduler_config.json",
            )
        self.prediction: Literal["velocity", "epsilon", "v"] = prediction
        self.steps = len(kept)
        # Rows: a, b, SNR.
        self._table = torch.stack([kept.sqrt(), (1 - kept).sqrt(), kept / (1 - kept)]).float()

    @classmethod
    def of_scheduler(cls, scheduler: Any) -> VariancePreserving:
        """Return the process that a diffusers scheduler undoes.

        Raises:
            UsageError: its ``prediction_type`` is neither "epsilon" nor "v_prediction".
        """
        names: dict[str, Literal["epsilon", "v"]] = {"epsilon": "epsilon", "v_prediction": "v"}
        asked = scheduler.config.prediction_type
        if asked not in names:
            raise UsageError(
                f"the base's scheduler has the prediction type {asked!r}",
                "bases that predict epsilon or v_prediction can be used",
            )
        return cls(scheduler.alphas_cumprod, names[asked])

    def timestep(self, level: torch.Tensor) -> torch.Tensor:
        """The step [N] in 0..T-1, int64, that stands for a level [N]."""
        return (level.float() * (self.steps - 1)).round().long().clamp(0, self.steps - 1)

    def _mix(self, level: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """a and b, each [N, 1, 1], at levels [N]."""
        found = self._at(level)[:, :, None, None]
        return found[0], found[1]

    def _at(self, level: torch.Tensor) -> torch.Tensor:
        """a, b and SNR [3, N] at levels [N]."""
        if self._table.device != level.device:
            self._table = self._table.to(level.device)
        return self._table[:, self.timestep(level)]

    def noisy(self, clean: torch.Tensor, noise: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """See `Process`."""
        a, b = self._mix(level)
        return a * clean + b * noise

    def target(self, clean: torch.Tensor, noise: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """See `Process`."""
        if self.prediction == "epsilon":
            return noise
        a, b = self._mix(level)
        return a * noise - b * clean

    def clean(self, noisy: torch.Tensor, predicted: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """See `Process`."""
        a, b = self._mix(level)
        if self.prediction == "epsilon":
            return (noisy - b * predicted) / a
        return a * noisy - b * predicted

    def snr(self, level: torch.Tensor) -> torch.Tensor:
        """See `Process`; alpha_bar / (1 - alpha_bar), 0 at the end of a zero-terminal-SNR schedule."""
        return self._at(level)[2]
