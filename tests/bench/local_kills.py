"""`make up` measured: seconds cold and warm, memory, disk, and the kill table of the supervised services.

    PYTHONPATH=tests python tests/bench/local_kills.py [SERVICE…]

Each service is killed with SIGKILL and stopped with SIGSTOP, one after another, and asked over its own
protocol until it works again; after each, everything that was planted before is looked for. Prints one JSON
object, and the same as tables to stderr. The watcher has its ordinary settings.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import psutil

from infra.local.supervision import Supervisor
from servers import local_platform
from servers.local_platform import Platform, kill

#: How a service is ended: the process that supervisord started, the one that does the work, or a hang.
HOWS: tuple[tuple[str, signal.Signals, bool], ...] = (
    ("kill -9", signal.SIGKILL, False),
    ("kill -9, innermost process", signal.SIGKILL, True),
    ("hangs (SIGSTOP)", signal.SIGSTOP, True),
)


#: Until the watcher has seen that a service works; before, it takes one that hangs for one that starts.
_SEEN_SECONDS = 12.0


@dataclass(frozen=True, kw_only=True)
class Killed:
    """What became of one kill.

    Attributes:
        service: which was killed.
        how: and how.
        seconds: until every service worked again.
        lost: what was planted before and is not there any more.
    """

    service: str
    how: str
    seconds: float
    lost: list[str]


def kills(platform: Platform, planted: int, chosen: Sequence[str] = ()) -> list[Killed]:
    """Kill every service, or those that were chosen, in every way."""
    found = []
    for name, state in platform.states().items():
        if name == "health" or (chosen and name not in chosen):
            continue  # the watcher is looked at with supervisord below
        many = len(platform.processes(name)) > 1
        for how, number, inner in HOWS:
            if inner and number == signal.SIGKILL and not (many and name != "postgres"):
                continue
            state = platform.states()[name]
            time.sleep(_SEEN_SECONDS)
            victim = platform.innermost(name) if inner and many else psutil.Process(state["pid"])
            kill(victim, number)
            ended = platform.wait(lambda victim=victim: not _lives(victim))
            found.append(_row(platform, name, how, ended + platform.wait_until_all_work(), planted))
    return found


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _row(platform: Platform, name: str, how: str, seconds: float, planted: int) -> Killed:
    row = Killed(service=name, how=how, seconds=round(seconds, 1), lost=platform.lost(planted))
    print(
        f"{row.service:16} {row.how:28} {row.seconds:8.1f} s  lost: {row.lost or 'nothing'}", file=sys.stderr
    )
    return row


def whole(platform: Platform, planted: int) -> list[Killed]:
    """Kill what looks after the services: the watcher, supervisord, all at once."""

    def watcher() -> None:
        pid = platform.states()["health"]["pid"]
        kill(psutil.Process(pid))
        platform.wait(lambda: platform.states()["health"]["pid"] not in (0, pid))

    def supervisord() -> None:
        kill(psutil.Process(Supervisor(platform.where).pid))
        platform.wait(lambda: not platform.processes())
        platform.json("up")

    def everything() -> None:
        kill(psutil.Process(Supervisor(platform.where).pid), signal.SIGSTOP)
        for process in platform.processes():
            kill(process)
        kill(psutil.Process(Supervisor(platform.where).pid))
        platform.json("up")

    ways: tuple[tuple[str, str, Callable[[], None]], ...] = (
        ("health", "kill -9", watcher),
        ("supervisord", "kill -9, then `up`", supervisord),
        ("everything", "kill -9 at once, then `up`", everything),
    )
    found = []
    for name, how, act in ways:
        begun = time.monotonic()
        act()
        acted = time.monotonic() - begun
        found.append(_row(platform, name, how, acted + platform.wait_until_all_work(), planted))
    return found


def disk(platform: Platform) -> dict[str, int]:
    """Return megabytes on the disk by folder of the platform."""
    folders = {"all": platform.where.home} | {
        one.name: one for one in sorted(platform.where.services.iterdir()) if one.is_dir()
    }
    return {
        name: int(subprocess.run(["du", "-sm", str(path)], capture_output=True, check=True).stdout.split()[0])
        for name, path in folders.items()
    }


def memory(told: dict[str, Any]) -> dict[str, int]:
    """Return resident megabytes by service."""
    supervisord = psutil.Process(told["supervisord"]).memory_info().rss // 1_000_000
    return {one["service"]: one["memory_mb"] for one in told["services"]} | {"supervisord": supervisord}


def main() -> None:
    """Measure, and print."""
    with local_platform.folder({"START_TIMEOUT": "600"}) as platform:
        seconds: dict[str, float] = {}

        def timed(what: str, *words: str) -> dict[str, Any]:
            begun = time.monotonic()
            answer = platform.json(*words)
            seconds[what] = round(time.monotonic() - begun, 1)
            return answer

        timed("up, new folder", "up")
        used = memory(timed("up, everything runs", "up"))
        platform.plant(0)
        rows = kills(platform, 1, sys.argv[1:]) + whole(platform, 1)
        timed("down", "down")
        timed("up, data there", "up")
        facts = {"seconds": seconds, "memory_mb": used, "disk_mb": disk(platform), "load": os.getloadavg()}
    for key, value in facts.items():
        print(key, value, file=sys.stderr)
    print(json.dumps({**facts, "kills": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    main()
