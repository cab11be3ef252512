"""What a training leaves and hears while it runs: its loss curve, and the wish that it should stop."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from types import FrameType
from typing import TYPE_CHECKING, Any, Self

from trainer.stage import write_atomically
from trainer.tracking import Tracker

if TYPE_CHECKING:
    from trainer.checkpoint import Checkpoint


class StopSignal:
    """Notices SIGTERM instead of dying of it; outside the main thread it can only watch, not listen."""

    def __init__(self) -> None:
        self.received = False
        self._before: Any = None
        self._act: Callable[[], None] | None = None

    def then(self, act: Callable[[], None]) -> None:
        """Call ``act`` as soon as the signal comes, or at once if it has come."""
        self._act = act
        if self.received:
            act()

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

    A line holds what the step itself decides and nothing that depends on the clock, so an interrupted
    training leaves the very file of an uninterrupted one. The tracker gets speed and memory, too.

    Args:
        path: the file of the curve.
        tracker: takes the same numbers.
        samples: pictures in a step, over all processes.
        enabled: whether this process writes the file.
    """

    def __init__(self, path: Path, tracker: Tracker, *, samples: int, enabled: bool) -> None:
        self._path, self._tracker, self._samples, self._enabled = path, tracker, samples, enabled
        self._waiting: list[dict[str, Any]] = []
        self._before, self._begun = 0.0, time.monotonic()
        self._steps, self._last = 0, self._begun
        self._durations: deque[float] = deque(maxlen=50)

    def continue_from(self, found: Checkpoint | None) -> int:
        """Cut the curve back to the checkpoint (or to nothing), start the clock and return the step."""
        step = found.step if found else 0
        self._before, self._begun = found.seconds if found else 0.0, time.monotonic()
        self._last = self._begun
        if self._enabled:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            lines = self._path.read_bytes().splitlines(keepends=True) if self._path.exists() else []
            write_atomically(self._path, b"".join(line for line in lines if 0 < _step_of(line) <= step))
        return step

    def seconds(self) -> float:
        """Return the seconds of all runs of this training together."""
        return self._before + time.monotonic() - self._begun

    def speed(self) -> float:
        """Return the samples a second of this run."""
        return self._samples * self._steps / max(time.monotonic() - self._begun, 1e-9)

    def add(self, step: int, values: Mapping[str, float], rate: float, skipped: str | None = None) -> None:
        """Take the values of a step.

        Args:
            step: counted from 1.
            values: the total as "loss", each loss by name, the gradient's length as "gradient".
            rate: learning rate.
            skipped: why nothing was learned from it, and the sample that did it.
        """
        line = {"step": step, "learning_rate": rate, **values}
        self._waiting.append(line if skipped is None else {**line, "skipped": skipped})
        self._steps += 1
        now = time.monotonic()
        self._durations.append(now - self._last)
        self._last = now

    def flush(self) -> str:
        """Write what waits, and return a note on it for people."""
        for line in self._waiting:
            numbers = {name: value for name, value in line.items() if name not in ("step", "skipped")}
            self._tracker.metrics(line["step"], {**numbers, "skipped": float("skipped" in line)})
        losses = [line["loss"] for line in self._waiting if "skipped" not in line]
        skipped = len(self._waiting) - len(losses)
        if self._waiting:
            how = {"samples_per_second": self.speed(), **_memory()}
            self._tracker.metrics(self._waiting[-1]["step"], how)
        if self._enabled:
            with self._path.open("a", encoding="utf-8") as stream:
                stream.writelines(f"{json.dumps(_finite(line))}\n" for line in self._waiting)
                stream.flush()
                os.fsync(stream.fileno())  # before a checkpoint that counts on these lines
        self._waiting = []
        loss = f"loss {sum(losses) / len(losses):.4f}" if losses else "no good step"
        return f"{loss}  {self.speed():.0f} samples/s" + (f"  {skipped} steps skipped" if skipped else "")

    def facts(self) -> dict[str, Any]:
        """Return time, speed, memory, and the mean loss of the first and of the last 20 good steps.

        ``step_seconds`` is the median of the last 50 steps, with everything that happened in them.
        """
        lines = self._path.read_text("utf-8").splitlines() if self._enabled else []
        found = [json.loads(line) for line in lines]
        losses = [line["loss"] for line in found if "skipped" not in line]
        return {
            "seconds": round(self.seconds(), 1),
            "samples_per_second": round(self.speed(), 1),
            "step_seconds": round(median(self._durations), 4) if self._durations else 0.0,
            "loss_first": round(sum(losses[:20]) / max(1, len(losses[:20])), 4),
            "loss_last": round(sum(losses[-20:]) / max(1, len(losses[-20:])), 4),
            "skipped_steps": len(found) - len(losses),
            **_memory(),
        }


def _step_of(line: bytes) -> int:
    """Return the step of a line of the file; 0 if it was cut."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 0


def _finite(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return a line as JSON can say it: what is not finite becomes null."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in line.items()
    }


def _memory() -> dict[str, float]:
    """Return the most GPU memory that tensors took so far, in GiB; nothing on a CPU."""
    import torch

    if not torch.cuda.is_available():
        return {}
    return {"gpu_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)}
