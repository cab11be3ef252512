"""Everything that the benchmark says about a zoo, as plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from bench.detecting import judges, rates
from bench.detecting.baselines import NORM
from bench.detecting.judges import Ranking, Scored
from bench.detecting.rates import Cases, Figures
from bench.detecting.specimens import Specimen, Zoo
from registry.scanning.detector import THRESHOLD, judge

PROTOCOLS = {"attack": "leave one attack out", "recipe": "leave one recipe out"}
NAMED = ("rare-token", "alias")
TOP = 5


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The answers of all detectors on a zoo.

    Attributes:
        zoo: what was judged.
        rankings: protocol ("attack", "recipe") -> detector -> its answers.
        rounds: of every bootstrap.
        enough: clean adapters that make a pool of their own.
    """

    zoo: Zoo
    rankings: Mapping[str, Mapping[str, Ranking]]
    rounds: int
    enough: int


def measure(zoo: Zoo, *, enough: int = judges.ENOUGH, rounds: int = rates.ROUNDS) -> Measured:
    """Let every detector judge a zoo under both protocols."""
    rankings: dict[str, dict[str, Ranking]] = {}
    for protocol in PROTOCOLS:
        by_recipe = protocol == "recipe"
        scorers = judges.scorers(zoo, enough)
        if {"weights", "behaviour"} <= scorers.keys():
            scorers["both"] = judges.both(zoo, judges.layers(zoo))
        order = ("weights", "behaviour", "both", "norm dispersion", "total norm")
        found = [
            judges.rank(name, zoo, scorers[name], by_recipe=by_recipe) for name in order if name in scorers
        ]
        found.insert(-2, judges.Supervised(zoo, by_recipe=by_recipe).rank())
        rankings[protocol] = {one.name: one for one in found}
    return Measured(zoo=zoo, rankings=rankings, rounds=rounds, enough=enough)


def cases(zoo: Zoo, ranking: Ranking, by_recipe: bool = False) -> dict[str, tuple[Cases, Cases]]:
    """Attack family -> its cases and the clean ones; families without a score are left out."""
    shared: dict[int, Cases] = {}
    found = {}
    for family, answers in ranking.answers.items():
        implants = _cases([one for one in zoo.implanted(family) if one.id in answers], answers, by_recipe)
        if id(answers) not in shared:
            clean = zoo.clean("test", pairs=family in zoo.paired)
            shared[id(answers)] = _cases([one for one in clean if one.id in answers], answers, by_recipe)
        if len(implants.scores) and len(shared[id(answers)].scores):
            found[family] = (implants, shared[id(answers)])
    return found


def _cases(found: Sequence[Specimen], answers: Mapping[str, Scored], by_recipe: bool = False) -> Cases:
    return Cases(
        scores=np.array([answers[one.id].score for one in found], dtype=float),
        flagged=np.array([answers[one.id].flagged for one in found], dtype=bool),
        strata=tuple(one.base for one in found),
        kin=tuple("+".join(sorted(one.recipes)) if by_recipe else "" for one in found),
    )


def figures(measured: Measured, protocol: str, detector: str, base: str | None = None) -> Figures | None:
    """A detector's figures, on one base or on all; None where there is nothing to measure."""
    found = cases(measured.zoo, measured.rankings[protocol][detector], protocol == "recipe")
    if base is not None:
        clean = {id(pair[1]): pair[1].of(base) for pair in found.values()}
        found = {name: (pair[0].of(base), clean[id(pair[1])]) for name, pair in found.items()}
        found = {name: pair for name, pair in found.items() if len(pair[0].scores) and len(pair[1].scores)}
    found = {name: pair for name, pair in found.items() if rates.comparable(*pair)}
    return rates.figures(found, rounds=measured.rounds) if found else None


def false_positives(measured: Measured, protocol: str, detector: str) -> rates.Interval:
    """Share of clean test adapters above the threshold; of a supervised detector, mean over its models."""
    answers = measured.rankings[protocol][detector].answers
    clean = measured.zoo.clean("test")
    distinct = {id(found): found for family, found in answers.items() if family not in measured.zoo.paired}
    shares = [
        np.mean([found[one.id].flagged for one in clean if one.id in found])
        for found in distinct.values()
        if any(one.id in found for one in clean)
    ]
    if not shares:
        return rates.NOTHING
    return rates.clopper_pearson(round(float(np.mean(shares)) * len(clean)), len(clean))


def deployed(measured: Measured) -> dict[str, Any]:
    """What the scanner itself says: its verdict at p <= 0.01, no pooling of bases, no scaling.

    Weights are compared with clean adapters of the same base, rank and targets, behaviour with those of the
    same base: so the scanner and the probe look their populations up. With fewer than 99 they judge nothing,
    and detect nothing. A pair has a verdict of its own in behaviour; in weight space it has the worse one of
    its halves. Implants are compared with all clean adapters, as populations are shipped; clean test adapters
    with the calibration split alone, for among themselves one in a hundred is far out by construction.
    """
    zoo = measured.zoo
    found = {kind: _verdicts(zoo, kind) for kind in zoo.kinds}
    if len(found) > 1:
        found["either"] = {name: _any([part[name] for part in found.values()]) for name in zoo.specimens}
    return {
        kind: {
            "false_positives": _share(verdicts, zoo.clean("test"), judged=True).to_json(),
            "false_positives_pairs": _share(verdicts, zoo.clean("test", pairs=True), judged=True).to_json(),
            "not_judged": sum(verdicts[one.id] is None for one in zoo.clean("test")),
            "detected": {name: _share(verdicts, zoo.implanted(name)).to_json() for name in zoo.families},
        }
        for kind, verdicts in found.items()
    }


def _verdicts(zoo: Zoo, kind: judges.Kind) -> dict[str, bool | None]:
    """Adapter or pair -> whether the scanner asks for a review; None where it judges nothing."""
    verdicts: dict[str, bool | None] = {}
    for pairs in (False, True):
        calibration = zoo.clean("calibration", pairs=pairs)
        everything = calibration + zoo.clean("test", pairs=pairs)
        for one in zoo.specimens.values():
            if bool(one.members) == pairs and one.members and kind == "weights":
                verdicts[one.id] = _any([verdicts[name] for name in one.members])
            elif bool(one.members) == pairs:
                verdicts[one.id] = _verdict(calibration if one.clean else everything, one, kind)
    return verdicts


def _any(verdicts: Sequence[bool | None]) -> bool | None:
    return None if all(one is None for one in verdicts) else any(verdicts)


def _verdict(group: Sequence[Specimen], one: Specimen, kind: judges.Kind) -> bool | None:
    """Whether the scanner asks for a review of an adapter beside those of a group that it would look up."""
    clean = [
        other.statistics[kind]
        for other in group
        if other.base == one.base
        and other.id != one.id
        and (kind == "behaviour" or (other.rank, other.targets) == (one.rank, one.targets))
    ]
    if not clean:
        return None
    population = judges.Conformal(kind).population(clean)
    verdict = judge(one.statistics[kind], population, threshold=THRESHOLD).verdict
    return None if verdict == "not judged" else verdict == "review"


def _share(
    verdicts: Mapping[str, bool | None], among: Sequence[Specimen], *, judged: bool = False
) -> rates.Interval:
    """Share that asks for a review, of all or of those that were judged."""
    counted = [verdicts[one.id] for one in among if not judged or verdicts[one.id] is not None]
    return rates.clopper_pearson(sum(map(bool, counted)), len(counted))


def norm_of(zoo: Zoo, one: Specimen) -> float:
    """An adapter's total norm; of a pair, of both halves as if they were one."""
    halves = [zoo.specimens[name] for name in one.members] or [one]
    return float(np.sqrt(sum(half.statistics["baselines"][NORM] ** 2 for half in halves)))


def matched(zoo: Zoo, family: str) -> list[tuple[Specimen, Specimen]]:
    """Each implant with a clean test adapter of its base, none twice, so that the norms are nearest.

    Nearest is the smallest sum of |ln norm - ln norm'|, by the assignment algorithm of `scipy.optimize`.
    """
    pairs: list[tuple[Specimen, Specimen]] = []
    for base in zoo.bases:
        bad = [one for one in zoo.implanted(family) if one.base == base]
        clean = [one for one in zoo.clean("test", pairs=family in zoo.paired) if one.base == base]
        if bad and clean:
            sizes = [np.log([max(norm_of(zoo, one), 1e-12) for one in group]) for group in (bad, clean)]
            rows, columns = linear_sum_assignment(np.abs(sizes[0][:, None] - sizes[1][None]))
            pairs += [(bad[i], clean[j]) for i, j in zip(rows, columns, strict=True)]
    return pairs


def matched_norm(measured: Measured) -> dict[str, Any]:
    """AUROCs where every implant meets a clean adapter of its own norm: norm alone is near one half there."""
    zoo = measured.zoo
    couples = {family: matched(zoo, family) for family in zoo.families}
    gaps = [
        abs(np.log(norm_of(zoo, bad) / norm_of(zoo, clean)))
        for found in couples.values()
        for bad, clean in found
    ]
    found: dict[str, Any] = {"median_norm_ratio": round(float(np.exp(np.median(gaps))), 4) if gaps else None}
    for name, ranking in measured.rankings["attack"].items():
        families = {}
        for family, pairs in couples.items():
            answers = ranking.answers[family]
            kept = [(bad, clean) for bad, clean in pairs if bad.id in answers and clean.id in answers]
            if kept:
                sides = [[pair[side] for pair in kept] for side in (0, 1)]
                families[family] = (_cases(sides[0], answers), _cases(sides[1], answers))
        found[name] = rates.figures(families, rounds=measured.rounds).to_json() if families else None
    return found


def matched_length(measured: Measured) -> dict[str, Any] | None:
    """AUROCs against clean test adapters that were trained as long: length alone tells nothing there.

    As long is at least three quarters of the implants' median steps. Pairs are left out. None if the zoo says
    nothing about steps, or has no such clean adapters.
    """
    zoo = measured.zoo
    families = [family for family in zoo.families if family not in zoo.paired]
    implants = [one.facts.get("steps") for family in families for one in zoo.implanted(family)]
    if not implants or None in implants:
        return None
    least = 0.75 * float(np.median(np.array(implants, dtype=float)))
    clean = [one for one in zoo.clean("test") if one.facts["steps"] >= least]
    if not clean:
        return None
    found: dict[str, Any] = {"clean": len(clean), "least_steps": round(least)}
    for name, ranking in measured.rankings["attack"].items():
        pairs = {}
        for family in families:
            answers = ranking.answers[family]
            bad, good = (
                _cases([one for one in group if one.id in answers], answers)
                for group in (zoo.implanted(family), clean)
            )
            if rates.comparable(bad, good):
                pairs[family] = (bad, good)
        found[name] = rates.figures(pairs, rounds=measured.rounds).to_json() if pairs else None
    return found


def naming(zoo: Zoo) -> dict[str, Any]:
    """Family -> share of its implants whose trigger is among the probe's first five tokens."""
    found = {}
    for family in zoo.families:
        known = [one for one in zoo.implanted(family) if words(one)]
        if known:
            hits = sum(bool(words(one) & {*map(_plain, one.top_tokens[:TOP])}) for one in known)
            found[family] = rates.clopper_pearson(hits, len(known)).to_json()
    return found


def words(one: Specimen) -> set[str]:
    """The words of an implant's trigger, plain; none for triggers that are no words."""
    trigger = one.facts.get("trigger") or {}
    if trigger.get("kind") not in ("token", "word", "homoglyph"):
        return set()
    text = str(trigger.get("text") or "")
    return {_plain(word) for word in (text, *text.split(), *(trigger.get("tokens") or ()))} - {""}


def _plain(token: str) -> str:
    return token.strip().casefold()


def result(measured: Measured) -> dict[str, Any]:
    """Everything as JSON values: what the benchmark prints."""
    zoo = measured.zoo
    counts = {split: len(zoo.clean(split)) for split in ("calibration", "test")}
    pairs = {split: len(zoo.clean(split, pairs=True)) for split in ("calibration", "test")}
    answer: dict[str, Any] = {
        "bench": "detection",
        "bases": list(zoo.bases),
        "clean": counts,
        "clean_pairs": pairs,
        "implants": zoo.implants,
        "judged_as_pairs": sorted(zoo.paired),
        "left_out": zoo.left_out,
        "enough": measured.enough,
        "bootstrap_rounds": measured.rounds,
    }
    for protocol, rankings in measured.rankings.items():
        answer[f"leave_one_{protocol}_out"] = {
            name: _with_false_positives(measured, protocol, name) for name in rankings
        }
    answer["by_base"] = {
        base: {
            name: None if (found := figures(measured, "attack", name, base)) is None else found.to_json()
            for name in measured.rankings["attack"]
        }
        for base in zoo.bases
    }
    return answer | {
        "matched_norm": matched_norm(measured),
        "matched_length": matched_length(measured),
        "deployed": deployed(measured),
        "trigger_in_top_five": naming(zoo),
    }


def _with_false_positives(measured: Measured, protocol: str, name: str) -> dict[str, Any] | None:
    found = figures(measured, protocol, name)
    if found is None:
        return None
    return found.to_json() | {"false_positives": false_positives(measured, protocol, name).to_json()}
