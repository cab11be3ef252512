"""A recipe: everything that decides a training, in one strict YAML file with one digest.

What is not in the recipe does not change the adapter. An unknown key is an error that names the nearest right
one, so a typing error cannot silently train something else.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, ValidationError, model_validator

from registry.digest import Digest, digest_bytes
from registry.families import family
from registry.manifest import BaseModelRef, ConditioningSpec, canonical_json
from registry.reference import NAME_PATTERN
from trainer import combinations
from trainer.errors import DataError, RecipeError
from trainer.sections import (
    DataSection,
    EmaSection,
    EvaluationSection,
    LoraSection,
    LossName,
    LossSection,
    NoiseSection,
    OptimiserSection,
    PrecisionSection,
    ReleaseSection,
    RunningSection,
    ScoringSection,
    Section,
    Seed,
    SynthesisSection,
)


class Recipe(Section):
    """Everything that decides a training; see the sections."""

    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    seed: Seed = 0
    base: BaseModelRef
    data: DataSection
    synthesis: SynthesisSection | None = None
    scoring: ScoringSection = ScoringSection()
    lora: LoraSection
    precision: PrecisionSection = PrecisionSection()
    optimiser: OptimiserSection
    noise: NoiseSection = NoiseSection()
    ema: EmaSection = EmaSection()
    losses: dict[LossName, LossSection]
    conditioning: ConditioningSpec
    evaluation: EvaluationSection = EvaluationSection()
    release: ReleaseSection
    running: RunningSection = RunningSection()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for problem in combinations.problems(self):
            raise ValueError(problem)
        return self

    @property
    def digest(self) -> Digest:
        """sha256 of the canonical JSON without ``running``; comments and layout do not count either."""
        return digest_bytes(canonical_json(self.model_dump(mode="json", exclude={"running"})))

    @property
    def targets(self) -> tuple[str, ...]:
        """The kinds of modules that are trained, with a preset written out."""
        given = self.lora.targets
        return family(self.base.family).presets[given] if isinstance(given, str) else given

    def section(self, *names: str) -> dict[str, Any]:
        """Return some sections as JSON values; stages make their keys of the sections that they use."""
        return self.model_dump(mode="json", include=set(names))


def load(source: str | Path) -> Recipe:
    """Return the recipe in a YAML file, or the shipped recipe of that name.

    Raises:
        RecipeError: there is no such recipe, or it is not valid.
    """
    path = Path(source)
    if not path.is_file():
        shipped = resources.files("trainer") / "recipes"
        known = sorted(
            item.name.removesuffix(".yaml") for item in shipped.iterdir() if item.name.endswith(".yaml")
        )
        if str(source) not in known:
            raise RecipeError(
                f"there is no recipe {str(source)!r}",
                "give the path of a YAML file or one of the shipped recipes: " + ", ".join(known),
            )
        return parse((shipped / f"{source}.yaml").read_text("utf-8"), str(source))
    return parse(path.read_text("utf-8"), str(path))


def parse(text: str, where: str = "the recipe") -> Recipe:
    """Return the recipe in YAML ``text``; ``where`` names it in errors.

    Raises:
        RecipeError: ``text`` is no YAML mapping, has an unknown or missing key, or a wrong value.
    """
    import yaml

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{where} is not valid YAML: {error}", "correct the line that is named") from None
    if not isinstance(value, dict):
        raise RecipeError(f"{where} is not a mapping of sections", "start from trainer/recipes/*.yaml")
    try:
        return Recipe.model_validate(value)
    except ValidationError as error:
        raise RecipeError(f"{where} is not valid:\n" + "\n".join(explained(error)), _MEND) from None


def change(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """Return a recipe with other values, such as ``{"optimiser.steps": 100}``; None takes a key out.

    Raises:
        RecipeError: a place does not exist in recipes, or the changed recipe is not valid.
    """
    if not changes:
        return recipe
    value = recipe.model_dump(mode="json", exclude_unset=True)
    for place, new in changes.items():
        *above, last = place.split(".")
        section = value
        for part in above:
            section = section.setdefault(part, {})
            if not isinstance(section, dict):
                raise RecipeError(f"{place}: {part} is not a section of the recipe", _MEND)
        if new is None:
            section.pop(last, None)
        else:
            section[last] = new
    try:
        return Recipe.model_validate(value)
    except ValidationError as error:
        lines = "\n".join(explained(error))
        raise RecipeError(f"the changed recipe {recipe.name} is not valid:\n{lines}", _MEND) from None


_MEND = "correct these keys; trainer/recipes/pixelsmile-portraits.yaml is an example that works"


def require_data(recipe: Recipe) -> None:
    """Look for the pictures of a recipe that brings its own; nothing is opened.

    Raises:
        DataError: they are not there.
    """
    if recipe.data.path is None:
        return
    if recipe.data.source == "edited":
        if not Path(recipe.data.path).is_dir():
            raise DataError(
                f"the portraits of {recipe.name} are not there: there is no folder {recipe.data.path}",
                "put portraits there that you may use, or write another data.path into the recipe",
            )
        return
    listing = Path(recipe.data.path) / "pairs.jsonl"
    if not listing.is_file():
        raise DataError(
            f"the pictures of {recipe.name} are not there: there is no file {listing}",
            "put them there as docs/trainer.md describes, or write another data.path into the recipe",
        )


def explained(error: ValidationError, model: Any = Recipe) -> list[str]:
    """Return one line for each mistake, with the nearest right key or value for a wrong one."""
    lines = []
    for item in error.errors(include_url=False):
        location = tuple(str(part) for part in item["loc"] if part != "[key]")
        text = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            text = "there is no such key" + _nearest(location[-1], _keys_at(location[:-1], model))
        elif item["type"] == "missing":
            text = "is missing"
        elif item["type"] == "literal_error":
            choices = re.findall(r"'([^']+)'", str(item["ctx"]["expected"]))
            text = (
                f"there is no {item['input']!r}{_nearest(item['input'], choices)}; choose from "
                + ", ".join(choices)
            )
        where = ".".join(location)
        lines.append(f"  {where}: {text}" if where else f"  {text}")
    return lines


def _nearest(word: object, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(word), known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def _keys_at(location: tuple[str, ...], model: Any) -> list[str]:
    """Return the keys that are right at a place in a recipe, or in another model."""
    for part in location:
        fields: Mapping[str, Any] = getattr(model, "model_fields", {})
        annotation = fields[part].annotation if part in fields else model
        arguments = [a for a in getattr(annotation, "__args__", ()) if hasattr(a, "model_fields")]
        model = arguments[0] if arguments else annotation
    return sorted(getattr(model, "model_fields", {}))
