"""When a failed request is sent again, and how long to wait before.

Waits are drawn from "full jitter": uniform between 0 and a bound that doubles with each attempt, so that many
clients that failed together do not come back together (Brooker, Exponential Backoff And Jitter, AWS
Architecture Blog, 2015). What a server asks for in Retry-After (RFC 9110, 10.2.3) is waited out before that.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

TRIES = 6
"""Attempts for a request that is not answered."""

READINGS = 3
"""Attempts for a request whose answers come and cannot be used."""

LONGEST_WAIT = 600.0
"""Seconds; a server that asks for more is not waited for."""

_FIRST = 1.0
_CAP = 60.0
REPEATED = frozenset({408, 409, 425, 429})
"""HTTP status codes below 500 that say: not now."""


def wait(attempt: int, after: float | None, chance: float) -> float:
    """Return how many seconds to wait.

    Args:
        attempt: that failed, from 1.
        after: what the server asked for, in seconds.
        chance: uniform in [0, 1).
    """
    return (after or 0.0) + chance * min(_CAP, _FIRST * 2.0 ** (attempt - 1))


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Return the seconds that a response asks to wait, or None.

    Args:
        headers: of the response, with names in any case.
        now: seconds since the epoch.
    """
    named = {str(name).lower(): str(value).strip() for name, value in headers.items()}
    text = named.get("retry-after", "")
    if text.isascii() and text.isdigit() and len(text) < 10:
        return float(text)
    try:
        moment = parsedate_to_datetime(text)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    # A date without a zone is of no known hour; HTTP's are always GMT.
    aware = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
    return max(0.0, (aware - datetime.fromtimestamp(now, UTC)).total_seconds())
