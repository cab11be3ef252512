"""The pictures and pairs that are looked at: of a dataset that was built, or of a folder of one's own."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from registry.digest import Digest
from serving.pipelines.base import Size
from trainer.data.dataset import MANIFEST_NAME, Dataset, Member, Triplet
from trainer.data.digests import pixel_digest
from trainer.data.listing import PAIRS_NAME, open_listed, read_listing
from trainer.doctor.hashes import dhash
from trainer.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Material:
    """Pairs, and of each picture what the rules need.

    Attributes:
        triplets: rows are those of the other fields.
        names: what people call a picture.
        digests: of the pixels.
        sizes: height and width.
        hashes: perceptual hash, uint8 [N, 32].
        license: of the pictures, as far as the data say it.
    """

    triplets: tuple[Triplet, ...]
    names: tuple[str, ...]
    digests: tuple[Digest, ...]
    sizes: tuple[Size, ...]
    hashes: np.ndarray
    license: str | None

    @cached_property
    def train(self) -> tuple[Triplet, ...]:
        """The pairs that are trained on."""
        return tuple(one for one in self.triplets if one.split == "train")

    def person(self, row: int) -> str:
        """Return who is in a picture."""
        return self.people[row]

    @cached_property
    def people(self) -> dict[int, str]:
        """Row of a picture -> identity."""
        return {row: one.identity for one in self.triplets for row in one.rows}


def look(folder: Path) -> Material:
    """Return what lies in a folder: a dataset, or pictures with ``pairs.jsonl``.

    Raises:
        DataError: it is neither, or it is damaged or wrong.
    """
    if (folder / MANIFEST_NAME).is_file():
        return _dataset(Dataset.open(folder))
    if (folder / PAIRS_NAME).exists():
        return _listed(folder)
    raise DataError(
        f"{folder} is no dataset (no {MANIFEST_NAME}) and no folder of pictures (no {PAIRS_NAME})",
        "give the dataset folder of a run, a folder of your own pictures, or a recipe",
    )


def _dataset(data: Dataset) -> Material:
    rows = range(len(data.sizes))
    return Material(
        triplets=data.triplets,
        names=tuple(f"picture {row}" for row in rows),
        digests=data.image_digests,
        sizes=data.sizes,
        hashes=np.array([dhash(data.pictures([row])[0]) for row in rows]).reshape(-1, 32),
        license=data.provenance.get("license"),
    )


def _listed(folder: Path) -> Material:
    listing = read_listing(folder)
    place = {name: row for row, name in enumerate(listing.files)}
    digests, sizes, hashes = [], [], []
    for _, pixels in open_listed(listing):
        digests.append(pixel_digest(pixels))
        sizes.append((pixels.shape[0], pixels.shape[1]))
        hashes.append(dhash(pixels))
    triplets = [
        Triplet(
            split=pair.split,
            identity=pair.identity,
            source=place[pair.source],
            a=Member(image=place[pair.a.image], expression=pair.a.expression, intensity=pair.a.intensity),
            b=Member(image=place[pair.b.image], expression=pair.b.expression, intensity=pair.b.intensity),
        )
        for _, pair in listing.pairs
    ]
    return Material(
        triplets=tuple(triplets),
        names=tuple(place),
        digests=tuple(digests),
        sizes=tuple(sizes),
        hashes=np.array(hashes).reshape(-1, 32),
        license=None,
    )
