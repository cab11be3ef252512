"""The edits that the suite asks for: made in this process, or in parts that other machines do.

Edits are made only through `serving.engine.EditEngine`, with adapters that passed admission's scan and
licence check in the very process that edits. A part is some people of some editors; it loads the engine once
for its process and leaves one array for each person. Judging is never divided, so a report does not depend on
how the edits were.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from registry.digest import Digest, digest_bytes
from registry.manifest import CARD_NAME, WEIGHTS_NAME, BaseModelRef
from trainer.errors import DataError
from trainer.evaluation.measure import Key
from trainer.evaluation.plan import NEUTRAL, Ask, Plan, plan_of, vector
from trainer.evaluation.sheets import Portrait
from trainer.parts import MOST, Mapper, folder_of, here, in_parts
from trainer.portraits.renderer import render
from trainer.progress import Progress
from trainer.recipe import Recipe
from trainer.stage import stage_key, write_atomically

if TYPE_CHECKING:
    from registry.admission import VerifiedAdapter
    from serving.engine import EditEngine

Candidates = Mapping[str, tuple[Path, Digest]]
"""The folder of "adapter" and, where given, of "raw", with the digests of their weights."""
Unit = tuple[str, int]
"""An editor ("adapter", "base" or "raw") and the index of a person."""
Edits = dict[str, dict[Key, Portrait]]
"""Editor -> person and request -> picture."""


def candidate(folder: Path, *, allow_review: bool = False) -> tuple[VerifiedAdapter, Digest]:
    """The unsigned adapter in a folder, scanned and licence-checked, and the digest of its weights file.

    Production engines refuse it; the digest is the one that a manifest will give the file.

    Args:
        folder: of the adapter.
        allow_review: a scan that asks for a person is no reason to refuse it here.

    Raises:
        DataError: a file is missing.
        RegistryError: refused by the scan or the licence policy.
    """
    from registry.admission import Policy, admit_candidate

    try:
        files = {name: (folder / name).read_bytes() for name in (WEIGHTS_NAME, CARD_NAME)}
    except OSError as error:
        raise DataError(
            f"{folder} is no adapter folder: {error.filename} cannot be read",
            f"give a folder with {WEIGHTS_NAME} and {CARD_NAME}, as training writes it",
        ) from None
    return admit_candidate(files, Policy(allow_review=allow_review)), digest_bytes(files[WEIGHTS_NAME])


def edits(
    recipe: Recipe,
    candidates: Candidates,
    adapters: Mapping[str, VerifiedAdapter],
    base_path: Path,
    out: Path,
    key: Digest,
    mapper: Mapper,
    progress: Progress,
) -> Edits:
    """Everything that the plan asks of the adapter, the base (the adapter at strength 0) and the raw weights.

    Args:
        recipe: its evaluation section decides what is asked.
        candidates: where the adapters lie.
        adapters: the same, admitted.
        base_path: folder of the base model.
        out: folder of the evaluation; parts lie beside it until `trainer.parts.forget`.
        key: of the evaluation.
        mapper: does parts of at least ``running.batch`` pictures; `trainer.parts.here` needs none.
        progress: takes notice of the people, or parts, that are done.
    """
    plan = plan_of(recipe)
    todo = units(plan, raw="raw" in adapters)
    pieces = portions_of(plan, todo, recipe.running.batch)
    if mapper is not here and len(pieces) > 1:
        return _in_parts(recipe, plan, candidates, base_path, out, key, pieces, mapper, progress)
    engine = _engine(recipe.base, base_path)
    found: Edits = {name: {} for name, _ in todo}
    for done, (name, index) in enumerate(todo):
        progress("evaluate", done, len(todo), f"{name}, {plan.subjects[index].name}")
        pictures = _sweep(engine, adapters, plan, (name, index))
        found[name] |= zip(keys_of(plan, (name, index)), pictures, strict=True)
    progress("evaluate", len(todo), len(todo), "edited")
    return found


def units(plan: Plan, *, raw: bool) -> list[Unit]:
    """Every person of every editor."""
    editors = ("adapter", "base", "raw") if raw else ("adapter", "base")
    return [(name, index) for name in editors for index in range(len(plan.subjects))]


def keys_of(plan: Plan, unit: Unit) -> list[Key]:
    """Person and request of each of a unit's pictures, in order."""
    name, index = unit
    return [(index, ask) for ask in (plan.everything(index) if name == "adapter" else plan.full_strength())]


def portions_of(plan: Plan, todo: Sequence[Unit], least: int) -> list[list[Unit]]:
    """Cut units into parts of at least ``least`` pictures, of more where there would be too many parts."""
    counts = [len(keys_of(plan, unit)) for unit in todo]
    size, pieces, pictures = max(least, -(-sum(counts) // MOST)), list[list[Unit]](), 0
    for unit, count in zip(todo, counts, strict=True):
        if not pieces or pictures >= size:
            pieces.append([])
            pictures = 0
        pieces[-1].append(unit)
        pictures += count
    return pieces


def parts_key(key: Digest, batch: int) -> Digest:
    """The key of an evaluation's parts: other sizes are other parts."""
    return stage_key("evaluate parts", key=key, batch=batch)


def _in_parts(
    recipe: Recipe,
    plan: Plan,
    candidates: Candidates,
    base_path: Path,
    out: Path,
    key: Digest,
    pieces: Sequence[Sequence[Unit]],
    mapper: Mapper,
    progress: Progress,
) -> Edits:
    told = recipe.model_dump(mode="json", exclude_unset=True)  # some rules ask whether a field was given
    given = [[name, str(folder.resolve()), str(digest)] for name, (folder, digest) in candidates.items()]
    parts = [
        {"recipe": told, "candidates": given, "base": str(base_path.resolve()), "units": list(piece)}
        for piece in pieces
    ]
    cut = parts_key(key, recipe.running.batch)
    in_parts("evaluate", out, cut, edit_part, parts, mapper, progress)
    folder = folder_of(out, cut)
    found: Edits = {}
    for unit in (unit for piece in pieces for unit in piece):
        pictures = np.load(folder / _file(unit), allow_pickle=False)
        found.setdefault(unit[0], {}).update(zip(keys_of(plan, unit), pictures, strict=True))
    return found


def edit_part(
    folder: Path,
    *,
    recipe: Mapping[str, Any],
    candidates: Sequence[Sequence[str]],
    base: str,
    units: Sequence[Sequence[Any]],
) -> dict[str, Any]:
    """Edit some people into ``folder``, an array uint8 [N, H, W, 3] for each; see `trainer.parts`.

    Raises:
        DataError: an adapter is not the one that the evaluation began with.
        RegistryError: the scan or the licence check refuses it.
    """
    whole = Recipe.model_validate(recipe)
    plan = plan_of(whole)
    engine, adapters = _loaded(
        whole.base, base, tuple((name, place, said) for name, place, said in candidates)
    )
    for name, index in units:
        stream = io.BytesIO()
        np.save(stream, np.stack(_sweep(engine, adapters, plan, (name, index))), allow_pickle=False)
        write_atomically(folder / _file((name, index)), stream.getvalue())
    return {"people": len(units)}


def _file(unit: Unit) -> str:
    return f"{unit[0]}-{unit[1]:05d}.npy"


@lru_cache(maxsize=1)
def _loaded(
    base: BaseModelRef, base_path: str, candidates: tuple[tuple[str, str, str], ...]
) -> tuple[EditEngine, dict[str, VerifiedAdapter]]:
    """The engine and the admitted adapters of a process that does parts."""
    adapters = {}
    for name, folder, said in candidates:
        adapters[name], weights = candidate(Path(folder), allow_review=True)
        if weights != said:
            raise DataError(
                f"the adapter in {folder} is not the one that this evaluation began with",
                "let nothing write there, and run the same command again",
            )
    return _engine(base, Path(base_path)), adapters


def _engine(base: BaseModelRef, folder: Path) -> EditEngine:
    from serving import pipelines, settings
    from serving.engine import EditEngine

    device = settings.load().device
    return EditEngine(pipelines.load(base.family, folder, device=device), base=base, allow_candidates=True)


def _sweep(
    engine: EditEngine, adapters: Mapping[str, VerifiedAdapter], plan: Plan, unit: Unit
) -> list[Portrait]:
    """Edits of one person, in the order of `keys_of`; the picture is encoded once for each full batch."""
    from PIL import Image

    from serving.schema import MAX_SWEEP

    editor, index = unit
    subject = plan.subjects[index]
    source = render(subject.person, vector(NEUTRAL), place=subject.place)
    asks: list[Ask] = [ask for _, ask in keys_of(plan, unit)]
    results = []
    for start in range(0, len(asks), MAX_SWEEP):
        results += engine.sweep(
            Image.fromarray(source),
            adapters["raw" if editor == "raw" else "adapter"],
            [dict(ask) for ask in asks[start : start + MAX_SWEEP]],
            strength=0.0 if editor == "base" else 1.0,
            seed=subject.seed,
            steps=plan.steps,
        )
    return [np.asarray(result.image.convert("RGB"), np.uint8) for result in results]
