"""Settings of the flows, and the environment in which Prefect runs on this machine.

Prefect reads its settings when it is imported, so `prepare` has to be called before that.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator

from registry.settings import StandardVariable, home, load

#: Without an account and without a network: Prefect must not try either. ``DO_NOT_TRACK`` alone does not stop
#: the server's telemetry, and the second user interface asks a foreign host from the browser.
QUIET = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_V2_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
}
#: Whatever a flow starts stays as silent: MLflow and Ray tell their makers otherwise. One display is enough:
#: the bars of the libraries below would write over it.
SILENT = {
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TQDM_DISABLE": "1",
}
PROFILE = "adapter-foundry"
_DATABASES = ("postgresql+asyncpg://", "sqlite+aiosqlite:///")


class FlowSettings(BaseModel):
    """Settings of the flows.

    Attributes:
        prefect_api_url: a Prefect server to use; None starts one on this machine for the time of a run.
        prefect_server_database_connection_url: database of the server that is started here; None is a SQLite
            file in the data folder.
        server_timeout: seconds that the local server may take to start, and to record a run before it stops.
        approval_timeout: seconds that a release waits for approvers, over all of its questions.
        automatic_approval: whether a release that is started from a deployment may approve by itself. Then
            everybody who reaches Prefect's page approves, if the worker holds an approver's key.
        workers: how many parts of a stage are done at once on this machine, on threads or on a Ray cluster of
            the run's own; None takes one a core, up to four.
        ray_address: a Ray cluster for flows with ``runner: ray``, whose machines share the data folder; None
            starts one on this machine for the time of a run.
        processes: of a training, and at most so many that encode for one; None takes one a GPU, or one.
        accelerate_config: file of `accelerate config` for trainings; decides machines and processes then.
        stop_seconds: how long a training that is told to stop may take to save a checkpoint.
        gpu_slots: how many GPUs flow runs may hold at once, all together; None takes those of the
            machine that makes the limit, or one.
        api_per_minute: requests that all flow runs together send to each paid API; None begins with 600. With
            None, either is made once and then belongs to whoever changes it in Prefect's page.
        image: of the pods of the pool ``kubernetes``, best by digest. It names its registry, for
            our name on Docker Hub is nobody's. None is the image that was built here, which nobody can fetch.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prefect_api_url: Annotated[str | None, StandardVariable("PREFECT_API_URL")] = None
    prefect_server_database_connection_url: Annotated[
        SecretStr | None, StandardVariable("PREFECT_SERVER_DATABASE_CONNECTION_URL")
    ] = None
    server_timeout: Annotated[float, Field(gt=0)] = 180.0
    approval_timeout: Annotated[int, Field(ge=1, le=365 * 86_400)] = 7 * 86_400
    automatic_approval: bool = False
    workers: Annotated[int | None, Field(ge=1, le=256)] = None
    ray_address: Annotated[str | None, StandardVariable("RAY_ADDRESS")] = None
    processes: Annotated[int | None, Field(ge=1)] = None
    accelerate_config: Path | None = None
    stop_seconds: Annotated[float, Field(gt=0, le=3600)] = 60.0
    gpu_slots: Annotated[int | None, Field(ge=1)] = None
    api_per_minute: Annotated[int | None, Field(ge=1)] = None
    image: str | None = None

    @field_validator("prefect_server_database_connection_url")
    @classmethod
    def _asynchronous_driver(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not value.get_secret_value().startswith(_DATABASES):
            raise ValueError(f"Prefect's server takes a URL that begins with {' or '.join(_DATABASES)}")
        return value

    @field_validator("image")
    @classmethod
    def _names_its_registry(cls, value: str | None) -> str | None:
        host, slash, _ = (value or "").partition("/")
        if value is not None and not (slash and (host == "localhost" or re.search(r"[.:]", host))):
            raise ValueError(
                f"{value!r} names no registry, and docker.io would be asked for it: begin with one, such as "
                "registry.example/adapter-foundry/worker@sha256:…"
            )
        return value

    @classmethod
    def read(cls, data_folder: Path | None = None) -> FlowSettings:
        """Return the settings of this machine.

        Raises:
            registry.errors.UsageError: a setting is wrong.
        """
        return load("flows", cls, data_folder=data_folder)


def prefect_home(data_folder: Path) -> Path:
    """Where Prefect keeps its database, its cached results and the log of its server."""
    return data_folder / "prefect"


def result_storage(data_folder: Path) -> Path:
    """Where stages leave what they returned, as JSON: all processes of this data folder look here."""
    return prefect_home(data_folder) / "storage"


def prefect_environment(data_folder: Path) -> dict[str, str]:
    """Return the variables that keep Prefect in one folder, quiet, and off the network."""
    return {
        "PREFECT_HOME": str(prefect_home(data_folder)),
        # In the server's memory, which Prefect prefers, leases are lost with it and their slots never return.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        # The display tells what happens; Prefect's own lines go to its user interface.
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
        **SILENT,
        **QUIET,
    }


def prepare(data_folder: Path | None = None) -> None:
    """Make Prefect's folder, and put `prefect_environment` into this process where the user has set nothing.

    The profile in the folder makes a plain ``PREFECT_HOME=… prefect server start`` just as quiet.
    """
    folder = data_folder or home()
    profiles = prefect_home(folder) / "profiles.toml"
    if not profiles.exists():
        profiles.parent.mkdir(parents=True, exist_ok=True)
        lines = [f'{name} = "{value}"' for name, value in QUIET.items()]
        profiles.write_text("\n".join([f'active = "{PROFILE}"', "", f"[profiles.{PROFILE}]", *lines, ""]))
    for name, value in prefect_environment(folder).items():
        os.environ.setdefault(name, value)


def client_settings(data_folder: Path, api_url: str) -> dict[str, Any]:
    """Return Prefect's settings for a process that has imported it already, maybe for another data folder."""
    return {
        "home": prefect_home(data_folder),
        "api.url": api_url,
        "results.local_storage_path": result_storage(data_folder),
        # Runs last minutes in one process: nobody watches heartbeats, and their thread costs a second.
        "flows.heartbeat_frequency": None,
    }
