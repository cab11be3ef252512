"""Work pools as data: templates that Prefect's own workers understand, with nothing dangling."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import prefect
import pytest
from pydantic import SecretStr

from flows import pools
from flows.heartbeat import ENVIRONMENT
from flows.settings import FlowSettings, result_storage
from registry.errors import UsageError

SHIPPED = Path(prefect.__file__).parent / "server/api/collections_data/views/aggregate-worker-metadata.json"


@pytest.fixture(params=sorted(pools.KINDS))
def pool(request: pytest.FixtureRequest) -> str:
    return request.param


def default(pool: str) -> dict[str, Any]:
    """The template that Prefect ships for the pool's type."""
    kind, _ = pools.KINDS[pool]
    package = "prefect-kubernetes" if kind == "kubernetes" else "prefect"
    return json.loads(SHIPPED.read_bytes())[package][kind]["default_base_job_configuration"]


def test_each_placeholder_is_a_variable_and_each_variable_is_used(pool: str, home: Path) -> None:
    template = pools.template(pool, home)
    used = set(re.findall(r"{{ (\w+) }}", json.dumps(template["job_configuration"])))
    assert used == set(template["variables"]["properties"])


def test_each_variable_has_a_title_for_people(pool: str, home: Path) -> None:
    variables = pools.template(pool, home)["variables"]["properties"]
    assert [name for name, field in variables.items() if not field.get("title")] == []


def test_the_template_has_all_that_the_worker_of_prefect_reads(pool: str, home: Path) -> None:
    assert set(pools.template(pool, home)["job_configuration"]) == set(default(pool)["job_configuration"])


def test_runs_of_a_pool_find_what_the_others_made_and_are_heard(pool: str, home: Path) -> None:
    variables = pools.template(pool, home)["variables"]["properties"]["env"]["default"]
    assert variables["ADAPTER_FOUNDRY_HOME"] == str(home)
    assert variables["PREFECT_RESULTS_LOCAL_STORAGE_PATH"] == str(result_storage(home))
    assert variables["PREFECT_RESULTS_DEFAULT_SERIALIZER"] == "json"
    assert variables.items() >= ENVIRONMENT.items()
    quiet = {"DO_NOT_TRACK": "1", "MLFLOW_DISABLE_TELEMETRY": "true", "RAY_USAGE_STATS_ENABLED": "0"}
    assert variables.items() >= quiet.items()


@pytest.mark.parametrize(
    "url", ["postgresql://u:secret@h/p", "postgresql+psycopg://u:secret@h/p", "sqlite:///p"]
)
def test_a_database_that_prefect_cannot_use_is_refused_without_its_password(
    url: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_SERVER_DATABASE_CONNECTION_URL", url)
    with pytest.raises(UsageError, match=r"postgresql\+asyncpg://") as caught:
        FlowSettings.read(home)
    assert "secret" not in str(caught.value)


def test_a_database_that_prefect_can_use_is_taken(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = "postgresql+asyncpg://u:secret@h/p"
    monkeypatch.setenv("PREFECT_SERVER_DATABASE_CONNECTION_URL", url)
    settings = FlowSettings.read(home)
    assert settings.prefect_server_database_connection_url == SecretStr(url)
    assert "secret" not in repr(settings)
