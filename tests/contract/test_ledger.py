"""The audit log on every database that it supports: one suite, and every way to change it as data."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.pool import NullPool

from registry.digest import Digest, digest_bytes
from registry.errors import DigestMismatch, InvalidDocument, NetworkError, UsageError
from registry.manifest import canonical_json
from registry.storage.ledger import FIRST_PREVIOUS, Ledger, LedgerHead
from servers.postgres import Postgres

TABLE = "adapter_foundry_ledger"
ROWS = 7


@pytest.fixture(params=["sqlite", "postgresql"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/deep/ledger.db"
    server: Postgres = request.getfixturevalue("postgres")
    return server.database()


@pytest.fixture
def ledger(uri: str) -> Ledger:
    return Ledger(uri)


def fill(ledger: Ledger, rows: int = ROWS) -> LedgerHead:
    for number in range(1, rows + 1):
        head = ledger.append(
            "push", f"pixelsmile:{number}", {"rank": number, "wörter": ["ä"]}, "Zoë <z@example>"
        )
    return head


def change(uri: str, *statements: str) -> None:
    """What somebody does who has the database."""
    engine = create_engine(uri, poolclass=NullPool)
    with engine.begin() as connection:
        for statement in statements:
            connection.execute(text(statement))


def rewrite(uri: str, first: int, *, only: bool = False) -> None:
    """Changes a row and every digest from there on, so that the chain holds in itself; or `only` that row."""
    engine = create_engine(uri, poolclass=NullPool)
    with engine.begin() as connection:
        before = connection.execute(text(f"SELECT digest FROM {TABLE} WHERE number = {first - 1}")).scalar()
        previous = str(before or FIRST_PREVIOUS)
        for number in itertools.count(first):
            previous = _rewrite_row(connection, number, previous)
            if only or not previous:
                return


def _rewrite_row(connection: Connection, number: int, previous: str) -> str:
    query = text(f"SELECT time, actor, action, subject, details FROM {TABLE} WHERE number = {number}")
    row = connection.execute(query).mappings().first()
    if row is None:
        return ""
    facts = dict(row) | {"index": number, "previous": previous, "actor": "somebody else"}
    digest = str(digest_bytes(canonical_json(facts)))
    values = {"previous": previous, "digest": digest, "actor": "somebody else"}
    command = f"UPDATE {TABLE} SET previous=:previous, digest=:digest, actor=:actor WHERE number={number}"
    connection.execute(text(command), values)
    return digest


# -- what it does --


def test_an_empty_log_has_a_head_and_holds(ledger: Ledger) -> None:
    assert ledger.head() == LedgerHead(length=0, digest=FIRST_PREVIOUS)
    assert list(ledger.entries()) == []
    assert ledger.verify(None).head == ledger.head()


def test_rows_are_kept_in_order_and_chained(ledger: Ledger, uri: str) -> None:
    head = fill(ledger)
    entries = list(Ledger(uri).entries())
    assert [entry.index for entry in entries] == list(range(1, ROWS + 1))
    assert [entry.previous for entry in entries] == [
        FIRST_PREVIOUS,
        *(entry.digest for entry in entries[:-1]),
    ]
    assert head == ledger.head() == LedgerHead(length=ROWS, digest=Digest(entries[-1].digest))
    assert entries[0].details == '{"rank":1,"w\\u00f6rter":["\\u00e4"]}'
    assert entries[0].actor == "Zoë <z@example>"
    assert entries[0].time.endswith("+00:00")


def test_a_digest_covers_every_other_field(ledger: Ledger) -> None:
    fill(ledger, 1)
    (entry,) = ledger.entries()
    facts = entry.facts()
    assert set(facts) == {"index", "time", "actor", "action", "subject", "details", "previous"}
    assert entry.digest == digest_bytes(canonical_json(facts))


def test_rows_are_found_by_subject_and_place(ledger: Ledger) -> None:
    for subject in ("a:1", "a:10", "a@prod", "ab:1", "b:1", "a:1", "A:1"):
        ledger.append("push", subject, {}, "me")

    def found(**options: object) -> list[int]:
        return [entry.index for entry in ledger.entries(**options)]  # type: ignore[arg-type]

    assert found(subject="a:1") == [1, 6]
    assert found(subject="a") == [1, 2, 3, 6]
    assert found(subject="%") == []
    assert found(after=5) == [6, 7]
    assert found(limit=2) == [1, 2]
    assert found(limit=2, newest=True) == [6, 7]
    assert found(subject="a", limit=2, newest=True) == [3, 6]
    assert found(limit=0) == []


def test_more_rows_than_one_page_are_read(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("registry.storage.ledger._PAGE", 3)
    head = fill(ledger, 10)
    assert [entry.index for entry in ledger.entries(limit=8)] == list(range(1, 9))
    assert ledger.verify(head).head == head


WRITER = """
import sys
sys.path.insert(0, sys.argv[1])
from registry.storage.ledger import Ledger
ledger = Ledger(sys.stdin.readline().strip())
for number in range(int(sys.argv[3])):
    ledger.append("push", f"writer{sys.argv[2]}:{number + 1}", {}, "writer")
"""


def test_processes_that_append_at_once_make_one_chain(ledger: Ledger, uri: str, repository: Path) -> None:
    processes, rows = 8, 6
    command = [sys.executable, "-c", WRITER, str(repository)]
    running = []
    for number in range(processes):
        started = subprocess.Popen(
            [*command, str(number), str(rows)], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        running.append(started)
    for process in running:  # the URI, which everybody waits for, starts them at about the same moment
        assert process.stdin is not None
        process.stdin.write(uri + "\n")
        process.stdin.flush()
    errors = [process.communicate()[1] for process in running]
    assert [process.returncode for process in running] == [0] * processes, errors
    assert ledger.verify(ledger.head()).head.length == processes * rows
    for number in range(processes):
        mine = [entry.subject for entry in ledger.entries(subject=f"writer{number}")]
        assert mine == [f"writer{number}:{row + 1}" for row in range(rows)]


@pytest.mark.parametrize(
    ("action", "subject", "details", "actor"),
    [
        ("", "a:1", {}, "me"),
        ("push", "a:1\nforged", {}, "me"),
        ("push", "a:1", {}, "me\x1b[2J"),
        ("push", "a" * 301, {}, "me"),
        ("push", "a:1", {"x": float("nan")}, "me"),
        ("push", "a:1", {"x": object()}, "me"),
        ("push", "a:1", {"x": "y" * 70_000}, "me"),
    ],
)
def test_what_cannot_be_kept_is_refused(
    ledger: Ledger, action: str, subject: str, details: dict[str, object], actor: str
) -> None:
    with pytest.raises(UsageError):
        ledger.append(action, subject, details, actor)
    assert ledger.head().length == 0


# -- what it notices --

_HEX = "sha256:" + "0" * 64

TAMPERING: dict[str, tuple[list[str], int]] = {
    "time": ([f"UPDATE {TABLE} SET time = '2020-01-01T00:00:00+00:00' WHERE number = 3"], 3),
    "actor": ([f"UPDATE {TABLE} SET actor = 'Eve' WHERE number = 3"], 3),
    "action": ([f"UPDATE {TABLE} SET action = 'approve' WHERE number = 3"], 3),
    "subject": ([f"UPDATE {TABLE} SET subject = 'pixelsmile:9' WHERE number = 3"], 3),
    "details": ([f"UPDATE {TABLE} SET details = '{{}}' WHERE number = 3"], 3),
    "details as other text": ([f"UPDATE {TABLE} SET details = details || ' ' WHERE number = 3"], 3),
    "previous": ([f"UPDATE {TABLE} SET previous = '{_HEX}' WHERE number = 3"], 3),
    "digest": ([f"UPDATE {TABLE} SET digest = '{_HEX}' WHERE number = 3"], 3),
    "digest that is none": ([f"UPDATE {TABLE} SET digest = '' WHERE number = {ROWS}"], ROWS),
    "the last row": ([f"UPDATE {TABLE} SET actor = 'Eve' WHERE number = {ROWS}"], ROWS),
    "the first row": ([f"UPDATE {TABLE} SET actor = 'Eve' WHERE number = 1"], 1),
    "the first row deleted": ([f"DELETE FROM {TABLE} WHERE number = 1"], 1),
    "a row deleted": ([f"DELETE FROM {TABLE} WHERE number = 4"], 4),
    "a row deleted, the others moved up": (
        [
            f"DELETE FROM {TABLE} WHERE number = 4",
            *(f"UPDATE {TABLE} SET number = {number - 1} WHERE number = {number}" for number in (5, 6, 7)),
        ],
        4,
    ),
    "the tail deleted": ([f"DELETE FROM {TABLE} WHERE number > 5"], 6),
    "everything deleted": ([f"DELETE FROM {TABLE}"], 1),
    "the table dropped": ([f"DROP TABLE {TABLE}"], 1),
    "two rows swapped": (
        [
            f"UPDATE {TABLE} SET number = 100 WHERE number = 3",
            f"UPDATE {TABLE} SET number = 3 WHERE number = 4",
            f"UPDATE {TABLE} SET number = 4 WHERE number = 100",
        ],
        3,
    ),
    "a row copied to the end": (
        [
            f"INSERT INTO {TABLE} SELECT {ROWS + 1}, time, actor, action, subject, details, previous, digest "
            f"FROM {TABLE} WHERE number = 2"
        ],
        ROWS + 1,
    ),
    "a row before the first": (
        [
            f"INSERT INTO {TABLE} SELECT 0, time, actor, action, subject, details, previous, digest "
            f"FROM {TABLE} WHERE number = 2"
        ],
        0,
    ),
    "a row inserted": (
        [
            *(f"UPDATE {TABLE} SET number = {number + 1} WHERE number = {number}" for number in (7, 6, 5, 4)),
            f"INSERT INTO {TABLE} SELECT 4, time, actor, action, 'x:1', details, previous, digest "
            f"FROM {TABLE} WHERE number = 3",
        ],
        4,
    ),
}


@pytest.mark.parametrize("case", TAMPERING)
def test_a_changed_chain_is_refused_and_the_row_named(ledger: Ledger, uri: str, case: str) -> None:
    anchor = fill(ledger)
    ledger.verify(anchor)
    statements, row = TAMPERING[case]
    change(uri, *statements)
    with pytest.raises(DigestMismatch) as caught:
        Ledger(uri).verify(anchor)
    assert f"row {row} of the audit log" in caught.value.message
    assert caught.value.mend


@pytest.mark.parametrize("number", [1, 4, ROWS - 1])
def test_one_row_written_anew_is_not_continued_by_the_next(ledger: Ledger, uri: str, number: int) -> None:
    anchor = fill(ledger)
    rewrite(uri, number, only=True)
    for signed in (None, anchor):
        with pytest.raises(DigestMismatch, match=f"row {number + 1} .* does not continue"):
            ledger.verify(signed)


@pytest.mark.parametrize("first", [1, 4, ROWS])
def test_a_chain_that_was_written_anew_holds_in_itself_but_not_with_its_anchor(
    ledger: Ledger, uri: str, first: int
) -> None:
    anchor = fill(ledger)
    rewrite(uri, first)
    assert ledger.verify(None).head.length == ROWS
    with pytest.raises(DigestMismatch, match="written anew"):
        ledger.verify(anchor)


def test_a_tail_that_was_cut_and_grown_again_is_noticed(ledger: Ledger, uri: str) -> None:
    anchor = fill(ledger)
    change(uri, f"DELETE FROM {TABLE} WHERE number > 5")
    for number in range(6, 10):
        ledger.append("push", f"pixelsmile:{number}", {}, "Eve")
    with pytest.raises(DigestMismatch, match=f"row {ROWS} "):
        ledger.verify(anchor)


def test_rows_behind_the_anchor_are_fine_and_counted(ledger: Ledger) -> None:
    anchor = fill(ledger, 3)
    fill(ledger, 2)
    found = ledger.verify(anchor)
    assert (found.head.length, found.anchored) == (5, 3)


def test_a_log_that_goes_on_is_continued(ledger: Ledger) -> None:
    assert ledger.continued(None) == ledger.head()
    assert ledger.continued(ledger.head()) == ledger.head()
    anchor = fill(ledger, 3)
    assert ledger.continued(anchor) == anchor
    assert ledger.continued(anchor) != fill(ledger, 2) == ledger.continued(anchor)


@pytest.mark.parametrize("rows", [0, 4, 5, 9])
def test_a_cut_log_is_not_continued_however_it_grew_again(ledger: Ledger, uri: str, rows: int) -> None:
    anchor = fill(ledger, 5)
    change(uri, f"DELETE FROM {TABLE} WHERE number > 2")
    for number in range(2, rows):
        ledger.append("push", f"pixelsmile:{number}", {}, "Eve")
    with pytest.raises(DigestMismatch, match="lacks row 5"):
        ledger.continued(anchor)


def test_a_table_of_another_shape_is_refused(ledger: Ledger, uri: str) -> None:
    fill(ledger)
    change(uri, f"ALTER TABLE {TABLE} RENAME COLUMN actor TO author")
    with pytest.raises(DigestMismatch, match="columns"):
        Ledger(uri).verify(None)
    with pytest.raises(DigestMismatch, match="columns"):
        Ledger(uri).append("push", "a:1", {}, "me")


def test_an_anchor_survives_the_trust_metadata(ledger: Ledger) -> None:
    head = fill(ledger, 2)
    assert LedgerHead.parse(head.facts()) == head


@pytest.mark.parametrize(
    "anchor",
    [
        {},
        {"length": "3", "digest": _HEX},
        {"length": True, "digest": _HEX},
        {"length": -1, "digest": _HEX},
        {"length": 3, "digest": "sha256:12"},
    ],
)
def test_an_anchor_of_another_form_is_refused(anchor: dict[str, object]) -> None:
    with pytest.raises(InvalidDocument):
        LedgerHead.parse(anchor)


# -- where it is --


@pytest.mark.parametrize(
    "uri",
    [
        "sqlite://",
        "sqlite:///relative.db",
        "mysql://tester:open-sesame@host/db",
        "postgresql://tester:open-sesame@host/db",
        "postgresql+psycopg://",
        "postgresql+psycopg://tester:open-sesame@tail@host/db",
        "postgresql+psycopg://tester:open-sesame@host:port/db",
        "/a/path",
    ],
)
def test_a_wrong_uri_is_a_usage_error_that_keeps_the_password(uri: str) -> None:
    with pytest.raises(UsageError) as caught:
        Ledger(uri).head()
    assert "open-sesame" not in str(caught.value)
    assert "tail" not in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    [
        "postgresql+psycopg://tester:open-sesame@127.0.0.1:1/db",
        "postgresql+psycopg://127.0.0.1:1/db?user=tester&password=open-sesame",
    ],
)
def test_a_server_that_does_not_answer_is_a_network_error(uri: str) -> None:
    ledger = Ledger(uri)
    for call in (ledger.head, lambda: ledger.append("push", "a:1", {}, "me")):
        with pytest.raises(NetworkError) as caught:
            call()
        assert "open-sesame" not in str(caught.value) + ledger.uri


def test_a_wrong_password_is_explained_without_it(postgres: Postgres) -> None:
    right = postgres.database()
    wrong = right.replace(postgres.password, "open-sesame")
    with pytest.raises(NetworkError, match="password authentication failed") as caught:
        Ledger(wrong).head()
    assert "open-sesame" not in str(caught.value)


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "ledger.db"
    file.write_bytes(b"not a database at all" * 100)
    with pytest.raises(DigestMismatch, match="damaged"):
        Ledger(f"sqlite:///{file}").verify(None)


def test_values_of_other_types_are_refused(tmp_path: Path) -> None:
    """SQLite keeps any type in any column."""
    uri = f"sqlite:///{tmp_path}/ledger.db"
    ledger = Ledger(uri)
    anchor = fill(ledger)
    change(uri, f"UPDATE {TABLE} SET details = x'00ff' WHERE number = 2")
    with pytest.raises(DigestMismatch, match="row 2 "):
        ledger.verify(anchor)


def test_reading_makes_no_file(tmp_path: Path) -> None:
    ledger = Ledger(f"sqlite:///{tmp_path}/none/ledger.db")
    assert ledger.head().length == 0
    with pytest.raises(DigestMismatch, match="row 1 of the audit log is missing"):
        ledger.verify(LedgerHead(length=3, digest=FIRST_PREVIOUS))
    assert list(tmp_path.rglob("*.db")) == []


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Makes a package look as if it were not installed."""
    import importlib.util

    real = importlib.util.find_spec

    def hide(name: str) -> None:
        monkeypatch.setattr(
            "importlib.util.find_spec", lambda found, *rest: None if found == name else real(found, *rest)
        )

    return hide


@pytest.mark.parametrize(("package", "extra"), [("sqlalchemy", "catalog"), ("psycopg", "cloud")])
def test_a_missing_driver_names_its_extra(without: Callable[[str], None], package: str, extra: str) -> None:
    without(package)
    with pytest.raises(UsageError, match="not installed") as caught:
        Ledger("postgresql+psycopg://127.0.0.1:1/db").head()
    assert f"adapter-foundry[{extra}]" in caught.value.mend
