"""The watcher: asks each service, over its own protocol, for what it is there for; restarts who hangs.

supervisord notices who died. Who lives and does not answer, or was given up by supervisord, is this process's
matter: ``python -m infra.local.health``.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from infra.local.errors import PlatformError
from infra.local.passwords import Passwords
from infra.local.place import Place, write
from infra.local.probes import probes, problems
from infra.local.service import Service, launch_file, python
from infra.local.settings import PlatformSettings
from infra.local.supervision import Supervisor

NAME = "health"
#: Services that need others: one whose other does not answer is no worse for it, and is left alone.
NEEDS: Mapping[str, tuple[str, ...]] = {
    "mlflow": ("postgres", "s3"),
    "prefect-server": ("postgres",),
    "prefect-worker": ("prefect-server", "postgres"),
}
#: Seconds until one is tried again that supervisord has given up.
_AGAIN_SECONDS = 30.0
#: Since the watcher's last look, after which it is said to hang.
_SILENCE_SECONDS = 90.0


def service(
    where: Place, settings: PlatformSettings, ports: Mapping[str, int], secrets: Passwords
) -> Service:
    """Return the watcher as a service; it is started anew when anything changes that it works with."""
    known = hashlib.sha256(json.dumps(secrets, sort_keys=True).encode()).hexdigest()
    return Service(
        name=NAME,
        command=python("infra.local.health", str(where.home)),
        environment={"ADAPTER_FOUNDRY_HOME": str(where.home)},
        folder=where.services,
        facts={"settings": settings.model_dump(mode="json"), "ports": dict(ports), "secrets": known},
        stop_seconds=10,
    )


def report_file(where: Place) -> Path:
    """Where the watcher writes what it saw last."""
    return where.run / "health.report.json"


def silence(where: Place) -> str | None:
    """Return why the watcher is thought to hang, or None."""
    try:
        looked = json.loads(report_file(where).read_text("utf-8"))["looked"]
    except (OSError, ValueError, KeyError):
        return None  # it has just been started
    silent = time.time() - looked
    return f"it has not looked for {silent:.0f} s" if silent > _SILENCE_SECONDS else None


class Watcher:
    """Looks after the services.

    Args:
        home: the data folder of the platform.
    """

    def __init__(self, home: Path) -> None:
        self._where = Place(home=home)
        kept = json.loads(launch_file(self._where, NAME).read_text("utf-8"))["facts"]["settings"]
        self._settings = PlatformSettings.model_validate(kept)
        self._probes = probes(self._where)
        self._supervisor = Supervisor(self._where)
        self._failed: dict[str, int] = {}
        self._answered: dict[str, int] = {}
        self._tried: dict[str, float] = {}
        self._restarts: dict[str, int] = {}

    def look(self) -> None:
        """Ask every service once, and restart whom it takes."""
        before = self._supervisor.states()
        found = problems(self._probes, self._settings.probe_timeout)
        states, now = self._supervisor.states(), time.time()
        for name, problem in found.items():
            state = states[name]
            if state["pid"] != before[name]["pid"]:
                # Another process than the one that was asked: it has neither answered nor failed yet.
                self._failed[name] = 0
            elif problem is None:
                self._failed[name], self._answered[name] = 0, state["pid"]
            elif state["statename"] in ("FATAL", "EXITED"):
                self._bring_back(name, now)
            elif state["statename"] == "RUNNING":
                self._failed[name] = self._failed.get(name, 0) + 1
                innocent = any(found.get(one) is not None for one in NEEDS.get(name, ()))
                # A start takes its time, and is not interrupted for that.
                starting = now - state["start"] < self._settings.start_timeout
                begun = not starting or self._answered.get(name) == state["pid"]
                if begun and not innocent and self._failed[name] >= self._settings.probe_failures:
                    self._restart(name, state["pid"], problem)
        self._report(found, now)

    def _bring_back(self, name: str, now: float) -> None:
        if now - self._tried.get(name, 0.0) > _AGAIN_SECONDS:
            self._tried[name] = now
            self._restarts[name] = self._restarts.get(name, 0) + 1
            _say(f"{name} was given up: started again")
            self._supervisor.run(name)

    def _restart(self, name: str, pid: int, problem: str) -> None:
        _say(f"{name} does not answer ({problem}): killed, to be started again")
        self._failed[name] = 0
        self._restarts[name] = self._restarts.get(name, 0) + 1
        # It hangs: asking it would only take longer. supervisord makes a group of each service.
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)

    def _report(self, problems: Mapping[str, str | None], now: float) -> None:
        text = json.dumps({"looked": now, "problems": problems, "restarts": self._restarts}, sort_keys=True)
        write(report_file(self._where), text + "\n")

    def run(self) -> None:
        """Look until SIGTERM."""
        report_file(self._where).unlink(missing_ok=True)
        while True:
            try:
                self.look()
            except (PlatformError, OSError) as error:
                _say(str(error))
            time.sleep(self._settings.probe_seconds)


def _say(text: str) -> None:
    print(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {text}", flush=True)


if __name__ == "__main__":
    Watcher(Path(sys.argv[1])).run()
