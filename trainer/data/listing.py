"""The list of a folder of pictures, ``pairs.jsonl``: read strictly, and believed in nothing.

The folder may come from anybody: nothing outside of it is read, no link is followed, and pictures are decoded
under the limits of `serving.images`.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from registry.manifest import Line
from trainer.errors import DataError

if TYPE_CHECKING:
    import numpy as np

PAIRS_NAME = "pairs.jsonl"
_MAX_LIST_BYTES = 256 << 20
_MAX_LINE = 16 << 10
_SHOWN = 20


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Side(_Part):
    """One member of a pair: a picture, what it shows, and how strongly."""

    image: Line
    expression: Line
    intensity: Annotated[float, Field(ge=0, le=1.5)]


class Pair(_Part):
    """A line of ``pairs.jsonl``."""

    split: Literal["train", "validation"]
    identity: Line
    source: Line
    a: Side
    b: Side
    license: Line | None = None

    @property
    def pictures(self) -> tuple[str, str, str]:
        """The paths of its three pictures."""
        return self.source, self.a.image, self.b.image


@dataclass(frozen=True, kw_only=True, slots=True)
class Listing:
    """What a folder says that it holds; the pictures have not been opened.

    Attributes:
        folder: with the pictures.
        pairs: (number of the line, pair), in the order of the file.
        files: name of a picture -> its path.
    """

    folder: Path
    pairs: tuple[tuple[int, Pair], ...]
    files: dict[str, Path]


class Problems:
    """What is wrong with a folder, told all at once.

    Args:
        path: its list.
        what: what an entry of the list is called.
        mend: what to do.
    """

    def __init__(
        self,
        path: Path,
        what: str = "line",
        mend: str = "correct these lines; docs/trainer.md describes the format",
    ) -> None:
        self.what = what
        self._path, self._mend, self._found = path, mend, dict[str, int]()

    def add(self, line: int, text: str) -> None:
        """Remember a problem of a line; the same text is told for the first line only."""
        self._found.setdefault(text, line)

    def refuse(self) -> None:
        """Raise `DataError` if there was anything."""
        if self._found:
            shown = [f"  {self.what} {line}: {text}" for text, line in list(self._found.items())[:_SHOWN]]
            more = len(self._found) - len(shown)
            lines = [f"{self._path} is not right:", *shown, *([f"  and {more} more"] if more else [])]
            raise DataError("\n".join(lines), self._mend)


def read_listing(folder: Path, expressions: Sequence[str] | None = None) -> Listing:
    """Read and check the list of a folder without opening the pictures.

    Args:
        folder: with ``pairs.jsonl``.
        expressions: names that may be used; None takes any.

    Raises:
        DataError: there is no list, or something in it is wrong; all that is wrong is told, with the lines.
    """
    path = folder / PAIRS_NAME
    problems, pairs, files = Problems(path), list[tuple[int, Pair]](), dict[str, Path]()
    split_of: dict[str, str] = {}
    for number, text in enumerate(lines_of(path, _MAX_LIST_BYTES), 1):
        try:
            pair = Pair.model_validate(json_object(text))
        except ValidationError as error:
            for explained in _explained(error):
                problems.add(number, explained)
            continue
        except (ValueError, RecursionError) as error:
            problems.add(number, f"this is no JSON object: {str(error)[:120]}")
            continue
        for problem in _wrong(pair, expressions):
            problems.add(number, problem)
        if split_of.setdefault(pair.identity, pair.split) != pair.split:
            problems.add(number, f"{pair.identity!r} is in both splits; a person belongs to one of them")
        for name in pair.pictures:
            try:
                files[name] = files.get(name) or inside(folder, name)
            except ValueError as error:
                problems.add(number, str(error))
        pairs.append((number, pair))
    problems.refuse()
    return Listing(folder=folder, pairs=tuple(pairs), files=files)


def lines_of(path: Path, most: int) -> list[str]:
    """Return the lines of a list of at most that many bytes.

    Raises:
        DataError: it is no plain file, too large, empty, or no UTF-8.
    """
    mend = f"list the pictures in a plain file {path.name}, one JSON object for each entry"
    if path.is_symlink() or not path.is_file():
        raise DataError(f"there is no file {path}", mend)
    if path.stat().st_size > most:
        raise DataError(f"{path} is larger than {most} bytes", mend)
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}", mend) from None
    if not lines:
        raise DataError(f"{path} is empty", mend)
    return lines


def json_object(text: str) -> dict[str, Any]:
    """Return the object of a line.

    Raises:
        ValueError: it is too long, no JSON object, or has a key twice.
    """
    if len(text) > _MAX_LINE:
        raise ValueError(f"the line is longer than {_MAX_LINE} characters")
    value = json.loads(text, object_pairs_hook=once)
    if not isinstance(value, dict):
        raise ValueError("it is something else")
    return value


def once(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON; a hook of `json.loads`.

    Raises:
        ValueError: it has a key twice.
    """
    if len({key for key, _ in items}) != len(items):
        raise ValueError("a key is there twice")
    return dict(items)


def _explained(error: ValidationError) -> Iterator[str]:
    """Yield one text for each mistake, with the nearest right key for an unknown one."""
    for item in error.errors(include_url=False, include_context=False):
        location = tuple(str(part) for part in item["loc"])
        text = item["msg"]
        if item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(
                location[-1], (Side if location[:-1] else Pair).model_fields, n=1
            )
            text = "there is no such key" + (f"; did you mean {near[0]!r}?" if near else "")
        yield f"{'.'.join(location)}: {text}"


def _wrong(pair: Pair, expressions: Sequence[str] | None) -> Iterator[str]:
    """Yield what is wrong with a pair by itself."""
    for side in (pair.a, pair.b):
        if expressions is not None and side.expression not in expressions:
            near = difflib.get_close_matches(side.expression, expressions, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            yield (
                f"the recipe has no expression {side.expression!r}; {hint}its expressions are "
                + ", ".join(expressions)
            )
        if side.image == pair.source and side.intensity > 0:
            yield f"{side.image!r} is the neutral picture and shows {side.expression} at the same time"
    if pair.a.expression == pair.b.expression:
        yield f"both members show {pair.a.expression!r}; a pair needs two expressions"
    if pair.a.image == pair.b.image:
        yield f"both members are the picture {pair.a.image!r}"


def inside(folder: Path, name: str) -> Path:
    """Return the path of a picture in the folder.

    Raises:
        ValueError: it lies elsewhere, a link is on the way, or there is no such file.
    """
    parts = PurePosixPath(name).parts
    if not parts or PurePosixPath(name).is_absolute() or ".." in parts or "\\" in name or "\0" in name:
        raise ValueError(f"{name!r} is not a path inside the folder")
    path = folder
    for part in parts:
        path = path / part
        if path.is_symlink():
            raise ValueError(f"{name!r} goes through a symbolic link; put the picture itself there")
    if not path.is_file():
        raise ValueError(f"there is no picture {name!r}")
    return path


def open_listed(listing: Listing) -> Iterator[tuple[str, np.ndarray]]:
    """Yield name and pixels, uint8 [H, W, 3], of every picture in the order of ``listing.files``.

    Raises:
        DataError: after the last one, if some cannot be read or are over the limits of `serving.images`.
    """
    for name, _, pixels in read_listed(listing):
        yield name, pixels


def read_listed(listing: Listing) -> Iterator[tuple[str, bytes, np.ndarray]]:
    """Yield name, bytes and pixels, uint8 [H, W, 3], of every picture in the order of ``listing.files``.

    Raises:
        DataError: after the last one, if some cannot be read or are over the limits of `serving.images`.
    """
    import numpy as np

    from serving.errors import ImageRefused
    from serving.images import MAX_IMAGE_BYTES, open_picture

    problems = Problems(listing.folder / PAIRS_NAME)
    first = _first_lines(listing)
    for name, path in listing.files.items():
        try:
            with path.open("rb") as stream:
                data = stream.read(MAX_IMAGE_BYTES + 1)
            picture = open_picture(data)
        except (OSError, ImageRefused) as error:
            problems.add(first[name], f"{name!r}: {getattr(error, 'message', None) or error}")
        else:
            yield name, data, np.asarray(picture)
    problems.refuse()


def _first_lines(listing: Listing) -> dict[str, int]:
    """Return name of a picture -> the first line that has it."""
    found: dict[str, int] = {}
    for number, pair in listing.pairs:
        for name in pair.pictures:
            found.setdefault(name, number)
    return found
