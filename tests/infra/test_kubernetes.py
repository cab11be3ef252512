"""The manifests of the whole platform: restricted, closed, and whole, in each overlay.

Nothing is applied to a cluster here. Each check is also shown a manifest that is broken, and has to say so.
"""

from __future__ import annotations

import copy
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import kubernetes_validate
import pytest

from fakes import manifests as kube
from fakes.manifests import Manifest, Peer, changed
from fakes.platform_manifests import (
    ALL,
    OURS,
    OVERLAYS,
    REPOSITORY,
    TRAININGS,
    VERSIONS,
    flow_run,
    from_outside,
    needs_kubectl,
    owned,
    rendered,
    whole,
)
from flows import pools
from flows.pools import KUBERNETES, POD_HOME
from flows.settings import FlowSettings
from registry.errors import UsageError
from registry.settings import layout, load

pytestmark = needs_kubectl


#: The only one that speaks to the Kubernetes API.
TOKENS = frozenset({"Deployment/prefect-kubernetes-worker"})


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


TERRAFORM = REPOSITORY / "infra" / "terraform" / "aws"


def terraform_accounts() -> set[str]:
    """The service accounts that Terraform makes a role for."""
    return set(re.findall(r'service_account = "([\w-]+)"', (TERRAFORM / "identity.tf").read_text("utf-8")))


def signs_as(policy: str) -> set[str]:
    """The roles of the registry that a policy of Terraform lets somebody sign as."""
    statements = json.loads((TERRAFORM / "policies" / f"{policy}.json").read_text("utf-8"))["Statement"]
    (signing,) = (row["Resource"] for row in statements if row["Action"] == "kms:Sign")
    return set(re.findall(r"\$\{(\w+)_key\}", json.dumps(signing)))


@pytest.mark.parametrize(
    ("owner", "policy"),
    [("Deployment/prefect-worker", "publish"), ("Job/flow-run", "publish"), ("CronJob/garbage", "maintain")],
)
def test_in_production_whoever_may_sign_knows_its_keys(owner: str, policy: str, tmp_path: Path) -> None:
    manifests = whole("overlays/prod")
    (container,) = owned(manifests, owner).spec["containers"]
    given: dict[str, str] = {}
    for source in container["envFrom"]:
        if "configMapRef" in source:
            given |= kube.named(manifests, "ConfigMap", source["configMapRef"]["name"])["data"]
    given |= {row["name"]: row["value"] for row in container.get("env", ()) if "value" in row}
    ring = layout(tmp_path, {key: one for key, one in given.items() if key.startswith("ADAPTER_")}).settings
    assert set(ring.keys) == signs_as(policy)
    assert "online" in ring.keys, "names and times would end"
    assert "approver" not in ring.keys
    region = given["AWS_REGION"]
    assert all(re.fullmatch(rf"awskms:arn:aws:kms:{region}:\d+:key/.+", uri) for uri in ring.keys.values())


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
    assert set(roles) == terraform_accounts(), "the roles of infra/terraform are for these, and for no others"
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
TELEMETRY = Peer(labels={}, namespace={"adapter-foundry/telemetry": "true"}, ports={"otlp": 4318})
OUTSIDE = {
    "gateway": GATEWAY, "caller": CALLER, "stranger": STRANGER, "names": NAMES, "nobody": NOBODY,
    "intruder": INTRUDER, "telemetry": TELEMETRY,
}  # fmt: skip
TO_MLFLOW, TO_PREFECT = ("Deployment/mlflow", 5000), ("StatefulSet/prefect-server", 4200)
TO_POSTGRES, TO_S3, TO_SERVING = (
    ("StatefulSet/postgres", 5432),
    ("StatefulSet/s3", 8333),
    ("Deployment/serving", 8400),
)
TO_TELEMETRY = ("telemetry", 4318)
EDGES = {
    "overlays/dev": {
        "Deployment/mlflow": {TO_POSTGRES, TO_S3},
        "Deployment/serving": {TO_POSTGRES, TO_S3, TO_TELEMETRY},
        "Deployment/prefect-worker": {TO_MLFLOW, TO_PREFECT, TO_POSTGRES, TO_S3},
        "StatefulSet/prefect-server": {TO_POSTGRES},
        "Job/registry-init": {TO_MLFLOW, TO_POSTGRES, TO_S3},
        "caller": {TO_SERVING},
    },
    "overlays/prod": {
        "Deployment/serving": {TO_TELEMETRY},
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
    "CronJob/garbage": {(VPC, 5432), (VPC, 443), (AWS, 443)},
}


def edges(manifests: tuple[Manifest, ...]) -> dict[str, set[tuple[str, int]]]:
    """Who reaches whom on which port, names (DNS) left out."""
    found: dict[str, set[tuple[str, int]]] = {}
    for source, target, port in kube.reach(manifests, OUTSIDE):
        # Whom nothing holds back from calling reaches the collector: it is not ours to close.
        if target != "names" and (source, target) != ("intruder", "telemetry"):
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


# -- images, amounts, disruption --


def image_problems(manifests: tuple[Manifest, ...], digests: bool) -> list[str]:
    from importlib.metadata import version

    said = []
    for pod in kube.pods(manifests):
        for image in (one["image"] for one in pod.containers):
            name, _, tag = image.partition("@")[0].partition(":")
            host, slash, _ = name.partition("/")
            if "adapter-foundry" in name and not (slash and (host == "localhost" or "." in host)):
                said.append(f"{image} is a name on Docker Hub, which is nobody's")
            if digests and host == "localhost":
                said.append(f"{image} has no registry")
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


@pytest.mark.parametrize("name", ALL)
def test_images_have_a_version_and_in_production_a_digest(name: str) -> None:
    """And a registry: nothing of ours is a name on Docker Hub, which anybody may take."""
    assert image_problems(rendered(name), digests=name in ("overlays/prod", *TRAININGS)) == []


def test_in_production_runs_and_trainings_have_the_image_of_the_worker() -> None:
    """The pool's template is made anew whenever the worker starts, so its image has to come from there."""
    manifests = rendered("overlays/prod")
    settings = kube.named(manifests, "ConfigMap", "platform-settings")["data"]
    read = load("flows", FlowSettings, settings)
    image = owned(manifests, "Deployment/prefect-worker").spec["containers"][0]["image"]
    fields = pools.template(KUBERNETES, POD_HOME, read.image)["variables"]["properties"]
    assert fields["image"]["default"] == image
    for name in TRAININGS:
        for pod in kube.pods(rendered(name)):
            assert {one["image"] for one in pod.containers} == {image}, name


def test_a_pool_that_nobody_gave_an_image_fetches_none() -> None:
    assert image_problems((flow_run(),), digests=False) == []


@pytest.mark.parametrize("image", ["worker", "adapter-foundry/worker:0.1.0", "me/worker@sha256:" + "0" * 64])
def test_an_image_that_names_no_registry_is_refused(image: str) -> None:
    with pytest.raises(UsageError, match=r"docker\.io would be asked"):
        load("flows", FlowSettings, {"ADAPTER_FOUNDRY_FLOWS_IMAGE": image})


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


@pytest.mark.parametrize("name", ALL)
def test_an_apply_does_not_take_back_what_an_autoscaler_has_decided(name: str) -> None:
    manifests = rendered(name)
    targets = [one["spec"]["scaleTargetRef"] for one in kube.of_kind(manifests, "HorizontalPodAutoscaler")]
    assert targets or name not in ("overlays/prod", "serving/gpu", "serving/cpu")
    for target in targets:
        assert "replicas" not in kube.named(manifests, target["kind"], target["name"])["spec"]


def disruption_problems(manifests: tuple[Manifest, ...]) -> list[str]:
    said = []
    scaled = {one["spec"]["scaleTargetRef"]["name"]: one["spec"]["minReplicas"]
              for one in kube.of_kind(manifests, "HorizontalPodAutoscaler")}  # fmt: skip
    budgets = kube.of_kind(manifests, "PodDisruptionBudget")
    for one in kube.of_kind(manifests, "Deployment"):
        name, template = one["metadata"]["name"], one["spec"]["template"]
        least = scaled.get(name) or one["spec"]["replicas"]
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


def _drop(kind: str, name: str) -> Callable[[list[Manifest]], None]:
    return lambda manifests: manifests.remove(kube.named(manifests, kind, name))


_POD, _FIRST = "spec|template|spec", "spec|template|spec|containers|0"
_LABELS = "spec|template|metadata|labels"
_BITES: dict[str, tuple[str, Callable[[list[Manifest]], None]]] = {
    "restricted: root": ("r", changed("Deployment", "mlflow", f"{_POD}|securityContext|runAsNonRoot", False)),
    "restricted: seccomp": (
        "r", changed("Deployment", "mlflow", f"{_POD}|securityContext|seccompProfile", None),
    ),
    "restricted: capabilities": (
        "r", changed("StatefulSet", "s3", f"{_FIRST}|securityContext|capabilities", None),
    ),
    "restricted: writable root": (
        "r", changed("StatefulSet", "postgres", f"{_FIRST}|securityContext|readOnlyRootFilesystem", False),
    ),
    "restricted: token": (
        "r", changed("Deployment", "prefect-worker", f"{_POD}|automountServiceAccountToken", True),
    ),
    "restricted: host path": (
        "r", changed("Deployment", "mlflow", f"{_POD}|volumes|0|hostPath", {"path": "/"}),
    ),
    "restricted: service links": ("r", changed("Deployment", "mlflow", f"{_POD}|enableServiceLinks", True)),
    "restricted: no limits": ("r", changed("Deployment", "mlflow", f"{_FIRST}|resources|limits", None)),
    "references: account": ("f", _drop("ServiceAccount", "mlflow")),
    "references: settings": ("f", _drop("ConfigMap", "platform-settings")),
    "references: claim": ("f", _drop("PersistentVolumeClaim", "adapter-foundry")),
    "references: key": (
        "f", changed("Deployment", "mlflow", f"{_FIRST}|env|0|valueFrom|secretKeyRef|key", "hots"),
    ),
    "references: volume": ("f", changed("StatefulSet", "s3", f"{_FIRST}|volumeMounts|0|name", "date")),
    "network: open": ("n", _drop("NetworkPolicy", "default-deny")),
    "network: way out": ("n", _drop("NetworkPolicy", "to-postgres")),
    "network: way in": ("n", _drop("NetworkPolicy", "mlflow")),
    "network: everybody": ("n", changed("NetworkPolicy", "s3", "spec|ingress|0|from|0|podSelector", {})),
    "network: port": ("n", changed("NetworkPolicy", "postgres", "spec|ingress|0|ports|0|port", 5433)),
    "network: more labels": (
        "n",
        changed("Deployment", "serving", f"{_LABELS}|adapter-foundry/calls-mlflow", "true"),
    ),
    "services: selector": ("s", changed("Service", "mlflow", "spec|selector", {"app": "nobody"})),
    "services: port": ("s", changed("Service", "mlflow", "spec|ports|0|targetPort", "web")),
    "images: latest": (
        "i", changed("Deployment", "mlflow", f"{_FIRST}|image", "localhost/adapter-foundry/mlflow:latest"),
    ),
    "images: unknown": (
        "i", changed("Deployment", "mlflow", f"{_FIRST}|image", "localhost/adapter-foundry/flow:0.1.0"),
    ),
    "images: of Docker Hub": (
        "i", changed("Deployment", "mlflow", f"{_FIRST}|image", "adapter-foundry/mlflow:0.1.0"),
    ),
    "quota": ("q", changed("Deployment", "mlflow", f"{_FIRST}|resources|requests|memory", "5Ti")),
    "disruption": ("d", changed("Deployment", "mlflow", "spec|replicas", 2)),
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
