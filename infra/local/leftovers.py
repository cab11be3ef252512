"""Processes of a platform that nobody supervises any more, found by the marks that they carry."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import psutil

from infra.local.place import Place
from infra.local.service import PLATFORM_MARK, SERVICE_MARK

_KILL_SECONDS = 10.0


def processes(services: str, name: str | None = None) -> list[psutil.Process]:
    """Return living processes of a platform, or of one of its services, without this one and its ancestors.

    Args:
        services: the folder of its services.
        name: of the service; None is all of them.
    """
    mine = {os.getpid()}
    with suppress(psutil.Error):
        mine |= {one.pid for one in psutil.Process().parents()}
    found = []
    for one in psutil.process_iter():
        if one.pid in mine:
            continue
        with suppress(psutil.Error, OSError):
            marks = one.environ()
            ours = marks.get(PLATFORM_MARK) == services and name in (None, marks.get(SERVICE_MARK))
            if ours and one.status() != psutil.STATUS_ZOMBIE:
                found.append(one)
    return found


def end(found: list[psutil.Process], seconds: float) -> int:
    """End processes: asked first, made to after a while; return how many there were."""
    for one in found:
        with suppress(psutil.Error):
            one.terminate()
    _, alive = psutil.wait_procs(found, timeout=seconds)
    for one in alive:
        with suppress(psutil.Error):
            one.kill()
    psutil.wait_procs(alive, timeout=_KILL_SECONDS)
    return len(found)


def forget(pid_file: Path) -> None:
    """Remove a service's own note that it runs, unless the process lives and names the folder of the note.

    A service that finds the number of somebody else's process there refuses to start until a person helps.
    """
    words: list[str] = []
    with suppress(OSError, ValueError, IndexError, psutil.Error):
        words = psutil.Process(int(pid_file.read_text("utf-8").split()[0])).cmdline()
    if str(pid_file.parent) not in words:
        pid_file.unlink(missing_ok=True)


def end_all(where: Place, seconds: float = 10.0) -> int:
    """End everything that a platform has left behind; return how many processes that were."""
    return end(processes(str(where.services)), seconds)
