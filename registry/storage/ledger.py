"""The audit log: who did what to which adapter and when, as a chain of digests.

Each row holds the digest of the row before it, and its own digest covers everything else in it. A row that
was changed, removed, inserted or moved therefore breaks the chain. Whoever can write the database could cut
its tail or write the whole chain anew; against that, the head is signed into the trust metadata at each
publish, and `Ledger.verify` compares the chain with that anchor. Rows after the newest anchor are only as
trustworthy as the database.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from registry.digest import Digest
from registry.errors import DigestMismatch, UsageError, shown
from registry.manifest import canonical_json
from registry.storage import database
from registry.storage.chain import (
    COLUMNS,
    EMPTY,
    FIRST_PREVIOUS,
    MEND,
    LedgerEntry,
    LedgerHead,
    Verified,
    follow,
    read_row,
)
from registry.storage.schema import Schema

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine, Table

__all__ = ["FIRST_PREVIOUS", "Ledger", "LedgerEntry", "LedgerHead", "Verified"]

MAX_DETAILS_BYTES: Final = 64 * 1024
_MAX_WORD = 300
_PAGE = 500
_LOCK = 0x61666C67  # any number will do, as long as every writer of the log takes the same
_BEFORE_ALL = -(1 << 63)  # a row that was inserted before the first one has to be seen


class Ledger:
    """An audit log in a database, which is made on first use.

    Args:
        uri: ``sqlite:////absolute/file.db`` or ``postgresql+psycopg://user:password@host/database``.

    Raises:
        UsageError: the URI is neither.
    """

    def __init__(self, uri: str) -> None:
        self._uri = database.check_uri(uri)
        self._checked = False
        self._made = False

    @property
    def uri(self) -> str:
        """Where the log is, for people: without the password."""
        return database.masked(self._uri)

    def append(self, action: str, subject: str, details: Mapping[str, Any], actor: str) -> LedgerHead:
        """Add a row behind the last one; writers of all processes and machines wait for each other.

        Args:
            action: a lower-case word, such as "promote".
            subject: a reference, or what else was acted upon.
            details: JSON values, at most 64 KiB of them.
            actor: who acts.

        Returns:
            The new head.

        Raises:
            UsageError: a value is empty, too long or not printable, or a driver is not installed.
            NetworkError: the database does not answer.
        """
        from sqlalchemy import insert

        words = {"action": action, "subject": subject, "actor": actor}
        for what, word in words.items():
            _check_word(what, word)
        text = _details(details)
        with self._writing() as connection:
            head = self._head(connection)
            entry = LedgerEntry(
                index=head.length + 1,
                time=datetime.now(UTC).isoformat(timespec="seconds"),
                details=text,
                previous=head.digest,
                digest="",
                **words,
            )
            digest = entry.expected()
            row = entry.facts() | {"number": entry.index, "digest": str(digest), "previous": str(head.digest)}
            connection.execute(insert(_table()), {column: row[column] for column in COLUMNS})
        return LedgerHead(length=entry.index, digest=digest)

    def head(self) -> LedgerHead:
        """Return the end of the chain.

        Raises:
            NetworkError: the database does not answer.
            DigestMismatch: the last row is damaged.
        """
        with self._reading() as connection:
            return self._head(connection) if connection is not None else EMPTY

    def continued(self, anchor: LedgerHead | None) -> LedgerHead:
        """Return the end of the chain if it continues the head that was signed before.

        One row is looked at, not the chain: `verify` does that. But a log whose tail was cut must not get its
        new end signed, or nobody would ever notice.

        Raises:
            DigestMismatch: the row that was signed as the head is gone, or is another one.
            NetworkError: the database does not answer.
        """
        with self._reading() as connection:
            head = EMPTY if connection is None else self._head(connection)
            there = [] if connection is None or anchor is None else self._digests(connection, anchor.length)
        if anchor is not None and anchor.length and anchor.digest not in there:
            raise DigestMismatch(
                f"the audit log {self.uri} lacks row {anchor.length}, which was signed as its head",
                "if this machine has a log of its own, set ADAPTER_FOUNDRY_LEDGER to the one that all "
                "machines share; else somebody has changed it: restore it from a backup",
            )
        return head

    def entries(
        self, *, subject: str | None = None, after: int = 0, limit: int | None = None, newest: bool = False
    ) -> Iterator[LedgerEntry]:
        """Yield rows as the database has them, oldest first, a page at a time.

        Args:
            subject: only rows about this reference; the bare name of an adapter means all of its references.
            after: only rows with a larger index.
            limit: at most so many.
            newest: the limit keeps the last rows instead of the first; they are held in memory.

        Raises:
            NetworkError: the database does not answer.
            DigestMismatch: it holds something that is no row.
        """
        if newest and limit is not None:
            yield from reversed(self._page(subject, after, limit, newest=True))
            return
        left, at = limit, after
        while left is None or left > 0:
            page = self._page(subject, at, _PAGE if left is None else min(left, _PAGE))
            yield from page
            if not page:
                return
            left, at = (None if left is None else left - len(page)), page[-1].index

    def verify(self, anchor: LedgerHead | None) -> Verified:
        """Read the whole chain and compare it with the head that was signed.

        Rows behind the anchor are fine: they are to be anchored by the next publish.

        Args:
            anchor: the head in the trust metadata; None if none was signed yet.

        Raises:
            DigestMismatch: a row was changed, removed, inserted or moved, the tail was cut, or the chain is
                not the one that was anchored; names the first bad row.
            NetworkError: the database does not answer.
        """
        return follow(self.entries(after=_BEFORE_ALL), anchor)

    # -- parts --

    @functools.cached_property
    def _engine(self) -> Engine:
        return database.open_engine(self._uri)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[Connection]:
        """A transaction that no other writer is in, on a table that exists."""
        engine = self._engine
        from sqlalchemy import func, select

        file = database.sqlite_file(self._uri)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
        with (
            database.explained(self._uri),
            engine.connect().execution_options(serial=True) as connection,
            connection.begin(),
        ):
            if file is None:
                connection.execute(select(func.pg_advisory_xact_lock(_LOCK)))
            if not self._made:
                SCHEMA.bring_up(connection)
                _check_table(connection)
            yield connection
        self._made = self._checked = True

    @contextlib.contextmanager
    def _reading(self) -> Iterator[Connection | None]:
        """A transaction, or None while there is no log: reading makes none."""
        engine = self._engine
        file = database.sqlite_file(self._uri)
        if file is not None and not file.exists():
            yield None
            return
        with database.explained(self._uri), engine.connect() as connection, connection.begin():
            if not self._checked and SCHEMA.state(connection) != "absent":
                self._checked = _check_table(connection)
            yield connection if self._checked else None

    def _head(self, connection: Connection) -> LedgerHead:
        from sqlalchemy import select

        table = _table()
        query = select(table.c.number, table.c.digest).order_by(table.c.number.desc()).limit(1)
        row = connection.execute(query).first()
        if row is None:
            return EMPTY
        try:
            return LedgerHead(length=int(row.number), digest=Digest(row.digest))
        except (TypeError, ValueError):
            raise DigestMismatch("the last row of the audit log has no digest", MEND) from None

    def _digests(self, connection: Connection, number: int) -> list[str]:
        from sqlalchemy import select

        table = _table()
        return list(connection.execute(select(table.c.digest).where(table.c.number == number)).scalars())

    def _page(
        self, subject: str | None, after: int, limit: int, *, newest: bool = False
    ) -> list[LedgerEntry]:
        with self._reading() as connection:
            if connection is None:
                return []
            from sqlalchemy import func, or_, select

            table = _table()
            order = table.c.number.desc() if newest else table.c.number
            query = select(table).where(table.c.number > after).order_by(order).limit(limit)
            if subject is not None:
                start = func.substr(table.c.subject, 1, len(subject) + 1)
                query = query.where(
                    or_(table.c.subject == subject, start == f"{subject}:", start == f"{subject}@")
                )
            return [read_row(dict(row._mapping)) for row in connection.execute(query)]


def _details(details: Mapping[str, Any]) -> str:
    try:
        text = canonical_json(dict(details)).decode("ascii")
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(
            f"the details for the audit log are not JSON: {shown(error)}", "use text and finite numbers"
        ) from None
    if len(text) > MAX_DETAILS_BYTES:
        raise UsageError(
            f"the details for the audit log have {len(text)} bytes; at most {MAX_DETAILS_BYTES} are kept",
            mend="name large things by their digest",
        )
    return text


def _check_word(what: str, word: str) -> None:
    if not word.strip() or len(word) > _MAX_WORD or not word.isprintable():
        raise UsageError(
            f"the audit log cannot keep the {what} {shown(word)!r}",
            mend=f"use one line of 1 to {_MAX_WORD} printable characters",
        )


@functools.cache
def _table() -> Table:
    from sqlalchemy import BigInteger, Column, MetaData, Table, Text

    columns = [Column(name, Text(), nullable=False) for name in COLUMNS[1:]]
    # SQLite gives a place to a row by itself only under the type INTEGER; here every row brings its own.
    number = Column("number", BigInteger(), primary_key=True, autoincrement=False)
    return Table("adapter_foundry_ledger", MetaData(), number, *columns)


SCHEMA: Final = Schema(
    what="audit log",
    table="adapter_foundry_ledger",
    version_table="adapter_foundry_ledger_version",
    revisions=("0001",),
    migrations=Path(__file__).parent / "migrations" / "ledger",
    tables=lambda: _table().metadata,
)
"""A new revision must leave the columns readable for `_reading`, which never changes anything."""


def _check_table(connection: Connection) -> bool:
    """Make sure that the table is ours; one of another shape is not.

    Raises:
        DigestMismatch: its columns were changed.
    """
    from sqlalchemy import inspect

    name = _table().name
    found = {column["name"] for column in inspect(connection).get_columns(name)}
    if found != set(COLUMNS):
        raise DigestMismatch(f"the table {name} is not an audit log: its columns were changed", MEND)
    return True
