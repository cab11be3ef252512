"""Backups of a platform, and a new platform made of one: `registry backup` and `restore` with its databases.

Prefect's history stays behind: its pool belongs to one data folder. Deployments are made anew.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

from infra.local import administrator, mlflow, place, postgres, steps
from infra.local.errors import CannotStart, WrongFolder
from infra.local.passwords import Passwords, passwords
from infra.local.place import Place
from infra.local.service import REPOSITORY, python
from infra.local.settings import PlatformSettings
from infra.local.steps import Tell
from infra.local.supervision import Supervisor
from registry.vault import Vault

_LEDGER, _SERVING, _ACCOUNTS = "ledger", "serving", "accounts"
_SKIP = "skip"


def databases(
    where: Place, ports: Mapping[str, int], secrets: Passwords, *, on_postgres: bool
) -> dict[str, str]:
    """Return the URIs of the databases of a platform by their names in a backup, without the audit log's."""
    if on_postgres:
        words = secrets[postgres.NAME]
        return {name: postgres.uri(name, ports, password=words[name]) for name in (mlflow.NAME, _SERVING)}
    folder = where.services / mlflow.NAME
    return {
        mlflow.NAME: mlflow.database(where, ports, on_postgres=False),
        _ACCOUNTS: f"sqlite:///{folder / 'accounts.db'}",
        _SERVING: f"sqlite:///{where.home / 'serving' / 'jobs.db'}",
    }


def command(words: Sequence[str], named: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """Return a command of the registry with databases by name, and variables that hold their URIs."""
    variables, options = {}, []
    for name, uri in named.items():
        variable = f"PLATFORM_DATABASE_{name.upper()}"
        variables[variable] = uri
        options.append(f"--database={name}={uri if uri == _SKIP else f'env:{variable}'}")
    return [*python("registry.cli"), *words, *options], {**variables, "PYTHONPATH": str(REPOSITORY)}


def backup(where: Place, words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return the command that backs a platform up, and what it needs of the environment.

    Raises:
        NotRunning: it does not run.
    """
    Supervisor(where).ask("getState")
    kept = place.read(where)
    on_postgres = kept["database"] == "postgresql"
    found = databases(where, kept["ports"], passwords(where), on_postgres=on_postgres)
    if not on_postgres:  # the service makes its own with the first job
        found = {name: uri for name, uri in found.items() if os.path.exists(uri.removeprefix("sqlite:///"))}
    return command(["backup", *words], found)


def restore(
    where: Place, settings: PlatformSettings, source: str, at: str | None, words: Sequence[str],
    environment: Mapping[str, str], tell: Tell,
) -> list[str]:  # fmt: skip
    """Make a new platform of a backup, and bring it up; return what was done.

    Args:
        where: its folders; no platform is there.
        settings: of the platform.
        source: where the backup is.
        at: its name; None is the newest.
        words: further options of `registry restore`.
        environment: of whoever restores: credentials for a bucket, the passphrase of keys.
        tell: is given what happens.

    Raises:
        WrongFolder: a platform is there already.
        CannotStart: the registry's command fails; it has said why.
        Explained: something cannot be started, or the backup cannot be read.
    """
    _, manifest, _ = Vault.open(source).manifest(at)
    there = {dump.path: dump.kind for dump in manifest.databases}
    first = settings  # what the first start decides holds for every other one
    if settings.database == "auto" and there.get(_LEDGER) is not None:
        first = settings.model_copy(update={"database": there[_LEDGER]})
    place.claim(where)
    with steps.alone(where):
        if place.read(where).get("registry"):
            raise WrongFolder(
                f"there is a platform in {where.home}", "set ADAPTER_FOUNDRY_HOME to another folder"
            )
        found, done = steps.storage(where, first, tell)
        mine = databases(where, found.ports, found.secrets, on_postgres=found.engine is not None)
        named = {name: mine.get(name, _SKIP) for name in there if name != _LEDGER}
        asked, variables = command(["restore", source, *(("--at", at) if at else ()), *words], named)
        ran = subprocess.run(
            asked, env={**environment, **found.environment, **variables}, stdout=sys.stderr, check=False
        )
        if ran.returncode != 0:
            raise CannotStart(
                f"`registry restore` ended with {ran.returncode}",
                "do what it says above, then run the same command again: it goes on",
            )
        if mlflow.NAME in named:
            steps.upgrade_mlflow(found)
            steps.run(found, python(administrator.__name__), found[mlflow.NAME].environment)
        place.keep(where, {"registry": True})
        tell("restored the registry")
    return [*done, "restored the registry", *steps.up(where, settings, tell)[1]]
