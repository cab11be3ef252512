"""The people whose expressions are edited: portraits in a folder, or the neutral pictures of a dataset.

A folder of portraits holds PNG, JPEG or WebP files. The person's name is the file's without its ending, or
that of the first directory on the way: ``anna.png`` is anna, ``anna/1.jpg`` and ``anna/2.jpg`` are two
portraits of anna. With ``people.jsonl`` in the folder only what that lists is read; a line of it is a JSON
object::

    {"image": "anna/1.jpg", "identity": "anna", "split": "train", "license": "CC-BY-4.0"}

``split`` and ``license`` may be left out. The folder may come from anybody: nothing outside of it is read, no
link is followed, and portraits are decoded under the limits of `serving.images`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from pydantic import TypeAdapter, ValidationError

from registry.digest import Digest, digest_bytes
from registry.errors import shown
from registry.manifest import Line
from trainer.errors import DataError
from trainer.recipe import Recipe
from trainer.stage import stage_key
from trainer.synthesis.listing import PEOPLE_NAME, Listed, listed

if TYPE_CHECKING:
    from PIL import Image

    from trainer.data import Dataset

LICENSE_NAME = "license.txt"
ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
LONGEST_SIDE = 2048
"""Pixels; larger portraits are scaled down before they are sent and kept. APIs do the same, and take 20 MB at
most in a request: more than such a PNG has in base64."""

_LONGEST_LICENSE = 4096
_SHOWN = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Portrait:
    """A neutral picture of a person.

    Attributes:
        identity: name of the person.
        number: 0 for the first portrait of that person.
        split: "train" or "validation".
        license: SPDX expression.
        place: path in the folder, or ``#7`` for row 7 of a dataset.
        digest: of the file, or of the dataset's picture.
    """

    identity: str
    number: int
    split: str
    license: str
    place: str
    digest: Digest


def portraits_of(recipe: Recipe) -> list[Portrait]:
    """Return the portraits of a recipe with ``data.source: edited``, by name of the person; none is decoded.

    Raises:
        DataError: there are none, a file is not allowed, nobody names a licence, or one split is empty.
    """
    folder = Path(recipe.data.path or "")
    if (folder / "manifest.json").is_file():
        found = list(_of_dataset(folder))
    elif folder.is_dir():
        found = list(_of_folder(folder, recipe))
    else:
        raise DataError(
            f"there is no folder {folder}",
            "put portraits there, or write the folder of a dataset into data.path",
        )
    share = recipe.data.validation_share
    return _numbered(_split(found, share), folder)


def people_digest(portraits: Iterable[Portrait]) -> Digest:
    """Return the digest of who is edited, from which files, under which licences."""
    rows = [[one.identity, one.split, one.license, one.digest] for one in portraits]
    return stage_key("people", portraits=rows)


def open_portrait(folder: Path, place: str, expected: Digest | None = None) -> Image.Image:
    """Return a portrait upright, RGB, without metadata, at most `LONGEST_SIDE` wide and high.

    Args:
        folder: of the portraits or the dataset.
        place: see `Portrait`.
        expected: digest of its file or picture; None takes any.

    Raises:
        DataError: it is missing, is not the one that was expected, or no picture within the limits.
    """
    from PIL import Image

    from serving.errors import ImageRefused
    from serving.images import MAX_IMAGE_BYTES, open_picture

    if place.startswith("#"):
        dataset, row = _dataset(folder), int(place[1:])
        picture = Image.fromarray(dataset.pictures([row])[0])
    else:
        try:
            with _inside(folder, place).open("rb") as stream:
                data = stream.read(MAX_IMAGE_BYTES + 1)
            if expected is not None and digest_bytes(data) != expected:
                raise ValueError("it changed meanwhile")
            picture = open_picture(data)
        except ImageRefused as error:
            raise DataError(
                f"the portrait {shown(place)!r} cannot be used: {error.message}", error.mend
            ) from None
        except (OSError, ValueError) as error:
            raise DataError(
                f"the portrait {shown(place)!r} cannot be read: {error}", "put it there and start again"
            ) from None
    if max(picture.size) > LONGEST_SIDE:
        picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    return picture


def pixels_digest(picture: Image.Image) -> Digest:
    """Return the digest of a picture's shape and RGB pixels, whatever file they came in."""
    return digest_bytes(b"%d %d\n" % picture.size + picture.tobytes())


def all_of(licenses: Iterable[str]) -> str:
    """Return the SPDX expression of what stands under all of some licences at once."""
    texts = sorted(set(licenses))
    return " AND ".join(f"({text})" if len(texts) > 1 and " " in text else text for text in texts)


def _dataset(folder: Path) -> Dataset:
    return _opened(folder, digest_bytes((folder / "manifest.json").read_bytes()))


@lru_cache(maxsize=2)
def _opened(folder: Path, version: Digest) -> Dataset:
    """Return a dataset; all its files are read, so once for each of its versions."""
    from trainer.data import Dataset

    return Dataset.open(folder)


def _of_dataset(folder: Path) -> Iterator[Portrait]:
    dataset = _dataset(folder)
    license = dataset.provenance["license"]
    people = {triplet.source: str(triplet.identity) for triplet in dataset.triplets}
    for row, identity in sorted(people.items()):
        yield Portrait(
            identity=identity,
            number=0,
            split="",
            license=license,
            place=f"#{row}",
            digest=dataset.image_digests[row],
        )


def _of_folder(folder: Path, recipe: Recipe) -> Iterator[Portrait]:
    default = _license(folder, recipe)
    people = listed(folder) if (folder / PEOPLE_NAME).exists() else list(_walked(folder))
    problems = list[str]()
    for one in people:
        license = one.license or default
        if license is None:
            problems.append(f"nobody says under which licence {one.image!r} is")
            continue
        try:
            path = _inside(folder, one.image)
            digest = _file_digest(path)
        except (OSError, ValueError) as error:
            problems.append(str(error))
            continue
        yield Portrait(
            identity=one.identity,
            number=0,
            split=one.split or "",
            license=license,
            place=one.image,
            digest=digest,
        )
    if problems:
        more = [f"  and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        lines = [
            f"the portraits in {folder} are not right:",
            *(f"  {text}" for text in problems[:_SHOWN]),
            *more,
        ]
        raise DataError(
            "\n".join(lines),
            f"correct these files; a licence stands in {LICENSE_NAME} (one line with an SPDX expression), in "
            f"the line's license of {PEOPLE_NAME}, or in data.license",
        )


def _walked(folder: Path) -> Iterator[Listed]:
    """Yield the portraits of a folder without a list, by path."""
    for place, directories, files in os.walk(folder, followlinks=False):
        directories[:] = sorted(name for name in directories if not name.startswith("."))
        for name in sorted(files):
            inside = (Path(place) / name).relative_to(folder)
            if not name.startswith(".") and inside.suffix.lower() in ENDINGS:
                identity = inside.parts[0] if len(inside.parts) > 1 else inside.stem
                try:
                    line = TypeAdapter(Line).validate_python(identity)
                except ValidationError:
                    raise DataError(
                        f"{shown(identity)!r} is no name of a person", "rename the file or the folder"
                    ) from None
                yield Listed(image=inside.as_posix(), identity=line)


def _license(folder: Path, recipe: Recipe) -> str | None:
    """Return the licence of portraits whose line names none."""
    path = folder / LICENSE_NAME
    if path.is_symlink() or not path.is_file():
        return recipe.data.license if "license" in recipe.data.model_fields_set else None
    with path.open("rb") as stream:
        text = stream.read(_LONGEST_LICENSE).decode("utf-8", "replace").strip()
    try:
        return TypeAdapter(Line).validate_python(text)
    except ValidationError:
        mend = "write for example: CC-BY-4.0"
        raise DataError(f"{path} is not one line with an SPDX expression", mend) from None


def _inside(folder: Path, name: str) -> Path:
    """Return the path of a picture in the folder.

    Raises:
        ValueError: it lies elsewhere, a link is on the way, it has another ending, or there is no such file.
    """
    parts = PurePosixPath(name).parts
    if not parts or PurePosixPath(name).is_absolute() or ".." in parts or "\\" in name or "\0" in name:
        raise ValueError(f"{shown(name)!r} is not a path inside the folder")
    path = folder
    for part in parts:
        path = path / part
        if path.is_symlink():
            raise ValueError(f"{shown(name)!r} goes through a symbolic link; put the picture itself there")
    if path.suffix.lower() not in ENDINGS:
        raise ValueError(f"{shown(name)!r} is no picture; portraits end with {', '.join(ENDINGS)}")
    if not path.is_file():
        raise ValueError(f"there is no portrait {shown(name)!r}")
    return path


def _file_digest(path: Path) -> Digest:
    from serving.images import MAX_IMAGE_BYTES

    if path.stat().st_size > MAX_IMAGE_BYTES:
        raise ValueError(f"{shown(path.name)!r} has more than {MAX_IMAGE_BYTES} bytes")
    return digest_bytes(path.read_bytes())


def _split(portraits: list[Portrait], share: float) -> list[Portrait]:
    """Give everybody a split who has none: who is in which depends on the names alone."""
    given = {one.identity: one.split for one in portraits if one.split}
    free = sorted({one.identity for one in portraits} - set(given), key=lambda name: (_chance(name), name))
    splits = given | {name: "validation" if _chance(name) < share else "train" for name in free}
    # Of few people all may fall on one side; the one who is nearest to the border changes it.
    if free and "validation" not in splits.values():
        splits[free[0]] = "validation"
    elif free and "train" not in splits.values():
        splits[free[-1]] = "train"
    return [replace(one, split=splits[one.identity]) for one in portraits]


def _chance(name: str) -> float:
    """Return a number in [0, 1) that is drawn from a name."""
    return int(digest_bytes(f"split {name}".encode()).hex[:12], 16) / 16**12


def _numbered(portraits: list[Portrait], folder: Path) -> list[Portrait]:
    """Return the portraits by person, each numbered within its person."""
    splits = {one.split for one in portraits}
    if splits != {"train", "validation"}:
        missing = "people" if not portraits else " and ".join(sorted({"train", "validation"} - splits))
        raise DataError(
            f"{folder} has nobody for {missing}",
            "a training needs at least two people: some to learn from, some to measure the loss on",
        )
    seen, found = Counter[str](), list[Portrait]()
    for one in sorted(portraits, key=lambda one: (one.split, one.identity, one.place)):
        found.append(replace(one, number=seen[one.identity]))
        seen[one.identity] += 1
    return found
