"""Portraits for the end of a run: a few held-out people, and edits that show what the adapter does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.progress import Progress
from trainer.recipe import Recipe

if TYPE_CHECKING:
    from registry.admission import VerifiedAdapter

PEOPLE = 4
EDITS_NAME = "edits.json"
#: What the portraits are asked for; the first is the example of the README.
WISHES: tuple[Mapping[str, float], ...] = ({"happy": 0.8, "surprised": 0.3}, {"angry": 1.0}, {"sad": 0.5})


def wishes_of(recipe: Recipe) -> list[Mapping[str, float]]:
    """Return those of `WISHES` whose expressions the recipe teaches, or its first expression."""
    known = recipe.conditioning.expressions
    return [wish for wish in WISHES if set(wish) <= set(known)] or [{known[0]: 1.0}]


def edit_portraits(
    adapter: VerifiedAdapter, recipe: Recipe, home: Path, folder: Path, progress: Progress
) -> dict[str, Any]:
    """Write portraits, their edits and ``edits.json`` (adapter, base and seed of each edit) into a folder.

    Args:
        adapter: pulled from the registry; the engine of production takes nothing else.
        recipe: decides base, people, expressions and sampling steps.
        home: data folder in which the base is registered.
        folder: gets the PNG files.
        progress: is told after every person.

    Returns:
        what to show in tables.
    """
    from PIL import Image

    from serving.engine import EditEngine
    from trainer.evaluation.plan import plan_of
    from trainer.evaluation.suites import of_recipe

    engine = EditEngine.load(recipe.base, home=home)
    plan, wishes, made = plan_of(of_recipe(recipe), recipe.conditioning), wishes_of(recipe), []
    people = plan.subjects[:PEOPLE]
    for number, subject in enumerate(people):
        stem = subject.name.replace(" ", "-")
        portrait = Image.fromarray(plan.pictures.source(number))
        portrait.save(folder / f"{stem}.png")
        results = engine.sweep(portrait, adapter, wishes, seed=number, steps=plan.suite.steps)
        for wish, result in zip(wishes, results, strict=True):
            name = (
                "_".join([stem, *(f"{expression}-{value:g}" for expression, value in wish.items())]) + ".png"
            )
            result.image.save(folder / name)
            made.append({"portrait": f"{stem}.png", "edit": name, **result.facts()})
        progress("edit", number + 1, len(people), subject.name)
    (folder / EDITS_NAME).write_text(json.dumps(made, indent=1, sort_keys=True) + "\n", "utf-8")
    return {"people": len(people), "edits": len(made), "adapter": adapter.reference}
