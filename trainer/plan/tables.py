"""A plan for people: tables in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from serving.plan.machines import GIB, MACHINES
from trainer.plan.reckoning import STORED, Need, Plan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console
    from rich.table import Table

    from trainer.plan.apis import Bill

_TERA = 1e12
_TOLD_OF, _TOLD_RANK = "Qwen/Qwen-Image-Edit-2511", 64
_TOLD = (
    "Of rank 64 it is told: 850 MB full, 500 attention, 350 image-stream. In 16 bits\n"
    "full is 849 MB with the four modules that never learn, which are left out here."
)


def show(plan: Plan, console: Console) -> None:
    """Print a plan."""
    console.print(
        f"[bold]{plan.recipe}[/] on {plan.base}\n{plan.pixels} x {plan.pixels} pixels, {plan.tokens} text "
        f"tokens a prompt; " + ", ".join(f"{name} {count:,}" for name, count in plan.weights.items())
        + " weights",
        soft_wrap=True,
        highlight=False,
    )  # fmt: skip
    for one in (_adapters(plan), _kinds(plan), _parts(plan), _placements(plan), _work(plan)):
        if one is not None:
            console.print(one)
    console.print(_time(plan), soft_wrap=True, highlight=False)


def show_bills(bills: Sequence[Bill], portraits: int | None, console: Console) -> None:
    """Print what paid APIs take, for one portrait where nobody knows how many there will be."""
    if not bills:
        return
    table = _table("Paid APIs", "model", "work", "requests", "US dollars at most")
    for bill in bills:
        price = "nobody knows" if bill.usd is None else f"{bill.usd:,.2f}"
        table.add_row(bill.model, bill.work, f"{bill.requests:,}", price)
    counted = "one portrait; they are not there yet" if portraits is None else f"{portraits:,} portraits"
    table.caption = f"List prices, {counted}; retries come on top, answers that are there are free."
    table.caption_justify = "left"
    console.print(table)


def _table(title: str, *columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    return table


def _adapters(plan: Plan) -> Table:
    table = _table("Adapter", "targets", "modules", "trained", "file")
    rows = {"this recipe": plan.adapter, **{f"preset {name}": one for name, one in plan.presets.items()}}
    for name, one in rows.items():
        table.add_row(name, f"{one.modules:,}", f"{one.parameters:,}", f"{one.file / 1e6:,.1f} MB")
    if plan.base == _TOLD_OF and plan.rank == _TOLD_RANK:
        table.caption, table.caption_justify = _TOLD, "left"
    return table


def _kinds(plan: Plan) -> Table:
    table = _table("Trained by kind of module", "kind", "parameters", "share")
    for name, count in sorted(plan.adapter.kinds.items(), key=lambda item: -item[1]):
        table.add_row(name, f"{count:,}", f"{count / plan.adapter.parameters:.1%}")
    return table


def _parts(plan: Plan) -> Table:
    place = plan.placement
    own = [
        one for one in plan.needs if (one.placement.gpus, one.placement.shard) == (place.gpus, place.shard)
    ]
    own.sort(key=lambda need: need.placement.stored != place.stored)
    unit, size = ("GiB", GIB) if own[0].total > GIB else ("MiB", 1 << 20)
    title = f"Memory of each of {place.gpus} x {plan.machine.name} in {unit}; pairs in a pass: {plan.pairs}"
    table = _table(title, "part", *(f"{need.placement.stored} base" for need in own))
    for name in own[0].parts:
        table.add_row(name, *(f"{need.parts[name] / size:,.2f}" for need in own))
    table.add_section()
    table.add_row("total", *(f"[bold]{need.total / size:,.2f}[/]" for need in own))
    if plan.machine.memory is not None:
        fits = ("[green]yes[/]" if plan.machine.name in need.fits else "[red]no[/]" for need in own)
        table.add_row(f"fits {plan.machine.name}", *fits)
    return table


def _placements(plan: Plan) -> Table | None:
    if plan.machine.memory is None:
        return None
    table = _table("GiB of each GPU, and the smallest that holds it", "GPUs", *(f"{s} base" for s in STORED))
    found = {need.placement: need for need in plan.needs}
    for gpus, shard in dict.fromkeys((place.gpus, place.shard) for place in found):
        here = {p.stored: need for p, need in found.items() if (p.gpus, p.shard) == (gpus, shard)}
        how = "" if gpus == 1 else ", one base shared" if shard else ", a base each"
        table.add_row(f"{gpus}{how}", *(_smallest(here[stored]) for stored in STORED))
    return table


def _smallest(need: Need) -> str:
    fit = min(need.fits, key=lambda name: MACHINES[name].memory or 0, default="none")
    return f"{need.total / GIB:.1f}  {fit:<7}"


def _work(plan: Plan) -> Table:
    step, total = plan.step, plan.step.total
    table = _table("Work of an optimiser step", "part", "TFLOP", "share")
    rows = {
        "forward": step.forward,
        "backward": step.backward,
        "forward again (checkpointing)": step.again,
        f"decoding {step.pictures:.1f} pictures and back": step.decode,
    }
    for name, count in rows.items():
        if count:
            table.add_row(name, f"{count / _TERA:,.3f}", f"{count / total:.1%}")
    table.add_section()
    table.add_row("total", f"[bold]{total / _TERA:,.3f}[/]", "")
    return table


def _time(plan: Plan) -> str:
    machine = plan.machine
    seconds = plan.step.each / (machine.peak * machine.utilisation)
    told = (
        f"A step takes about {seconds:.2f} s on {plan.placement.gpus} x {machine.name}, if it does "
        f"{machine.utilisation:.0%} of {machine.peak / _TERA:g} TFLOP/s (assumed; --utilisation)."
    )
    steps, hours, cost = plan.steps, plan.hours, plan.cost
    if steps is None or hours is None or cost is None:
        # The data is not there, and the recipe counts in epochs.
        steps, hours = 1000, 1000 * seconds / 3600
        cost = hours * plan.placement.gpus * machine.price
        told += "\nThere is no data yet, so nobody knows how many steps it takes; --triplets N says."
    long = f"{hours:,.1f} hours" if hours >= 1 else f"{hours * 60:,.0f} minutes"
    return (
        f"{told}\n{steps:,} steps take {long} and cost {cost:,.2f} US dollars at "
        f"{machine.price:g} for each {machine.name} and hour (assumed; --price)."
    )
