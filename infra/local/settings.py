"""Settings of the local platform: ``ADAPTER_FOUNDRY_PLATFORM_<KEY>``, then ``[platform]`` of the file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from registry.settings import load as _load

Port = Annotated[int, Field(ge=1024, le=55_000)]


class PlatformSettings(BaseModel):
    """Settings of the local platform.

    Attributes:
        database: where MLflow, Prefect, the audit log and jobs keep their rows; "auto" is PostgreSQL where it
            is installed and SQLite elsewhere, decided by the first start and kept.
        postgres_port: of PostgreSQL; None takes a free one, and keeps it.
        s3_port: of the S3 server; None is 8333, or a free one where that is taken.
        mlflow_port: of MLflow; None is 5000, or a free one.
        prefect_port: of Prefect; None is 4200, or a free one.
        serving_port: of the service; None is 8400, or a free one.
        adapters: what the service serves and follows.
        runs: how many flow runs the pool `local` does at once.
        mlflow_workers: processes of MLflow's server; each takes about 300 MB.
        pass_variables: names of variables that flow runs get from the shell that starts the platform, such as
            keys of paid services.
        start_timeout: seconds that a service may take to answer after its start.
        probe_seconds: between two looks of the health watcher.
        probe_timeout: seconds within which a service has to answer the watcher.
        probe_failures: looks in a row that a service fails before the watcher restarts it.
        log_bytes: of a log file before it is rotated; three older ones are kept.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    database: Literal["auto", "postgresql", "sqlite"] = "auto"
    postgres_port: Port | None = None
    s3_port: Port | None = None
    mlflow_port: Port | None = None
    prefect_port: Port | None = None
    serving_port: Port | None = None
    adapters: tuple[str, ...] = ("pixelsmile@prod",)
    runs: Annotated[int, Field(ge=1, le=64)] = 2
    mlflow_workers: Annotated[int, Field(ge=1, le=16)] = 1
    pass_variables: tuple[str, ...] = ()
    start_timeout: Annotated[float, Field(gt=0, le=3600)] = 300.0
    probe_seconds: Annotated[float, Field(gt=0, le=3600)] = 5.0
    probe_timeout: Annotated[float, Field(gt=0, le=600)] = 10.0
    probe_failures: Annotated[int, Field(ge=1, le=100)] = 3
    log_bytes: Annotated[int, Field(ge=4096)] = 10 << 20


def load(env: Mapping[str, str] | None = None, data_folder: Path | None = None) -> PlatformSettings:
    """Read the settings.

    Args:
        env: environment variables; None is the environment of this process.
        data_folder: whose file is read; None is the default one.

    Raises:
        registry.errors.UsageError: a setting is unknown or has a wrong value.
    """
    return _load("platform", PlatformSettings, env, data_folder=data_folder)
