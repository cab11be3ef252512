"""What serves is judged again now and then: a statement or a policy may speak against it since.

That has a thread of its own: a judgement asks the registry and waits for nothing else, and no load, promotion
or rollback waits for a judgement.
"""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from threading import RLock
from typing import TYPE_CHECKING, Final

from registry.errors import NetworkError
from serving.logs import event
from serving.trust import Watch, bare

if TYPE_CHECKING:
    from serving.metrics import Metrics
    from serving.versions import Entry, Version

JUDGED_SECONDS: Final = 300.0
"""After which what serves is judged again by the statements and the policy of the day."""


class Judge:
    """Notes in entries what speaks against the versions that serve them.

    Args:
        watch: of the registry.
        lock: the follower's; whoever calls a method holds it.
        metrics: counts refusals.
    """

    def __init__(self, watch: Watch, lock: RLock, metrics: Metrics | None) -> None:
        self._watch = watch
        self._lock = lock
        self._metrics = metrics
        self._pool = ThreadPoolExecutor(1, "judge")

    def stop(self) -> None:
        """Begin no judgement any more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def begin(self, entry: Entry) -> None:
        """Note that a version begins to serve, which was judged just now."""
        entry.doubt, entry.judge_at = None, time.monotonic() + JUDGED_SECONDS

    def look(self, entry: Entry) -> Future[None] | None:
        """Have the version that serves judged where that is due; return the judgement that goes on."""
        now = time.monotonic()
        if entry.served is not None and entry.judging is None and now >= entry.judge_at:
            entry.judge_at = now + JUDGED_SECONDS
            entry.judging = self._pool.submit(self._judge, entry, entry.served)
        return entry.judging

    def _judge(self, entry: Entry, version: Version) -> None:
        from registry.client import Registry

        doubt = None
        try:
            Registry(self._watch.place).pull(entry.reference)
        except NetworkError:
            doubt = entry.doubt
        except Exception as error:  # it goes on serving: only a revocation stops it
            doubt = bare(error)
        with self._lock:
            entry.judging = None
            if entry.served is not version or entry.meant is None or entry.meant.digest != version.digest:
                return  # the reference moved meanwhile, and what was judged may be either version
            new = doubt is not None and entry.doubt is None
            entry.doubt = doubt
        if doubt is not None and new:
            name = str(entry.reference)
            event("adapter doubted", level=logging.WARNING, reference=name, problem=doubt.message)
            if self._metrics is not None:
                self._metrics.refused(doubt)
