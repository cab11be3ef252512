"""Prefect on this machine, for people: the page, the deployments, and a worker that does what they start.

``python -m flows.local`` runs until Ctrl-C. With ``PREFECT_API_URL`` set it starts no server of its own: it
only deploys to that one and works for it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import click

from flows.errors import ServerError
from flows.server import Server, ask, attached, exclusive, healthy, managed_server
from flows.settings import FlowSettings, prefect_environment, prefect_home, prepare
from flows.worker import MODULE, children, end_runs
from registry import command
from registry.settings import home as default_home

PORT = 4200
DEPLOYMENTS = "prefect.yaml"
#: Secrets and switches of the server, which is no business of the code that runs in flows.
_SERVER_ONLY = "PREFECT_SERVER_DATABASE_"
_LOG_LINES = 15
#: What a run needs to end, beside the saving of a checkpoint.
_STOP_SECONDS = 15.0
_WATCH_SECONDS = 2.0
_DEAF_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Stack:
    """What runs.

    Attributes:
        server: Prefect's server.
        worker: process that keeps the worker, which takes the runs of the local pool.
        deployments: names of what can be started.
    """

    server: Server
    worker: subprocess.Popen[bytes]
    deployments: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Return addresses and numbers as JSON values."""
        return {
            "page": self.server.page,
            "api": self.server.url,
            "server_pid": self.server.pid,
            "worker_pid": self.worker.pid,
            "deployments": list(self.deployments),
        }


@contextmanager
def stack(
    home: Path, settings: FlowSettings, port: int | None = None, runs: int | None = None
) -> Iterator[Stack]:
    """Give a server with pools, limits and deployments, and a worker; all of it ends with the block.

    Args:
        home: data folder; one stack at a time works in it.
        settings: those of the data folder.
        port: of the server; None takes a free one.
        runs: how many runs its pool does at once; None leaves what the pool has.

    Raises:
        ServerError: another stack works in this data folder, or something does not start.
        FlowError: the server's pool works in another data folder.
    """
    prepare(home)
    busy = ServerError(
        f"another `python -m flows.local` works in {home}",
        "use that one, stop it first, or set ADAPTER_FOUNDRY_HOME to another folder",
    )
    with exclusive(prefect_home(home) / "local.lock", busy), managed_server(home, settings, port) as server:
        if server.reused:
            click.echo(f"The server is there already: {server.page}", err=True)
        set_up(server, home, settings, runs)
        names = deploy(server, home)
        with _working(server, home, settings) as worker:
            yield Stack(server=server, worker=worker, deployments=names)


def set_up(server: Server, home: Path, settings: FlowSettings, runs: int | None = None) -> None:
    """Make work pools, limits and automations on a server; what is there is brought up to date.

    Args:
        server: that gets them.
        home: data folder of the local pool.
        settings: of the data folder.
        runs: how many runs the local pool does at once; None leaves what it has.

    Raises:
        FlowError: the server's pool works in another data folder.
    """
    from prefect.client.orchestration import get_client

    from flows import heartbeat, limits, pools

    with attached(home, server.url), get_client(sync_client=True) as client:
        pools.make(client, home, runs, settings.image)
        limits.ensure(server.url, settings)
        heartbeat.ensure(server.url)


def deploy(server: Server, home: Path) -> tuple[str, ...]:
    """Make the deployments of the local pool, or bring them up to date, and return their names.

    Raises:
        ServerError: Prefect refuses them.
    """
    from flows.pools import LOCAL

    file = resources.files("flows") / DEPLOYMENTS
    names = [name for name, pool in deployments(file.read_text("utf-8")) if pool == LOCAL]
    words = ["--no-prompt", "deploy", "--prefect-file", str(file)]
    done = subprocess.run(
        [*_python("prefect", *words), *(word for name in names for word in ("--name", name))],
        env=_environment(server, home),
        cwd=prefect_home(home),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise ServerError(
            f"the deployments could not be made:\n{_end(done.stdout + done.stderr)}",
            f"correct what Prefect says about {file}",
        )
    return tuple(names)


def deployments(text: str) -> list[tuple[str, str]]:
    """Return name and work pool of each deployment in a ``prefect.yaml``."""
    import yaml

    return [(row["name"], row["work_pool"]["name"]) for row in yaml.safe_load(text)["deployments"]]


@contextmanager
def _working(server: Server, home: Path, settings: FlowSettings) -> Iterator[subprocess.Popen[bytes]]:
    """Run a worker of the local pool until the block ends; the runs in its hands end with it."""
    from flows.pools import LOCAL

    log = prefect_home(home) / "worker.log"
    name = f"{socket.gethostname()}-{os.getpid()}"
    # Should this process be killed, its keeper ends the worker and all below it.
    keeper = [sys.executable, "-P", "-m", "flows.child", str(os.getpid()), str(_STOP_SECONDS)]
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [*keeper, *worker_command(name)],
            env=_environment(server, home),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            cwd=prefect_home(home),
            # Ctrl-C is for this process, which stops the worker in order.
            start_new_session=True,
        )
    try:
        end = time.monotonic() + settings.server_timeout
        while name not in online(server.url, LOCAL):
            if process.poll() is not None or time.monotonic() > end:
                raise ServerError(
                    f"the worker did not start; the end of {log}:\n{_end(log.read_text('utf-8', 'replace'))}",
                    "correct what the log says, or raise ADAPTER_FOUNDRY_FLOWS_SERVER_TIMEOUT",
                )
            time.sleep(0.2)
        yield process
    finally:
        _stop(process, settings.stop_seconds + _STOP_SECONDS)


def worker_command(name: str) -> list[str]:
    """Return the command of a worker of the local pool, under a name."""
    from flows.pools import LOCAL

    words = ["worker", "start", "--pool", LOCAL, "--type", "process", "--install-policy", "never"]
    return _python(MODULE, *words, "--name", name)


def online(url: str, pool: str) -> set[str]:
    """Return the names of the workers of a pool that have been heard of lately."""
    try:
        rows = ask(f"{url}/work_pools/{pool}/workers/filter", {"limit": 200})
    except OSError:
        return set()
    return {row["name"] for row in rows if row["status"] == "ONLINE"}


def _stop(keeper: subprocess.Popen[bytes], seconds: float) -> None:
    """Stop a worker and the runs in its hands: asked first, made to after a while; nothing stays behind."""
    import psutil

    family = children(keeper.pid, recursive=True)
    end_runs(keeper.pid, seconds)
    keeper.terminate()
    try:
        keeper.wait(2 * _STOP_SECONDS)
    except subprocess.TimeoutExpired:
        keeper.kill()
        keeper.wait()
    for process in family:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _python(module: str, *words: str) -> list[str]:
    # -P: the working directory must not shadow Prefect.
    return [sys.executable, "-P", "-m", module, *words]


def _environment(server: Server, home: Path) -> dict[str, str]:
    """Return the environment of everything that works for a server; secrets of the server stay behind."""
    mine = {name: value for name, value in os.environ.items() if not name.startswith(_SERVER_ONLY)}
    return {
        **mine,
        **prefect_environment(home),
        "PREFECT_API_URL": server.url,
        "ADAPTER_FOUNDRY_HOME": str(home),
    }


def _end(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-_LOG_LINES:])


def watch(running: Stack) -> None:
    """Look after the worker and the server until somebody interrupts.

    Raises:
        ServerError: the worker or the server is gone.
    """
    heard = time.monotonic()
    while True:
        time.sleep(_WATCH_SECONDS)
        if running.worker.poll() is not None:
            raise ServerError(
                f"the worker ended by itself (status {running.worker.returncode})",
                "see worker.log in the folder prefect of the data folder, then start this again",
            )
        if healthy(running.server.url):
            heard = time.monotonic()
        elif time.monotonic() - heard > _DEAF_SECONDS:
            raise ServerError(
                f"the Prefect server {running.server.url} does not answer any more",
                "see server.log in the folder prefect of the data folder, then start this again",
            )


@click.command()
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=PORT,
    show_default=True,
    help="Where Prefect's page is; 0 takes a free port.",
)
@click.option(
    "--limit",
    type=click.IntRange(1),
    help="Runs that the pool `local` does at once; a new pool does 2, and Prefect's page can change it.",
)
@click.option("--json", "as_json", is_flag=True, help="Print addresses as one JSON object when all is ready.")
def main(port: int, limit: int | None, as_json: bool) -> None:
    """Run Prefect on this machine: its page, the deployments, and a worker. Ctrl-C ends all of it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    home = default_home()
    settings = FlowSettings.read(home)
    click.echo(f"Prefect starts in {prefect_home(home)} …", err=True)
    with suppress(KeyboardInterrupt), stack(home, settings, port or None, limit) as running:
        if as_json:
            click.echo(json.dumps(running.as_json(), sort_keys=True))
        else:
            click.echo(_WELCOME.format(page=running.server.page, names=", ".join(running.deployments)))
        watch(running)


def _interrupt(*_: object) -> None:
    # Once: who is impatient shall not leave processes behind.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    os.write(2, b"Stopping: runs in progress end first ...\n")
    raise KeyboardInterrupt


_WELCOME = """\
Prefect is at {page}

  to start a run     open {page}/deployments, choose one, Run > Custom run, fill in the form
  what can be run    {names}
  to stop            Ctrl-C here; what is done is kept, and a run that is started again reuses it
"""


if __name__ == "__main__":
    command.run(main, "python -m flows.local")
