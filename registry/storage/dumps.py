"""Databases as files, and back: SQLite by its own online copy, PostgreSQL by pg_dump and pg_restore.

A dump is consistent although the database is used meanwhile. Passwords are handed to PostgreSQL's programs in
their environment, never among their arguments, where every user of the machine could read them. What a dump
says is believed when it is loaded: it is as trustworthy as the backup that holds it.

pg_restore loads in one transaction of its own, which cannot begin by removing what is there. So what is there
waits under another name, and comes back if the dump does not go in. psql could do all of it in one
transaction, but it runs commands of this machine that a forged dump may hold.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal
from urllib.parse import quote, unquote, urlsplit

from registry.errors import DigestMismatch, NetworkError, NotFound, RegistryError, UsageError, shown
from registry.storage.database import masked, without_passwords

Kind = Literal["sqlite", "postgresql"]
_DRIVER: Final = re.compile(r"^(sqlite|postgresql)(\+[a-z0-9]+)?://")
_FOLDERS: Final = (Path("/usr/lib/postgresql"), Path("/opt/homebrew/opt"))
_CONNECT_SECONDS: Final = "10"
_SQLITE_HEADER: Final = b"SQLite format 3\0"
_ASIDE: Final = "public_before_restore_"
"""What a database held waits in a schema of this name, with a random ending, until the dump is loaded."""
_EXAMPLES: Final = "sqlite:////absolute/file.db or postgresql+psycopg://user@host/database"


@dataclass(frozen=True, kw_only=True, slots=True)
class Database:
    """A database by its URI, as SQLAlchemy, MLflow or Prefect write it; the driver in it does not matter.

    Attributes:
        kind: which it is.
        address: the URI without driver and without password.
        password: of PostgreSQL, if the URI holds one; PGPASSWORD or a password file count otherwise.
        file: of SQLite.
    """

    kind: Kind
    address: str
    password: str | None = None
    file: Path | None = None

    @classmethod
    def of(cls, uri: str) -> Database:
        """Read a URI; ``env:NAME`` is the one in an environment variable.

        Raises:
            UsageError: it is none, or the variable is not set.
        """
        if uri.startswith("env:"):
            name = uri.removeprefix("env:")
            if name not in os.environ:
                raise UsageError(f"the environment has no variable {shown(name)}", "set it, or name another")
            uri = os.environ[name]
        found = _DRIVER.match(uri)
        rest = uri[found.end() :] if found else ""
        if found and found[1] == "sqlite" and rest.startswith("/") and Path(rest[1:]).is_absolute():
            return cls(kind="sqlite", address=masked(uri), file=Path(rest[1:].partition("?")[0]))
        parts = urlsplit(f"postgresql://{rest}")
        if found and found[1] == "postgresql" and parts.path.strip("/"):
            host = parts.netloc.rpartition("@")[2]
            user = f"{quote(unquote(parts.username))}@" if parts.username else ""
            address = parts._replace(netloc=user + host).geturl()
            password = unquote(parts.password) if parts.password else None
            return cls(kind="postgresql", address=address, password=password)
        raise UsageError(f"{masked(uri)} is not the URI of a database", f"write {_EXAMPLES}")

    # -- whole --

    def exists(self) -> bool:
        """Whether it holds anything.

        Raises:
            NetworkError: the server does not answer.
        """
        if self.file is not None:
            return self.file.exists() and self.file.stat().st_size > 0
        return bool(self._ask("SELECT 1 FROM pg_tables WHERE schemaname NOT IN "
                              "('pg_catalog', 'information_schema') LIMIT 1"))  # fmt: skip

    def major(self) -> int:
        """The major version of a PostgreSQL server; 0 for SQLite, whose files every version reads.

        Raises:
            NetworkError: the server does not answer.
        """
        return 0 if self.file is not None else int(str(self._ask("SHOW server_version_num")[0][0])) // 10_000

    def dump(self, target: Path) -> None:
        """Write what the database holds at one moment into a new file.

        Raises:
            NotFound: there is no such database.
            DigestMismatch: a SQLite file is damaged.
            NetworkError: the server does not answer.
            UsageError: PostgreSQL's programs are missing or too old for the server.
        """
        if self.file is not None:
            _copy_sqlite(self.file, target)
            return
        words = ("--format=custom", "--no-owner", "--no-privileges", f"--file={target}")
        self._run("pg_dump", self.major(), *words)

    def check(self, source: Path, major: int, *, replace: bool) -> None:
        """Find out whether a dump could be loaded, and change nothing; arguments as for `load`.

        Raises:
            DigestMismatch: the dump is none.
            UsageError: the server is older than the dump, PostgreSQL's programs are missing or cannot read
                it, or the account may not replace what the database holds.
            NetworkError: the server does not answer.
        """
        if self.file is not None:
            _check_sqlite(source)
            return
        here = self.major()
        if here < major:
            raise UsageError(
                f"the server of {self.address} is PostgreSQL {here}, the dump is of {major}",
                f"restore on PostgreSQL {major} or newer",
            )
        program = _program("pg_restore", max(here, major))
        told = subprocess.run(
            [str(program), "--list", str(source)], capture_output=True, text=True, check=False
        )
        if told.returncode:
            raise UsageError(
                f"{program} cannot read the dump for {self.address}: {shown(told.stderr.strip(), 300)}",
                "install the newest client programs of PostgreSQL, or take another backup",
            )
        # Up to PostgreSQL 14 this schema belongs to the superuser, also in a database of somebody else.
        owned = self._ask(
            "SELECT pg_has_role(nspowner, 'USAGE') AND has_database_privilege(current_database(), 'CREATE') "
            "FROM pg_namespace WHERE nspname = 'public'"
        )
        if replace and owned == [(False,)]:
            raise UsageError(
                f"the account may not replace the schema public of {self.address}",
                "have the superuser run `ALTER SCHEMA public OWNER TO` this account and `GRANT CREATE ON "
                "DATABASE` to it, or restore into an empty database",
            )

    def load(self, source: Path, major: int, *, replace: bool) -> None:
        """Make the database hold what a dump says: all of it, or, if anything fails, what it held before.

        Args:
            source: the dump.
            major: PostgreSQL's version that it was made of.
            replace: what the database holds is removed.

        Raises:
            DigestMismatch, UsageError: see `check`.
            NetworkError: the server does not answer, or the dump does not fit.
        """
        self.check(source, major, replace=replace)
        if self.file is not None:
            _place_sqlite(source, self.file)
            return
        words = ("--exit-on-error", "--single-transaction", "--no-owner", "--no-privileges", str(source))
        with self._replaced() if replace else contextlib.nullcontext():
            self._run("pg_restore", max(self.major(), major), *words)

    # -- PostgreSQL --

    @contextlib.contextmanager
    def _replaced(self) -> Iterator[None]:
        """Empties the database meanwhile: removed for good at the end, back as it was if anything fails.

        Extensions stay where they are looked for, because a dump makes only those that are not there.
        """
        aside, public = f"{_ASIDE}{secrets.token_hex(4)}", "public"
        extensions = [
            f"ALTER EXTENSION {name} SET SCHEMA "
            for (name,) in self._ask("SELECT quote_ident(extname) FROM pg_extension e JOIN pg_namespace n "
                                     "ON n.oid = e.extnamespace WHERE n.nspname = 'public'")
        ]  # fmt: skip
        there = bool(self._ask("SELECT 1 FROM pg_namespace WHERE nspname = 'public'"))
        away = [f"ALTER SCHEMA public RENAME TO {aside}"] if there else []
        self._ask(*away, "CREATE SCHEMA public", *(f"{words}{public}" for words in extensions))
        try:
            yield
        except BaseException as error:
            back = [f"ALTER SCHEMA {aside} RENAME TO public"] if there else []
            try:
                self._ask(*(f"{words}{aside}" for words in extensions), "DROP SCHEMA public CASCADE", *back)
            except RegistryError as again:
                raise RegistryError(
                    f"{shown(error)}; and what {self.address} held before could not be put back: "
                    f"{again.message}",
                    f"it is whole, in the schema {aside}: `DROP SCHEMA public CASCADE; ALTER SCHEMA {aside} "
                    "RENAME TO public`",
                ) from error
            raise
        # Also what restores left that were killed: it was to be removed then.
        schemas = self._ask("SELECT nspname FROM pg_namespace")
        old = [str(name) for (name,) in schemas if str(name).startswith(_ASIDE)]
        self._ask(*(f'DROP SCHEMA "{name}" CASCADE' for name in old))

    def _environment(self) -> dict[str, str]:
        mine = {} if self.password is None else {"PGPASSWORD": self.password}
        return os.environ | {"PGCONNECT_TIMEOUT": _CONNECT_SECONDS, "PGAPPNAME": "adapter-foundry"} | mine

    def _ask(self, *statements: str) -> list[tuple[object, ...]]:
        """Run statements in one transaction and return the rows of the last one."""
        from importlib.util import find_spec

        if find_spec("psycopg") is None:
            raise UsageError(
                "this database needs psycopg, which is not installed", "pip install 'adapter-foundry[cloud]'"
            )
        import psycopg

        rows: list[tuple[object, ...]] = []
        try:
            with psycopg.connect(
                self.address, password=self.password, connect_timeout=int(_CONNECT_SECONDS)
            ) as connection:
                for statement in statements:
                    answer = connection.execute(statement.encode())
                    rows = answer.fetchall() if answer.description else []
        except psycopg.Error as error:
            raise self._failed(str(error)) from error
        return rows

    def _run(self, program: str, major: int, *words: str) -> None:
        path = _program(program, major)
        result = subprocess.run(
            [str(path), "--no-password", f"--dbname={self.address}", *words],
            env=self._environment(), capture_output=True, text=True, check=False,
        )  # fmt: skip
        if result.returncode:
            raise self._failed(result.stderr)

    def _failed(self, said: str) -> NetworkError:
        lines = [line for line in without_passwords(said).strip().splitlines() if line.strip()]
        return NetworkError(
            f"the database {self.address} failed: {shown(lines[0] if lines else 'no reason given', 300)}",
            "check that it runs, that this machine reaches it and that the account owns it",
        )


def _program(name: str, major: int) -> Path:
    """PostgreSQL's program of a major version, or else of the next newer one: older ones refuse.

    Raises:
        UsageError: there is none.
    """
    candidates = [path for folder in _FOLDERS for path in folder.glob(f"*/bin/{name}")]
    on_path = shutil.which(name)
    candidates += [Path(on_path)] if on_path else []
    found: dict[int, Path] = {}
    for path in candidates:
        with contextlib.suppress(OSError, IndexError, ValueError):
            told = subprocess.run([str(path), "--version"], capture_output=True, text=True, check=False)
            version = re.findall(r"\d+", told.stdout)[0]
            found.setdefault(int(version), path)
    fitting = sorted(number for number in found if number >= major)
    if not fitting:
        have = f"only {name} {max(found)} is" if found else f"no {name} is"
        raise UsageError(
            f"{have} on this machine, and the server is PostgreSQL {major}",
            f"install PostgreSQL's client programs of version {major} (postgresql-client-{major})",
        )
    return found[fitting[0]]


# -- SQLite --


def _check_sqlite(source: Path) -> None:
    """Make sure that a file is a whole SQLite database; it may be anybody's, so nothing in it is run.

    Raises:
        DigestMismatch: it is not.
    """
    import sqlite3

    if source.stat().st_size == 0:
        return  # a database without any table
    with source.open("rb") as stream:
        if stream.read(len(_SQLITE_HEADER)) != _SQLITE_HEADER:
            raise DigestMismatch(
                "a dump in the backup is no SQLite database", "the backup was changed: take another one"
            )
    address = f"file:{quote(str(source))}?mode=ro&immutable=1"
    with _sqlite_explained(source), contextlib.closing(sqlite3.connect(address, uri=True)) as there:
        there.execute("PRAGMA trusted_schema=OFF")
        said = there.execute("PRAGMA quick_check").fetchone()[0]
    if said != "ok":
        raise _damaged(source, str(said))


def _copy_sqlite(source: Path, target: Path) -> None:
    import sqlite3

    if not source.is_file():
        raise NotFound(f"there is no database {source}", "check the URI")
    with _sqlite_explained(source):
        address = f"file:{quote(str(source))}?mode=ro"
        with (
            contextlib.closing(sqlite3.connect(address, uri=True, timeout=60)) as origin,
            contextlib.closing(sqlite3.connect(target)) as copy,
        ):
            origin.backup(copy)
            # A file alone, without the journal beside it that a reader of the copy would miss.
            copy.execute("PRAGMA journal_mode=DELETE")
            said = copy.execute("PRAGMA quick_check").fetchone()[0]
    if said != "ok":
        raise _damaged(source, str(said))


def _place_sqlite(source: Path, target: Path) -> None:
    """Make a file hold what a copy holds, whole or not at all; who has it open sees that from then on."""
    import sqlite3

    try:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not target.exists():
            temporary = target.with_name(f".{target.name}.incoming-{os.getpid()}")
            shutil.copyfile(source, temporary)
            temporary.chmod(0o600)
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
            temporary.replace(target)
            return
    except OSError as error:
        raise RegistryError(
            f"{target} cannot be written: {error.strerror or error}", "check the folder and its free space"
        ) from error
    with (
        _sqlite_explained(target),
        contextlib.closing(sqlite3.connect(source)) as origin,
        contextlib.closing(sqlite3.connect(target, timeout=60)) as there,
    ):
        origin.backup(there)


@contextlib.contextmanager
def _sqlite_explained(file: Path) -> Iterator[None]:
    import sqlite3

    try:
        yield
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError):
            raise NetworkError(
                f"the database {file} failed: {shown(error)}", "check its permissions and the free space"
            ) from error
        raise _damaged(file, str(error)) from error


def _damaged(file: Path, reason: str) -> DigestMismatch:
    return DigestMismatch(
        f"the database {file} is damaged: {shown(reason)}", "restore it from the last backup that is whole"
    )
