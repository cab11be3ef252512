"""An edit that is answered later: what it is, how it is shown, and its tables."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from registry.storage.schema import Schema

if TYPE_CHECKING:
    from sqlalchemy import Table

JobState = Literal["queued", "running", "succeeded", "failed", "cancelled"]
OPEN: Final = ("queued", "running")
MAX_ATTEMPTS: Final = 3
"""So often a job is begun; one that took three processes with it is not tried on a fourth."""


def _server_error(code: str, message: str, mend: str) -> dict[str, Any]:
    told = {"message": message, "mend": mend, "type": "server_error", "code": code, "param": None}
    return {"error": told}


DIED: Final = _server_error(
    "job_lost",
    f"the service died {MAX_ATTEMPTS} times while it worked on this job",
    "ask for fewer pictures or fewer steps; the log of the service has the cause",
)
EXPIRED: Final = _server_error(
    "job_expired", "the job waited for too long", "ask again; the service had too much to do"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A job as it is now.

    Attributes:
        id: unguessable.
        caller: name of the key that it belongs to.
        state: see `JobState`.
        request: the request as JSON, without the picture.
        rows: pictures that were asked for.
        step, steps: how far it is; 0 of 0 until the adapter has said how many steps it takes.
        attempts: times that it was begun.
        created, started, ended: seconds since the epoch.
        results: facts of each result.
        error: why it failed, as answers say it.
        webhook: URL that is told when it ends.
        fingerprint: digest of all that was asked.
    """

    id: str
    caller: str
    state: JobState
    request: str
    rows: int
    step: int
    steps: int
    attempts: int
    created: float
    started: float | None
    ended: float | None
    results: Sequence[Mapping[str, Any]]
    error: Mapping[str, Any] | None
    webhook: str | None
    fingerprint: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Delivery:
    """A webhook that is owed.

    Attributes:
        id: the same at each attempt, so that the receiver can tell a repetition.
        caller: whose secret signs it.
        url: where it goes.
        body: what it says, JSON.
        attempts: that were made before.
    """

    id: str
    caller: str
    url: str
    body: str
    attempts: int


def facts(job: Job) -> dict[str, Any]:
    """Return a job as its owner sees it, ready for JSON."""
    return {
        "id": job.id,
        "status": job.state,
        "created": when(job.created),
        "started": when(job.started),
        "ended": when(job.ended),
        "rows": job.rows,
        "step": job.step,
        "steps": job.steps,
        "results": [
            {"image": f"/v1/jobs/{job.id}/results/{row}.png", **result}
            for row, result in enumerate(job.results)
        ],
        "error": None if job.error is None else job.error["error"],
    }


def when(seconds: float | None) -> str | None:
    """Return a time for people and programs, in UTC."""
    return (
        None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
    )


def read_job(row: Any) -> Job:
    """Return the job of a row."""
    names = (name for name in Job.__slots__ if name not in ("results", "error"))
    results = json.loads(row.results) if row.results else []
    error = json.loads(row.error) if row.error else None
    return Job(**{name: getattr(row, name) for name in names}, results=results, error=error)


@functools.cache
def tables() -> tuple[Table, Table, Table]:
    """The tables of jobs, of their pictures, and of webhooks that are owed.

    A change of them is a new revision: a step in ``serving/http/migrations``, and its number in `SCHEMA`.
    """
    from sqlalchemy import (
        Column,
        Double,
        Index,
        Integer,
        LargeBinary,
        MetaData,
        Table,
        Text,
        UniqueConstraint,
    )

    data = MetaData()
    jobs = Table(
        "adapter_foundry_jobs", data,
        Column("id", Text, primary_key=True),
        *(Column(name, Text, nullable=False) for name in ("caller", "state", "request", "fingerprint")),
        *(Column(name, Text) for name in ("idempotency", "owner", "error", "results", "webhook")),
        *(Column(name, Integer, nullable=False) for name in ("rows", "step", "steps", "attempts", "size")),
        *(Column(name, Double, nullable=False) for name in ("not_before", "created")),
        *(Column(name, Double) for name in ("lease", "started", "ended")),
        UniqueConstraint("caller", "idempotency"),
    )  # fmt: skip
    Index("adapter_foundry_jobs_state", jobs.c.state, jobs.c.created)
    Index("adapter_foundry_jobs_caller", jobs.c.caller, jobs.c.created)
    pictures = Table(
        "adapter_foundry_job_pictures", data,
        Column("job", Text, primary_key=True),
        Column("place", Integer, primary_key=True),
        Column("data", LargeBinary, nullable=False),
    )  # fmt: skip
    deliveries = Table(
        "adapter_foundry_webhooks", data,
        Column("id", Text, primary_key=True),
        *(Column(name, Text, nullable=False) for name in ("job", "caller", "url", "body")),
        Column("attempts", Integer, nullable=False),
        Column("next", Double, nullable=False),
        Column("done", Double),
    )  # fmt: skip
    Index("adapter_foundry_webhooks_due", deliveries.c.done, deliveries.c.next)
    return jobs, pictures, deliveries


SCHEMA: Final = Schema(
    what="jobs",
    table="adapter_foundry_jobs",
    version_table="adapter_foundry_jobs_version",
    revisions=("0001", "0002"),
    migrations=Path(__file__).parent / "migrations",
    tables=lambda: tables()[0].metadata,
)
