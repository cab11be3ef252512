"""The service with its page: it may read adapters, and waits for the first that is promoted."""

from __future__ import annotations

import math
import urllib.request
from collections.abc import Mapping

from infra.local import postgres, s3
from infra.local.passwords import Passwords
from infra.local.place import Place
from infra.local.ports import HOST
from infra.local.service import Service, python
from serving.settings import load

NAME = "serving"
#: What it does after the requests have ended: tell clients, give back jobs, close the device.
_STOP_SECONDS = 10


def url(ports: Mapping[str, int]) -> str:
    """Return the address of its page and API."""
    return f"http://{HOST}:{ports[NAME]}"


def service(
    where: Place, ports: Mapping[str, int], secrets: Passwords, adapters: tuple[str, ...],
    own: Mapping[str, str], *, on_postgres: bool,
) -> Service:  # fmt: skip
    """Return the service.

    Args:
        where: the platform.
        ports: of the platform.
        secrets: of the platform.
        adapters: what it serves and follows.
        own: further settings of serving, as variables.
        on_postgres: where it keeps jobs.

    Raises:
        registry.errors.UsageError: one of these settings is wrong.
    """
    grace = load(own, where.home).grace_seconds
    jobs = postgres.uri("serving", ports, password=secrets["postgres"]["serving"]) if on_postgres else None
    words = [word for adapter in adapters for word in ("--adapter", adapter)]
    return Service(
        name=NAME,
        command=[
            *python("serving.cli", "serve", "--wait", "--host", HOST, "--port", str(ports[NAME])),
            *words,
        ],
        environment={
            **s3.variables("reader", ports, secrets),
            **own,
            "ADAPTER_FOUNDRY_HOME": str(where.home),
            "ADAPTER_FOUNDRY_STORE": s3.STORE,
            **({} if jobs is None else {"ADAPTER_FOUNDRY_SERVING_JOBS": jobs}),
        },
        folder=where.services,
        stop_seconds=math.ceil(grace) + _STOP_SECONDS,
    )


def probe(ports: Mapping[str, int], timeout: float) -> None:
    """Ask whether it lives; without a promoted adapter it does, and is not ready."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"{url(ports)}/v2/health/live", timeout=timeout):
        pass
