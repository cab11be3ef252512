"""The second stage: what a scorer sees in every picture, and what people decided where it is unsure.

``scores.parquet`` has a row for each number of ``images.parquet`` that has a picture, in that order. Pictures
are scored in parts of ``running.batch``, each file once, and read when their turn comes. ``review.jsonl``
lists the pictures that wait for a person.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from registry.digest import Digest, digest_bytes
from registry.settings import home
from trainer.data.blobs import Blobs
from trainer.errors import DataError
from trainer.parts import Mapper, forget, here, in_parts, portions
from trainer.progress import Progress, silent
from trainer.recipe import Recipe
from trainer.scoring.decisions import Decision, Decisions, digest_of
from trainer.scoring.scorer import Picture, Scorer
from trainer.scoring.table import agreement, digest, joined, pictures_of, table_of
from trainer.sections import ApiSection, ScoringSection
from trainer.stage import StageResult, making, new_folder, stage_key, write_result

FORMAT = 1
SCORES_NAME = "scores.parquet"
REVIEW_NAME = "review.jsonl"


def score(
    recipe: Recipe,
    images: Path,
    out: Path,
    progress: Progress = silent,
    *,
    scorer: Scorer | None = None,
    mapper: Mapper = here,
    data_folder: Path | None = None,
) -> StageResult:
    """Score every picture of the folder ``images`` into ``out/scores.parquet``.

    Columns: number int32, image string, ``score_<expression>`` float32 for each of the recipe's expressions
    (null without a score), confidence and disagreement float32 in 0 to 1, samples int8, status, reason,
    scorer; see `trainer.scoring.scorer.Scored`.

    Args:
        recipe: says who looks and names the expressions.
        images: output of `trainer.synthesis.synthesise`.
        out: folder of the result.
        progress: is told after every part.
        scorer: who looks instead of the recipe's own; it must be picklable if the mapper leaves the process.
        mapper: does the parts.
        data_folder: has the paid answers and people's decisions; None is this machine's.

    Raises:
        DataError: pictures are missing or damaged, or the scorer cannot see the recipe's expressions.
        ApiError: a paid service refuses its key, cannot be reached, or its budget is spent.
    """
    import pyarrow.parquet as pq

    place = data_folder or home()
    judge = scorer or scorer_of(recipe, place)
    pictures = pictures_of(images)
    expressions = recipe.conditioning.expressions
    _can_see(judge, expressions)
    known = {image for _, image in pictures}
    decided = {image: one for image, one in decisions_of(place).read(judge.name).items() if image in known}
    asked = stage_key(
        "score",
        format=FORMAT,
        images=[[number, image] for number, image in pictures],
        scorer=judge.name,
        max_disagreement=recipe.scoring.max_disagreement,
        expressions=expressions,
    )
    named = [judge.ingredient.model_dump(mode="json")] if judge.ingredient else []
    # Other terms make another result, and ask nobody again.
    key = stage_key("score", asked=asked, decisions=digest_of(decided), ingredients=named)
    with making("score", out, key, progress) as done:
        if done:
            return done
        parts = _parts(recipe, images, [image for _, image in pictures], place)
        work = score_part if scorer is None else partial(score_part, scorer=scorer)
        cut = stage_key("score parts", asked=asked, batch=recipe.running.batch)  # other pieces, other parts
        folder, answers = in_parts("score", out, cut, work, parts, mapper, progress)
        with new_folder(out) as new:
            table = joined([folder / f"{answer['name']}.parquet" for answer in answers], pictures, decided)
            pq.write_table(table, new / SCORES_NAME)
            _write_review(new / REVIEW_NAME, folder, answers, decided)
            states = table["status"].to_pylist()
            facts = {
                "images": len(pictures),
                "pictures": str(images.absolute()),
                "scorer": judge.name,
                **{status: states.count(status) for status in ("scored", "review", "quarantined")},
                "decided": len(decided),
                "agreement": agreement(images, table, expressions),
                "ingredients": named,
            }
            result = StageResult(stage="score", folder=out, key=key, digest=digest(table), facts=facts)
            write_result(new, result)
        forget(out, cut)
        return result


def _parts(recipe: Recipe, images: Path, digests: Sequence[str], data_folder: Path) -> list[dict[str, Any]]:
    """Return what `score_part` is given, part by part; a file that is there twice is in one."""
    distinct = list(dict.fromkeys(digests))
    return [
        {
            "recipe": recipe.model_dump(mode="json", exclude_unset=True),
            "blobs": str(images / "blobs"),
            "images": distinct[begin:end],
            "data_folder": str(data_folder),
        }
        for begin, end in portions(len(distinct), recipe.running.batch)
    ]


def inputs(recipe: Recipe, data_folder: Path | None = None) -> dict[str, str]:
    """Return what decides the scores beside the pictures and the recipe: the rubric or the judge's weights,
    and what people decided. It belongs into every key under which scores are kept.
    """
    place = data_folder or home()
    name = scorer_of(recipe, place).name
    return {"scorer": name, "decisions": digest_of(decisions_of(place).read(name))}


def decisions_of(data_folder: Path) -> Decisions:
    """Return the decisions that are kept in a data folder."""
    return Decisions(data_folder / "reviews" / "decisions.jsonl")


def scorer_of(recipe: Recipe, data_folder: Path) -> Scorer:
    """Return who looks for a recipe; the same one in a process, so that its sessions are made once."""
    from trainer.apis import run_of

    return scorer_for(recipe.scoring, recipe.running.api, data_folder, run=run_of(recipe))


def scorer_for(scoring: ScoringSection, api: ApiSection, data_folder: Path, *, run: str) -> Scorer:
    """Return who looks by a scoring section; ``run`` names who pays in the ledger."""
    return _scorer(scoring.model_dump_json(), api.model_dump_json(), str(data_folder), run)


@lru_cache(maxsize=8)
def _scorer(scoring: str, api: str, data_folder: str, run: str) -> Scorer:
    from trainer.scoring.local import LocalScorer

    settings = ScoringSection.model_validate_json(scoring)
    if settings.scorer == "judge":
        return LocalScorer()
    from trainer.apis import Paid
    from trainer.scoring.vlm import Vendor, VlmScorer

    limits = ApiSection.model_validate_json(api)
    vendor: Vendor
    if settings.scorer == "openai":
        from trainer.scoring.openai import OpenAiVendor

        vendor = OpenAiVendor(settings, limits.timeout)
    else:
        from trainer.scoring.gemini import GeminiVendor

        vendor = GeminiVendor(settings, limits.timeout)
    paid = Paid(limits, Path(data_folder) / "apis", run=run)
    return VlmScorer(settings, vendor, paid, limits.parallel)


def score_part(
    folder: Path,
    *,
    recipe: Mapping[str, Any],
    blobs: str,
    images: Sequence[str],
    data_folder: str,
    scorer: Scorer | None = None,
) -> dict[str, Any]:
    """Score some pictures into two files of ``folder``; returns their names and counts."""
    import pyarrow.parquet as pq

    whole = Recipe.model_validate(recipe)
    judge = scorer or scorer_of(whole, Path(data_folder))
    place = Blobs(Path(blobs))
    found = judge([Picture(digest=Digest(image), blobs=place) for image in images])
    table = table_of(images, found, judge, whole.conditioning.expressions)
    unsure = [
        {
            "image": image,
            "scorer": judge.name,
            "reason": one.reason,
            "confidence": one.confidence,
            "disagreement": one.disagreement,
            "expressions": list(judge.expressions),
            "scores": one.scores,
            "samples": one.samples,
        }
        for image, one in zip(images, found, strict=True)
        if one.status == "review"
    ]
    name = digest_bytes("\n".join(images).encode()).hex
    pq.write_table(table, folder / f"{name}.parquet")
    lines = "".join(json.dumps(line, sort_keys=True) + "\n" for line in unsure)
    (folder / f"{name}.jsonl").write_text(lines, "utf-8")
    return {"name": name, "images": len(images), "review": len(unsure)}


def _can_see(judge: Scorer, expressions: Sequence[str]) -> None:
    unknown = [name for name in expressions if name not in judge.expressions]
    if unknown:
        raise DataError(
            f"{judge.name} cannot see {', '.join(unknown)}",
            "choose among its expressions: " + ", ".join(judge.expressions),
        )


def _write_review(
    path: Path, parts: Path, answers: Sequence[Mapping[str, Any]], decided: Mapping[str, Decision]
) -> None:
    """Write the lines of the pictures that still wait for a person."""
    with path.open("wb") as stream:
        for answer in answers:
            for line in (parts / f"{answer['name']}.jsonl").read_bytes().splitlines(keepends=True):
                if json.loads(line)["image"] not in decided:
                    stream.write(line)
