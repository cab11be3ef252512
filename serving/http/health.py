"""Health and metadata in the Open Inference Protocol's words, and metrics for Prometheus.

``/v2/health/live`` and ``/v2/health/ready`` need no key: whoever starts and stops the service asks them.
What names adapters or counts needs one with the scope ``read`` where keys are in use: without it readiness
says yes or no, and why not in fixed words.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version as distribution_version
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Depends, Path, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field

from registry.errors import shown
from serving.errors import NotServed
from serving.http.answers import responses, without_places
from serving.http.keys import Reader, may
from serving.http.service import Service, service_of

if TYPE_CHECKING:
    from serving.backend import AdapterStatus, Health

router = APIRouter(tags=["health"])

Here = Annotated[Service, Depends(service_of)]
ModelName = Annotated[str, Path(min_length=1, max_length=128, description="Name of an adapter.")]
ModelVersion = Annotated[
    str, Path(min_length=1, max_length=9, pattern="^[1-9][0-9]*$", description="Version of the adapter.")
]
_KEYED = (401, 403, 404, 422, 429, 500)


class ServerAnswer(BaseModel):
    """The service."""

    name: str = "adapter-foundry"
    version: str
    extensions: list[str] = []


class LiveAnswer(BaseModel):
    """Whether the process answers, and may answer edits again."""

    live: bool


class ReadyAnswer(BaseModel):
    """Whether requests may be sent here."""

    ready: bool
    draining: bool
    waiting: int | None = Field(description="Requests in the queue; null to who may not read.")
    running: int | None = Field(description="Requests on the device; null to who may not read.")
    problem: str | None = Field(
        default=None, description="Why not; to who may not read only `draining` or `not ready`."
    )


class ModelReadyAnswer(BaseModel):
    """Whether an adapter answers."""

    name: str
    ready: bool
    problem: str | None = None


class TensorAnswer(BaseModel):
    """What goes in or comes out."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadataAnswer(BaseModel):
    """An adapter, as the Open Inference Protocol describes models."""

    name: str
    versions: list[str] = Field(description="That are served now.")
    platform: str = "adapter-foundry"
    inputs: list[TensorAnswer]
    outputs: list[TensorAnswer]


@router.get("/v2", summary="The service", responses=responses(500))
async def server() -> ServerAnswer:
    """Name the service and its version."""
    return ServerAnswer(version=distribution_version("adapter-foundry"))


@router.get(
    "/v2/health/live",
    summary="Live",
    response_model=LiveAnswer,
    responses={503: {"model": LiveAnswer, "description": "Only a new process may help."}, **responses(500)},
)
async def live(service: Here) -> Response:
    """Answer as long as the process does: 200, or 503 where its device is dead and it has to start again."""
    alive = (await service.backend.health()).device != "dead"
    return JSONResponse(LiveAnswer(live=alive).model_dump(), status_code=200 if alive else 503)


@router.get(
    "/v2/health/ready",
    summary="Ready",
    response_model=ReadyAnswer,
    responses={503: {"model": ReadyAnswer, "description": "Not ready, and why."}, **responses(500)},
)
async def ready(request: Request, service: Here) -> Response:
    """Say whether requests may be sent here: 200, or 503 and why not."""
    health = await service.backend.health()
    answer = _readable(health) if may(request, "read") else _bare(health)
    return JSONResponse(answer.model_dump(), status_code=200 if health.ready else 503)


def _readable(health: Health) -> ReadyAnswer:
    return ReadyAnswer(
        ready=health.ready,
        draining=health.draining,
        waiting=health.waiting,
        running=health.running,
        problem=None if health.problem is None else without_places(health.problem),
    )


def _bare(health: Health) -> ReadyAnswer:
    """What a stranger may know: the words of a problem name adapters, and what a store said of them."""
    problem = None if health.ready else "draining" if health.draining else "not ready"
    return ReadyAnswer(
        ready=health.ready, draining=health.draining, waiting=None, running=None, problem=problem
    )


_NOT_READY: dict[int | str, dict[str, Any]] = {
    503: {"model": ModelReadyAnswer, "description": "Not ready, and why."}
}


@router.get("/v2/models/{name}", summary="An adapter", responses=responses(*_KEYED))
async def model(name: ModelName, caller: Reader, service: Here) -> ModelMetadataAnswer:
    """Describe an adapter that is served."""
    served = await _named(service, name)
    versions = sorted({one.version for one in served if one.version is not None and one.state == "ready"})
    picture = [-1, -1, 3]
    return ModelMetadataAnswer(
        name=name,
        versions=[str(version) for version in versions],
        inputs=[
            TensorAnswer(name="image", datatype="BYTES", shape=[1]),
            TensorAnswer(name="expressions", datatype="FP32", shape=[-1]),
        ],
        outputs=[TensorAnswer(name="image", datatype="UINT8", shape=picture)],
    )


@router.get(
    "/v2/models/{name}/ready",
    summary="An adapter's readiness",
    response_model=ModelReadyAnswer,
    responses={**_NOT_READY, **responses(*_KEYED)},
)
async def model_ready(name: ModelName, caller: Reader, service: Here) -> Response:
    """Say whether any version of an adapter answers: 200, or 503 and why not."""
    return _readiness(name, await _named(service, name))


@router.get(
    "/v2/models/{name}/versions/{version}",
    summary="A version of an adapter",
    responses=responses(*_KEYED),
)
async def version(
    name: ModelName, version: ModelVersion, caller: Reader, service: Here
) -> ModelMetadataAnswer:
    """Describe a version of an adapter that is served."""
    await _named(service, name, int(version))
    return await model(name, caller, service)


@router.get(
    "/v2/models/{name}/versions/{version}/ready",
    summary="A version's readiness",
    response_model=ModelReadyAnswer,
    responses={**_NOT_READY, **responses(*_KEYED)},
)
async def version_ready(name: ModelName, version: ModelVersion, caller: Reader, service: Here) -> Response:
    """Say whether this very version answers: 200, or 503 and why not."""
    return _readiness(name, await _named(service, name, int(version)))


@router.get(
    "/metrics",
    summary="Metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {}}}, **responses(401, 403, 422, 429, 500)},
)
async def metrics(request: Request, caller: Reader, service: Here) -> Response:
    """Return all metrics in Prometheus' text format."""
    body, media_type = service.metrics.exposition(request.headers.get("accept", ""))
    return Response(body, media_type=media_type)


async def _named(service: Service, name: str, version: int | None = None) -> Sequence[AdapterStatus]:
    """Return what is served under a name, perhaps at one version only.

    Raises:
        NotServed: nothing.
    """
    found = [
        status
        for status in await service.backend.adapters()
        if (status.name or status.reference.partition("@")[0].partition(":")[0]) == name
        and (version is None or status.version == version)
    ]
    if not found:
        wanted = shown(name) if version is None else f"{shown(name)} at version {version}"
        raise NotServed(f"no adapter {wanted} is served here", "GET /v1/adapters lists those that are")
    return found


def _readiness(name: str, served: Sequence[AdapterStatus]) -> Response:
    good = any(one.state == "ready" for one in served)
    problem = None if good else next((one.problem for one in served if one.problem), "it is not loaded yet")
    answer = ModelReadyAnswer(name=name, ready=good, problem=problem and without_places(problem))
    return JSONResponse(answer.model_dump(), status_code=200 if good else 503)
