"""The command that reads the audit log: log."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from registry.commands import Answer, command, table

if TYPE_CHECKING:
    from registry.client import Registry
    from registry.storage.ledger import LedgerEntry

_DETAILS_SHOWN = 100


@command
@click.option("--subject", metavar="REF", help="Only what was done to this reference, or to a whole adapter.")
@click.option("--last", type=click.IntRange(1, 10_000), default=50, show_default=True, help="So many rows.")
@click.option(
    "--verify", is_flag=True, help="Verify the whole log first; the exit code is 13 if it was changed."
)
@click.option("--restart", metavar="REASON", help="Begin a new log, in an empty database, after a loss.")
def log(subject: str | None, last: int, verify: bool, restart: str | None) -> Answer:
    """Show the audit log: who did what to which adapter and when.

    If the database is lost and no backup brings it back, publishing stops, for a cut log looks the same.
    After --restart it goes on: the new log begins with the signed head of the old one and the reason.
    """
    from registry.client import Registry

    registry = Registry.open()
    if restart is not None:
        registry.restart_log(restart)
    checked, lines = _verified(registry) if verify else (None, [])
    entries = list(registry.ledger.entries(subject=subject, limit=last, newest=True))
    data: dict[str, Any] = {"ledger": registry.ledger.uri, "entries": [_entry(found) for found in entries]}
    if checked is not None:
        data["verified"] = checked
    if entries:
        rows = [("ROW", "TIME", "ACTOR", "ACTION", "SUBJECT", "DETAILS"), *map(_row, entries)]
        lines.append(table(rows))
    else:
        lines.append("The audit log has no such rows.")
    return Answer(data, "\n".join(lines))


def _verified(registry: Registry) -> tuple[dict[str, Any], list[str]]:
    """Verify the log against its signed head; say what was checked.

    Raises:
        DigestMismatch: it does not hold.
    """
    from registry.storage.ledger import LedgerHead

    signed = registry.authority.state().ledger_anchor()
    found = registry.ledger.verify(None if signed is None else LedgerHead.parse(signed))
    length, open_rows = found.head.length, found.head.length - found.anchored
    anchor = (
        "no row is anchored in the trust metadata yet; the next publish anchors them"
        if not found.anchored
        else f"row {found.anchored} is the head that the trust metadata has signed"
    )
    checks = [
        f"{length} rows are numbered from 1 without a gap",
        "each row has the digest of its content, and names the digest of the row before it",
        anchor,
    ]
    lines = [f"The audit log {registry.ledger.uri} holds. What was checked:"]
    lines += [f"  {number}. {check}" for number, check in enumerate(checks, start=1)]
    if found.anchored and open_rows:
        lines.append(f"The newest {open_rows} rows are not anchored yet; the next publish anchors them.")
    data = {
        "head": found.head.facts(),
        "anchored": found.anchored,
        "not_yet_anchored": open_rows,
        "checks": checks,
    }
    return data, [*lines, ""]


def _entry(entry: LedgerEntry) -> dict[str, Any]:
    return entry.facts() | {"digest": entry.digest}


def _row(entry: LedgerEntry) -> tuple[str, ...]:
    """A row for people; the database may have been changed, so nothing of it reaches a terminal as it is."""
    from registry.errors import shown

    words = (entry.time, entry.actor, entry.action, entry.subject)
    return (str(entry.index), *map(shown, words), shown(_short(entry.details), _DETAILS_SHOWN))


def _short(details: str) -> str:
    """Details as words, with digests as long as in other tables; as they are if somebody has changed them."""
    import json

    from registry.commands import DIGEST_SHOWN

    try:
        found = json.loads(details)
    except ValueError:
        return details
    if not isinstance(found, dict):
        return details
    texts = ((key, "-" if value is None else str(value)) for key, value in found.items())
    return ", ".join(
        f"{key} {text[:DIGEST_SHOWN] if text.startswith('sha256:') else text}" for key, text in texts
    )


COMMANDS = (log,)
