"""Suites: what every adapter is asked for, so that its figures can be compared with those of another.

``portraits-v1`` ships with its people; ``ffe-bench`` needs a folder of tasks. A suite of one's own is a YAML
file like the shipped ones.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import yaml
from pydantic import ValidationError

from trainer.errors import RecipeError
from trainer.recipe import Recipe, explained
from trainer.sections import SuiteSection

_HERE = Path(__file__).parent


def names() -> tuple[str, ...]:
    """The shipped suites."""
    return tuple(sorted(file.stem for file in _HERE.glob("*.yaml")))


def load(name: str) -> SuiteSection:
    """Return a shipped suite, or the one in a YAML file; a ``path`` in a file is relative to the file.

    Raises:
        RecipeError: there is no such suite, or a key or value in the file is wrong.
    """
    if name in names():
        return _read(_HERE / f"{name}.yaml")
    file = Path(name).expanduser()
    if not file.is_file():
        raise RecipeError(
            f"there is no suite {name!r}", f"choose from {', '.join(names())}, or name a suite's YAML file"
        )
    found = _read(file)
    if found.path is None:
        return found
    return found.model_copy(update={"path": str((file.parent / Path(found.path).expanduser()).resolve())})


def of_recipe(recipe: Recipe) -> SuiteSection:
    """Return the suite of a recipe's evaluation, with what the recipe changes.

    A changed one says so in its name. A judge over a network may cost what the recipe's ``running.api`` says.

    Raises:
        RecipeError: as `load`, or what the recipe changes does not fit.
    """
    section = recipe.evaluation
    suite = load(section.suite).model_copy(update={"api": recipe.running.api})
    wanted = section.model_dump(exclude={"suite", "thresholds"}, exclude_none=True)
    if not wanted:
        return suite
    try:
        changed = SuiteSection.model_validate({**suite.model_dump(), **wanted})
    except ValidationError as error:
        lines = "\n".join(explained(error, SuiteSection))
        raise RecipeError(f"evaluation does not fit the suite {suite.name}:\n{lines}", "correct it") from None
    if changed.path is not None:
        changed = changed.model_copy(update={"path": str(Path(changed.path).expanduser().resolve())})
    # A suite that comes without folder and judge is not another one when they are named.
    asked = {"path", "judge"} if suite.path is None else set()
    if changed.model_dump(exclude=asked) == suite.model_dump(exclude=asked):
        return changed
    return changed.model_copy(update={"name": f"{suite.name}, changed"})


@lru_cache(maxsize=32)
def _read(file: Path) -> SuiteSection:
    mend = f"{_HERE / 'portraits-v1.yaml'} is one that works"
    try:
        value = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"the suite {file} cannot be read: {error}", mend) from None
    try:
        return SuiteSection.model_validate(value)
    except ValidationError as error:
        lines = "\n".join(explained(error, SuiteSection))
        raise RecipeError(f"the suite {file} is not valid:\n{lines}", mend) from None
