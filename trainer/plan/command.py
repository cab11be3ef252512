"""`trainer plan`: what a recipe takes, before it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from trainer.recipe import Recipe

_MACHINES = ("H200", "H100", "A100", "L40S", "RTX4090", "CPU")


@click.command()
@click.argument("recipe")
@click.option("--gpus", type=click.IntRange(1, 4096), help="How many GPUs; default: running.count.")
@click.option("--gpu", type=click.Choice(_MACHINES), help="Which; default: running.gpu.")
@click.option(
    "--base-precision", type=click.Choice(["fp32", "bf16", "fp8", "nf4"]),
    help="How the base's linear weights are stored; default: precision.base.",
)  # fmt: skip
@click.option(
    "--triplets", type=click.IntRange(1), help="Training triplets of the dataset; default: counted."
)
@click.option("--price", type=click.FloatRange(0), help="US dollars a GPU and hour.")
@click.option(
    "--utilisation",
    type=click.FloatRange(0, 1, min_open=True),
    help="Share of the GPU's peak that is reached.",
)
@click.option(
    "--base", type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of the base model; without it the published shapes of the recipe's base.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def plan(
    recipe: str,
    gpus: int | None,
    gpu: str | None,
    base_precision: str | None,
    triplets: int | None,
    price: float | None,
    utilisation: float | None,
    base: Path | None,
    as_json: bool,
) -> None:
    """Say what RECIPE takes: trained parameters, file, memory, operations, hours and cost.

    RECIPE is a YAML file or the name of a shipped recipe. Everything is counted on the base's real modules
    without their weights; nothing is loaded or trained. Only the share of a GPU's peak and the prices are
    assumptions, and are printed.
    """
    import logging
    from dataclasses import asdict, replace

    # Its remark that a CPU has no fast kernels for 4 bits is beside the point where nothing is computed.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

    from serving.plan import bases
    from serving.plan.machines import MACHINES
    from trainer import recipe as recipes
    from trainer.plan.apis import bills
    from trainer.plan.reckoning import reckon

    wanted = recipes.load(recipe)
    known = triplets if triplets is not None else _triplets(wanted)
    machine = MACHINES[gpu or wanted.running.gpu]
    if price is not None:
        machine = replace(machine, price=price)
    if utilisation is not None:
        machine = replace(machine, utilisation=utilisation)
    found = reckon(
        wanted,
        bases.load(wanted.base, base or _shipped(wanted)),
        triplets=known,
        machine=machine,
        gpus=gpus,
        stored=base_precision,  # type: ignore[arg-type]  # click has checked it
    )
    people = _portraits(wanted)
    paid = bills(wanted, people or 1)
    if as_json:
        apis = [{**asdict(bill), "portraits": people or 1} for bill in paid]
        click.echo(json.dumps({**found.as_json(), "apis": apis}))
        return
    from rich.console import Console

    from trainer.plan.tables import show, show_bills

    show(found, Console())
    show_bills(paid, people, Console())


def _triplets(recipe: Recipe) -> int | None:
    """Return how many training triplets the recipe's data makes; None if it is not there yet.

    Of drawn ones some are left out later.

    Raises:
        DataError: the list of the data is not right.
    """
    from trainer.data.listing import read_listing
    from trainer.data.triplets import pairs_of
    from trainer.errors import DataError
    from trainer.recipe import require_data

    data = recipe.data
    each = len(pairs_of(recipe)) * len(data.intensities)
    if data.source == "renderer":
        return sum(data.identities.values()) * each
    if data.source == "edited":
        people = _portraits(recipe)
        return None if people is None else max(1, round(people * (1 - data.validation_share))) * each
    try:
        require_data(recipe)
    except DataError:
        return None
    listing = read_listing(Path(str(data.path)), recipe.conditioning.expressions)
    return sum(pair.split == "train" for _, pair in listing.pairs)


def _portraits(recipe: Recipe) -> int | None:
    """Return how many portraits are edited; None if they are not there yet, or nobody edits any."""
    from trainer.errors import DataError
    from trainer.synthesis.people import portraits_of

    if recipe.data.source != "edited":
        return None
    try:
        return len(portraits_of(recipe))
    except DataError:
        return None


def _shipped(recipe: Recipe) -> Path | None:
    """Return the folder of the base that ships with the trainer, if the recipe wants that."""
    from trainer.portraits import BASE_ID, base_path

    return base_path() if recipe.base.id == BASE_ID else None
