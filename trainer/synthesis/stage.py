"""The first stage: every person of a recipe, neutral and with each expression at each intensity.

``images.parquet`` has a row for each request in the order of the plan, ``blobs/`` the pictures by digest.
The pictures are made in parts, and each goes to the disk as soon as it is made.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

from registry.digest import Digest
from registry.manifest import canonical_json
from registry.settings import home
from trainer.apis.parallel import in_threads
from trainer.data.blobs import Blobs
from trainer.errors import BudgetSpent
from trainer.parts import Mapper, forget, here, in_parts, portions, processes
from trainer.progress import Progress, silent
from trainer.recipe import Recipe
from trainer.stage import StageResult, making, new_folder, stage_key, write_atomically, write_result
from trainer.synthesis.editing import EditingApi
from trainer.synthesis.renderer import PortraitRenderer
from trainer.synthesis.source import Generator, Made, PortraitRequest
from trainer.synthesis.table import IMAGES_NAME, Table

FORMAT = 2
_WORTH_PROCESSES = 512  # pictures; fewer are drawn before the first process has started


def synthesise(
    recipe: Recipe,
    out: Path,
    progress: Progress = silent,
    *,
    mapper: Mapper | None = None,
    data_folder: Path | None = None,
) -> StageResult:
    """Make every picture of ``recipe``: ``images.parquet`` and ``blobs/`` in ``out``.

    Args:
        recipe: decides the people, expressions and intensities, and who makes the pictures.
        out: folder of the result; kept as it is when it was made from the same inputs.
        progress: is told after every part.
        mapper: does the parts; None takes this machine's cores for many drawn pictures, else this process.
        data_folder: answers of paid APIs and their ledger lie in its ``apis``; None is this machine's.

    Returns:
        the result; its digest names the pictures and all that is recorded of them.

    Raises:
        DataError: the people of the recipe cannot be used.
        BudgetSpent: the recipe's budget does not suffice; what was answered is kept.
        ApiError: see `trainer.apis.Paid.ask`.
    """
    place = data_folder or home()
    source = generator_of(recipe, place, progress)
    key = stage_key("synthesise", format=FORMAT, **source.inputs())
    with making("synthesise", out, key, progress) as done:
        if done:
            return done
        requests = source.plan()
        # What waits for others is slow: in smaller parts one sees how far it is.
        most, at_once = recipe.running.batch, source.parallel
        size = most if at_once == 1 else min(most, 8 * at_once)
        told = recipe.model_dump(mode="json", exclude_unset=True)  # some rules ask whether a field was given
        parts = [
            {
                "recipe": told,
                "data_folder": str(place),
                "begin": begin,
                "requests": [asdict(request) for request in requests[begin:end]],
            }
            for begin, end in portions(len(requests), size)
        ]
        if mapper is None:
            many = recipe.synthesis is None and len(requests) >= _WORTH_PROCESSES
            mapper = processes(min(4, os.cpu_count() or 1)) if many else here
        cut = stage_key("synthesise parts", key=key, size=size)  # other pieces are other parts
        try:
            folder, answers = in_parts("synthesise", out, cut, make_part, parts, mapper, progress)
        except BudgetSpent as error:
            raise _with_the_rest(error, source, requests) from None
        with new_folder(out) as new:
            digest = _put_together(folder, [answer["rows"] for answer in answers], new)
            facts = _facts(source, requests, answers)
            result = StageResult(stage="synthesise", folder=out, key=key, digest=digest, facts=facts)
            write_result(new, result)
        forget(out, cut)
        return result


def inputs(recipe: Recipe, data_folder: Path | None = None) -> dict[str, Any]:
    """Return JSON values that decide the pictures, people in a folder among them; belongs into every key
    under which pictures are kept.

    Raises:
        DataError: the people of the recipe are not there.
    """
    return {"format": FORMAT, **generator_of(recipe, data_folder or home()).inputs()}


def generator_of(recipe: Recipe, data_folder: Path, progress: Progress = silent) -> Generator:
    """Return who makes the pictures of a recipe."""
    return PortraitRenderer(recipe) if recipe.synthesis is None else EditingApi(recipe, data_folder, progress)


def make_part(
    folder: Path,
    *,
    recipe: Mapping[str, Any],
    data_folder: str,
    begin: int,
    requests: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Make some pictures into ``folder`` and return the name of the file with their rows, and counts."""
    whole = Recipe.model_validate(recipe)
    source, blobs = generator_of(whole, Path(data_folder)), Blobs(folder / "blobs")
    wanted = [(begin + number, PortraitRequest(**value)) for number, value in enumerate(requests)]
    rows = in_threads(
        lambda one: _row(one[0], one[1], source, source.make(one[1]), blobs), wanted, source.parallel
    )
    name = f"rows-{begin:08d}.jsonl"
    write_atomically(folder / name, b"".join(canonical_json(row) + b"\n" for row in rows))
    return {"rows": name, "refused": sum(row["refused"] is not None for row in rows)}


def _row(
    number: int, request: PortraitRequest, source: Generator, made: Made, blobs: Blobs
) -> dict[str, Any]:
    """Keep a picture and return its row of images.parquet."""
    kept = made.data is not None and made.media_type is not None
    return {
        "number": number,
        "image": blobs.add(made.data, made.media_type) if made.data and made.media_type else None,
        "media_type": made.media_type if kept else None,
        "width": made.width,
        "height": made.height,
        "split": request.split,
        "identity": request.identity,
        "domain": request.domain,
        "pose": request.pose,
        "expression": request.expression,
        "intensity": request.intensity,
        "truth": made.truth,
        "source": made.source or source.name,
        "model": made.model,
        "prompt": made.prompt,
        "license": request.license,
        "origin": source.origin,
        "request": made.request,
        "refused": made.refused,
    }


def _put_together(parts: Path, names: Sequence[str], new: Path) -> Digest:
    """Write the table and link the pictures of all parts into a folder; return the digest of the rows."""
    blobs, kept, told = Blobs(parts / "blobs"), Blobs(new / "blobs"), sha256()
    with Table(new / IMAGES_NAME) as table:
        for name in names:
            data = (parts / name).read_bytes()
            told.update(data)
            rows = [json.loads(line) for line in data.splitlines()]
            for row in rows:
                if row["image"] is not None:
                    blobs.link(Digest(row["image"]), kept)
            table.write(rows)
    return stage_key("images", rows=told.hexdigest())


def _facts(
    source: Generator, requests: Sequence[PortraitRequest], answers: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    refused = sum(answer["refused"] for answer in answers)
    facts: dict[str, Any] = {
        "images": len(requests) - refused,
        "people": len({(request.domain, request.identity) for request in requests}),
        "source": source.name,
        "license": source.license,
        "origin": source.origin,
    }
    if isinstance(source, EditingApi):
        facts |= {"refused": refused, **source.taken(requests)}
    return facts


def _with_the_rest(error: BudgetSpent, source: Generator, requests: Sequence[PortraitRequest]) -> BudgetSpent:
    """Return the error with what remains to be done."""
    left = sum(not source.ready(request) for request in requests)
    edits = sum(request.expression is not None for request in requests)
    return BudgetSpent(f"{error.message}; {left} of {edits} pictures are still to be asked for", error.mend)
