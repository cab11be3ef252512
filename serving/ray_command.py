"""`serving ray`: the service on a Ray cluster, until it is told to stop.

Without a cluster (``--address`` or ``RAY_ADDRESS``) it starts one of this machine's own, which speaks to
nobody else and ends with it.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import signal
import socket
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from serving.ray_scale import Scale
    from serving.settings import ServingSettings

APPLICATION = "adapter-foundry"
_PORTS = range(22_500, 32_000)
"""One of these is taken for port 0; one that the kernel gives may be a connection's before Serve listens."""
_TRIES = 50
_SHARED = ("ADAPTER_FOUNDRY_", "AWS_", "HF_", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "DO_NOT_TRACK")
"""Variables that the processes of the cluster get from the one that starts them."""


@click.command("ray")
@click.option("--engines", type=int, default=2, show_default=True, help="Replicas with a base model each.")
@click.option("--ingresses", type=int, default=2, show_default=True, help="Replicas that speak HTTP.")
@click.option("--cpus", type=float, default=1.0, show_default=True, help="Of each engine; may be a fraction.")
@click.option("--gpus", type=float, default=0.0, show_default=True, help="Of each engine; may be a fraction.")
@click.option("--address", envvar="RAY_ADDRESS", help="A cluster that runs; without it one is started here.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object when it listens.")
def ray_command(
    engines: int, ingresses: int, cpus: float, gpus: float, address: str | None, as_json: bool
) -> None:
    """Serve on a Ray cluster until SIGTERM or Ctrl-C; settings as for `serving serve`."""
    from serving.ray_scale import scale_of
    from serving.settings import load

    scale = scale_of({"engines": engines, "ingresses": ingresses, "cpus": cpus, "gpus": gpus})
    settings = load()
    stopped = threading.Event()
    with _cluster(address, cpus=engines * cpus, gpus=engines * gpus):
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stopped.set())
        with _application(scale, settings) as url:
            click.echo(json.dumps({"url": url, **scale.model_dump()}) if as_json else url)
            click.echo(f"the page is at {url}/; {url}/v2/health/ready tells when all is loaded", err=True)
            stopped.wait()
            click.echo("finishing what was taken", err=True)


@contextmanager
def _cluster(address: str | None, *, cpus: float, gpus: float) -> Iterator[None]:
    """Connect this process to a cluster, or start one; raises as `connect`."""
    from contextlib import ExitStack

    from registry.settings import home
    from serving.local_ray import connect, kept_here

    shared = {name: value for name, value in os.environ.items() if name.startswith(_SHARED)}
    options: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    with ExitStack() as starting:
        if address is None:
            shared |= starting.enter_context(kept_here(home() / "ray"))
            options |= {
                "num_cpus": max(os.cpu_count() or 1, math.ceil(cpus)),
                "num_gpus": math.ceil(gpus) or None,
                "include_dashboard": False,
            }
            # Ray makes its workers give way to whatever else runs, and edits would wait for it.
            os.environ.setdefault("RAY_worker_niceness", "0")
        connect(address, {"runtime_env": {"env_vars": shared}, **options})
    import ray

    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _application(scale: Scale, settings: ServingSettings) -> Iterator[str]:
    """Run the application and yield its address; it is taken down afterwards.

    Raises:
        ServingError: a replica does not start.
    """
    from ray import serve

    from registry.errors import shown
    from serving.errors import ServingError
    from serving.ray_app import application

    port = settings.port or _free_port(settings.host)
    serve.start(http_options={"host": settings.host, "port": port})
    try:
        serve.run(application(scale, settings), name=APPLICATION, route_prefix="/")
    except RuntimeError as error:
        told = _explained(serve.status().applications[APPLICATION].deployments.values())
        serve.shutdown()
        what, mend = told or (str(error), "the logs of its replicas say why: `ray logs`")
        raise ServingError(f"the service does not start on the cluster: {shown(what, 600)}", mend) from error
    try:
        yield f"http://{settings.host}:{port}"
    finally:
        serve.delete(APPLICATION)
        serve.shutdown()


def _explained(deployments: Iterable[Any]) -> tuple[str, str] | None:
    """Return what happened and what to do, of an explained error that kept a replica from starting."""
    for deployment in deployments:
        found = re.search(r"\.errors\.\w+: (.+)\n\s*What to do: (.+)", deployment.message)
        if found is not None:
            return found[1], found[2]
    return None


def _free_port(host: str) -> int:
    """Return a port that nobody listens on, for Serve, which listens on it much later.

    Raises:
        UsageError: the address is not one of this machine.
    """
    from registry.errors import shown
    from serving.errors import UsageError

    failed: OSError | None = None
    for port in random.SystemRandom().sample(_PORTS, _TRIES):
        try:
            with socket.create_server((host, port)):
                return port
        except OSError as error:
            failed = error
    raise UsageError(
        f"the service cannot listen on {shown(host)}: {shown(failed)}",
        "set ADAPTER_FOUNDRY_SERVING_HOST to an address of this machine, or ADAPTER_FOUNDRY_SERVING_PORT to "
        "a port that is free",
    ) from failed
