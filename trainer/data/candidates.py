"""Pictures that may become training data: what the stages before wrote about each, column by column."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from registry.digest import Digest
from trainer.data.columns import score_column
from trainer.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

IMAGES_NAME = "images.parquet"
SCORES_NAME = "scores.parquet"
_IMAGES: Final = ("number", "image", "media_type", "width", "height", "split", "identity", "domain", "pose",
                  "expression", "intensity", "truth", "source", "model", "prompt", "license", "origin",
                  "request", "refused")  # fmt: skip
_SCORES: Final = ("number", "image", "confidence", "disagreement", "samples", "status", "reason", "scorer")


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidates:
    """N pictures in the order in which they were asked for.

    Attributes:
        numbers: of the request, or the line of a list.
        images: digest of the file; None where there is none.
        splits, identities, domains: who is in the picture.
        expressions: None is neutral.
        intensities: float32 [N].
        sources: row of the neutral picture that was edited, the row itself for a neutral one, -1 for none.
        refused: why there is no picture.
        status: "scored", "review", "quarantined", or None where nobody looked.
        reasons: of the status.
        confidence: float32 [N], NaN where nobody looked.
        scores: float32 [N, K] in the order of the recipe's expressions, NaN where nobody looked.
    """

    numbers: Sequence[int]
    images: Sequence[str | None]
    splits: Sequence[str]
    identities: Sequence[str]
    domains: Sequence[str | None]
    expressions: Sequence[str | None]
    intensities: np.ndarray
    sources: np.ndarray
    refused: Sequence[str | None]
    status: Sequence[str | None]
    reasons: Sequence[str | None]
    confidence: np.ndarray
    scores: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def person(self, row: int) -> tuple[str | None, str]:
        """Return who is in a picture: domain and identity."""
        return self.domains[row], self.identities[row]

    def described(self, row: int) -> dict[str, Any]:
        """Return what rejects.parquet says about a picture."""
        return {
            "what": "picture",
            "split": self.splits[row],
            "identity": self.identities[row],
            "number": self.numbers[row],
            "image": self.images[row],
            "expression": self.expressions[row],
            "intensity": float(self.intensities[row]),
        }


def read_images(folder: Path) -> pa.Table:
    """Return the table of an images stage.

    Raises:
        DataError: it is missing, damaged, or lacks a column.
    """
    return _read(folder / IMAGES_NAME, _IMAGES)


def read_scores(folder: Path, expressions: Sequence[str], images: pa.Table) -> pa.Table:
    """Return the table of a scores stage, a row for each picture of ``images``.

    Raises:
        DataError: it is missing, damaged, lacks a column, or belongs to other pictures.
    """
    scores = _read(folder / SCORES_NAME, (*_SCORES, *map(score_column, expressions)))
    numbers = scores.column("number").to_pylist()
    place = {number: row for row, number in enumerate(numbers)}
    wanted = images.column("number").to_pylist()
    files, seen = images.column("image").to_pylist(), scores.column("image").to_pylist()
    if len(place) < len(numbers) or set(numbers) - set(wanted):
        raise DataError(
            f"{len(numbers)} scores do not belong to {len(wanted)} pictures", "score these pictures again"
        )
    for number, file in zip(wanted, files, strict=True):
        if file is not None and (number not in place or seen[place[number]] != file):
            raise DataError(
                f"the scores in {folder} are not those of picture {number}", "score these pictures again"
            )
    return scores


def candidates(images: pa.Table, scores: pa.Table, expressions: Sequence[str]) -> Candidates:
    """Return the pictures of two stages.

    Raises:
        DataError: a person is in both splits, or two pictures answer the same request.
    """
    names = ("number", "image", "split", "identity", "domain", "pose", "expression", "refused")
    told = {name: _values(images.column(name)) for name in names}
    rows = _rows(told["number"], scores.column("number").to_pylist())
    people = list(zip(told["domain"], told["identity"], strict=True))
    _check_splits(people, told["split"])
    return Candidates(
        numbers=told["number"],
        images=told["image"],
        splits=told["split"],
        identities=told["identity"],
        domains=told["domain"],
        expressions=told["expression"],
        intensities=images.column("intensity").to_numpy().astype(np.float32),
        sources=_sources(people, told["pose"], told["expression"]),
        refused=told["refused"],
        status=_spread(_values(scores.column("status")), rows),
        reasons=_spread(_values(scores.column("reason")), rows),
        confidence=_numbers(scores, "confidence", rows),
        scores=np.stack([_numbers(scores, score_column(name), rows) for name in expressions], axis=1),
    )


def _sources(people: Sequence[Any], poses: Sequence[Any], expressions: Sequence[Any]) -> np.ndarray:
    """Return the row of each picture's neutral one, which is of the same person and pose; -1 for none."""
    keys = list(zip(people, poses, strict=True))
    neutral: dict[Any, int] = {}
    for row, (key, expression) in enumerate(zip(keys, expressions, strict=True)):
        if expression is None and neutral.setdefault(key, row) != row:
            raise DataError(
                f"{key[0][1]} has two neutral pictures in one pose (rows {neutral[key]} and {row})",
                "make the pictures again",
            )
    return np.array([neutral.get(key, -1) for key in keys], np.int64)


def _check_splits(people: Sequence[Any], splits: Sequence[str]) -> None:
    """Refuse a person in both splits."""
    split_of: dict[Any, str] = {}
    for person, split in zip(people, splits, strict=True):
        if split not in ("train", "validation"):
            raise DataError(f"{person[1]} is in the split {split!r}", "make the pictures again")
        if split_of.setdefault(person, split) != split:
            raise DataError(
                f"{person[1]!r} is in both splits; a person belongs to one of them", "make the pictures again"
            )


def _rows(numbers: Sequence[int], scored: Sequence[int]) -> list[int | None]:
    """Return which row of the scores belongs to each picture."""
    place = {number: row for row, number in enumerate(scored)}
    return [place.get(number) for number in numbers]


def _values(column: pa.ChunkedArray) -> list[Any]:
    """Return the values of a column; equal texts are one object, for many rows have the same."""
    shared: dict[Any, Any] = {}
    return [shared.setdefault(value, value) for value in column.to_pylist()]


def _spread(values: Sequence[Any], rows: Sequence[int | None]) -> list[Any]:
    return [None if row is None else values[row] for row in rows]


def _numbers(scores: pa.Table, name: str, rows: Sequence[int | None]) -> np.ndarray:
    values = scores.column(name).to_numpy().astype(np.float32)  # a missing one is NaN
    found = np.full(len(rows), np.nan, np.float32)
    there = [place for place, row in enumerate(rows) if row is not None]
    found[there] = values[[row for row in rows if row is not None]]
    return found


def _read(path: Path, names: Sequence[str]) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            texts = [one.name for one in file.schema_arrow if pa.types.is_string(one.type)]
        with pq.ParquetFile(path, read_dictionary=texts) as file:  # prompts and names stand in many rows
            table = file.read(use_threads=False)
        if missing := [name for name in names if name not in table.column_names]:
            raise ValueError(f"it has no column {', '.join(missing)}")
        for digest in table.column("image").unique().to_pylist():
            Digest(digest or f"sha256:{0:064}")
    except (pa.ArrowException, OSError, ValueError, TypeError) as error:
        raise DataError(f"{path} cannot be read: {error}", "run the stage that makes it again") from None
    return table
