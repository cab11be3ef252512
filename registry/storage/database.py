"""Databases by URI, for the audit log and the index: opening them, and ending their exceptions at one seam.

SQLite (``sqlite:////absolute/file.db``) serves one machine, PostgreSQL (``postgresql+psycopg://…``) a team.
Passwords in a URI are never shown.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from registry.errors import DigestMismatch, NetworkError, UsageError, shown

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine

SQLITE: Final = "sqlite"
POSTGRESQL: Final = "postgresql+psycopg"
_WAIT_SECONDS: Final = 60
_CONNECT_SECONDS: Final = 10
_PASSWORD: Final = re.compile(r"(?<=://)([^/@:\s]*):[^/?\s]*@|(?<=[?&]password=)[^&\s]*", re.IGNORECASE)


def masked(uri: str) -> str:
    """Return a URI for people: printable, and without its password."""
    return shown(without_passwords(uri))


def without_passwords(text: str) -> str:
    """Return a text in which the passwords of URIs are masked."""
    return _PASSWORD.sub(lambda found: f"{found[1] or ''}:***@" if "@" in found[0] else "***", text)


def check_uri(uri: str) -> str:
    """Return the URI if it names a kind of database that is supported.

    Raises:
        UsageError: it does not.
    """
    kind, separator, rest = uri.partition("://")
    if kind == POSTGRESQL and rest.partition("/")[0].count("@") > 1:
        # What follows the first one would be taken for a host, and be named in messages.
        raise UsageError(
            f"the password in {masked(uri)} contains an @", mend="write it as %40, or set PGPASSWORD instead"
        )
    if separator and kind == POSTGRESQL and rest.strip("/"):
        return uri
    if separator and kind == SQLITE and rest.startswith("/") and Path(rest[1:]).is_absolute():
        return uri
    raise UsageError(
        f"{masked(uri)} is not the URI of a database that can hold the audit log",
        mend=f"write {SQLITE}:////absolute/path/to/file.db or {POSTGRESQL}://user:password@host/database",
    )


def sqlite_file(uri: str) -> Path | None:
    """Return the file of a SQLite URI; None for a database on a server."""
    kind, _, rest = uri.partition("://")
    return Path(rest[1:].partition("?")[0]) if kind == SQLITE else None


def open_engine(uri: str) -> Engine:
    """Return an engine without a pool: every transaction has its own connection, safe across forks.

    On SQLite a transaction of a connection with the option ``serial`` begins by locking the file.

    Raises:
        UsageError: the URI is wrong, or a driver is not installed.
    """
    check_uri(uri)
    _require("sqlalchemy", "catalog")
    from sqlalchemy import create_engine, event
    from sqlalchemy.exc import ArgumentError
    from sqlalchemy.pool import NullPool

    try:
        if sqlite_file(uri) is None:
            _require("psycopg", "cloud")
            return create_engine(uri, poolclass=NullPool, connect_args=_server_options())
        engine = create_engine(uri, poolclass=NullPool, connect_args={"timeout": _WAIT_SECONDS})
    except (ArgumentError, ValueError) as error:
        raise UsageError(
            f"{masked(uri)} is not the URI of a database", mend="check its port and its options"
        ) from error

    @event.listens_for(engine, "connect")
    def _no_implicit_transactions(connection: Any, _record: object) -> None:
        connection.isolation_level = None

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        serial = connection.get_execution_options().get("serial", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if serial else "BEGIN")

    return engine


def reach(uri: str) -> None:
    """Connect to a database once, and wait no longer than a connection takes.

    Raises:
        NetworkError: it does not answer, or refuses the account.
        UsageError: the URI is wrong, or a driver is not installed.
    """
    engine = open_engine(uri)
    with explained(uri):
        engine.connect().close()


@contextlib.contextmanager
def explained(uri: str) -> Iterator[None]:
    """Turns what SQLAlchemy raises inside into an error that explains itself.

    Raises:
        NetworkError: the database does not answer, is busy, or refuses the account.
        DigestMismatch: the file is no database any more.
    """
    from sqlalchemy.exc import DBAPIError, SQLAlchemyError

    try:
        yield
    except DBAPIError as error:
        reason = shown(str(error.orig).strip().partition("\n")[0])
        # SQLite's own word for a file that was overwritten or cut; a server does not say it.
        if "not a database" in reason or "malformed" in reason:
            raise DigestMismatch(
                f"the database {masked(uri)} is damaged: {reason}",
                mend="find out who changed it, and restore it from a backup",
            ) from error
        raise NetworkError(
            f"the database {masked(uri)} failed: {reason}",
            mend="check that it runs, that this machine reaches it and that the account may write",
        ) from error
    except SQLAlchemyError as error:
        raise NetworkError(
            f"the database {masked(uri)} failed: {shown(error)}", mend="try again in a moment"
        ) from error


def _server_options() -> dict[str, Any]:
    """No wait is endless: neither for the connection, nor for a lock, nor for an answer."""
    wait = _WAIT_SECONDS * 1000
    return {
        "connect_timeout": _CONNECT_SECONDS,
        "options": f"-c lock_timeout={wait} -c statement_timeout={wait}",
        "application_name": "adapter-foundry",
    }


def _require(module: str, extra: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise UsageError(
            f"this database needs {module}, which is not installed",
            mend=f"pip install 'adapter-foundry[{extra}]'",
        )
