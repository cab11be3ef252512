"""The first stage: every person of a recipe, neutral and with each expression at each intensity."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from registry.digest import Digest
from trainer.data.shards import ShardWriter, pixel_digest
from trainer.parts import Mapper, here
from trainer.progress import Progress, silent
from trainer.recipe import Recipe
from trainer.stage import StageResult, finished, new_folder, stage_key, write_result
from trainer.synthesis.renderer import PortraitRenderer
from trainer.synthesis.source import Generator, PortraitRequest

INDEX_NAME = "index.jsonl"


def plan(recipe: Recipe) -> list[tuple[str, PortraitRequest]]:
    """Return (split, request) for every picture of a recipe; the pictures of a person follow each other."""
    data, people = recipe.data, []
    for split, shares in (("train", data.identities), ("validation", data.validation)):
        for domain in sorted(shares):
            people += [(split, domain)] * shares[domain]
    faces: list[tuple[str | None, float]] = [(None, 0.0)]
    faces += [(name, level) for name in recipe.conditioning.expressions for level in data.intensities]
    return [
        (
            split,
            PortraitRequest(
                identity=data.first_identity + number,
                domain=domain,
                pose=data.first_identity + number,
                expression=expression,
                intensity=intensity,
                size=data.size,
            ),
        )
        for number, (split, domain) in enumerate(people)
        for expression, intensity in faces
    ]


def synthesise(
    recipe: Recipe,
    out: Path,
    progress: Progress = silent,
    *,
    generator: Generator | None = None,
    mapper: Mapper = here,
) -> StageResult:
    """Make every picture of ``recipe``: shards of pixels, and ``index.jsonl`` with the provenance.

    Args:
        recipe: decides the people, expressions and intensities.
        out: folder of the result; kept as it is when it was made from the same recipe.
        progress: is told after every shard.
        generator: source of the pictures; the recipe's own when None.
        mapper: does the parts.

    Returns:
        the result; its digest names the pixels and the index.
    """
    source = generator or PortraitRenderer(license=recipe.data.license)
    key = stage_key(
        "synthesise",
        **recipe.section("data"),
        source=source.name,
        expressions=recipe.conditioning.expressions,
    )
    if done := finished(out, key):
        return done
    requests = plan(recipe)
    with new_folder(out) as folder:
        lines = []
        writer = ShardWriter(folder)
        for number, pixels in enumerate(source.generate([request for _, request in requests])):
            split, request = requests[number]
            writer.add(pixels)
            lines.append(json.dumps(_line(split, request, source, pixel_digest(pixels)), sort_keys=True))
            if number % 100 == 99:
                progress("synthesise", number + 1, len(requests), f"{request.domain} {request.identity}")
        files = writer.close()
        (folder / INDEX_NAME).write_text("\n".join(lines) + "\n", "utf-8")
        digest = stage_key("images", shards=files, index=lines)
        result = StageResult(
            stage="synthesise",
            folder=out,
            key=key,
            digest=digest,
            facts={
                "images": len(lines),
                "people": len({(request.domain, request.identity) for _, request in requests}),
                "source": source.name,
                "license": source.license,
                "origin": source.origin,
            },
        )
        write_result(folder, result)
    progress("synthesise", len(requests), len(requests))
    return result


def _line(split: str, request: PortraitRequest, source: Generator, digest: Digest) -> dict[str, Any]:
    return {
        "digest": digest,
        "split": split,
        "identity": request.identity,
        "domain": request.domain,
        "pose": request.pose,
        "expression": request.expression,
        "intensity": request.intensity,
        "truth": source.truth(request),
        "source": source.name,
        "license": source.license,
    }
