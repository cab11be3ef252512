"""What a service is: a command with an environment, and how it is asked to stop."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows.settings import SILENT
from infra.local.place import Place, write

REPOSITORY = Path(__file__).resolve().parents[2]
#: Every process of a platform, and every process that these start, carries them: whose it is, and of which
#: service. So what a killed parent leaves behind is found again.
PLATFORM_MARK, SERVICE_MARK = "FOUNDRY_PLATFORM", "FOUNDRY_SERVICE"
#: Of the shell that starts the platform, its processes get no more than these.
SHELL = ("PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "LD_LIBRARY_PATH")
#: Whatever happens on this machine stays on it, and takes no way around through a proxy.
HERE = {"NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"}
COMMON = {**SILENT, **HERE, "PYTHONUNBUFFERED": "1"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Service:
    """A supervised process.

    Attributes:
        name: as everybody calls it.
        command: program and arguments; no secret is among them, for every user of the machine can read them.
        environment: its variables beside `SHELL` and `COMMON`.
        folder: in which it runs.
        facts: what else decides how it works, such as contents of files: if one changes, it is restarted.
        user: number and group under which it runs; None is whoever starts the platform.
        stop_signal: asks it to stop.
        stop_seconds: it may take to do so.
        many: it has processes of its own, which a keeper ends with it (`flows.child`).
        pid_file: by which it knows that it runs already; after a loss of power its number is anybody's.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    folder: Path
    facts: Mapping[str, Any] = field(default_factory=dict)
    user: tuple[int, int] | None = None
    stop_signal: str = "TERM"
    stop_seconds: int = 20
    many: bool = False
    pid_file: Path | None = None


def launch_file(where: Place, name: str) -> Path:
    """Where `infra.local.launch` reads what to start."""
    return where.run / f"{name}.json"


def started_file(where: Place, name: str) -> Path:
    """Where `infra.local.launch` writes what it has started."""
    return where.run / f"{name}.started"


def launch_text(service: Service, where: Place) -> str:
    """Return what `infra.local.launch` reads: everything that decides how a service runs, as JSON."""
    marks = {PLATFORM_MARK: str(where.services), SERVICE_MARK: service.name}
    value = {
        "name": service.name,
        "command": list(service.command),
        "environment": {**COMMON, **service.environment, **marks},
        "folder": str(service.folder),
        "user": service.user,
        "stop_signal": service.stop_signal,
        "stop_seconds": service.stop_seconds,
        "many": service.many,
        "pid_file": None if service.pid_file is None else str(service.pid_file),
        "facts": dict(service.facts),
    }
    return json.dumps(value, indent=1, sort_keys=True) + "\n"


def prepare(service: Service, where: Place) -> bool:
    """Write down how a service is to be started, and return whether it runs in just that way already."""
    file, text = launch_file(where, service.name), launch_text(service, where)
    if not file.is_file() or file.read_text("utf-8") != text:
        write(file, text)
    try:
        started = json.loads(started_file(where, service.name).read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return bool(started.get("launched") == fingerprint(text))


def stop_seconds(where: Place, name: str) -> float:
    """Return what a service may take to stop, as it was started."""
    try:
        return float(json.loads(launch_file(where, name).read_text("utf-8"))["stop_seconds"])
    except (OSError, ValueError, KeyError):
        return 0.0  # it was never started


def fingerprint(text: str) -> str:
    """Return a digest of a launch file."""
    return hashlib.sha256(text.encode()).hexdigest()


def python(module: str, *words: str) -> list[str]:
    """Return the command that runs a module; -P: the working directory must not shadow any."""
    return [sys.executable, "-P", "-m", module, *words]


def shell(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return what processes of the platform get from the shell that starts it."""
    return {name: environment[name] for name in SHELL if name in environment} | {
        "PYTHONPATH": str(REPOSITORY)
    }
