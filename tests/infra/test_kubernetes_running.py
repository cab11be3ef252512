"""What the pods of the manifests run, run for real as far as that goes without a cluster."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fakes import manifests as kube
from fakes.manifests import Pod
from servers import weed
from servers.postgres import Postgres

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = REPOSITORY / "infra" / "kubernetes"
PATIENCE = 600.0  # seconds, for machines that do much else

pytestmark = pytest.mark.skipif(
    shutil.which("kubectl") is None, reason="kubectl, which renders the manifests, is not installed"
)


def pod_of(name: str, owner: str) -> Pod:
    (found,) = (pod for pod in kube.pods(kube.rendered(FOLDER / name)) if pod.owner == owner)
    return found


# -- databases --


@pytest.mark.skipif(shutil.which("psql") is None, reason="psql, the client of PostgreSQL, is not installed")
def test_each_role_gets_a_database_that_others_cannot_open(postgres: Postgres, tmp_path: Path) -> None:
    """The script of PostgreSQL in overlays/dev and of a Job in overlays/prod; twice, as after a rotation."""
    settings = kube.named(kube.rendered(FOLDER / "overlays/dev"), "ConfigMap", "databases")["data"]
    names = ("registry", "mlflow", "prefect", "serving")
    script = settings["databases.sh"].replace("/etc/databases", str(tmp_path))
    try:
        for number in (1, 2):
            for name in names:
                (tmp_path / name).mkdir(exist_ok=True)
                (tmp_path / name / "password").write_text(f"it's {name} \\ {number}")
            done = subprocess.run(
                ["sh", "-c", script], env={**os.environ, **admin(postgres)}, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr
            for name in names:
                own = {"user": name, "password": f"it's {name} \\ {number}"}
                assert asked(postgres, name, own) == name
                for other in set(names) - {name}:
                    assert "permission denied" in asked(postgres, other, own)
        assert "password authentication failed" in asked(
            postgres, "mlflow", {"user": "mlflow", "password": "it's mlflow \\ 1"}
        )
    finally:  # the server is also that of other tests, which make databases of these names
        postgres.drop(*names)


def admin(server: Postgres) -> dict[str, str]:
    user = {"PGUSER": "tester", "PGPASSWORD": server.password}
    return {"PGHOST": "127.0.0.1", "PGPORT": str(server.port), **user}


def asked(server: Postgres, database: str, account: Mapping[str, str]) -> str:
    """Who one is in a database after making a table there, or why one is not let in."""
    import psycopg

    try:
        with psycopg.connect(host="127.0.0.1", port=server.port, dbname=database, **account) as link:
            link.execute("CREATE TABLE IF NOT EXISTS mine (number int)")
            row = link.execute("SELECT current_user").fetchone()
            return row[0] if row else ""
    except psycopg.OperationalError as error:
        return str(error)


# -- S3 --


@pytest.mark.skipif(weed.binary() is None, reason="weed, the server of SeaweedFS, is not installed")
def test_the_s3_of_a_laptop_starts_with_both_buckets_and_an_identity_for_each_caller(tmp_path: Path) -> None:
    from infra.kubernetes import secrets

    secrets.make(tmp_path / ".env")
    values = secrets.read(tmp_path / ".env")
    made = {str(one["metadata"]["name"]): one["stringData"] for one in secrets.manifests(values)}
    (tmp_path / "s3.json").write_text(made["s3"]["s3.json"])
    (container,) = pod_of("overlays/dev", "StatefulSet/s3").spec["containers"]
    port = weed.port()
    line = [
        word.replace("/data", str(tmp_path / "data"))
        .replace("/etc/s3", str(tmp_path))
        .replace("8333", str(port))
        for word in container["command"]
    ]
    (tmp_path / "data").mkdir()
    others = [f"-{part}.port={weed.port()}" for part in ("master", "volume", "filer")]
    process = subprocess.Popen(
        [str(weed.binary()), *line[1:], *others, "-s3.port.iceberg=0", "-s3.port.lance=0"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path,
        env={**os.environ, "HOME": str(tmp_path)},
    )  # fmt: skip
    try:
        path = container["readinessProbe"]["httpGet"]["path"]
        until(
            process, lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5).status == 200
        )
        own = [("publisher", "adapters"), ("mlflow", "mlflow")]
        endpoint = f"http://127.0.0.1:{port}"
        # Buckets and identities appear shortly after it listens; then everybody is asked.
        until(process, lambda: all(put(endpoint, values, who, bucket) for who, bucket in own))
        may = {
            (who, bucket): put(endpoint, values, who, bucket)
            for who in ("publisher", "reader", "mlflow")
            for bucket in ("adapters", "mlflow")
        }
    finally:
        process.kill()  # a graceful stop takes long, and nothing is kept
        process.wait()
    assert [pair for pair, done in may.items() if done] == own


def put(endpoint: str, values: Mapping[str, str], who: str, bucket: str) -> bool:
    import boto3
    from botocore.exceptions import ClientError

    client = boto3.client(
        "s3", endpoint_url=endpoint, region_name="us-east-1",
        aws_access_key_id=values[f"S3_{who.upper()}_KEY"],
        aws_secret_access_key=values[f"S3_{who.upper()}_SECRET"],
    )  # fmt: skip
    end = time.monotonic() + PATIENCE
    while True:
        try:
            client.put_object(Bucket=bucket, Key=f"{who}.txt", Body=b"hello")
            return True
        except ClientError as error:
            code = error.response["Error"]["Code"]
            if code == "AccessDenied":
                return False
            assert time.monotonic() < end, code  # buckets appear shortly after it listens
            time.sleep(0.5)


def until(process: subprocess.Popen[Any], true: Any) -> None:
    end = time.monotonic() + PATIENCE
    while True:
        with contextlib.suppress(OSError):
            if true():
                return
        assert process.poll() is None, f"it ended with {process.returncode}"
        assert time.monotonic() < end
        time.sleep(0.3)


# -- training --


def test_nodes_and_gpus_of_a_training_fit_together_and_share_its_step(repository: Path) -> None:
    from trainer import recipe as recipes
    from trainer.launch import _divided

    manifests = kube.rendered(FOLDER / "training/indexed-job")
    spec = kube.named(manifests, "Job", "training")["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    given = {row["name"]: row.get("value") for row in container["env"]}
    assert spec["completionMode"] == "Indexed"
    assert {spec["completions"], spec["parallelism"], int(given["PET_NNODES"])} == {spec["completions"]}
    assert given["PET_NPROC_PER_NODE"] == container["resources"]["limits"]["nvidia.com/gpu"]
    assert pod["terminationGracePeriodSeconds"] > int(given["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    assert pod["restartPolicy"] == "Never"
    processes = spec["completions"] * int(given["PET_NPROC_PER_NODE"])
    name = Path(container["args"][-1]).relative_to("/data/runs").parts[0]
    _divided(recipes.load(name), processes)

    (prepare,) = kube.pods(kube.rendered(FOLDER / "training/prepare"))
    assert name in prepare.spec["containers"][0]["args"]
    assert Path(container["args"][-1]).parts[-2:] == ("train", "job.json")

    other = kube.rendered(FOLDER / "training/trainjob")
    (train,), (runtime,) = kube.of_kind(other, "TrainJob"), kube.of_kind(other, "TrainingRuntime")
    trainer = train["spec"]["trainer"]
    assert trainer["args"] == container["args"]
    assert trainer["numNodes"] * trainer["numProcPerNode"] == processes
    assert str(trainer["numProcPerNode"]) == trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"]
    assert train["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    (inside,) = kube.pods([runtime])
    told = {row["name"]: row["value"] for row in inside.spec["containers"][0]["env"]}
    assert inside.spec["terminationGracePeriodSeconds"] > int(told["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])


def test_a_worker_that_goes_lets_its_runs_save(tmp_path: Path) -> None:
    from flows.settings import FlowSettings

    pod = pod_of("overlays/dev", "Deployment/prefect-worker")
    # flows.local waits for the runs, then for what is below them, twice.
    assert pod.spec["terminationGracePeriodSeconds"] > FlowSettings.read(tmp_path).stop_seconds + 4 * 15
