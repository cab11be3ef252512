"""The pulse of a device: whether its steps work, and when an edit of our own has to tell.

That a request is too large for the device's memory says nothing against the device, unless the request is our
own. And where nobody is sent to a device any more because its steps failed, only an edit of our own can tell
that it works again. An adapter that never took a step says nothing against the device for good: it may be the
one that does not work, and a new process would not serve those that do any better.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

from serving.memory import was_short
from serving.stepping import Stepped

if TYPE_CHECKING:
    from registry.digest import Digest
    from serving.backend import Device

FAILURES = 3
"""Steps in a row that fail for every request, after which the device is taken for broken, or is in doubt."""
TRY_SECONDS = 5.0
"""Between two edits of our own on a device that is in doubt."""
DEAD_SECONDS = 60.0
"""For which a device fails what it could do before, until it is taken for dead: some errors, such as those of
CUDA, stay until the process ends."""
_REMEMBERED = 256
"""Adapters that are known to work."""


class Pulse:
    """Judges a device by its steps; only the device's thread tells it of them.

    Args:
        clock: seconds; only differences count.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failed = 0
        self._blamed = 0
        self._next_try = 0.0
        self._worked: dict[Digest, None] = {}
        self._lost_at: float | None = None

    def beat(self, stepped: Stepped, adapters: Sequence[Collection[Digest]], *, ours: bool) -> None:
        """Take note of a step.

        Args:
            stepped: how it went for each run.
            adapters: that each run took it with.
            ours: nobody asked for what took it but ourselves.
        """
        for digests, error in zip(adapters, stepped.errors, strict=True):
            if error is None:
                self._worked.update(dict.fromkeys(digests))
        while len(self._worked) > _REMEMBERED:
            del self._worked[next(iter(self._worked))]
        if not all(stepped.errors):
            self._failed = self._blamed = 0
            self._lost_at = None
            return
        self._failed += 1
        if ours or not all(error is not None and was_short(error) for error in stepped.errors):
            self._blamed += 1
        if self._lost_at is None and any(all(map(self.worked, digests)) for digests in adapters):
            self._lost_at = self._clock()
        self.tried()

    def worked(self, adapter: Digest) -> bool:
        """Whether a step was taken with an adapter before."""
        return adapter in self._worked

    def tried(self) -> None:
        """Take note that an edit of our own is on its way, so that the next one waits."""
        self._next_try = self._clock() + TRY_SECONDS

    @property
    def device(self) -> Device:
        """How the device is."""
        if self._blamed < FAILURES:
            return "works"
        return "dead" if self._lost >= DEAD_SECONDS else "broken"

    @property
    def problem(self) -> str | None:
        """Why the device does not work; None where it does."""
        device = self.device
        if device == "works":
            return None
        if device == "dead":
            return f"the device has not worked for {self._lost:.0f} s; this process has to be started again"
        return f"the last {self._blamed} steps on the device failed; the log says why"

    @property
    def patience(self) -> float | None:
        """Seconds until an edit of our own is due where nothing else runs; None where none is."""
        return None if self._failed < FAILURES else max(0.0, self._next_try - self._clock())

    @property
    def _lost(self) -> float:
        """Seconds for which the device fails what it could do before."""
        lost_at = self._lost_at  # read once: other threads ask
        return 0.0 if lost_at is None else self._clock() - lost_at
