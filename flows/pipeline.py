"""The command of the main job.

``python -m flows.pipeline trainer/recipes/pixelsmile-portraits.yaml`` does every stage against a Prefect
server of this machine's own, shows how far it is, and ends with a table. Run again unchanged, it reuses
what is there. The flow itself is in `flows.job`; it is imported late, for Prefect reads its settings when
imported.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from flows import limits
from flows.display import table
from flows.folder import PORTRAIT
from flows.parameters import Approval, RecipeChoice
from flows.server import Server, attached, managed_server
from flows.settings import prepare
from registry import command
from registry.settings import home as default_home

#: Stages that make nothing: they look again at what is there.
CHECKS = frozenset({"scan", "licences", "count", "pull"})


def run(recipe: RecipeChoice, home: Path, approval: Approval = "automatic") -> dict[str, Any]:
    """Run the flow on a server of its own and return the summary; every task run is recorded afterwards.

    Raises:
        Explained: a stage refused, with the reason.
    """
    prepare(home)
    click.echo("Prefect's server …", err=True)
    with managed_server(home) as server:
        from flows.job import pipeline

        click.echo(f"… is at {server.page}{'' if server.reused else ', as long as this runs'}", err=True)
        with attached(home, server.url):
            limits.ensure()
            summary = pipeline(recipe, approval)
        return {**summary, "peak_memory_mb": peak_memory(server)}


def peak_memory(server: Server) -> dict[str, int]:
    """Return the highest resident memory so far in MB: this process, its largest child, and the server.

    A server that has ended, or that somebody else runs, is left out.
    """
    kilobytes = {
        "run": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "largest_child": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss,
    }
    with suppress(OSError, KeyError):  # of one that has ended there is no file, or none of its memory in it
        status = Path(f"/proc/{server.pid}/status").read_text()
        lines = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        kilobytes["server"] = int(lines["VmHWM"].split()[0])
    return {name: value * 1024 // 1_000_000 for name, value in kilobytes.items()}


def closing_table(summary: dict[str, Any], home: Path, seconds: float) -> str:
    """Return the last word of a run: stages, times, figures, and where to look below the data folder."""
    rows = [
        (
            row["stage"],
            "reused" if row["reused"] else f"{row['seconds']:.1f} s",
            row["facts"],
            str(Path(row["folder"]).relative_to(home)),
        )
        for row in summary["stages"]
    ]
    folder, memory, made = summary["folder"], summary["peak_memory_mb"], summary["made"]
    reused = [row["stage"] for row in summary["stages"] if row["reused"]]
    notes = [
        ("adapter", f"{summary['adapter']} is {summary['version']}, {summary['digest']}"),
        ("whole run", f"{seconds:.1f} s; reused: {', '.join(reused) or 'nothing'}"),
        ("peak memory", ", ".join(f"{name.replace('_', ' ')} {value} MB" for name, value in memory.items())),
        ("data folder", str(home)),
        ("look at", f"{folder}/report.html and scan.html"),
        ("", "and beside them: summary.png, contact_sheet.png, curves.png, worst.png and others, edits/"),
        (
            "try",
            f"serving edit {folder}/{PORTRAIT} --adapter {summary['adapter']} "
            "--expression happy=0.8 --expression surprised=0.3 -o out.png",
        ),
    ]
    if not made:
        notes.append(("nothing to do", f"{summary['adapter']} is what this recipe makes; checked again"))
    return table(rows, notes)


def made_now(summary: dict[str, Any]) -> list[str]:
    """Return the stages of a run that made something; what only checks does so every time."""
    return [row["stage"] for row in summary["stages"] if not row["reused"] and row["stage"] not in CHECKS]


@click.command()
@click.argument("recipe", type=str)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as one JSON object.")
def main(recipe: str, as_json: bool) -> None:
    """Turn RECIPE (a YAML file or a shipped recipe's name) into a signed, promoted adapter, and use it."""
    started, home = time.monotonic(), default_home()
    # Left to itself SIGTERM would end this process at once, and leave the server behind.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    wanted = RecipeChoice(recipe=str(Path(recipe).resolve()) if Path(recipe).is_file() else recipe)
    wanted.load()
    try:
        summary = run(wanted, home)
    except BaseException:  # also Ctrl-C and SIGTERM
        click.echo("What was done is kept: the same command goes on from there.", err=True)
        raise
    seconds = time.monotonic() - started
    summary = {**summary, "seconds": round(seconds, 1), "made": made_now(summary)}
    click.echo(
        json.dumps(summary, sort_keys=True) if as_json else closing_table(summary, home, seconds), nl=as_json
    )


if __name__ == "__main__":
    command.run(main, "python -m flows.pipeline")
