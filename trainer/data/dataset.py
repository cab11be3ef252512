"""A dataset of triplets on disk: written once, opened only if everything is as the manifest says.

The folder holds ``manifest.json``, ``images.parquet``, ``triplets.parquet``, ``rejects.parquet`` (what was
left out, and why), the pictures' files in ``blobs/`` (see `trainer.data.blobs`), and ``SHA256SUMS`` of the
first four, for `sha256sum -c`. The sha256 of the manifest is the dataset's version. It names the tables'
rows, which name the pictures; so it names everything, and does not depend on how parquet packs rows.

Pictures stay on disk until they are asked for, and are checked each time.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from registry.digest import Digest, digest_bytes
from registry.manifest import Ingredient
from serving.pipelines.base import Size
from trainer.data import columns
from trainer.data.blobs import Blobs, blob_name
from trainer.data.buckets import fit
from trainer.data.digests import pixel_digest
from trainer.data.manifest import MAX_BYTES, Manifest, parsed
from trainer.data.tables import read_plain, read_table
from trainer.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

MANIFEST_NAME = "manifest.json"
SUMS_NAME = "SHA256SUMS"
BLOBS_NAME = "blobs"
_MEND = "give the folder of a dataset; one that is damaged has to be built again"
_SUM = re.compile(r"([0-9a-f]{64})  ([a-z]+\.(?:json|parquet))", re.ASCII)


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
        digest: sha256 of its manifest: its version.
        manifest: what it says.
        triplets: in the order of the file.
        image_digests: digest of every picture's shape and pixels, whatever file holds them.
        files: digest of every picture's file.
        sizes: height and width of every picture.
    """

    folder: Path
    digest: Digest
    manifest: Manifest
    triplets: tuple[Triplet, ...]
    image_digests: tuple[Digest, ...]
    files: tuple[Digest, ...]
    sizes: tuple[Size, ...]

    @property
    def provenance(self) -> dict[str, Any]:
        """Source, license, scorer and ingredients as plain JSON values."""
        return self.manifest.provenance.model_dump(mode="json")

    @property
    def ingredients(self) -> tuple[Ingredient, ...]:
        """What the adapter's card must name beside the dataset itself."""
        return self.manifest.provenance.ingredients

    @property
    def blobs(self) -> Blobs:
        """The pictures' files."""
        return Blobs(self.folder / BLOBS_NAME)

    def table(self, name: str) -> pa.Table:
        """Return one of `TABLES`, verified again; texts are dictionaries. See `trainer.data.columns`.

        Raises:
            DataError: it is no longer the one of the manifest.
        """
        return _table(self.folder, name, self.manifest)

    def pictures(self, rows: Sequence[int]) -> list[np.ndarray]:
        """Return some pictures, uint8 [H, W, 3] each, decoded from their files.

        Raises:
            DataError: a file is missing or changed, or has other pixels than the dataset says.
        """
        found, blobs = [], self.blobs
        for row in rows:
            pixels = blobs.pixels(self.files[row])
            if pixel_digest(pixels) != self.image_digests[row]:
                raise DataError(
                    f"{blobs.path(self.files[row])} has other pixels than the dataset says", _MEND
                )
            found.append(pixels)
        return found

    def fitted(self, rows: Sequence[int], size: Size) -> np.ndarray:
        """Return some pictures cropped and resized as they are trained at ``size``, uint8 [N, H, W, 3]."""
        from PIL import Image

        return np.stack([np.asarray(fit(Image.fromarray(one), size)) for one in self.pictures(rows)])

    @classmethod
    def open(cls, folder: Path) -> Dataset:
        """Read a dataset and check everything that lies in it against the manifest.

        Raises:
            DataError: a file is missing, is another one, or is there without being named.
        """
        raw = read_plain(folder / MANIFEST_NAME, MAX_BYTES)
        if digest_bytes(raw) != _sum(folder, MANIFEST_NAME):
            raise DataError(f"{folder / MANIFEST_NAME} is not the file that was written", _MEND)
        manifest = parsed(folder / MANIFEST_NAME, raw)
        images, triplets = _table(folder, "images", manifest), _table(folder, "triplets", manifest)
        try:
            files = tuple(map(Digest, images.column("image").to_pylist()))
            pixels = tuple(map(Digest, images.column("pixels").to_pylist()))
            sizes, names = _sizes(images), _names(images, files)
            if len(set(pixels)) < len(pixels) or len(set(files)) < len(files):
                raise ValueError("a picture is there twice")
            found = tuple(_triplets(triplets, len(files)))
            _check_people(found, manifest)
        except (ValueError, KeyError) as error:
            raise DataError(f"the dataset in {folder} is not right: {error}", _MEND) from None
        data = cls(
            folder=folder,
            digest=digest_bytes(raw),
            manifest=manifest,
            triplets=found,
            image_digests=pixels,
            files=files,
            sizes=sizes,
        )
        data.blobs.require(names)
        return data


def counts(triplets: Iterable[Triplet]) -> dict[str, int]:
    """Return how many triplets there are to train on, and for the validation."""
    found = Counter(triplet.split for triplet in triplets)
    return {"triplets": found["train"], "validation": found["validation"]}


def _table(folder: Path, name: str, manifest: Manifest) -> pa.Table:
    """Return a table of a dataset."""
    wanted = {"images": columns.images(manifest.expressions), "triplets": columns.TRIPLETS,
              "rejects": columns.REJECTS}[name]  # fmt: skip
    file = f"{name}.parquet"
    return read_table(folder / file, wanted, manifest.tables[name], _sum(folder, file))  # type: ignore[index]


def _sum(folder: Path, file: str) -> Digest:
    """Return which digest SHA256SUMS names for a file."""
    lines = read_plain(folder / SUMS_NAME, 4096).decode("latin-1").splitlines()
    for match in map(_SUM.fullmatch, lines):
        if match and match[2] == file:
            return Digest(f"sha256:{match[1]}")
    raise DataError(f"{folder / SUMS_NAME} does not name {file}", _MEND)


def _sizes(images: pa.Table) -> tuple[Size, ...]:
    """Return height and width of all pictures.

    Raises:
        ValueError: one is over the limits for pictures.
    """
    from serving.images import MAX_IMAGE_PIXELS, MIN_IMAGE_SIDE

    heights, widths = (images.column(name).to_numpy().astype(np.int64) for name in ("height", "width"))
    if heights.size and (min(heights.min(), widths.min()) < MIN_IMAGE_SIDE
                         or (heights * widths).max() > MAX_IMAGE_PIXELS):  # fmt: skip
        raise ValueError("a picture is over the limits")
    return tuple(zip(heights.tolist(), widths.tolist(), strict=True))


def _names(images: pa.Table, files: Sequence[Digest]) -> dict[str, int]:
    """Return name -> bytes of the pictures' files."""
    kinds, sizes = images.column("media_type").to_pylist(), images.column("bytes").to_pylist()
    return {blob_name(file, kind): size for file, kind, size in zip(files, kinds, sizes, strict=True)}


def _triplets(table: pa.Table, pictures: int) -> Iterable[Triplet]:
    """Yield the triplets of a table.

    Raises:
        ValueError: a row of pictures is none, or a value is out of range.
    """
    values = [table.column(column.name).to_pylist() for column in columns.TRIPLETS]
    for split, identity, source, *members in zip(*values, strict=True):
        a, b = (Member(image=row, expression=name, intensity=level)
                for row, name, level in (members[:3], members[3:]))  # fmt: skip
        one = Triplet(split=split, identity=identity, source=source, a=a, b=b)
        if not all(0 <= row < pictures for row in one.rows):
            raise ValueError(f"a triplet names the pictures {one.rows}; there are {pictures}")
        if not all(0 <= member.intensity <= 1.5 for member in (a, b)):
            raise ValueError("an intensity is not from 0 to 1.5")
        yield one


def _check_people(triplets: Sequence[Triplet], manifest: Manifest) -> None:
    """Refuse a person or a picture in both splits, and splits that are not those of the triplets.

    Raises:
        ValueError: it is so.
    """
    people = {split: {one.identity for one in triplets if one.split == split}
              for split in ("train", "validation")}  # fmt: skip
    rows = [{row for one in triplets if one.split == split for row in one.rows} for split in people]
    if {one.split for one in triplets} - people.keys():
        raise ValueError("a triplet is of no split")
    if any(people[split] != set(found) for split, found in manifest.splits.items()):
        raise ValueError("the people of the splits are not those of the triplets")
    if people["train"] & people["validation"] or rows[0] & rows[1]:
        raise ValueError("a person or a picture is in both splits")
