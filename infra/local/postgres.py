"""PostgreSQL: found on this machine, run without rights, with a role and a database for each purpose."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra import provision
from infra.local.errors import CannotStart, Missing, WrongFolder
from infra.local.passwords import Passwords
from infra.local.place import Place
from infra.local.ports import HOST
from infra.local.service import Service, shell

if TYPE_CHECKING:
    import psycopg

NAME = "postgres"
ADMIN = "postgres"
#: PostgreSQL 13 is the oldest whose extension pg_trgm, which Prefect needs, may be made without a superuser.
_OLDEST = 13
_FOLDERS = (
    "/usr/lib/postgresql",
    "/usr/pgsql-*",
    "/opt/homebrew/opt/postgresql*",
    "/usr/local/opt/postgresql*",
)
_NAMESPACE = ("unshare", "--user", "--map-user=1000", "--map-group=1000")
_SETTINGS = (
    *(f"listen_addresses={HOST}", "unix_socket_directories=", "password_encryption=scram-sha-256"),
    *("shared_buffers=64MB", "max_connections=100", "max_wal_size=512MB", "jit=off"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    """A PostgreSQL of this machine, and how it can be run.

    Attributes:
        folder: of its programs.
        major: its version.
        prefix: command before it: root runs it in a user namespace, for it refuses to be root.
        user: number and group under which it runs instead; None is whoever starts the platform.
    """

    folder: Path
    major: int
    prefix: tuple[str, ...] = ()
    user: tuple[int, int] | None = None


def engine(where: Place) -> Engine:
    """Return the PostgreSQL for a platform; one that has data takes no other version than theirs.

    Raises:
        Missing: there is none that can be run here; says why.
        WrongFolder: the data are of a version that is not installed.
    """
    found = installed()
    data = where.services / NAME / "data"
    if made(where):
        major = int((data / "PG_VERSION").read_text("utf-8"))
        if major not in found:
            have = ", ".join(map(str, sorted(found))) or "none"
            raise WrongFolder(
                f"the databases in {data} are of PostgreSQL {major}, and installed is: {have}",
                f"install PostgreSQL {major} (apt install postgresql-{major}); to change to another version, "
                "back up with the old one and make a new platform of that (docs/operations/local.md)",
            )
    elif not found:
        raise Missing("PostgreSQL is not installed", "apt install postgresql, or let SQLite do")
    else:
        major = max(found)
        if major < _OLDEST:
            raise Missing(f"PostgreSQL {major} is too old", f"install {_OLDEST} or newer, or let SQLite do")
    prefix, user = _without_rights(where)
    return Engine(folder=found[major], major=major, prefix=prefix, user=user)


def installed() -> dict[int, Path]:
    """Return the folders of the programs of each PostgreSQL on this machine, by version."""
    folders = [path for pattern in _FOLDERS for path in sorted(Path("/").glob(f"{pattern[1:]}/**/bin"))]
    if (on_path := shutil.which("postgres")) is not None:
        folders.append(Path(on_path).resolve().parent)
    found: dict[int, Path] = {}
    for folder in folders:
        if all(os.access(folder / name, os.X_OK) for name in ("postgres", "initdb")):
            said = subprocess.run(
                [folder / "postgres", "--version"], capture_output=True, text=True, check=False
            )
            if (number := re.search(r"\) (\d+)", said.stdout)) is not None:
                found[int(number[1])] = folder
    return found


def _without_rights(where: Place) -> tuple[tuple[str, ...], tuple[int, int] | None]:
    """Return how PostgreSQL is run so that it is not root: a prefix of the command, or another user.

    Raises:
        Missing: there is no way.
    """
    if os.geteuid() != 0:
        return (), None
    folder = where.services / NAME
    folder.mkdir(parents=True, exist_ok=True)
    owner = folder.stat().st_uid
    if owner == 0 and shutil.which("unshare") is not None:
        tried = subprocess.run([*_NAMESPACE, "true"], capture_output=True, check=False)
        if tried.returncode == 0:
            return _NAMESPACE, None
    with suppress(KeyError):
        account = pwd.getpwnam("postgres")
        os.chown(folder, account.pw_uid, account.pw_gid)
        where.services.chmod(0o711)  # every file in it that matters is closed by itself
        user = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": ()}
        reached = subprocess.run(["test", "-w", str(folder)], check=False, **user)
        if reached.returncode == 0:
            return (), (account.pw_uid, account.pw_gid)
        os.chown(folder, 0, 0)
        where.services.chmod(0o700)
    raise Missing(
        "PostgreSQL refuses to run as root, this system lets nobody make user namespaces, and the account "
        f"postgres does not exist or cannot reach {folder}",
        "run this as an ordinary user, set ADAPTER_FOUNDRY_HOME to a folder that postgres reaches, or let "
        "SQLite do",
    )


def made(where: Place) -> bool:
    """Return whether the databases' folder is there, whole."""
    return (where.services / NAME / "data" / "PG_VERSION").is_file()


def make(where: Place, with_engine: Engine, secrets: Passwords) -> bool:
    """Make the databases' folder; one that a killed start left half-made is made anew.

    Returns:
        whether it was made now.

    Raises:
        CannotStart: initdb refuses.
    """
    if made(where):
        return False
    folder = where.services / NAME
    folder.mkdir(mode=0o700, exist_ok=True)  # for root it is there, and may belong to another account
    half, password = folder / "data.new", folder / "password"
    shutil.rmtree(half, ignore_errors=True)
    password.touch(mode=0o600)
    password.write_text(secrets[NAME]["admin"])
    user: dict[str, Any] = {}
    if with_engine.user is not None:
        os.chown(password, *with_engine.user)
        user = {"user": with_engine.user[0], "group": with_engine.user[1], "extra_groups": ()}
    ran = subprocess.run(
        [
            *(*with_engine.prefix, str(with_engine.folder / "initdb"), "-D", str(half), "-U", ADMIN),
            *("-A", "scram-sha-256", f"--pwfile={password}", "-E", "UTF8", "--locale=C.UTF-8"),
            "--data-checksums",
        ],
        cwd=folder, env=shell(), capture_output=True, text=True, check=False, **user,
    )  # fmt: skip
    password.unlink()
    if ran.returncode != 0:
        raise CannotStart(
            f"initdb could not make the databases: {ran.stderr.strip()[-800:]}",
            "correct that, or set ADAPTER_FOUNDRY_PLATFORM_DATABASE=sqlite",
        )
    half.rename(folder / "data")
    return True


def service(where: Place, with_engine: Engine, ports: Mapping[str, int], secrets: Passwords) -> Service:
    """Return the service."""
    folder = where.services / NAME
    settings = [word for setting in _SETTINGS for word in ("-c", setting)]
    return Service(
        name=NAME,
        command=[
            *(*with_engine.prefix, str(with_engine.folder / "postgres"), "-D", str(folder / "data")),
            *("-p", str(ports[NAME]), *settings),
        ],
        folder=folder,
        user=with_engine.user,
        stop_signal="INT",  # the fast way to stop: clients are cut off
        stop_seconds=30,
        pid_file=folder / "data" / "postmaster.pid",
    )


def uri(database: str, ports: Mapping[str, int], driver: str = "psycopg", password: str = "") -> str:
    """Return the URI of a database with the role that owns it."""
    who = f"{database}:{password}" if password else database
    return f"postgresql+{driver}://{who}@{HOST}:{ports[NAME]}/{database}"


def connect(
    role: str, database: str, password: str, ports: Mapping[str, int], timeout: float = 10.0
) -> psycopg.Connection[Any]:
    """Return a connection; psycopg.Error says why there is none."""
    import psycopg

    return psycopg.connect(
        host=HOST, port=ports[NAME], user=role, dbname=database, password=password, autocommit=True,
        connect_timeout=max(2, int(timeout)), options=f"-c statement_timeout={int(timeout * 1000)}",
    )  # fmt: skip


def probe(ports: Mapping[str, int], secrets: Passwords, timeout: float) -> None:
    """Ask the database of the audit log a question."""
    with connect("registry", "registry", secrets[NAME]["registry"], ports, timeout) as connection:
        connection.execute("SELECT 1")


def listens(ports: Mapping[str, int], secrets: Passwords, timeout: float) -> None:
    """Raise psycopg.Error unless the server takes connections; of a new one nothing more can be asked."""
    with connect(ADMIN, "postgres", secrets[NAME]["admin"], ports, timeout) as connection:
        connection.execute("SELECT 1")


def set_up(ports: Mapping[str, int], secrets: Passwords) -> list[str]:
    """Make each database with a role of its name that alone gets in; return what was made."""
    return provision.databases(HOST, ports[NAME], secrets[NAME])


def renew(ports: Mapping[str, int], before: Passwords, after: Passwords, keep: Callable[[], None]) -> None:
    """Give the superuser another password, and have it written down, or neither.

    Raises:
        psycopg.Error: the server does not answer, or refuses.
    """
    from psycopg import sql

    with connect(ADMIN, "postgres", before[NAME]["admin"], ports) as connection, connection.transaction():
        role, password = sql.Identifier(ADMIN), sql.Literal(after[NAME]["admin"])
        connection.execute(sql.SQL("ALTER ROLE {} PASSWORD {}").format(role, password))
        keep()
