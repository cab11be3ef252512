"""Work pools as data: where the runs of Prefect's deployments are done, and with what.

``local.json`` runs them as processes beside the worker, ``kubernetes.json`` as pods with GPUs. Both are
Prefect base job templates: ``job_configuration`` is what a worker starts, ``variables`` what a deployment
or a person may set. A pool also holds the data folder and where results are kept, for two workers that look
in different places would silently do the same work twice.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.errors import FlowError
from flows.heartbeat import ENVIRONMENT
from flows.settings import SILENT, result_storage

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

LOCAL, KUBERNETES = "local", "kubernetes"
#: Runs of a new local pool that are done at once.
RUNS = 2
#: Prefect's worker type and a word for people, by pool.
KINDS = {
    LOCAL: ("process", "Processes on the machine of the worker."),
    KUBERNETES: ("kubernetes", "Pods of a cluster, with GPUs."),
}
#: The data folder in a pod, where ``kubernetes.json`` mounts the claim.
POD_HOME = Path("/data")
HOME_VARIABLE = "ADAPTER_FOUNDRY_HOME"


def template(pool: str, home: Path, image: str | None = None) -> dict[str, Any]:
    """Return the base job template of a pool whose runs work in this data folder.

    Args:
        pool: one of `KINDS`.
        home: the data folder as the runs see it.
        image: of pods; None is what the template says, a name that nobody can fetch.
    """
    value: dict[str, Any] = json.loads((resources.files("flows.pools") / f"{pool}.json").read_bytes())
    fields = value["variables"]["properties"]
    fields["env"]["default"] = environment(home)
    if image is not None and "image" in fields:
        fields["image"]["default"] = image
    return value


def environment(home: Path) -> dict[str, str]:
    """Return the variables that every run of a pool needs to find what the others made.

    Args:
        home: the data folder as the runs see it.
    """
    return {
        HOME_VARIABLE: str(home),
        "PREFECT_RESULTS_LOCAL_STORAGE_PATH": str(result_storage(home)),
        # Whoever may write into the storage of results must not be able to run code in those who read it.
        "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",
        **ENVIRONMENT,
        # A worker may be started in a bare shell.
        **SILENT,
    }


def make(client: SyncPrefectClient, home: Path, runs: int | None = None, image: str | None = None) -> None:
    """Make both pools, or bring their templates up to date; pauses and limits that people have set stay.

    Args:
        client: speaks to the server.
        home: the data folder of the local pool.
        runs: how many runs the local pool does at once; None leaves what it has, and gives a new one `RUNS`.
        image: of the pods of the pool ``kubernetes``; see `template`.

    Raises:
        FlowError: the local pool of this server works in another data folder.
    """
    from prefect.client.schemas.actions import WorkPoolUpdate

    for pool, place in ((LOCAL, home), (KUBERNETES, POD_HOME)):
        _make(client, pool, template(pool, place, image))
    if runs is not None:
        client.update_work_pool(LOCAL, WorkPoolUpdate(concurrency_limit=runs))


def _make(client: SyncPrefectClient, pool: str, wanted: dict[str, Any]) -> None:
    from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
    from prefect.exceptions import ObjectNotFound

    kind, words = KINDS[pool]
    try:
        there = client.read_work_pool(pool).base_job_template
    except ObjectNotFound:
        # The limit is the pool's. A worker's own ends the worker when a run that waited for people goes on
        # while the process that made it wait still ends: it counts that run twice (Prefect 3.8).
        runs = RUNS if pool == LOCAL else None
        new = WorkPoolCreate(
            name=pool, type=kind, description=words, base_job_template=wanted, concurrency_limit=runs
        )
        client.create_work_pool(new)
        return
    mine, theirs = _home(wanted), _home(there)
    if theirs is not None and theirs != mine:
        raise FlowError(
            f"the work pool {pool!r} of this Prefect server works in {theirs}, and this is {mine}",
            f"set {HOME_VARIABLE}={theirs} (all workers of a pool share one data folder), use another "
            "Prefect server, or delete that pool if nobody works in it any more",
        )
    if there != wanted:
        client.update_work_pool(pool, WorkPoolUpdate(base_job_template=wanted))


def _home(value: dict[str, Any]) -> str | None:
    variables = value.get("variables", {}).get("properties", {}).get("env", {}).get("default", {})
    home = variables.get(HOME_VARIABLE) if isinstance(variables, dict) else None
    return home if isinstance(home, str) else None
