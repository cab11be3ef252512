"""A real MLflow server with accounts (``--app-name basic-auth``) on a free port of the loopback."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from servers.ports import kept_port

_START_SECONDS = 300.0
PUBLISHER = "publisher"
READER = "reader"


@dataclass(frozen=True, kw_only=True)
class MlflowServer:
    """A running server.

    Attributes:
        uri: its tracking URI.
        artifacts: where its runs keep artifacts.
        passwords: by account; the accounts are "admin", "publisher" and "reader". Everybody may read, and
            whoever makes a model manages it.
    """

    uri: str
    artifacts: str
    passwords: Mapping[str, str]

    def environment(self, account: str = PUBLISHER) -> dict[str, str]:
        """The variables by which MLflow's clients show who they are."""
        return {
            "MLFLOW_TRACKING_URI": self.uri,
            "MLFLOW_TRACKING_USERNAME": account,
            "MLFLOW_TRACKING_PASSWORD": self.passwords[account],
        }


def missing() -> str | None:
    """Why the server cannot be started here, or None."""
    for module in ("mlflow", "flask_wtf"):
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
    return None


@contextlib.contextmanager
def running(
    artifacts: str | None = None,
    environment: Mapping[str, str] | None = None,
    database: str | None = None,
) -> Iterator[MlflowServer]:
    """Starts a server and stops it.

    Args:
        artifacts: where its runs keep artifacts, such as ``s3://bucket/runs``; None is a folder.
        environment: further variables, such as the credentials of the artifacts.
        database: URI of its database; None is a SQLite file that is gone afterwards.
    """
    root = Path(tempfile.mkdtemp(prefix="mlflow-server-"))
    try:
        passwords = {name: secrets.token_urlsafe(16) for name in ("admin", PUBLISHER, READER)}
        (root / "auth.ini").write_text(
            "[mlflow]\n"
            "default_permission = READ\n"
            f"database_uri = sqlite:///{root / 'auth.db'}\n"
            "admin_username = admin\n"
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
            "auth_cache_ttl_seconds = 60\n"
        )
        port = kept_port()
        with (root / "log").open("wb") as log:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)),
                    *("--workers", "1", "--app-name", "basic-auth"),
                    *("--backend-store-uri", database or f"sqlite:///{root / 'mlflow.db'}"),
                    *("--artifacts-destination", artifacts or str(root / "artifacts")),
                ],
                stdout=log,
                stderr=log,
                cwd=root,
                start_new_session=True,
                env={
                    "PATH": os.environ["PATH"],
                    "HOME": str(root),
                    "MLFLOW_DISABLE_TELEMETRY": "true",
                    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
                    "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(16),
                    "MLFLOW_AUTH_ADMIN_PASSWORD": passwords["admin"],
                    "MLFLOW_AUTH_CONFIG_PATH": str(root / "auth.ini"),
                    **(environment or {}),
                },
            )
        try:
            server = MlflowServer(
                uri=f"http://127.0.0.1:{port}",
                artifacts=artifacts or str(root / "artifacts"),
                passwords=passwords,
            )
            _wait(server, process, root / "log")
            for account in (PUBLISHER, READER):
                _create_account(server, account)
            yield server
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)  # its workers too; nothing has to be kept
            process.wait()
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _wait(server: MlflowServer, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while True:
        if process.poll() is not None:
            raise RuntimeError(f"the MLflow server ended: {log.read_text()}")
        try:
            with urllib.request.urlopen(f"{server.uri}/health", timeout=30):
                return
        except (urllib.error.URLError, OSError):
            if time.monotonic() > deadline:
                raise RuntimeError(f"the MLflow server did not start: {log.read_text()}") from None
            time.sleep(0.1)


def _create_account(server: MlflowServer, account: str) -> None:
    import base64
    import json

    token = base64.b64encode(f"admin:{server.passwords['admin']}".encode()).decode()
    request = urllib.request.Request(
        f"{server.uri}/api/2.0/mlflow/users/create",
        data=json.dumps({"username": account, "password": server.passwords[account]}).encode(),
        headers={"Content-Type": "application/json", "Authorization": f"Basic {token}"},
    )
    with urllib.request.urlopen(request, timeout=120):
        pass
