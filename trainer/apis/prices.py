"""What models take: public list prices, which a recipe may correct."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from importlib import resources

from trainer.apis.request import Request, Usage
from trainer.errors import BudgetSpent
from trainer.sections import PriceSection

_MILLION = 1e6


@functools.cache
def listed() -> Mapping[str, PriceSection]:
    """Return the shipped table: model id, or ``id@resolution`` -> its price at the vendor's own address."""
    table = json.loads((resources.files("trainer") / "apis" / "prices.json").read_text("utf-8"))
    return {name: PriceSection.model_validate(price["usd"]) for name, price in table["models"].items()}


def usd_of(price: PriceSection, usage: Usage) -> float:
    """Return what a usage takes in US dollars."""
    tokens = usage.input_tokens * price.input + usage.output_tokens * price.output
    return round(usage.images * price.image + tokens / _MILLION, 9)


class Prices:
    """Prices for a run.

    Args:
        given: those of the recipe; they hold at any address, the shipped ones at the vendors' own.
    """

    def __init__(self, given: Mapping[str, PriceSection]) -> None:
        self._given = given

    def of(self, request: Request) -> PriceSection | None:
        """Return what the model of a request takes, or None if nobody knows."""
        names = [f"{request.model}@{request.resolution}"] if request.resolution else []
        tables = [self._given, *([listed()] if request.endpoint is None else [])]
        found = [table[name] for table in tables for name in (*names, request.model) if name in table]
        return found[0] if found else None

    def usd(self, request: Request, usage: Usage) -> float | None:
        """Return what a usage takes in US dollars, or None if nobody knows."""
        price = self.of(request)
        return None if price is None else usd_of(price, usage)

    def require(self, request: Request) -> None:
        """Make sure that somebody knows the price.

        Raises:
            BudgetSpent: nobody does.
        """
        if self.of(request) is None:
            where = "" if request.endpoint is None else f" at {request.endpoint}"
            raise BudgetSpent(
                f"running.api.money is a limit, and the price of {request.model}{where} is not known",
                f"write running.api.prices: {{{request.model}: {{image: ..., input: ..., output: ...}}}} in "
                "US dollars for an image and for a million tokens, or limit running.api.requests instead",
            )
