"""The manifests of infra/kubernetes as tests take them: rendered, and what else is in the namespace."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from fakes import manifests as kube
from fakes.manifests import Manifest, Pod

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = REPOSITORY / "infra" / "kubernetes"
OVERLAYS = ("overlays/dev", "overlays/prod")
TRAININGS = ("training/prepare", "training/indexed-job", "training/trainjob")
SERVING = ("serving/cpu", "serving/gpu", "serving/ray")
ALL = (*OVERLAYS, *TRAININGS, *SERVING)
VERSIONS = ("1.32", "1.37")
OURS = ("registry", "mlflow", "prefect", "worker", "serving", "ray")
#: What people or other programs bring, with its keys; docs/how-to/kubernetes.md lists it.
FROM_OUTSIDE = {("ConfigMap", "serving-trust"): {"root.json"}}
DATABASE = {"engine", "host", "port", "dbname", "username", "password"}  # as RDS and Terraform write them
needs_kubectl = pytest.mark.skipif(
    shutil.which("kubectl") is None, reason="kubectl, which renders the manifests, is not installed"
)


def rendered(name: str) -> tuple[Manifest, ...]:
    return kube.rendered(FOLDER / name)


def whole(name: str) -> tuple[Manifest, ...]:
    """What is in the namespace: a training beside production, and what Prefect starts there."""
    if name in TRAININGS:
        return (*rendered("overlays/prod"), *rendered(name))
    return (*rendered(name), flow_run()) if name == "overlays/prod" else rendered(name)


def flow_run() -> Manifest:
    """The Job that the worker of the pool `kubernetes` makes for a run that says nothing special."""
    template = json.loads((REPOSITORY / "flows/pools/kubernetes.json").read_bytes())
    defaults = {name: field.get("default") for name, field in template["variables"]["properties"].items()} | {
        "labels": {},
        "name": "flow-run",
        "env": [],
        "command": ["prefect", "flow-run", "execute"],
    }

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            pairs = {key: filled(one) for key, one in value.items()}
            return {key: one for key, one in pairs.items() if one is not None and one != {}}
        if isinstance(value, list):
            return [filled(one) for one in value]
        if isinstance(value, str) and (found := re.fullmatch(r"{{ (\w+) }}", value)):
            return defaults[found[1]]
        return (
            re.sub(r"{{ (\w+) }}", lambda one: str(defaults[one[1]]), value)
            if isinstance(value, str)
            else value
        )

    job = filled(template["job_configuration"]["job_manifest"])
    job["metadata"] |= {"name": "flow-run"}
    return job


def owned(manifests: tuple[Manifest, ...], owner: str) -> Pod:
    (found,) = (pod for pod in kube.pods(manifests) if pod.owner == owner)
    return found


def from_outside(name: str) -> dict[tuple[str, str], set[str]]:
    """What is not in the manifests: the Secrets above all, with the keys that they will have."""
    there = dict(FROM_OUTSIDE)
    if name == "overlays/dev":
        from infra.kubernetes import secrets

        for one in secrets.manifests(dict.fromkeys(secrets.names(), "{}")):
            there["Secret", one["metadata"]["name"]] = set(one["stringData"])
        return there
    for one in kube.of_kind(whole("overlays/prod"), "ExternalSecret"):
        spec = one["spec"]
        keys = {row["secretKey"] for row in spec.get("data", ())} | (
            DATABASE if "dataFrom" in spec else set()
        )
        there["Secret", spec["target"]["name"]] = set(spec["target"].get("template", {}).get("data", keys))
    return there
