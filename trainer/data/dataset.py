"""A dataset of triplets on disk: written once, opened only if every file is the one of the manifest.

The folder holds shards of the pictures that are used, ``triplets.jsonl``, ``rejects.jsonl`` (what was left
out, and why) and ``manifest.json`` with the sha256 of every file. The digest of the manifest is the digest of
the dataset. Pictures stay on disk until they are asked for.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from registry.digest import Digest, digest_bytes
from registry.manifest import canonical_json
from serving.pipelines.base import Size
from trainer.data.buckets import fit
from trainer.data.shards import ShardWriter, file_digest, flat_shard, pixel_digest, read_lines
from trainer.errors import DataError

MANIFEST_NAME = "manifest.json"
TRIPLETS_NAME = "triplets.jsonl"
REJECTS_NAME = "rejects.jsonl"
FORMAT = 2  # pictures of different sizes
_MEND = "remove the folder and build the dataset again"


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One edited picture of a triplet; ``image`` is its row in the dataset's pictures."""

    image: int
    expression: str
    intensity: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Triplet:
    """A neutral picture (row ``source``) and two edits of it that are easily confused."""

    split: str
    identity: str
    source: int
    a: Member
    b: Member

    @property
    def rows(self) -> tuple[int, int, int]:
        """The rows of its three pictures."""
        return self.source, self.a.image, self.b.image


@dataclass(frozen=True, kw_only=True, slots=True)
class Dataset:
    """A verified dataset; its pictures are on disk.

    Attributes:
        folder: where it lies.
        digest: sha256 of its manifest.
        triplets: in the order of the file.
        image_digests: digest of every picture, in the order of the shards.
        sizes: height and width of every picture.
        places: shard and first byte of every picture.
        provenance: source and licence of the pictures, name of the scorer.
    """

    folder: Path
    digest: Digest
    triplets: tuple[Triplet, ...]
    image_digests: tuple[Digest, ...]
    sizes: tuple[Size, ...]
    places: tuple[tuple[str, int], ...]
    provenance: dict[str, str]

    def pictures(self, rows: Sequence[int]) -> list[np.ndarray]:
        """Return some pictures, uint8 [H, W, 3] each, read from disk.

        Raises:
            DataError: a shard is missing or shorter than it was.
        """
        shards: dict[str, np.ndarray] = {}
        found = []
        for row in rows:
            (name, begin), (height, width) = self.places[row], self.sizes[row]
            if name not in shards:
                shards[name] = flat_shard(self.folder / name)
            pixels = np.array(shards[name][begin : begin + height * width * 3])
            if pixels.size != height * width * 3:
                raise DataError(f"{self.folder / name} is shorter than it was", _MEND)
            found.append(pixels.reshape(height, width, 3))
        return found

    def fitted(self, rows: Sequence[int], size: Size) -> np.ndarray:
        """Return some pictures cropped and resized as they are trained at ``size``, uint8 [N, H, W, 3]."""
        from PIL import Image

        return np.stack([np.asarray(fit(Image.fromarray(one), size)) for one in self.pictures(rows)])

    @classmethod
    def open(cls, folder: Path) -> Dataset:
        """Read a dataset and check every file against the manifest.

        Raises:
            DataError: a file is missing or is not the one of the manifest.
        """
        try:
            raw = (folder / MANIFEST_NAME).read_bytes()
            manifest = json.loads(raw)
            if manifest.get("format") != FORMAT:
                raise DataError(f"the dataset in {folder} was made by another version", _MEND)
            for name, digest in manifest["files"].items():
                if file_digest(folder / name) != digest:
                    raise DataError(f"{folder / name} is not the file that the manifest names", _MEND)
            sizes = tuple((int(height), int(width)) for height, width in manifest["sizes"])
            return cls(
                folder=folder,
                digest=digest_bytes(raw),
                triplets=tuple(_triplet(line) for line in read_lines(folder / TRIPLETS_NAME)),
                image_digests=tuple(Digest(value) for value in manifest["images"]),
                sizes=sizes,
                places=_places(manifest["shards"], sizes),
                provenance=manifest["provenance"],
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"the dataset in {folder} cannot be read: {error}", _MEND) from None


class Pictures:
    """The pictures of a dataset that is being written; equal ones are kept once."""

    def __init__(self, folder: Path) -> None:
        self.writer = ShardWriter(folder)
        self.rows: dict[Digest, int] = {}
        self.sizes: list[Size] = []

    def add(self, pixels: np.ndarray) -> int:
        """Keep a picture, uint8 [H, W, 3], and return its row."""
        digest = pixel_digest(pixels)
        if digest not in self.rows:
            self.rows[digest] = len(self.rows)
            self.sizes.append((pixels.shape[0], pixels.shape[1]))
            self.writer.add(pixels)
        return self.rows[digest]


def write_dataset(
    folder: Path,
    pictures: Pictures,
    kept: Sequence[Triplet],
    rejected: Sequence[Mapping[str, Any]],
    provenance: Mapping[str, str],
) -> Digest:
    """Complete a dataset in the folder of its pictures and return its digest.

    Args:
        folder: where.
        pictures: have the rows of the triplets.
        kept: the triplets.
        rejected: what was left out, one JSON object each.
        provenance: source and licence of the pictures, name of the scorer.
    """
    files = pictures.writer.close()
    for name, values in {TRIPLETS_NAME: map(_line, kept), REJECTS_NAME: iter(rejected)}.items():
        data = b"".join(canonical_json(value) + b"\n" for value in values)
        (folder / name).write_bytes(data)
        files[name] = digest_bytes(data)
    manifest = canonical_json(
        {
            "format": FORMAT,
            "files": files,
            "shards": [[name, count] for name, count in pictures.writer.counts.items()],
            "images": list(pictures.rows),
            "sizes": [list(size) for size in pictures.sizes],
            "provenance": dict(provenance),
            "splits": {
                split: sorted({triplet.identity for triplet in kept if triplet.split == split})
                for split in ("train", "validation")
            },
        }
    )
    (folder / MANIFEST_NAME).write_bytes(manifest)
    return digest_bytes(manifest)


def counts(triplets: Iterable[Triplet]) -> dict[str, int]:
    """Return how many triplets there are to train on, and for the validation."""
    found = Counter(triplet.split for triplet in triplets)
    return {"triplets": found["train"], "validation": found["validation"]}


def _places(shards: Sequence[Sequence[Any]], sizes: Sequence[Size]) -> tuple[tuple[str, int], ...]:
    """Return shard and first byte of every picture."""
    names = [str(name) for name, count in shards for _ in range(count)]
    found, ends = [], dict.fromkeys(names, 0)
    for name, (height, width) in zip(names, sizes, strict=True):
        found.append((name, ends[name]))
        ends[name] += height * width * 3
    return tuple(found)


def _line(triplet: Triplet) -> dict[str, Any]:
    members = {
        name: {"image": member.image, "expression": member.expression, "intensity": member.intensity}
        for name, member in (("a", triplet.a), ("b", triplet.b))
    }
    return {"split": triplet.split, "identity": triplet.identity, "source": triplet.source, **members}


def _triplet(line: dict[str, Any]) -> Triplet:
    members = {name: Member(**line[name]) for name in ("a", "b")}
    return Triplet(split=line["split"], identity=line["identity"], source=line["source"], **members)
