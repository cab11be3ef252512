"""Leases: how a push and a clean-up of the store stay out of each other's way, on any number of machines.

A push relies on objects that nobody names yet, and some of them may have lain there for long, left by a push
that was killed. So it first writes a lease, an object that names them, and then looks for a clean-up. A
clean-up announces itself first, and then looks for leases. Whichever comes second sees the other: the push
waits, or the clean-up leaves alone what is leased. (This is Dekker's way of mutual exclusion; it needs what S3
and a folder both give: whoever lists after a write sees it.) A push removes its lease when its version is
signed, and the clean-up reads leases before it reads signed names, so that nothing falls in between.

A killed process leaves its lease or its announcement behind; both stop counting by their age.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final

from registry.errors import Conflict, NotFound
from registry.storage.base import ObjectStore, read

PREFIX: Final = "leases/"
CLEAN_UP: Final = "clean-up/running"
CLEAN_UP_ENDS: Final = timedelta(minutes=30)
"""A clean-up that takes longer ends itself."""

_BELIEVED: Final = timedelta(hours=1)  # the rest is for clocks that differ
_PATIENCE_S: Final = 30.0
_PAUSE_S: Final = 0.2
_MAX_BYTES: Final = 1 << 16


@contextlib.contextmanager
def hold(store: ObjectStore, prefixes: Sequence[str], patience_s: float = _PATIENCE_S) -> Iterator[None]:
    """Keeps objects from being cleaned up while the block runs, whether or not they are there yet.

    Args:
        store: the store.
        prefixes: what the keys of the objects begin with.
        patience_s: how long to wait for a clean-up that is running.

    Raises:
        Conflict: a clean-up is running and does not end.
        NetworkError: the store does not answer.
    """
    key = f"{PREFIX}{secrets.token_hex(16)}"
    store.put(key, json.dumps(sorted(prefixes)).encode())
    try:
        _wait(store, patience_s)
        yield
    finally:
        store.delete(key)


@contextlib.contextmanager
def clean_up(store: ObjectStore) -> Iterator[None]:
    """Announces a clean-up while the block runs; ask `held` inside it, and then what is signed.

    Raises:
        Conflict: another clean-up is running.
    """
    if _running(store) is None:
        store.delete(CLEAN_UP)  # left by one that was killed long ago, or not there
    if not store.put(CLEAN_UP, b"{}"):
        raise Conflict("another clean-up of this store is running", mend=_mend(store))
    try:
        yield
    finally:
        store.delete(CLEAN_UP)


def held(store: ObjectStore, since: datetime) -> tuple[str, ...]:
    """What the keys of leased objects begin with; leases that were written before `since` do not count."""
    found: list[str] = []
    for key in store.keys(PREFIX):
        with contextlib.suppress(NotFound):  # its push has just ended
            if store.stat(key).modified >= since:
                found += _prefixes(read(store, key, _MAX_BYTES))
    return tuple(found)


def _prefixes(data: bytes) -> list[str]:
    """A lease that nobody can read protects everything: it may be one of a newer version of this program."""
    try:
        found = json.loads(data)
    except ValueError:
        return [""]
    if isinstance(found, list) and all(isinstance(prefix, str) for prefix in found):
        return found
    return [""]


def _wait(store: ObjectStore, patience_s: float) -> None:
    give_up = time.monotonic() + patience_s
    while _running(store) is not None:
        if time.monotonic() > give_up:
            raise Conflict("the store is being cleaned up", mend=_mend(store))
        time.sleep(_PAUSE_S)


def _running(store: ObjectStore) -> datetime | None:
    """When the clean-up that is running began; None if there is none."""
    try:
        began = store.stat(CLEAN_UP).modified
    except NotFound:
        return None
    return began if datetime.now(UTC) - began < _BELIEVED else None


def _mend(store: ObjectStore) -> str:
    return (
        f"wait for `registry gc` to end and run the same command again; if it was killed, remove "
        f"{store.uri}/{CLEAN_UP} or wait for an hour"
    )
