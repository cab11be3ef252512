"""Where jobs are kept: one database with their requests, their pictures and the webhooks that they owe.

A job that was accepted is in the database before the client hears of it. A process that works on a job holds
a lease, and renews it. When the process dies the lease runs out, and another takes the job up again. An edit
is deterministic and its results are written in one transaction, by the holder of the lease alone: so a job
that ran twice has one result. Clocks of machines that share a database have to agree within a few seconds.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import secrets
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from registry.errors import NetworkError, shown
from registry.storage import database
from serving.http.job import (
    DIED,
    EXPIRED,
    MAX_ATTEMPTS,
    OPEN,
    SCHEMA,
    Delivery,
    Job,
    JobState,
    facts,
    read_job,
    tables,
    when,
)

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine

LEASE_SECONDS: Final = 15.0
_PATIENCE: Final = 30.0
_LOCK: Final = 0x61666A6F  # any number will do, as long as all processes take the same
_REQUEST: Final = -1
"""The place of the picture that is edited; results lie at 0, 1, …"""


class JobTable:
    """The database; every method is one transaction and blocks.

    Args:
        uri: ``sqlite:////absolute/file.db`` or ``postgresql+psycopg://…``.
        clock: seconds since the epoch.

    Raises:
        registry.errors.UsageError: the URI is neither.
    """

    def __init__(self, uri: str, clock: Callable[[], float] = time.time) -> None:
        self._uri = database.check_uri(uri)
        self._clock = clock
        self._made = False
        self._making = threading.Lock()

    def insert(self, job: Job, picture: bytes, *, key: str | None, room: Callable[[int, int], None]) -> Job:
        """Keep a new job, or return the one that the caller has under that idempotency key.

        Args:
            job: to be kept.
            picture: that is edited.
            key: of idempotency.
            room: is told open jobs and kept bytes of the caller, and raises where they are too many.
        """
        from sqlalchemy import func, insert, select

        jobs, pictures, _ = tables()
        with self._writing(job.caller) as connection:
            mine = jobs.c.caller == job.caller
            if key is not None:
                found = connection.execute(select(jobs).where(mine, jobs.c.idempotency == key)).first()
                if found is not None:
                    return read_job(found)
            count = select(func.count()).where(mine, jobs.c.state.in_(OPEN)).select_from(jobs)
            size = select(func.coalesce(func.sum(jobs.c.size), 0)).where(mine)
            room(int(connection.execute(count).scalar_one()), int(connection.execute(size).scalar_one()))
            connection.execute(
                insert(jobs).values(
                    id=job.id, caller=job.caller, state=job.state, idempotency=key, size=len(picture),
                    fingerprint=job.fingerprint, request=job.request, rows=job.rows, step=0, steps=job.steps,
                    attempts=0, not_before=job.created, created=job.created, webhook=job.webhook,
                )
            )  # fmt: skip
            connection.execute(insert(pictures).values(job=job.id, place=_REQUEST, data=picture))
        return job

    def get(self, id: str) -> Job | None:
        """Return a job."""
        from sqlalchemy import select

        jobs, _, _ = tables()
        with self._reading() as connection:
            found = connection.execute(select(jobs).where(jobs.c.id == id)).first()
        return None if found is None else read_job(found)

    def list(self, caller: str | None, limit: int) -> list[Job]:
        """Return the newest jobs, of one caller or of all."""
        from sqlalchemy import select

        jobs, _, _ = tables()
        query = select(jobs).order_by(jobs.c.created.desc(), jobs.c.id).limit(limit)
        if caller is not None:
            query = query.where(jobs.c.caller == caller)
        with self._reading() as connection:
            return [read_job(row) for row in connection.execute(query)]

    def picture(self, id: str, row: int) -> bytes | None:
        """Return a result."""
        return self._picture(id, row) if row >= 0 else None

    def source(self, id: str) -> bytes | None:
        """Return the picture that is edited; None once the job has ended."""
        return self._picture(id, _REQUEST)

    def claim(self, owner: str, *, but: Collection[str] = ()) -> Job | None:
        """Take the next job that waits, or whose holder is gone; of the caller who has least running.

        Args:
            owner: who works on it from now on.
            but: IDs of jobs not to take.
        """
        from sqlalchemy import and_, func, or_, select, update

        jobs, _, _ = tables()
        now = self._clock()
        others = jobs.alias()
        busy = (
            select(func.count())
            .select_from(others)
            .where(others.c.caller == jobs.c.caller, others.c.state == "running", others.c.lease >= now)
            .scalar_subquery()
        )
        waits = and_(jobs.c.state == "queued", jobs.c.not_before <= now)
        lost = and_(jobs.c.state == "running", jobs.c.lease < now)
        query = (
            select(jobs)
            .where(or_(waits, lost), jobs.c.id.not_in(but))
            .order_by(busy, jobs.c.created, jobs.c.id)
            .limit(1)
        )
        with self._reading() as connection:  # whoever only looks takes no lock
            if connection.execute(query).first() is None:
                return None
        query = query.with_for_update(skip_locked=True, of=jobs)
        with self._writing() as connection:
            while (row := connection.execute(query).first()) is not None and row.attempts >= MAX_ATTEMPTS:
                self._end(connection, read_job(row), "failed", error=DIED)
            if row is None:
                return None
            begun = {
                "state": "running", "owner": owner, "lease": now + LEASE_SECONDS, "step": 0,
                "attempts": row.attempts + 1, "started": row.started or now,
            }  # fmt: skip
            connection.execute(update(jobs).where(jobs.c.id == row.id).values(begun))
            return read_job(connection.execute(select(jobs).where(jobs.c.id == row.id)).one())

    def renew(self, id: str, owner: str, step: int, steps: int) -> bool:
        """Hold a job for longer; False when it was cancelled, or belongs to somebody else by now."""
        values = {"lease": self._clock() + LEASE_SECONDS, "step": step, "steps": steps}
        with self._writing() as connection:
            return self._held(connection, id, owner, values)

    def give_back(self, id: str, owner: str, seconds: float, *, counts: bool) -> None:
        """Let a job wait again.

        Args:
            id: of the job.
            owner: who holds it.
            seconds: for which nobody takes it.
            counts: whether this was an attempt; it is none when the service was full or stops.
        """
        jobs, _, _ = tables()
        values: dict[str, Any] = {
            "state": "queued", "owner": None, "lease": None, "not_before": self._clock() + seconds,
            "attempts": jobs.c.attempts - (0 if counts else 1),
        }  # fmt: skip
        with self._writing() as connection:
            self._held(connection, id, owner, values)

    def succeed(
        self, id: str, owner: str, pictures: Sequence[bytes], facts: Sequence[Mapping[str, Any]]
    ) -> bool:
        """Keep the results; False when the job is no longer the owner's, and then nothing is written."""
        from sqlalchemy import insert

        _, kept, _ = tables()
        with self._writing() as connection:
            steps = int(facts[0]["steps"])
            size = sum(map(len, pictures))
            values = {"results": json.dumps(list(facts)), "size": size, "step": steps, "steps": steps}
            if not self._held(connection, id, owner, values):
                return False
            for place, data in enumerate(pictures):
                connection.execute(insert(kept).values(job=id, place=place, data=data))
            self._end(connection, self._row(connection, id), "succeeded")
        return True

    def fail(self, id: str, owner: str, error: Mapping[str, Any]) -> bool:
        """End a job with an error; False when it is no longer the owner's."""
        with self._writing() as connection:
            if not self._held(connection, id, owner, {"lease": None}):
                return False
            self._end(connection, self._row(connection, id), "failed", error=error)
        return True

    def cancel(self, id: str) -> Job | None:
        """End a job that has not ended; its holder notices when it renews the lease."""
        from sqlalchemy import select

        jobs, _, _ = tables()
        with self._writing() as connection:
            found = connection.execute(select(jobs).where(jobs.c.id == id).with_for_update()).first()
            if found is None:
                return None
            if found.state in OPEN:
                self._end(connection, read_job(found), "cancelled")
            return self._row(connection, id)

    def remove_old(self, seconds: float) -> None:
        """Forget what ended so long ago, and fail what waited so long."""
        from sqlalchemy import delete, select

        jobs, pictures, deliveries = tables()
        with self._writing() as connection:
            before = self._clock() - seconds
            stale = select(jobs).where(jobs.c.state == "queued", jobs.c.created < before).limit(1000)
            # Whom another process claims, cancels or fails just now is its matter.
            stale = stale.with_for_update(skip_locked=True)
            for row in connection.execute(stale).all():
                self._end(connection, read_job(row), "failed", error=EXPIRED)
            old = select(jobs.c.id).where(jobs.c.ended < before).limit(1000)
            ids = list(connection.execute(old).scalars())
            connection.execute(delete(pictures).where(pictures.c.job.in_(ids)))
            connection.execute(delete(jobs).where(jobs.c.id.in_(ids)))
            connection.execute(delete(deliveries).where(deliveries.c.done < before))

    def counts(self) -> dict[str, int]:
        """Return how many jobs are in each state."""
        from sqlalchemy import func, select

        jobs, _, _ = tables()
        with self._reading() as connection:
            rows = connection.execute(select(jobs.c.state, func.count()).group_by(jobs.c.state))
            return {str(row[0]): int(row[1]) for row in rows}

    # -- webhooks --

    def due(self, seconds: float, *, but: Collection[str] = ()) -> Delivery | None:
        """Take a webhook that is due; nobody else takes it for so long.

        Args:
            seconds: for which it is taken.
            but: callers whose webhooks have to wait.
        """
        from sqlalchemy import select, update

        _, _, owed = tables()
        now = self._clock()
        waits = (owed.c.done.is_(None), owed.c.next <= now, owed.c.caller.not_in(but))
        query = select(owed).where(*waits).order_by(owed.c.next).limit(1)
        with self._reading() as connection:
            if connection.execute(query).first() is None:
                return None
        with self._writing() as connection:
            row = connection.execute(query.with_for_update(skip_locked=True)).first()
            if row is None:
                return None
            connection.execute(update(owed).where(owed.c.id == row.id).values(next=now + seconds))
            return Delivery(id=row.id, caller=row.caller, url=row.url, body=row.body, attempts=row.attempts)

    def told(self, id: str, again: float | None) -> None:
        """Note an attempt to deliver a webhook.

        Args:
            id: of the delivery.
            again: seconds until the next attempt; None was the last one.
        """
        from sqlalchemy import update

        _, _, owed = tables()
        now = self._clock()
        values: dict[str, Any] = {"attempts": owed.c.attempts + 1}
        values |= {"done": now} if again is None else {"next": now + again}
        with self._writing() as connection:
            connection.execute(update(owed).where(owed.c.id == id).values(values))

    # -- parts --

    def _end(
        self, connection: Connection, job: Job, state: JobState, error: Mapping[str, Any] | None = None
    ) -> None:
        """Write the last state of a job, owe its webhook, and forget the picture of a person."""
        from sqlalchemy import delete, insert, update

        jobs, pictures, deliveries = tables()
        now = self._clock()
        values = {
            "state": state, "ended": now, "owner": None, "lease": None,
            "error": None if error is None else json.dumps(error),
            **({} if state == "succeeded" else {"size": 0}),  # nothing of it is kept
        }  # fmt: skip
        connection.execute(update(jobs).where(jobs.c.id == job.id).values(values))
        gone = (pictures.c.job == job.id) & (pictures.c.place == _REQUEST)
        connection.execute(delete(pictures).where(gone))
        if job.webhook is not None:
            ended = self._row(connection, job.id)
            body = json.dumps({"type": f"job.{state}", "timestamp": when(now), "data": facts(ended)})
            connection.execute(
                insert(deliveries).values(
                    id=f"msg_{secrets.token_urlsafe(16)}", job=job.id, caller=job.caller, url=job.webhook,
                    body=body, attempts=0, next=now,
                )
            )  # fmt: skip

    def _held(self, connection: Connection, id: str, owner: str, values: Mapping[str, Any]) -> bool:
        """Write to a job that the owner still holds."""
        from sqlalchemy import update

        jobs, _, _ = tables()
        mine = (jobs.c.id == id) & (jobs.c.owner == owner) & (jobs.c.state == "running")
        return bool(connection.execute(update(jobs).where(mine).values(dict(values))).rowcount)

    def _row(self, connection: Connection, id: str) -> Job:
        from sqlalchemy import select

        jobs, _, _ = tables()
        return read_job(connection.execute(select(jobs).where(jobs.c.id == id)).one())

    def _picture(self, id: str, place: int) -> bytes | None:
        from sqlalchemy import select

        _, pictures, _ = tables()
        query = select(pictures.c.data).where(pictures.c.job == id, pictures.c.place == place)
        with self._reading() as connection:
            found = connection.execute(query).scalar()
        return None if found is None else bytes(found)

    @functools.cached_property
    def _engine(self) -> Engine:
        return database.open_engine(self._uri)

    @contextlib.contextmanager
    def _writing(self, about: str | None = None) -> Iterator[Connection]:
        """A transaction; no other is about the same caller. SQLite has one writer anyway."""
        from sqlalchemy import func, select

        self._make()
        with (
            database.explained(self._uri),
            self._engine.connect().execution_options(serial=True) as connection,
            connection.begin(),
        ):
            if about is not None and database.sqlite_file(self._uri) is None:
                number = int.from_bytes(hashlib.sha256(about.encode()).digest()[:8], "big", signed=True)
                connection.execute(select(func.pg_advisory_xact_lock(number)))
            yield connection

    @contextlib.contextmanager
    def _reading(self) -> Iterator[Connection]:
        self._make()
        with database.explained(self._uri), self._engine.connect() as connection, connection.begin():
            yield connection

    def _make(self) -> None:
        """Make or migrate the tables, once a process."""
        if self._made:
            return
        with self._making:
            if not self._made:
                self._make_tables()
            self._made = True

    def _make_tables(self) -> None:
        from sqlalchemy import func, select

        file = database.sqlite_file(self._uri)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            file.touch(mode=0o600)
            _write_ahead(file)
        with (
            database.explained(self._uri),
            self._engine.connect().execution_options(serial=True) as connection,
            connection.begin(),
        ):
            if file is None:
                connection.execute(select(func.pg_advisory_xact_lock(_LOCK)))
            SCHEMA.bring_up(connection)


def _write_ahead(file: Path) -> None:
    """Let readers not wait for the writer; the file remembers it.

    SQLite does not wait here for another process that does the same at this moment.

    Raises:
        NetworkError: the file is in use for too long, or no database.
    """
    import sqlite3

    end = time.monotonic() + _PATIENCE
    while True:
        try:
            with contextlib.closing(sqlite3.connect(file)) as connection:
                connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.Error as error:
            if "locked" not in str(error) or time.monotonic() > end:
                raise NetworkError(
                    f"the database of the jobs failed: {shown(error)}", f"look at {file}, and try again"
                ) from error
            time.sleep(0.02)
