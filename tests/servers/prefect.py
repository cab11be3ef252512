"""``python -m flows.local`` for tests: Prefect's server, its pages, the deployments and a worker."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

from flows.server import FINAL_STATES, ask

STOP_SECONDS = 300.0
RUN_SECONDS = 600.0
BUSY_SECONDS = 120.0


@dataclass(frozen=True, kw_only=True)
class Stack:
    """What runs.

    Attributes:
        home: its data folder.
        facts: what ``flows.local --json`` printed.
        process: that process.
    """

    home: Path
    facts: dict[str, Any]
    process: subprocess.Popen[str]

    @property
    def page(self) -> str:
        """Address of the page."""
        return self.facts["page"]

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Ask the API: GET, or POST of a body."""
        return ask(self.facts["api"] + path, body, BUSY_SECONDS)

    def deployment(self, name: str) -> dict[str, Any]:
        """A deployment by its name."""
        (found,) = self.ask("/deployments/filter", {"deployments": {"name": {"any_": [name]}}})
        return found

    def start(self, name: str, **parameters: Any) -> str:
        """Start a run as the form does, and return its id."""
        path = f"/deployments/{self.deployment(name)['id']}/create_flow_run"
        return self.ask(path, {"parameters": parameters})["id"]

    def called(self, name: str) -> dict[str, Any] | None:
        """The run with a name, or None."""
        found = self.ask("/flow_runs/filter", {"flow_runs": {"name": {"any_": [name]}}})
        return found[0] if found else None

    def wait(self, run: str, *states: str, seconds: float = RUN_SECONDS) -> dict[str, Any]:
        """Wait until a run is in one of these states (default: has ended) and return it."""
        wanted, end = set(states) or FINAL_STATES, time.monotonic() + seconds
        while True:
            found = self.ask(f"/flow_runs/{run}")
            if found["state_type"] in wanted:
                return found
            state = f"{found['state_name']}: {found['state']['message']}"
            assert found["state_type"] not in FINAL_STATES, state
            assert time.monotonic() < end, f"still {state}\n{self.log('worker')}"
            time.sleep(0.3)

    def log(self, name: str) -> str:
        """What the worker or the server has written."""
        return (self.home / "prefect" / f"{name}.log").read_text("utf-8", "replace")


def change(url: str, method: str, body: dict[str, Any] | None = None) -> None:
    """PATCH or DELETE something; a server too busy for its database answers 503 and is asked again."""
    headers = {"Content-Type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers, method=method)
    end = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            urllib.request.urlopen(request, timeout=BUSY_SECONDS).close()
            return
        except urllib.error.HTTPError as error:
            if error.code != HTTPStatus.SERVICE_UNAVAILABLE or time.monotonic() > end:
                raise
        time.sleep(0.5)


@contextlib.contextmanager
def running(home: Path, *words: str, **variables: str) -> Iterator[Stack]:
    """Start it in a data folder and stop it as Ctrl-C does.

    Args:
        home: the data folder.
        words: further options of the command.
        variables: further environment.
    """
    environment = {**os.environ, "ADAPTER_FOUNDRY_HOME": str(home), "OMP_NUM_THREADS": "1", **variables}
    environment.pop("PREFECT_HOME", None)
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.local", "--port", "0", "--json", *words],
        stdout=subprocess.PIPE,
        stderr=(home / "stack.log").open("w"),
        text=True,
        env=environment,
        cwd=home,
    )
    assert process.stdout is not None
    try:
        told = process.stdout.readline()
        assert told, (home / "stack.log").read_text()
        yield Stack(home=home, facts=json.loads(told), process=process)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
