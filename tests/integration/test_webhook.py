"""An alias is moved by hand in a real MLflow server; its webhook starts a reconcile in Prefect."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml

from fakes.registries import NAME, PASSING, adapter_folder
from registry.client import Registry
from registry.errors import DigestMismatch
from registry.reconcile import reconcile as compare
from servers import mlflow as mlflow_servers
from servers.mlflow import MlflowServer
from servers.ports import kept_port
from servers.weed import Weed

pytestmark = [pytest.mark.integration, pytest.mark.slow]

SECRET = "a secret of thirty-two characters"


@pytest.fixture
def mlflow_with_webhooks() -> Iterator[MlflowServer]:
    """A server that may call this machine, and keeps secrets encrypted."""
    from cryptography.fernet import Fernet

    reason = mlflow_servers.missing()
    if reason is not None:
        pytest.skip(reason)
    environment = {
        "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY": Fernet.generate_key().decode(),
        "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http",
        "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
        "MLFLOW_WEBHOOK_CACHE_TTL": "1",
    }
    with mlflow_servers.running(environment=environment) as server:
        yield server


@contextlib.contextmanager
def listening(url: str, deployment: str) -> Iterator[int]:
    """The service on a free port."""
    import uvicorn

    from flows.webhook import Gate, create_app, start_reconcile

    app = create_app(Gate(secret=SECRET.encode()), start_reconcile(url, deployment, repair=True))
    port = kept_port()
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "it does not listen"
            time.sleep(0.05)
        yield port
    finally:
        server.should_exit = True
        thread.join()


def proceed(client: Any, wanted: str = "", seconds: float = 300) -> Any:
    """The next run that a webhook has started, after it was done as a worker does it."""
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterTags
    from prefect.flow_engine import run_flow

    from flows.maintenance import reconcile

    tagged = FlowRunFilter(tags=FlowRunFilterTags(all_=["mlflow-webhook"]))
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for run in client.read_flow_runs(flow_run_filter=tagged):
            if run.name.startswith(f"mlflow-{wanted}") and run.state.is_scheduled():
                run_flow(reconcile, flow_run=run, return_type="state")
                return client.read_flow_run(run.id)
        time.sleep(0.3)
    raise AssertionError("MLflow's webhook has started nothing")


def test_an_alias_that_is_moved_by_hand_is_put_back(
    home: Path,
    tmp_path: Path,
    weed: Weed,
    mlflow_with_webhooks: MlflowServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mlflow import MlflowClient
    from prefect.client.orchestration import get_client

    from flows.maintenance import reconcile
    from flows.server import attached, managed_server
    from flows.webhook import EVENTS

    variables = mlflow_with_webhooks.environment("admin") | weed.environment()
    for name, value in (variables | {"ADAPTER_FOUNDRY_STORE": f"s3://{weed.bucket()}/team"}).items():
        monkeypatch.setenv(name, value)
    registry = Registry.init(home)
    reference = registry.push(adapter_folder(tmp_path / "adapter"), NAME, evaluation=PASSING).reference
    registry.approve(reference, "a person", "looks right")
    registry.promote(reference, "prod")
    people = MlflowClient(mlflow_with_webhooks.uri)
    with (
        managed_server(home) as server,
        attached(home, server.url),
        get_client(sync_client=True) as client,
    ):
        flow = client.create_flow(reconcile)
        client.create_deployment(flow_id=flow, name="reconcile", entrypoint="flows.maintenance.reconcile")
        with listening(server.url, "reconcile/reconcile") as port:
            address = f"http://127.0.0.1:{port}/mlflow"
            people.create_webhook("reconcile", address, [*EVENTS], secret=SECRET)
            people.set_registered_model_alias(NAME, "canary", "1")
            run = proceed(client, "created")
            assert run.state.is_completed()
            assert run.parameters == {"repair": True}
            assert set(people.get_registered_model(NAME).aliases) == {"prod"}, "nobody had signed canary"
            people.delete_registered_model_alias(NAME, "prod")
            # The repair itself was news, too: a run that waits for that may be the one that finds this.
            while set(people.get_registered_model(NAME).aliases) != {"prod"}:
                proceed(client)
        people.set_registered_model_alias(NAME, "canary", "1")
        with pytest.raises(DigestMismatch, match="canary"):
            reconcile()
        (newest, *_) = sorted(
            (one for one in client.read_artifacts() if one.key == "reconcile"),
            key=lambda one: one.created,
            reverse=True,
        )
        assert "alias nobody signed" in newest.data
    assert not compare(registry, repair=True)[1]


def test_news_that_comes_while_a_reconcile_is_under_way_is_looked_at_by_another(home: Path) -> None:
    """The deployment has the limit that ships; states change as a worker changes them."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.objects import ConcurrencyOptions
    from prefect.states import Completed, Pending, Running, Scheduled

    from flows.maintenance import reconcile
    from flows.server import attached, managed_server
    from flows.webhook import News, start_reconcile

    news = News.model_validate(
        {"entity": "model_version_alias", "action": "created", "data": {"name": NAME, "alias": "prod"}}
    )
    shipped = yaml.safe_load((resources.files("flows") / "prefect.yaml").read_text())["deployments"]
    (limit,) = [one["concurrency_limit"] for one in shipped if one["name"] == "reconcile"]
    with (
        managed_server(home) as server,
        attached(home, server.url),
        get_client(sync_client=True) as client,
    ):
        deployment = client.create_deployment(
            flow_id=client.create_flow(reconcile),
            name="reconcile",
            concurrency_limit=limit["limit"],
            concurrency_options=ConcurrencyOptions(collision_strategy=limit["collision_strategy"]),
        )
        tomorrow = datetime.now(UTC) + timedelta(days=1)
        planned = client.create_flow_run_from_deployment(
            deployment, parameters={"repair": True}, state=Scheduled(scheduled_time=tomorrow)
        )
        repairing = start_reconcile(server.url, "reconcile/reconcile", repair=True)
        first = repairing(news)
        assert first != str(planned.id), "a day is too long"
        assert repairing(news) == first, "it has not begun: it looks later than both messages"
        for state in (Pending(), Running()):
            client.set_flow_run_state(first, state)
        second = repairing(news)
        assert second != first, "this one may have looked before"
        assert repairing(news) == second
        assert start_reconcile(server.url, "reconcile/reconcile", repair=False)(news) not in (first, second)
        client.set_flow_run_state(second, Pending())
        assert client.read_flow_run(second).state.is_scheduled(), "it waits for the first"
        client.set_flow_run_state(first, Completed())
        client.set_flow_run_state(second, Pending())
        assert client.read_flow_run(second).state.is_pending()
