"""Under which terms an adapter would stand, known from its recipe alone: asked before anything is paid."""

from __future__ import annotations

from registry.manifest import AdapterCard, Ingredient, LoraFacts, TrainingLineage
from trainer.recipe import Recipe
from trainer.synthesis.people import all_of, portraits_of


def asks_paid(recipe: Recipe) -> bool:
    """Return whether pictures or scores of a recipe come from a paid API."""
    return recipe.synthesis is not None or recipe.scoring.scorer != "judge"


def card_ahead(recipe: Recipe) -> AdapterCard:
    """Return the card that the adapter of a recipe will have, as far as licences go.

    Digests and steps, which nobody knows yet, are the recipe's own and 1. Networks in losses and what filters
    looked through are missing: those are on this machine and cost nothing.

    Raises:
        DataError: the people of the recipe are not there, or nobody names their licence.
    """
    of_people = (
        all_of(one.license for one in portraits_of(recipe))
        if recipe.data.source == "edited"
        else recipe.data.license
    )
    made = [Ingredient(name="people", kind="identity-images", license=of_people, source=recipe.name)]
    for section in (recipe.synthesis, recipe.scoring):
        if section is not None and section.model is not None and section.license is not None:
            source = section.endpoint or "the vendor"
            made.append(Ingredient(name=section.model, kind="api", license=section.license, source=source))
    base, dataset = recipe.base, all_of(one.license for one in made if one.name != recipe.scoring.model)
    return AdapterCard(
        base=base,
        lora=LoraFacts(
            rank=recipe.lora.rank, alpha=recipe.lora.alpha, targets=recipe.targets, dtype=recipe.lora.dtype
        ),
        conditioning=recipe.conditioning,
        license=recipe.release.license,
        ingredients=(
            Ingredient(name=base.id, kind="base", license=base.license, source=f"{base.id}@{base.revision}"),
            Ingredient(
                name="triplets", kind="dataset", license=dataset, source=recipe.name, digest=recipe.digest
            ),
            *made,
            *recipe.release.ingredients,
        ),
        training=TrainingLineage(
            recipe=recipe.digest, dataset=recipe.digest, seed=recipe.seed, steps=1, code_version="none yet"
        ),
    )  # fmt: skip
