"""Pictures of one's own: a folder with ``pairs.jsonl`` becomes a dataset of triplets.

A line of ``pairs.jsonl`` is a JSON object::

    {"split": "train", "identity": "anna", "source": "anna/neutral.png",
     "a": {"image": "anna/fear.png", "expression": "fear", "intensity": 1.0},
     "b": {"image": "anna/surprise.png", "expression": "surprised", "intensity": 0.8}}

Paths are relative to the folder. The licence of the pictures (an SPDX expression) is the line's ``license``,
or else the one line of ``license.txt``, or else the recipe's ``data.license``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from registry.manifest import Line
from trainer.data.dataset import FORMAT, Member, Pictures, Triplet, counts, write_dataset
from trainer.data.listing import PAIRS_NAME, Listing, Problems, open_listed, read_listing
from trainer.data.shards import file_digest
from trainer.errors import DataError
from trainer.progress import Progress, silent
from trainer.recipe import Recipe
from trainer.stage import StageResult, finished, new_folder, stage_key, write_result

LICENSE_NAME = "license.txt"
_LONGEST_LICENSE = 4096


def read_folder(recipe: Recipe, out: Path, progress: Progress = silent) -> StageResult:
    """Make the dataset of a recipe with ``data.source: folder``.

    Args:
        recipe: gives the folder, the expressions and the licence.
        out: folder of the dataset.
        progress: is told after every hundred pictures.

    Raises:
        DataError: the list or a picture is not right, a split is empty, or nobody names a licence.
    """
    folder = Path(recipe.data.path or "")
    listing = read_listing(folder, recipe.conditioning.expressions)
    license = _license(listing, recipe)
    key = stage_key(
        "folder",
        format=FORMAT,
        pairs=[pair.model_dump(mode="json") for _, pair in listing.pairs],
        files={name: file_digest(path) for name, path in listing.files.items()},
        license=license,
    )
    if done := finished(out, key):
        return done
    with new_folder(out) as new:
        pictures = Pictures(new)
        rows: dict[str, int] = {}
        for name, pixels in open_listed(listing):
            rows[name] = pictures.add(pixels)
            if len(rows) % 100 == 0 or len(rows) == len(listing.files):
                progress("triplets", len(rows), len(listing.files), "pictures")
        kept, rejected = _triplets(listing, rows)
        about = {"source": f"folder {folder.name}", "license": license, "scorer": "given with the pictures"}
        digest = write_dataset(new, pictures, kept, rejected, about)
        facts = {
            **counts(kept),
            "rejected": len(rejected),
            "pictures": len(pictures.rows),
            "license": license,
        }
        result = StageResult(stage="triplets", folder=out, key=key, digest=digest, facts=facts)
        write_result(new, result)
    return result


def _license(listing: Listing, recipe: Recipe) -> str:
    """Return under which licence the pictures are: all that the lines name, together."""
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
    found = {pair.license or default for _, pair in listing.pairs}
    if None in found:
        number = next(number for number, pair in listing.pairs if pair.license is None)
        raise DataError(
            f"nobody says under which licence the pictures of line {number} of {PAIRS_NAME} are",
            f"write an SPDX expression into {path}, into the line's license, or into data.license",
        )
    texts = sorted(str(text) for text in found)
    return " AND ".join(f"({text})" if len(texts) > 1 and " " in text else text for text in texts)


def _triplets(listing: Listing, rows: dict[str, int]) -> tuple[list[Triplet], list[dict[str, Any]]]:
    """Return the triplets, and those lines that say again what an earlier one said.

    Raises:
        DataError: files with different names hold the same picture where they must not, or a split is empty.
    """
    problems = Problems(listing.folder / PAIRS_NAME)
    kept: dict[Triplet, int] = {}
    rejected: list[dict[str, Any]] = []
    split_of: dict[int, str] = {}
    for number, pair in listing.pairs:
        a, b = (
            Member(image=rows[side.image], expression=side.expression, intensity=side.intensity)
            for side in (pair.a, pair.b)
        )
        one = Triplet(split=pair.split, identity=pair.identity, source=rows[pair.source], a=a, b=b)
        if a.image == b.image or any(m.image == one.source and m.intensity > 0 for m in (a, b)):
            problems.add(number, "two of its pictures are the same, pixel by pixel")
        for name in pair.pictures:
            if split_of.setdefault(rows[name], pair.split) != pair.split:
                problems.add(number, f"the picture {name!r} is in both splits")
        if one in kept:
            rejected.append({"line": number, "reason": f"line {kept[one]} says the same"})
        kept.setdefault(one, number)
    problems.refuse()
    for split in ("train", "validation"):
        if not any(one.split == split for one in kept):
            raise DataError(
                f"{listing.folder / PAIRS_NAME} has no pairs for {split}",
                f'give the pairs of some people "split": "{split}"',
            )
    return list(kept), rejected
