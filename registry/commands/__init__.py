"""The commands of ``registry``, one file a subject, and what they share.

A command is a function that returns an ``Answer``; ``command`` makes a click command of it. A file ends with
``COMMANDS``, which ``registry.cli`` collects. Only click is imported before a command runs.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import click

if TYPE_CHECKING:
    from pathlib import Path

    from registry.transfer import Progress

DIGEST_SHOWN = 19
"""Characters of a digest in tables: "sha256:" and twelve digits tell versions apart for people."""


class Answer(NamedTuple):
    """What a command says: an object for programs, text for people, and its exit code."""

    data: Mapping[str, Any]
    text: str
    exit_code: int = 0


def command(function: Callable[..., Answer], name: str | None = None) -> click.Command:
    """Make a command of a function that answers; it prints the answer as the user asked for it.

    A parameter annotated ``Progress`` is given a bar on a terminal and silence elsewhere.
    """

    @functools.wraps(function)
    def run(*, as_json: bool, **options: Any) -> None:
        with _progress(show=not as_json and sys.stderr.isatty()) as progress:
            wanted = {"progress": progress} if "progress" in function.__annotations__ else {}
            answer = function(**options, **wanted)
        click.echo(as_text(answer.data) if as_json else answer.text)
        if answer.exit_code:
            raise click.exceptions.Exit(answer.exit_code)

    flag = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
    return click.command(name)(flag(run))


def as_text(data: Mapping[str, Any]) -> str:
    """Return JSON for people and programs."""
    import json

    return json.dumps(data, indent=2, ensure_ascii=True)


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """Return rows of equal length as aligned columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def read_json(path: Path, what: str) -> Mapping[str, Any]:
    """Return the JSON object in a file; ``what`` says what it should be.

    Raises:
        UsageError: it is none.
    """
    import json

    from registry.errors import UsageError

    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as JSON: {error}", f"give {what}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path} is not a JSON object", f"give {what}")
    return content


@contextlib.contextmanager
def _progress(*, show: bool) -> Iterator[Progress]:
    """A bar on a terminal, silence elsewhere."""
    if not show:
        yield _silent
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def report(stage: str, done: int, total: int, /) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield report


def _silent(stage: str, done: int, total: int, /) -> None:
    """Tells nobody; the command line does not import the transfer for that."""
