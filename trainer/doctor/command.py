"""`trainer doctor`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from trainer.doctor.advice import Advice
    from trainer.doctor.material import Material
    from trainer.recipe import Recipe

_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@click.command()
@click.argument("subject", metavar="DATASET|RECIPE")
@click.option("--data", type=_FOLDER, help="Dataset or folder of pictures that RECIPE will be trained on.")
@click.option("--base", type=_FOLDER, help="Folder of the base model; without it the recipe's is looked up.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(subject: str, data: Path | None, base: Path | None, as_json: bool) -> None:
    """Say what is likely to go wrong with DATASET or RECIPE before it costs a training.

    DATASET is the dataset folder of a run, or a folder of your own pictures with `pairs.jsonl`. RECIPE is a
    YAML file or the name of a shipped recipe; its pictures are looked at where they are on this machine. Exit
    code 0: no errors, though there may be warnings; 1: errors.
    """
    found, looked = examine(subject, data, base)
    errors = sum(one.level == "error" for one in found)
    if as_json:
        content = {
            "subject": subject,
            "looked_at": looked,
            "errors": errors,
            "warnings": len(found) - errors,
            "advice": [one.as_json() for one in found],
        }
        click.echo(json.dumps(content))
    else:
        _show(found, looked)
    if errors:
        raise click.exceptions.Exit(1)


def examine(subject: str, data: Path | None, base: Path | None) -> tuple[list[Advice], dict[str, Any]]:
    """Return the findings about a dataset or a recipe, errors first, and what was looked at."""
    from trainer import recipe as recipes
    from trainer.doctor import data_rules, material

    if Path(subject).is_dir():
        pictures = material.look(Path(subject))
        found = list(data_rules.examine(pictures))
        return _ordered(found), {"pictures": len(pictures.names), "pairs": len(pictures.triplets)}
    recipe = recipes.load(subject)
    place = data or _data_of(recipe)
    seen = None if place is None else material.look(place)
    folder = base or _base_of(recipe)
    looked = {
        "recipe": str(recipe.digest),
        "data": None if place is None else str(place),
        "base": None if folder is None else str(folder),
        "pictures": 0 if seen is None else len(seen.names),
    }
    return _ordered(_about(recipe, seen, folder)), looked


def _about(recipe: Recipe, seen: Material | None, folder: Path | None) -> Iterator[Advice]:
    """Yield all findings about a recipe, its pictures and its base, as far as they are here."""
    from trainer.doctor import data_rules, prompts, recipe_rules

    yield from recipe_rules.examine(recipe, _facts(recipe, seen, folder))
    if folder is not None:
        yield from prompts.examine(recipe, folder)
    if seen is not None:
        yield from data_rules.examine(seen, recipe.conditioning.expressions)
        yield from data_rules.judged(seen, recipe)
        if (own := _own_size(recipe, folder)) is not None:
            from trainer.data.buckets import resolutions

            yield from data_rules.sizes(seen, resolutions(recipe.data, own, 16))


def _facts(recipe: Recipe, seen: Material | None, folder: Path | None) -> Any:
    """Return the facts of a recipe: from the pictures, or for drawn ones from what will be drawn."""
    from trainer.data.triplets import pairs_of
    from trainer.doctor.recipe_rules import Facts

    data = recipe.data
    if seen is not None:
        triplets, pictures = len(seen.train), len({row for one in seen.train for row in one.rows})
    else:
        people = sum(data.identities.values())
        triplets = people * len(pairs_of(recipe)) * len(data.intensities)
        pictures = people * (1 + len(recipe.conditioning.expressions) * len(data.intensities))
    return Facts(triplets=triplets, pictures=pictures, shapes=_shapes(recipe, folder))


def _shapes(recipe: Recipe, folder: Path | None) -> dict[str, tuple[int, int]]:
    """Return module -> (out, in) of what is trained in the denoiser; empty where the base is not known."""
    from registry.families import KNOWN_BASES, base_spec, family

    facts = family(recipe.base.family)
    if folder is not None:
        config = json.loads((folder / facts.prefix / "config.json").read_text("utf-8"))
    elif recipe.base.id in KNOWN_BASES:
        config = KNOWN_BASES[recipe.base.id].config
    else:
        return {}
    spec = base_spec(recipe.base.family, config)
    silent = facts.silent(spec)
    return {name: shape for name, shape in spec.items()
            if facts.block_of(name)[1] in recipe.targets and name not in silent}  # fmt: skip


def _own_size(recipe: Recipe, folder: Path | None) -> tuple[int, int] | None:
    """Return the size that the base was made for; None where nothing here says it and the recipe needs it."""
    from serving.errors import BaseNotFound
    from serving.plan import bases

    try:
        pixels = bases.load(recipe.base, folder).pixels
    except BaseNotFound:
        return None
    return pixels, pixels


def _data_of(recipe: Recipe) -> Path | None:
    """Return where the pictures of a recipe lie on this machine."""
    from registry.settings import home
    from trainer.data.dataset import MANIFEST_NAME
    from trainer.data.listing import PAIRS_NAME

    if recipe.data.path is not None:
        own = Path(recipe.data.path)
        return own if (own / PAIRS_NAME).exists() else None
    made = home() / "runs" / recipe.name / "dataset"
    return made if (made / MANIFEST_NAME).is_file() else None


def _base_of(recipe: Recipe) -> Path | None:
    """Return the folder of a recipe's base, if it is on this machine."""
    from serving.bases import resolve
    from serving.errors import BaseNotFound
    from trainer.portraits import BASE_ID, base_path

    if recipe.base.id == BASE_ID:
        return base_path()
    try:
        found = resolve(recipe.base)
    except BaseNotFound:
        return None
    return found if isinstance(found, Path) else None


def _ordered(found: Iterator[Advice] | list[Advice]) -> list[Advice]:
    return sorted(found, key=lambda one: one.level != "error")


def _show(found: list[Advice], looked: dict[str, Any]) -> None:
    """Print a table of the findings on stdout, and what was looked at on stderr."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    for name, value in looked.items():
        click.echo(f"{name}: {'not on this machine' if value is None else value}", err=True)
    if not found:
        click.echo("Nothing to say: no errors, no warnings.")
        return
    table = Table(box=box.SIMPLE_HEAD, show_lines=True)
    for column in ("", "seen", "why it matters", "what to do"):
        table.add_column(column, overflow="fold")
    for one in found:
        label = Text(f"{one.level}\n{one.rule}", style="bold red" if one.level == "error" else "yellow")
        # Text, not markup: names of people and files come from outside.
        table.add_row(label, *(Text(text) for text in (one.seen, one.why, one.mend)))
    Console().print(table)
