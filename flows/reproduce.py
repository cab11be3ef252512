"""The command that makes a released adapter again: ``python -m flows.reproduce pixelsmile@prod``.

The flow itself is in `flows.reproduction`; it is imported late, for Prefect reads its settings when imported.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from flows import limits
from flows.server import attached, managed_server
from flows.settings import prepare
from registry import command
from registry.reproduction import parse as read_outcome
from registry.settings import home as default_home
from registry.telling import reproduction_lines

#: Exit code of an outcome; those of errors are the errors' own.
DIFFERENT = 14


def run(reference: str, home: Path, **options: Any) -> dict[str, Any]:
    """Run the flow on a server of its own and return its summary.

    Raises:
        Explained: see `flows.reproduction.reproduce`.
    """
    prepare(home)
    with managed_server(home) as server:
        from flows.reproduction import reproduce

        until = "" if server.reused else ", as long as this runs"
        click.echo(f"Prefect's server is at {server.page}{until}", err=True)
        with attached(home, server.url):
            limits.ensure()
            return reproduce(reference, **options)


@click.command()
@click.argument("reference")
@click.option("--reuse-dataset", is_flag=True, help="Take the dataset that lies on this machine.")
@click.option("--pay", is_flag=True, help="Ask paid APIs for answers that are not recorded here.")
@click.option("--sign/--no-sign", default=True, help="Sign the outcome with the evaluator's key (default).")
@click.option("--runner", type=click.Choice(["threads", "ray"]), default="threads", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as one JSON object.")
def main(reference: str, as_json: bool, **options: Any) -> None:
    """Make the released adapter REFERENCE again from what is signed about it, and compare.

    The exit code is 0 if it came out identical or equivalent, and 14 if it is different.
    """
    summary = run(reference, default_home(), **options)
    found = read_outcome(summary["reproduction"])
    if as_json:
        click.echo(json.dumps(summary, sort_keys=True))
    else:
        signed = "signed by the evaluator" if options["sign"] else "not signed"
        click.echo("\n".join([f"{summary['reference']}: {signed}", *reproduction_lines(found.predicate())]))
    if found.outcome == "different":
        sys.exit(DIFFERENT)


if __name__ == "__main__":
    command.run(main, "python -m flows.reproduce")
