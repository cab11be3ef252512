"""The list of a folder of portraits, ``people.jsonl``: read strictly, and believed in nothing."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from registry.errors import shown
from registry.manifest import Line
from trainer.data.listing import json_object
from trainer.errors import DataError

PEOPLE_NAME = "people.jsonl"
_MAX_BYTES = 64 << 20
_SHOWN = 20


class Listed(BaseModel):
    """A line of ``people.jsonl``."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    image: Line
    identity: Line
    split: Literal["train", "validation"] | None = None
    license: Line | None = None


def listed(folder: Path) -> list[Listed]:
    """Read the list of a folder; no picture is opened.

    Raises:
        DataError: it cannot be read, or something in it is wrong; all that is wrong is told, with the lines.
    """
    path, found, problems = folder / PEOPLE_NAME, list[Listed](), list[str]()
    split_of: dict[str, str | None] = {}
    images: dict[str, int] = {}
    for number, text in enumerate(_lines(path), 1):
        try:
            line = Listed.model_validate(json_object(text))
        except ValidationError as error:
            problems += [f"line {number}: {explained}" for explained in _explained(error)]
            continue
        except (ValueError, RecursionError) as error:
            problems.append(f"line {number}: this is no JSON object: {shown(error, 120)}")
            continue
        if images.setdefault(line.image, number) != number:
            problems.append(f"line {number}: {shown(line.image)!r} is in line {images[line.image]} already")
        if split_of.setdefault(line.identity, line.split) != line.split:
            problems.append(f"line {number}: {shown(line.identity)!r} has another split in an earlier line")
        found.append(line)
    if problems:
        more = [f"  and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        lines = [f"{path} is not right:", *(f"  {text}" for text in problems[:_SHOWN]), *more]
        raise DataError(
            "\n".join(lines), "correct these lines; docs/how-to/image-apis.md describes the format"
        )
    return found


def _lines(path: Path) -> list[str]:
    mend = f"list the portraits in a plain file {PEOPLE_NAME}, one JSON object a line"
    if path.is_symlink() or not path.is_file():
        raise DataError(f"{path} is no plain file", mend)
    if path.stat().st_size > _MAX_BYTES:
        raise DataError(f"{path} is larger than {_MAX_BYTES} bytes", mend)
    try:
        lines = path.read_bytes().decode("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {shown(error)}", mend) from None
    if not lines:
        raise DataError(f"{path} is empty", mend)
    return lines


def _explained(error: ValidationError) -> Iterator[str]:
    """Yield one text for each mistake, with the nearest right key for an unknown one."""
    for item in error.errors(include_url=False, include_context=False):
        key, text = ".".join(str(part) for part in item["loc"]), item["msg"]
        if item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, Listed.model_fields, n=1)
            text = "there is no such key" + (f"; did you mean {near[0]!r}?" if near else "")
        yield f"{shown(key)}: {text}"
