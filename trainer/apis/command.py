"""``trainer apis``: what paid APIs have taken."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click

from registry.errors import shown
from trainer.apis.ledger import Ledger, Total, totals


@click.group()
def apis() -> None:
    """Show what paid APIs were asked and what they took."""


@apis.command()
@click.option("--run", metavar="RUN", help="Only the attempts of one run; the table names the runs.")
@click.option(
    "--home", "data_folder", type=click.Path(file_okay=False, path_type=Path),
    help="Data folder with the ledger; default: this machine's.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def ledger(run: str | None, data_folder: Path | None, as_json: bool) -> None:
    """Print attempts, refusals, retries, tokens, images and US dollars of each run and model.

    Dollars are list prices, or those of the recipe; what the vendor bills is on its invoice. `unsure` are
    those of attempts that brought no answer and may have been billed all the same.
    """
    from registry.settings import home
    from trainer.apis.budget import recover

    folder = (data_folder or home()) / "apis"
    book = Ledger(folder)
    if book.path.exists() or (folder / "open").is_dir():
        with book.locked():
            recover(folder)
    by = ("run", "provider", "model", "kind")
    found = totals(book.lines(run), by)
    whole = Total()
    for total in found.values():
        whole.join(total)
    rows = [
        {**dict(zip(by, map(shown, names), strict=True)), **_rounded(total)}
        for names, total in sorted(found.items())
    ]
    if as_json:
        value = {"ledger": str(book.path), "rows": rows, "total": _rounded(whole)}
        click.echo(json.dumps(value))
        return
    click.echo(f"{book.path}", err=True)
    _print([*rows, *([{**dict.fromkeys(by, ""), "run": "all", **_rounded(whole)}] if rows else [])])


_COLUMNS = ("run", "model", "kind", "requests", "retries", "refusals", "input_tokens", "output_tokens",
            "images", "usd", "unsure_usd", "unpriced")  # fmt: skip


def _rounded(total: Total) -> dict[str, object]:
    values = dataclasses.asdict(total)
    return values | {name: round(values[name], 6) for name in ("usd", "unsure_usd")}


def _print(rows: list[dict[str, object]]) -> None:
    """Print rows as a table whose columns are as wide as they must be."""
    cells = [[name.replace("_", " ") for name in _COLUMNS]]
    for row in rows:
        cells.append(
            [f"{row[name]:.4f}" if isinstance(row[name], float) else str(row[name]) for name in _COLUMNS]
        )
    widths = [max(len(line[at]) for line in cells) for at in range(len(_COLUMNS))]
    for line in cells:
        told = [
            text.ljust(width) if at < 3 else text.rjust(width)
            for at, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        click.echo("  ".join(told).rstrip())
