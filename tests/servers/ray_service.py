"""The real service on a real Ray cluster of this machine: `serving ray`, and ways to kill its replicas."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

START_SECONDS = 300
_RUNS = 3
"""How often it is run until a cluster starts, which it tries a few times itself: a machine that is busy may
need more."""
_NO_CLUSTER = "does not start or answer"
_PROGRAM = "from serving.cli import main; main()"


@dataclass(frozen=True, kw_only=True, slots=True)
class RayService:
    """A service that runs.

    Attributes:
        url: where it listens.
        process: that of `serving ray`.
    """

    url: str
    process: subprocess.Popen[str]

    def replicas(self, kind: str = "engine") -> list[psutil.Process]:
        """The processes of a deployment's replicas that live, the oldest first."""
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                title = " ".join(child.cmdline())
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
            if title.startswith("ray::ServeReplica:") and title.split("#")[0].rstrip().endswith(kind):
                found.append(child)
        return sorted(found, key=lambda one: one.create_time())

    def kill(self, kind: str = "engine") -> int:
        """Kill the replica of a deployment that has lived longest, as a kernel short of memory does."""
        victim = self.replicas(kind)[0]
        victim.send_signal(signal.SIGKILL)
        victim.wait(120)
        return victim.pid

    def wait_for_replicas(self, number: int, kind: str = "engine", seconds: float = 300.0) -> None:
        """Wait until so many live."""
        end = time.monotonic() + seconds
        while len(self.replicas(kind)) < number:
            assert time.monotonic() < end, f"there are {len(self.replicas(kind))} replicas, not {number}"
            time.sleep(0.2)


@contextmanager
def running(
    home: Path, *, engines: int = 2, ingresses: int = 1, settings: Mapping[str, str], log: Path
) -> Iterator[RayService]:
    """Run the service on a data folder until the block ends; then it drains and has to end well.

    Args:
        home: the data folder.
        engines, ingresses: replicas of each.
        settings: of serving, as ``{"ADAPTERS": '["pixelsmile@prod"]'}``.
        log: file for what it says.
    """
    environment = {**os.environ, "ADAPTER_FOUNDRY_HOME": str(home), "OMP_NUM_THREADS": "1"}
    environment |= {f"ADAPTER_FOUNDRY_SERVING_{key}": value for key, value in settings.items()}
    words = ["ray", "--engines", str(engines), "--ingresses", str(ingresses), "--cpus", "0.1", "--json"]
    for left in range(_RUNS - 1, -1, -1):
        with log.open("w") as errors:
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", _PROGRAM, *words],
                env=environment, cwd=home, stdout=subprocess.PIPE, stderr=errors, text=True,
                start_new_session=True,
            )  # fmt: skip
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if "url" not in line:
                line += process.stdout.read()
                assert left, line + log.read_text()
                assert _NO_CLUSTER in line, line + log.read_text()
                continue
            yield RayService(url=json.loads(line)["url"], process=process)
            process.send_signal(signal.SIGTERM)
            assert process.wait(START_SECONDS) == 0, log.read_text()
            return
        finally:
            leftovers = _tree(process)
            if process.poll() is None:
                process.kill()
            for one in leftovers:
                with suppress(psutil.NoSuchProcess):  # it ends by itself
                    one.kill()


def _tree(process: subprocess.Popen[str]) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
