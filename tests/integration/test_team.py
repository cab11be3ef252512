"""A team: S3, an MLflow server with accounts, PostgreSQL; two approvers and a consumer, a machine for each.

Every machine is a data folder and an environment, every step the real command line in its own process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

import pytest

from fakes.registries import NAME, PASSING, adapter_folder
from registry.manifest import WEIGHTS_NAME
from servers.mlflow import MlflowServer
from servers.postgres import Postgres
from servers.weed import Weed

pytestmark = [pytest.mark.integration, pytest.mark.slow]

PROD = f"{NAME}@prod"


@dataclass(frozen=True)
class Machine:
    """A data folder and the environment of the person who works on it."""

    home: Path
    environment: Mapping[str, str]

    def registry(self, *words: str, code: int = 0) -> Any:
        """The one JSON object of a command, whose exit code must be this one."""
        result = subprocess.run(
            [sys.executable, "-m", "registry.cli", *words, "--json"],
            env=os.environ | {"ADAPTER_FOUNDRY_HOME": str(self.home)} | dict(self.environment),
            capture_output=True,
            text=True,
            check=False,
            cwd=self.home,
        )
        assert result.returncode == code, f"{words}: {result.stdout}{result.stderr}"
        return json.loads(result.stdout)


@pytest.fixture
def ledger(postgres: Postgres) -> SplitResult:
    """A new database for the audit log, with its password."""
    return urlsplit(postgres.database())


@pytest.fixture
def servers(weed: Weed, mlflow_server: MlflowServer, ledger: SplitResult) -> dict[str, str]:
    """Where the team's servers are, as options of ``registry init``; passwords are not among them."""
    return {
        "--store": f"s3://{weed.bucket()}/team",
        "--mlflow": mlflow_server.uri,
        "--ledger": ledger._replace(netloc=ledger.netloc.replace(f":{ledger.password}@", "@")).geturl(),
    }


@pytest.fixture
def accounts(weed: Weed, mlflow_server: MlflowServer, ledger: SplitResult) -> dict[str, str]:
    """How somebody who publishes or approves signs in to the servers."""
    found = weed.environment() | mlflow_server.environment() | {"PGPASSWORD": str(ledger.password)}
    del found["MLFLOW_TRACKING_URI"]
    return found


def machine(folder: Path, environment: Mapping[str, str]) -> Machine:
    folder.mkdir()
    return Machine(folder, environment)


def test_two_approvers_and_a_consumer(
    tmp_path: Path, servers: dict[str, str], accounts: dict[str, str], weed: Weed
) -> None:
    owner = machine(tmp_path / "owner", accounts)
    second = machine(tmp_path / "second", accounts)
    consumer = machine(tmp_path / "consumer", weed.environment("reader"))
    name = f"{NAME}-{os.getpid()}"

    made = owner.registry("init", "--server", *(word for pair in servers.items() for word in pair))
    assert made["store"] == servers["--store"]
    settings = (owner.home / "adapter-foundry.toml").read_text()
    assert servers["--mlflow"] in settings
    assert owner.registry("init")["created"] is False

    # The second approver joins: the root in, the public half of a new key out.
    root = tmp_path / "root.json"
    root.write_bytes(
        subprocess.run(
            [sys.executable, "-m", "registry.cli", "trust", "export"],
            env=os.environ | {"ADAPTER_FOUNDRY_HOME": str(owner.home)} | dict(owner.environment),
            capture_output=True,
            check=True,
        ).stdout
    )
    (second.home / "adapter-foundry.toml").write_text(settings)
    (consumer.home / "adapter-foundry.toml").write_text(f'[registry]\nstore = "{servers["--store"]}"\n')
    for other in (second, consumer):
        other.registry("trust", "pin", str(root))
    public = tmp_path / "approver.pem"
    second.registry("trust", "key", "approver", "--output", str(public))
    owner.registry("trust", "add", "approver", str(public), "--threshold", "2")

    report = tmp_path / "evaluation.json"
    report.write_text(json.dumps(PASSING))
    folder = adapter_folder(tmp_path / "adapter")
    pushed = owner.registry("push", str(folder), "--name", name, "--evaluation", str(report))
    reference = pushed["reference"]
    assert owner.registry("push", str(folder), "--name", name)["uploaded_bytes"] == 0

    owner.registry("approve", reference, "--by", "Kim", "--reason", "looks right")
    refused = owner.registry("promote", reference, "--to", "prod", code=12)
    assert {check["name"] for check in refused["checks"] if check["outcome"] != "pass"} == {"approval"}
    consumer.registry("pull", reference, code=12)
    second.registry("approve", reference, "--by", "Lee", "--reason", "looks right to me too")
    assert owner.registry("promote", reference, "--to", "prod")["promoted"] is True

    pulled = consumer.registry("pull", f"{name}@prod")
    assert (Path(pulled["path"]) / WEIGHTS_NAME).read_bytes() == (folder / WEIGHTS_NAME).read_bytes()
    assert consumer.registry("pull", f"{name}@prod")["fetched_bytes"] == 0
    consumer.registry("verify", pulled["path"])
    # A consumer can sign nothing: it has no keys, and its account of the store may only read.
    assert consumer.registry("revoke", reference, "--reason", "mischief", code=11)["error"]["mend"]

    lines = [line["action"] for line in owner.registry("log")["entries"]]
    assert [action for action in lines if not action.startswith("trust")] == [
        "init", "push", "approve", "approve", "promote",
    ]  # fmt: skip
    owner.registry("log", "--verify")
    owner.registry("reconcile")
    assert owner.registry("revoke", reference, "--reason", "it leaks")["revoked"] == "it leaks"
    assert consumer.registry("pull", f"{name}@prod", code=15)["error"]["kind"] == "Revoked"


def test_a_warm_cache_serves_while_the_store_is_away(
    tmp_path: Path, servers: dict[str, str], accounts: dict[str, str]
) -> None:
    owner = machine(tmp_path / "owner", accounts)
    name = f"{NAME}-away-{os.getpid()}"
    owner.registry("init", "--server", *(word for pair in servers.items() for word in pair))
    report = tmp_path / "evaluation.json"
    report.write_text(json.dumps(PASSING))
    folder = adapter_folder(tmp_path / "adapter")
    owner.registry("push", str(folder), "--name", name, "--evaluation", str(report))
    owner.registry("approve", f"{name}:1", "--by", "Kim", "--reason", "looks right")
    owner.registry("promote", f"{name}:1", "--to", "prod")
    owner.registry("pull", f"{name}@prod")
    away = Machine(owner.home, {**owner.environment, "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9"})
    assert away.registry("pull", f"{name}@prod")["fetched_bytes"] == 0
    assert away.registry("verify", f"{name}@prod", code=20)["error"]["kind"] == "NetworkError"


def test_a_team_names_all_its_servers_and_no_password(tmp_path: Path) -> None:
    alone = machine(tmp_path / "alone", {})
    assert alone.registry("init", "--server", "--store", "s3://x", code=2)["error"]["mend"]
    assert alone.registry("init", "--store", "s3://x", code=2)["error"]["mend"]
    words = (
        "--store",
        "s3://x",
        "--mlflow",
        "http://127.0.0.1:9",
        "--ledger",
        "postgresql+psycopg://a:b@c/d",
    )
    assert "password" in alone.registry("init", "--server", *words, code=2)["error"]["message"]
    assert not (alone.home / "adapter-foundry.toml").exists()
