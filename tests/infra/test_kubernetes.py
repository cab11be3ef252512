"""The manifests of the whole platform: valid, restricted, closed, and whole, in each overlay.

Nothing is applied to a cluster here. Each check is also shown a manifest that is broken, and has to say so.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from fakes import manifests as kube
from fakes.manifests import Manifest, Peer, Pod

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = REPOSITORY / "infra" / "kubernetes"
OVERLAYS = ("overlays/dev", "overlays/prod")
TRAININGS = ("training/prepare", "training/indexed-job", "training/trainjob")
SERVING = ("serving/cpu", "serving/gpu", "serving/ray")
ALL = (*OVERLAYS, *TRAININGS, *SERVING)
VERSIONS = ("1.32", "1.37")
OURS = ("registry", "mlflow", "prefect", "worker", "serving")
#: The only one that speaks to the Kubernetes API.
TOKENS = frozenset({"Deployment/prefect-kubernetes-worker"})
#: What people or other programs bring, with its keys; docs/how-to/kubernetes.md lists it.
FROM_OUTSIDE = {("ConfigMap", "serving-trust"): {"root.json"}}
DATABASE = {"engine", "host", "port", "dbname", "username", "password"}  # as RDS and Terraform write them

pytestmark = pytest.mark.skipif(
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


# -- valid --


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", [*OVERLAYS, *TRAININGS, "serving/ray"])
def test_what_kubernetes_knows_is_valid_by_its_own_schemas(name: str, version: str) -> None:
    manifests = [*rendered(name), flow_run()] if name == "overlays/prod" else rendered(name)
    for one in manifests:
        if one["kind"] not in CUSTOM:
            kubernetes_validate.validate(one, version, strict=True)
            continue
        for pod in kube.pods([one]):  # inside of what others define
            as_pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": pod.spec}
            kubernetes_validate.validate(as_pod, version, strict=True)


def _only(required: tuple[str, ...] = (), **fields: Any) -> dict[str, Any]:
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


def _all(**fields: Any) -> dict[str, Any]:
    return _only(tuple(fields), **fields)


_TEXT, _NUMBER, _OBJECT = {"type": "string"}, {"type": "integer"}, {"type": "object"}


def _many(of: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": of, "minItems": 1}


_REMOTE = _all(secretKey=_TEXT, remoteRef=_all(key=_TEXT, property=_TEXT))
#: The part of other projects' definitions that is used here, read in their CustomResourceDefinitions.
CUSTOM: dict[str, tuple[str, dict[str, Any]]] = {
    "ExternalSecret": (
        "external-secrets.io/v1",
        _only(
            ("refreshInterval", "secretStoreRef", "target"),
            refreshInterval={"type": "string", "pattern": "^[0-9]+[smh]$"},
            secretStoreRef=_all(kind={"enum": ["SecretStore"]}, name={"enum": ["aws"]}),
            target=_only(("name",), name=_TEXT, template=_all(data={"additionalProperties": _TEXT})),
            data=_many(_REMOTE),
            dataFrom=_many(_all(extract=_all(key=_TEXT))),
        ),
    ),
    "SecretStore": (
        "external-secrets.io/v1",
        _all(
            provider=_all(
                aws=_all(
                    service={"enum": ["SecretsManager"]},
                    region=_TEXT,
                    auth=_all(jwt=_all(serviceAccountRef=_all(name=_TEXT))),
                )
            )
        ),
    ),
    "ServiceMonitor": (
        "monitoring.coreos.com/v1",
        _all(
            selector=_all(matchLabels=_OBJECT),
            endpoints=_many(
                _all(
                    port=_TEXT, path=_TEXT, interval=_TEXT,
                    authorization=_all(credentials=_all(name=_TEXT, key=_TEXT)),
                )
            ),
        ),
    ),
    "Gateway": (
        "gateway.networking.k8s.io/v1",
        _all(
            gatewayClassName=_TEXT,
            listeners=_many(
                _all(
                    name=_TEXT, hostname=_TEXT, port=_NUMBER, protocol={"enum": ["HTTPS"]},
                    tls=_all(
                        mode={"enum": ["Terminate"]},
                        certificateRefs=_many(_all(kind={"enum": ["Secret"]}, name=_TEXT)),
                    ),
                    allowedRoutes=_all(namespaces=_all(**{"from": {"enum": ["Same"]}})),
                )
            ),
        ),
    ),
    "HTTPRoute": (
        "gateway.networking.k8s.io/v1",
        _all(
            hostnames=_many(_TEXT),
            parentRefs=_many(_all(name=_TEXT)),
            rules=_many(
                _only(
                    ("backendRefs",),
                    backendRefs=_many(_all(name=_TEXT, port=_NUMBER)),
                    timeouts=_all(request={"type": "string", "pattern": "^([0-9]{1,5}(h|m|s|ms)){1,4}$"}),
                )
            ),
        ),
    ),
    "TrainJob": (
        "trainer.kubeflow.org/v1alpha1",
        _all(
            runtimeRef=_all(apiGroup=_TEXT, kind={"enum": ["TrainingRuntime"]}, name=_TEXT),
            trainer=_all(
                args=_many(_TEXT), numNodes=_NUMBER, numProcPerNode=_NUMBER,
                resourcesPerNode=_all(requests=_OBJECT, limits=_OBJECT),
            ),
        ),
    ),
    "TrainingRuntime": (
        "trainer.kubeflow.org/v1alpha1",
        _all(
            mlPolicy=_all(numNodes=_NUMBER, torch=_OBJECT),
            template=_all(
                spec=_all(
                    failurePolicy=_all(maxRestarts=_NUMBER),
                    replicatedJobs=_many(
                        _all(name={"enum": ["node"]}, template=_all(metadata=_OBJECT, spec=_OBJECT))
                    ),
                )
            ),
        ),
    ),
    "ScaledObject": (
        "keda.sh/v1alpha1",
        _only(
            ("scaleTargetRef", "minReplicaCount", "maxReplicaCount", "triggers"),
            scaleTargetRef=_all(apiVersion=_TEXT, kind=_TEXT, name=_TEXT),
            pollingInterval=_NUMBER, minReplicaCount=_NUMBER, maxReplicaCount=_NUMBER,
            fallback=_all(failureThreshold=_NUMBER, replicas=_NUMBER, behavior=_TEXT),
            advanced=_all(horizontalPodAutoscalerConfig=_all(behavior=_OBJECT)),
            triggers=_many(
                _all(
                    type={"enum": ["prometheus"]},
                    metadata=_all(serverAddress=_TEXT, query=_TEXT, threshold={"type": "string"}),
                )
            ),
        ),
    ),
    "RayService": ("ray.io/v1", _OBJECT),
}  # fmt: skip


def custom_problems(manifests: tuple[Manifest, ...]) -> list[str]:
    import jsonschema

    said = []
    for one in manifests:
        if one["kind"] in CUSTOM:
            version, schema = CUSTOM[one["kind"]]
            if one["apiVersion"] != version:
                said.append(f"{one['kind']} has the version {one['apiVersion']}")
            for template in kube.templates(one) if one["kind"] in kube.POD_KINDS else ():
                said += [f"{one['kind']}: a pod has no {key}" for key in set(template) - {"metadata", "spec"}]
            found = jsonschema.Draft202012Validator(schema).iter_errors(one["spec"])
            said += [f"{one['kind']}/{one['metadata']['name']}: {error.message}" for error in found]
    return said


@pytest.mark.parametrize("name", ALL)
def test_what_others_define_has_only_fields_that_they_define(name: str) -> None:
    assert custom_problems(rendered(name)) == []


def test_a_field_that_nobody_defines_is_noticed() -> None:
    for name, way in (
        ("serving/ray", "spec|rayClusterConfig|workerGroupSpecs|0|template|tolerations"),
        ("training/trainjob", "spec|trainer|nodes"),
        ("overlays/prod", "spec|target|names"),
    ):
        broken = list(copy.deepcopy(rendered(name)))
        (first, *_) = (one for one in broken if one["kind"] in ("RayService", "TrainJob", "ExternalSecret"))
        _change(first["kind"], first["metadata"]["name"], way, [])(broken)
        assert custom_problems(tuple(broken)), name


@pytest.mark.skipif(
    "KUBERNETES_CRDS" not in os.environ,
    reason="KUBERNETES_CRDS names no folder with CustomResourceDefinitions",
)
@pytest.mark.parametrize("name", [*ALL, "keda"])
def test_what_others_define_fits_their_own_definitions(name: str, tmp_path: Path) -> None:
    import jsonschema

    definitions = {}
    for path in Path(os.environ["KUBERNETES_CRDS"]).glob("*.yaml"):
        for one in yaml.load_all(path.read_text("utf-8"), yaml.CSafeLoader):
            for version in (one or {}).get("spec", {}).get("versions", ()):
                key = (f"{one['spec']['group']}/{version['name']}", one["spec"]["names"]["kind"])
                definitions[key] = _closed(version["schema"]["openAPIV3Schema"])
    found = [one for one in (rendered(name) if name != "keda" else with_component("keda", tmp_path))
             if one["kind"] in CUSTOM]  # fmt: skip
    for one in found:
        schema = definitions[one["apiVersion"], one["kind"]]
        said = [
            f"{one['kind']}/{one['metadata']['name']}: {list(error.path)}: {error.message[:200]}"
            for error in jsonschema.Draft202012Validator(schema).iter_errors(one)
        ]
        assert said == []


def _closed(schema: Any, top: bool = True) -> Any:
    """A cluster drops fields that a definition does not have; here they are errors."""
    if not isinstance(schema, dict):
        return schema
    made = {key: value for key, value in schema.items() if key != "format"}
    if made.get("x-kubernetes-int-or-string"):
        return {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    if "properties" in made:
        made["properties"] = {key: _closed(one, False) for key, one in made["properties"].items()}
        if not made.get("x-kubernetes-preserve-unknown-fields") and "additionalProperties" not in made:
            made["additionalProperties"] = False
    for key in ("items", "additionalProperties"):
        if isinstance(made.get(key), dict):
            made[key] = _closed(made[key], False)
    if top:
        made["properties"]["metadata"] = {"type": "object"}
    return made


def with_component(component: str, folder: Path) -> tuple[Manifest, ...]:
    """Serving on a GPU with one more component of serving/."""
    shutil.copytree(FOLDER / "serving", folder / "serving")
    overlay = folder / "serving" / "gpu" / "kustomization.yaml"
    overlay.write_text(overlay.read_text() + f"components: [../{component}]\n")
    return kube.rendered(overlay.parent)


# -- restricted --


@pytest.mark.parametrize("name", ALL)
def test_every_pod_passes_the_restricted_standard(name: str) -> None:
    pods = kube.pods(whole(name))
    assert pods
    said = [line for pod in pods for line in kube.restricted_problems(pod, TOKENS)]
    # A run may use all CPUs of its node that nobody else does.
    assert [line for line in said if line != "Job/flow-run: container prefect-job: no limits of cpu"] == []


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_namespace_enforces_it(name: str) -> None:
    (namespace,) = kube.of_kind(rendered(name), "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert {one["metadata"].get("namespace", kube.NAMESPACE) for one in rendered(name)} == {kube.NAMESPACE}


# -- whole --


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


@pytest.mark.parametrize("name", [*OVERLAYS, *TRAININGS])
def test_everything_that_a_pod_refers_to_is_there(name: str) -> None:
    assert kube.reference_problems(whole(name), from_outside(name)) == []


def test_both_overlays_have_the_same_secrets() -> None:
    """But for those of what runs in one of them only, and for credentials that roles take the place of."""
    dev, prod = from_outside("overlays/dev"), from_outside("overlays/prod")
    assert set(dev) - set(prod) == {("Secret", "s3")}
    assert set(prod) - set(dev) == {("Secret", "serving-monitoring"), ("Secret", "backup")}
    credentials = {"aws-access-key-id", "aws-secret-access-key", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
    for secret in set(dev) & set(prod):
        assert dev[secret] - credentials <= prod[secret], secret


def test_in_production_credentials_are_roles() -> None:
    manifests = rendered("overlays/prod")
    for pod in kube.pods(manifests):
        variables = {row["name"] for one in pod.containers for row in one.get("env", ())}
        assert not {name for name in variables if name.startswith("AWS_")}, pod.owner
    accounts = {one["metadata"]["name"]: one for one in kube.of_kind(manifests, "ServiceAccount")}
    roles = {
        name: one["metadata"]["annotations"]["eks.amazonaws.com/role-arn"]
        for name, one in accounts.items()
        if "annotations" in one["metadata"]
    }
    assert set(roles) == {"serving", "mlflow", "worker", "backup", "external-secrets"}
    assert len(set(roles.values())) == len(roles), "one role each"
    for pod in kube.pods(manifests):
        if pod.labels.get("adapter-foundry/calls-s3") == "true":
            assert pod.spec["serviceAccountName"] in roles


@pytest.mark.parametrize("name", [*OVERLAYS, "training/indexed-job"])
def test_every_service_leads_to_a_port_that_a_pod_listens_on(name: str) -> None:
    assert kube.of_kind(rendered(name), "Service")
    assert kube.service_problems(rendered(name)) == []


def test_nothing_secret_is_in_the_tree() -> None:
    for name in ALL:
        assert kube.of_kind(rendered(name), "Secret") == []
        for pod in kube.pods(rendered(name)):
            for row in (row for one in pod.containers for row in one.get("env", ())):
                hidden = re.search("PASSWORD|SECRET|TOKEN|AUTH_STRING$", row["name"])
                assert "valueFrom" in row or not hidden or row["name"].endswith(("_NAME", "_KEY")), row[
                    "name"
                ]
    ignored = subprocess.run(
        ["git", "check-ignore", "infra/kubernetes/overlays/dev/.env"], cwd=REPOSITORY, capture_output=True
    )
    if (REPOSITORY / ".git").exists():
        assert ignored.returncode == 0, "git would take the secrets of overlays/dev"
        tracked = subprocess.run(
            ["git", "ls-files", "infra/kubernetes"],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
        assert not [path for path in tracked if path.endswith(".env")]


# -- closed --

GATEWAY = Peer(labels={}, namespace={"adapter-foundry/gateway": "true"}, ports={})
CALLER = Peer(labels={}, namespace={"adapter-foundry/may-call": "serving"}, ports={})
STRANGER = Peer(labels={}, namespace={"kubernetes.io/metadata.name": "default"}, ports={})
NAMES = Peer(
    labels={"k8s-app": "kube-dns"},
    namespace={"kubernetes.io/metadata.name": "kube-system"},
    ports={"dns": 53},
)
#: A pod that nobody foresaw, and one that no rule holds back from calling.
NOBODY = Peer(labels={}, ports={"any": 1})
INTRUDER = Peer(labels={}, ports={}, free=True)
OUTSIDE = {
    "gateway": GATEWAY, "caller": CALLER, "stranger": STRANGER, "names": NAMES, "nobody": NOBODY,
    "intruder": INTRUDER,
}  # fmt: skip
TO_MLFLOW, TO_PREFECT = ("Deployment/mlflow", 5000), ("StatefulSet/prefect-server", 4200)
TO_POSTGRES, TO_S3, TO_SERVING = (
    ("StatefulSet/postgres", 5432),
    ("StatefulSet/s3", 8333),
    ("Deployment/serving", 8400),
)
EDGES = {
    "overlays/dev": {
        "Deployment/mlflow": {TO_POSTGRES, TO_S3},
        "Deployment/serving": {TO_POSTGRES, TO_S3},
        "Deployment/prefect-worker": {TO_MLFLOW, TO_PREFECT, TO_POSTGRES, TO_S3},
        "StatefulSet/prefect-server": {TO_POSTGRES},
        "Job/registry-init": {TO_MLFLOW, TO_POSTGRES, TO_S3},
        "caller": {TO_SERVING},
    },
    "overlays/prod": {
        "Deployment/prefect-worker": {TO_MLFLOW, TO_PREFECT},
        "Deployment/prefect-kubernetes-worker": {TO_PREFECT},
        "Job/flow-run": {TO_MLFLOW, TO_PREFECT},
        "caller": {TO_SERVING},
        "gateway": {TO_SERVING, TO_MLFLOW, TO_PREFECT},
    },
}
TRAINING_EDGES = {
    "training/prepare": {},
    "training/indexed-job": {"Job/training": {TO_MLFLOW}},
    "training/trainjob": {"TrainingRuntime/adapter-foundry": {TO_MLFLOW}},
}
VPC, AWS = "10.0.0.0/16", "0.0.0.0/0"
WAYS_OUT = {
    "Deployment/mlflow": {(VPC, 5432), (VPC, 443), (AWS, 443)},
    "Deployment/serving": {(VPC, 5432), (VPC, 443), (AWS, 443)},
    "Deployment/prefect-worker": {(VPC, 5432), (VPC, 443), (AWS, 443)},
    "Deployment/prefect-kubernetes-worker": {(VPC, 443), ("172.20.0.1/32", 443)},
    "StatefulSet/prefect-server": {(VPC, 5432)},
    "Job/databases": {(VPC, 5432)},
    "Job/flow-run": {(VPC, 5432), (VPC, 443), (AWS, 443)},
    "CronJob/backup": {(VPC, 5432), (VPC, 443), (AWS, 443)},
}


def edges(manifests: tuple[Manifest, ...]) -> dict[str, set[tuple[str, int]]]:
    """Who reaches whom on which port, names (DNS) left out."""
    found: dict[str, set[tuple[str, int]]] = {}
    for source, target, port in kube.reach(manifests, OUTSIDE):
        if target != "names":
            found.setdefault(source, set()).add((target, port))
    return found


@pytest.mark.parametrize("name", OVERLAYS)
def test_pods_reach_what_they_need_and_nothing_else(name: str) -> None:
    assert edges(whole(name)) == EDGES[name]


@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_reaches_its_index_and_its_own_nodes(name: str) -> None:
    expected = {**EDGES["overlays/prod"], **TRAINING_EDGES[name]}
    del expected["Job/flow-run"]
    assert edges(whole(name)) == expected
    for pod in kube.pods(rendered(name)):
        mine = kube.peer(pod)
        assert kube.may_connect(whole(name), mine, mine, 29500) is (name != "training/prepare")
        assert kube.way_out(whole(name), pod) == (
            set() if name != "training/prepare" else {(VPC, 443), (AWS, 443)}
        )


def test_in_production_the_way_out_is_databases_and_https() -> None:
    manifests = whole("overlays/prod")
    assert {pod.owner: kube.way_out(manifests, pod) for pod in kube.pods(manifests)} == WAYS_OUT
    for policy in kube.of_kind(manifests, "NetworkPolicy"):
        for rule in policy["spec"].get("egress", ()):
            for block in (end["ipBlock"] for end in rule["to"] if "ipBlock" in end):
                closed = "169.254.0.0/16" in block.get("except", ()) or block["cidr"] != AWS
                assert closed, "the metadata service of the node has the role of the node"


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_pod_may_ask_for_names(name: str) -> None:
    manifests = whole(name)
    assert all(kube.may_connect(manifests, kube.peer(pod), NAMES, 53) for pod in kube.pods(manifests))


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_rule_into_a_pod_is_a_port_of_its_service(name: str) -> None:
    manifests = rendered(name)
    for policy in kube.of_kind(manifests, "NetworkPolicy"):
        chosen = [
            pod for pod in kube.pods(manifests) if kube.matches(policy["spec"]["podSelector"], pod.labels)
        ]
        assert chosen, f"{policy['metadata']['name']} is for nobody"
        for rule in policy["spec"].get("ingress", ()):
            assert rule["from"]
            for pod in chosen:
                ports = kube.peer(pod).ports
                served = {
                    ports.get(port["targetPort"], port["targetPort"])
                    for service in kube.of_kind(manifests, "Service")
                    if kube.matches({"matchLabels": service["spec"]["selector"]}, pod.labels)
                    for port in service["spec"]["ports"]
                }
                assert {ports.get(row["port"], row["port"]) for row in rule["ports"]} <= served


def test_the_gateway_leads_to_services_and_their_certificate() -> None:
    manifests = rendered("overlays/prod")
    (gateway,) = kube.of_kind(manifests, "Gateway")
    routes = kube.of_kind(manifests, "HTTPRoute")
    assert {route["metadata"]["name"] for route in routes} == {"serving", "mlflow", "prefect-server"}
    for route in routes:
        assert route["spec"]["parentRefs"] == [{"name": gateway["metadata"]["name"]}]
        (listener,) = gateway["spec"]["listeners"]
        suffix = listener["hostname"].removeprefix("*")
        assert all(host.endswith(suffix) for host in route["spec"]["hostnames"])
        for back in route["spec"]["rules"][0]["backendRefs"]:
            service = kube.named(manifests, "Service", back["name"])
            assert back["port"] in {port["port"] for port in service["spec"]["ports"]}
    (host,) = kube.named(manifests, "HTTPRoute", "mlflow")["spec"]["hostnames"]
    settings = kube.named(manifests, "ConfigMap", "mlflow-settings")["data"]
    assert host in settings["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
    (host,) = kube.named(manifests, "HTTPRoute", "prefect-server")["spec"]["hostnames"]
    settings = kube.named(manifests, "ConfigMap", "prefect-settings")["data"]
    assert settings["PREFECT_SERVER_UI_API_URL"] == f"https://{host}/api"
    assert settings["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"] == f"https://{host}"


def test_the_kubernetes_worker_may_make_jobs_and_nothing_else() -> None:
    manifests = rendered("overlays/prod")
    (role,) = kube.of_kind(manifests, "Role")
    rights = {
        (group, resource): set(rule["verbs"])
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }
    look = {"get", "list", "watch"}
    assert rights == {
        ("batch", "jobs"): look | {"create", "delete"},
        ("", "pods"): look,
        ("", "pods/log"): look,
    }
    (binding,) = kube.of_kind(manifests, "RoleBinding")
    assert [one["name"] for one in binding["subjects"]] == ["prefect-kubernetes-worker"]
    assert not kube.of_kind(manifests, "ClusterRole")
    with_token = [pod for pod in kube.pods(manifests) if pod.spec["automountServiceAccountToken"]]
    assert [pod.spec["serviceAccountName"] for pod in with_token] == ["prefect-kubernetes-worker"]


# -- settings, commands, probes --


def variables(
    manifests: tuple[Manifest, ...], outside: dict[tuple[str, str], set[str]], pod: Pod
) -> dict[str, str]:
    """Environment of a pod; values that are secret are a word."""
    found: dict[str, str] = {}
    for container in pod.containers:
        for source in container.get("envFrom", ()):
            if "configMapRef" in source:
                found |= kube.named(manifests, "ConfigMap", source["configMapRef"]["name"])["data"]
            else:
                found |= dict.fromkeys(outside["Secret", source["secretRef"]["name"]], "word")
        for row in container.get("env", ()):
            found[row["name"]] = row.get("value", "word")
    return found


#: What programs that are not ours read, by who documents it.
KNOWN = {
    "libpq": {"PGHOST", "PGPORT", "PGUSER", "PGPASSWORD", "PGSSLMODE", "PGDATA", "POSTGRES_PASSWORD"},
    "botocore": {"AWS_REGION", "AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"},
    "libraries": {"HOME", "HF_HOME", "HF_HUB_OFFLINE", "DO_NOT_TRACK", "RAY_USAGE_STATS_ENABLED"},
    "torch": {"OMP_NUM_THREADS", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"},
    "the command line of the backup": {
        "BACKUP_PLACE", "MLFLOW_DATABASE", "PREFECT_DATABASE", "SERVING_DATABASE",
    },
}  # fmt: skip


def unknown_variables(names: set[str]) -> set[str]:
    """Variables of nobody; ours are checked by our settings themselves."""
    import mlflow.environment_variables as of_mlflow
    from mlflow.cli import server
    from prefect.settings import Settings
    from prefect.settings.legacy import _get_settings_fields
    from prefect_kubernetes.settings import KubernetesSettings
    from torch.distributed.run import get_args_parser

    def nested(model: Any) -> Iterator[str]:
        prefix = model.model_config["env_prefix"]
        for field, about in model.model_fields.items():
            inner = getattr(about.annotation, "model_fields", None)
            yield from nested(about.annotation) if inner else [f"{prefix}{field}".upper()]

    known = (
        set().union(*KNOWN.values()) | set(_get_settings_fields(Settings)) | set(nested(KubernetesSettings))
    )
    known |= {name for name in vars(of_mlflow) if name.startswith("MLFLOW_")}
    known |= {str(option.envvar) for option in server.params if getattr(option, "envvar", None)}
    known |= {f"PET_{action.dest.upper()}" for action in get_args_parser()._actions}
    return {name for name in names if not name.startswith("ADAPTER_FOUNDRY_")} - known


@pytest.mark.parametrize("name", [*OVERLAYS, *TRAININGS])
def test_every_variable_means_something_to_somebody(name: str, tmp_path: Path) -> None:
    from flows.settings import FlowSettings
    from registry.settings import home, layout, load
    from serving.settings import load as serving_settings

    manifests, outside = whole(name), from_outside(name)
    for pod in kube.pods(manifests):
        found = variables(manifests, outside, pod)
        assert unknown_variables(set(found)) == set(), pod.owner
        ours = {key: value for key, value in found.items() if key.startswith("ADAPTER_FOUNDRY_")}
        if not ours:
            continue
        ours["ADAPTER_FOUNDRY_SERVING_JOBS"] = "postgresql+psycopg:///serving"
        assert layout(tmp_path, ours).settings.actor is None  # refuses what it does not know
        serving_settings(ours, home=tmp_path)
        load("flows", FlowSettings, ours, data_folder=tmp_path)
        assert home(ours).is_absolute()
        if "ADAPTER_FOUNDRY_STORE" in ours:
            assert ours["ADAPTER_FOUNDRY_STORE"].startswith("s3://")


def words(container: dict[str, Any]) -> list[str]:
    return [*container.get("command", ()), *container.get("args", ())]


def command_problems(line: list[str]) -> list[str]:
    """What is wrong with a command of one of our images."""
    program, *rest = line
    if program == "sh" and rest[0] == "-c":
        code, line = _said_by_shell(rest[1])
        return command_problems(line) if code == 0 else [f"the shell says {code}"]
    if program == "sh":
        return [] if rest == ["/etc/scripts/databases.sh"] else [f"no script {rest}"]
    if program == "torchrun":
        from importlib.util import find_spec

        from torch.distributed.run import get_args_parser

        given = get_args_parser().parse_args(rest)
        module = find_spec(given.training_script) if given.module else None
        return [] if module is not None and len(given.training_script_args) == 1 else [f"no module in {rest}"]
    return _click_problems(*_click_command(line)) if program != "prefect" else _prefect_problems(rest)


def _said_by_shell(script: str) -> tuple[int, list[str]]:
    """What a script runs in the end, where its programs do nothing but say how they were called."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("registry", "serving", "prefect", "python"):
            program = Path(folder) / name
            program.write_text(
                f"#!/bin/sh\nprintf '%s\\n' {name} \"$@\"\n" if name != "python" else "#!/bin/sh\necho V\n"
            )
            program.chmod(0o755)
        done = subprocess.run(
            ["/bin/sh", "-c", script], env={"PATH": folder}, capture_output=True, text=True, cwd=folder
        )
        return done.returncode, done.stdout.splitlines()


def _click_command(line: list[str]) -> tuple[Any, list[str]]:
    from importlib import import_module

    programs = {"registry": "registry.cli:cli", "serving": "serving.cli:cli", "trainer": "trainer.cli:cli",
                "mlflow": "mlflow.cli:cli"}  # fmt: skip
    program, *rest = line
    if program == "python":
        assert rest[0] == "-m"
        return import_module(rest[1]).main, rest[2:]
    module, _, attribute = programs[program].partition(":")
    command = getattr(import_module(module), attribute)
    while hasattr(command, "commands") or hasattr(command, "get_command"):
        name, *rest = rest
        below = command.get_command(None, name)
        if below is None:
            return None, [name]
        command = below
    return command, rest


def _click_problems(command: Any, rest: list[str]) -> list[str]:
    import click

    if command is None:
        return [f"no command {rest[0]}"]
    try:
        context = click.Context(command, ignore_unknown_options=False)
        _, left, _ = command.make_parser(context).parse_args(list(rest))
    except click.UsageError as error:
        return [error.format_message()]
    return [f"left over: {left}"] if left else []


def _prefect_problems(rest: list[str]) -> list[str]:
    path = [word for word in itertools.takewhile(lambda word: word not in ("--prefect-file",), rest)
            if not word.startswith("--")][:2]  # fmt: skip
    options = {word.partition("=")[0] for word in rest if word.startswith("--")} - {"--no-prompt"}
    return [f"prefect {' '.join(path)} has no {one}" for one in options if one not in _prefect_help(*path)]


@cache
def _prefect_help(*path: str) -> set[str]:
    """Every option that the help of one of Prefect's commands names."""
    shown = subprocess.run(
        [sys.executable, "-P", "-m", "prefect", *path, "--help"], capture_output=True, text=True,
        env={**os.environ, "COLUMNS": "300"}, check=True,
    ).stdout  # fmt: skip
    return set(re.findall(r"--[a-z-]+", shown))


@pytest.mark.parametrize("name", [*OVERLAYS, *TRAININGS, "serving/gpu"])
def test_every_command_exists_with_its_options(name: str) -> None:
    manifests = rendered(name)
    ours = [
        (pod.owner, words(container))
        for pod in kube.pods(manifests)
        for container in pod.containers
        if "adapter-foundry" in container["image"]
    ]
    ours += [("TrainJob", one["spec"]["trainer"]["args"]) for one in kube.of_kind(manifests, "TrainJob")]
    assert ours
    given = [(owner, line) for owner, line in ours if line]
    assert [(owner, line, said) for owner, line in given if (said := command_problems(line))] == []


def test_a_launcher_does_not_get_the_place_of_the_image() -> None:
    """tini, the entry point of our images, ends what a shell leaves behind; serving needs no parent."""
    for name in (*OVERLAYS, *TRAININGS):
        for pod in kube.pods(rendered(name)):
            for container in pod.containers:
                if "command" in container and "adapter-foundry" in container["image"]:
                    assert pod.owner == "Deployment/serving"


def routes() -> dict[str, set[str]]:
    """Paths that each server answers, by the name of its container."""
    import mlflow.server
    from prefect.server.api.server import create_api_app
    from prefect.workers.server import _build_healthcheck_server

    from fakes.backends import DrawingBackend
    from serving.http.app import service_app
    from serving.settings import ServingSettings

    health = _build_healthcheck_server(lambda: True).config.app
    return {
        "mlflow": {rule.rule for rule in mlflow.server.app.url_map.iter_rules()},
        "prefect-server": {f"/api{path}" for path in create_api_app().openapi()["paths"]},
        "prefect-kubernetes-worker": set(health.openapi()["paths"]),
        "serving": set(service_app(DrawingBackend(), ServingSettings()).openapi()["paths"]),
        "s3": {"/healthz"},  # test_kubernetes_running.py asks a real one
    }


def test_probes_ask_what_the_servers_answer() -> None:
    answered, asked = routes(), set()
    for name in OVERLAYS:
        for pod in kube.pods(rendered(name)):
            for container in pod.containers:
                probes = {key: one for key, one in container.items() if key.endswith("Probe")}
                for probe in probes.values():
                    if "httpGet" in probe:
                        assert probe["httpGet"]["path"] in answered[container["name"]]
                        assert probe["httpGet"]["port"] in {port["name"] for port in container["ports"]}
                        asked.add(container["name"])
                if container.get("ports"):
                    assert {"startupProbe", "livenessProbe", "readinessProbe"} <= set(probes), pod.owner
    assert asked == set(answered)


# -- images, amounts, disruption --


def image_problems(manifests: tuple[Manifest, ...], digests: bool) -> list[str]:
    from importlib.metadata import version

    said = []
    for pod in kube.pods(manifests):
        for image in (one["image"] for one in pod.containers):
            name, _, tag = image.partition("@")[0].partition(":")
            if digests and not re.search(r"@sha256:[0-9a-f]{64}$", image):
                said.append(f"{image} has no digest")
            if not digests and (not tag or "latest" in tag):
                said.append(f"{image} has no version")
            if "adapter-foundry" in name:
                if name.rpartition("adapter-foundry/")[2] not in OURS:
                    said.append(f"nobody builds {name}")
                if not digests and tag.removesuffix("-cuda") != version("adapter-foundry"):
                    said.append(f"{image} is another version")
    return said


@pytest.mark.parametrize("name", [*OVERLAYS, *TRAININGS])
def test_images_have_a_version_and_in_production_a_digest(name: str) -> None:
    assert image_problems(rendered(name), digests=name == "overlays/prod") == []


def quota_problems(manifests: tuple[Manifest, ...]) -> list[str]:
    """Whether all replicas at once fit into what the namespace may take."""
    hard = kube.named(manifests, "ResourceQuota", "namespace")["spec"]["hard"]
    total = dict.fromkeys(("cpu", "memory", "nvidia.com/gpu"), 0.0)
    most = {one["spec"]["scaleTargetRef"]["name"]: one["spec"]["maxReplicas"]
            for one in kube.of_kind(manifests, "HorizontalPodAutoscaler")}  # fmt: skip
    for one in manifests:
        if one["kind"] in kube.POD_KINDS:
            spec = one["spec"]
            count = most.get(one["metadata"]["name"], spec.get("replicas", spec.get("parallelism", 1)))
            for pod in kube.pods([one]):
                for resource in total:
                    total[resource] += count * kube.requested(pod, "requests", resource)
    return [
        f"{total[resource]:g} of {resource}, and the quota is {hard['requests.' + resource]}"
        for resource in total
        if total[resource] > kube.amount(hard["requests." + resource])
    ]


@pytest.mark.parametrize("name", [*OVERLAYS, *TRAININGS])
def test_all_of_it_fits_into_the_quota(name: str) -> None:
    assert quota_problems(whole(name)) == []


def test_a_laptop_is_enough_for_the_small_overlay() -> None:
    pods = kube.pods(rendered("overlays/dev"))
    assert sum(kube.requested(pod, "requests", "cpu") for pod in pods) <= 8
    assert sum(kube.requested(pod, "requests", "memory") for pod in pods) <= 16 * 2**30


def disruption_problems(manifests: tuple[Manifest, ...]) -> list[str]:
    said = []
    scaled = {one["spec"]["scaleTargetRef"]["name"]: one["spec"]["minReplicas"]
              for one in kube.of_kind(manifests, "HorizontalPodAutoscaler")}  # fmt: skip
    budgets = kube.of_kind(manifests, "PodDisruptionBudget")
    for one in kube.of_kind(manifests, "Deployment"):
        name, template = one["metadata"]["name"], one["spec"]["template"]
        least = scaled.get(name, one["spec"]["replicas"])
        mine = [
            row for row in budgets if kube.matches(row["spec"]["selector"], template["metadata"]["labels"])
        ]
        if least > 1 and len(mine) != 1:
            said.append(f"{name} has {least} replicas and {len(mine)} budgets")
        if least == 1 and mine:
            said.append(f"a budget for {name}, which is alone, would stop every drain or mean nothing")
        if any(row["spec"]["maxUnavailable"] >= least for row in mine):
            said.append(f"all of {name} may go at once")
    covered = sum(len([row for row in budgets if kube.matches(row["spec"]["selector"], pod.labels)])
                  for pod in kube.pods(manifests))  # fmt: skip
    return said if covered == len(budgets) else [*said, "a budget is for nobody"]


@pytest.mark.parametrize("name", OVERLAYS)
def test_a_drain_takes_one_at_a_time(name: str) -> None:
    assert disruption_problems(rendered(name)) == []


@pytest.mark.parametrize("name", [*OVERLAYS, *TRAININGS])
def test_serving_goes_before_the_platform_and_training_waits(name: str) -> None:
    manifests = whole(name)
    value = {one["metadata"]["name"]: one for one in kube.of_kind(manifests, "PriorityClass")}
    serving, platform, training = (
        value[f"adapter-foundry-{one}"] for one in ("serving", "platform", "training")
    )
    assert serving["value"] > platform["value"] > training["value"]
    assert training["preemptionPolicy"] == "Never"
    for pod in kube.pods(manifests):
        gpu = any("nvidia.com/gpu" in one["resources"]["limits"] for one in pod.containers)
        expected = "serving" if pod.owner == "Deployment/serving" else "training" if gpu else "platform"
        if not pod.owner.startswith("TrainingRuntime"):
            assert pod.spec["priorityClassName"] == f"adapter-foundry-{expected}", pod.owner


# -- keda --


def test_keda_takes_the_place_of_the_autoscaler(tmp_path: Path) -> None:
    from prometheus_client import generate_latest

    from serving.metrics import Metrics

    (ours,) = kube.of_kind(rendered("serving/gpu"), "HorizontalPodAutoscaler")
    manifests = with_component("keda", tmp_path)
    assert custom_problems(manifests) == []
    assert kube.of_kind(manifests, "HorizontalPodAutoscaler") == [], "two autoscalers would fight"
    (scaled,) = kube.of_kind(manifests, "ScaledObject")
    spec = scaled["spec"]
    assert spec["scaleTargetRef"] == ours["spec"]["scaleTargetRef"]
    assert (spec["minReplicaCount"], spec["maxReplicaCount"]) == (
        ours["spec"]["minReplicas"],
        ours["spec"]["maxReplicas"],
    )
    assert spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"] == ours["spec"]["behavior"]
    (trigger,) = spec["triggers"]
    (metric,) = re.findall(r"foundry_\w+", trigger["metadata"]["query"])
    assert f"\n{metric} " in generate_latest(Metrics().registry).decode()
    assert trigger["metadata"]["threshold"] == ours["spec"]["metrics"][0]["pods"]["target"]["averageValue"]


# -- the secrets of a laptop --


def test_the_secrets_of_a_laptop_are_made_once_and_for_their_owner_only(tmp_path: Path) -> None:
    from infra.kubernetes import secrets

    file = tmp_path / ".env"
    secrets.make(file)
    assert file.stat().st_mode & 0o777 == 0o600
    first = secrets.read(file)
    secrets.make(file)
    assert secrets.read(file) == first, "databases keep their passwords"
    assert len(set(first.values())) == len(first)
    made = {one["metadata"]["name"]: one["stringData"] for one in secrets.manifests(first)}
    for one in secrets.manifests(first):
        kubernetes_validate.validate(one, VERSIONS[0], strict=True)
    identities = {row["name"]: row for row in json.loads(made["s3"]["s3.json"])["identities"]}
    assert not [action for action in identities["reader"]["actions"] if action.startswith(("Write", "Admin"))]
    assert {action.partition(":")[2] for action in identities["mlflow"]["actions"]} == {"mlflow"}
    assert first["SERVING_API_KEY"] not in made["serving-keys"]["keys.json"], "serving knows digests only"


def test_missing_open_and_half_secrets_are_explained(tmp_path: Path) -> None:
    from infra.kubernetes import secrets
    from registry.errors import UsageError

    with pytest.raises(UsageError, match="secrets of overlays/dev are missing") as caught:
        secrets.read(tmp_path / ".env")
    assert "python -m infra.kubernetes.secrets" in caught.value.mend
    file = tmp_path / ".env"
    secrets.make(file)
    file.chmod(0o644)
    with pytest.raises(UsageError, match="others may read"):
        secrets.read(file)
    file.chmod(0o600)
    file.write_text("".join(line for line in file.open() if not line.startswith("MLFLOW_ADMIN")))
    with pytest.raises(UsageError, match="no value for MLFLOW_ADMIN_PASSWORD"):
        secrets.read(file)


# -- every check above sees what it is for --


def _change(kind: str, name: str, path: str, value: Any) -> Callable[[list[Manifest]], None]:
    """Set (or with None remove) a field of a manifest; numbers in the path are places in lists."""

    def change(manifests: list[Manifest]) -> None:
        *way, last = [int(part) if part.isdigit() else part for part in path.split("|")]
        place: Any = kube.named(manifests, kind, name)
        for part in way:
            place = place[part]
        if value is None:
            del place[last]
        else:
            place[last] = value

    return change


def _drop(kind: str, name: str) -> Callable[[list[Manifest]], None]:
    return lambda manifests: manifests.remove(kube.named(manifests, kind, name))


_POD, _FIRST = "spec|template|spec", "spec|template|spec|containers|0"
_LABELS = "spec|template|metadata|labels"
_BITES: dict[str, tuple[str, Callable[[list[Manifest]], None]]] = {
    "restricted: root": ("r", _change("Deployment", "mlflow", f"{_POD}|securityContext|runAsNonRoot", False)),
    "restricted: seccomp": (
        "r", _change("Deployment", "mlflow", f"{_POD}|securityContext|seccompProfile", None),
    ),
    "restricted: capabilities": (
        "r", _change("StatefulSet", "s3", f"{_FIRST}|securityContext|capabilities", None),
    ),
    "restricted: writable root": (
        "r", _change("StatefulSet", "postgres", f"{_FIRST}|securityContext|readOnlyRootFilesystem", False),
    ),
    "restricted: token": (
        "r", _change("Deployment", "prefect-worker", f"{_POD}|automountServiceAccountToken", True),
    ),
    "restricted: host path": (
        "r", _change("Deployment", "mlflow", f"{_POD}|volumes|0|hostPath", {"path": "/"}),
    ),
    "restricted: service links": ("r", _change("Deployment", "mlflow", f"{_POD}|enableServiceLinks", True)),
    "restricted: no limits": ("r", _change("Deployment", "mlflow", f"{_FIRST}|resources|limits", None)),
    "references: account": ("f", _drop("ServiceAccount", "mlflow")),
    "references: settings": ("f", _drop("ConfigMap", "platform-settings")),
    "references: claim": ("f", _drop("PersistentVolumeClaim", "adapter-foundry")),
    "references: key": (
        "f", _change("Deployment", "mlflow", f"{_FIRST}|env|0|valueFrom|secretKeyRef|key", "hots"),
    ),
    "references: volume": ("f", _change("StatefulSet", "s3", f"{_FIRST}|volumeMounts|0|name", "date")),
    "network: open": ("n", _drop("NetworkPolicy", "default-deny")),
    "network: way out": ("n", _drop("NetworkPolicy", "to-postgres")),
    "network: way in": ("n", _drop("NetworkPolicy", "mlflow")),
    "network: everybody": ("n", _change("NetworkPolicy", "s3", "spec|ingress|0|from|0|podSelector", {})),
    "network: port": ("n", _change("NetworkPolicy", "postgres", "spec|ingress|0|ports|0|port", 5433)),
    "network: more labels": (
        "n",
        _change("Deployment", "serving", f"{_LABELS}|adapter-foundry/calls-mlflow", "true"),
    ),
    "services: selector": ("s", _change("Service", "mlflow", "spec|selector", {"app": "nobody"})),
    "services: port": ("s", _change("Service", "mlflow", "spec|ports|0|targetPort", "web")),
    "images: latest": (
        "i", _change("Deployment", "mlflow", f"{_FIRST}|image", "adapter-foundry/mlflow:latest"),
    ),
    "images: unknown": (
        "i", _change("Deployment", "mlflow", f"{_FIRST}|image", "adapter-foundry/flow:0.1.0"),
    ),
    "quota": ("q", _change("Deployment", "mlflow", f"{_FIRST}|resources|requests|memory", "5Ti")),
    "disruption": ("d", _change("Deployment", "mlflow", "spec|replicas", 2)),
}  # fmt: skip


@pytest.mark.parametrize("bite", _BITES)
def test_a_broken_manifest_is_noticed(bite: str) -> None:
    check, change = _BITES[bite]
    broken = list(copy.deepcopy(rendered("overlays/dev")))
    change(broken)
    manifests = tuple(broken)
    said = {
        "r": lambda: [line for pod in kube.pods(manifests) for line in kube.restricted_problems(pod, TOKENS)],
        "f": lambda: kube.reference_problems(manifests, from_outside("overlays/dev")),
        "n": lambda: [] if edges(manifests) == EDGES["overlays/dev"] else ["other edges"],
        "s": lambda: kube.service_problems(manifests),
        "i": lambda: image_problems(manifests, digests=False),
        "q": lambda: quota_problems(manifests),
        "d": lambda: disruption_problems(manifests),
    }[check]()
    assert said, f"nobody noticed: {bite}"


@pytest.mark.parametrize(
    "line",
    [
        "registry initialise", "registry init --serve", "serving serve --forever", "mlflow serve",
        "mlflow server --port=5000 --no-such", "python -m flows.local --limits 2",
        "prefect worker start --pools x",
        "torchrun --module trainer.lunch /data/job.json", "torchrun --nodes 2 --module trainer.launch j",
        "sh -c 'registry trust pint root.json'", "sh -c 'if then'",
    ],
)  # fmt: skip
def test_a_command_that_is_not_there_is_noticed(line: str) -> None:
    try:
        said = command_problems(shlex.split(line))
    except SystemExit as error:  # argparse
        said = [str(error)]
    assert said


@pytest.mark.parametrize("name", ["PREFECT_SERVER_PORT", "MLFLOW_SERVER_HOSTS", "PET_NODES", "TORCH_TIMEOUT"])
def test_a_variable_that_nobody_reads_is_noticed(name: str) -> None:
    assert unknown_variables({name}) == {name}
