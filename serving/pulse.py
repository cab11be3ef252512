"""The pulse of a device: whether its steps work, and when an edit of our own has to tell.

That a request is too large for the device's memory says nothing against the device, unless the request is our
own. And where nobody is sent to a device any more because its steps failed, only an edit of our own can tell
that it works again.
"""

from __future__ import annotations

import time

from serving.memory import was_short
from serving.stepping import Stepped

FAILURES = 3
"""Steps in a row that fail for every request, after which the device is taken for broken, or is in doubt."""
TRY_SECONDS = 5.0
"""Between two edits of our own on a device that is in doubt."""


class Pulse:
    """Judges a device by its steps; only the device's thread tells it of them."""

    def __init__(self) -> None:
        self._failed = 0
        self._blamed = 0
        self._next_try = 0.0

    def beat(self, stepped: Stepped, *, ours: bool) -> None:
        """Take note of a step.

        Args:
            ours: nobody asked for what took it but ourselves.
        """
        if not all(stepped.errors):
            self._failed = self._blamed = 0
            return
        self._failed += 1
        if ours or not all(error is not None and was_short(error) for error in stepped.errors):
            self._blamed += 1
        self.tried()

    def tried(self) -> None:
        """Take note that an edit of our own is on its way, so that the next one waits."""
        self._next_try = time.monotonic() + TRY_SECONDS

    @property
    def problem(self) -> str | None:
        """Why the device does not work; None where it does."""
        if self._blamed < FAILURES:
            return None
        return f"the last {self._blamed} steps on the device failed; the log says why"

    @property
    def patience(self) -> float | None:
        """Seconds until an edit of our own is due where nothing else runs; None where none is."""
        return None if self._failed < FAILURES else max(0.0, self._next_try - time.monotonic())
