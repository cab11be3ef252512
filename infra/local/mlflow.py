"""The MLflow server with accounts: rows in the database, artifacts in S3, which go through the server."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping

from infra import provision
from infra.local import postgres, s3
from infra.local.errors import Missing
from infra.local.passwords import Passwords
from infra.local.place import Place, write
from infra.local.ports import HOST
from infra.local.service import Service, python

NAME = "mlflow"
ADMIN, PUBLISHER = "admin", "publisher"
_ARTIFACTS = "s3://mlflow/artifacts"


def url(ports: Mapping[str, int]) -> str:
    """Return its address, which is the tracking URI too."""
    return f"http://{HOST}:{ports[NAME]}"


def variables(account: str, ports: Mapping[str, int], secrets: Passwords) -> dict[str, str]:
    """Return the variables by which MLflow's clients find the server and show who they are."""
    return {
        "MLFLOW_TRACKING_URI": url(ports),
        "MLFLOW_TRACKING_USERNAME": account,
        "MLFLOW_TRACKING_PASSWORD": secrets[NAME][account],
    }


def database(where: Place, ports: Mapping[str, int], on_postgres: bool) -> str:
    """Return the URI of its database; the password comes by ``PGPASSWORD``."""
    folder = where.services / NAME
    return postgres.uri("mlflow", ports) if on_postgres else f"sqlite:///{folder / 'mlflow.db'}"


def service(
    where: Place, ports: Mapping[str, int], secrets: Passwords, *, on_postgres: bool, workers: int
) -> Service:
    """Write the configuration of accounts and return the service.

    Raises:
        Missing: a package is not installed.
    """
    for module in ("mlflow", "flask_wtf"):
        if importlib.util.find_spec(module) is None:
            raise Missing(
                f"{module} is not installed, which MLflow's accounts need",
                "install the extra: pip install 'adapter-foundry[platform]', or run `make setup`",
            )
    folder = where.services / NAME
    folder.mkdir(exist_ok=True)
    rows = database(where, ports, on_postgres)
    accounts = rows if on_postgres else f"sqlite:///{folder / 'accounts.db'}"
    text = (
        "[mlflow]\n"
        "default_permission = READ\n"
        f"database_uri = {accounts.replace('%', '%%')}\n"
        f"admin_username = {ADMIN}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        "auth_cache_ttl_seconds = 60\n"
    )
    config = folder / "accounts.ini"
    if not config.is_file() or config.read_text("utf-8") != text:
        write(config, text)
    command = [
        *python("mlflow", "server", "--host", HOST, "--port", str(ports[NAME])),
        *("--workers", str(workers), "--app-name", "basic-auth"),
        *("--backend-store-uri", rows, "--artifacts-destination", _ARTIFACTS),
    ]
    return Service(
        name=NAME,
        command=command,
        environment={
            **s3.variables("mlflow", ports, secrets),
            **({"PGPASSWORD": secrets["postgres"]["mlflow"]} if on_postgres else {}),
            "HOME": str(folder),
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets[NAME]["cookies"],
            "MLFLOW_AUTH_ADMIN_PASSWORD": secrets[NAME][ADMIN],
            "MLFLOW_AUTH_CONFIG_PATH": str(config),
        },
        folder=folder,
        facts={"accounts": text},
        stop_seconds=20,
        many=True,
    )


def probe(ports: Mapping[str, int], secrets: Passwords, timeout: float) -> None:
    """Sign in and ask for experiments, which takes the server, its accounts and its database."""
    provision.ask_mlflow(
        url(ports), "experiments/search", ADMIN, secrets[NAME][ADMIN], {"max_results": 1}, timeout=timeout
    )


def set_up(ports: Mapping[str, int], secrets: Passwords) -> list[str]:
    """Make the accounts, or give them the password that is written down; return what was made."""
    return provision.accounts(url(ports), secrets[NAME])


def renew(ports: Mapping[str, int], before: Passwords, after: Passwords, keep: Callable[[], None]) -> None:
    """Give the administrator another password, and have it written down.

    Raises:
        OSError: the server does not answer, or refuses.
    """
    old, new = before[NAME][ADMIN], after[NAME][ADMIN]

    def change(mine: str, to: str) -> None:
        body = {"username": ADMIN, "password": to, "current_password": mine}  # nobody changes his own without
        provision.ask_mlflow(url(ports), "users/update-password", ADMIN, mine, body, "PATCH")

    change(old, new)
    try:
        keep()
    except BaseException:
        change(new, old)
        raise
