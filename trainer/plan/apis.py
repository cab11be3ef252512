"""What the paid APIs of a recipe are asked, and take at most by list price."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.apis.prices import Prices
from trainer.apis.request import Request, Usage
from trainer.recipe import Recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class Bill:
    """What one model takes.

    Attributes:
        model: its id.
        work: what it does.
        requests: without retries, and without answers that are there already.
        usd: at most, in US dollars; None where nobody knows the price.
    """

    model: str
    work: str
    requests: int
    usd: float | None


def bills(recipe: Recipe, portraits: int) -> list[Bill]:
    """Return what the pictures and scores of a recipe take; nothing where no API is paid.

    Args:
        recipe: names the models.
        portraits: neutral pictures that are edited; drawn people count in the recipe.
    """
    from trainer.scoring.vlm import EXPECTED as A_SCORE
    from trainer.synthesis.editing import EXPECTED as AN_EDIT

    data, faces, found = recipe.data, len(recipe.conditioning.expressions) * len(recipe.data.intensities), []
    if data.source == "renderer":
        portraits = sum(data.identities.values()) + sum(data.validation.values())
    if recipe.synthesis is not None:
        edits = recipe.synthesis
        usage = AN_EDIT[edits.provider]
        found.append(
            _bill(recipe, "edit", edits.model, edits.endpoint, usage, portraits * faces, edits.resolution)
        )
    if recipe.scoring.model is not None and data.source != "folder":
        scores = recipe.scoring
        count = portraits * (1 + faces) * scores.samples
        found.append(_bill(recipe, "score", scores.model, scores.endpoint, A_SCORE, count, None))
    return found


def _bill(
    recipe: Recipe, kind: str, model: str | None, endpoint: str | None, usage: Usage, count: int,
    resolution: str | None,
) -> Bill:  # fmt: skip
    one = Request(
        provider="", kind=kind, model=str(model), endpoint=endpoint, content={}, resolution=resolution  # type: ignore[arg-type]
    )  # fmt: skip
    usd = Prices(recipe.running.api.prices).usd(one, usage)
    return Bill(model=str(model), work=kind, requests=count, usd=None if usd is None else usd * count)
