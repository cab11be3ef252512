"""Under which licences a dataset is, and what an adapter that was trained on it must name."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from registry.manifest import Ingredient
from trainer.data.manifest import Provenance
from trainer.data.writing import provenance
from trainer.errors import DataError
from trainer.recipe import Recipe


def combined(licenses: Iterable[str]) -> str:
    """Return the SPDX expression of what is under all of these licences at once, each named once."""
    each = (text.split(" AND ") if "(" not in text and " OR " not in text else [text] for text in licenses)
    texts = sorted({one.strip() for texts in each for one in texts})
    return " AND ".join(f"({text})" if len(texts) > 1 and " " in text else text for text in texts)


def together(
    recipe: Recipe, about: Sequence[Mapping[str, Any]], scored: Path, filters: Iterable[Ingredient] = ()
) -> Provenance:
    """Return where drawn or edited pictures come from.

    Args:
        recipe: says under which terms an API edited pictures.
        about: ``source``, ``model``, ``license``, ``origin`` and ``scorer`` of the kept ones, each once.
        scored: folder of the scores; its result may name the scorer as an ingredient.
        filters: what the filters looked through.

    Raises:
        DataError: a name or a licence cannot be recorded.
    """
    return provenance(
        source=_few(sorted({str(one["source"]) for one in about})),
        license=combined(str(one["license"]) for one in about),
        scorer=_few(sorted({str(one["scorer"]) for one in about if one["scorer"]})) or "unknown",
        ingredients=(
            *makers(about, recipe.synthesis.license if recipe.synthesis else None),
            *scorers(scored),
            *filters,
        ),
    )


def makers(about: Sequence[Mapping[str, Any]], terms: str | None = None) -> list[Ingredient]:
    """Return the people and the models that made the pictures: one for each name and licence.

    The picture of a model is under the licence of the person's picture and of the API's ``terms``; the model
    itself is under the latter.

    Raises:
        DataError: a name or a licence cannot be recorded.
    """
    origins: dict[tuple[str, str, str], set[str]] = {}
    for one in about:
        api = one["model"] is not None
        name, origin = (
            (one["model"], one["source"]) if api else (one["source"], one["origin"] or one["source"])
        )
        license = terms if api and terms else one["license"]
        key = ("api" if api else "identity-images", str(name), str(license))
        origins.setdefault(key, set()).add(str(origin))
    try:
        return [
            Ingredient(kind=kind, name=name, license=license, source=_few(sorted(found)))  # type: ignore[arg-type]
            for (kind, name, license), found in sorted(origins.items())
        ]
    except ValidationError as error:
        raise DataError(
            f"the pictures' names or licences cannot be recorded: {error.errors()[0]['msg']}",
            "give shorter names and licences in one line each",
        ) from None


def scorers(scored: Path) -> list[Ingredient]:
    """Return what the scores stage in a folder says that the card must name."""
    try:
        named = json.loads((scored / "stage.json").read_text("utf-8"))["facts"].get("ingredients", [])
        return TypeAdapter(list[Ingredient]).validate_python(named)
    except (OSError, ValueError, KeyError, AttributeError):
        return []


def _few(texts: Sequence[str]) -> str:
    """Return some texts as one line; the first and the number where there are many."""
    if len(texts) <= 3 and sum(map(len, texts)) < 250:
        return ", ".join(texts)
    return f"{texts[0][:200]} and {len(texts) - 1} more"
