"""Contact sheets of a dataset: a few people, drawn by lot, in pictures that are small enough for a page.

Which people are shown depends on the dataset's version and a seed alone, so the same dataset gives the same
page. At most `PEOPLE` x (1 + expressions) pictures are opened, one row at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np

from registry.digest import Digest
from trainer.data.blobs import Blobs
from trainer.data.buckets import fit
from trainer.data.dataset import Dataset
from trainer.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

PEOPLE: Final = 6
STRIPS: Final = 6
COLUMNS: Final = 14
SIDE: Final = 112
_NAME = 18  # characters of a name in a sheet


class Lot:
    """The pictures of a dataset by person, expression and intensity, of people in an order drawn by lot."""

    def __init__(self, data: Dataset, seed: int) -> None:
        images = data.table("images")
        self._data = data
        self._names = images.column("identity").to_pylist()
        asked = images.column("expression").to_pylist()
        levels = images.column("intensity").to_pylist()
        people: dict[str, dict[tuple[str | None, float], int]] = {}
        for row, (name, expression, level) in enumerate(zip(self._names, asked, levels, strict=True)):
            people.setdefault(name, {}).setdefault((expression, round(float(level), 4)), row)
        self._people = people
        self._order = sorted(people, key=lambda name: _lot(data.digest, seed, name))

    def people(self) -> Image.Image | None:
        """People down, expressions across, each at the highest intensity there is of it; None if empty."""
        expressions = self._data.manifest.expressions[: COLUMNS - 1]
        rows = []
        for name in self._order[:PEOPLE]:
            faces = self._people[name]
            wanted = [faces.get((None, 0.0))]
            for expression in expressions:
                levels = [level for known, level in faces if known == expression]
                wanted.append(faces[expression, max(levels)] if levels else None)
            rows.append((name, wanted))
        return self._sheet("People", "the highest intensity of each", ["neutral", *expressions], rows)

    def intensities(self) -> Image.Image | None:
        """An expression of a person down, intensities across; None if there is one intensity only."""
        levels = sorted({level for faces in self._people.values() for name, level in faces if name})
        if len(levels) < 2:
            return None
        levels = _spread(levels, COLUMNS - 1)
        expressions, rows = self._data.manifest.expressions, []
        for number, name in enumerate(self._order[:STRIPS]):
            faces = self._people[name]
            shown = [one for one in expressions if any(known == one for known, _ in faces)]
            if shown:
                expression = shown[number % len(shown)]
                cells = [faces.get((None, 0.0)), *(faces.get((expression, level)) for level in levels)]
                rows.append((f"{_short(name)}\n{expression}", cells))
        heads = ["neutral", *(f"{level:g}" for level in levels)]
        return self._sheet("Intensities", "as they were asked for", heads, rows)

    def _sheet(
        self, title: str, lead: str, heads: Sequence[str], rows: Iterable[tuple[str, Sequence[int | None]]]
    ) -> Image.Image | None:
        from trainer.evaluation.sheets import Row, Sheet

        made = [
            Row(label=_label(label), cells=[None if row is None else self._small(row) for row in cells])
            for label, cells in rows
        ]
        if not made:
            return None
        columns = [_short(head) for head in heads]
        return Sheet(title=title, subtitle=lead, columns=columns, rows=made, tile=SIDE).image()

    def _small(self, row: int) -> np.ndarray:
        return small(self._data.pictures([row])[0])


def small(pixels: np.ndarray) -> np.ndarray:
    """Return a picture, uint8 [H, W, 3], as a square of `SIDE`."""
    from PIL import Image

    return np.asarray(fit(Image.fromarray(pixels), (SIDE, SIDE)))


def rejected(folders: Sequence[Blobs], digest: str) -> np.ndarray | None:
    """Return a picture that was left out as a small square, None if it lies in none of the folders."""
    for blobs in folders:
        try:
            return small(blobs.pixels(Digest(digest)))
        except (DataError, ValueError):
            continue
    return None


def _lot(version: Digest, seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{version}/{seed}/{name}".encode()).digest()


def _spread(values: Sequence[float], most: int) -> list[float]:
    """Return at most ``most`` of the values, evenly spread, both ends among them."""
    if len(values) <= most:
        return list(values)
    return [values[round(at)] for at in np.linspace(0, len(values) - 1, most)]


def _short(text: str) -> str:
    """A name as a picture can show it: letters that the font has, and not too many."""
    plain = "".join(sign if " " <= sign <= "~" else "?" for sign in text)
    return plain if len(plain) <= _NAME else f"{plain[: _NAME - 2]}.."


def _label(text: str) -> str:
    return "\n".join(map(_short, text.split("\n", 1)))
