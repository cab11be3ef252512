"""A dataset as WebDataset tars, for trainings elsewhere that stream: one sample is one triplet.

A sample ``0000012`` consists of ``0000012.source.png``, ``0000012.a.png``, ``0000012.b.png`` (as they were
made or delivered, so the ending may be jpg or webp) and ``0000012.json``. All shards of a split are alike;
the samples are in an order that the dataset's version draws, for a reader can shuffle only what it holds. The
same dataset gives the same bytes. ``shards.json`` names each shard with its digest.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Final

import numpy as np

from registry.digest import Digest
from registry.manifest import canonical_json
from trainer.data.blobs import ENDINGS
from trainer.data.columns import score_column
from trainer.data.dataset import Dataset, Member, Triplet
from trainer.data.inspection import numbers
from trainer.errors import DataError
from trainer.progress import Progress, silent
from trainer.stage import new_folder

INDEX_NAME: Final = "shards.json"
_ABOUT: Final = ("license", "origin", "source", "model")


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One tar.

    Attributes:
        name: of the file.
        split: "train" or "validation".
        samples, bytes: how much is in it.
        digest: sha256 of the file.
    """

    name: str
    split: str
    samples: int
    bytes: int
    digest: Digest


def export(
    data: Dataset, out: Path, shard_bytes: int = 256 << 20, progress: Progress = silent
) -> list[Shard]:
    """Write a dataset as shards; one sample is held at a time.

    Args:
        data: an opened dataset.
        out: folder of the shards; it appears when all are written, and replaces an older export.
        shard_bytes: a shard ends with the sample that reaches so many bytes.
        progress: is told about the samples.

    Raises:
        DataError: a picture is not the dataset's any more, or ``out`` holds something else.
    """
    if out.exists() and any(out.iterdir()) and not (out / INDEX_NAME).is_file():
        raise DataError(f"{out} is there and is no export", "give the name of a folder that is not there yet")
    samples, done = _Samples(data), 0
    shards: list[Shard] = []
    with new_folder(out) as folder:
        for split in ("train", "validation"):
            waiting = iter(samples.order(split))
            number = 0
            while (writer := _Writer.first(waiting, samples)) is not None:
                name = f"{split}-{number:06d}.tar"
                with (folder / name).open("wb") as stream:
                    count = writer.fill(stream, shard_bytes)
                path, number, done = folder / name, number + 1, done + count
                shards.append(Shard(name=name, split=split, samples=count, bytes=path.stat().st_size,
                                    digest=writer.digest))  # fmt: skip
                progress("export", done, len(data.triplets), name)
        (folder / INDEX_NAME).write_bytes(_index(data, shards))
    return shards


def _index(data: Dataset, shards: Sequence[Shard]) -> bytes:
    """Return ``shards.json``: what was exported, and every shard with its digest."""
    return canonical_json(
        {
            "format": 1,
            "dataset": str(data.digest),
            "license": data.provenance["license"],
            "expressions": list(data.manifest.expressions),
            "shards": [{**asdict(one), "digest": str(one.digest)} for one in shards],
        }
    )


class _Samples:
    """The samples of a dataset by the number of their triplet."""

    def __init__(self, data: Dataset) -> None:
        images = data.table("images")
        self._data = data
        self._blobs = data.blobs
        self._types = images.column("media_type").to_pylist()
        self._about = {name: images.column(name).to_pylist() for name in _ABOUT}
        self._scores = {
            name: numbers(images, score_column(name)).astype(np.float32) for name in data.manifest.expressions
        }

    def order(self, split: str) -> list[int]:
        """Return the numbers of a split's triplets as the dataset's version draws them."""
        version = self._data.digest.hex
        rows = [row for row, one in enumerate(self._data.triplets) if one.split == split]
        return sorted(rows, key=lambda row: hashlib.sha256(f"{version}/{row}".encode()).digest())

    def files(self, number: int) -> Iterator[tuple[str, bytes]]:
        """Yield name and bytes of the files of a sample, in order of their names."""
        one, key = self._data.triplets[number], f"{number:07d}"
        sides = {"a": one.a.image, "b": one.b.image, "source": one.source}
        files = {f"{key}.json": canonical_json(self._told(number, one))}
        for side, row in sides.items():
            data = self._blobs.read(self._data.files[row])
            files[f"{key}.{side}.{ENDINGS[self._types[row]]}"] = data
        yield from sorted(files.items())

    def _told(self, number: int, one: Triplet) -> dict[str, Any]:
        return {
            "dataset": str(self._data.digest),
            "triplet": number,
            "split": one.split,
            "identity": one.identity,
            "source": self._picture(one.source),
            **{side: self._member(member) for side, member in (("a", one.a), ("b", one.b))},
        }

    def _member(self, member: Member) -> dict[str, Any]:
        asked = {"expression": member.expression, "intensity": member.intensity}
        return {**asked, **self._picture(member.image)}

    def _picture(self, row: int) -> dict[str, Any]:
        """What a sample says about a picture; a float32 is told with the digits that it has."""
        scores = {
            name: None if np.isnan(values[row]) else float(str(values[row]))
            for name, values in self._scores.items()
        }
        about = {name: values[row] for name, values in self._about.items() if values[row] is not None}
        return {"image": str(self._data.files[row]), "scores": scores, **about}


class _Writer:
    """Fills one shard with samples, and hashes it on the way."""

    def __init__(self, first: int, waiting: Iterator[int], samples: _Samples) -> None:
        self._first, self._waiting, self._samples = first, waiting, samples
        self._hash = hashlib.sha256()

    @classmethod
    def first(cls, waiting: Iterator[int], samples: _Samples) -> _Writer | None:
        """Return the writer of a shard that begins with the next sample; None if there is none."""
        number = next(waiting, None)
        return None if number is None else cls(number, waiting, samples)

    @property
    def digest(self) -> Digest:
        """sha256 of what was written."""
        return Digest(f"sha256:{self._hash.hexdigest()}")

    def fill(self, stream: IO[bytes], limit: int) -> int:
        """Write samples until there are ``limit`` bytes or no more samples; return how many."""
        count, number = 0, self._first
        with tarfile.open(
            fileobj=_Hashing(stream, self._hash), mode="w|", format=tarfile.USTAR_FORMAT
        ) as tar:
            while True:
                for name, data in self._samples.files(number):
                    tar.addfile(_entry(name, len(data)), io.BytesIO(data))
                count += 1
                if tar.offset >= limit:
                    return count
                following = next(self._waiting, None)
                if following is None:
                    return count
                number = following


class _Hashing:
    """A stream that hashes what goes through it."""

    def __init__(self, stream: IO[bytes], into: Any) -> None:
        self._stream, self._into = stream, into

    def write(self, data: bytes) -> int:
        self._into.update(data)
        return self._stream.write(data)


def _entry(name: str, size: int) -> tarfile.TarInfo:
    """Nobody's file of no date: nothing of the machine that exports gets into the bytes."""
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode, entry.mtime = size, 0o644, 0
    return entry
