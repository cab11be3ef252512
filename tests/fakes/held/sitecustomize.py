"""What Python does first in all processes of a training that a test may hold: see `fakes.trainings.Hold`."""

import os
import select
import signal
import sys
from pathlib import Path
from typing import Any


def wait(event: str, arguments: tuple[Any, ...]) -> None:
    """Wait where the loss curve is opened for its next line, until a signal comes or the test lets go."""
    if event != "open" or arguments[1] != "a" or Path(arguments[0]).name != "loss.jsonl":
        return
    curve, folder = Path(arguments[0]), Path(os.environ["TRAINING_HOLD"])
    at = folder / "at"
    lines = len(curve.read_text().splitlines()) if curve.exists() else 0
    if not at.exists() or int(at.read_text()) != lines:
        return
    read, write = os.pipe()
    os.set_blocking(write, False)
    before = signal.set_wakeup_fd(write)  # gets a byte of a signal, whose handler Python calls right after
    (folder / "held").touch()
    while at.exists() and not select.select([read], [], [], 0.05)[0]:
        pass
    signal.set_wakeup_fd(before)
    os.close(read)
    os.close(write)


if "-m trainer.launch" in " ".join(sys.orig_argv):  # its launchers say --module
    sys.addaudithook(wait)
