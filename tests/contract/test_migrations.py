"""Databases of older and newer code: recognised, migrated once whoever opens them, or left alone.

The SQL in tests/golden/databases was written by the code from before there were revisions.
"""

from __future__ import annotations

import multiprocessing
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from registry.errors import UsageError
from registry.storage import database
from registry.storage.ledger import SCHEMA as LEDGER
from registry.storage.ledger import Ledger
from registry.storage.schema import Schema
from serving.http.job import SCHEMA as JOBS
from serving.http.job_table import JobTable

GOLDEN = Path(__file__).parent.parent / "golden" / "databases"
SCHEMAS = {"ledger": LEDGER, "jobs": JOBS}
NOW = 1_760_000_100.0


@pytest.fixture(params=["sqlite", "postgresql"])
def empty(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'database.db'}"
    found: str = request.getfixturevalue("postgres").database()
    return found


def load(uri: str, name: str) -> str:
    """Fill a database with a golden file."""
    file = database.sqlite_file(uri)
    kind = "postgresql" if file is None else "sqlite"
    sql = (GOLDEN / f"{name}.{kind}.sql").read_text()
    if file is not None:
        with sqlite3.connect(file) as connection:
            connection.executescript(sql)
        return uri
    with database.open_engine(uri).begin() as connection:
        connection.exec_driver_sql(sql)
    return uri


def revision(uri: str, schema: Schema) -> str | None:
    with database.open_engine(uri).connect() as connection:
        from sqlalchemy import inspect, text

        if not inspect(connection).has_table(schema.version_table):
            return None
        return str(connection.execute(text(f"SELECT version_num FROM {schema.version_table}")).scalar_one())


def set_revision(uri: str, schema: Schema, number: str) -> None:
    with database.open_engine(uri).begin() as connection:
        connection.exec_driver_sql(f"UPDATE {schema.version_table} SET version_num = '{number}'")


def differences(uri: str, schema: Schema) -> list[Any]:
    """What Alembic would have to do to make a database what the code says."""
    from alembic.autogenerate import compare_metadata
    from alembic.runtime.migration import MigrationContext

    def ours(thing: Any, name: str, kind: str, *_: Any) -> bool:
        return kind != "table" or name in schema.tables().tables

    with database.open_engine(uri).connect() as connection:
        context = MigrationContext.configure(connection, opts={"include_object": ours})
        return list(compare_metadata(context, schema.tables()))


def test_a_ledger_from_before_the_revisions(empty: str) -> None:
    ledger = Ledger(load(empty, "ledger-1"))
    before = ledger.head()
    assert before.length == 3
    assert revision(empty, LEDGER) is None  # reading changes nothing
    ledger.append("push", "pixelsmile:2", {}, "kim")
    assert revision(empty, LEDGER) == LEDGER.revisions[-1]
    assert Ledger(empty).verify(before).head.length == 4
    assert [entry.action for entry in Ledger(empty).entries()] == ["init", "push", "promote", "push"]
    assert differences(empty, LEDGER) == []


def test_jobs_from_before_the_revisions(empty: str) -> None:
    table = JobTable(load(empty, "jobs-1"), clock=lambda: NOW)
    assert table.counts() == {"queued": 2, "succeeded": 1}
    assert revision(empty, JOBS) == JOBS.revisions[-1] == "0002"
    assert table.picture("job-one", 0) == b"a result"
    assert table.source("job-two") == b"a picture"
    claimed = table.claim("worker")
    assert claimed is not None
    assert claimed.id == "job-two"
    owed = table.due(60.0)
    assert owed is not None
    assert owed.url == "https://example.org/hook"
    assert differences(empty, JOBS) == []


@pytest.mark.parametrize("name", SCHEMAS)
def test_new_databases_are_what_migrated_ones_are(empty: str, name: str) -> None:
    schema = SCHEMAS[name]
    with database.open_engine(empty).begin() as connection:
        assert schema.bring_up(connection) == "absent"
    assert revision(empty, schema) == schema.revisions[-1]
    assert differences(empty, schema) == []
    with database.open_engine(empty).begin() as connection:
        assert schema.bring_up(connection) == "current"


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_steps_lead_from_the_first_to_the_last_revision(name: str) -> None:
    from alembic.script import ScriptDirectory

    schema = SCHEMAS[name]
    script = ScriptDirectory(str(schema.migrations.parent), version_locations=[str(schema.migrations)])
    steps = [step.revision for step in script.walk_revisions()]
    assert steps == list(reversed(schema.revisions))


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_database_of_newer_code_is_left_alone(empty: str, name: str) -> None:
    schema = SCHEMAS[name]
    load(empty, f"{name}-1")
    opened: list[Any] = []

    def open_all() -> Iterator[Any]:
        if name == "ledger":
            yield lambda: Ledger(empty).append("push", "x:1", {}, "kim")
            yield lambda: Ledger(empty).head()
            yield lambda: list(Ledger(empty).entries())
        else:
            yield lambda: JobTable(empty).counts()
            yield lambda: JobTable(empty).claim("worker")

    next(open_all())()
    set_revision(empty, schema, "0099")
    before = everything(empty)
    for use in open_all():
        with pytest.raises(UsageError, match="newer version of adapter-foundry") as refused:
            use()
        assert "upgrade adapter-foundry" in refused.value.mend
        opened.append(use)
    assert len(opened) >= 2
    assert everything(empty) == before


def everything(uri: str) -> dict[str, list[tuple[Any, ...]]]:
    from sqlalchemy import MetaData, select

    found = MetaData()
    with database.open_engine(uri).connect() as connection:
        found.reflect(connection)
        return {
            name: sorted((tuple(row) for row in connection.execute(select(table))), key=repr)
            for name, table in found.tables.items()
        }


def _open(uri: str, start: Any, answers: Any) -> None:
    """What a replica does; runs in a process of its own."""
    start.wait()
    try:
        JobTable(uri, clock=lambda: NOW).counts()
        Ledger(uri).append("push", "pixelsmile:2", {}, "kim")
        answers.put("alembic.command" in sys.modules)
    except BaseException as error:
        answers.put(repr(error))


def test_of_many_who_open_at_once_one_migrates(empty: str) -> None:
    load(empty, "jobs-1")
    load(empty, "ledger-1")
    context = multiprocessing.get_context("spawn")
    start, answers = context.Event(), context.Queue()
    replicas = [context.Process(target=_open, args=(empty, start, answers)) for _ in range(4)]
    for replica in replicas:
        replica.start()
    start.set()
    told = [answers.get(timeout=300) for _ in replicas]
    for replica in replicas:
        replica.join(300)
    assert sorted(told) == [False, False, False, True], told
    assert revision(empty, JOBS) == "0002"
    assert Ledger(empty).verify(None).head.length == 3 + len(replicas)


def test_a_migration_that_fails_changes_nothing(empty: str) -> None:
    """An index of that name is in the way: the database stays of its old form, whole."""
    load(empty, "jobs-1")
    with database.open_engine(empty).begin() as connection:
        connection.exec_driver_sql(
            "CREATE INDEX adapter_foundry_webhooks_due ON adapter_foundry_webhooks (url)"
        )
    before = everything(empty)
    with pytest.raises(Exception, match="adapter_foundry_webhooks_due"):
        JobTable(empty).counts()
    assert everything(empty) == before
    assert revision(empty, JOBS) is None
    with database.open_engine(empty).begin() as connection:
        connection.exec_driver_sql("DROP INDEX adapter_foundry_webhooks_due")
    assert JobTable(empty).counts() == {"queued": 2, "succeeded": 1}


def test_nothing_imports_alembic_while_there_is_nothing_to_migrate(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'new.db'}"
    program = (
        "import sys\nfrom registry.storage.ledger import Ledger\n"
        f"ledger = Ledger({uri!r}); ledger.append('push', 'x:1', {{}}, 'kim'); ledger.head()\n"
        "assert 'sqlalchemy' in sys.modules and 'alembic' not in sys.modules"
    )
    for _ in range(2):
        subprocess.run([sys.executable, "-c", program], check=True)
