"""The command line of the trainer: `trainer train`, `trainer plan`, `trainer doctor`, …

Data goes to stdout, progress and hints to stderr. torch and the models are imported by the commands that run
them, so that `trainer --help` answers at once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from registry.command import run
from trainer.apis.command import apis
from trainer.data.command import data
from trainer.doctor.command import doctor
from trainer.evaluation.command import compare, evaluate
from trainer.plan.command import plan
from trainer.scoring.command import scores
from trainer.zoo.cli import zoo

if TYPE_CHECKING:
    from registry.manifest import BaseModelRef
    from trainer.progress import Progress
    from trainer.recipe import Recipe
    from trainer.stage import StageResult

_OUTPUT = click.Path(dir_okay=False, path_type=Path)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="adapter-foundry", prog_name="trainer")
def cli() -> None:
    """Make adapters: data, scores, training, and what they cost."""


for command in (apis, compare, data, doctor, evaluate, plan, scores, zoo):
    cli.add_command(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; with ``--json`` every error is one JSON object on stdout.

    Args:
        arguments: words after the program's name; None takes those of this process.
    """
    run(cli, "trainer", arguments)


@cli.command()
@click.argument("recipe")
@click.option(
    "--base", type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of the base model; without it the recipe's base is looked up.",
)  # fmt: skip
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the run; default: runs/NAME in the data folder.",
)  # fmt: skip
@click.option(
    "--processes", type=click.IntRange(min=1), metavar="N",
    help="How many processes train together; default: one for each GPU.",
)  # fmt: skip
@click.option(
    "--prepare-only", is_flag=True,
    help="Make all but the adapter, and JOB for torchrun or accelerate launch -m trainer.launch JOB.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def train(
    recipe: str,
    base: Path | None,
    out: Path | None,
    processes: int | None,
    prepare_only: bool,
    as_json: bool,
) -> None:
    """Draw, score, choose, cache and train: every stage of RECIPE up to the adapter.

    A recipe with `data.source: folder` takes the pictures of that folder; nothing is drawn or scored then.
    RECIPE is a YAML file or the name of a shipped recipe. What is there already is reused; a training that
    was stopped goes on from its last checkpoint. The adapter is neither evaluated nor signed: see `registry
    push`.
    """
    from registry.settings import home
    from trainer import recipe as recipes
    from trainer.job import Job
    from trainer.launch import train as train_stage
    from trainer.progress import ConsoleProgress
    from trainer.provenance import NOT_MAKING, running_code

    running_code(NOT_MAKING)  # what is recorded is what was started, also hours of preparation later
    wanted = recipes.load(recipe)
    place = base or find_base(wanted.base)
    run, cache, progress = out or home() / "runs" / wanted.name, home() / "latents", ConsoleProgress()
    results = _prepared(wanted, place, run, cache, progress)
    job = Job(recipe=wanted, dataset=run / "dataset", cache=cache, base_path=place, out=run / "train")
    if prepare_only:
        made = {"job": str(job.write())}
    else:
        told = (wanted, job.dataset, cache, place, job.out, progress)
        results.append(train_stage(*told, processes=processes))
        made = {"adapter": str(job.out / "adapter")}
    if as_json:
        stages = [result.as_json() for result in results]
        click.echo(json.dumps({"recipe": str(wanted.digest), **made, "stages": stages}))
        return
    for result in results:
        click.echo(f"{result.stage:<12} {'reused' if result.reused else 'made':<7} {result.folder}")
    for name, path in made.items():
        click.echo(f"{name:<20} {path}")


def _prepared(recipe: Recipe, base: Path, run: Path, cache: Path, progress: Progress) -> list[StageResult]:
    """Return the stages before the training: the dataset, and what the base makes of it."""
    from trainer.data import build_triplets, cache_dataset, read_folder
    from trainer.scoring import score
    from trainer.synthesis import synthesise

    if recipe.data.source == "folder":
        results = [read_folder(recipe, run / "dataset", progress)]
    else:
        results = [synthesise(recipe, run / "images", progress)]
        results.append(score(recipe, run / "images", run / "scored", progress))
        results.append(build_triplets(recipe, run / "images", run / "scored", run / "dataset", progress))
    results.append(cache_dataset(recipe, run / "dataset", base, cache, progress))
    return results


def find_base(base: BaseModelRef) -> Path:
    """Return the folder of a recipe's base: the shipped one, or a registered one.

    Raises:
        BaseModelError: the base lies on a hub and is not on this machine.
    """
    from serving.bases import resolve
    from trainer.errors import BaseModelError
    from trainer.portraits import BASE_ID, base_path

    if base.id == BASE_ID:
        return base_path()
    found = resolve(base)
    if not isinstance(found, Path):
        raise BaseModelError(
            f"the base {base.id} is not on this machine",
            "download it and register it with `serving register-base`, or give its folder with --base",
        )
    return found


@cli.command()
@click.argument("adapter", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--base", type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of the base model; without it the card's base is looked up.",
)  # fmt: skip
@click.option(
    "--with", "partners", type=click.Path(exists=True, file_okay=False, path_type=Path), multiple=True,
    help="Folder of an adapter that may be loaded with it; several are probed one by one.",
)  # fmt: skip
@click.option(
    "--population", type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Population of clean adapters' behaviour; without it a shipped one that fits.",
)  # fmt: skip
@click.option(
    "--words", type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Text file of words to try, separated by white space, in the place of the default vocabulary.",
)  # fmt: skip
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path),
    help="Folder for probe.json, which `registry push` signs, and probe.html.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def probe(
    adapter: Path,
    base: Path | None,
    partners: tuple[Path, ...],
    population: Path | None,
    words: Path | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Look for hidden behaviour: run the adapter in the folder ADAPTER on its base and see what it reacts to.

    Words, look-alikes of the declared words, patches on the input and words that gradients find are tried;
    what changes more than the declared words do, or makes all portraits alike, is listed. Exit code 0: it
    behaves as clean adapters do; 17: a person has to look, also where there are no clean adapters to compare
    with; 14: no clean adapter comes near.
    """
    from registry.scanning.population import load as load_population
    from serving.pipelines.qwen_image_edit import QwenImageEdit
    from trainer.evaluation.probe.command import Candidate, load_base, probe_folder, table

    known = None if population is None else load_population(population)
    listed = None if words is None else words.read_text(encoding="utf-8").split()
    card = Candidate.read(adapter).adapter.card
    pipeline = load_base(card.base) if base is None else QwenImageEdit.load(base)
    found = probe_folder(
        adapter, pipeline=pipeline, partners=partners, population=known, out=out, words=listed
    )
    click.echo(json.dumps(found.report.to_json()) if as_json else table(found.report), nl=as_json)
    if found.exit_code:
        raise click.exceptions.Exit(found.exit_code)


@cli.command()
@click.option("--seed", type=click.IntRange(min=0), required=True, help="Which person.")
@click.option("--domain", type=click.Choice(["human", "anime"]), default="human", show_default=True)
@click.option(
    "--expression", "expressions", multiple=True, metavar="NAME=INTENSITY",
    help="For example happy=0.5; several are blended. Without it the face is neutral.",
)  # fmt: skip
@click.option("--size", type=click.IntRange(64, 512), default=64, show_default=True, help="Side in pixels.")
@click.option("-o", "--output", type=_OUTPUT, required=True, help="PNG file.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def render(
    seed: int, domain: str, expressions: tuple[str, ...], size: int, output: Path, as_json: bool
) -> None:
    """Draw a portrait of a person that does not exist."""
    from PIL import Image

    from trainer.portraits.renderer import EXPRESSIONS, identity, one_hot, pose
    from trainer.portraits.renderer import render as draw

    asked = _intensities(expressions, EXPRESSIONS)
    vector = one_hot("neutral")
    for name, value in asked.items():
        vector = vector + one_hot(name, value)
    pixels = draw(identity(seed, domain), vector, size, pose(seed))  # type: ignore[arg-type]
    output.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(output, "PNG")
    if as_json:
        content = {"output": str(output), "seed": seed, "domain": domain, "size": size, "expressions": asked}
        click.echo(json.dumps(content))
    else:
        click.echo(str(output))


def _intensities(given: Sequence[str], known: Sequence[str]) -> dict[str, float]:
    """Return expression -> intensity of words like ``happy=0.5``.

    Raises:
        click.BadParameter: a word has another form, an unknown name or an intensity outside of 0 to 1.5.
    """
    found: dict[str, float] = {}
    for word in given:
        name, _, value = word.partition("=")
        try:
            intensity = float(value)
        except ValueError:
            intensity = -1.0
        if name not in known:
            raise click.BadParameter(f"there is no expression {name!r}; choose from {', '.join(known)}")
        if not 0 <= intensity <= 1.5:
            raise click.BadParameter(f"{word!r} needs an intensity from 0 to 1.5, as in {name}=0.5")
        found[name] = intensity
    return found
