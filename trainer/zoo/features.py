"""What the scanner measures on every adapter of a zoo: the input of its benchmark and of its populations.

``features.jsonl`` has one line an adapter. Co-loading pairs are probed together, and so are some pairs of
clean adapters, for without those nobody knows what an honest pair looks like.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from registry.families import KNOWN_BASES, family
from registry.formats import read_header
from registry.manifest import CARD_NAME, WEIGHTS_NAME, AdapterCard
from registry.scanning.population import Population, recipe_key
from registry.scanning.spectra import statistics
from registry.scanning.structure import check
from trainer.evaluation.probe import Probe, ProbeSettings
from trainer.evaluation.probe.portraits import probe_portraits
from trainer.portraits.expressions import EXPRESSIONS
from trainer.progress import Progress
from trainer.zoo.bases import small_base
from trainer.zoo.build import facts, load, mark_working

FEATURES_NAME: Final = "features.jsonl"
_TOP: Final = 10
_ENOUGH: Final = 99
_ANY_RANK: Final = 8


def measure(folder: Path, *, bases: Sequence[str] = (), progress: Progress) -> int:
    """Measure every clean adapter and working implant that has no line yet; returns how many have one.

    The line of a co-loading pair is that of its first half.

    Args:
        folder: of a zoo.
        bases: only these, so that several processes share the work; none means all.
        progress: called with ("features", done, all).
    """
    mark_working(folder)
    entries = {e["id"]: e for e in facts(folder) if _counts(e)}
    done = {line["id"] for line in features(folder)} & entries.keys()
    left = [e for name, e in entries.items() if name not in done and (not bases or e["base"] in bases)]
    left.sort(key=lambda entry: (entry["base"], entry["id"]))
    probes: dict[str, Probe] = {}
    with (folder / FEATURES_NAME).open("a", encoding="utf-8") as lines:
        for entry in left:
            base = entry["base"]
            if base not in probes:
                probes = {base: probe_of(base)}
            line = _measured(folder, entry, probes[base], _partner(entry, entries))
            lines.write(json.dumps(line) + "\n")
            lines.flush()
            done.add(entry["id"])
            progress("features", len(done), len(entries))
    return len(done)


def _counts(entry: Mapping[str, Any]) -> bool:
    if entry["partner"] is not None and entry["id"] > entry["partner"]:
        return False
    return bool(entry["label"] == "clean" or entry["works"])


def features(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a zoo's features; none if it was not measured."""
    path = folder / FEATURES_NAME
    if path.is_file():
        for line in path.read_text("utf-8").splitlines():
            yield json.loads(line)


def populations(folder: Path) -> Iterator[Population]:
    """Yield the reference populations of a measured zoo, from its clean adapters of both splits.

    Spectra depend on rank and targets, so each of those has its own; how an adapter behaves does not, so that
    a base has one population of behaviour and one of pairs. Groups that are too small to ask for a review at
    1 % are left out. (`tests/bench/detection.py` takes its thresholds from the calibration split alone.)
    """
    lines = {line["id"]: line for line in features(folder)}
    spectra: dict[tuple[str, int, str], list[dict[str, float]]] = {}
    behaviour: dict[tuple[str, str], list[dict[str, float]]] = {}
    for entry in facts(folder):
        line = lines.get(entry["id"])
        if line is None or entry["label"] != "clean":
            continue
        card = AdapterCard.parse((folder / "adapters" / entry["id"] / CARD_NAME).read_bytes())
        key = (card.base.id, card.lora.rank, recipe_key(card.lora.targets))
        spectra.setdefault(key, []).append(line["weights"])
        behaviour.setdefault((card.base.id, "any"), []).append(line["behaviour"])
        if "pair" in line:
            behaviour.setdefault((card.base.id, "pair"), []).append(line["pair"])
    for (base, rank, recipe), rows in sorted(spectra.items()):
        if len(rows) >= _ENOUGH:
            yield Population.make(base=base, rank=rank, recipe=recipe, kind="weights", rows=rows)
    for (base, recipe), rows in sorted(behaviour.items()):
        if len(rows) >= _ENOUGH:
            yield Population.make(base=base, rank=_ANY_RANK, recipe=recipe, kind="behaviour", rows=rows)


def probe_of(base: str) -> Probe:
    """The behavioural probe of a small base; without the inversion, which doubles its cost."""
    settings = ProbeSettings(inversion_steps=0)
    return Probe(
        small_base(base), images=probe_portraits(settings.images), declared=EXPRESSIONS, settings=settings
    )


def _measured(folder: Path, entry: Mapping[str, Any], probe: Probe, partner: str | None) -> dict[str, Any]:
    path = folder / "adapters" / entry["id"]
    weights = (path / WEIGHTS_NAME).read_bytes()
    card = AdapterCard.parse((path / CARD_NAME).read_bytes())
    pairs, _ = check(read_header(weights), card, KNOWN_BASES[card.base.id])
    report = probe.run_deltas(load(path), declared=entry["declared"])
    line = {
        "id": entry["id"],
        "weights": statistics(weights, pairs, family(card.base.family)),
        "behaviour": dict(report.statistics),
        "top_tokens": [[text, score] for text, score in report.tokens[:_TOP]],
    }
    if partner is not None:
        both = probe.run_pair(load(path), load(folder / "adapters" / partner))
        line |= {"pair": dict(both.statistics), "pair_with": partner}
    return line


def _partner(entry: Mapping[str, Any], entries: Mapping[str, Any]) -> str | None:
    """Who an adapter is probed with: its other half; for a clean one, its neighbour."""
    if entry["partner"] is not None:
        return str(entry["partner"])
    name = str(entry["id"])
    if entry["label"] != "clean":
        return None
    neighbours = (f"{name[:-2]}{int(name[-2:]) + 1:02}", f"{name[:-2]}00")
    return next((one for one in neighbours if one in entries and one != name), None)
