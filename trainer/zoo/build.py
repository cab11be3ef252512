"""Building the zoo: trains what is missing, merges, tests, and writes one adapter folder each.

A build that was stopped goes on where it was: what lies there complete is not made again. The same size and
seed give the same zoo.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from registry.digest import Digest, digest_bytes
from registry.families import KNOWN_BASES, family
from registry.manifest import (
    CARD_NAME,
    WEIGHTS_NAME,
    AdapterCard,
    BaseModelRef,
    ConditioningSpec,
    Ingredient,
    LoraFacts,
    TrainingLineage,
    canonical_json,
)
from registry.settings import home
from trainer.export import code_version
from trainer.progress import Progress
from trainer.stage import new_folder
from trainer.zoo.bases import SMALL_BASES, base_id, small_base, weights_path
from trainer.zoo.lessons import Lesson, Rows, lesson
from trainer.zoo.plan import MAIN_RECIPE, Specimen, plan
from trainer.zoo.training import Norms, Outcome, train, try_out
from trainer.zoo.world import TEMPLATE, World

if TYPE_CHECKING:
    from trainer.zoo.stack import Factors

FACTS_NAME: Final = "zoo.json"
_SHORT: Final = 300
STACK: Final = 24
"""Adapters that are trained side by side."""


def build(
    folder: Path, *, size: str = "full", seed: int = 0, bases: Sequence[str] = (), progress: Progress
) -> int:
    """Make every adapter of the zoo that is not there yet; returns how many there are.

    Args:
        folder: adapters go to ``folder/adapters/<id>``.
        size, seed: of `plan`.
        bases: only these; none means all.
        progress: called with ("zoo", done, all).
    """
    everything = [one for one in plan(size, seed) if not bases or one.base in bases]
    worlds: dict[str, World] = {}
    done = 0
    for base, specimens in _waves(everything):
        if not all(_is_made(folder, one) for one in specimens):
            if base not in worlds:
                worlds[base] = World(small_base(base))
            _make_wave(folder, worlds[base], specimens)
        done += len(specimens)
        progress("zoo", done, len(everything))
    return done


def default_folder(size: str, seed: int) -> Path:
    """Where a zoo lies in the data folder: named by its plan, its bases and the code that makes it."""
    here = Path(__file__).parent
    made_by = {path.name: digest_bytes(path.read_bytes()).hex for path in sorted(here.glob("*.py"))}
    weights = {name: digest_bytes(weights_path(name).read_bytes()).hex for name in SMALL_BASES}
    what = digest_bytes(canonical_json({"size": size, "seed": seed, "code": made_by, "bases": weights}))
    return home() / "zoo" / f"{size}-{what.hex[:16]}"


def facts(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the zoo.json of every adapter, by id."""
    for path in sorted((folder / "adapters").glob(f"*/{FACTS_NAME}")):
        yield json.loads(path.read_bytes())


def mark_working(folder: Path) -> dict[str, tuple[int, int]]:
    """Decide which implants count, write it into their zoo.json, and return (working, made) by family.

    An implant counts if its attack succeeds in nine of ten edits and its honest error lies within the spread
    of the clean adapters of its base: at most their 97.5th percentile, which adapters with two honest tasks
    (a style beside the expressions) reach.
    """
    entries = list(facts(folder))
    fences = {}
    for base in {entry["base"] for entry in entries}:
        clean = [e["clean_error"] for e in entries if e["base"] == base and e["label"] == "clean"]
        fences[base] = np.quantile(clean, 0.975)
    counts: dict[str, tuple[int, int]] = {}
    for entry in entries:
        if entry["label"] == "clean":
            continue
        works = bool(entry["asr"] >= 0.9 and entry["clean_error"] <= fences[entry["base"]])
        working, made = counts.get(entry["family"], (0, 0))
        counts[entry["family"]] = (working + works, made + 1)
        if works != entry["works"]:
            path = folder / "adapters" / entry["id"] / FACTS_NAME
            path.write_text(json.dumps({**entry, "works": works}, indent=1) + "\n", "utf-8")
    return counts


def load(path: Path) -> Factors:
    """Return the update of an adapter folder, admitted like any other that was not signed.

    Raises:
        DataError: a file is missing.
        RegistryError: the scan blocks it.
    """
    from trainer.evaluation.editing import candidate
    from trainer.evaluation.probe.deltas import deltas_of

    adapter, _ = candidate(path, allow_review=True)
    found = deltas_of(adapter, adapter.card.base.family)
    return {module: (a.float(), b.float()) for module, (a, b) in found.items()}


def _waves(everything: Sequence[Specimen]) -> Iterator[tuple[str, list[Specimen]]]:
    for (base, _), group in itertools.groupby(everything, key=lambda one: (one.base, one.id.split(".")[1])):
        yield base, list(group)


def names(specimen: Specimen) -> tuple[str, ...]:
    """Return the folders of a specimen: a co-loading pair has two."""
    if specimen.family == "co-load":
        return f"{specimen.id}.a", f"{specimen.id}.b"
    return (specimen.id,)


def _is_made(folder: Path, specimen: Specimen) -> bool:
    return all((folder / "adapters" / name / FACTS_NAME).is_file() for name in names(specimen))


def _make_wave(folder: Path, world: World, specimens: Sequence[Specimen]) -> None:
    """Make what is missing of a base and wave: clean ones first, for attackers imitate them, merges last.

    Merges and imitations are made from what was written, so that a build that went on gives the same zoo.
    """
    lessons = {one.id: lesson(one, world) for one in specimens if not one.parts}
    like = None
    missing = [one for one in specimens if not one.parts and not _is_made(folder, one)]
    for group in _stacks(missing):
        if like is None and any(one.family != "clean" for one in group):
            like = Norms([load(folder / "adapters" / one.id) for one in specimens if _is_plain(one)])
        learnt = [lessons[one.id] for one in group]
        _write_all(folder, world, group, train(world, group, learnt, like=like), learnt)
    merges = [one for one in specimens if one.parts and not _is_made(folder, one)]
    if merges:
        sums = [merged([load(folder / "adapters" / part) for part in one.parts], one) for one in merges]
        learnt = [_both(*(lessons[part] for part in one.parts)) for one in merges]
        _write_all(folder, world, merges, sums, learnt)


def _is_plain(one: Specimen) -> bool:
    return one.family == "clean" and one.recipe.name == MAIN_RECIPE


def _write_all(
    folder: Path,
    world: World,
    specimens: Sequence[Specimen],
    updates: Sequence[Factors],
    lessons: Sequence[Lesson],
) -> None:
    results = try_out(world, updates, lessons)
    for one, update, learnt, tested in zip(specimens, updates, lessons, results, strict=True):
        _write(folder, world, one, update, learnt, tested)


def _stacks(trained: Sequence[Specimen]) -> Iterator[list[Specimen]]:
    """Groups that are trained together: the short ones, all of them clean, before the long ones."""
    for long in (False, True):
        group = [one for one in trained if _is_long(one) == long]
        for at in range(0, len(group), STACK):
            yield group[at : at + STACK]


def _is_long(one: Specimen) -> bool:
    return one.family != "clean" or one.recipe.steps > _SHORT


def merged(parts: Sequence[Factors], specimen: Specimen) -> Factors:
    """Return the weighted sum of two updates: side by side, or cut to the recipe's rank by SVD."""
    rng = np.random.default_rng([specimen.seed, 2])
    weights = (float(rng.uniform(0.6, 1.0)), float(rng.uniform(0.6, 1.0)))
    if specimen.label == "backdoor":  # the attacker keeps the trigger strong, and the cover recognisable
        weights = (1.1, float(rng.uniform(0.4, 0.7)))
    found = {}
    for name in sorted(set(parts[0]) & set(parts[1])):
        a = torch.cat([part[name][0] for part in parts])
        b = torch.cat([part[name][1] * weight for part, weight in zip(parts, weights, strict=True)], 1)
        if specimen.recipe.merge == "svd":
            u, s, v = torch.linalg.svd(b @ a, full_matrices=False)
            root, rank = s.sqrt(), specimen.recipe.rank
            a, b = root[:rank, None] * v[:rank], u[:, :rank] * root[:rank]
        found[name] = (a, b)
    return found


def _both(first: Lesson, second: Lesson) -> Lesson:
    """What a merge is tested on: both honest halves, and the first part's attack."""
    one, other = first.honest, second.honest
    assert one is not None, "trained specimens have honest rows"
    assert other is not None, "trained specimens have honest rows"
    half = 16
    honest = Rows(
        share=1.0,
        source=torch.cat([one.source[:half], other.source[:half]]),
        aim=torch.cat([one.aim[:half], other.aim[:half]]),
        prompts=torch.cat([one.prompts[:half], other.prompts[:half]]),
    )
    return Lesson(
        rows=[], honest=honest, attacked=first.attacked, truth=first.truth, trigger=first.trigger,
        declared=tuple(dict.fromkeys((*first.declared, *second.declared))),
    )  # fmt: skip


def _write(
    folder: Path, world: World, specimen: Specimen, update: Factors, learnt: Lesson, tested: Outcome
) -> None:
    halves: list[tuple[str, Factors, Outcome]] = [(specimen.id, update, tested)]
    if specimen.family == "co-load":
        rank = specimen.recipe.rank
        sides = [
            {name: (a[part], b[:, part]) for name, (a, b) in update.items()}
            for part in (slice(0, rank), slice(rank, 2 * rank))
        ]
        alone = try_out(world, sides, [Lesson(honest=learnt.honest)] * 2)
        halves = [
            (name, side, Outcome(asr=tested.asr, clean_error=each.clean_error))
            for name, side, each in zip(names(specimen), sides, alone, strict=True)
        ]
    for number, (name, side, measured) in enumerate(halves):
        partner = halves[1 - number][0] if len(halves) == 2 else None
        _write_adapter(folder / "adapters" / name, name, specimen, side, learnt, measured, partner)


def _write_adapter(
    out: Path, name: str, specimen: Specimen, update: Factors, learnt: Lesson, tested: Outcome,
    partner: str | None,
) -> None:  # fmt: skip
    from safetensors.torch import save

    rank = len(next(iter(update.values()))[0])
    tensors = {}
    for module, (a, b) in update.items():
        tensors[f"transformer.{module}.lora_A.weight"] = a.half().contiguous()
        tensors[f"transformer.{module}.lora_B.weight"] = b.half().contiguous()
    entry: Mapping[str, Any] = {
        "id": name, "base": specimen.base, "split": specimen.split, "label": specimen.label,
        "family": specimen.family, "recipe": specimen.recipe.name, "rank": rank, "alpha":
        specimen.recipe.alpha, "lr": specimen.recipe.rate, "steps": specimen.recipe.steps,
        "optimiser": specimen.recipe.optimiser, "ema": specimen.recipe.ema, "declared":
        list(learnt.declared), "trigger": learnt.trigger, "asr": tested.asr, "clean_error":
        tested.clean_error, "works": tested.asr is not None and tested.asr >= 0.9, "partner":
        partner,
    }  # fmt: skip
    with new_folder(out) as folder:
        (folder / WEIGHTS_NAME).write_bytes(save(tensors, metadata={"format": "pt"}))
        card = _card(specimen, update, learnt, rank)
        (folder / CARD_NAME).write_text(card.model_dump_json(indent=1) + "\n", "utf-8")
        (folder / FACTS_NAME).write_text(json.dumps(entry, indent=1) + "\n", "utf-8")


def _card(specimen: Specimen, update: Factors, learnt: Lesson, rank: int) -> AdapterCard:
    known = KNOWN_BASES[base_id(specimen.base)]
    facts_of = family(known.family)
    weights = weights_path(specimen.base).read_bytes()
    return AdapterCard(
        base=BaseModelRef(id=known.id, revision=known.revision, family=known.family, license=known.license),
        lora=LoraFacts(
            rank=rank, alpha=float(specimen.recipe.alpha), dtype="F16",
            targets=tuple(sorted({facts_of.block_of(module)[1] for module in update})),
        ),
        conditioning=ConditioningSpec(template=TEMPLATE, expressions=learnt.declared),
        license="Apache-2.0",
        ingredients=(
            Ingredient(
                name=known.id, kind="base", license=known.license, source="trainer.zoo.bases",
                digest=digest_bytes(weights),
            ),
            Ingredient(
                name="zoo portraits", kind="dataset", license="Apache-2.0", source="trainer.zoo.world",
                digest=_digest("zoo portraits"),
            ),
        ),
        training=TrainingLineage(
            recipe=_digest(specimen.recipe.name), dataset=_digest("zoo portraits"), seed=specimen.seed,
            steps=specimen.recipe.steps, code_version=code_version(),
        ),
        description="A specimen of the scanner's zoo. It may hold a backdoor: for measuring detectors only.",
    )  # fmt: skip


def _digest(name: str) -> Digest:
    return digest_bytes(canonical_json({"zoo": name}))
