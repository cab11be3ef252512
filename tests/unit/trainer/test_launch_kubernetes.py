"""The training Job of infra/kubernetes on two nodes: its very command, with the variables of its pods."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from fakes import manifests as kube
from fakes.manifests import Manifest
from fakes.processes import stand_still
from fakes.trainings import Hold, changed, curve, job_of
from servers.ports import kept_port
from trainer.recipe import Recipe

FOLDER = Path(__file__).resolve().parents[3] / "infra" / "kubernetes"
PATIENCE = 600.0  # seconds, for machines that do much else

pytestmark = pytest.mark.skipif(
    shutil.which("kubectl") is None, reason="kubectl, which renders the manifests, is not installed"
)


def node_environment(manifests: tuple[Manifest, ...], rank: int, port: int) -> dict[str, str]:
    """Variables of a pod of the Indexed Job, as the kubelet would make them, with one process a node."""
    job = kube.named(manifests, "Job", "training")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    found = {}
    for row in container["env"]:
        if "value" in row:
            found[row["name"]] = row["value"]
        else:
            field = row["valueFrom"]["fieldRef"]["fieldPath"]
            assert field == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
            found[row["name"]] = str(rank)
    service = kube.named(manifests, "Service", job["spec"]["template"]["spec"]["subdomain"])
    first = f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert found["PET_MASTER_ADDR"] == first, "the name of the pod with index 0"
    assert found["PET_MASTER_PORT"] in {str(one["port"]) for one in service["spec"]["ports"]}
    place = {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(port), "PET_NPROC_PER_NODE": "1"}
    return {**found, **place, "OMP_NUM_THREADS": "1"}


@contextlib.contextmanager
def nodes(manifests: tuple[Manifest, ...], job: Path, **more: str) -> Iterator[list[subprocess.Popen[str]]]:
    """Every pod of the Indexed Job as a process that runs the command of the manifest."""
    spec = kube.named(manifests, "Job", "training")["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    program, *rest = container["args"]
    line = [str(Path(sys.executable).parent / program), *rest[:-1], str(job)]
    port = kept_port()
    running = [
        subprocess.Popen(
            line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, **node_environment(manifests, rank, port), **more},
        )
        for rank in range(spec["completions"])
    ]  # fmt: skip
    try:
        yield running
    finally:
        for process in running:
            with contextlib.suppress(psutil.NoSuchProcess):
                for one in psutil.Process(process.pid).children(recursive=True):
                    one.kill()
            process.kill()
            process.wait()


def pending(pid: int, number: signal.Signals) -> bool:
    """Whether a signal has been sent to a process that has not taken it yet."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (mask,) = (line.split()[1] for line in lines if line.startswith("ShdPnd:"))
    return bool(int(mask, 16) >> (number - 1) & 1)


@pytest.mark.slow
def test_a_drained_node_saves_and_all_go_on_from_there(
    tiny_recipe: Recipe,
    tiny_run: Path,
    tiny_base: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """The command of the Indexed Job on two nodes; the second is drained, then both are started again."""
    manifests = kube.rendered(FOLDER / "training/indexed-job")
    steps = 30
    recipe = changed(
        changed(tiny_recipe, "optimiser", steps=steps), "running", log_every=1, checkpoint_every=1000
    )
    job = job_of(recipe, tiny_run, tiny_base, tmp_path)
    hold = Hold(tmp_path_factory.mktemp("hold"))
    hold.at(3)
    with nodes(manifests, job, **hold.environment) as (first, second):
        hold.wait(first, PATIENCE)
        (trainer,) = psutil.Process(second.pid).children()
        stand_still(trainer.pid)  # so that one can see that torchrun has passed the signal on
        second.send_signal(signal.SIGTERM)  # what the kubelet sends
        end = time.monotonic() + PATIENCE
        while not pending(trainer.pid, signal.SIGTERM):
            assert time.monotonic() < end
            time.sleep(0.05)
        trainer.resume()
        hold.release()
        said = [one.communicate(timeout=PATIENCE)[0] for one in (first, second)]
        codes = [first.returncode, second.returncode]
    assert all(codes), said  # the Job starts both again
    (kept,) = (tmp_path / "checkpoints").iterdir()
    stopped = len(curve(tmp_path))
    assert 3 <= stopped < steps
    assert kept.name == f"step-{stopped:06d}"
    with nodes(manifests, job) as again:
        said = [one.communicate(timeout=PATIENCE)[0] for one in again]
        assert [one.returncode for one in again] == [0, 0], said
    facts = json.loads((tmp_path / "stage.json").read_text())["facts"]
    assert (facts["resumed_from"], facts["steps"]) == (stopped, steps)
