"""Edits that are answered later: taken into a database, asked for by their address, cancelled, forgotten.

A job belongs to the key that asked for it. To another key there is no such job. Callers without a key
are one: whoever knows the id of such a job may see and cancel it, so it is 144 random bits, listed to nobody.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

from fastapi import APIRouter, Depends, Query
from fastapi import Path as InPath
from fastapi.responses import Response
from pydantic import BaseModel, Field

from serving.errors import UsageError
from serving.http.answers import (
    BadRequest,
    ErrorFacts,
    Forbidden,
    HttpError,
    Invalid,
    NoSuchThing,
    RateLimited,
    responses,
)
from serving.http.job import Job, JobState, facts
from serving.http.job_runner import JobRunner
from serving.http.job_table import JobTable
from serving.http.keyring import Keys
from serving.http.keys import Caller, Editor, Reader
from serving.http.service import Service, service_of
from serving.http.webhooks import Sender, Webhook

if TYPE_CHECKING:
    from serving.schema import SweepRequest
    from serving.settings import ServingSettings

__all__ = ["Job", "JobRunner", "JobStore", "Webhook", "router"]

MAX_OPEN: Final = 100
"""Jobs of one key that have not ended."""
MAX_KEPT_BYTES: Final = 4 << 30
"""Of pictures that are kept for one key."""
_IDEMPOTENCY: Final = re.compile(r"[!-~]{1,255}")


class AlreadyUsed(HttpError):
    """The idempotency key belongs to another request."""

    status = 409


class NotFinished(HttpError):
    """The job has no pictures yet, or will have none."""

    status = 409


class JobStore:
    """The jobs of a service.

    Args:
        table: where they are kept.
        sender: of webhooks.
        keep_seconds: for which a job that ended is kept.
        clock: seconds since the epoch.

    Attributes:
        news: set when there may be something to do.
        on_cancel: is told which job was cancelled; a runner of this process sets it.
    """

    def __init__(
        self,
        table: JobTable,
        sender: Sender,
        *,
        keep_seconds: float = 86400.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.table, self.sender = table, sender
        self._keep_seconds, self._clock = keep_seconds, clock
        self.news = asyncio.Event()
        self.on_cancel: Callable[[str], None] = lambda id: None

    @classmethod
    def open(cls, settings: ServingSettings, home: Path, keys: Keys | None = None) -> JobStore:
        """Return the store that the settings name; None there is a file in the data folder.

        Raises:
            registry.errors.UsageError: the URI is not one of a database.
        """
        uri = settings.jobs or f"sqlite:///{home.absolute() / 'serving' / 'jobs.db'}"
        sender = Sender(keys or Keys.open(home), loopback=settings.webhook_loopback)
        return cls(JobTable(uri), sender, keep_seconds=settings.job_hours * 3600)

    async def accept(
        self,
        request: SweepRequest,
        *,
        caller: Caller,
        previews: int = 0,
        idempotency_key: str | None = None,
        webhook: Webhook | None = None,
    ) -> Job:
        """Keep a request; once this returns it is not lost any more.

        Args:
            request: with the bytes of the picture.
            caller: whose job it becomes.
            previews: jobs have none; part of what is asked all the same.
            idempotency_key: the same key and request again return the caller's job that there is.
            webhook: is told when it ends.

        Raises:
            AlreadyUsed: the key came with another request before.
            RateLimited: the caller has too many open jobs, or keeps too much.
            Invalid: the key or the webhook is not valid.
            BadRequest: a caller whom nobody knows sends a key.
        """
        picture = request.image
        if not isinstance(picture, bytes):
            raise UsageError("a job needs the bytes of the picture", "give the file")
        if idempotency_key is not None and caller.anonymous:
            # All strangers are one caller: who guesses another's would get, and could cancel, that one's job
            raise BadRequest(
                "an Idempotency-Key needs an API key: without one nobody knows whose it is",
                "leave the header out, or send Authorization: Bearer afk_…",
            )
        if idempotency_key is not None and not _IDEMPOTENCY.fullmatch(idempotency_key):
            raise Invalid(
                "the Idempotency-Key is not valid", "send 1 to 255 printable ASCII characters without spaces"
            )
        if webhook is not None:
            self.sender.check(webhook, caller.name)
        url = None if webhook is None else webhook.url
        asked = json.loads(request.model_dump_json(exclude={"image"}))
        job = Job(
            id=f"job_{secrets.token_urlsafe(18)}",
            caller=caller.name,
            state="queued",
            request=json.dumps({**asked, "image": ""}),
            rows=len(request.rows),
            step=0,
            steps=request.steps or 0,
            attempts=0,
            created=self._clock(),
            started=None,
            ended=None,
            results=(),
            error=None,
            webhook=url,
            fingerprint=_fingerprint(asked, picture, previews, url),
        )
        kept = await asyncio.to_thread(self.table.insert, job, picture, key=idempotency_key, room=_room)
        if kept.fingerprint != job.fingerprint:
            raise AlreadyUsed(
                "this Idempotency-Key was used for another request", "use a new key for each request"
            )
        self.news.set()
        return kept

    def request(self, job: Job) -> SweepRequest:
        """Return what a job asks for, with its picture.

        Raises:
            NoSuchThing: the job has ended, and the picture is gone.
        """
        from serving.schema import SweepRequest

        picture = self.table.source(job.id)
        if picture is None:
            raise NoSuchThing("the job has ended", "")
        return SweepRequest.model_validate_json(job.request).model_copy(update={"image": picture})

    async def get(self, id: str, caller: Caller) -> Job:
        """Return a job of a caller.

        Raises:
            NoSuchThing: there is none, or it belongs to another key.
        """
        job = await asyncio.to_thread(self.table.get, id)
        if job is None or not (job.caller == caller.name or caller.may("admin")):
            raise NoSuchThing("there is no such job", "jobs that ended are kept for some time only")
        return job

    async def cancel(self, id: str, caller: Caller) -> Job:
        """End a job; one that has ended stays as it is.

        Raises:
            NoSuchThing: see `get`.
        """
        await self.get(id, caller)
        job = await asyncio.to_thread(self.table.cancel, id)
        if job is None:
            raise NoSuchThing("there is no such job", "jobs that ended are kept for some time only")
        self.on_cancel(id)
        return job

    def remove_old(self) -> None:
        """Forget what has been kept for long enough."""
        self.table.remove_old(self._keep_seconds)


def _room(jobs: int, size: int) -> None:
    if jobs >= MAX_OPEN:
        raise RateLimited(f"this key has {jobs} jobs that have not ended", "wait for one of them", 5.0)
    if size >= MAX_KEPT_BYTES:
        raise RateLimited(
            "this key keeps too many pictures", "wait until the oldest jobs are forgotten", 600.0
        )


def _fingerprint(asked: Mapping[str, Any], picture: bytes, previews: int, url: str | None) -> str:
    whole = {**asked, "image": hashlib.sha256(picture).hexdigest(), "previews": previews, "webhook": url}
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


class JobAnswer(BaseModel):
    """A job as it is now."""

    id: str
    status: JobState
    created: str | None = Field(description="Times are in UTC, ISO 8601.")
    started: str | None
    ended: str | None
    rows: int = Field(description="Pictures that were asked for.")
    step: int = Field(description="Denoising steps that are done.")
    steps: int = Field(description="Of how many; 0 while the adapter has not said.")
    results: Sequence[dict[str, Any]] = Field(description="Where each picture is, and what made it.")
    error: ErrorFacts | None


class JobsAnswer(BaseModel):
    """The newest jobs of a key."""

    jobs: Sequence[JobAnswer]


router = APIRouter(prefix="/v1/jobs", tags=["jobs"])
Service_ = Annotated[Service, Depends(service_of)]
Id = Annotated[str, InPath(max_length=64, description="Of the job.")]


@router.get("", summary="List jobs", responses=responses(401, 403, 404, 422, 429, 503))
async def list_jobs(
    caller: Reader, service: Service_, limit: Annotated[int, Query(ge=1, le=100)] = 20
) -> JobsAnswer:
    """Return the newest jobs of the key."""
    if caller.anonymous:
        raise Forbidden("nobody's jobs are listed", "use an API key, or ask for a job by its id")
    jobs = await asyncio.to_thread(
        service.jobs.table.list, None if caller.may("admin") else caller.name, limit
    )
    return JobsAnswer(jobs=[JobAnswer(**facts(job)) for job in jobs])


@router.get("/{id}", summary="See a job", responses=responses(401, 403, 404, 422, 429, 503))
async def get_job(id: Id, caller: Reader, service: Service_) -> JobAnswer:
    """Return how far a job is, and its results once it has succeeded."""
    return JobAnswer(**facts(await service.jobs.get(id, caller)))


@router.delete("/{id}", summary="Cancel a job", responses=responses(401, 403, 404, 422, 429, 503))
async def cancel_job(id: Id, caller: Editor, service: Service_) -> JobAnswer:
    """End a job; the device stops within a step. One that has ended stays as it is."""
    return JobAnswer(**facts(await service.jobs.cancel(id, caller)))


@router.get(
    "/{id}/results/{row}.png",
    summary="Fetch a picture of a job",
    response_class=Response,
    responses={200: {"content": {"image/png": {}}}, **responses(401, 403, 404, 409, 422, 429, 503)},
)
async def get_result(
    id: Id, row: Annotated[int, InPath(ge=0, lt=1000)], caller: Reader, service: Service_
) -> Response:
    """Return one picture of a job that has succeeded."""
    from serving.http.events import adapter_headers

    job = await service.jobs.get(id, caller)
    if job.state != "succeeded":
        raise NotFinished(f"the job is {job.state}", "ask for it again when it has succeeded")
    picture = await asyncio.to_thread(service.jobs.table.picture, id, row)
    if picture is None:
        raise NoSuchThing(f"the job has {job.rows} pictures", "rows are counted from 0")
    made = job.results[row]
    name, _, version = str(made.get("adapter") or "").partition(":")
    headers = adapter_headers(name, version, str(made.get("adapter_digest") or ""))
    return Response(
        picture, media_type="image/png", headers={**headers, "Cache-Control": "private, no-store"}
    )
