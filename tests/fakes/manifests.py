"""Kubernetes manifests as a cluster would see them: rendered; who may speak to whom; what is missing.

Every `..._problems` returns what is wrong as lines for people, so that a test can break a manifest and see
it said.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

Manifest = dict[str, Any]
POD_KINDS = ("Deployment", "StatefulSet", "Job", "CronJob", "TrainingRuntime", "RayService")
NAMESPACE = "adapter-foundry"
_VOLUMES = {"configMap", "emptyDir", "persistentVolumeClaim", "projected", "secret"}
_FOREIGN = ("hostNetwork", "hostPID", "hostIPC")


@cache
def rendered(folder: Path) -> tuple[Manifest, ...]:
    """What `kubectl apply -k` would send; callers that change it copy it first."""
    done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return tuple(yaml.safe_load_all(done.stdout))


@dataclass(frozen=True, kw_only=True, slots=True)
class Pod:
    """A pod template and where it stands.

    Attributes:
        owner: kind and name, such as ``Deployment/mlflow``.
        labels: of the pods.
        spec: of the pods.
    """

    owner: str
    labels: Mapping[str, str]
    spec: Mapping[str, Any]

    @property
    def containers(self) -> list[Mapping[str, Any]]:
        return [*self.spec.get("initContainers", ()), *self.spec["containers"]]


def pods(manifests: Sequence[Manifest]) -> list[Pod]:
    """Every kind of pod."""
    found = []
    for one in manifests:
        if one["kind"] in POD_KINDS:
            for number, template in enumerate(templates(one)):
                owner = f"{one['kind']}/{one['metadata']['name']}" + (f"/{number}" if number else "")
                labels = template.get("metadata", {}).get("labels", {})
                found.append(Pod(owner=owner, labels=labels, spec=template["spec"]))
    return found


def templates(one: Manifest) -> Iterator[Manifest]:
    """The pod templates in a manifest of one of `POD_KINDS`."""
    spec = one["spec"]
    if one["kind"] == "CronJob":
        yield spec["jobTemplate"]["spec"]["template"]
    elif one["kind"] == "TrainingRuntime":
        for job in spec["template"]["spec"]["replicatedJobs"]:
            yield job["template"]["spec"]["template"]
    elif one["kind"] == "RayService":
        yield spec["rayClusterConfig"]["headGroupSpec"]["template"]
        for group in spec["rayClusterConfig"]["workerGroupSpecs"]:
            yield group["template"]
    else:
        yield spec["template"]


def of_kind(manifests: Sequence[Manifest], kind: str) -> list[Manifest]:
    return [one for one in manifests if one["kind"] == kind]


def named(manifests: Sequence[Manifest], kind: str, name: str) -> Manifest:
    (found,) = (one for one in of_kind(manifests, kind) if one["metadata"]["name"] == name)
    return found


# -- the restricted standard, field by field --


def restricted_problems(pod: Pod, may_have_token: frozenset[str] = frozenset()) -> list[str]:
    """What the Pod Security Standard `restricted` would refuse, and what we ask beyond it."""
    spec, context, said = pod.spec, pod.spec.get("securityContext", {}), []
    said += [f"{field} is set" for field in _FOREIGN if spec.get(field)]
    said += [f"{field} is missing" for field in ("runAsUser", "runAsGroup") if not context.get(field)]
    if context.get("runAsNonRoot") is not True:
        said.append("runAsNonRoot is not true")
    if context.get("seccompProfile") != {"type": "RuntimeDefault"}:
        said.append("seccompProfile is not RuntimeDefault")
    for field in ("sysctls", "seLinuxOptions", "windowsOptions", "appArmorProfile"):
        said += [f"{field} is set"] if field in context else []
    for volume in spec.get("volumes", ()):
        said += [f"volume of kind {kind}" for kind in set(volume) - {"name"} - _VOLUMES]
        if "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]:
            said.append(f"the emptyDir {volume['name']} has no sizeLimit")
    if spec.get("automountServiceAccountToken") is not (pod.owner in may_have_token):
        said.append("automountServiceAccountToken is not what it should be")
    if spec.get("enableServiceLinks") is not False:
        said.append("enableServiceLinks is not false: MLFLOW_PORT=tcp://… would be a setting")
    if not spec.get("serviceAccountName") or spec["serviceAccountName"] == "default":
        said.append("no service account of its own")
    for container in pod.containers:
        said += [f"container {container['name']}: {line}" for line in _container_problems(container)]
    return [f"{pod.owner}: {line}" for line in said]


def _container_problems(container: Mapping[str, Any]) -> list[str]:
    context, said = container.get("securityContext", {}), []
    if context.get("allowPrivilegeEscalation") is not False:
        said.append("allowPrivilegeEscalation is not false")
    if context.get("readOnlyRootFilesystem") is not True:
        said.append("readOnlyRootFilesystem is not true")
    if context.get("capabilities") != {"drop": ["ALL"]}:
        said.append("capabilities are not dropped")
    for field in ("privileged", "procMount", "seLinuxOptions", "windowsOptions"):
        said += [f"{field} is set"] if context.get(field) else []
    if context.get("runAsNonRoot") is False or context.get("runAsUser") == 0:
        said.append("runs as root")
    if context.get("seccompProfile", {"type": "RuntimeDefault"})["type"] != "RuntimeDefault":
        said.append("seccompProfile is not RuntimeDefault")
    said += [f"hostPort {port['hostPort']}" for port in container.get("ports", ()) if "hostPort" in port]
    for part in ("requests", "limits"):
        for resource in ("cpu", "memory"):
            if resource not in container.get("resources", {}).get(part, {}):
                said.append(f"no {part} of {resource}")
    return said


# -- what is referred to --


@dataclass(frozen=True, kw_only=True, slots=True)
class Use:
    """Something that a pod needs: its kind, name, and the key of it (None: all)."""

    owner: str
    kind: str
    name: str
    key: str | None = None


def uses(pod: Pod) -> Iterator[Use]:
    """Everything that has to be there before the pod starts."""

    def use(kind: str, name: str, key: str | None = None) -> Use:
        return Use(owner=pod.owner, kind=kind, name=name, key=key)

    yield use("ServiceAccount", pod.spec["serviceAccountName"])
    if name := pod.spec.get("priorityClassName"):
        yield use("PriorityClass", name)
    for volume in pod.spec.get("volumes", ()):
        if "configMap" in volume:
            yield use("ConfigMap", volume["configMap"]["name"])
        if "secret" in volume:
            yield use("Secret", volume["secret"]["secretName"])
        if "persistentVolumeClaim" in volume:
            yield use("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"])
    for container in pod.containers:
        for source in container.get("envFrom", ()):
            for field, kind in (("configMapRef", "ConfigMap"), ("secretRef", "Secret")):
                if field in source and not source[field].get("optional"):
                    yield use(kind, source[field]["name"])
        for variable in container.get("env", ()):
            value = variable.get("valueFrom", {})
            for field, kind in (("configMapKeyRef", "ConfigMap"), ("secretKeyRef", "Secret")):
                if field in value:
                    yield use(kind, value[field]["name"], value[field]["key"])


def reference_problems(
    manifests: Sequence[Manifest], others: Mapping[tuple[str, str], set[str]]
) -> list[str]:
    """What pods refer to and nobody makes; ``others``: what comes from elsewhere, and its keys."""
    there: dict[tuple[str, str], set[str]] = dict(others)
    for one in manifests:
        there[one["kind"], one["metadata"]["name"]] = set(one.get("data", {}))
        if one["kind"] == "StatefulSet":
            for claim in one["spec"].get("volumeClaimTemplates", ()):
                there["Volume of " + one["metadata"]["name"], claim["metadata"]["name"]] = set()
    said = []
    for pod in pods(manifests):
        for use in uses(pod):
            keys = there.get((use.kind, use.name))
            if keys is None:
                said.append(f"{use.owner}: no {use.kind} {use.name}")
            elif use.key is not None and use.key not in keys:
                said.append(f"{use.owner}: {use.kind} {use.name} has no key {use.key}")
        own = {name for kind, name in there if kind == "Volume of " + pod.owner.partition("/")[2]}
        volumes = {volume["name"] for volume in pod.spec.get("volumes", ())} | own
        for container in pod.containers:
            mounts = container.get("volumeMounts", ())
            said += [f"{pod.owner}: no volume {one['name']}" for one in mounts if one["name"] not in volumes]
    return said


# -- who may speak to whom --


def matches(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Whether a label selector selects something with these labels; an empty one selects all."""
    for name, value in selector.get("matchLabels", {}).items():
        if labels.get(name) != value:
            return False
    for row in selector.get("matchExpressions", ()):
        assert row["operator"] == "In", "only In is used here"
        if labels.get(row["key"]) not in row["values"]:
            return False
    return True


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """One end of a connection: a pod here, or one in another namespace.

    Attributes:
        labels: of the pod.
        namespace: labels of its namespace; None is ours.
        ports: number by name, of what it listens on.
        free: no policy holds back what it calls.
    """

    labels: Mapping[str, str]
    namespace: Mapping[str, str] | None = None
    ports: Mapping[str, int]
    free: bool = False


def _selects(peer: Mapping[str, Any], other: Peer) -> bool:
    if "ipBlock" in peer:
        return False
    if "namespaceSelector" in peer:
        labels = {"kubernetes.io/metadata.name": NAMESPACE} if other.namespace is None else other.namespace
        if not matches(peer["namespaceSelector"], labels):
            return False
    elif other.namespace is not None:
        return False
    return matches(peer.get("podSelector", {}), other.labels)


def _allows(
    manifests: Sequence[Manifest],
    direction: str,
    mine: Peer,
    other: Peer,
    port: int,
    ports: Mapping[str, int],
) -> bool:
    rules_of, ends_of = ("egress", "to") if direction == "Egress" else ("ingress", "from")
    applied = False
    for one in of_kind(manifests, "NetworkPolicy"):
        spec = one["spec"]
        if direction not in spec["policyTypes"] or not matches(spec["podSelector"], mine.labels):
            continue
        applied = True
        for rule in spec.get(rules_of, ()):
            wanted = {ports.get(row["port"], row["port"]) for row in rule.get("ports", ())}
            ends = rule.get(ends_of)
            if (not wanted or port in wanted) and (ends is None or any(_selects(end, other) for end in ends)):
                return True
    return not applied


def may_connect(manifests: Sequence[Manifest], source: Peer, target: Peer, port: int) -> bool:
    """Whether policies of both ends let a connection to this port through."""
    out = (
        source.free
        or source.namespace is not None
        or _allows(manifests, "Egress", source, target, port, target.ports)
    )
    into = target.namespace is not None or _allows(manifests, "Ingress", target, source, port, target.ports)
    return out and into


def peer(pod: Pod) -> Peer:
    listening = {
        port["name"]: port["containerPort"] for one in pod.containers for port in one.get("ports", ())
    }
    return Peer(labels=pod.labels, ports=listening)


def reach(manifests: Sequence[Manifest], outside: Mapping[str, Peer]) -> set[tuple[str, str, int]]:
    """Every connection that is possible: from whom, to whom, to which listening port."""
    inside = {pod.owner: peer(pod) for pod in pods(manifests)}
    everybody = {**inside, **outside}
    return {
        (source, target, port)
        for source, one in everybody.items()
        for target, other in everybody.items()
        for port in other.ports.values()
        if not (one.namespace is not None and other.namespace is not None)
        and source != target
        and may_connect(manifests, one, other, port)
    }


def way_out(manifests: Sequence[Manifest], pod: Pod) -> set[tuple[str, int]]:
    """Networks and ports beyond the cluster that a pod reaches."""
    found = set()
    for one in of_kind(manifests, "NetworkPolicy"):
        if "Egress" in one["spec"]["policyTypes"] and matches(one["spec"]["podSelector"], pod.labels):
            for rule in one["spec"].get("egress", ()):
                for end in rule["to"]:
                    if "ipBlock" in end:
                        found |= {(end["ipBlock"]["cidr"], row["port"]) for row in rule["ports"]}
    return found


def service_problems(manifests: Sequence[Manifest]) -> list[str]:
    """Services that lead nowhere."""
    said = []
    for one in of_kind(manifests, "Service"):
        selector = {"matchLabels": one["spec"]["selector"]}
        chosen = [pod for pod in pods(manifests) if matches(selector, pod.labels)]
        if not chosen:
            said.append(f"Service {one['metadata']['name']} selects no pod")
        for pod in chosen:
            listening = peer(pod).ports
            for port in one["spec"]["ports"]:
                if port["targetPort"] not in {*listening, *listening.values()}:
                    said.append(
                        f"Service {one['metadata']['name']}: {pod.owner} has no port {port['targetPort']}"
                    )
    return said


# -- amounts --

_UNITS = {"m": 1e-3, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "": 1.0}


def amount(text: str) -> float:
    """A quantity of Kubernetes as a number."""
    number = text.rstrip("KMGTim")
    return float(number) * _UNITS[text[len(number) :]]


def requested(pod: Pod, part: str, resource: str) -> float:
    """What the scheduler counts for one pod: all containers together, or the largest init container."""

    def of(containers: Sequence[Mapping[str, Any]]) -> list[float]:
        return [amount(str(one["resources"][part].get(resource, "0"))) for one in containers]

    return max(sum(of(pod.spec["containers"])), *of(pod.spec.get("initContainers", ())), 0.0)


def changed(kind: str, name: str, path: str, value: Any) -> Callable[[list[Manifest]], None]:
    """Set (or with None remove) a field of a manifest; numbers in the path are places in lists."""

    def change(manifests: list[Manifest]) -> None:
        *way, last = [int(part) if part.isdigit() else part for part in path.split("|")]
        place: Any = named(manifests, kind, name)
        for part in way:
            place = place[part]
        if value is None:
            del place[last]
        else:
            place[last] = value

    return change
