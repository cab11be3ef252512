"""Prefect's server behind a password, and a worker that does what people start in its page."""

from __future__ import annotations

import socket
import urllib.request
from collections.abc import Mapping
from importlib import resources

from flows.local import DEPLOYMENTS, deployments, worker_command
from flows.server import ask, server_command, server_environment
from flows.settings import FlowSettings, prefect_environment, prefect_home
from infra.local import postgres
from infra.local.passwords import Passwords
from infra.local.place import Place
from infra.local.ports import HOST
from infra.local.service import Service

SERVER, WORKER = "prefect-server", "prefect-worker"
_LOCAL_POOL = "local"
_STOP_SECONDS = 15


def page(ports: Mapping[str, int]) -> str:
    """Return the address of Prefect's page."""
    return f"http://{HOST}:{ports[SERVER]}"


def variables(ports: Mapping[str, int], secrets: Passwords) -> dict[str, str]:
    """Return the variables by which Prefect's clients find the server and show who they are."""
    return {"PREFECT_API_URL": f"{page(ports)}/api", "PREFECT_API_AUTH_STRING": _who(secrets)}


def _who(secrets: Passwords) -> str:
    return f"admin:{secrets['prefect']['admin']}"


def server(where: Place, ports: Mapping[str, int], secrets: Passwords, *, on_postgres: bool) -> Service:
    """Return the service of Prefect's server.

    Whoever reaches its API can start code as the user who runs the worker, and the loopback is everybody's on
    this machine: so it asks for a password.
    """
    folder = prefect_home(where.home)
    folder.mkdir(parents=True, exist_ok=True)
    rows = postgres.uri("prefect", ports, "asyncpg", secrets["postgres"]["prefect"]) if on_postgres else None
    settings = FlowSettings.model_validate({"prefect_server_database_connection_url": rows})
    return Service(
        name=SERVER,
        command=server_command(ports[SERVER]),
        environment={
            **server_environment(where.home, settings, ports[SERVER]),
            "PREFECT_SERVER_API_AUTH_STRING": _who(secrets),
            "ADAPTER_FOUNDRY_HOME": str(where.home),
        },
        folder=folder,
        stop_seconds=30,
    )


def worker(
    where: Place, ports: Mapping[str, int], environment: Mapping[str, str], *, stop_seconds: float
) -> Service:
    """Return the service of the worker.

    Args:
        where: the platform.
        ports: of the platform.
        environment: what flow runs get.
        stop_seconds: that a run has to save what it did.
    """
    name = f"{socket.gethostname()}-platform"
    # Prefect keeps files of runs in a folder of a fixed name, which in /tmp is that of whoever came first.
    temporary = where.home / "tmp"
    temporary.mkdir(mode=0o700, exist_ok=True)
    return Service(
        name=WORKER,
        command=[*worker_command(name), "--with-healthcheck"],
        environment={
            **environment,
            "TMPDIR": str(temporary),
            # Names of Ray's sockets would be too long for the kernel there; Ray's folder is for all users.
            "RAY_TMPDIR": "/tmp",  # noqa: S108
            "PREFECT_WORKER_WEBSERVER_HOST": HOST,
            "PREFECT_WORKER_WEBSERVER_PORT": str(ports[WORKER]),
        },
        folder=prefect_home(where.home),
        stop_seconds=int(stop_seconds) + _STOP_SECONDS,
        many=True,
    )


def probe_server(ports: Mapping[str, int], secrets: Passwords, timeout: float) -> None:
    """Sign in and count flows, which takes the server and its database."""
    ask(f"{page(ports)}/api/flows/count", {}, timeout, variables(ports, secrets))


def probe_worker(ports: Mapping[str, int], timeout: float) -> None:
    """Ask the worker whether it has asked the server for work lately."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://{HOST}:{ports[WORKER]}/health", timeout=timeout):
        pass


def text() -> str:
    """Return what describes the deployments."""
    return (resources.files("flows") / DEPLOYMENTS).read_text("utf-8")


def wanted() -> tuple[str, ...]:
    """Return the names of the deployments that the worker's pool has."""
    return tuple(name for name, pool in deployments(text()) if pool == _LOCAL_POOL)


def deployed(ports: Mapping[str, int], secrets: Passwords) -> bool:
    """Return whether all deployments are there."""
    rows = ask(f"{page(ports)}/api/deployments/filter", {"limit": 200}, 30.0, variables(ports, secrets))
    return set(wanted()) <= {row["name"] for row in rows}


def environment(where: Place, ports: Mapping[str, int], secrets: Passwords) -> dict[str, str]:
    """Return everything that a flow, or a client of Prefect, needs here."""
    return {**prefect_environment(where.home), **variables(ports, secrets)}
