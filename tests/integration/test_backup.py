"""Bucket, databases and data folder are destroyed; a backup brings all of it back on new servers.

S3, PostgreSQL and an MLflow server with accounts are real, every step is a command in its own process, and
who looks at the end is a consumer that has nothing but the root it pinned.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fakes.registries import NAME, PASSING, adapter_folder
from registry.errors import RegistryError, UsageError
from registry.manifest import WEIGHTS_NAME
from registry.storage import dumps
from registry.storage.dumps import Database
from servers import mlflow, postgres
from servers.mlflow import MlflowServer
from servers.postgres import Postgres
from servers.weed import Weed

pytestmark = [pytest.mark.integration, pytest.mark.slow]

PROD = f"{NAME}@prod"
PHRASE = "a passphrase that no backup holds"


@dataclass(frozen=True)
class Machine:
    """A data folder and the environment of who works there."""

    home: Path
    environment: Mapping[str, str]

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "registry.cli", *words],
            env=os.environ | {"ADAPTER_FOUNDRY_HOME": str(self.home)} | dict(self.environment),
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    def registry(self, *words: str, code: int = 0) -> Any:
        """The one JSON object of a command, whose exit code must be this one."""
        result = self.run(*words, "--json")
        assert result.returncode == code, f"{words}: {result.stdout}{result.stderr}"
        return json.loads(result.stdout)


@pytest.fixture
def second_postgres() -> Iterator[Postgres]:
    """The server that is there after the first one is gone."""
    reason = postgres.missing()
    if reason is not None:
        pytest.skip(reason)
    with postgres.running() as found:
        yield found


def plain(uri: str) -> tuple[str, str]:
    """A database URI without its password, and the password."""
    head, _, tail = uri.partition("://")
    user, _, rest = tail.partition(":")
    password, _, place = rest.partition("@")
    return f"{head}://{user}@{place}", password


def secrets_of(weed: Weed, server: MlflowServer, password: str) -> dict[str, str]:
    found = weed.environment() | server.environment() | {"PGPASSWORD": password}
    return {**found, "ADAPTER_FOUNDRY_KEY_PASSPHRASE": PHRASE}


def released(owner: Machine, folder: Path, name: str, seed: int) -> str:
    report = folder.with_suffix(".json")
    report.write_text(json.dumps(PASSING))
    reference = owner.registry(
        "push", str(adapter_folder(folder, seed)), "--name", name, "--evaluation", str(report)
    )["reference"]
    owner.registry("approve", reference, "--by", "Kim", "--reason", "looks right")
    owner.registry("promote", reference, "--to", "prod")
    return reference


def weights_of(pulled: Mapping[str, Any]) -> bytes:
    return (Path(pulled["path"]) / WEIGHTS_NAME).read_bytes()


def empty(weed: Weed, bucket: str) -> None:
    """Delete a bucket with all that is in it."""
    client = weed.client("admin")
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
        for found in page.get("Contents", []):
            client.delete_object(Bucket=bucket, Key=found["Key"])
    client.delete_bucket(Bucket=bucket)


def test_what_was_destroyed_comes_back_on_new_servers(
    tmp_path: Path, weed: Weed, postgres: Postgres, second_postgres: Postgres
) -> None:
    place = f"s3://{weed.bucket()}/backups"
    bucket, ledger, index = weed.bucket(), postgres.database(), postgres.database()
    ledger_uri, password = plain(ledger)
    root = tmp_path / "root.json"
    consumer = Machine(tmp_path / "consumer", weed.environment("reader"))
    consumer.home.mkdir()
    late = Machine(tmp_path / "late", weed.environment("reader"))
    late.home.mkdir()
    with running_mlflow(index) as server:
        owner = Machine(tmp_path / "owner", secrets_of(weed, server, password))
        owner.registry(
            "init",
            "--server",
            "--store",
            f"s3://{bucket}/team",
            "--mlflow",
            server.uri,
            "--ledger",
            ledger_uri,
        )
        root.write_text(owner.run("trust", "export").stdout)
        (late.home / "adapter-foundry.toml").write_text(f'[registry]\nstore = "s3://{bucket}/team"\n')
        late.registry("trust", "pin", str(root))
        released(owner, tmp_path / "one", NAME, 0)
        owner.registry("backup", place, "--database", f"mlflow={index}")
        weights = (tmp_path / "one" / WEIGHTS_NAME).read_bytes()
        released(owner, tmp_path / "two", NAME, 1)
        made = owner.registry("backup", place, "--database", f"mlflow={index}")
        assert made["databases"] == {"ledger": "postgresql", "mlflow": "postgresql"}
        assert made["warnings"] == []
        # What comes after the last backup is what a disaster costs.
        lost = released(owner, tmp_path / "three", f"{NAME}-late", 2)
        late.registry("pull", lost)

    empty(weed, bucket)
    for uri in (ledger, index):
        name = uri.rpartition("/")[2]
        postgres.execute("postgres", f'DROP DATABASE "{name}" WITH (FORCE)')
    shutil.rmtree(owner.home)

    weed.make_bucket(bucket)
    new_ledger, new_index = second_postgres.database(), second_postgres.database()
    new_uri, new_password = plain(new_ledger)
    away = {
        **weed.environment(), "PGPASSWORD": new_password, "ADAPTER_FOUNDRY_KEY_PASSPHRASE": PHRASE,
        "ADAPTER_FOUNDRY_LEDGER": new_uri, "MLFLOW_TRACKING_URI": "http://127.0.0.1:9",
    }  # fmt: skip
    found = Machine(tmp_path / "new", away)
    verified = Machine(tmp_path / "nobody", away).registry("backup", "--verify", place)
    assert verified["sha256"] == made["sha256"]
    restored = found.registry(
        "restore", place, "--sha256", made["sha256"], "--database", f"mlflow={new_index}"
    )
    assert restored["healthy"] is True
    assert restored["time"] == made["time"]
    assert [one["check"] for one in restored["findings"] if one["outcome"] == "warn"] == ["index"]

    with running_mlflow(new_index) as server:
        owner = Machine(tmp_path / "new", {**away, **server.environment()})
        assert owner.registry("reconcile")["differences"] == []
        client = index_client(server)
        assert client.get_model_version_by_alias(NAME, "prod").version == "2"

        (consumer.home / "adapter-foundry.toml").write_text(f'[registry]\nstore = "s3://{bucket}/team"\n')
        consumer.registry("trust", "pin", str(root))
        pulled = consumer.registry("pull", PROD)
        assert weights_of(pulled) == (tmp_path / "two" / WEIGHTS_NAME).read_bytes()
        consumer.registry("verify", PROD)
        first = consumer.registry("pull", f"{NAME}:1", "--output", str(tmp_path / "first"))
        assert weights_of(first) == weights
        assert owner.registry("log", "--verify")["verified"]["not_yet_anchored"] == 0
        actions = [one["action"] for one in owner.registry("log")["entries"]]
        assert actions[-1] == "restore"
        assert actions.count("promote") == 2

        # The recovery point: what was released after the backup is gone, and who has seen it says so.
        consumer.registry("pull", lost, code=11)
        assert late.registry("pull", PROD, code=16)["error"]["kind"] == "StaleTrust"
        owner.registry("trust", "renew", "--ahead")
        assert late.registry("pull", PROD)["digest"] == pulled["digest"]

        assert released(owner, tmp_path / "again", f"{NAME}-late", 2) == lost
        again = late.registry("pull", f"{NAME}-late@prod")
        assert weights_of(again) == (tmp_path / "three" / WEIGHTS_NAME).read_bytes()
        assert client.get_model_version_by_alias(f"{NAME}-late", "prod").version == "1"
        assert owner.registry("doctor", "--deep")["healthy"] is True


def running_mlflow(database: str) -> Any:
    """An MLflow server on a PostgreSQL database."""
    reason = mlflow.missing()
    if reason is not None:
        pytest.skip(reason)
    return mlflow.running(database=database)


def index_client(server: MlflowServer) -> Any:
    from mlflow.tracking import MlflowClient

    os.environ.update(server.environment())
    return MlflowClient(server.uri)


@pytest.fixture(autouse=True)
def _accounts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `index_client` sets is gone after the test."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "")


def test_unencrypted_keys_do_not_leave_the_machine(tmp_path: Path, weed: Weed) -> None:
    owner = Machine(tmp_path / "owner", weed.environment())
    owner.registry("init")
    place = f"s3://{weed.bucket()}/backups"
    assert "not encrypted" in owner.registry("backup", place, code=2)["error"]["message"]
    owner.registry("backup", place, "--without-keys")


@pytest.mark.parametrize("damage", ["keep", "drop"])
def test_databases_are_checked_before_anything_is_written(
    tmp_path: Path, postgres: Postgres, damage: str
) -> None:
    """A database with something in it is nobody's to overwrite, and a server that is away is named."""
    database = postgres.database()
    owner = Machine(tmp_path / "owner", {})
    owner.registry("init")
    name = database.rpartition("/")[2]
    postgres.execute(name, "CREATE TABLE t (a TEXT)", "INSERT INTO t VALUES ('then')")
    place = str(tmp_path / "backups")
    owner.registry("backup", place, "--database", f"prefect={database}")
    postgres.execute(name, "UPDATE t SET a = 'now'", "CREATE TABLE newer (a TEXT)")
    new = Machine(tmp_path / "new", {})
    to = f"prefect={database}"
    if damage == "drop":
        postgres.execute("postgres", f'DROP DATABASE "{name}" WITH (FORCE)')
        told = new.registry("restore", place, "--database", to, code=20)
        assert postgres.password not in json.dumps(told)
        assert not new.home.exists()
        return
    assert "prefect" in new.registry("restore", place, "--database", to, code=2)["error"]["message"]
    assert postgres.query(name, "SELECT a FROM t") == [("now",)]
    new.registry("restore", place, "--database", to, "--overwrite")
    assert postgres.query(name, "SELECT a FROM t") == [("then",)]
    found = postgres.query(name, "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'")
    assert found == [(1,)]


class Filled:
    """A database with a row of then in its dump, and a row of now in it."""

    def __init__(self, server: Postgres, file: Path, *before: str) -> None:
        self.server, self.file = server, file
        self.uri = server.database()
        self.name = self.uri.rpartition("/")[2]
        self.database = Database.of(self.uri)
        server.execute(self.name, *before, "CREATE TABLE t (a TEXT)", "INSERT INTO t VALUES ('then')")
        self.database.dump(file)
        server.execute(self.name, "UPDATE t SET a = 'now'", "CREATE TABLE newer (a TEXT)")

    def load(self) -> None:
        self.database.load(self.file, self.database.major(), replace=True)

    def rows(self) -> list[object]:
        return [row for (row,) in self.server.query(self.name, "SELECT a FROM public.t")]

    def schemas(self) -> set[object]:
        found = self.server.query(
            self.name,
            "SELECT nspname FROM pg_namespace WHERE nspname !~ '^pg_' AND nspname <> 'information_schema'",
        )
        return {name for (name,) in found}


def test_a_dump_that_does_not_go_in_leaves_what_was_there(tmp_path: Path, postgres: Postgres) -> None:
    found = Filled(
        postgres, tmp_path / "dump", "CREATE SCHEMA other", "CREATE TABLE other.t (a TEXT)",
        "CREATE EXTENSION pg_trgm",
    )  # fmt: skip
    postgres.execute(found.name, "CREATE INDEX i ON t USING gin (a gin_trgm_ops)")
    with pytest.raises(RegistryError, match="other"):  # which is there already, and not replaced
        found.load()
    assert found.rows() == ["now"]
    assert found.schemas() == {"public", "other"}
    assert postgres.query(found.name, "SELECT count(*) FROM newer") == [(0,)]
    assert postgres.query(found.name, "SELECT similarity('a', 'a')") == [(1.0,)]

    postgres.execute(found.name, "DROP SCHEMA other CASCADE")
    found.load()
    assert found.rows() == ["then"]
    assert postgres.query(found.name, "SELECT similarity('a', 'a')") == [(1.0,)]
    assert postgres.query(found.name, "SELECT to_regclass('newer')") == [(None,)]


def test_nothing_is_removed_where_nothing_can_be_loaded(
    tmp_path: Path, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Filled(postgres, tmp_path / "dump")
    whole = found.file.read_bytes()
    found.file.write_bytes(b"CREATE TABLE evil (a TEXT);\n")
    with pytest.raises(UsageError, match="cannot read the dump"):
        found.load()
    found.file.write_bytes(whole)
    with monkeypatch.context() as patch:
        patch.setattr(dumps, "_FOLDERS", ())
        patch.setenv("PATH", str(tmp_path))
        with pytest.raises(UsageError, match="no pg_restore is on this machine"):
            found.load()
    # As in PostgreSQL up to 14, where this schema is the superuser's in everybody's database.
    postgres.execute(found.name, "CREATE ROLE somebody LOGIN PASSWORD 'secret'")
    postgres.execute(found.name, f'ALTER DATABASE "{found.name}" OWNER TO somebody')
    postgres.execute(found.name, "ALTER SCHEMA public OWNER TO tester")
    mine = Database.of(f"postgresql://somebody:secret@127.0.0.1:{postgres.port}/{found.name}")
    with pytest.raises(UsageError, match="may not replace the schema public") as refused:
        mine.load(found.file, mine.major(), replace=True)
    assert "ALTER SCHEMA public OWNER TO" in refused.value.mend
    assert found.rows() == ["now"]
    assert found.schemas() == {"public"}
    postgres.execute(found.name, "ALTER SCHEMA public OWNER TO somebody", "ALTER TABLE t OWNER TO somebody")
    mine.load(found.file, mine.major(), replace=True)
    assert found.rows() == ["then"]


def test_what_a_killed_restore_left_is_removed_by_the_next_one(tmp_path: Path, postgres: Postgres) -> None:
    found = Filled(postgres, tmp_path / "dump")
    postgres.execute(
        found.name, "ALTER SCHEMA public RENAME TO public_before_restore_1a2b3c4d", "CREATE SCHEMA public"
    )
    assert found.database.exists()
    found.load()
    assert found.rows() == ["then"]
    assert found.schemas() == {"public"}
