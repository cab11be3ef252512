"""The AWS policies against what the registry's commands really ask of S3 and KMS.

Every role's commands run against a real S3 server behind a proxy that writes down each request. The policies
of a role have to allow all of its requests, and nobody else's policies the ones that change something.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import pytest
from click.testing import CliRunner

from fakes import kms
from fakes.failing_proxy import FailingProxy, in_front_of
from fakes.followed import PROD, follower
from fakes.iam import Policy, Request, allowed
from fakes.registries import NAME, PASSING, adapter_folder
from registry.cli import cli
from registry.client import Registry
from registry.content import CHUNK_BYTES
from registry.signing.signers import KeyRing
from registry.storage.stores import open_store
from servers.weed import Weed

pytestmark = [pytest.mark.integration, pytest.mark.slow]

POLICIES = Path(__file__).resolve().parents[2] / "infra" / "terraform" / "aws" / "policies"
REGION = "eu-central-1"
KEYS = ("publisher", "scanner", "evaluator", "approver", "online")
FACTS = {
    "bucket": "arn:aws:s3:::adapters",
    "objects": "arn:aws:s3:::adapters/registry",
    "mlflow": "arn:aws:s3:::mlflow",
    "backups": "arn:aws:s3:::backups",
    "region": REGION,
    "secrets": f"arn:aws:secretsmanager:{REGION}:111122223333:secret:adapter-foundry/*",
    "master_secret": f"arn:aws:secretsmanager:{REGION}:111122223333:secret:rds!db-1-AbCdEf",
    "data_key": f"arn:aws:kms:{REGION}:111122223333:key/data",
} | {f"{role}_key": f"arn:aws:kms:{REGION}:111122223333:key/{role}" for role in KEYS}
DOES = {
    "serving": ("read",),
    "publisher": ("read", "publish"),
    "approver": ("read", "approve"),
    "owner": ("read", "own"),
    "maintenance": ("read", "maintain"),
    "backup": ("read", "backup"),
    "mlflow": ("mlflow",),
    "external-secrets": ("secrets",),
}
CHANGES = ("s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload")
TRUST = f"{FACTS['objects']}/trust"
SECURE = {"aws:SecureTransport": "true", "s3:TlsVersion": "1.3"}
VIA_S3 = {"kms:ViaService": f"s3.{REGION}.amazonaws.com"}


@functools.cache
def policy(name: str, bucket: str = FACTS["bucket"]) -> Policy:
    """A policy with the facts in it, as Terraform's templatefile writes it."""
    text = (POLICIES / f"{name}.json").read_text()
    for fact, value in (FACTS | {"bucket": bucket}).items():
        text = text.replace(f"${{{fact}}}", value)
    assert "${" not in text
    found: Policy = json.loads(text)
    return found


def bucket_policies(resource: str) -> list[Policy]:
    """The policies of the bucket that a resource lies in."""
    for bucket, names in (
        ("bucket", ("tls_only", "immutable")),
        ("backups", ("tls_only",)),
        ("mlflow", ("tls_only",)),
    ):
        if resource.startswith(FACTS[bucket]):
            return [policy(name, FACTS[bucket]) for name in names]
    return []


def may(role: str, request: Request) -> bool:
    """Whether a role may do this, by its own policies and the bucket's."""
    return allowed(request, [policy(name) for name in DOES[role]], bucket_policies(request.resource))


def asked(method: str, target: str, headers: Mapping[str, str]) -> Iterator[Request]:
    """What AWS asks IAM about one HTTP request to a bucket that is encrypted with a key of ours."""
    parts = urlsplit(target)
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    bucket, _, key = unquote(parts.path).lstrip("/").partition("/")
    folder = f"arn:aws:s3:::{bucket}"
    said = {name.lower(): value for name, value in headers.items()}
    context = SECURE | {f"s3:{name}": said[name] for name in ("if-match", "if-none-match") if name in said}

    def about(action: str, **more: str) -> Request:
        return Request(action, f"{folder}/{key}" if key else folder, context | more)

    if not key:
        assert method == "GET"
        yield about("s3:ListBucketMultipartUploads" if "uploads" in query else "s3:ListBucket")
    elif method in ("GET", "HEAD"):
        yield about("s3:ListMultipartUploadParts" if "uploadId" in query else "s3:GetObject")
        yield Request("s3:ListBucket", folder, context)  # otherwise what is missing is forbidden, not missing
        yield Request("kms:Decrypt", FACTS["data_key"], VIA_S3)
    elif method == "DELETE":
        yield about("s3:AbortMultipartUpload" if "uploadId" in query else "s3:DeleteObject")
    else:
        assert method in ("PUT", "POST")
        creates = "partNumber" not in query and "uploads" not in query
        yield about("s3:PutObject", **{"s3:ObjectCreationOperation": str(creates).lower()})
        yield Request("kms:GenerateDataKey", FACTS["data_key"], VIA_S3)
        if "uploadId" in query or "uploads" in query:
            yield Request("kms:Decrypt", FACTS["data_key"], VIA_S3)


def kind(resource: str) -> str:
    """What an object is, without its digests and numbers."""
    bucket, _, key = resource.removeprefix("arn:aws:s3:::").partition("/")
    first, _, rest = key.removeprefix("registry/").partition("/")
    if bucket != "adapters":
        return bucket
    if first == "trust":
        role = rest.removesuffix(".json").rpartition(".")[2].partition("-")[0]
        return "trust/draft" if rest.startswith("draft") else f"trust/{role}"
    return f"statements/{rest.partition('/')[2].partition('.')[0]}" if first == "statements" else first


class Workplace:
    """Runs commands of a role against S3 behind the proxy, and keeps what they asked."""

    def __init__(self, proxy: FailingProxy, root: Path) -> None:
        self.proxy, self.root = proxy, root
        self.asked: dict[str, list[Request]] = {}

    def registry(self, role: str, *words: object, home: str = "home") -> Any:
        """The one JSON object of a command."""
        os.environ["ADAPTER_FOUNDRY_HOME"] = str(self.root / home)
        result = CliRunner().invoke(cli, [*map(str, words), "--json"], catch_exceptions=False)
        self.take(role)
        assert result.exit_code == 0, f"{words}: {result.output}"
        return json.loads(result.stdout)

    def take(self, role: str) -> None:
        """Write down what was asked since the last time, as of this role; an empty role forgets it."""
        lines, self.proxy.requests = self.proxy.requests, []
        headers, self.proxy.headers = self.proxy.headers, []
        for line, said in zip(lines, headers, strict=True):
            method, target = line.split(" ", 1)
            if role:
                self.asked.setdefault(role, []).extend(asked(method, target, said))


@pytest.fixture(scope="module")
def recorded(weed: Weed, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Request]]:
    """What each role asks, by the name of the role."""
    root = tmp_path_factory.mktemp("roles")
    with pytest.MonkeyPatch.context() as patch, in_front_of(weed.endpoint) as proxy:
        for name in ("adapters", "backups"):
            weed.make_bucket(name)
        for name, value in weed.environment("admin").items():
            patch.setenv(name, value.replace(weed.endpoint, proxy.url))
        patch.setenv("ADAPTER_FOUNDRY_STORE", "s3://adapters/registry")
        patch.setenv("ADAPTER_FOUNDRY_HOME", str(root / "home"))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        place = Workplace(proxy, root)
        _release(place, root)
        _consume(place, root)
        _look_after(place, weed)
    return place.asked


def _release(place: Workplace, root: Path) -> None:
    """A registry with two released versions, and decisions about them."""
    report = root / "evaluation.json"
    report.write_text(json.dumps(PASSING))
    place.registry("owner", "init")
    place.registry("owner", "trust", "key", "approver", "--output", root / "approver.pem")
    place.registry("owner", "trust", "add", "approver", root / "approver.pem")
    place.registry("owner", "trust", "renew")
    for number in (1, 2):
        name = f"{NAME}:{number}"
        folder = adapter_folder(root / f"adapter-{number}", seed=number)
        place.registry("publisher", "push", folder, "--name", NAME, "--evaluation", report)
        place.registry("publisher", "attest", name, "--kind", "evaluation", "--predicate", report)
        place.registry("approver", "approve", name, "--by", "Kim", "--reason", "looks right")
        place.registry("approver", "promote", name, "--to", "prod")
    store = open_store("s3://adapters/registry", records=root / "uploads")
    assert store.put("blobs/blake3/big", bytes(CHUNK_BYTES + 1)), "in two parts"
    place.take("publisher")
    place.registry("approver", "rollback", PROD)
    place.registry("approver", "yank", f"{NAME}:2", "--reason", "blurs mouths")
    place.registry("approver", "revoke", f"{NAME}:2", "--reason", "it leaks")


def _consume(place: Workplace, root: Path) -> None:
    """A machine that has nothing but the pinned root, as serving's."""
    exported = CliRunner().invoke(cli, ["trust", "export"])
    (root / "root.json").write_text(exported.stdout)
    place.take("")
    (root / "consumer").mkdir()
    place.registry("serving", "trust", "pin", root / "root.json", home="consumer")
    place.registry("serving", "pull", PROD, home="consumer")
    place.registry("serving", "verify", PROD, home="consumer")
    follower(Registry.open(root / "consumer")).poll()
    place.take("serving")


def _look_after(place: Workplace, weed: Weed) -> None:
    """Garbage is collected, and all is backed up."""
    weed.client().create_multipart_upload(Bucket="adapters", Key="registry/blobs/blake3/unfinished")
    swept = place.registry("maintenance", "gc", "--grace", "0")
    assert swept["removed"], swept
    place.registry("backup", "backup", "s3://backups/daily", "--without-keys")
    place.registry("backup", "backup", "s3://backups/daily", "--verify")


@pytest.mark.parametrize("role", ["owner", "publisher", "approver", "serving", "maintenance", "backup"])
def test_a_role_may_do_what_its_commands_ask(recorded: dict[str, list[Request]], role: str) -> None:
    assert len(recorded[role]) > 10
    refused = {
        (request.action, kind(request.resource)) for request in recorded[role] if not may(role, request)
    }
    assert refused == set()


#: Whoever publishes removes what the edition before has superseded, whoever signed that.
SUPERSEDED = {"trust/names", "trust/snapshot", "trust/targets", "trust/versions"}
PRUNES = {("s3:DeleteObject", what) for what in SUPERSEDED}
#: What a role may do besides what its commands did above. `registry accept` keeps an approval that was signed
#: elsewhere; a publisher gives up an upload of its own that was refused.
BESIDES = {
    "publisher": PRUNES | {("s3:PutObject", "statements/approval"), ("s3:AbortMultipartUpload", "blobs")},
    "approver": PRUNES,
    "maintenance": PRUNES,
}


@pytest.mark.parametrize("role", ["publisher", "approver", "serving", "maintenance", "backup"])
def test_a_role_may_not_do_what_is_the_others_business(recorded: dict[str, list[Request]], role: str) -> None:
    """Whatever changes a kind of object that the role's own commands leave alone is refused."""
    own = {(request.action, kind(request.resource)) for request in recorded[role]}
    foreign = {
        (request.action, kind(request.resource)): request
        for requests in recorded.values()
        for request in requests
        if request.action in CHANGES and (request.action, kind(request.resource)) not in own
    }
    assert foreign
    assert {what for what, request in foreign.items() if may(role, request)} <= BESIDES.get(role, set())


def test_who_writes_and_removes_which_kinds_of_objects(recorded: dict[str, list[Request]]) -> None:
    """The table of docs/operations/aws.md; a new kind of object has to be thought about."""

    def did(role: str, action: str) -> set[str]:
        return {kind(request.resource) for request in recorded[role] if request.action == action}

    heads = {"trust/timestamp", "trust/snapshot"}
    adapters = {"blobs", "models", "manifests"}
    made = {"statements/training", "statements/licence", "statements/scan", "statements/evaluation"}
    assert did("publisher", "s3:PutObject") == heads | adapters | made | {"trust/names", "trust/versions"}
    assert did("approver", "s3:PutObject") == heads | {"trust/targets", "statements/approval"}
    assert did("maintenance", "s3:PutObject") == heads
    assert did("backup", "s3:PutObject") == {"backups"}
    assert did("serving", "s3:PutObject") == set()
    assert {"trust/root", "trust/targets"} <= did("owner", "s3:PutObject")
    assert did("publisher", "s3:DeleteObject") <= SUPERSEDED
    assert did("approver", "s3:DeleteObject") <= SUPERSEDED
    assert {"blobs"} <= did("maintenance", "s3:DeleteObject") <= {"blobs"} | SUPERSEDED
    assert did("serving", "s3:DeleteObject") == did("backup", "s3:DeleteObject") == set()


@pytest.mark.parametrize("role", DOES)
def test_nobody_overwrites_what_is_written_once(recorded: dict[str, list[Request]], role: str) -> None:
    """A write without If-None-Match, which is what a thief would send, is refused by the bucket."""
    tried = 0
    for request in (one for requests in recorded.values() for one in requests):
        context = dict(request.context)
        if request.action != "s3:PutObject" or context["s3:ObjectCreationOperation"] == "false":
            continue
        if ":::adapters" in request.resource:
            tried += 1
            bare = {key: value for key, value in context.items() if not key.startswith("s3:if")}
            assert not may(role, replace(request, context=bare)), request
            if kind(request.resource) not in ("trust/timestamp", "trust/draft"):
                assert not may(role, replace(request, context=bare | {"s3:if-match": "tag"})), request
    assert tried > 10


@pytest.mark.parametrize("role", DOES)
def test_nobody_makes_a_root_a_version_or_a_backup_disappear(role: str) -> None:
    for name in ("1.root.json", "27.root.json", "365.root.json", "timestamp.json"):
        assert not may(role, Request("s3:DeleteObject", f"{TRUST}/{name}", SECURE))
    for resource in (
        f"{TRUST}/1.root.json",
        f"{FACTS['objects']}/blobs/blake3/x",
        f"{FACTS['backups']}/daily/x",
    ):
        for action in ("s3:DeleteObjectVersion", "s3:BypassGovernanceRetention", "s3:PutObjectRetention"):
            assert not may(role, Request(action, resource, SECURE))
    assert not may(role, Request("s3:DeleteObject", f"{FACTS['backups']}/daily/x", SECURE))
    assert may(role, Request("s3:DeleteObject", f"{TRUST}/draft.root.json", SECURE)) == (role == "owner")


def test_the_buckets_refuse_even_administrators() -> None:
    """Their policies deny whatever an identity is allowed."""
    everything = [{"Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}]}]
    root = Request("s3:DeleteObject", f"{TRUST}/1.root.json", SECURE)
    version = Request("s3:DeleteObjectVersion", f"{FACTS['backups']}/daily/x", SECURE)
    overwrite = Request(
        "s3:PutObject", f"{FACTS['objects']}/blobs/x", SECURE | {"s3:ObjectCreationOperation": "true"}
    )
    for request in (root, version, overwrite):
        assert allowed(request, everything)
        assert not allowed(request, everything, bucket_policies(request.resource))


@pytest.mark.parametrize(("key", "value"), [("aws:SecureTransport", "false"), ("s3:TlsVersion", "1.1")])
def test_plain_http_and_old_tls_are_refused(recorded: dict[str, list[Request]], key: str, value: str) -> None:
    for role, requests in recorded.items():
        for request in requests:
            if request.action.startswith("s3:"):
                assert not may(role, replace(request, context={**request.context, key: value}))


def test_kms_is_asked_for_the_public_half_and_signatures_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What the registry's own signer asks about the key of each role, and who may do that."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", REGION)
    monkeypatch.setattr("boto3.DEFAULT_SESSION", None)
    said: list[Request] = []
    with kms.running() as service:
        monkeypatch.setenv("AWS_ENDPOINT_URL_KMS", service.url)
        answer = service.answer

        def noting(operation: str, request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
            names = [name for name in ("SigningAlgorithm", "MessageType") if name in request]
            role = request["KeyId"].removeprefix("alias/")
            context = {f"kms:{name}": request[name] for name in names}
            said.append(Request(f"kms:{operation}", FACTS[f"{role}_key"], context))
            return answer(operation, request)

        service.answer = noting  # type: ignore[method-assign]
        ring = KeyRing(folder=tmp_path, uris={role: service.make(role) for role in KEYS})
        for role in KEYS:
            ring.signer(role).sign(b"payload")

    def able(role: str, action: str) -> set[str]:
        return {one.resource.rpartition("/")[2] for one in said if one.action == action and may(role, one)}

    assert {request.action for request in said} == {"kms:GetPublicKey", "kms:Sign"}
    assert {role: able(role, "kms:Sign") for role in DOES} == {
        "publisher": {"publisher", "scanner", "evaluator", "online"},
        "approver": {"approver", "online"},
        "owner": {"publisher", "approver", "online"},
        "maintenance": {"online"},
    } | {role: set() for role in ("serving", "backup", "mlflow", "external-secrets")}
    assert all(able(role, "kms:Sign") <= able(role, "kms:GetPublicKey") for role in DOES)
    context = {"kms:SigningAlgorithm": "ECDSA_SHA_256", "kms:MessageType": "RAW"}
    assert not may("approver", Request("kms:Sign", FACTS["approver_key"], context)), (
        "not what the registry sends"
    )


def test_secrets_artifacts_and_the_data_key_are_for_their_roles_alone() -> None:
    secret = Request("secretsmanager:GetSecretValue", FACTS["secrets"].replace("*", "mlflow-AbCdEf"))
    master = replace(secret, resource=FACTS["master_secret"])
    other = replace(secret, resource=FACTS["master_secret"].replace("db-1", "db-2"))
    artifact = Request(
        "s3:PutObject", f"{FACTS['mlflow']}/1/artifact", {"s3:ObjectCreationOperation": "true"}
    )
    unlock = Request("kms:Decrypt", FACTS["data_key"], {"kms:ViaService": f"rds.{REGION}.amazonaws.com"})
    found = [
        [role for role in DOES if may(role, request)] for request in (secret, master, other, artifact, unlock)
    ]
    assert found == [["external-secrets"], ["external-secrets"], [], ["mlflow"], []]


def test_mlflow_keeps_its_artifacts_and_backup_sees_old_versions() -> None:
    """What no command of the registry asks: MLflow, External Secrets, and who brings an object back."""
    folder, file = FACTS["mlflow"], f"{FACTS['mlflow']}/1/artifact"
    mlflow = [Request(f"s3:{name}", folder) for name in ("ListBucket", "ListBucketMultipartUploads")]
    mlflow += [Request(f"s3:{name}Object", file) for name in ("Get", "Put", "Delete")]
    mlflow += [Request(f"kms:{name}", FACTS["data_key"], VIA_S3) for name in ("Decrypt", "GenerateDataKey")]
    assert all(may("mlflow", request) for request in mlflow)
    weights = f"{FACTS['objects']}/models/x/adapter_weights/pytorch_lora_weights.safetensors"
    old = (
        Request("s3:GetObjectVersion", weights, SECURE),
        Request("s3:ListBucketVersions", FACTS["bucket"], SECURE),
    )
    assert [[role for role in DOES if may(role, request)] for request in old] == [["backup"], ["backup"]]
    via = {"kms:ViaService": f"secretsmanager.{REGION}.amazonaws.com"}
    opens = Request("kms:Decrypt", FACTS["data_key"], via)
    assert [role for role in DOES if may(role, opens)] == ["external-secrets"]
