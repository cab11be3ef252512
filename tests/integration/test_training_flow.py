"""A training that Prefect's worker runs: cancelled, killed with its worker, and the same to the bit.

One training goes through all of it: its first run is cancelled, the second one is killed together with the
worker, and is started again when the server has noticed. ``FLOWS_SILENCE=120 pytest -rP`` shows how long the
server takes with the product's own window.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from fakes.trainings import Hold
from flows import heartbeat, limits
from flows.errors import FlowError
from flows.local import deploy, set_up
from flows.server import Server, ask, attached, managed_server
from flows.settings import FlowSettings, prefect_environment, prefect_home
from servers import prefect

pytestmark = [pytest.mark.integration, pytest.mark.slow]

STEPS = 60
#: Seconds without a heartbeat, of which a run sends one in 30; the product takes `heartbeat.SILENCE`.
SILENCE = int(os.environ.get("FLOWS_SILENCE", "90"))
PATIENCE = 600.0


@dataclass(kw_only=True)
class Site:
    """A server with deployments, and the workers that a test starts."""

    home: Path
    server: Server
    recipe: Path
    hold: Hold
    workers: list[psutil.Process] = field(default_factory=list)

    def work(self) -> None:
        """Start a worker, in a session of its own as a service manager would."""
        environment = {
            **os.environ,
            **prefect_environment(self.home),
            "PREFECT_API_URL": self.server.url,
            "ADAPTER_FOUNDRY_HOME": str(self.home),
            "OMP_NUM_THREADS": "1",
            **self.hold.environment,
        }
        words = ["worker", "start", "--pool", "local", "--type", "process", "--install-policy", "never"]
        with (self.home / "worker.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "prefect", *words],
                env=environment, cwd=self.home, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self.workers.append(psutil.Process(process.pid))

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        return ask(f"{self.server.url}/{path}", body, prefect.BUSY_SECONDS)

    def start(self) -> str:
        """Start the deployment and return the id of the flow run."""
        deployment = self.ask("deployments/name/training/training")["id"]
        parameters = {"recipe": {"recipe": str(self.recipe)}}
        return str(self.ask(f"deployments/{deployment}/create_flow_run", {"parameters": parameters})["id"])

    def set_state(self, run: str, **state: str) -> None:
        assert self.ask(f"flow_runs/{run}/set_state", {"state": state})["status"] == "ACCEPT"

    def state(self, run: str) -> dict[str, Any]:
        return self.ask(f"flow_runs/{run}")["state"]

    def logs(self, run: str) -> list[str]:
        body = {"logs": {"flow_run_id": {"any_": [run]}}, "limit": 200, "sort": "TIMESTAMP_ASC"}
        return [row["message"] for row in self.ask("logs/filter", body)]

    def slots(self) -> int:
        """How many GPU slots are taken."""
        limits = self.ask("v2/concurrency_limits/filter", {"limit": 50})
        return next(row["active_slots"] for row in limits if row["name"] == "gpu")

    def held(self, run: str) -> bool:
        """Whether the training waits where it is to be held; the run is still at it."""
        assert self.state(run)["type"] in ("SCHEDULED", "PENDING", "RUNNING"), self.logs(run)[-5:]
        return self.hold.held

    def lines(self) -> int:
        """How many lines the loss curve has."""
        files = list(self.home.glob("runs/*/train-*/loss.jsonl"))
        return len(files[0].read_text().splitlines()) if files else 0

    def checkpoint(self) -> int:
        """The newest checkpoint's step."""
        names = [path.name for path in self.home.glob("runs/*/train-*/checkpoints/step-*")]
        return max((int(name.rpartition("-")[2]) for name in names), default=0)

    def family(self) -> list[psutil.Process]:
        """The worker, the flow's process, and everybody of the training."""
        return [self.workers[-1], *self.workers[-1].children(recursive=True)]


def wait(until: Callable[[], object], what: str, seconds: float = PATIENCE) -> float:
    """Wait until something is so; return how many seconds it took."""
    begun = time.monotonic()
    while not until():
        assert time.monotonic() - begun < seconds, f"{what} did not happen within {seconds:.0f} s"
        time.sleep(0.1)
    return time.monotonic() - begun


def role(process: psutil.Process) -> str:
    try:
        words = " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return "a helper that has ended"
    known = (
        "prefect.engine",
        "flow-run execute",
        "flows.child",
        "accelerate.commands.launch",
        "trainer.launch",
    )
    return next((name for name in known if name in words), "worker" if "worker start" in words else words)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Iterator[Site]:
    home = tmp_path_factory.mktemp("training-flow")
    recipe = yaml.safe_load((repository / "trainer/recipes/pixelsmile-portraits.yaml").read_text())
    recipe["name"] = "small"
    recipe["data"] |= {"identities": {"human": 2, "anime": 1}, "validation": {"human": 1, "anime": 1}}
    recipe["lora"] |= {"rank": 4, "alpha": 4}
    recipe["optimiser"] |= {"steps": STEPS, "batch_pairs": 1, "warmup_steps": 2}
    recipe["running"] = {"checkpoint_every": 1000, "log_every": 1}
    recipe["conditioning"]["expressions"] = ["fear", "surprised"]
    file = home / "small.yaml"
    file.write_text(yaml.safe_dump(recipe))
    settings = FlowSettings()
    with managed_server(home, settings) as server:
        set_up(server, home, settings)
        deploy(server, home)
        heartbeat.ensure(server.url, SILENCE)
        hold = Hold(tmp_path_factory.mktemp("hold"))
        found = Site(home=home, server=server, recipe=file, hold=hold)
        try:
            yield found
        finally:
            for worker in found.workers:
                with suppress(psutil.NoSuchProcess):
                    for process in [worker, *worker.children(recursive=True)]:
                        process.kill()
                    worker.wait(120)


@pytest.fixture(scope="module")
def cancelled(site: Site) -> dict[str, Any]:
    """The first run, cancelled in the middle of the training, and what was seen of it."""
    site.work()
    site.hold.at(3)
    run = site.start()
    wait(lambda: site.held(run), "the third step")
    family = site.family()
    held = site.slots()
    begun = time.monotonic()
    site.set_state(run, type="CANCELLING", name="Cancelling")
    wait(lambda: site.state(run)["type"] == "CANCELLED", "the cancellation")
    seconds = time.monotonic() - begun
    training = [one for one in family if one.pid != site.workers[-1].pid]
    _, alive = psutil.wait_procs(training, timeout=120)
    return {
        "run": run,
        "seconds": seconds,
        "held": held,
        "started": len(training),
        "alive": alive,
        "steps": site.lines(),
        "checkpoint": site.checkpoint(),
    }


def test_a_cancelled_run_saves_a_checkpoint_and_leaves_nobody(cancelled: dict[str, Any]) -> None:
    assert cancelled["started"] >= 4, "a flow, its keeper, accelerate and the training"
    print(json.dumps({name: cancelled[name] for name in ("seconds", "steps", "checkpoint", "started")}))
    assert cancelled["alive"] == []
    assert 3 <= cancelled["steps"] < STEPS
    assert cancelled["checkpoint"] == cancelled["steps"], "what was learned before the signal is saved"


def test_it_held_a_gpu_slot_while_it_trained_and_gave_it_back(cancelled: dict[str, Any], site: Site) -> None:
    assert cancelled["held"] == 1
    # Prefect's worker kills a flow that takes long to be cancelled; then the lease gives the slot back.
    wait(lambda: site.slots() == 0, "the end of the slot", limits.LEASE_SECONDS + 60)


def test_its_log_is_in_the_run_and_says_what_happened(cancelled: dict[str, Any], site: Site) -> None:
    said = "\n".join(site.logs(cancelled["run"]))
    assert "train: LoRA and its moving average" in said
    assert "mlflow" in said, "what the training writes to stderr"
    kinds = {row["key"]: row for row in site.ask("artifacts/filter", {"limit": 50})}
    assert float(kinds["training-progress"]["data"]) > 0
    assert "mlflow ui --backend-store-uri" in kinds["training-figures"]["data"]


@pytest.fixture(scope="module")
def killed(site: Site, cancelled: dict[str, Any]) -> dict[str, Any]:
    """The second run, killed together with its worker, and what was seen of it."""
    site.hold.at(cancelled["steps"] + 3)
    run = site.start()
    wait(lambda: site.held(run), "three steps more")
    family = site.family()
    flow = [one for one in family if role(one) in ("prefect.engine", "flow-run execute")]
    assert flow
    for process in (site.workers[-1], *flow):
        process.send_signal(signal.SIGKILL)
    begun = time.monotonic()
    _, alive = psutil.wait_procs(family, timeout=180)
    ended = time.monotonic() - begun
    steps, checkpoint = site.lines(), site.checkpoint()
    crashed = wait(lambda: site.state(run)["type"] == "CRASHED", "the automation") + ended
    freed = wait(lambda: site.slots() == 0, "the end of the lease") + crashed
    return {
        "run": run, "alive": alive, "ended": ended, "steps": steps, "checkpoint": checkpoint,
        "crashed": crashed, "freed": freed,
    }  # fmt: skip


def test_killing_worker_and_flow_ends_the_training_with_a_checkpoint(killed: dict[str, Any]) -> None:
    assert killed["alive"] == []
    assert killed["checkpoint"] == killed["steps"] < STEPS


def test_the_server_notices_by_the_missing_heartbeat_and_takes_the_slot_back(killed: dict[str, Any]) -> None:
    assert killed["crashed"] > killed["ended"], "not before the processes had gone"
    assert killed["freed"] >= killed["crashed"]
    print(f"silent for {SILENCE} s is crashed; slots are leased for {limits.LEASE_SECONDS} s; seconds:")
    print(json.dumps({name: round(killed[name], 1) for name in ("ended", "crashed", "freed")}))


@pytest.fixture(scope="module")
def resumed(site: Site, killed: dict[str, Any]) -> dict[str, Any]:
    """The crashed run, started again as Prefect's page does it, and what the training says of itself."""
    said = site.state(killed["run"])["message"]
    site.hold.release()
    site.work()
    site.set_state(killed["run"], type="SCHEDULED", name="AwaitingRetry")
    wait(lambda: site.state(killed["run"])["type"] in ("COMPLETED", "FAILED", "CRASHED"), "the end")
    assert site.state(killed["run"])["type"] == "COMPLETED", site.logs(killed["run"])[-5:]
    (result,) = site.home.glob("runs/*/train-*/stage.json")
    return {"said": said, **json.loads(result.read_bytes())}


def test_the_crashed_run_says_what_to_do_and_goes_on_at_the_checkpoint(
    killed: dict[str, Any], resumed: dict[str, Any]
) -> None:
    assert "start the run again" in resumed["said"]
    assert resumed["facts"]["resumed_from"] == killed["checkpoint"]
    assert resumed["facts"]["steps"] == STEPS


def test_what_comes_out_is_what_an_undisturbed_training_makes(
    site: Site, resumed: dict[str, Any], tmp_path: Path
) -> None:
    from trainer.job import Job
    from trainer.launch import train

    folder = next(site.home.glob("runs/*/train-*"))
    job = Job.read(folder / "job.json")
    alone = train(job.recipe, job.dataset, job.cache, job.base_path, tmp_path, processes=1, track=False)
    assert str(alone.digest) == resumed["digest"]
    assert (tmp_path / "loss.jsonl").read_bytes() == (folder / "loss.jsonl").read_bytes()


def test_nothing_in_the_result_storage_is_a_pickle(site: Site, resumed: dict[str, Any]) -> None:
    files = [path for path in (prefect_home(site.home) / "storage").rglob("*") if path.is_file()]
    assert len(files) >= 5
    for path in files:
        record = json.loads(path.read_bytes())
        assert record["metadata"]["serializer"]["type"] == "json"
        json.loads(record["result"])
        assert b"gAS" not in path.read_bytes(), "how a pickle begins in base64"


@pytest.fixture
def connected(site: Site, resumed: dict[str, Any]) -> Iterator[None]:
    """This process works with the site's server, on which no training runs any more."""

    with attached(site.home, site.server.url):
        yield
        limits.ensure(settings=FlowSettings(gpu_slots=1, api_per_minute=600))


def limit(site: Site, name: str) -> dict[str, Any] | None:
    rows = site.ask("v2/concurrency_limits/filter", {"limit": 50})
    return next((row for row in rows if row["name"] == name), None)


@pytest.mark.usefixtures("connected")
def test_limits_are_made_once_and_changed_only_by_a_setting(site: Site) -> None:
    assert set(limits.ensure().values()) == {"there"}
    assert limits.ensure(settings=FlowSettings(gpu_slots=3))["gpu"] == "changed"
    assert limits.ensure()["gpu"] == "there", "what nobody says now stays as it was said before"
    found = limit(site, "gpu")
    assert found is not None
    assert (found["limit"], found["slot_decay_per_second"]) == (3, 0.0)
    assert heartbeat.ensure(silence=SILENCE) == "there"
    assert heartbeat.ensure(silence=SILENCE + 1) == "changed"
    names = [row["name"] for row in site.ask("automations/filter", {"limit": 50})]
    assert names.count(heartbeat.NAME) == 1


@pytest.mark.usefixtures("connected")
def test_a_limit_that_somebody_removed_is_made_again_and_held(site: Site) -> None:
    prefect.change(f"{site.server.url}/v2/concurrency_limits/gpu", "DELETE")
    assert limit(site, "gpu") is None
    said: list[str] = []
    with limits.gpus(1, said.append):
        assert site.slots() == 1
    assert site.slots() == 0
    assert said == []


@pytest.mark.usefixtures("connected")
def test_more_gpus_than_there_are_slots_is_explained_at_once() -> None:
    with pytest.raises(FlowError, match=r"more GPUs \(5\)") as caught, limits.gpus(5, print):
        pass
    assert "GPU_SLOTS" in caught.value.mend


@pytest.mark.usefixtures("connected")
def test_requests_to_a_paid_api_keep_to_the_rate_of_all_runs() -> None:
    from trainer.apis import before_request

    limits.ensure(settings=FlowSettings(api_per_minute=60))
    assert before_request.get() is None
    with limits.api_rates():
        wait_for_turn = before_request.get()
        assert wait_for_turn is not None
        begun = time.monotonic()
        for _ in range(3):
            wait_for_turn("gemini")
        assert time.monotonic() - begun >= 1.0, "one may go at once, then one a second"
        with pytest.raises(FlowError, match="nobody-api"):
            wait_for_turn("nobody")
    assert before_request.get() is None
