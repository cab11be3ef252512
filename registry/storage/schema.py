"""Which form the tables of a database have, and bringing them to the form that this code knows.

Each set of tables has a small table of its own with one row, the revision; one of another name than Alembic's
usual one, because MLflow and Prefect may live in the same database. Databases from before there was such a
table are of the first revision. Alembic is imported only when something has to be migrated; the revision is
compared without it. A database that is newer than this code is never touched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from registry.errors import DigestMismatch, UsageError, shown

if TYPE_CHECKING:
    from sqlalchemy import Connection, MetaData

State = Literal["absent", "old", "current"]
FIRST: Final = "0001"
_ENVIRONMENT: Final = Path(__file__).parent / "migrations"


@dataclass(frozen=True, kw_only=True, slots=True)
class Schema:
    """A set of tables with a revision.

    Attributes:
        what: what they hold, for people.
        table: the one that has been there since the first revision.
        version_table: holds the revision.
        revisions: all that this code knows, oldest first; the last one is its own.
        migrations: folder of the steps between them, as Alembic reads them.
        tables: the tables in the newest form.
    """

    what: str
    table: str
    version_table: str
    revisions: Sequence[str]
    migrations: Path
    tables: Callable[[], MetaData]

    def state(self, connection: Connection) -> State:
        """Compare a database with this code.

        Raises:
            UsageError: the database is newer than this code.
            DigestMismatch: its revision cannot be read.
        """
        if not _has(connection, self.table):
            return "absent"
        found = self._revision(connection) if _has(connection, self.version_table) else FIRST
        if found not in self.revisions:
            raise UsageError(
                f"the database of the {self.what} was made by a newer version of adapter-foundry (revision "
                f"{shown(found, 40)}; this one knows up to {self.revisions[-1]})",
                "upgrade adapter-foundry on this machine; nothing was touched",
            )
        return "current" if found == self.revisions[-1] else "old"

    def bring_up(self, connection: Connection) -> State:
        """Make or migrate the tables, in a transaction in which nobody else does the same.

        Returns:
            What was found.

        Raises:
            UsageError: the database is newer than this code, or Alembic is not installed.
        """
        found = self.state(connection)
        if found == "absent":
            self.tables().create_all(connection)
            self._stamp(connection)
        elif found == "old":
            self._migrate(connection)
        elif not _has(connection, self.version_table):
            self._stamp(connection)
        return found

    # -- parts --

    def _revision(self, connection: Connection) -> str:
        from sqlalchemy import text

        rows = connection.execute(text(f"SELECT version_num FROM {self.version_table}")).all()  # noqa: S608
        if len(rows) != 1:
            raise DigestMismatch(
                f"the database of the {self.what} has {len(rows)} revisions instead of one",
                "somebody changed it; restore it from a backup",
            )
        return str(rows[0][0])

    def _stamp(self, connection: Connection) -> None:
        from sqlalchemy import Column, MetaData, String, Table

        # As Alembic writes it, which reads it from the next revision on.
        version = Table(
            self.version_table,
            MetaData(),
            Column("version_num", String(32), primary_key=True, nullable=False),
        )
        version.create(connection, checkfirst=True)
        connection.execute(version.delete())
        connection.execute(version.insert().values(version_num=self.revisions[-1]))

    def _migrate(self, connection: Connection) -> None:
        from importlib.util import find_spec

        if find_spec("alembic") is None:
            raise UsageError(
                f"the database of the {self.what} has an older form, and Alembic is not installed",
                "pip install 'adapter-foundry[catalog]'",
            )
        from alembic import command
        from alembic.config import Config
        from sqlalchemy import text

        if connection.dialect.name == "postgresql":  # a big table may take longer than a command
            connection.execute(text("SET LOCAL statement_timeout = 0"))
        config = Config()
        config.set_main_option("script_location", str(_ENVIRONMENT))
        config.set_main_option("path_separator", "newline")
        config.set_main_option("version_locations", str(self.migrations))
        config.attributes.update(connection=connection, version_table=self.version_table)
        if not _has(connection, self.version_table):
            command.stamp(config, FIRST)
        command.upgrade(config, self.revisions[-1])


def _has(connection: Connection, table: str) -> bool:
    from sqlalchemy import inspect

    return inspect(connection).has_table(table)
