"""Attacks on the audit log by somebody who can write its database, through the command line.

Each must end with exit code 13; the last ones are about hiding a cut from the next publish.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from fakes.registries import NAME, adapter_folder, copy_registry
from registry.cli import main
from registry.digest import digest_bytes
from registry.errors import DigestMismatch, UsageError
from registry.manifest import canonical_json

TABLE = "adapter_foundry_ledger"
MISMATCH = 13


@pytest.fixture
def ledger(home: Path) -> Path:
    """The database of a registry in which something was pushed, approved and promoted."""
    registry = copy_registry(home)
    assert registry.ledger.head().length >= 4
    return home / "registry" / "ledger.db"


def verify(capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit code and what is said."""
    with pytest.raises(SystemExit) as ended:
        main(["log", "--verify"])
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out + said.err


def execute(database: Path, *statements: str) -> None:
    with sqlite3.connect(database) as connection:
        for statement in statements:
            connection.execute(statement)
    connection.close()


def rewrite(database: Path, first: int) -> None:
    """Writes the chain anew from a row on: it holds in itself."""
    with sqlite3.connect(database) as connection:
        rows = connection.execute(
            f"SELECT number, time, action, subject, details, previous FROM {TABLE} WHERE number >= ? "
            "ORDER BY number",
            (first,),
        ).fetchall()
        previous = rows[0][5]
        for number, time, action, subject, details, _ in rows:
            facts = {
                "index": number,
                "time": time,
                "actor": "somebody else",
                "action": action,
                "subject": subject,
                "details": details,
                "previous": previous,
            }
            digest = str(digest_bytes(canonical_json(facts)))
            connection.execute(
                f"UPDATE {TABLE} SET actor=?, previous=?, digest=? WHERE number=?",
                ("somebody else", previous, digest, number),
            )
            previous = digest
    connection.close()


def test_an_honest_log_holds_and_says_what_was_checked(
    ledger: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = verify(capsys)
    assert code == 0
    assert "is the head that the trust metadata has signed" in said
    assert "promote" in said


ATTACKS: dict[str, Callable[[Path], None]] = {
    "the tail is deleted": lambda path: execute(
        path, f"DELETE FROM {TABLE} WHERE number = (SELECT max(number) FROM {TABLE})"
    ),
    "everything is deleted": lambda path: execute(path, f"DELETE FROM {TABLE}"),
    "the table is dropped": lambda path: execute(path, f"DROP TABLE {TABLE}"),
    "the file is deleted": lambda path: path.unlink(),
    "the file is overwritten": lambda path: (path.write_bytes(b"\0" * 4096), None)[1],
    "a row in the middle is deleted": lambda path: execute(path, f"DELETE FROM {TABLE} WHERE number = 2"),
    "an approver is exchanged": lambda path: execute(
        path, f"UPDATE {TABLE} SET actor = 'somebody else' WHERE action = 'approve'"
    ),
    "two rows change places": lambda path: execute(
        path,
        f"UPDATE {TABLE} SET number = 100 WHERE number = 2",
        f"UPDATE {TABLE} SET number = 2 WHERE number = 3",
        f"UPDATE {TABLE} SET number = 3 WHERE number = 100",
    ),
    "the chain is written anew from the middle": lambda path: rewrite(path, 3),
    "the chain is written anew as a whole": lambda path: rewrite(path, 1),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_changed_log_is_noticed(ledger: Path, capsys: pytest.CaptureFixture[str], attack: str) -> None:
    ATTACKS[attack](ledger)
    code, said = verify(capsys)
    assert code == MISMATCH
    assert "What to do:" in said


def test_the_first_bad_row_is_named_as_json(ledger: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ATTACKS["an approver is exchanged"](ledger)
    with pytest.raises(SystemExit) as ended:
        main(["log", "--verify", "--json"])
    error = json.loads(capsys.readouterr().out)["error"]
    assert (ended.value.code, error["exit_code"], error["kind"]) == (MISMATCH, MISMATCH, "DigestMismatch")
    assert "row 3 of the audit log" in error["message"]


def test_an_inserted_row_is_not_shown_raw(ledger: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What somebody writes into the database reaches no terminal as it is."""
    execute(ledger, f"UPDATE {TABLE} SET subject = 'x' || char(27) || '[2J' || char(10) || 'forged'")
    with pytest.raises(SystemExit):
        main(["log"])
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert "\nforged" not in said


@pytest.mark.parametrize("attack", ["the tail is deleted", "everything is deleted", "the file is deleted"])
def test_a_cut_is_not_hidden_by_the_next_publish(
    ledger: Path, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], attack: str
) -> None:
    """The next publish would sign the new, shorter log as the right one."""
    from registry.client import Registry

    before = Registry.open(home).authority.state().ledger_anchor()
    ATTACKS[attack](ledger)
    folder = adapter_folder(tmp_path / "second", seed=1)
    with pytest.raises(DigestMismatch, match="was signed as its head"):
        Registry.open(home).push(folder, NAME)
    state = Registry.open(home).authority.state()
    assert state.ledger_anchor() == before
    assert list(state.versions_of(NAME)) == [1]
    assert verify(capsys)[0] == MISMATCH


def test_a_new_log_is_begun_by_a_person_only_and_says_what_it_follows(
    ledger: Path, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from registry.client import Registry

    before = Registry.open(home).authority.state().ledger_anchor()
    with pytest.raises(UsageError, match="has rows"):
        Registry.open(home).restart_log("just because")
    ledger.unlink()
    with pytest.raises(UsageError, match="reason"):
        Registry.open(home).restart_log(" ")
    Registry.open(home).restart_log("the disk died, and so did its backup")
    (first,) = Registry.open(home).ledger.entries()
    assert first.action == "restart"
    assert json.loads(first.details)["before"] == before
    assert verify(capsys)[0] == 0
    assert Registry.open(home).push(adapter_folder(tmp_path / "second", seed=1), NAME).version == 2
    assert verify(capsys)[0] == 0
