"""Triplets from drawn or edited pictures: a neutral one and two of expressions that are easily confused.

Which are kept is a function of the recipe, the pictures and the scores; see `trainer.data.dataset` for what
is written. Pictures are measured in parts that a mapper may share between processes; a build that was killed
goes on with the parts that are missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from trainer.data import measuring
from trainer.data.blobs import Blobs
from trainer.data.candidates import (
    IMAGES_NAME,
    SCORES_NAME,
    Candidates,
    candidates,
    read_images,
    read_scores,
)
from trainer.data.choosing import Wish, choose, facts, require_some, write
from trainer.data.columns import TRUTHS, score_column
from trainer.data.dataset import BLOBS_NAME, Dataset, Member, Triplet, counts
from trainer.data.digests import file_digest
from trainer.data.likeness import encoder_of, faces
from trainer.data.manifest import FORMAT
from trainer.data.provenance import scorers, together
from trainer.parts import Mapper, forget, here, in_parts
from trainer.progress import Progress, silent
from trainer.recipe import Recipe
from trainer.stage import StageResult, making, new_folder, stage_key, write_result

if TYPE_CHECKING:
    import pyarrow as pa

    from registry.digest import Digest
    from registry.manifest import Ingredient

__all__ = ["Dataset", "Member", "Triplet", "build_triplets", "pairs_of"]

_ABOUT: Final = ("image", "media_type", "number", "split", "identity", "domain", "pose", "expression",
                 "intensity", "source", "model", "prompt", "request", "license", "origin")  # fmt: skip
_SCORED: Final = ("confidence", "disagreement", "samples", "scorer")
_GROUP = 1024


def build_triplets(
    recipe: Recipe,
    images: Path,
    scored: Path,
    out: Path,
    progress: Progress = silent,
    *,
    mapper: Mapper = here,
) -> StageResult:
    """Choose the triplets of ``recipe`` from scored pictures.

    Args:
        recipe: gives the expressions, the intensities and the filters.
        images: output of `trainer.synthesis.synthesise`.
        scored: output of `trainer.scoring.score` for these pictures.
        out: folder of the dataset.
        progress: is told about measured pictures, and about the kept and rejected triplets.
        mapper: measures pictures.

    Returns:
        the result; its digest is the dataset's version, ``facts`` has what each filter let through.

    Raises:
        DataError: files are missing, do not belong together, or nothing is left to train on.
        BaseModelError: the filters ask for a face encoder that is not on this machine.
    """
    expressions, encoder = recipe.conditioning.expressions, encoder_of(recipe)
    made = read_images(images)
    judged = read_scores(scored, expressions, made)
    looked_through = () if encoder is None else faces(encoder).ingredients
    key = _key(recipe, images, scored, looked_through)
    with making("triplets", out, key, progress) as done:
        if done:
            return done
        seen = candidates(made, judged, expressions)

        cut = stage_key("triplets parts", key=key, batch=recipe.running.batch)  # other pieces are other parts

        def measure(rows: list[int]) -> measuring.Measures:
            found = measuring.Measures.empty(len(seen))
            asked = measuring.parts(images, seen, rows, encoder, recipe.running.batch)
            _, answers = in_parts("triplets", out, cut, measuring.measure, asked, mapper, progress)
            done = 0
            for part, answer in zip(asked, answers, strict=True):
                found.take(rows[done : done + len(part["pictures"])], answer)
                done += len(part["pictures"])
            return found

        choice = choose(recipe, seen, _wishes(recipe, seen), measure, encoder=encoder)
        require_some(choice)
        with new_folder(out) as folder:
            digest = write(
                folder,
                choice,
                recipe,
                _rows(made, judged, expressions),
                Blobs(images / BLOBS_NAME),
                lambda about: together(recipe, about, scored, looked_through),
            )
            told = {**counts(choice.kept), **facts(choice)}
            result = StageResult(stage="triplets", folder=out, key=key, digest=digest, facts=told)
            write_result(folder, result)
        forget(out, cut)
    total = len(choice.kept) + len(choice.missed)
    progress("triplets", total, total, f"{len(choice.kept)} kept")
    return result


def _key(recipe: Recipe, images: Path, scored: Path, looked_through: Sequence[Ingredient]) -> Digest:
    """Return the digest of all that decides the triplets."""
    return stage_key(
        "triplets",
        format=FORMAT,
        images=file_digest(images / IMAGES_NAME),
        scores=file_digest(scored / SCORES_NAME),
        filters=recipe.data.filters.model_dump(mode="json"),
        ingredients=[one.model_dump(mode="json") for one in (*scorers(scored), *looked_through)],
        expressions=recipe.conditioning.expressions,
        intensities=recipe.data.intensities,
        pairs=pairs_of(recipe),
        pairing=recipe.data.pairing,
        seed=recipe.seed if recipe.data.pairing == "random" else None,
    )


def pairs_of(recipe: Recipe) -> list[tuple[str, str]]:
    """Return the confusing pairs among the recipe's expressions; one without a partner gets its neighbour."""
    from trainer.portraits.expressions import CONFUSING_PAIRS

    names = recipe.conditioning.expressions
    pairs = [(a, b) for a, b in CONFUSING_PAIRS if a in names and b in names]
    covered = {name for pair in pairs for name in pair}
    lonely = [name for name in names if name not in covered]
    if len(names) > 1:
        pairs += [(name, names[(names.index(name) + 1) % len(names)]) for name in lonely]
    return pairs


def _wishes(recipe: Recipe, seen: Candidates) -> Iterator[Wish]:
    """Yield the triplets that could be: of each neutral picture, each pair at each intensity.

    Both members have the very same intensity: the nearest one would teach that a pair differs in strength.
    """
    import numpy as np

    row_of = {
        (int(source), expression, float(level)): row
        for row, (source, expression, level) in enumerate(
            zip(seen.sources, seen.expressions, seen.intensities, strict=True)
        )
        if expression is not None
    }
    for source, expression in enumerate(seen.expressions):
        if expression is not None:
            continue
        levels = recipe.data.intensities
        for pairs in zip(*(_paired(recipe, source, level) for level in levels), strict=True):
            for pair, level in zip(pairs, levels, strict=True):
                a, b = (row_of.get((source, name, float(np.float32(level)))) for name in pair)
                yield Wish(source=source, a=a, b=b, expressions=pair, intensities=(level, level))


def _paired(recipe: Recipe, source: int, level: float) -> list[tuple[str, str]]:
    """Return the pairs of a neutral picture at an intensity; random ones hold each expression once."""
    if recipe.data.pairing == "confusing":
        return pairs_of(recipe)
    import numpy as np

    rng = np.random.default_rng([recipe.seed, source, round(level * 1000)])
    names = [str(name) for name in rng.permutation(recipe.conditioning.expressions)]
    return [(names[at], names[(at + 1) % len(names)]) for at in range(0, len(names), 2)]


def _rows(
    made: pa.Table, judged: pa.Table, expressions: tuple[str, ...]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield row and values of each picture for images.parquet, without what is measured."""
    import pyarrow as pa

    place = {number: row for row, number in enumerate(judged.column("number").to_pylist())}
    scores = judged.select([*_SCORED, *map(score_column, expressions)])
    row = 0
    for batch in made.to_batches(_GROUP):
        wanted = pa.array([place.get(number) for number in batch.column("number").to_pylist()], pa.int64())
        for values, seen in zip(batch.to_pylist(), scores.take(wanted).to_pylist(), strict=True):
            about = {name: values[name] for name in _ABOUT}
            if values["truth"] is not None:
                about |= dict(zip(TRUTHS, values["truth"], strict=True))
            yield row, about | seen
            row += 1
