"""The command that scans again what is released, when the rules of the scanner have changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from registry.commands import Answer, command, table

if TYPE_CHECKING:
    from registry.transfer import Progress


@command
@click.argument("names", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Every adapter that an alias names.")
def rescan(names: tuple[str, ...], everything: bool, progress: Progress) -> Answer:
    """Scan the released versions of NAMES by the rules of today.

    Released is what an alias means. What passes gets a fresh scan statement, signed by the scanner's key;
    what does not pass is reported, and nothing is revoked. The exit code is 14 if something is blocked, 1 if
    something could not be scanned, 17 if something needs a review.
    """
    from registry.client import Registry

    found = Registry.open().rescan(*names, everything=everything, progress=progress)
    rows: list[tuple[str, ...]] = [("REFERENCE", "ALIASES", "RESULT", "RULES", "DETAIL")]
    rows += [tuple(row.values()) for row in found.table()]
    text = table(rows) if found.rows else "No alias means anything; `registry promote` releases a version."
    refusal, data = found.refusal, found.to_json()
    if refusal is None:
        return Answer(data, text)
    error = {"kind": type(refusal).__name__, "message": refusal.message, "mend": refusal.mend}
    return Answer(data | {"error": error}, f"{text}\n{refusal}", refusal.exit_code)


COMMANDS = (rescan,)
