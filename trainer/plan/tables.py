"""A plan for people: tables in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer.plan.machines import GIB
from trainer.plan.reckoning import STORED, Need, Plan

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_TERA = 1e12
FOLKLORE = {"full": 850, "attention": 500, "image-stream": 350}
"""What is told of rank 64 on Qwen-Image-Edit, in MB of bf16."""


def show(plan: Plan, console: Console) -> None:
    """Print a plan."""
    console.print(f"[bold]{plan.recipe}[/] on {plan.base}: {plan.pixels} x {plan.pixels} pixels, "
                  f"{plan.tokens} text tokens a prompt")  # fmt: skip
    for table in (_adapters(plan), _kinds(plan), _parts(plan), _placements(plan), _work(plan)):
        if table is not None:
            console.print(table)
    console.print(_time(plan), soft_wrap=True)


def _table(title: str, *columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def _adapters(plan: Plan) -> Table:
    table = _table("Adapter", "targets", "modules", "trained", "file")
    rows = {"this recipe": plan.adapter, **{f"preset {name}": one for name, one in plan.presets.items()}}
    for name, one in rows.items():
        table.add_row(name, f"{one.modules:,}", f"{one.parameters:,}", f"{one.file / 1e6:,.1f} MB")
    return table


def _kinds(plan: Plan) -> Table:
    table = _table("Trained parameters by kind of module", "kind", "parameters", "share")
    for name, count in sorted(plan.adapter.kinds.items(), key=lambda item: -item[1]):
        table.add_row(name, f"{count:,}", f"{count / plan.adapter.parameters:.1%}")
    return table


def _parts(plan: Plan) -> Table | None:
    own = [need for need in plan.needs if need.placement.gpus == plan.placement.gpus
           and need.placement.shard == plan.placement.shard]  # fmt: skip
    own.sort(key=lambda need: need.placement.stored != plan.placement.stored)
    how = "one base shared" if plan.placement.shard else "a base each"
    table = _table(
        f"Memory of a GPU in GiB ({plan.placement.gpus} GPU, {how}, {plan.pairs} pairs a pass)",
        "part", *(f"{need.placement.stored} base" for need in own),
    )  # fmt: skip
    for name in own[0].parts:
        table.add_row(name, *(f"{need.parts[name] / GIB:.2f}" for need in own))
    table.add_section()
    table.add_row("total", *(f"[bold]{need.total / GIB:.2f}[/]" for need in own))
    if plan.machine.memory is not None:
        table.add_row(f"fits {plan.machine.name}", *(_verdict(plan, need) for need in own))
    return table


def _verdict(plan: Plan, need: Need) -> str:
    return "[green]yes[/]" if plan.machine.name in need.fits else "[red]no[/]"


def _placements(plan: Plan) -> Table | None:
    if plan.machine.memory is None:
        return None
    table = _table("Memory of a GPU by number of GPUs, and what holds it", "GPUs", *STORED)
    found = {need.placement: need for need in plan.needs}
    for gpus, shard in dict.fromkeys((place.gpus, place.shard) for place in found):
        cells = [
            f"{need.total / GIB:.1f} GiB  {', '.join(need.fits) or 'none'}"
            for stored in STORED
            for place, need in found.items()
            if (place.gpus, place.shard, place.stored) == (gpus, shard, stored)
        ]
        table.add_row(f"{gpus}, one base shared" if shard else f"{gpus}, a base each", *cells)
    return table


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
        f"{machine.utilisation:.0%} of {machine.peak / _TERA:,.1f} TFLOP/s (assumed; --utilisation)."
    )
    if plan.steps is None or plan.hours is None or plan.cost is None:
        return f"{told}\nHow many steps that are is not known without the data; give --triplets."
    return (
        f"{told}\n{plan.steps:,} steps: {plan.hours:,.1f} hours, {plan.cost:,.0f} US dollars "
        f"at {machine.price:g} a GPU and hour (assumed; --price)."
    )
