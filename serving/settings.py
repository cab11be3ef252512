"""Settings of serving: ``ADAPTER_FOUNDRY_SERVING_<KEY>``, then ``[serving]`` of the file, then defaults."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from registry.settings import load as _load
from serving.schedules import Schedule


class ServingSettings(BaseModel):
    """Settings of serving.

    Attributes:
        bases: base model id -> the folder that holds it, for bases kept outside of the data folder.
        device: where a base runs: ``cpu``, ``cuda``, ``cuda:1`` …
        dtype: of the base's weights; None is float32 on a CPU and bfloat16 elsewhere.
        weights: how the denoiser's weights are kept: whole, or as fp8 or nf4, to fit a smaller GPU.
        offload: what waits in the machine's memory until it is used: nothing, whole models, or blocks of the
            denoiser.
        adapters: references that are served and followed, for example ``pixelsmile@prod``; the first is the
            default.
        stacked: reference -> references of adapters that lie under it, at strength 1 or the signed one
            nearest to it, where a request does not say what does; such as one distilled to few steps.
        schedules: name of an adapter -> ``steps`` (where a request names none) and ``shift`` of the noise
            levels, for one distilled to few steps; they hold whenever it takes part in an edit.
        on_demand: also serve other references to this registry's adapters for the same base when a request
            names them.
        follow_seconds: how often the registry is asked what a followed alias means.
        adapter_memory: bytes of the device's memory that adapters may take; those that no request uses and
            nobody follows are evicted, the least recently used first.
        merge: merge adapters into the base's weights for as long as every running picture wants the same ones
            at the same strengths: a step costs what the base's costs, the memory of the changed weights is
            taken twice, and another adapter in between costs a copy of them.
        cache_memory: bytes for encodings of pictures and prompts.
        host: address that the service listens on.
        port: port that it listens on; 0 takes a free one.
        max_rows: pictures that run in one batch.
        max_waiting: pictures that may wait; more are answered with 429.
        max_body: bytes of a request.
        max_pixels: pixels of a picture from outside.
        max_output_pixels: pixels of all the pictures that one request makes.
        request_seconds: time within which a request has to arrive whole.
        grace_seconds: time that requests get to finish when the server stops.
        jobs: database of asynchronous jobs, ``sqlite:///file`` or ``postgresql+psycopg://…``; None is a file
            in the data folder.
        job_hours: for which jobs that ended are kept.
        webhook_loopback: whether webhooks may go to this machine itself, also without TLS; for development.
        public: whether requests without an API key are answered: true answers everybody, who may edit and
            read within the limits of one key; None answers programs of this machine, which may do
            everything, where the service listens on this machine alone and no key was made.
        content_credentials: PEM files ``certificates,key`` that sign a C2PA manifest into every picture.
        otlp_endpoint: where traces are sent; None sends none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bases: Mapping[str, Path] = Field(default_factory=dict)
    device: str = Field(default="cpu", pattern=r"^(cpu|mps|xpu|cuda(:[0-9]{1,3})?)$")
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    weights: Literal["whole", "fp8", "nf4"] = "whole"
    offload: Literal["none", "models", "blocks"] = "none"
    adapters: tuple[str, ...] = ()
    stacked: Mapping[str, tuple[str, ...]] = Field(default_factory=dict)
    schedules: Mapping[str, Schedule] = Field(default_factory=dict)
    on_demand: bool = True
    follow_seconds: Annotated[float, Field(gt=0, le=3600)] = 2.0
    adapter_memory: Annotated[int, Field(ge=0)] = 8 << 30
    merge: bool = False
    cache_memory: Annotated[int, Field(ge=0)] = 256 << 20
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8400
    max_rows: Annotated[int, Field(ge=1, le=256)] = 16
    max_waiting: Annotated[int, Field(ge=1, le=100_000)] = 256
    max_body: Annotated[int, Field(ge=1024, le=1 << 30)] = 34 << 20
    max_pixels: Annotated[int, Field(ge=64, le=1 << 28)] = 4096 * 4096
    max_output_pixels: Annotated[int, Field(ge=64, le=1 << 32)] = 32 * 1024 * 1024
    request_seconds: Annotated[float, Field(gt=0, le=600)] = 20.0
    grace_seconds: Annotated[float, Field(ge=0, le=3600)] = 30.0
    jobs: str | None = None
    job_hours: Annotated[float, Field(gt=0, le=8760)] = 24.0
    webhook_loopback: bool = False
    public: bool | None = None
    content_credentials: str | None = None
    otlp_endpoint: str | None = None


def load(env: Mapping[str, str] | None = None, home: Path | None = None) -> ServingSettings:
    """Read the settings.

    Args:
        env: environment variables; None is the environment of this process.
        home: the data folder; None is the registry's.

    Raises:
        registry.errors.UsageError: a setting is unknown or has a wrong value.
    """
    return _load("serving", ServingSettings, env, data_folder=home)
