"""The edits that a suite asks for: made in parts, in this process or wherever a mapper does them.

Edits are made only through `serving.engine.EditEngine`, with adapters that passed admission's scan and
licence check in the very process that edits. A part is some people of one editor; it loads the engine once
for its process, keeps each picture under its digest, and leaves a list of who was asked for what.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from registry.digest import Digest, digest_bytes
from registry.manifest import CARD_NAME, WEIGHTS_NAME, AdapterCard, BaseModelRef, ConditioningSpec
from trainer.errors import DataError
from trainer.evaluation.plan import Ask, Plan, Portrait, plan_of
from trainer.parts import MOST, Mapper, in_parts
from trainer.progress import Progress
from trainer.sections import SuiteSection
from trainer.stage import stage_key

if TYPE_CHECKING:
    from registry.admission import VerifiedAdapter
    from serving.engine import EditEngine

Scope = Literal["all", "full strength"]
BLOBS_NAME = "blobs"


@dataclass(frozen=True, kw_only=True, slots=True)
class Editor:
    """An adapter on its base, or the base alone.

    Attributes:
        name: column of the report: "adapter", "raw", "base", "against", or what `trainer compare` calls it.
        folder: of the adapter; the base alone takes its prompts from the adapter's card.
        weights: digest of the adapter's weights file.
        card: what the adapter is.
        strength: 0 is the base alone.
        scope: everything that the plan asks for, or only what is asked at full strength.
        reference: how it is called in the registry; None for a folder.
    """

    name: str
    folder: Path
    weights: Digest
    card: AdapterCard
    strength: float = 1.0
    scope: Scope = "all"
    reference: str | None = None

    @property
    def called(self) -> str:
        """How people call it."""
        return self.reference or self.folder.name

    def asks(self, plan: Plan, index: int) -> tuple[Ask, ...]:
        """What it is asked for on a subject."""
        subject = plan.subjects[index]
        return subject.asks if self.scope == "all" else subject.full_strength


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


def editor(
    name: str, folder: Path, *, strength: float = 1.0, scope: Scope = "all", reference: str | None = None
) -> Editor:
    """The editor of an adapter's folder; the adapter is admitted to know it, and again where it edits.

    Raises:
        DataError: a file is missing.
        RegistryError: refused by the scan or the licence policy. What they want a person to review is
            evaluated: that is what the person will look at.
    """
    adapter, weights = candidate(folder, allow_review=True)
    return Editor(
        name=name, folder=folder, weights=weights, card=adapter.card, strength=strength, scope=scope,
        reference=reference,
    )  # fmt: skip


Edited = dict[tuple[int, Ask], Digest]
"""Subject and request -> the picture's digest in the folder's blobs."""


def edit(
    plan: Plan,
    editor: Editor,
    base: BaseModelRef,
    base_path: Path,
    out: Path,
    key: Digest,
    mapper: Mapper,
    progress: Progress,
    least: int = 256,
) -> tuple[Path, Edited]:
    """Everything that the plan asks of an editor.

    Args:
        plan: who is asked for what.
        editor: who edits.
        base: which base that is.
        base_path: folder of the base model.
        out: folder of the result; parts lie beside it until `trainer.parts.forget`.
        key: of these edits; the parts also depend on ``least``.
        mapper: does the parts.
        progress: takes notice of the parts that are done.
        least: pictures in a part.

    Returns:
        the folder of the pictures, and which picture answers which request.

    Raises:
        BaseModelError: there is no base model.
        ServingError: the adapter does not fit the base.
    """
    told = {
        "suite": plan.suite.model_dump(mode="json"),
        "conditioning": editor.card.conditioning.model_dump(mode="json"),
        "adapter": str(editor.folder.resolve()),
        "weights": str(editor.weights),
        "strength": editor.strength,
        "scope": editor.scope,
        "base": base.model_dump(mode="json"),
        "base_path": str(base_path.resolve()),
    }
    portions = _portions(plan, editor, least)
    cut = stage_key("parts", key=str(key), portions=portions)
    parts = [{**told, "people": people} for people in portions]
    folder, answers = in_parts(f"edit by {editor.name}", out, cut, edit_part, parts, mapper, progress)
    found: Edited = {}
    for answer in answers:
        for index, ask, digest in answer["edits"]:
            found[index, tuple((name, float(x)) for name, x in ask)] = Digest(digest)
    return folder, found


def edit_part(
    folder: Path,
    *,
    suite: Mapping[str, Any],
    conditioning: Mapping[str, Any],
    adapter: str,
    weights: str,
    strength: float,
    scope: Scope,
    base: Mapping[str, Any],
    base_path: str,
    people: Sequence[int],
) -> dict[str, Any]:
    """Edit some people; the pictures go into ``folder/blobs``; see `trainer.parts`.

    Raises:
        DataError: the adapter is not the one that the evaluation began with.
        RegistryError: the scan or the licence check refuses it.
    """
    from trainer.data.blobs import Blobs, encode_png

    plan = _plan(json.dumps(suite, sort_keys=True), json.dumps(conditioning, sort_keys=True))
    engine, verified = _loaded(json.dumps(base, sort_keys=True), base_path, adapter, weights)
    who = Editor(
        name="", folder=Path(adapter), weights=Digest(weights), card=verified.card, strength=strength,
        scope=scope,
    )  # fmt: skip
    blobs, edits = Blobs(folder / BLOBS_NAME), list[list[Any]]()
    for index in people:
        asks = who.asks(plan, index)
        for ask, picture in zip(asks, _sweep(engine, verified, plan, index, asks, strength), strict=True):
            edits.append([index, ask, str(blobs.add(encode_png(picture), "image/png"))])
    return {"edits": edits}


def _portions(plan: Plan, editor: Editor, least: int) -> list[list[int]]:
    """Cut people into parts of at least ``least`` pictures, of more where there would be too many parts."""
    counts = [len(editor.asks(plan, index)) for index in range(len(plan.subjects))]
    size, pieces, pictures = max(least, -(-sum(counts) // MOST)), list[list[int]](), 0
    for index, count in enumerate(counts):
        if not pieces or pictures >= size:
            pieces.append([])
            pictures = 0
        pieces[-1].append(index)
        pictures += count
    return pieces


@lru_cache(maxsize=4)
def _plan(suite: str, conditioning: str) -> Plan:
    spec = ConditioningSpec.model_validate_json(conditioning)
    return plan_of(SuiteSection.model_validate_json(suite), spec)


@lru_cache(maxsize=1)
def _engine(base: str, base_path: str) -> EditEngine:
    from serving import pipelines, settings
    from serving.engine import EditEngine
    from serving.quiet import quiet_libraries

    quiet_libraries()
    known, device = BaseModelRef.model_validate_json(base), settings.load().device
    pipeline = pipelines.load(known.family, Path(base_path), device=device)
    return EditEngine(pipeline, base=known, allow_candidates=True)


@lru_cache(maxsize=4)
def _loaded(base: str, base_path: str, adapter: str, weights: str) -> tuple[EditEngine, VerifiedAdapter]:
    """The engine and an admitted adapter of a process that does parts."""
    verified, found = candidate(Path(adapter), allow_review=True)
    if found != weights:
        raise DataError(
            f"the adapter in {adapter} is not the one that this evaluation began with",
            "let nothing write there, and run the same command again",
        )
    return _engine(base, base_path), verified


def forget_engine() -> None:
    """Let go of the base and the adapters that this process keeps for its next part."""
    _loaded.cache_clear()
    _engine.cache_clear()


def _sweep(
    engine: EditEngine,
    adapter: VerifiedAdapter,
    plan: Plan,
    index: int,
    asks: Sequence[Ask],
    strength: float,
) -> list[Portrait]:
    """Edits of one subject, in the order of the requests; the picture is encoded once for each full batch."""
    from PIL import Image

    from serving.schema import MAX_SWEEP

    source, results = Image.fromarray(plan.pictures.source(index)), []
    for start in range(0, len(asks), MAX_SWEEP):
        results += engine.sweep(
            source,
            adapter,
            [dict(ask) for ask in asks[start : start + MAX_SWEEP]],
            strength=strength,
            seed=plan.subjects[index].seed,
            steps=plan.suite.steps,
        )
    return [np.asarray(result.image.convert("RGB"), np.uint8) for result in results]
