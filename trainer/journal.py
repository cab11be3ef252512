"""What a training leaves and hears while it runs: its loss curve, and the wish that it should stop."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Self

from trainer.checkpoint import Checkpoint
from trainer.errors import NotFinite
from trainer.tracking import Tracker

if TYPE_CHECKING:
    import torch


class StopSignal:
    """Notices SIGTERM instead of dying of it; outside the main thread it can only watch, not listen."""

    def __init__(self) -> None:
        self.received = False
        self._before: Any = None
        self._act: Callable[[], None] | None = None

    def then(self, act: Callable[[], None]) -> None:
        """Call ``act`` as soon as the signal comes."""
        self._act = act

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        if self._act is not None:
            self._act()


class LossCurve:
    """The loss curve, one JSON line a step, and the clock of a training.

    Args:
        path: the file of the curve.
        tracker: takes the same numbers.
        samples: pictures in a step, over all processes.
        enabled: whether this process writes the file.
    """

    def __init__(self, path: Path, tracker: Tracker, *, samples: int, enabled: bool) -> None:
        self._path, self._tracker, self._samples, self._enabled = path, tracker, samples, enabled
        self._waiting: list[tuple[int, dict[str, torch.Tensor], float]] = []
        self._before, self._begun = 0.0, time.monotonic()
        self._steps = 0

    def continue_from(self, found: Checkpoint | None) -> int:
        """Cut the curve back to the checkpoint (or to nothing), start the clock and return the step."""
        step = found.step if found else 0
        self._before, self._begun = found.seconds if found else 0.0, time.monotonic()
        if self._enabled:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            lines = self._path.read_text("utf-8").splitlines() if self._path.exists() else []
            self._path.write_text("".join(f"{line}\n" for line in lines[:step]), "utf-8")
        return step

    def seconds(self) -> float:
        """Return the seconds of all runs of this training together."""
        return self._before + time.monotonic() - self._begun

    def speed(self) -> float:
        """Return the samples a second of this run."""
        return self._samples * self._steps / max(time.monotonic() - self._begun, 1e-9)

    def add(self, step: int, values: dict[str, torch.Tensor], rate: float) -> None:
        """Take the values of a step without waiting for the device."""
        self._waiting.append((step, values, rate))
        self._steps += 1

    def flush(self) -> float:
        """Write what waits and return the mean loss of it.

        Raises:
            NotFinite: one of the losses is infinite or not a number.
        """
        lines, losses = [], []
        for step, values, rate in self._waiting:
            numbers = {name: float(value) for name, value in values.items()}
            if not math.isfinite(numbers["loss"]):
                raise NotFinite(
                    f"the loss is {numbers['loss']} at step {step}",
                    "lower optimiser.learning_rate, or raise optimiser.warmup_steps",
                )
            lines.append(json.dumps({"step": step, "learning_rate": rate, **numbers}))
            losses.append(numbers["loss"])
            self._tracker.metrics(step, {"learning_rate": rate, **numbers})
        self._waiting = []
        if self._enabled:
            with self._path.open("a", encoding="utf-8") as stream:
                stream.writelines(f"{line}\n" for line in lines)
        return sum(losses) / max(1, len(losses))

    def facts(self) -> dict[str, Any]:
        """Return time, speed, and the mean loss of the first and of the last 20 steps."""
        lines = self._path.read_text("utf-8").splitlines() if self._enabled else []
        losses = [json.loads(line)["loss"] for line in lines]
        return {
            "seconds": round(self.seconds(), 1),
            "samples_per_second": round(self.speed(), 1),
            "loss_first": round(sum(losses[:20]) / max(1, len(losses[:20])), 4),
            "loss_last": round(sum(losses[-20:]) / max(1, len(losses[-20:])), 4),
        }
