"""`python -m flows.local`: what it makes on a real server, and a worker that does what people start."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import yaml

from fakes.pipelines import small_recipe
from flows.local import set_up
from flows.server import managed_server
from flows.settings import FlowSettings
from servers import prefect

if TYPE_CHECKING:
    from servers.postgres import Postgres

pytestmark = [pytest.mark.integration, pytest.mark.slow]

WRITTEN = yaml.safe_load((resources.files("flows") / "prefect.yaml").read_text())["deployments"]
LOCAL = {row["name"]: row for row in WRITTEN if row["work_pool"]["name"] == "local"}
DATA_STAGES = {"synthesise", "score", "triplets"}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[prefect.Stack]:
    # Every second: at the end a worker that still takes runs would have taken one.
    often = {"PREFECT_WORKER_QUERY_SECONDS": "1"}
    with prefect.running(tmp_path_factory.mktemp("deployments"), **often) as found:
        yield found


@pytest.fixture(scope="module")
def recipe(stack: prefect.Stack, repository: Path) -> Path:
    return small_recipe(repository, stack.home / "small.yaml")


def test_everything_of_the_local_pool_is_deployed_as_written(stack: prefect.Stack) -> None:
    made = {row["name"]: row for row in stack.ask("/deployments/filter", {})}
    assert set(made) == set(LOCAL) == set(stack.facts["deployments"])
    for name, row in made.items():
        written = LOCAL[name]
        assert (row["entrypoint"], row["pull_steps"]) == (written["entrypoint"], [])
        assert row["work_pool_name"] == "local"
        assert set(row["tags"]) == set(written["tags"])
        limit = written.get("concurrency_limit", {})
        assert (row["concurrency_options"] or {}).get("collision_strategy") == limit.get("collision_strategy")
        plans = {plan["slug"]: plan["active"] for plan in row["schedules"]}
        assert plans == {plan["slug"]: plan.get("active", True) for plan in written.get("schedules", ())}


def test_limits_and_automations_are_there(stack: prefect.Stack) -> None:
    limits = {row["name"]: row for row in stack.ask("/v2/concurrency_limits/filter", {})}
    assert {"gpu", "gemini-api", "openai-api"} <= set(limits)
    assert limits["gemini-api"]["slot_decay_per_second"] > 0
    automations = {row["name"] for row in stack.ask("/automations/filter", {}) if row["enabled"]}
    assert automations >= {"crashed-runs", "verify what was promoted"}


def test_a_run_is_done_by_the_worker_and_every_task_run_is_recorded(
    stack: prefect.Stack, recipe: Path
) -> None:
    run = stack.start("dataset", recipe={"recipe": str(recipe), "changes": {"seed": 3}})
    assert stack.wait(run)["state_type"] == "COMPLETED"
    tasks = stack.ask("/task_runs/filter", {"flow_runs": {"id": {"any_": [run]}}})
    assert {row["state_type"] for row in tasks} == {"COMPLETED"}
    assert {row["name"].rpartition("-")[0] for row in tasks} >= DATA_STAGES
    assert list((stack.home / "runs" / "small").glob("triplets-*/manifest.json"))
    kept = [path for path in (stack.home / "prefect" / "storage").rglob("*") if path.is_file()]
    assert kept, "a second run finds what the first returned"
    for path in kept:
        assert json.loads(path.read_bytes())["metadata"]["serializer"]["type"] == "json"


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"recipe": {"recip": "small"}}, "recip"),
        ({"recipe": {"recipe": ""}}, "recipe"),
        ({"runner": "fast"}, "threads"),
    ],
)
def test_a_form_with_a_wrong_value_is_not_taken(
    stack: prefect.Stack, parameters: dict[str, Any], words: str
) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        stack.start("dataset", **parameters)
    assert caught.value.code == 409
    assert words in caught.value.read().decode()


def test_what_only_a_run_can_see_is_explained_in_its_state(stack: prefect.Stack) -> None:
    run = stack.start("dataset", recipe={"recipe": "pixelsmile-portrait"})
    state = stack.wait(run, "FAILED")["state"]
    assert "there is no recipe 'pixelsmile-portrait'" in state["message"]
    assert "What to do: give the path" in state["message"]
    assert "Traceback" not in state["message"]


def test_deploying_everything_again_changes_nothing_that_people_did(
    stack: prefect.Stack, repository: Path
) -> None:
    before = stack.deployment("rescan")
    plan = before["schedules"][0]["id"]
    address = f"{stack.facts['api']}/deployments/{before['id']}/schedules/{plan}"
    prefect.change(address, "PATCH", {"active": False})
    words = ["--no-prompt", "deploy", "--all"]
    environment = {**os.environ, "PREFECT_API_URL": stack.facts["api"]}
    done = subprocess.run(
        [sys.executable, "-m", "prefect", *words],
        cwd=repository,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    after = stack.deployment("rescan")
    assert after["id"] == before["id"]
    assert [row["active"] for row in after["schedules"]] == [False], "what was paused stays paused"
    names = {row["name"] for row in stack.ask("/deployments/filter", {})}
    assert names == {row["name"] for row in WRITTEN}, "those of the cluster, too"


def test_the_pages_of_other_websites_may_not_call_the_api(stack: prefect.Stack) -> None:
    """Who makes a browser on this machine open a page could else run code here: runs have commands."""

    def preflight(origin: str) -> str | None:
        headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        request = urllib.request.Request(
            f"{stack.facts['api']}/deployments/filter",
            headers={**headers, "Access-Control-Request-Headers": "content-type"},
            method="OPTIONS",
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.headers.get("Access-Control-Allow-Origin")
        except urllib.error.HTTPError as error:
            return error.headers.get("Access-Control-Allow-Origin")

    assert preflight("https://evil.example") is None
    assert preflight(stack.page) == stack.page
    assert preflight(stack.page.replace("127.0.0.1", "localhost")) is not None


def test_a_pod_of_the_kubernetes_pool_has_what_a_training_needs(stack: prefect.Stack) -> None:
    pool = stack.ask("/work_pools/kubernetes")
    given = {"gpus": 2, "gpu_type": "NVIDIA-H100-80GB-HBM3", "env": {"NCCL_DEBUG": "WARN"}}
    job = rendered(pool["base_job_template"], stack.facts["api"], given)
    assert job["spec"]["backoffLimit"] == 0, "a run that was killed is started again by people or Prefect"
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 2
    assert pod["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}
    assert pod["terminationGracePeriodSeconds"] >= 60 + FlowSettings().stop_seconds
    mounted = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes[mounted["/dev/shm"]]["emptyDir"] == {"medium": "Memory", "sizeLimit": "8Gi"}
    assert "persistentVolumeClaim" in volumes[mounted["/data"]]
    assert container["envFrom"] == [
        {"configMapRef": {"name": "platform-settings", "optional": True}},
        {"secretRef": {"name": "adapter-foundry", "optional": True}},
    ]
    labels = job["spec"]["template"]["metadata"]["labels"]
    assert labels["adapter-foundry/calls-prefect"] == "true", "the network lets it through by its labels"
    variables = {row["name"]: row.get("value") for row in container["env"]}
    assert variables["NCCL_DEBUG"] == "WARN"
    assert variables["ADAPTER_FOUNDRY_HOME"] == "/data", (
        "a deployment's variables do not take the pool's away"
    )
    assert variables["PREFECT_RESULTS_LOCAL_STORAGE_PATH"] == "/data/prefect/storage"
    bare = rendered(pool["base_job_template"], stack.facts["api"], {"gpus": 0})
    assert bare["spec"]["template"]["spec"]["nodeSelector"] == {}


def rendered(template: dict[str, Any], url: str, given: dict[str, Any]) -> dict[str, Any]:
    """The job that a Kubernetes worker would start for a run."""
    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.objects import FlowRun
    from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration

    async def make() -> dict[str, Any]:
        async with PrefectClient(url) as client:
            configuration = await KubernetesWorkerJobConfiguration.from_template_and_values(
                template, given, client=client
            )
        configuration.prepare_for_flow_run(FlowRun(id=uuid.uuid4(), flow_id=uuid.uuid4(), name="quiet-fox"))
        return configuration.job_manifest

    return asyncio.run(make())


def test_a_data_folder_has_one_stack_and_a_pool_one_data_folder(stack: prefect.Stack, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "flows.local", "--port", "0"]
    environment = {**os.environ, "ADAPTER_FOUNDRY_HOME": str(stack.home)}
    twice = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert twice.returncode == 1
    assert "another `python -m flows.local` works in" in twice.stderr
    environment |= {"ADAPTER_FOUNDRY_HOME": str(tmp_path), "PREFECT_API_URL": stack.facts["api"]}
    elsewhere = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert elsewhere.returncode == 1
    assert f"set ADAPTER_FOUNDRY_HOME={stack.home}" in elsewhere.stderr


def test_stopping_ends_runs_and_leaves_no_process(stack: prefect.Stack, recipe: Path) -> None:
    """The last test of this module: it stops the stack."""
    long = {"recipe": str(recipe), "changes": {"name": "long", "optimiser.steps": 50_000}}
    run, end = stack.start("training", recipe=long), time.monotonic() + prefect.RUN_SECONDS
    while not any("trainer.launch" in words(process) for process in family_of(stack)):
        state = stack.ask(f"/flow_runs/{run}")["state_type"]
        assert state not in {"FAILED", "CRASHED"}
        assert time.monotonic() < end, f"still {state}\n{stack.log('worker')}"
        time.sleep(0.3)
    prefect.change(f"{stack.facts['api']}/work_pools/local", "PATCH", {"concurrency_limit": 1})
    waiting = stack.start("dataset", recipe={"recipe": str(recipe), "changes": {"seed": 5}})
    family = family_of(stack)
    stack.process.send_signal(signal.SIGINT)
    assert stack.process.wait(prefect.STOP_SECONDS) == 0
    _, alive = psutil.wait_procs(family, timeout=120)
    assert not alive
    with sqlite3.connect(stack.home / "prefect" / "prefect.db") as database:
        rows = database.execute("SELECT id, state_type FROM flow_run").fetchall()
    states = {uuid.UUID(id_): state for id_, state in rows}
    assert states[uuid.UUID(run)] == "CRASHED"
    assert states[uuid.UUID(waiting)] == "SCHEDULED", "it waits for the next start"


def family_of(stack: prefect.Stack) -> list[psutil.Process]:
    return psutil.Process(stack.process.pid).children(recursive=True)


def words(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return []


def test_the_server_runs_on_postgresql(home: Path, postgres: Postgres) -> None:
    uri = postgres.database()
    url = uri.replace("+psycopg", "+asyncpg")
    settings = FlowSettings(prefect_server_database_connection_url=url, gpu_slots=3)
    with managed_server(home, settings) as server:
        set_up(server, home, settings, runs=3)
        set_up(server, home, settings)
    assert not list((home / "prefect").glob("*.db"))
    name = uri.rpartition("/")[2]
    made = postgres.query(name, "SELECT name, concurrency_limit FROM work_pool ORDER BY name")
    assert made == [("kubernetes", None), ("local", 3)], "a limit that somebody has set stays"
    assert postgres.query(name, "SELECT \"limit\" FROM concurrency_limit_v2 WHERE name = 'gpu'") == [(3,)]
