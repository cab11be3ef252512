"""``/v1/adapters``: what is served now, with facts of signed cards; ``/v1/models`` is OpenAI's list of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Depends, Path
from pydantic import BaseModel, ConfigDict, Field

from serving.backend import State
from serving.errors import UsageError
from serving.http.answers import EDIT_ERRORS, responses, without_places
from serving.http.bodies import REFERENCE
from serving.http.keys import Reader
from serving.http.service import Service, service_of

if TYPE_CHECKING:
    from serving.backend import AdapterStatus

router = APIRouter(tags=["adapters"])

Here = Annotated[Service, Depends(service_of)]
ReferencePath = Annotated[
    str,
    Path(
        min_length=1,
        max_length=300,
        description="For example pixelsmile@prod or pixelsmile:3.",
        json_schema_extra={"pattern": REFERENCE},
    ),
]
_ERRORS = tuple(status for status in EDIT_ERRORS if status not in (413, 415, 499))


class AdapterAnswer(BaseModel):
    """A reference that is served, and what it means now."""

    model_config = ConfigDict(extra="forbid")

    reference: str = Field(examples=["pixelsmile@prod"])
    followed: bool = Field(description="Whether its alias is watched.")
    state: State = Field(description="ready, loading, refused or revoked.")
    name: str | None = Field(examples=["pixelsmile"])
    version: int | None = Field(examples=[3])
    digest: str | None = Field(description="Of the signed manifest.")
    facts: dict[str, Any] | None = Field(
        description="Of the signed card: expressions, licence, scan and so on."
    )
    problem: str | None = Field(description="Why the newest version is not served; null is well.")
    since: float | None = Field(description="When this version began to serve, in seconds since the epoch.")
    checked: float | None = Field(description="When the registry confirmed it last.")


class AdaptersAnswer(BaseModel):
    """Everything that is served."""

    model_config = ConfigDict(extra="forbid")

    adapters: list[AdapterAnswer]
    default: str | None = Field(description="What requests without an adapter mean.")


class ModelAnswer(BaseModel):
    """A reference, as OpenAI's clients know models."""

    id: str = Field(examples=["pixelsmile@prod"])
    object: str = "model"
    created: int
    owned_by: str = "adapter-foundry"


class ModelsAnswer(BaseModel):
    """OpenAI's list of models."""

    object: str = "list"
    data: list[ModelAnswer]


def status_answer(status: AdapterStatus) -> AdapterAnswer:
    """Return a status as it goes over the wire."""
    return AdapterAnswer(
        reference=status.reference,
        followed=status.followed,
        state=status.state,
        name=status.name,
        version=status.version,
        digest=None if status.digest is None else str(status.digest),
        facts=None if status.facts is None else dict(status.facts),
        problem=None if status.problem is None else without_places(status.problem),
        since=status.since,
        checked=status.checked,
    )


def default_reference(service: Service) -> str:
    """Return what a request without an adapter means.

    Raises:
        UsageError: the service has no default.
    """
    if not service.settings.adapters:
        raise UsageError("this service has no default adapter", "name one, for example pixelsmile@prod")
    return service.settings.adapters[0]


@router.get("/v1/adapters", summary="What is served", responses=responses(401, 403, 422, 429, 500, 503))
async def adapters(caller: Reader, service: Here) -> AdaptersAnswer:
    """List the references that are served, and which version each means now."""
    answers = [status_answer(status) for status in await service.backend.adapters()]
    return AdaptersAnswer(adapters=answers, default=next(iter(service.settings.adapters), None))


@router.get("/v1/adapters/{reference}", summary="What a reference means", responses=responses(*_ERRORS))
async def adapter(reference: ReferencePath, caller: Reader, service: Here) -> AdapterAnswer:
    """Say what a reference means now: an alias, a version or a digest."""
    return status_answer(await service.backend.adapter(reference))


@router.get("/v1/models", summary="OpenAI's list", responses=responses(401, 403, 422, 429, 500, 503))
async def models(caller: Reader, service: Here) -> ModelsAnswer:
    """List what is ready to serve, in OpenAI's words."""
    ready = [status for status in await service.backend.adapters() if status.state == "ready"]
    return ModelsAnswer(data=[ModelAnswer(id=one.reference, created=int(one.since or 0)) for one in ready])


@router.get("/v1/models/{reference}", summary="OpenAI's model", responses=responses(*_ERRORS))
async def model(reference: ReferencePath, caller: Reader, service: Here) -> ModelAnswer:
    """Say that a reference is served, in OpenAI's words."""
    status = await service.backend.adapter(reference)
    return ModelAnswer(id=status.reference, created=int(status.since or 0))
