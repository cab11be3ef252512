"""`serving plan`: the memory that a base takes, before it is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from serving.plan.needs import Need


@click.command()
@click.argument("base")
@click.option("--folder", type=click.Path(exists=True, file_okay=False, path_type=Path),
              help="Where the base is; without it the published shapes of that name.")  # fmt: skip
@click.option("--rows", type=click.IntRange(1, 256), default=8, show_default=True, help="Pictures in a step.")
@click.option("--pixels", type=click.IntRange(8, 2048), help="Of a side; default: the base's own.")
@click.option("--adapters", type=click.IntRange(0, 64), default=2, show_default=True, help="On the device.")
@click.option("--rank", type=click.IntRange(1, 1024), default=64, show_default=True, help="Of each adapter.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def plan(
    base: str, folder: Path | None, rows: int, pixels: int | None, adapters: int, rank: int, as_json: bool
) -> None:
    """Say how much memory BASE takes with each setting of weights and offload, and which GPU holds it.

    BASE is an id such as Qwen/Qwen-Image-Edit-2511. Weights and activations are counted on the base's real
    modules without their weights; nothing is loaded. How fast each setting is, only a run tells.
    """
    from dataclasses import asdict

    from registry.families import KNOWN_BASES
    from serving.errors import UsageError
    from serving.plan.bases import load
    from serving.plan.needs import needs
    from serving.quiet import quiet_libraries

    quiet_libraries()
    known = KNOWN_BASES.get(base)
    if known is None:
        raise UsageError(f"the base model {base} is not known", "known bases: " + ", ".join(KNOWN_BASES))
    found = load(known, folder)
    side = pixels or found.pixels
    wanted = needs(found, rows=rows, size=(side, side), rank=rank, adapters=adapters)
    if as_json:
        values = [{**asdict(need), "total": need.total} for need in wanted]
        click.echo(json.dumps({"base": base, "rows": rows, "pixels": side, "needs": values}))
        return
    click.echo(f"{base}: {side} x {side} pixels, rows in a step: {rows}, adapters of rank {rank}: {adapters}")
    _show(wanted)


def _show(wanted: list[Need]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from serving.plan.machines import GIB, MACHINES

    table = Table(box=box.SIMPLE_HEAD)
    for name in ("weights", "offload"):
        table.add_column(name, no_wrap=True)
    for name in ("GiB on the device", "GiB waiting", "smallest GPU"):
        table.add_column(name, justify="right", no_wrap=True)
    for need in wanted:
        fit = min(need.fits, key=lambda name: MACHINES[name].memory or 0, default="none")
        numbers = (f"{value / GIB:.1f}" for value in (need.total, need.waiting))
        table.add_row(need.weights, need.offload, *numbers, fit)
    Console().print(table)
