"""Counting a population: the figures of a folder of clean adapters, for `registry.scanning.population`.

Every adapter is scanned first. One that is blocked is no clean adapter, and one of another base, rank or set
of targets is of another population: both end the count with an explanation, for a population is only as good
as its worst row. That the adapters are clean is the word of whoever trained them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from registry.content import FileContent
from registry.errors import UsageError, shown
from registry.manifest import CARD_NAME, MAX_CARD_BYTES, WEIGHTS_NAME, AdapterCard
from registry.scanning import scan
from registry.scanning.population import Band, Population, recipe_key
from registry.scanning.spectra import short

if TYPE_CHECKING:
    from registry.families import BaseFacts
    from registry.scanning.figures import Spectrum

PERCENTILES = (5.0, 50.0, 95.0)
"""Of the bands of spectra that a report draws."""


def count(
    folder: Path, recipe: str | None = None, bases: Mapping[str, BaseFacts] | None = None
) -> Population:
    """Return the population of the adapter folders in a folder.

    Args:
        folder: holds adapter folders, one level down; they are read in the order of their names.
        recipe: the name of how they were trained; by default that of their targets, which is what a scan
        looks
            for.
        bases: the base models that are known; ``families.KNOWN_BASES`` by default.

    Raises:
        UsageError: there are none, they are not of one kind, or one of them is blocked by the scanner.
        InvalidDocument: a card cannot be read.
    """
    rows: list[Mapping[str, float]] = []
    curves: list[Sequence[Spectrum]] = []
    kind: tuple[str, int, frozenset[str]] | None = None
    for place in _folders(folder):
        card = AdapterCard.parse(_card(place))
        mine = (card.base.id, card.lora.rank, frozenset(card.lora.targets))
        if kind is not None and mine != kind:
            raise UsageError(
                f"{place} is for {shown(mine[0])} with rank {mine[1]} and {len(mine[2])} targets; those "
                f"before it for {shown(kind[0])} with rank {kind[1]} and {len(kind[2])}",
                "count adapters of one base, rank and set of targets at a time",
            )
        kind = mine
        with FileContent(place / WEIGHTS_NAME) as weights:
            report = scan(weights, card, bases=bases)
        if report.verdict == "block" or report.space is None or not report.space.statistics:
            why = f"{report.findings[0].rule} {report.findings[0].title}" if report.findings else "no update"
            raise UsageError(f"{place} is no clean adapter: {why}", "take it out of the folder")
        rows.append(report.space.statistics)
        curves.append(report.space.spectra)
    if kind is None:
        raise UsageError(f"{folder} holds no adapter folder", f"each needs {CARD_NAME} and {WEIGHTS_NAME}")
    return Population.make(
        base=kind[0],
        rank=kind[1],
        recipe=recipe or recipe_key(kind[2]),
        kind="weights",
        rows=rows,
        spectra=_bands(curves),
    )


def _folders(folder: Path) -> Iterator[Path]:
    for place in sorted(folder.iterdir()):
        if (place / CARD_NAME).is_file() and (place / WEIGHTS_NAME).is_file():
            yield place


def _card(place: Path) -> bytes:
    with (place / CARD_NAME).open("rb") as stream:
        return stream.read(MAX_CARD_BYTES + 1)


def _bands(curves: Sequence[Sequence[Spectrum]]) -> dict[str, Band]:
    """Kind of module -> the percentiles of its spectra, where every adapter has one of the same length."""
    by_kind: dict[str, list[tuple[float, ...]]] = {}
    for adapter in curves:
        for spectrum in adapter:
            by_kind.setdefault(spectrum.kind, []).append(spectrum.values)
    bands = {}
    for kind, values in sorted(by_kind.items()):
        if len(values) == len(curves) and len({len(one) for one in values}) == 1:
            low, middle, high = (
                tuple(map(short, curve.tolist())) for curve in np.percentile(values, PERCENTILES, axis=0)
            )
            bands[kind] = Band(low=low, middle=middle, high=high)
    return bands
