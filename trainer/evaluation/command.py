"""`trainer evaluate`: an adapter against its gate; `trainer compare`: several on the same people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from registry.client import Registry
    from registry.manifest import AdapterCard
    from registry.policy import RegistryPolicy
    from trainer.evaluation.bench import Bench
    from trainer.evaluation.editing import Editor
    from trainer.evaluation.targets import Target
    from trainer.progress import Progress
    from trainer.sections import SuiteSection

_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_OUT = click.Path(file_okay=False, path_type=Path)
REFUSED = 14
"""Exit code where the gate refuses: a policy said no, as everywhere else."""

_suite = click.option(
    "--suite", default="portraits-v1", show_default=True, metavar="NAME|FILE",
    help="What is asked for, and who judges: a shipped suite or a YAML file.",
)  # fmt: skip
_tasks = click.option("--tasks", type=_FOLDER, help="Folder of pictures and tasks, for suites of real ones.")
_base = click.option(
    "--base", type=_FOLDER, help="Folder of the base model; without it the card's base is looked up."
)
BASE = "base"
"""The word that stands for the base model alone."""

_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


@click.command()
@click.argument("adapter")
@_suite
@_tasks
@click.option(
    "--against", metavar="REF|DIR",
    help="The adapter that it is compared with, such as pixelsmile@prod.",
)  # fmt: skip
@click.option(
    "--raw", type=_FOLDER, help="Folder of the same training's weights without EMA, to show beside."
)
@_base
@click.option("--policy", type=_FILE, help="Policy file; without it the registry's of this data folder.")
@click.option("--alias", default="prod", show_default=True, help="Whose gate of the policy is asked.")
@click.option("--training-data", type=_FOLDER, help="Dataset of the training, to look for learned pictures.")
@click.option("--out", type=_OUT, help="Folder of the report; default: in evaluations/ of the data folder.")
@_json
def evaluate(
    adapter: str, suite: str, tasks: Path | None, against: str | None, raw: Path | None, base: Path | None,
    policy: Path | None, alias: str, training_data: Path | None, out: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Judge ADAPTER on people whom no training has seen, and say whether the gate lets it pass.

    ADAPTER is an adapter's folder, or name@alias, name:version or name@sha256:… of the registry. The base
    without any adapter is measured beside it. Exit code 0: every rule of the gate holds; 14: refused. What
    was measured is kept, so the next candidate against the same adapter takes half the time.
    """
    from registry.client import Registry
    from registry.settings import home
    from trainer.evaluation import gates
    from trainer.evaluation.editing import candidate
    from trainer.evaluation.evaluating import FOLDER, Wanted
    from trainer.evaluation.evaluating import evaluate as judge
    from trainer.evaluation.terminal import facts, told
    from trainer.progress import ConsoleProgress

    registry, progress = Registry.open(), ConsoleProgress()
    gate = _policy(registry, policy)
    who, beside = _target(registry, adapter, progress), _against(registry, against, progress)
    bench = _bench(candidate(who.folder, allow_review=True)[0].card, _section(suite, tasks), base, progress)
    for path in gates.unknown_of(gate, alias):
        _say(
            f"{path} of the policy is no metric of an evaluation; the registry looks for it when it promotes"
        )
    wanted = Wanted(
        adapter=who.folder, raw=raw, training_data=training_data, subject=who.label,
        against=None if beside is None else (beside.folder, beside.called),
        rules=gates.rules_of(gate, alias), taken=_taken(registry, who, alias),
    )  # fmt: skip
    place = out or home() / FOLDER / _safe(f"{who.label} on {bench.plan.suite.name}")
    report = judge(bench, wanted, place)
    click.echo(json.dumps(facts(report, place)) if as_json else told(report, place, who, bench))
    if not report.verdict.passed:
        raise click.exceptions.Exit(REFUSED)


def _taken(registry: Registry, who: Target, alias: str) -> bool:
    """Whether the alias of this adapter means another version."""
    from registry.reference import Reference
    from trainer.evaluation.targets import meant

    if who.reference is None:
        return False
    own = Reference.parse(who.reference)
    now = meant(registry, Reference(name=own.name, alias=alias))
    return now is not None and now != meant(registry, own)


def _policy(registry: Registry, file: Path | None) -> RegistryPolicy:
    """The policy in a file, or the registry's."""
    from registry.policy import RegistryPolicy

    return registry.policy if file is None else RegistryPolicy.load(file)


def _section(suite: str, tasks: Path | None) -> SuiteSection:
    """The suite, with its folder of tasks.

    Raises:
        RecipeError: there is no such suite, or it takes no tasks.
    """
    from trainer.errors import RecipeError
    from trainer.evaluation.suites import load

    section = load(suite)
    if tasks is None:
        return section
    if section.source != "tasks":
        raise RecipeError(
            f"the suite {section.name} draws its people itself, so it has no place for --tasks",
            "name a suite whose source is tasks, such as ffe-bench",
        )
    return section.model_copy(update={"path": str(tasks.resolve())})


def _target(registry: Registry, text: str, progress: Progress) -> Target:
    from trainer.evaluation.evaluating import FOLDER
    from trainer.evaluation.targets import target

    return target(registry, text, registry.place.home / FOLDER / "fetched", progress)


def _against(registry: Registry, text: str | None, progress: Progress) -> Target | None:
    """What it is compared with; an alias that means nothing yet is said and left out."""
    from registry.errors import UsageError
    from registry.reference import Reference
    from trainer.evaluation.targets import meant

    if text is None:
        return None
    if not Path(text).expanduser().is_dir():
        try:
            reference = Reference.parse(text)
        except UsageError:
            reference = None  # explained by what follows
        if reference is not None and reference.alias is not None and meant(registry, reference) is None:
            _say(f"{text} means no adapter yet, so there is nothing to compare with")
            return None
    return _target(registry, text, progress)


def _bench(card: AdapterCard, section: SuiteSection, base: Path | None, progress: Progress) -> Bench:
    """Where adapters like this one are measured on this machine."""
    from registry.settings import home
    from trainer.cli import find_base
    from trainer.evaluation.bench import Bench
    from trainer.evaluation.evaluating import FOLDER, MEASURED
    from trainer.evaluation.judges import judges_of, require_able
    from trainer.evaluation.plan import plan_of

    require_able(section, card.base)
    return Bench(
        plan=plan_of(section, card.conditioning),
        judges=judges_of(section, home()),
        base=card.base,
        base_path=base or find_base(card.base),
        place=home() / FOLDER / MEASURED,
        progress=progress,
        say=_say,
    )


def _say(text: str) -> None:
    click.echo(text, err=True)


def _safe(name: str) -> str:
    """A name as part of a folder's name."""
    return "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in name)


@click.command()
@click.argument("adapters", nargs=-1, required=True)
@_suite
@_tasks
@click.option("--names", metavar="A,B,…", help="What the columns are called; default: as they are given.")
@_base
@click.option("--out", type=_OUT, help="Folder of the page; default: in evaluations/ of the data folder.")
@_json
def compare(
    adapters: tuple[str, ...], suite: str, tasks: Path | None, names: str | None, base: Path | None,
    out: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Measure ADAPTERS on the same people, and say which differences are real.

    Each is an adapter's folder or a reference of the registry; the word base is the base model alone. All are
    asked for what the first one is made for.
    """
    from registry.client import Registry
    from registry.settings import home
    from trainer.evaluation.comparison import compare, everything
    from trainer.evaluation.evaluating import FOLDER
    from trainer.evaluation.terminal import compared
    from trainer.progress import ConsoleProgress

    registry, progress = Registry.open(), ConsoleProgress()
    found = [None if text == BASE else _target(registry, text, progress) for text in adapters]
    columns = _columns(adapters, found, names)
    editors = _editors(found)
    bench = _bench(editors[0].card, _section(suite, tasks), base, progress)
    place = out or home() / FOLDER / _safe(f"{' '.join(columns)} on {bench.plan.suite.name}")
    comparison = compare(bench, everything(editors, columns), place)
    if as_json:
        content = {"folder": str(place), "page": str(place / "comparison.html")}
        click.echo(json.dumps({**content, **comparison.model_dump(mode="json")}))
    else:
        click.echo(compared(comparison, place))


def _columns(given: Sequence[str], found: Sequence[Target | None], names: str | None) -> list[str]:
    """What the adapters are called: by --names, else by their labels, or as they were given.

    Raises:
        click.UsageError: too few adapters, or names that do not tell them apart.
    """
    if len(given) < 2:
        raise click.UsageError("give at least two adapters to compare")
    columns = [BASE if one is None else one.label for one in found] if names is None else names.split(",")
    columns = [name.strip() for name in columns]
    if names is None and len(set(columns)) < len(columns):
        columns = list(given)
    if len(columns) != len(given) or len(set(columns)) < len(columns) or not all(columns):
        raise click.UsageError(
            f"{len(given)} adapters need {len(given)} different names, as in --names "
            + ",".join("ABCDEFGHIJ"[: len(given)])
        )
    return columns


def _editors(found: Sequence[Target | None]) -> list[Editor]:
    """Who edits; the base alone takes its prompts from the first adapter's card.

    Raises:
        click.UsageError: none of them is an adapter.
    """
    from trainer.evaluation.editing import editor

    first = next((one for one in found if one is not None), None)
    if first is None:
        raise click.UsageError("give at least one adapter: the base alone has no prompts")
    bare = editor(BASE, first.folder, strength=0.0, reference=BASE)
    return [bare if one is None else editor(one.label, one.folder, reference=one.called) for one in found]
