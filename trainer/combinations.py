"""What a recipe must not combine: rules over several sections, each with the mend in its words."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from registry.families import FAMILIES

if TYPE_CHECKING:
    from trainer.recipe import Recipe

Rule = Callable[["Recipe"], str | None]


def problems(recipe: Recipe) -> Iterator[str]:
    """Yield what is wrong with a recipe whose sections are valid one by one; later rules rely on earlier."""
    for rule in RULES:
        if found := rule(recipe):
            yield found


def _known_family(recipe: Recipe) -> str | None:
    if recipe.base.family in FAMILIES:
        return None
    return f"the family {recipe.base.family!r} is not known; choose from {', '.join(FAMILIES)}"


def _known_targets(recipe: Recipe) -> str | None:
    facts, given = FAMILIES[recipe.base.family], recipe.lora.targets
    if isinstance(given, str):
        known, words = list(facts.presets), [given]
    else:
        known, words = sorted(facts.kinds), list(given)
    for word in words:
        if word not in known:
            near = difflib.get_close_matches(word, known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            return f"lora.targets: {facts.name} has no {word!r}; {hint}choose from {', '.join(known)}"
    return None


def _some_weight(recipe: Recipe) -> str | None:
    if any(loss.weight > 0 for loss in recipe.losses.values()):
        return None
    return "every loss has weight 0; give at least one a weight"


def _encoders(recipe: Recipe) -> str | None:
    for name, loss in recipe.losses.items():
        if name != "identity" and loss.encoder != "portraits":
            return f"the loss {name} has no encoder to choose; only identity has"
    return None


def _held_out(recipe: Recipe) -> str | None:
    evaluation, data = recipe.evaluation, recipe.data
    judged = range(evaluation.first_identity, evaluation.first_identity + sum(evaluation.identities.values()))
    used = sum(data.identities.values()) + sum(data.validation.values())
    seen = range(data.first_identity, data.first_identity + used)
    if seen.start < judged.stop and judged.start < seen.stop:
        return (
            f"the people of the evaluation ({judged.start} to {judged.stop - 1}) overlap with those of the "
            f"data ({seen.start} to {seen.stop - 1})"
        )
    return None


RULES: tuple[Rule, ...] = (_known_family, _known_targets, _some_weight, _encoders, _held_out)
