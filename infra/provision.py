"""What the servers of a platform need before it runs on them: databases, buckets, accounts, the registry.

`infra.local` calls the functions for `make up`; in the containers this file is a program of its own:

    python provision.py storage PASSWORDS    databases and their roles in PostgreSQL, buckets on the S3 server
    python provision.py registry PASSWORDS   accounts of MLflow, the registry, and its root pinned for serving

PASSWORDS is a JSON file, service -> account -> password, such as `infra.images.make_secrets` writes; servers
are found by the variables that their own clients read (PGHOST, AWS_ENDPOINT_URL_S3, MLFLOW_TRACKING_URI).

Everything can be done again: what is there stays, and a password that does not sign in any more is set to the
one that is given.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any

#: Each belongs to a role of the same name.
DATABASES = ("registry", "mlflow", "prefect", "serving")
BUCKETS = ("adapters", "mlflow")
#: Accounts of MLflow beside its "admin".
ACCOUNTS = ("publisher", "reader")
_ALL = ("Read", "Write", "List", "Tagging")
#: What each identity of the S3 server may do: serving only reads, and MLflow has no business among adapters.
ACTIONS: Mapping[str, tuple[str, ...]] = {
    "admin": ("Admin", *_ALL),
    "publisher": tuple(f"{action}:adapters" for action in _ALL),
    "reader": ("Read:adapters", "List:adapters"),
    "mlflow": tuple(f"{action}:mlflow" for action in _ALL),
}
REGION = "us-east-1"
PINNED = "trust/pinned.root.json"
#: The S3 server answers before the volumes behind it take anything.
_WRITE_SECONDS = 120.0


def identities(passwords: Mapping[str, str], actions: Mapping[str, Sequence[str]] = ACTIONS) -> str:
    """Return the accounts of the S3 server as it reads them; the access key is the name of the identity.

    Args:
        passwords: secret key by identity.
        actions: what each may do.
    """
    rows = [
        {
            "name": name,
            "credentials": [{"accessKey": name, "secretKey": passwords[name]}],
            "actions": list(does),
        }
        for name, does in actions.items()
    ]
    return json.dumps({"identities": rows}, indent=1) + "\n"


def databases(host: str, port: int, passwords: Mapping[str, str]) -> list[str]:
    """Make each database with a role of its name that alone gets in, and return what was made.

    Args:
        host: of PostgreSQL.
        port: of PostgreSQL.
        passwords: of each role, and as "admin" that of the superuser ``postgres``.

    Raises:
        psycopg.Error: the server does not answer, or refuses.
    """
    import psycopg
    from psycopg import sql

    where: dict[str, Any] = {"host": host, "port": port, "connect_timeout": 10, "client_encoding": "utf8"}
    made = []
    with psycopg.connect(
        **where, user="postgres", dbname="postgres", password=passwords["admin"], autocommit=True
    ) as admin:
        # One at a time, until the connection ends: two that start together would both make what is missing.
        admin.execute("SELECT pg_advisory_lock(hashtext('adapter-foundry provision'))")
        roles = {row[0] for row in admin.execute("SELECT rolname FROM pg_roles")}
        there = {row[0] for row in admin.execute("SELECT datname FROM pg_database")}
        for name in DATABASES:
            role, password = sql.Identifier(name), sql.Literal(passwords[name])
            if name not in roles:
                admin.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(role, password))
            if name not in there:
                admin.execute(sql.SQL("CREATE DATABASE {} OWNER {}").format(role, role))
                made.append(f"database {name}")
            admin.execute(sql.SQL("REVOKE ALL ON DATABASE {} FROM PUBLIC").format(role))
            try:
                psycopg.connect(**where, user=name, dbname=name, password=passwords[name]).close()
            except psycopg.OperationalError:
                admin.execute(sql.SQL("ALTER ROLE {} PASSWORD {}").format(role, password))
                made.append(f"password of {name}")
    return made


def buckets(endpoint: str, admin_key: str, names: Sequence[str] = BUCKETS) -> list[str]:
    """Make the buckets, wait until they take objects, and return what was made.

    Args:
        endpoint: URL of the S3 server.
        admin_key: secret key of the identity "admin".
        names: of the buckets.

    Raises:
        botocore.exceptions.BotoCoreError: the server does not answer.
        botocore.exceptions.ClientError: it refuses, or takes nothing for two minutes.
    """
    import boto3
    from botocore.exceptions import ClientError

    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name=REGION,
        aws_access_key_id="admin",
        aws_secret_access_key=admin_key,
    )
    there = {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}
    made = []
    end = time.monotonic() + _WRITE_SECONDS
    for name in names:
        if name in there:
            continue
        client.create_bucket(Bucket=name)
        made.append(f"bucket {name}")
        while True:
            try:
                client.put_object(Bucket=name, Key="ready", Body=b"")
                break
            except ClientError:
                if time.monotonic() > end:
                    raise
                time.sleep(1)
    return made


def accounts(address: str, passwords: Mapping[str, str]) -> list[str]:
    """Make MLflow's accounts, or give them the password that is written down; return what was made.

    Args:
        address: of MLflow's server.
        passwords: of "admin" and of each of `ACCOUNTS`.

    Raises:
        OSError: the server does not answer, or refuses.
    """
    made = []
    for name in ACCOUNTS:
        if _signs_in(address, name, passwords[name]):
            continue
        body = {"username": name, "password": passwords[name]}
        try:
            ask_mlflow(address, f"users/get?username={name}", "admin", passwords["admin"])
        except urllib.error.HTTPError as error:
            if error.code != HTTPStatus.NOT_FOUND:
                raise
            ask_mlflow(address, "users/create", "admin", passwords["admin"], body)
            made.append(f"account {name}")
        else:
            ask_mlflow(address, "users/update-password", "admin", passwords["admin"], body, "PATCH")
            made.append(f"password of {name}")
    return made


def _signs_in(address: str, name: str, password: str) -> bool:
    try:
        ask_mlflow(address, "experiments/search", name, password, {"max_results": 1})
    except urllib.error.HTTPError as error:
        if error.code != HTTPStatus.UNAUTHORIZED:
            raise
        return False
    return True


def ask_mlflow(
    address: str,
    path: str,
    account: str,
    password: str,
    body: Mapping[str, Any] | None = None,
    method: str | None = None,
    timeout: float = 30.0,
) -> Any:
    """Return the answer of MLflow's REST API to a GET, or to a POST of ``body``.

    Raises:
        OSError: it does not answer, or refuses.
    """
    token = base64.b64encode(f"{account}:{password}".encode()).decode()
    request = urllib.request.Request(  # noqa: S310 (the address is our own server's)
        f"{address}/api/2.0/mlflow/{path}",
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json", "Authorization": f"Basic {token}"},
        method=method,
    )
    # A proxy of the environment must not stand between the parts of a platform.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=timeout) as answer:
        return json.loads(answer.read() or b"{}")


def registry(serving_home: Path) -> list[str]:
    """Make the team's registry in the data folder of this process, and let serving believe its root.

    Args:
        serving_home: data folder of serving; it gets the pinned root, and never a private key.

    Raises:
        subprocess.CalledProcessError: a command of the registry failed, and has told why.
    """
    servers = {
        "--store": os.environ["ADAPTER_FOUNDRY_STORE"],
        "--mlflow": os.environ["MLFLOW_TRACKING_URI"],
        "--ledger": os.environ["ADAPTER_FOUNDRY_LEDGER"],
    }
    words = [word for pair in servers.items() for word in pair]
    subprocess.run(["registry", "init", "--server", *words], check=True, stdout=sys.stderr)
    if (serving_home / PINNED).exists():
        return []
    root = subprocess.run(["registry", "trust", "export"], check=True, stdout=subprocess.PIPE).stdout
    environment = {**os.environ, "ADAPTER_FOUNDRY_HOME": str(serving_home)}
    subprocess.run(
        ["registry", "trust", "pin", "-"], input=root, env=environment, check=True, stdout=sys.stderr
    )
    return ["root for serving"]


def main(step: str, secrets_file: str, serving_home: str = "/serving/foundry") -> None:
    """Do one of the two steps of the containers, and tell what was made."""
    passwords = json.loads(Path(secrets_file).read_bytes())
    if step == "storage":
        made = databases(os.environ["PGHOST"], int(os.environ.get("PGPORT", "5432")), passwords["postgres"])
        made += buckets(os.environ["AWS_ENDPOINT_URL_S3"], passwords["s3"]["admin"])
    elif step == "registry":
        made = accounts(os.environ["MLFLOW_TRACKING_URI"], passwords["mlflow"])
        made += registry(Path(serving_home))
    else:
        raise SystemExit(f"{step!r} is no step: storage or registry")
    print(f"{step}: {', '.join(made) or 'all was there'}", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
