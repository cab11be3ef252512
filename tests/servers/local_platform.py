"""The whole local platform for tests and benchmarks: started by its own command, in a folder of its own."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from infra.local import leftovers, place, prefect, probes, s3
from infra.local.passwords import Passwords, passwords
from infra.local.place import Place
from infra.local.service import SERVICE_MARK
from servers import weed
from servers.ports import kept_port

REPOSITORY = Path(__file__).resolve().parents[2]
PATIENCE = 600.0
#: The watcher looks often, so that tests wait little.
EAGER = {"PROBE_SECONDS": "1", "PROBE_TIMEOUT": "10", "PROBE_FAILURES": "3", "START_TIMEOUT": "600"}


@dataclass(frozen=True, kw_only=True)
class Platform:
    """A platform.

    Attributes:
        home: the data folder above it.
        variables: further environment of its commands.
    """

    home: Path
    variables: Mapping[str, str]

    @property
    def where(self) -> Place:
        """Its folders."""
        return place.place(self.home)

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run ``python -m infra.local``."""
        return subprocess.run(
            [sys.executable, "-m", "infra.local", *words],
            env=self.environment, cwd=REPOSITORY, capture_output=True, text=True, check=False,
        )  # fmt: skip

    @property
    def environment(self) -> dict[str, str]:
        """Of its commands."""
        own = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        return {**own, "ADAPTER_FOUNDRY_HOME": str(self.home), "OMP_NUM_THREADS": "1", **self.variables}

    def json(self, *words: str) -> dict[str, Any]:
        """The object that a command prints, which must succeed."""
        ran = self.command(*words, "--json")
        assert ran.returncode == 0, f"{words}: {ran.stdout}{ran.stderr}\n{self.ends()}"
        return json.loads(ran.stdout)

    def ends(self) -> str:
        """The ends of all logs."""
        files = sorted(self.where.logs.glob("*.log"))
        return "\n".join(f"--- {file.name}\n{file.read_text('utf-8', 'replace')[-1500:]}" for file in files)

    def problems(self) -> dict[str, str | None]:
        """Why services do not do what they are there for, asked now."""
        return probes.problems(probes.probes(self.where), 60.0)

    def wait(self, until: Callable[[], bool], seconds: float = PATIENCE) -> float:
        """Wait until something is so, and return how many seconds that took."""
        begun = time.monotonic()
        while not until():
            assert time.monotonic() - begun < seconds, f"{self.problems()}\n{self.ends()}"
            time.sleep(0.1)
        return time.monotonic() - begun

    def wait_until_all_work(self) -> float:
        """Wait until every service works and goes on working, and return how many seconds that took.

        What a killed service leaves behind may answer once more before it is ended, too.
        """
        begun = time.monotonic()
        while True:
            self.wait(lambda: not any(self.problems().values()))
            working, pids = time.monotonic(), self._pids()
            time.sleep(3)
            if not any(self.problems().values()) and self._pids() == pids:
                return working - begun

    def _pids(self) -> dict[str, int]:
        return {name: state["pid"] for name, state in self.states().items()}

    def states(self) -> dict[str, dict[str, Any]]:
        """What supervisord says of each service."""
        from infra.local.supervision import Supervisor

        return Supervisor(self.where).states()

    def processes(self, name: str | None = None) -> list[psutil.Process]:
        """Living processes of the platform, or of one service; supervisord is none of them."""
        return leftovers.processes(str(self.where.services), name)

    def innermost(self, name: str) -> psutil.Process:
        """The process of a service that does the work: its listener, or the youngest."""
        depths = {}
        for one in self.processes(name):
            with contextlib.suppress(psutil.NoSuchProcess):
                depths[one] = len(one.parents())
        return max(depths, key=depths.__getitem__)

    def ask_serving(self, path: str) -> Any:
        """The answer of the service."""
        port = place.read(self.where)["ports"]["serving"]
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"http://127.0.0.1:{port}{path}", timeout=60) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return json.loads(error.read())

    def ask_prefect(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The answer of Prefect's API."""
        from flows.server import ask

        ports = place.read(self.where)["ports"]
        who = prefect.variables(ports, passwords(self.where))
        return ask(f"{prefect.page(ports)}/api{path}", body, 60.0, who)

    def ask_mlflow(self, path: str, body: dict[str, Any], account: str = "publisher") -> Any:
        """The answer of MLflow's API."""
        from infra.local import mlflow
        from infra.provision import ask_mlflow

        word = passwords(self.where)["mlflow"][account]
        return ask_mlflow(mlflow.url(place.read(self.where)["ports"]), path, account, word, body)

    def put(self, key: str, data: bytes) -> None:
        """Write an object among the adapters, as a publisher."""
        ports = place.read(self.where)["ports"]
        s3.ask("PUT", f"adapters/{key}", "publisher", ports, passwords(self.where), data=data)

    def get(self, key: str, identity: str = "reader", secrets: Passwords | None = None) -> bytes:
        """Read an object among the adapters; by the passwords of now, or others."""
        known = passwords(self.where) if secrets is None else secrets
        return s3.ask("GET", f"adapters/{key}", identity, place.read(self.where)["ports"], known)

    def registry(self, *words: str) -> Any:
        """What a command of the registry answers to a client, which must succeed."""
        ran = self.command("run", "--", sys.executable, "-m", "registry.cli", *words, "--json")
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return json.loads(ran.stdout)

    def ledger(self) -> list[str]:
        """What the audit log has, oldest first; its chain holds."""
        self.registry("log", "--verify")
        return [line["action"] for line in self.registry("log")["entries"]]

    def plant(self, number: int) -> None:
        """Leave something in every store, to be looked for later."""
        self.put(f"planted/{number}", f"object {number}".encode())
        made = self.ask_mlflow("experiments/create", {"name": f"planted {number}"})
        self.ask_mlflow("runs/create", {"experiment_id": made["experiment_id"], "run_name": f"run {number}"})
        self.ask_prefect("/variables/", {"name": f"planted_{number}", "value": number})

    def lost(self, planted: int) -> list[str]:
        """What is not there any more of all that was planted, and of the deployments."""
        gone = []
        for number in range(planted):
            with contextlib.suppress(OSError):
                if self.get(f"planted/{number}") == f"object {number}".encode():
                    continue
            gone.append(f"object {number}")
        rows = self.ask_mlflow("experiments/search", {"max_results": 1000})["experiments"]
        ids = [row["experiment_id"] for row in rows]
        runs = self.ask_mlflow("runs/search", {"experiment_ids": ids, "max_results": 1000}).get("runs", [])
        named = {run["info"]["run_name"] for run in runs}
        gone += [f"run {number}" for number in range(planted) if f"run {number}" not in named]
        variables = {row["name"] for row in self.ask_prefect("/variables/filter", {"limit": 200})}
        gone += [f"variable {number}" for number in range(planted) if f"planted_{number}" not in variables]
        deployments = {row["name"] for row in self.ask_prefect("/deployments/filter", {"limit": 200})}
        return gone + [f"deployment {name}" for name in prefect.wanted() if name not in deployments]


def kill(process: psutil.Process, number: signal.Signals = signal.SIGKILL) -> None:
    """Send a signal to a process that may be gone already."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def mark(process: psutil.Process) -> str:
    """The service that a process belongs to."""
    return process.environ()[SERVICE_MARK]


@contextlib.contextmanager
def folder(settings: Mapping[str, str] = EAGER, **variables: str) -> Iterator[Platform]:
    """A platform that is not started yet; whatever of it lives when the block ends is ended.

    Args:
        settings: of the platform.
        variables: further environment of its commands.
    """
    # A short path: a socket lies in it.
    home = Path(tempfile.mkdtemp(prefix="platform-"))
    # The usual ports would be anybody's for as long as a service is down.
    ports = {f"{name}_PORT": str(kept_port()) for name in ("POSTGRES", "MLFLOW", "PREFECT", "SERVING")}
    ports["S3_PORT"] = str(weed.port())
    own = {f"ADAPTER_FOUNDRY_PLATFORM_{name}": value for name, value in {**ports, **settings}.items()}
    found = Platform(home=home, variables={**own, **variables})
    try:
        yield found
    finally:
        found.command("down")
        leftovers.end(found.processes(), 5.0)
        shutil.rmtree(home, ignore_errors=True)
