"""All services of a platform, in the order in which they start, and what their clients need."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass

from flows.settings import FlowSettings
from infra.local import health, mlflow, place, ports, postgres, prefect, s3, serving
from infra.local.errors import Missing, WrongFolder
from infra.local.passwords import Passwords, passwords
from infra.local.place import Place
from infra.local.service import HERE, Service, launch_file
from infra.local.settings import PlatformSettings

_FLOORS = tuple(f"ADAPTER_FOUNDRY_{floor}_" for floor in ("FLOWS", "TRAINER"))
_SERVING = "ADAPTER_FOUNDRY_SERVING_"
_LISTENING = {f"{_SERVING}{key}" for key in ("HOST", "PORT", "ADAPTERS", "JOBS")}


@dataclass(frozen=True, kw_only=True, slots=True)
class Stack:
    """A platform: where it is, what was decided, and its services.

    Attributes:
        where: its folders.
        settings: of the platform.
        ports: by name.
        secrets: by service and name.
        engine: PostgreSQL; None where SQLite does.
        why_sqlite: why it does; None where nobody needs to be told.
        notes: what else their owner should be told.
        services: in the order in which they start.
    """

    where: Place
    settings: PlatformSettings
    ports: Mapping[str, int]
    secrets: Passwords
    engine: postgres.Engine | None
    why_sqlite: str | None
    notes: tuple[str, ...]
    services: tuple[Service, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the services."""
        return tuple(service.name for service in self.services)

    def __getitem__(self, name: str) -> Service:
        return next(service for service in self.services if service.name == name)

    @property
    def environment(self) -> dict[str, str]:
        """What a client of the platform needs: somebody who trains, publishes and promotes."""
        return _client(self.where, self.ports, self.secrets, on_postgres=self.engine is not None)


def build(
    where: Place, settings: PlatformSettings, running: tuple[str, ...] = (),
    variables: Mapping[str, str] = os.environ,
) -> Stack:  # fmt: skip
    """Decide what is not decided yet, keep it, and return the platform; nothing is started.

    Args:
        where: a folder that is claimed.
        settings: of the platform.
        running: names of the services that run, whose ports are their own.
        variables: the shell's.

    Raises:
        PlatformError: a port is taken, a program is missing, or the folder is of another kind.
    """
    engine, why_sqlite = _database(where, settings)
    kept = place.read(where)
    wanted = {
        "postgres": settings.postgres_port, "s3": settings.s3_port, "mlflow": settings.mlflow_port,
        "prefect-server": settings.prefect_port, "serving": settings.serving_port,
    }  # fmt: skip
    mine = [name for name in ports.USUAL if name in running or (name.startswith("s3-") and "s3" in running)]
    chosen = ports.choose(wanted, kept.get("ports", {}), mine=mine)
    if chosen != kept.get("ports"):
        place.keep(where, {"ports": chosen})
    secrets = passwords(where)
    on_postgres = engine is not None
    flows = FlowSettings.read(where.home)
    passed, notes = _passed(where, settings, variables)
    floors = {name: value for name, value in variables.items() if name.startswith(_FLOORS)}
    own = {
        name: value
        for name, value in variables.items()
        if name.startswith(_SERVING) and name not in _LISTENING
    }
    client = _client(where, chosen, secrets, on_postgres=on_postgres)
    found = [
        *([postgres.service(where, engine, chosen, secrets)] if engine is not None else []),
        s3.service(where, chosen, secrets),
        mlflow.service(where, chosen, secrets, on_postgres=on_postgres, workers=settings.mlflow_workers),
        prefect.server(where, chosen, secrets, on_postgres=on_postgres),
        prefect.worker(where, chosen, {**passed, **floors, **client}, stop_seconds=flows.stop_seconds),
        serving.service(where, chosen, secrets, settings.adapters, own, on_postgres=on_postgres),
        health.service(where, settings, chosen, secrets),
    ]
    return Stack(
        where=where, settings=settings, ports=chosen, secrets=secrets, engine=engine, why_sqlite=why_sqlite,
        notes=notes, services=tuple(found),
    )  # fmt: skip


def environment(where: Place) -> dict[str, str]:
    """Return what a client of a platform that is there needs."""
    kept = place.read(where)
    return _client(where, kept["ports"], passwords(where), on_postgres=kept["database"] == "postgresql")


def _database(where: Place, settings: PlatformSettings) -> tuple[postgres.Engine | None, str | None]:
    """Return PostgreSQL, or None and why not; what the first start has decided stays."""
    kept, asked = place.read(where).get("database"), settings.database
    if kept == "postgresql" and not postgres.made(where):
        kept = None  # a first start that could not make them: nothing is decided yet
    if kept is not None and asked not in ("auto", kept):
        raise WrongFolder(
            f"the platform in {where.home} keeps its rows in {kept}, and the settings say {asked}",
            f"set the database to {kept} or auto: what it holds stays of its kind; for the other, make a new "
            "platform in another ADAPTER_FOUNDRY_HOME",
        )
    found, why = None, None
    if (kept or asked) != "sqlite":
        try:
            found = postgres.engine(where)
        except Missing as error:
            if "postgresql" in (kept, asked):
                raise
            why = error.message
    if kept is None:
        place.keep(where, {"database": "sqlite" if found is None else "postgresql"})
    return found, why


def _passed(
    where: Place, settings: PlatformSettings, variables: Mapping[str, str]
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return the variables that flow runs get, and what to tell; what this shell lacks keeps its value."""
    try:
        earlier = json.loads(launch_file(where, prefect.WORKER).read_text("utf-8"))["environment"]
    except (OSError, ValueError, KeyError):
        earlier = {}
    found, notes = dict[str, str](), []
    for name in settings.pass_variables:
        if name in variables:
            found[name] = variables[name]
        elif name in earlier:
            found[name] = earlier[name]
            notes.append(f"{name} is not set here: flow runs keep the value that they have")
        else:
            notes.append(f"{name} is named in pass_variables and not set: flow runs go without it")
    return found, tuple(notes)


def _client(where: Place, at: Mapping[str, int], secrets: Passwords, *, on_postgres: bool) -> dict[str, str]:
    ledger = (
        postgres.uri("registry", at) if on_postgres else f"sqlite:///{where.home / 'registry' / 'ledger.db'}"
    )
    return {
        "ADAPTER_FOUNDRY_HOME": str(where.home),
        "ADAPTER_FOUNDRY_STORE": s3.STORE,
        "ADAPTER_FOUNDRY_LEDGER": ledger,
        **({"PGPASSWORD": secrets["postgres"]["registry"]} if on_postgres else {}),
        **s3.variables("publisher", at, secrets),
        **mlflow.variables(mlflow.PUBLISHER, at, secrets),
        **prefect.environment(where, at, secrets),
        **HERE,
    }
