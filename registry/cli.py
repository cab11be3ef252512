"""``registry``: the command line of the signed registry.

Data goes to stdout, progress and hints to stderr, progress bars only to a terminal. With ``--json`` every
command prints exactly one object on stdout, also when it fails: ``{"error": {"kind", "exit_code",
"message", "mend"}}``. Exit codes are those of ``registry.errors``; only click is imported before a command
runs. The commands are in registry/commands, one file a subject.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import click

from registry.command import run
from registry.commands import (
    approving,
    backup,
    formats,
    ledger,
    licenses,
    population,
    publishing,
    reconcile,
    rescan,
    scanning,
    statements,
    trust,
    upkeep,
    using,
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="adapter-foundry", prog_name="registry")
def cli() -> None:
    """Publish, approve, verify and fetch signed LoRA adapters.

    Adapters are named name@alias, name:version or name@sha256:<hex>; there is no implicit latest.
    """


for _subject in (
    publishing,
    approving,
    using,
    scanning,
    population,
    rescan,
    ledger,
    reconcile,
    formats,
    licenses,
    upkeep,
    backup,
    statements,
    trust,
):
    for _command in _subject.COMMANDS:
        cli.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits with its code."""
    # A scan multiplies thousands of thin matrices: threads of BLAS wait for each other seven times as long.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    run(cli, "registry", arguments)


if __name__ == "__main__":
    main()
