"""How every command line of the platform runs and fails: one exit code, one explanation, one JSON object."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from registry.errors import Explained


def run(command: click.Command, name: str, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit with its code; an explained error goes to stderr, or as JSON to stdout.

    Args:
        command: the command or group.
        name: what the user typed to start it.
        arguments: words after ``name``; None takes those of this process. With ``--json`` among them an error
            is ``{"error": {"kind", "exit_code", "message", "mend"}}`` on stdout.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        code = command.main(given, prog_name=name, standalone_mode=False)
    except Explained as error:
        code = error.exit_code
        _tell(given, error, error.message, error.mend, code)
    except click.ClickException as error:
        code = error.exit_code
        _tell(given, error, error.format_message(), "see --help", code)
    except click.Abort:
        click.echo("Interrupted; run the same command again to continue.", err=True)
        code = 1
    sys.exit(code if isinstance(code, int) else 0)


def _tell(given: Sequence[str], error: Exception, message: str, mend: str, code: int) -> None:
    if "--json" in given:
        import json

        content = {"kind": type(error).__name__, "exit_code": code, "message": message, "mend": mend}
        click.echo(json.dumps({"error": content}, indent=2))
    elif isinstance(error, click.ClickException):
        error.show()
    else:
        click.echo(f"Error: {error}", err=True)
