"""Manifests are valid: by the schemas of Kubernetes itself, and of those who define the other kinds."""

from __future__ import annotations

import copy
import os
import re
import shutil
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from fakes import manifests as kube
from fakes.manifests import Manifest
from fakes.platform_manifests import (
    ALL,
    FOLDER,
    OVERLAYS,
    REPOSITORY,
    TRAININGS,
    VERSIONS,
    flow_run,
    needs_kubectl,
    rendered,
)

pytestmark = needs_kubectl


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
                    relabelings=_many(_all(targetLabel=_TEXT, replacement=_TEXT)),
                )
            ),
        ),
    ),
    "PrometheusRule": (
        "monitoring.coreos.com/v1",
        _all(
            groups=_many(
                _all(
                    name=_TEXT,
                    rules=_many(
                        _only(
                            ("alert", "expr", "labels", "annotations"),
                            alert=_TEXT, expr=_TEXT, labels=_OBJECT, annotations=_OBJECT,
                            **{"for": {"type": "string", "pattern": "^[0-9]+[smhd]$"}},
                        )
                    ),
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
        kube.changed(first["kind"], first["metadata"]["name"], way, [])(broken)
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


def test_alerts_are_those_of_every_other_installation_and_find_their_service() -> None:
    alerts = yaml.safe_load((REPOSITORY / "infra/observability/alerts.yaml").read_text("utf-8"))
    manifests = rendered("overlays/prod")
    (rules,) = kube.of_kind(manifests, "PrometheusRule")
    assert rules["spec"] == alerts
    (monitor,) = kube.of_kind(manifests, "ServiceMonitor")
    (endpoint,) = monitor["spec"]["endpoints"]
    jobs = {row["replacement"] for row in endpoint["relabelings"] if row["targetLabel"] == "job"}
    assert jobs == set(re.findall(r'job="([^"]+)"', yaml.safe_dump(alerts))), "up{job=…} would be nobody"


def test_keda_takes_the_place_of_the_autoscaler(tmp_path: Path) -> None:
    from prometheus_client import generate_latest

    from serving.metrics import Metrics

    (ours,) = kube.of_kind(rendered("serving/gpu"), "HorizontalPodAutoscaler")
    manifests = with_component("keda", tmp_path)
    assert custom_problems(manifests) == []
    assert kube.of_kind(manifests, "HorizontalPodAutoscaler") == [], "two autoscalers would fight"
    (scaled,) = kube.of_kind(manifests, "ScaledObject")
    spec = scaled["spec"]
    target = kube.named(manifests, spec["scaleTargetRef"]["kind"], spec["scaleTargetRef"]["name"])
    assert "replicas" not in target["spec"], "each apply would take back what it has decided"
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
