"""Passwords and keys of a platform: made once, kept in one file that only its owner reads."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping

from infra.local.errors import WrongFolder
from infra.local.place import Place, write
from registry.errors import UsageError

#: What each service needs.
NAMES: Mapping[str, tuple[str, ...]] = {
    "postgres": ("admin", "registry", "mlflow", "prefect", "serving"),
    "s3": ("admin", "publisher", "reader", "mlflow", "health", "volume-write", "volume-read", "filer-write",
           "filer-read"),
    "mlflow": ("admin", "publisher", "reader", "cookies"),
    "prefect": ("admin",),
}  # fmt: skip

Passwords = Mapping[str, Mapping[str, str]]


def passwords(where: Place) -> Passwords:
    """Return all passwords by service and name; those that are missing are made and kept.

    Raises:
        WrongFolder: the file is damaged.
    """
    try:
        kept = json.loads(where.secrets.read_bytes())
        made = {service: dict(kept.get(service, {})) for service in NAMES}
    except FileNotFoundError:
        made = {service: {} for service in NAMES}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise WrongFolder(
            f"{where.secrets} cannot be read: {error}",
            "correct it, it is JSON; if it is lost, docs/operations/local.md says what to do",
        ) from error
    missing = [
        (service, name) for service, names in NAMES.items() for name in names if name not in made[service]
    ]
    for service, name in missing:
        made[service][name] = _new()
    if missing:
        keep(where, made)
    if where.secrets.stat().st_mode & 0o077:
        where.secrets.chmod(0o600)
    return made


def renewed(found: Passwords, service: str, name: str) -> Passwords:
    """Return passwords of which one is another than before.

    Raises:
        UsageError: there is no such password.
    """
    for asked, known in ((service, found), (name, found.get(service, {}))):
        if asked not in known:
            raise UsageError(f"there is no password of {service} {name}", f"choose from: {', '.join(known)}")
    return {**found, service: {**found[service], name: _new()}}


def keep(where: Place, found: Passwords) -> None:
    """Write all passwords down."""
    write(where.secrets, json.dumps(found, indent=1) + "\n")


def _new() -> str:
    return secrets.token_hex(20)
