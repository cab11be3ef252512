"""What becomes of a step whose loss or gradient is bad: the training stops, or goes on without it.

A bad step changes neither weights nor average nor optimiser. The verdict is a function of figures that all
processes share and of a window that checkpoints keep, so a resumed run judges as the uninterrupted one.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from registry.digest import Digest
from trainer.data.batches import Draw
from trainer.errors import NotFinite
from trainer.sections import OptimiserSection

WINDOW = 100
LEAST = 20
"""Good steps before a spike is looked for: the first losses say little about the next."""
IN_A_ROW = 10


class BadLossPolicy:
    """Judges steps by a recipe's ``bad_loss`` and ``spike``."""

    def __init__(self, settings: OptimiserSection) -> None:
        self._settings = settings
        self._good: deque[float] = deque(maxlen=WINDOW)
        self._in_a_row = 0

    def judge(self, values: Mapping[str, float]) -> str | None:
        """Return what is wrong with a step, or None if it is good; remembers either.

        Args:
            values: the total as "loss", each loss by name, the gradient's length as "gradient".
        """
        wrong = self._wrong(values)
        if wrong is None:
            self._good.append(values["loss"])
            self._in_a_row = 0
        else:
            self._in_a_row += 1
        return wrong

    def _wrong(self, values: Mapping[str, float]) -> str | None:
        # A sum of finite losses is not always finite, so the total comes after its parts.
        for name in sorted(values, key=lambda name: (name == "gradient", name == "loss")):
            if not math.isfinite(values[name]):
                what = {"loss": "the loss", "gradient": "the length of the gradient"}
                return f"{what.get(name, f'the loss {name}')} is {values[name]}"
        spike, loss = self._settings.spike, values["loss"]
        if spike and len(self._good) >= LEAST and loss > spike * (usual := median(self._good)):
            return (
                f"the loss {loss:.4g} is more than {spike:g} times {usual:.4g}, "
                f"the median of the last {len(self._good)} good steps"
            )
        return None

    def stops(self) -> bool:
        """Return whether the training is to stop after a step that was judged bad."""
        return self._settings.bad_loss == "stop" or self._in_a_row >= IN_A_ROW

    def error(self, step: int, wrong: str, sample: str) -> NotFinite:
        """Return the error that ends a training at ``step``."""
        many = f", as in the {IN_A_ROW - 1} steps before it" if self._in_a_row >= IN_A_ROW else ""
        mend = "look at these pictures, lower optimiser.learning_rate, or raise optimiser.warmup_steps"
        if self._settings.bad_loss == "stop":
            mend += "; with optimiser.bad_loss: skip single bad steps are passed over"
        return NotFinite(f"{wrong} at step {step}{many}; the worst pair: {sample}", mend)

    def numbers(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"good": list(self._good), "in_a_row": self._in_a_row}

    def load(self, numbers: Mapping[str, Any]) -> None:
        """Go on from what a checkpoint kept."""
        self._good = deque(numbers["good"], maxlen=WINDOW)
        self._in_a_row = numbers["in_a_row"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PairRecord:
    """What one pair of a bad step gives on its own.

    Attributes:
        slot: its place in the step.
        about: the pair in words.
        values: as `BadLossPolicy.judge` takes them.
    """

    slot: int
    about: str
    values: Mapping[str, float]

    @property
    def badness(self) -> tuple[int, float, int]:
        """How bad it is: a loss that is no number before a gradient that is none before a high loss."""
        losses = [value for name, value in self.values.items() if name != "gradient"]
        if not all(map(math.isfinite, losses)):
            return 2, 0.0, -self.slot
        if not math.isfinite(self.values["gradient"]):
            return 1, 0.0, -self.slot
        return 0, self.values["loss"], -self.slot


def worst(records: Sequence[PairRecord]) -> str:
    """Return the worst pair of a step in words."""
    found = max(records, key=lambda record: record.badness)
    figures = ", ".join(f"{name} {value:.4g}" for name, value in found.values.items())
    again = "" if found.badness[0] else " (alone every pair is finite)"
    return f"{found.about}; alone it gives {figures}{again}"


def described(draw: Draw, digests: Sequence[Digest]) -> str:
    """Return a pair in words: who, what was asked, at which noise, and which pictures."""
    triplet = draw.triplet
    members = [
        f"{'keeps the source' if keeps else f'{one.expression} {one.intensity:g}'} "
        f"({digests[triplet.source if keeps else one.image]})"
        for one, keeps in zip((triplet.a, triplet.b), draw.keeps, strict=True)
    ]
    return (
        f"{triplet.identity}, {' and '.join(members)}, source {digests[triplet.source]}, "
        f"noise level {draw.sigma:.4f}"
    )
