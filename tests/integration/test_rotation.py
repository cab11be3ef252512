"""Passwords are exchanged as docs/operations/rotation.md says; the new one works and the old one is dead."""

from __future__ import annotations

import base64
import json
import os
import secrets
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from registry.storage import database
from registry.storage.ledger import Ledger
from servers.mlflow import MlflowServer
from servers.postgres import Postgres

pytestmark = pytest.mark.integration


def registry(home: Path, environment: Mapping[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "registry.cli", *words],
        env=os.environ | {"ADAPTER_FOUNDRY_HOME": str(home)} | dict(environment),
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_password_of_the_audit_log(postgres: Postgres, home: Path) -> None:
    role, old, new = f"ledger_{secrets.token_hex(4)}", secrets.token_hex(12), secrets.token_hex(12)
    name = urlsplit(postgres.database()).path.strip("/")
    postgres.execute(
        "postgres",
        f"CREATE ROLE {role} LOGIN PASSWORD '{old}'",
        f'ALTER DATABASE "{name}" OWNER TO {role}',
    )
    place = f"127.0.0.1:{postgres.port}/{name}"
    Ledger(f"postgresql+psycopg://{role}:{old}@{place}").append("init", "x", {}, "kim")
    uri = {"ADAPTER_FOUNDRY_LEDGER": f"postgresql+psycopg://{role}@{place}"}
    assert registry(home, {**uri, "PGPASSWORD": old}, "log").returncode == 0
    postgres.execute("postgres", f"ALTER ROLE {role} PASSWORD '{new}'")
    assert registry(home, {**uri, "PGPASSWORD": new}, "log").returncode == 0
    dead = registry(home, {**uri, "PGPASSWORD": old}, "log")
    assert dead.returncode == 20
    assert old not in dead.stdout + dead.stderr
    assert database.masked(f"postgresql://{role}:{old}@{place}").count("***") == 1


def asked(
    server: MlflowServer, user: str, password: str, path: str, method: str = "GET", sent: object = None
) -> int:
    """The status of a request to MLflow."""
    token = base64.b64encode(f"{user}:{password}".encode()).decode()
    request = urllib.request.Request(
        f"{server.uri}/api/2.0/mlflow/{path}",
        data=None if sent is None else json.dumps(sent).encode(),
        headers={"Content-Type": "application/json", "Authorization": f"Basic {token}"},
        method=method,
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.slow
def test_the_password_of_an_account_of_mlflow(mlflow_server: MlflowServer) -> None:
    user, old, new = f"kim-{secrets.token_hex(4)}", secrets.token_urlsafe(16), secrets.token_urlsafe(16)
    admin, look = mlflow_server.passwords["admin"], "experiments/get?experiment_id=0"
    made = {"username": user, "password": old}
    assert asked(mlflow_server, "admin", admin, "users/create", "POST", made) == 200
    assert asked(mlflow_server, user, old, look) == 200
    changed = {"username": user, "password": new}
    assert asked(mlflow_server, "admin", admin, "users/update-password", "PATCH", changed) == 200
    assert asked(mlflow_server, user, new, look) == 200
    deadline = time.monotonic() + 300  # the server may remember for `auth_cache_ttl_seconds`, a minute here
    while (status := asked(mlflow_server, user, old, look)) == 200 and time.monotonic() < deadline:
        time.sleep(1)
    assert status == 401
