"""``registry population``: the figures of clean adapters, with which a scan compares weights."""

from __future__ import annotations

import click

from registry.commands import Answer, command, table


@click.group("population")
def population_group() -> None:
    """Count populations of clean adapters for the scanner, and show them."""


@command
@click.argument("folder", type=click.Path(exists=True, file_okay=False))
@click.option("--out", required=True, type=click.Path(dir_okay=False), help="File to write.")
@click.option(
    "--recipe",
    help="Name of how they were trained; by default that of their targets, which a scan looks for.",
)
def build(folder: str, out: str, recipe: str | None) -> Answer:
    """Write the population of the clean adapter folders in FOLDER.

    They must be for one base, of one rank and set of targets, and pass the scanner's other layers. A scan
    needs at least 99 of them to judge weights. That they are clean is your word: train them yourself.

    Example: registry population build clean-adapters --out portraits-r16.json
    """
    from pathlib import Path

    from registry.scanning.census import count
    from registry.scanning.population import summary

    made = count(Path(folder), recipe)
    Path(out).write_bytes(made.to_bytes())
    data = {"path": out, **summary(made)}
    return Answer(data, f"{out}\n{_text(data)}")


@command
@click.argument("file", required=False, type=click.Path(exists=True, dir_okay=False))
def show(file: str | None) -> Answer:
    """Show the population in FILE with the range of each statistic, or list those that ship.

    Example: registry population show portraits-r16.json
    """
    from pathlib import Path

    from registry.scanning.population import load, shipped, summary

    if file is None:
        found = [summary(one) for one in shipped().values()]
        if not found:
            return Answer({"populations": []}, "no population ships with this version")
        return Answer({"populations": found}, "\n\n".join(map(_text, found)))
    one = load(Path(file))
    ranges = {name: _range(one.column(name)) for name in one.statistics}
    rows = [("STATISTIC", "LOWEST", "MEDIAN", "HIGHEST")]
    rows += [(name, f"{low:.4g}", f"{mid:.4g}", f"{high:.4g}") for name, (low, mid, high) in ranges.items()]
    data = summary(one) | {
        "ranges": {
            name: dict(zip(("low", "median", "high"), ends, strict=True)) for name, ends in ranges.items()
        }
    }
    return Answer(data, f"{_text(data)}\n\n{table(rows)}")


def _range(column: tuple[float, ...]) -> tuple[float, float, float]:
    return column[0], column[len(column) // 2], column[-1]


def _text(data: dict[str, object]) -> str:
    rows = [
        (name, str(data[name])) for name in ("base", "rank", "recipe", "kind", "sides", "adapters", "digest")
    ]
    return table(rows)


population_group.add_command(build)
population_group.add_command(show)
COMMANDS = (population_group,)
