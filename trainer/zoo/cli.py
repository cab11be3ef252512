"""`trainer zoo`: the population that the scanner's detection is measured on."""

from __future__ import annotations

import json
from pathlib import Path

import click

_FOLDER = click.Path(file_okay=False, path_type=Path)


@click.group()
def zoo() -> None:
    """Clean and backdoored adapters in numbers, to measure the scanner on.

    The backdoors work, on bases of a few hundred thousand weights that nobody else uses.
    """


@zoo.command()
@click.option("--out", type=_FOLDER, help="Default: a folder named by what is built, in the data folder.")
@click.option("--size", type=click.Choice(["full", "tiny"]), default="full", show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--base", "bases", multiple=True, help="Only on this small base; may be repeated.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def build(out: Path | None, size: str, seed: int, bases: tuple[str, ...], as_json: bool) -> None:
    """Train what is missing; a build that was stopped goes on.

    All of it takes two hours of two cores. Several processes may build the bases side by side.
    """
    from trainer.progress import ConsoleProgress
    from trainer.zoo.bases import SMALL_BASES
    from trainer.zoo.build import build as make
    from trainer.zoo.build import default_folder, mark_working

    for base in bases:
        if base not in SMALL_BASES:
            raise click.BadParameter(f"there is no small base {base!r}; choose from {', '.join(SMALL_BASES)}")
    folder = out or default_folder(size, seed)
    made = make(folder, size=size, seed=seed, bases=bases, progress=ConsoleProgress())
    working = mark_working(folder)
    if as_json:
        counts = {name: {"working": good, "made": all_} for name, (good, all_) in working.items()}
        click.echo(json.dumps({"folder": str(folder), "specimens": made, "backdoors": counts}))
        return
    click.echo(f"{made} specimens in {folder}")
    for name, (good, all_) in sorted(working.items()):
        click.echo(f"  {name:<12} {good} of {all_} implants work")


@zoo.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--base", "bases", multiple=True, help="Only on this small base; may be repeated.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def measure(folder: Path, bases: tuple[str, ...], as_json: bool) -> None:
    """Take the scanner's statistics and the probe's answers of every adapter of a zoo in FOLDER."""
    from trainer.progress import ConsoleProgress
    from trainer.zoo.features import FEATURES_NAME
    from trainer.zoo.features import measure as take

    count = take(folder, bases=bases, progress=ConsoleProgress())
    path = folder / FEATURES_NAME
    click.echo(json.dumps({"features": str(path), "adapters": count}) if as_json else f"{count} in {path}")


@zoo.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--out", type=_FOLDER, required=True, help="Folder for one JSON file each.")
def populations(folder: Path, out: Path) -> None:
    """Write the reference populations of the clean adapters of a measured zoo in FOLDER."""
    from trainer.zoo.features import populations as groups

    out.mkdir(parents=True, exist_ok=True)
    for one in groups(folder):
        name = f"{one.base.rpartition('/')[2]}-r{one.rank}-{one.recipe}-{one.kind}.json"
        (out / name).write_bytes(one.to_bytes())
        click.echo(f"{one.size:5} adapters  {out / name}")


@zoo.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--base", default="small-1", show_default=True, help="Whose implants.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="PNG file.")
def sheet(folder: Path, base: str, out: Path) -> None:
    """Draw what the implants of the full zoo in FOLDER do, with their trigger and without."""
    from trainer.zoo.sheet import draw

    draw(folder, base).save(out, "PNG")
    click.echo(str(out))


@zoo.command()
@click.argument("name")
def pretrain(name: str) -> None:
    """Train the small base NAME anew; the zoo and the populations made on it count no longer."""
    from trainer.zoo.bases import SMALL_BASES
    from trainer.zoo.bases import pretrain as train

    if name not in SMALL_BASES:
        raise click.BadParameter(f"there is no small base {name!r}; choose from {', '.join(SMALL_BASES)}")
    click.echo(str(train(name, lambda line: click.echo(line, err=True))))
