"""Ports of the services: what the settings say, else the one before, else the usual one, else a free one."""

from __future__ import annotations

import random
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain

from infra.local.errors import PortTaken

HOST = "127.0.0.1"
#: The S3 server puts the gRPC side of each of its four ports here above.
GRPC = 10_000
#: Ports by name; the second is the one that people know, None is any. Names with gRPC take two.
USUAL: Mapping[str, int | None] = {
    "postgres": None,
    "s3": 8333,
    "s3-master": None,
    "s3-volume": None,
    "s3-filer": None,
    "mlflow": 5000,
    "prefect-server": 4200,
    "prefect-worker": None,
    "serving": 8400,
}


def free(port: int) -> bool:
    """Return whether nobody listens on a port of the loopback, as a server sees it that starts there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def choose(
    wanted: Mapping[str, int | None],
    kept: Mapping[str, int],
    is_free: Callable[[int], bool] = free,
    mine: Iterable[str] = (),
) -> dict[str, int]:
    """Return a port for every name of `USUAL`.

    Args:
        wanted: what the settings say, by name; None and missing ones are free to choose.
        kept: what was used before.
        is_free: tells whether a port may be taken.
        mine: names whose kept ports are taken by the platform itself, which runs.

    Raises:
        PortTaken: the settings name a port that somebody else has, or one port twice.
    """
    running, chosen = set(mine), dict[str, int]()

    def usable(name: str, port: int) -> bool:
        if {port, *_beside(name, port)} & {
            used for one, at in chosen.items() for used in (at, *_beside(one, at))
        }:
            return False
        if name in running and kept.get(name) == port:
            return True
        return all(map(is_free, (port, *_beside(name, port))))

    # What the settings say goes first: nothing that may be anywhere takes its place.
    for name in sorted(USUAL, key=lambda one: wanted.get(one) is None):
        asked = wanted.get(name)
        if asked is not None:
            if not usable(name, asked):
                raise PortTaken(
                    f"{name} cannot listen on port {asked}: it is taken{_by(asked)}",
                    f"stop what listens there, or choose another {name.partition('-')[0]}_port in [platform]",
                )
            chosen[name] = asked
            continue
        known = [port for port in (kept.get(name), USUAL[name]) if port is not None]
        chosen[name] = next(port for port in chain(known, _any()) if usable(name, port))
    return chosen


def _beside(name: str, port: int) -> tuple[int, ...]:
    return (port + GRPC,) if name.startswith("s3") else ()


def _any() -> Iterator[int]:
    # Below what the kernel gives to connections that go out, which could take it between two starts.
    while True:
        yield random.randrange(12_000, 22_000)


def _by(port: int) -> str:
    """Return who listens on a port, as far as this user may know."""
    import psutil

    try:
        for one in psutil.net_connections("tcp"):
            if one.status == psutil.CONN_LISTEN and one.laddr.port == port and one.pid is not None:
                return f" by process {one.pid} ({psutil.Process(one.pid).name()})"
    except psutil.Error:
        pass
    return ""
