"""The generator that draws portraits: free, deterministic, and the truth is known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, get_args

import numpy as np

from trainer.data.blobs import encode_png
from trainer.portraits.renderer import identity, one_hot, pose, render
from trainer.recipe import Recipe
from trainer.sections import Domain
from trainer.synthesis.source import Made, PortraitRequest


class PortraitRenderer:
    """`Generator` that draws with `trainer.portraits.renderer`."""

    name: ClassVar[str] = "portrait-renderer/1"
    origin: ClassVar[str] = "drawn by trainer.portraits.renderer; no real person is depicted"
    parallel: ClassVar[int] = 1

    def __init__(self, recipe: Recipe) -> None:
        self.license = recipe.data.license
        self._recipe = recipe

    def inputs(self) -> Mapping[str, Any]:
        """See `Generator`."""
        names = {"identities", "validation", "first_identity", "intensities", "size", "license"}
        return {
            "source": self.name,
            "data": self._recipe.data.model_dump(mode="json", include=names),
            "expressions": list(self._recipe.conditioning.expressions),
        }

    def plan(self) -> list[PortraitRequest]:
        """See `Generator`."""
        data, people = self._recipe.data, list[tuple[str, str]]()
        for split, shares in (("train", data.identities), ("validation", data.validation)):
            for domain in sorted(shares):
                people += [(split, domain)] * shares[domain]
        return [
            PortraitRequest(
                split=split,
                identity=f"{domain}-{seed}",
                domain=domain,
                seed=seed,
                pose=seed,
                expression=expression,
                intensity=intensity,
                size=data.size,
                license=data.license,
            )
            for seed, (split, domain) in enumerate(people, data.first_identity)
            for expression, intensity in faces(self._recipe)
        ]

    def ready(self, request: PortraitRequest) -> bool:
        """See `Generator`."""
        return True

    def make(self, request: PortraitRequest) -> Made:
        """See `Generator`."""
        pixels = draw(request)
        vector = one_hot(request.expression or "neutral", request.intensity)
        return Made(
            data=encode_png(pixels),
            media_type="image/png",
            width=pixels.shape[1],
            height=pixels.shape[0],
            truth=[float(value) for value in vector],
        )


def faces(recipe: Recipe) -> list[tuple[str | None, float]]:
    """Return (expression, intensity) of each picture of a person: neutral first."""
    found: list[tuple[str | None, float]] = [(None, 0.0)]
    found += [(name, level) for name in recipe.conditioning.expressions for level in recipe.data.intensities]
    return found


def draw(request: PortraitRequest) -> np.ndarray:
    """Return the picture of a drawn person, uint8 [size, size, 3].

    Raises:
        ValueError: the request is not for a drawn person.
    """
    if request.seed is None or request.size is None or request.domain not in get_args(Domain):
        raise ValueError(f"{request.identity} is nobody who can be drawn")
    person = identity(request.seed, request.domain)  # type: ignore[arg-type]
    vector = one_hot(request.expression or "neutral", request.intensity)
    return render(person, vector, request.size, pose(request.pose or 0))
