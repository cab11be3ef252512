"""Loops for which nobody waits who would notice that they died."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

_log = logging.getLogger(__name__)


async def lasting(body: Callable[[], Coroutine[Any, Any, None]], what: str, pause: float) -> None:
    """Run a loop until it returns, and start it again whenever it dies.

    Args:
        body: the loop.
        what: it is, for the log.
        pause: seconds before it is started again.
    """
    while True:
        try:
            await body()
        except Exception:
            _log.exception("%s: a loop died and is started again", what)
            await asyncio.sleep(pause)
        else:
            return
