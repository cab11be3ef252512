"""A real PostgreSQL for tests: its own folder, a free port of the loopback, gone when the tests are.

PostgreSQL refuses to run as root, so a run as root (in a container) starts it as the user ``postgres`` or
``nobody``. Nothing is synchronised to the disk: the data need not outlive the tests.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from servers.ports import kept_port

_FOLDERS = ("/usr/local/bin", *(f"/usr/lib/postgresql/{number}/bin" for number in range(18, 12, -1)))
_FAST = (
    "fsync=off",
    "synchronous_commit=off",
    "full_page_writes=off",
    "shared_buffers=32MB",
    "max_connections=100",
    "max_wal_size=256MB",
)
_START_SECONDS = 300.0


@dataclass(kw_only=True)
class Postgres:
    """A running server; every `database` is a new and empty one."""

    port: int
    password: str
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def uri(self, database: str) -> str:
        """The URI of a database, with its password."""
        return f"postgresql+psycopg://tester:{self.password}@127.0.0.1:{self.port}/{database}"

    def database(self) -> str:
        """Makes a database and returns its URI."""
        name = f"test_{os.getpid()}_{next(self._numbers)}"
        self.execute("postgres", f'CREATE DATABASE "{name}"')
        return self.uri(name)

    def drop(self, *names: str) -> None:
        """Takes databases away, and the roles of the same names; those that are not there are no matter."""
        for name in names:
            # Without FORCE it waits a few seconds for connections that were closed just now, and gives up.
            self.execute("postgres", f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
            self.execute("postgres", f'DROP ROLE IF EXISTS "{name}"')

    def execute(self, database: str, *statements: str) -> None:
        """Runs SQL, each statement by itself."""
        import psycopg

        with psycopg.connect(
            host="127.0.0.1",
            port=self.port,
            user="tester",
            password=self.password,
            dbname=database,
            autocommit=True,
            connect_timeout=60,
        ) as connection:
            for statement in statements:
                connection.execute(statement.encode())

    def query(self, database: str, statement: str) -> list[tuple[object, ...]]:
        """Runs one query and returns its rows."""
        import psycopg

        with psycopg.connect(
            host="127.0.0.1", port=self.port, user="tester", password=self.password, dbname=database
        ) as connection:
            return connection.execute(statement.encode()).fetchall()


def missing() -> str | None:
    """Why PostgreSQL cannot be started here, or None."""
    if _binary("initdb") is None or _binary("postgres") is None:
        return "PostgreSQL is not installed (initdb and postgres)"
    if os.geteuid() == 0 and _account() is None:
        return "PostgreSQL refuses to run as root, and there is no user postgres or nobody"
    return None


@contextlib.contextmanager
def running() -> Iterator[Postgres]:
    """Starts a server and stops it."""
    initdb, postgres, account = _binary("initdb"), _binary("postgres"), _account()
    assert initdb is not None
    assert postgres is not None
    root = Path(tempfile.mkdtemp(prefix="postgres-"))
    try:
        password = secrets.token_urlsafe(16)
        (root / "password").write_text(password)
        if account is not None:
            for path in (root, root / "password"):
                os.chown(path, account.pw_uid, account.pw_gid)
        user = (
            {} if account is None else {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": ()}
        )
        environment = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "HOME": str(root)}
        subprocess.run(
            [
                *(str(initdb), "-D", str(root / "data"), "-U", "tester", "-A", "scram-sha-256"),
                *(f"--pwfile={root / 'password'}", "-E", "UTF8", "--no-sync"),
            ],
            check=True,
            capture_output=True,
            cwd=root,
            env=environment,
            **user,
        )
        port = kept_port()
        options = [part for setting in _FAST for part in ("-c", setting)]
        with (root / "log").open("wb") as log:
            server = subprocess.Popen(
                [
                    *(str(postgres), "-D", str(root / "data"), "-p", str(port), "-h", "127.0.0.1"),
                    *("-k", "", *options),
                ],
                stdout=log,
                stderr=log,
                cwd=root,
                env=environment,
                **user,
            )
        try:
            found = Postgres(port=port, password=password)
            _wait(found, server, root / "log")
            yield found
        finally:
            server.send_signal(signal.SIGINT)  # the fast way to stop: clients are cut off
            try:
                server.wait(120)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _wait(server: Postgres, process: subprocess.Popen[bytes], log: Path) -> None:
    import psycopg

    deadline = time.monotonic() + _START_SECONDS
    while True:
        if process.poll() is not None:
            raise RuntimeError(f"PostgreSQL ended: {log.read_text()}")
        try:
            server.execute("postgres", "SELECT 1")
            return
        except psycopg.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _account() -> pwd.struct_passwd | None:
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    return None


def _binary(name: str) -> Path | None:
    for folder in _FOLDERS:
        path = Path(folder) / name
        if path.is_file() and os.access(path, os.X_OK):
            return path
    found = shutil.which(name)
    return None if found is None else Path(found)
