"""Pictures of one's own: a folder with ``pairs.jsonl`` becomes a dataset of triplets.

A line of ``pairs.jsonl`` is a JSON object::

    {"split": "train", "identity": "anna", "source": "anna/neutral.png",
     "a": {"image": "anna/fear.png", "expression": "fear", "intensity": 1.0},
     "b": {"image": "anna/surprise.png", "expression": "surprised", "intensity": 0.8}}

Paths are relative to the folder. The licence of the pictures (an SPDX expression) is the line's ``license``,
or else the one line of ``license.txt``, or else the recipe's ``data.license``. A picture that several lines
have is under all of theirs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from registry.digest import Digest, digest_bytes
from registry.manifest import Ingredient, Line
from trainer.data.blobs import media_type
from trainer.data.candidates import Candidates
from trainer.data.choosing import Choice, Wish, choose, facts, write
from trainer.data.dataset import counts
from trainer.data.digests import file_digest, pixel_digest
from trainer.data.likeness import encoder_of, faces
from trainer.data.listing import PAIRS_NAME, Listing, Pair, Problems, read_listed, read_listing
from trainer.data.manifest import FORMAT, Provenance
from trainer.data.measures import look
from trainer.data.measuring import Measures
from trainer.data.provenance import combined, makers
from trainer.data.writing import provenance
from trainer.errors import DataError
from trainer.progress import Progress, silent
from trainer.recipe import Recipe
from trainer.stage import StageResult, making, new_folder, stage_key, write_result

LICENSE_NAME = "license.txt"
_LONGEST_LICENSE = 4096


def folder_key(recipe: Recipe) -> Digest:
    """Return the digest of everything that decides the dataset of a recipe with ``data.source: folder``.

    Every file is read for that and none is decoded.

    Raises:
        DataError: the list is not right, or nobody names a licence.
        BaseModelError: the filters ask for a face encoder that is not on this machine.
    """
    return _asked(recipe).key


def read_folder(
    recipe: Recipe, out: Path, progress: Progress = silent, *, wanted: Digest | None = None
) -> StageResult:
    """Make the dataset of a recipe with ``data.source: folder``; the files stay as they are.

    Filters that need no scores apply here, too: faces, sharpness, edits that changed nothing, and people who
    are there twice.

    Args:
        recipe: gives the folder, the expressions, the filters and the licence.
        out: folder of the dataset.
        progress: is told after every hundred pictures.
        wanted: what `folder_key` said that ``out`` is for; None takes what the folder holds now.

    Raises:
        DataError: the list or a picture is not right, a split is empty, nobody names a licence, or the folder
            is no longer as it was.
        BaseModelError: the filters ask for a face encoder that is not on this machine.
    """
    asked = _asked(recipe)
    listing, encoder = asked.listing, asked.encoder
    if wanted is not None and asked.key != wanted:
        raise _changed(listing.folder)
    with making("triplets", out, asked.key, progress) as done:
        if done:
            return done
        read = _read(asked, progress)
        choice = choose(
            recipe, read.seen, read.wishes, lambda _: read.measures, encoder=encoder, scored=False
        )
        _require_splits(choice, listing)
        with new_folder(out) as new:
            digest = write(
                new, choice, recipe, _rows(read, listing.folder), lambda row: _file(listing, read, row),
                lambda about: _provenance(listing.folder, about, asked.looked_through),
            )  # fmt: skip
            license = combined(asked.licenses.values())
            pictures = len({row for one in choice.kept for row in one.rows})
            told = {**counts(choice.kept), **facts(choice), "pictures": pictures, "license": license}
            result = StageResult(stage="triplets", folder=out, key=asked.key, digest=digest, facts=told)
            write_result(new, result)
        return result


@dataclass(frozen=True, kw_only=True, slots=True)
class _Asked:
    """What decides a dataset, before a picture is decoded.

    Attributes:
        licenses: number of a line -> licence.
        encoder: of faces; None without one.
        looked_through: what the encoder is made of.
        files: name of a picture -> digest of its file.
        key: digest of all of it.
    """

    listing: Listing
    licenses: dict[int, str]
    encoder: str | None
    looked_through: tuple[Ingredient, ...]
    files: dict[str, Digest]
    key: Digest


def _asked(recipe: Recipe) -> _Asked:
    listing = read_listing(Path(recipe.data.path or ""), recipe.conditioning.expressions)
    licenses, encoder = _licenses(listing, recipe), encoder_of(recipe)
    looked_through = () if encoder is None else faces(encoder).ingredients
    files = {name: file_digest(path) for name, path in listing.files.items()}
    key = stage_key(
        "folder",
        format=FORMAT,
        name=listing.folder.name,
        expressions=list(recipe.conditioning.expressions),
        pairs=[pair.model_dump(mode="json") for _, pair in listing.pairs],
        files=files,
        licenses=list(licenses.values()),
        filters=recipe.data.filters.model_dump(mode="json"),
        faces=[one.model_dump(mode="json") for one in looked_through],
    )
    return _Asked(
        listing=listing,
        licenses=licenses,
        encoder=encoder,
        looked_through=looked_through,
        files=files,
        key=key,
    )


def _changed(path: Path) -> DataError:
    return DataError(f"{path} was changed while it was read", "run the same command again")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Read:
    """The pictures of a folder, each once whatever its names, and what is wanted of them.

    Attributes:
        names: a name of each picture.
        licenses: of each.
    """

    seen: Candidates
    measures: Measures
    wishes: list[Wish]
    names: list[str]
    licenses: list[str]


def _licenses(listing: Listing, recipe: Recipe) -> dict[int, str]:
    """Return under which licence the pictures of each line are."""
    default = recipe.data.license if "license" in recipe.data.model_fields_set else None
    path = listing.folder / LICENSE_NAME
    if path.is_file() and not path.is_symlink():
        text = path.read_bytes()[:_LONGEST_LICENSE].decode("utf-8", "replace").strip()
        try:
            default = TypeAdapter(Line).validate_python(text)
        except ValidationError:
            raise DataError(
                f"{path} is not one line with an SPDX expression", "write for example: CC-BY-4.0"
            ) from None
    found = {number: pair.license or default for number, pair in listing.pairs}
    for number, license in found.items():
        if license is None:
            raise DataError(
                f"nobody says under which licence the pictures of line {number} of {PAIRS_NAME} are",
                f"write an SPDX expression into {path}, into the line's license, or into data.license",
            )
    return {number: str(license) for number, license in found.items()}


def _read(asked: _Asked, progress: Progress) -> _Read:
    """Decode and measure every picture once.

    Raises:
        DataError: a picture is not right, or is no longer the one that was asked for, or files with different
            names hold the same where they must not.
    """
    listing, encoder = asked.listing, asked.encoder
    row_of: dict[str, int] = {}  # digest of the pixels -> row
    names: dict[str, int] = {}
    files, looks, sizes, vectors = list[str](), [], list[tuple[int, int]](), list[np.ndarray | None]()
    for name, data, pixels in read_listed(listing):
        if digest_bytes(data) != asked.files[name]:
            raise _changed(listing.files[name])
        row = names[name] = row_of.setdefault(pixel_digest(pixels), len(row_of))
        if row == len(looks):
            files.append(asked.files[name])
            looks.append(look(pixels))
            sizes.append((pixels.shape[0], pixels.shape[1]))
            vectors.append(None if encoder is None else faces(encoder).vector(pixels))
        if len(names) % 100 == 0 or len(names) == len(listing.files):
            progress("triplets", len(names), len(listing.files), "pictures")
    wishes = _wishes(listing, names)
    seen = _candidates(listing, names, files)
    measures = Measures.empty(len(files))
    finds = encoder is not None and faces(encoder).finds
    similarity = [_similarity(vectors[row], vectors[seen.sources[row]], row != seen.sources[row])
                  for row in range(len(files))]  # fmt: skip
    measures.take(
        range(len(files)),
        {"pixels": list(row_of), "sizes": sizes, "sharpness": [one.sharpness for one in looks],
         "pdq": [one.pdq for one in looks], "quality": [one.quality for one in looks],
         "face": [(one is not None) if finds else None for one in vectors], "similarity": similarity},
    )  # fmt: skip
    first = {row: name for name, row in reversed(names.items())}
    return _Read(
        seen=seen,
        measures=measures,
        wishes=wishes,
        names=[first[row] for row in range(len(files))],
        licenses=_licenses_of_pictures(listing, names, asked.licenses),
    )


def _licenses_of_pictures(listing: Listing, names: dict[str, int], licenses: dict[int, str]) -> list[str]:
    """Return under which licence each picture is: all at once that its lines name, under whichever file."""
    found: dict[int, set[str]] = {}
    for number, pair in listing.pairs:
        for name in pair.pictures:
            found.setdefault(names[name], set()).add(licenses[number])
    return [combined(found[row]) for row in range(len(found))]


def _similarity(vector: np.ndarray | None, source: np.ndarray | None, edited: bool) -> float | None:
    return round(float(vector @ source), 4) if edited and vector is not None and source is not None else None


def _wishes(listing: Listing, names: dict[str, int]) -> list[Wish]:
    """Return the triplets that the lines ask for.

    Raises:
        DataError: files with different names hold the same picture where they must not.
    """
    problems = Problems(listing.folder / PAIRS_NAME)
    split_of: dict[int, str] = {}
    wishes = []
    for number, pair in listing.pairs:
        source, a, b = (names[name] for name in pair.pictures)
        sides = ((a, pair.a), (b, pair.b))
        if a == b or any(row == source and side.intensity > 0 for row, side in sides):
            problems.add(number, "two of its pictures are the same, pixel by pixel")
        for name in pair.pictures:
            if split_of.setdefault(names[name], pair.split) != pair.split:
                problems.add(number, f"the picture {name!r} is in both splits")
        wishes.append(
            Wish(source=source, a=a, b=b, expressions=(pair.a.expression, pair.b.expression),
                 intensities=(pair.a.intensity, pair.b.intensity), number=number)
        )  # fmt: skip
    problems.refuse()
    return wishes


def _candidates(listing: Listing, names: dict[str, int], files: list[str]) -> Candidates:
    """Return the pictures as candidates, each with the number of the first line that has it.

    A picture that lines use in several ways is what the first of them says; a neutral one is always neutral.
    """
    count = len(files)
    of_row: dict[int, int] = {}
    uses: dict[int, tuple[Pair, str | None, float, int]] = {}
    for number, pair in listing.pairs:
        source, a, b = (names[name] for name in pair.pictures)
        for row, use in ((a, pair.a), (b, pair.b)):
            uses.setdefault(row, (pair, use.expression, use.intensity, source))
            of_row.setdefault(row, number)
        of_row.setdefault(source, number)
    for _, pair in reversed(listing.pairs):
        source = names[pair.source]
        uses[source] = (pair, None, 0.0, source)
    each = [uses[row] for row in range(count)]
    none = [None] * count
    return Candidates(
        numbers=[of_row[row] for row in range(count)],
        images=files,
        splits=[pair.split for pair, *_ in each],
        identities=[pair.identity for pair, *_ in each],
        domains=none,
        expressions=[expression for _, expression, _, _ in each],
        intensities=np.array([level for _, _, level, _ in each], np.float32),
        sources=np.array([source for *_, source in each], np.int64),
        refused=none,
        status=none,
        reasons=none,
        confidence=np.full(count, np.nan, np.float32),
        scores=np.zeros((count, 0), np.float32),
    )


def _rows(read: _Read, folder: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield row and values of each picture for images.parquet, without what is measured."""
    seen = read.seen
    for row in range(len(seen)):
        yield (
            row,
            {
                "number": seen.numbers[row],
                "split": seen.splits[row],
                "identity": seen.identities[row],
                "expression": seen.expressions[row],
                "intensity": float(seen.intensities[row]),
                "source": f"folder {folder.name}",
                "license": read.licenses[row],
                "origin": read.names[row],
            },
        )


def _file(listing: Listing, read: _Read, row: int) -> tuple[bytes, str]:
    """Return the bytes and the type of a picture, which are those that were measured."""
    path = listing.files[read.names[row]]
    data = path.read_bytes()
    if digest_bytes(data) != read.seen.images[row]:
        raise _changed(path)
    return data, str(media_type(data))


def _provenance(
    folder: Path, about: list[dict[str, Any]], looked_through: tuple[Ingredient, ...]
) -> Provenance:
    return provenance(
        source=f"folder {folder.name}",
        license=combined(str(one["license"]) for one in about),
        scorer="given with the pictures",
        ingredients=(*makers(about), *looked_through),
    )


def _require_splits(choice: Choice, listing: Listing) -> None:
    """Refuse a folder of which a split is empty, and say whether the filters made it so.

    Raises:
        DataError: it is so.
    """
    for split in ("train", "validation"):
        if any(one.split == split for one in choice.kept):
            continue
        if any(pair.split == split for _, pair in listing.pairs):
            reason = next(finding.reason for wish, _, finding in choice.missed
                          if choice.seen.splits[wish.source] == split)  # fmt: skip
            raise DataError(
                f"no triplet for {split} is left; why the first was left out: {reason}",
                "ask for less in data.filters, or look at the pictures",
            )
        raise DataError(
            f"{listing.folder / PAIRS_NAME} has no pairs for {split}",
            f'give the pairs of some people "split": "{split}"',
        )
