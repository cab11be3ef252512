"""The Secrets of overlays/dev, from a file `.env` beside it that git ignores.

``python -m infra.kubernetes.secrets | kubectl apply -f -`` is all of it. The first time it makes the file,
readable by its owner only, with a random value for everything; after that it never changes it. In
overlays/prod these Secrets come from a secret manager (External Secrets), under the same names and with the
same keys.
"""

from __future__ import annotations

import json
import os
import secrets
import tempfile
from collections.abc import Mapping
from pathlib import Path

import click

from registry import command
from registry.errors import UsageError

FILE = Path(__file__).with_name("overlays") / "dev" / ".env"
DATABASES = ("registry", "mlflow", "prefect", "serving")
#: Who may do what in S3; SeaweedFS' words for it.
IDENTITIES = {
    "publisher": ("Read:adapters", "List:adapters", "Write:adapters", "Tagging:adapters"),
    "reader": ("Read:adapters", "List:adapters"),
    "mlflow": ("Read:mlflow", "List:mlflow", "Write:mlflow"),
}
_MODE = 0o600
_BYTES = 24


def names() -> tuple[str, ...]:
    """Return the variables of the file."""
    return (
        "DATABASE_ADMIN_PASSWORD",
        *(f"{name.upper()}_DATABASE_PASSWORD" for name in DATABASES),
        *(f"S3_{name.upper()}_{part}" for name in IDENTITIES for part in ("KEY", "SECRET")),
        "MLFLOW_ADMIN_PASSWORD",
        "MLFLOW_FLASK_SECRET_KEY",
        "PREFECT_AUTH_STRING",
        "SERVING_API_KEY",
        "SERVING_KEYS",
    )


def make(file: Path) -> None:
    """Write a new file with a random value for each of `names`; one that is there stays as it is.

    Raises:
        registry.errors.UsageError: it cannot be written.
    """
    values = {name: secrets.token_urlsafe(_BYTES) for name in names()}
    values["PREFECT_AUTH_STRING"] = "admin:" + values["PREFECT_AUTH_STRING"]
    values["SERVING_API_KEY"], values["SERVING_KEYS"] = _api_key()
    try:
        with open(
            os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _MODE), "w", encoding="utf-8"
        ) as stream:
            stream.writelines(f"{name}={value}\n" for name, value in values.items())
    except FileExistsError:
        return
    except OSError as error:
        raise UsageError(f"{file} cannot be written: {error.strerror}", mend="name another file") from error


def _api_key() -> tuple[str, str]:
    """Return a key of the service for the person at this laptop, and the file that serving knows it by."""
    from serving.http.keyring import Keys

    with tempfile.TemporaryDirectory() as folder:
        token, _ = Keys.open(Path(folder)).add("laptop", ["admin"])
        (kept,) = Path(folder).rglob("keys.json")
        return token, json.dumps(json.loads(kept.read_bytes()))


def read(file: Path) -> dict[str, str]:
    """Return the values of a file.

    Raises:
        registry.errors.UsageError: it is missing, others may read it, or a value is missing.
    """
    try:
        others = file.stat().st_mode & 0o077
        lines = file.read_text("utf-8").splitlines()
    except FileNotFoundError as error:
        raise UsageError(
            f"the secrets of overlays/dev are missing: there is no {file}",
            "run `python -m infra.kubernetes.secrets` without --no-make, which makes it, or copy it from "
            "whoever made this cluster",
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} cannot be read: {error}", mend="correct or remove that file") from error
    if others:
        raise UsageError(f"others may read {file}", mend=f"run `chmod 600 {file}`")
    pairs = [line.partition("=") for line in lines if line.strip() and not line.startswith("#")]
    values = {name.strip(): value.strip() for name, _, value in pairs}
    if missing := [name for name in names() if not values.get(name)]:
        raise UsageError(
            f"{file} has no value for {', '.join(missing)}",
            mend="add them; a file that is removed is made anew, but databases keep the old passwords",
        )
    return values


def manifests(values: Mapping[str, str]) -> list[dict[str, object]]:
    """Return the Secrets of the namespace for the values of a file."""

    def key(name: str) -> tuple[str, str]:
        return values[f"S3_{name.upper()}_KEY"], values[f"S3_{name.upper()}_SECRET"]

    def database(name: str) -> dict[str, str]:
        password = values[f"{name.upper()}_DATABASE_PASSWORD"]
        return {"host": "postgres", "port": "5432", "username": name, "password": password, "dbname": name}

    def identity(name: str) -> dict[str, object]:
        access, secret = key(name)
        credentials = [{"accessKey": access, "secretKey": secret}]
        return {"name": name, "credentials": credentials, "actions": list(IDENTITIES[name])}

    jobs, ledger = database("serving"), database("registry")
    data = {
        **{f"{name}-database": database(name) for name in DATABASES},
        "database-admin": {"password": values["DATABASE_ADMIN_PASSWORD"]},
        "s3": {"s3.json": json.dumps({"identities": [identity(name) for name in IDENTITIES]})},
        "mlflow": {
            "admin-password": values["MLFLOW_ADMIN_PASSWORD"],
            "flask-secret-key": values["MLFLOW_FLASK_SECRET_KEY"],
            "aws-access-key-id": key("mlflow")[0],
            "aws-secret-access-key": key("mlflow")[1],
        },
        "serving-secrets": {
            "jobs": f"postgresql+psycopg://serving:{jobs['password']}@postgres:5432/serving",
            "aws-access-key-id": key("reader")[0],
            "aws-secret-access-key": key("reader")[1],
        },
        "serving-keys": {"keys.json": values["SERVING_KEYS"]},
        # Its keys are variables of the worker and of the pods of runs.
        "adapter-foundry": {
            "PGHOST": ledger["host"],
            "PGPORT": ledger["port"],
            "PGUSER": ledger["username"],
            "PGPASSWORD": ledger["password"],
            "MLFLOW_TRACKING_USERNAME": "admin",
            "MLFLOW_TRACKING_PASSWORD": values["MLFLOW_ADMIN_PASSWORD"],
            "PREFECT_API_AUTH_STRING": values["PREFECT_AUTH_STRING"],
            "AWS_ACCESS_KEY_ID": key("publisher")[0],
            "AWS_SECRET_ACCESS_KEY": key("publisher")[1],
        },
    }
    return [
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": name, "namespace": "adapter-foundry"},
            "stringData": pairs,
        }
        for name, pairs in data.items()
    ]


@click.command()
@click.option(
    "--file",
    type=click.Path(dir_okay=False, path_type=Path),
    default=FILE,
    help="Default: overlays/dev/.env.",
)
@click.option("--make/--no-make", "may_make", default=True, help="Make the file if it is missing.")
def main(file: Path, may_make: bool) -> None:
    """Print the Secrets of overlays/dev for `kubectl apply -f -`."""
    if may_make:
        make(file)
    values = read(file)
    click.echo(json.dumps({"apiVersion": "v1", "kind": "List", "items": manifests(values)}))


if __name__ == "__main__":
    command.run(main, "python -m infra.kubernetes.secrets")
