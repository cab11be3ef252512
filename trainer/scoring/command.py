"""`trainer scores …`: look at what a scorer is unsure of, decide, and measure how true a scorer is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from trainer.recipe import Recipe
    from trainer.scoring.calibration import CalibrationReport, Plan

_SCORED = click.Path(exists=True, file_okay=False, path_type=Path)
_FOLDER = click.Path(file_okay=False, path_type=Path)
_FILE = click.Path(dir_okay=False, path_type=Path)


@click.group()
def scores() -> None:
    """Review what a scorer is unsure of, and measure how true it is."""


@scores.command()
@click.argument("folder", type=_SCORED)
@click.option("--images", type=_SCORED, help="Folder of the pictures, if they were moved.")
@click.option("-o", "--output", type=_FILE, help="HTML file; default: review.html beside FOLDER.")
@click.option("--limit", type=click.IntRange(min=1), default=200, show_default=True, help="Pictures shown.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def review(folder: Path, images: Path | None, output: Path | None, limit: int, as_json: bool) -> None:
    """Write the review queue of FOLDER, an output of the score stage, as one HTML page."""
    from trainer.data.blobs import Blobs
    from trainer.scoring.review import page, pictures_of, quarantine, queue

    target = output or folder.parent / "review.html"
    text = page(folder, Blobs((images or pictures_of(folder)) / "blobs"), limit)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, "utf-8")
    counts = {"review": len(queue(folder)), "quarantined": len(quarantine(folder))}
    if as_json:
        click.echo(json.dumps({"page": str(target), **counts}))
        return
    click.echo(f"{counts['review']} wait for a person, {counts['quarantined']} are quarantined", err=True)
    click.echo(str(target))


@scores.command()
@click.argument("folder", type=_SCORED)
@click.argument("image")
@click.option("--accept", "decision", flag_value="accept", help="Take the medians, with the values given.")
@click.option("--reject", "decision", flag_value="reject", help="Leave the picture out.")
@click.option("--by", required=True, metavar="NAME", help="Who decides.")
@click.option(
    "--expression", "changes", multiple=True, metavar="NAME=VALUE",
    help="Another intensity, 0 to 1, for example happy=0.6; for --accept.",
)  # fmt: skip
@click.option("--reason", default="", help="Why.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def decide(
    folder: Path,
    image: str,
    decision: str | None,
    by: str,
    changes: tuple[str, ...],
    reason: str,
    as_json: bool,
) -> None:
    """Decide about IMAGE (its digest, or the beginning of it) of FOLDER, an output of the score stage.

    The decision is added to the data folder's reviews/decisions.jsonl and holds for every recipe with the
    same scorer. The next run of the recipe takes it into account.
    """
    from pydantic import ValidationError

    from registry.settings import home
    from trainer.scoring.review import decide as made
    from trainer.scoring.stage import decisions_of

    if decision is None:
        raise click.UsageError("say --accept or --reject")
    if changes and decision == "reject":
        raise click.UsageError("--expression goes with --accept only")
    given = _values(changes)
    try:
        one = made(folder, image, accept=decision == "accept", by=by, changes=given, reason=reason)
    except ValidationError as error:
        where = ", ".join(str(item["loc"][0]) for item in error.errors() if item["loc"])
        raise click.UsageError(f"the decision is not valid: {where}: {error.errors()[0]['msg']}") from None
    decisions = decisions_of(home())
    decisions.add(one)
    if as_json:
        click.echo(json.dumps({"file": str(decisions.path), "decision": one.model_dump(mode="json")}))
        return
    click.echo(f"{one.decision} {one.image}")
    click.echo("Run the recipe again: the decision counts from then on.", err=True)


@scores.command()
@click.argument("recipe", required=False)
@click.option("--human", type=click.IntRange(min=0), default=24, show_default=True, help="People drawn so.")
@click.option("--anime", type=click.IntRange(min=0), default=12, show_default=True, help="People drawn so.")
@click.option("--first-identity", type=click.IntRange(0, 999_000), help="Seed of the first person.")
@click.option(
    "--intensity", "intensities", type=click.FloatRange(0, 1, min_open=True), multiple=True,
    help="Intensities of each expression; default: 0.25 0.5 0.75 1.",
)  # fmt: skip
@click.option("--size", type=click.IntRange(64, 512), help="Side in pixels; default: 64, for models 256.")
@click.option("--out", type=_FOLDER, help="Folder for calibration.json and calibration.html.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def calibrate(
    recipe: str | None,
    human: int,
    anime: int,
    first_identity: int | None,
    intensities: tuple[float, ...],
    size: int | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Compare the scorer of RECIPE (without one the shipped judge) with drawn people of known truth.

    A scorer that is a paid API is paid: one request for each picture and sample, within the recipe's limits.
    """
    from registry.settings import home
    from trainer import recipe as recipes
    from trainer.progress import ConsoleProgress
    from trainer.scoring.calibration import FIRST_IDENTITY, Plan
    from trainer.scoring.calibration import calibrate as measure
    from trainer.scoring.calibration_page import page
    from trainer.scoring.local import LocalScorer
    from trainer.scoring.stage import scorer_of

    wanted = None if recipe is None else recipes.load(recipe)
    local = wanted is None or wanted.scoring.scorer == "judge"
    if not human + anime:
        raise click.UsageError("a calibration needs people: give --human or --anime")
    plan = Plan(
        people={"human": human, "anime": anime},
        first_identity=FIRST_IDENTITY if first_identity is None else first_identity,
        intensities=tuple(sorted(set(intensities))) or (0.25, 0.5, 0.75, 1.0),
        size=size or (64 if local else 256),
    )
    if wanted is not None:
        _unused(plan, wanted)
    scorer = LocalScorer() if wanted is None else scorer_of(wanted, home())
    report = measure(scorer, plan, ConsoleProgress())
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "calibration.json").write_text(report.model_dump_json(indent=1) + "\n", "utf-8")
        (out / "calibration.html").write_text(page(report), "utf-8")
    click.echo(report.model_dump_json() if as_json else _table(report))
    if out is not None and not as_json:
        click.echo(f"\n{out / 'calibration.html'}")


def _table(report: CalibrationReport) -> str:
    """Return the summary as a table for a terminal."""
    heads = ("expression", "slope", "offset", "mae", "absent", "spearman", "ece")
    names = heads[1:]
    rows = [(one.curve.expression, *(f"{getattr(one, name):.3f}" for name in names)) for one in report.sights]
    rows.append(("mean", *(f"{report.mean(name):.3f}" for name in names)))
    lines = [
        "".join(f"{cell:>{12 if number else 0}}".ljust(12) for number, cell in enumerate(row))
        for row in (heads, *rows)
    ]
    people = ", ".join(f"{count} {domain}" for domain, count in sorted(report.people.items()))
    kept = ", ".join(f"{count} {status}" for status, count in sorted(report.status.items()))
    value = report.top1
    return "\n".join(
        [
            f"{report.scorer}: {report.images} pictures of {people} ({kept})",
            f"strongest score right at intensity {report.intensities[-1]:g}: {value.value:.1%} "
            f"(95 % interval {value.low:.1%} to {value.high:.1%})",
            "",
            *lines,
        ]
    )


def _values(given: tuple[str, ...]) -> dict[str, float]:
    """Return expression -> intensity of words like ``happy=0.6``."""
    from trainer.portraits.expressions import EXPRESSIONS

    found: dict[str, float] = {}
    for word in given:
        name, _, text = word.partition("=")
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if name not in EXPRESSIONS:
            raise click.BadParameter(
                f"there is no expression {name!r}; choose from {', '.join(EXPRESSIONS)}",
                param_hint="--expression",
            )
        if not 0 <= value <= 1:
            raise click.BadParameter(f"{word!r} needs a value from 0 to 1", param_hint="--expression")
        found[name] = value
    return found


def _unused(plan: Plan, recipe: Recipe) -> None:
    """Refuse people that the recipe trains on or is judged by."""
    from trainer.evaluation.suites import of_recipe

    shown = {seed for _, seed in plan.seeds}
    data, judged = recipe.data, of_recipe(recipe)
    trained = sum(data.identities.values()) + sum(data.validation.values())
    used = set(range(data.first_identity, data.first_identity + trained))
    used |= set(judged.people)
    if shown & used:
        raise click.UsageError(
            f"{len(shown & used)} of these people belong to {recipe.name}; give another --first-identity"
        )
