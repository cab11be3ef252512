"""How each service shows that it does what it is there for: asked over its own protocol, as its users do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

from infra.local import mlflow, place, postgres, prefect, s3, serving
from infra.local.passwords import Passwords, passwords
from infra.local.place import Place

#: Takes a timeout in seconds and raises an exception unless the service works.
Probe = Callable[[float], None]


def probes(where: Place) -> dict[str, Probe]:
    """Return the probes of a platform's services by name."""
    kept = place.read(where)
    return of(kept["ports"], passwords(where), on_postgres=kept["database"] == "postgresql")


def of(ports: Mapping[str, int], secrets: Passwords, *, on_postgres: bool) -> dict[str, Probe]:
    """Return the probes of services on these ports."""
    found: dict[str, Probe] = {
        s3.NAME: lambda timeout: s3.probe(ports, secrets, timeout),
        mlflow.NAME: lambda timeout: mlflow.probe(ports, secrets, timeout),
        prefect.SERVER: lambda timeout: prefect.probe_server(ports, secrets, timeout),
        prefect.WORKER: lambda timeout: prefect.probe_worker(ports, timeout),
        serving.NAME: lambda timeout: serving.probe(ports, timeout),
    }
    if on_postgres:
        found[postgres.NAME] = lambda timeout: postgres.probe(ports, secrets, timeout)
    return found


def problem(probe: Probe, timeout: float) -> str | None:
    """Return why a service does not do what it is there for, or None."""
    try:
        probe(timeout)
    except Exception as error:  # whatever it is, it does not work
        return f"{type(error).__name__}: {error}".strip()[:300]
    return None


def problems(asked: Mapping[str, Probe], timeout: float) -> dict[str, str | None]:
    """Return the `problem` of each service, all asked at once."""
    with ThreadPoolExecutor(max(1, len(asked))) as pool:
        return dict(zip(asked, pool.map(lambda one: problem(one, timeout), asked.values()), strict=True))
