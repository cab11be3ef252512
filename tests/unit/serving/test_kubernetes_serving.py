"""The manifests of serving keep their promises: valid by the schemas, restricted, and drained in time."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from registry.settings import layout
from serving.settings import load

REPOSITORY = Path(__file__).resolve().parents[3]
FOLDER = REPOSITORY / "infra" / "kubernetes" / "serving"
PLAIN = ("cpu", "gpu")
SCHEMAS = "1.32"
LABEL = "app.kubernetes.io/name"

pytestmark = pytest.mark.skipif(
    shutil.which("kubectl") is None, reason="kubectl, which renders the manifests, is not installed"
)


@cache
def rendered(variant: str) -> tuple[dict[str, Any], ...]:
    """What `kubectl apply -k` would send."""
    done = subprocess.run(["kubectl", "kustomize", FOLDER / variant], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return tuple(yaml.safe_load_all(done.stdout))


def only(variant: str, kind: str) -> dict[str, Any]:
    (found,) = (one for one in rendered(variant) if one["kind"] == kind)
    return found


def pods(variant: str) -> Iterator[dict[str, Any]]:
    """The template of each kind of pod."""
    if variant in PLAIN:
        yield only(variant, "Deployment")["spec"]["template"]
        return
    cluster = only(variant, "RayService")["spec"]["rayClusterConfig"]
    yield cluster["headGroupSpec"]["template"]
    for group in cluster["workerGroupSpecs"]:
        yield group["template"]


def containers(variant: str) -> Iterator[dict[str, Any]]:
    for pod in pods(variant):
        yield from pod["spec"]["containers"]
        yield from pod["spec"]["initContainers"]


@pytest.mark.parametrize("variant", [*PLAIN, "ray"])
def test_what_kubernetes_knows_is_valid_by_its_own_schemas(variant: str) -> None:
    assert rendered(variant)
    for one in rendered(variant):
        if one["apiVersion"] != "ray.io/v1":
            kubernetes_validate.validate(one, SCHEMAS, strict=True)
    for pod in pods(variant):
        as_pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": pod["spec"]}
        kubernetes_validate.validate(as_pod, SCHEMAS, strict=True)


@pytest.mark.parametrize("variant", [*PLAIN, "ray"])
def test_pods_pass_the_restricted_standard(variant: str) -> None:
    labels = only(variant, "Namespace")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    for pod in pods(variant):
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
        assert spec["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        assert all(
            set(volume) - {"name"} <= {"emptyDir", "configMap", "secret", "persistentVolumeClaim"}
            for volume in spec["volumes"]
        )
        assert all("sizeLimit" in volume["emptyDir"] for volume in spec["volumes"] if "emptyDir" in volume)
    for container in containers(variant):
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["readOnlyRootFilesystem"] is True
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert {"cpu", "memory"} <= set(container["resources"]["requests"])
        assert {"cpu", "memory"} <= set(container["resources"]["limits"])
        tag = container["image"].partition(":")[2].removesuffix("-cuda")
        assert tag == version("adapter-foundry"), "a version, never latest"


@pytest.mark.parametrize("variant", [*PLAIN, "ray"])
def test_settings_are_settings_and_no_secret_is_written_down(variant: str, tmp_path: Path) -> None:
    settings = only(variant, "ConfigMap")["data"]
    serving = load({**settings, "ADAPTER_FOUNDRY_SERVING_JOBS": "postgresql+psycopg://h/n"}, home=tmp_path)
    assert (serving.host, serving.public) == ("0.0.0.0", False), (
        "open to the cluster, closed to who has no key"
    )
    assert layout(tmp_path, settings).store_uri.startswith("s3://")
    assert all(one["kind"] != "Secret" for one in rendered(variant))
    for container in containers(variant):
        assert all("secretKeyRef" in one["valueFrom"] for one in container.get("env", ()))


@pytest.mark.parametrize("variant", PLAIN)
def test_a_pod_that_goes_finishes_what_it_has_taken(variant: str, tmp_path: Path) -> None:
    spec = only(variant, "Deployment")["spec"]["template"]["spec"]
    (serving,) = spec["containers"]
    waits = serving["lifecycle"]["preStop"]["sleep"]["seconds"]
    readiness = serving["readinessProbe"]
    assert waits >= readiness["periodSeconds"] * readiness["failureThreshold"]
    grace = load(only(variant, "ConfigMap")["data"], home=tmp_path).grace_seconds
    assert spec["terminationGracePeriodSeconds"] > waits + grace


def test_a_ray_pod_lives_longer_than_its_replicas_take_to_drain(tmp_path: Path) -> None:
    grace = load(only("ray", "ConfigMap")["data"], home=tmp_path).grace_seconds
    assert all(pod["spec"]["terminationGracePeriodSeconds"] > grace + 5 for pod in pods("ray"))


@pytest.mark.parametrize("variant", PLAIN)
def test_probes_ask_what_the_service_answers(variant: str) -> None:
    from fakes.backends import DrawingBackend
    from serving.http.app import service_app
    from serving.settings import ServingSettings

    routes = set(service_app(DrawingBackend(), ServingSettings()).openapi()["paths"])
    (serving,) = only(variant, "Deployment")["spec"]["template"]["spec"]["containers"]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert serving[probe]["httpGet"]["path"] in routes
        assert serving[probe]["httpGet"]["port"] in {port["name"] for port in serving["ports"]}
    assert serving["livenessProbe"]["httpGet"]["path"] == "/v2/health/live"
    assert serving["readinessProbe"]["httpGet"]["path"] == "/v2/health/ready"


@pytest.mark.parametrize("variant", PLAIN)
def test_everything_means_the_same_pods(variant: str) -> None:
    deployment = only(variant, "Deployment")
    name = deployment["spec"]["template"]["metadata"]["labels"][LABEL]
    assert only(variant, "Service")["spec"]["selector"] == {LABEL: name}
    for kind in ("PodDisruptionBudget", "Deployment"):
        assert only(variant, kind)["spec"]["selector"]["matchLabels"] == {LABEL: name}
    assert only(variant, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"] == {LABEL: name}
    scaled = only(variant, "HorizontalPodAutoscaler")["spec"]
    assert scaled["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert scaled["minReplicas"] > only(variant, "PodDisruptionBudget")["spec"]["maxUnavailable"]


@pytest.mark.parametrize("variant", PLAIN)
def test_the_autoscaler_follows_a_metric_that_exists(variant: str) -> None:
    from prometheus_client import generate_latest

    from serving.metrics import Metrics

    (metric,) = only(variant, "HorizontalPodAutoscaler")["spec"]["metrics"]
    assert f"\n{metric['pods']['metric']['name']} " in generate_latest(Metrics().registry).decode()


def test_only_the_gpu_variants_ask_for_a_gpu_and_they_compute_on_it() -> None:
    def gpus(variant: str) -> set[str]:
        return {one["resources"]["limits"].get("nvidia.com/gpu", "0") for one in containers(variant)}

    def device(variant: str) -> str:
        return str(only(variant, "ConfigMap")["data"]["ADAPTER_FOUNDRY_SERVING_DEVICE"])

    assert (gpus("cpu"), device("cpu")) == ({"0"}, "cpu")
    assert (gpus("gpu"), device("gpu")) == ({"0", "1"}, "cuda"), "the init container needs none"
    assert (gpus("ray"), device("ray")) == ({"0", "1"}, "cuda")
    assert only("gpu", "Deployment")["spec"]["strategy"]["rollingUpdate"]["maxSurge"] == 0


@pytest.mark.parametrize("variant", [*PLAIN, "ray"])
def test_the_network_is_closed_but_for_what_is_named(variant: str) -> None:
    policy = only(variant, "NetworkPolicy")["spec"]
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    assert all(rule.get("from") for rule in policy["ingress"]), "nobody comes in without a label"
    blocks = [to["ipBlock"] for rule in policy["egress"] for to in rule["to"] if "ipBlock" in to]
    assert blocks
    assert all("169.254.0.0/16" in block["except"] for block in blocks), "clouds' metadata services"
    assert all(rule.get("ports") for rule in policy["egress"] if any("ipBlock" in to for to in rule["to"]))


def test_ray_runs_the_application_with_arguments_it_takes() -> None:
    from serving.ray_app import build
    from serving.ray_scale import scale_of

    spec = only("ray", "RayService")["spec"]
    serve = yaml.safe_load(spec["serveConfigV2"])
    (application,) = serve["applications"]
    assert application["import_path"] == f"{build.__module__}:{build.__name__}"
    scale = scale_of(application["args"])
    (group,) = spec["rayClusterConfig"]["workerGroupSpecs"]
    assert scale.engines * scale.gpus <= group["minReplicas"], "there is a GPU for each engine"
    for pod in pods("ray"):  # the operator's probe and Service take the port of this name, else 8000
        ports = {port["name"]: port["containerPort"] for port in pod["spec"]["containers"][0]["ports"]}
        assert ports["serve"] == serve["http_options"]["port"]
    assert spec["rayClusterConfig"]["rayVersion"] == version("ray")
    assert spec["rayClusterConfig"]["authOptions"] == {"mode": "token"}
    assert only("ray", "ConfigMap")["data"]["RAY_USAGE_STATS_ENABLED"] == "0"


def test_monitoring_is_a_component_that_fits_the_service(tmp_path: Path) -> None:
    shutil.copytree(FOLDER, tmp_path / "serving")
    overlay = tmp_path / "serving" / "cpu" / "kustomization.yaml"
    overlay.write_text(overlay.read_text() + "components: [../monitoring]\n")
    done = subprocess.run(["kubectl", "kustomize", overlay.parent], capture_output=True, text=True)
    found = {one["kind"]: one for one in yaml.safe_load_all(done.stdout)}
    monitor, service = found["ServiceMonitor"]["spec"], found["Service"]
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert {one["port"] for one in monitor["endpoints"]} <= {one["name"] for one in service["spec"]["ports"]}
