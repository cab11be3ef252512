"""Fifth layer, second half: is an adapter one of the clean ones, as far as its statistics tell?

No label of an attack is used: a detector that is fitted to known backdoors gives the others a clean bill, or
even ranks them as the cleanest (its score inverts). What is known are clean adapters of the same base, rank
and recipe, and an adapter is compared with them by full conformal prediction (Vovk, Gammerman and Shafer,
"Algorithmic Learning in a Random World", 2005, 2.2; Angelopoulos and Bates, arXiv 2107.07511, 2021, 6): the
adapter joins the m clean ones, every one of the m + 1 gets a nonconformity score that treats them all alike,
and

    p = (1 + number of clean adapters whose score is at least the adapter's) / (m + 1).

If it is exchangeable with them, p <= t happens with probability at most t, for any distribution of the
statistics and any score. The smallest p is 1 / (m + 1): a population smaller than 1 / t - 1 cannot reject
anything, and then nothing is judged.

The score is a distance. Each statistic is centred on its median and divided by a robust spread (1.4826 times
the median absolute deviation; Rousseeuw and Croux, JASA 88 (1993)), so that the adapter itself and a few bad
rows hardly move either; two-sided statistics keep their sign, of one-sided ones only what is too large
remains. Then the Mahalanobis length under the spatial-sign covariance: every adapter counts with its
direction alone, so that no outlier, however far, hides another (Visuri, Koivunen and Oja, J. Stat. Plan.
Inference 91 (2000)), and it is shrunk towards a multiple of the identity (Chen, Wiesel, Eldar and Hero, IEEE
TSP 58 (2010), OAS). A length counts both a statistic that is far off and a combination that no clean adapter
has: an attacker who pushes the norm back into its range bends how norm, shares and concentration go together.
One score for all statistics needs no correction for their number.

The p-values of single statistics come from the same ranks, one at a time. They explain a finding and are not
corrected; no verdict depends on them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal

import numpy as np
from numpy.typing import NDArray

from registry.scanning import numerics, spectra
from registry.scanning.figures import Examined, ModuleFigures, Reference, Spectrum, WeightSpace
from registry.scanning.population import Population, find, recipe_key
from registry.scanning.report import Finding, finding

if TYPE_CHECKING:
    from collections.abc import Iterable

    from registry.content import Content
    from registry.families import BaseFacts
    from registry.scanning.product import Update
    from registry.scanning.structure import Claims, Pair

F64 = NDArray[np.float64]
Verdict = Literal["pass", "review", "not judged"]

THRESHOLD: Final = 0.01
"""A combined p-value of at most this asks for a review: one honest adapter in a hundred gets one."""

_FARTHEST = 1e6


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """An adapter beside a population.

    Attributes:
        p: statistic -> its conformal p-value, 1 / (m + 1) to 1; empty where nothing was judged.
        combined: the p-value of the whole adapter; None where nothing was judged.
        score: -log10 of it; None where nothing was judged.
        distance: the adapter's nonconformity in robust standard deviations: it ranks adapters where the
            p-value has reached its smallest; None where nothing was judged.
        threshold: the combined p-value up to which the verdict is "review".
        verdict: "pass", "review" or "not judged".
        why: why nothing was judged; empty otherwise.
    """

    p: Mapping[str, float] = field(default_factory=dict, hash=False)
    combined: float | None = None
    score: float | None = None
    distance: float | None = None
    threshold: float = THRESHOLD
    verdict: Verdict = "not judged"
    why: str = ""


def examine(
    weights: Content,
    pairs: Iterable[Pair],
    card: Claims,
    base: BaseFacts,
    population: Population | None = None,
    scales: Mapping[str, float] | None = None,
) -> Examined:
    """Run the layers that read the numbers: numerics and weight space, in one pass over the factors.

    Args:
        weights: the bytes of the file, hostile; few modules of it are in memory at a time.
        pairs: the modules' factors, as the structure layer found them.
        card: what the adapter claims to be.
        base: its base model.
        population: clean adapters to compare with; by default the one that ships for the base, the rank and
            the targets of the card.
        scales: module -> what the loader multiplies its B @ A with, where that is not 1.

    Raises:
        DigestMismatch, NetworkError: whatever reading the weights raises.
    """
    from registry import families

    survey = numerics.survey(weights, pairs, families.family(base.family), base.spec, scales)
    if any(found.severity == "block" for found in survey.findings):
        # What the numbers look like is no question any more, and NaN would make it none with an answer.
        return Examined(findings=survey.findings, facts=survey.facts, modules=_modules(survey.updates))
    if population is None:
        recipes = (recipe_key(card.lora.targets),)
        population = find("weights", base=base.id, rank=card.lora.rank, recipes=recipes)
    space, found = _space(survey.updates, population)
    return Examined(
        findings=(*survey.findings, *found),
        facts=survey.facts,
        modules=_modules(survey.updates),
        space=space,
    )


def _space(updates: Sequence[Update], population: Population | None) -> tuple[WeightSpace, list[Finding]]:
    """The weights beside a population, and the finding if they are unlike it."""
    statistics = spectra.summarise(updates)
    judged = judge(statistics, population)
    reference = population and Reference(
        digest=population.digest,
        base=population.base,
        rank=population.rank,
        recipe=population.recipe,
        size=population.size,
        values={name: population.column(name) for name in population.statistics},
    )
    bands = population.spectra if population else {}
    curves = spectra.curves(updates)
    space = WeightSpace(
        statistics=statistics,
        p={name: spectra.short(value) for name, value in judged.p.items()},
        score=None if judged.score is None else spectra.short(judged.score),
        threshold=None if judged.score is None else judged.threshold,
        verdict=judged.verdict,
        why=judged.why,
        reference=reference or None,
        spectra=tuple(
            Spectrum(kind=kind, values=curve, low=band.low, middle=band.middle, high=band.high)
            if (band := bands.get(kind))
            else Spectrum(kind=kind, values=curve)
            for kind, curve in curves.items()
        ),
    )
    if judged.verdict != "review" or population is None:
        return space, []
    return space, [finding("ADP-WGT-001", "the adapter", evidence(statistics, judged, population))]


def evidence(
    statistics: Mapping[str, float], judged: Judgement, population: Population, count: int = 4
) -> str:
    """Return the most unusual statistics in words, each with its value, the population's range and its p."""
    parts = []
    by_p = sorted(judged.p, key=lambda name: (judged.p[name], -_excess(statistics, population, name)))
    for name in by_p[:count]:
        column = population.column(name)
        value = f"{statistics[name]:.4g}" if name in statistics else "missing"
        parts.append(f"{name} {value} (clean {column[0]:.4g} to {column[-1]:.4g}, p {judged.p[name]:.2g})")
    whole = f"p {judged.combined:.2g} beside {population.size} clean adapters" if judged.combined else ""
    return f"{whole}: " + "; ".join(parts)


def _excess(statistics: Mapping[str, float], population: Population, name: str) -> float:
    """How far a statistic is outside of the population's range, as a part of the range; 0 inside."""
    column = population.column(name)
    value = _number(statistics.get(name))
    width = max(column[-1] - column[0], 1e-12)
    return max(column[0] - value, value - column[-1], 0.0) / width


def _modules(updates: Sequence[Update]) -> tuple[ModuleFigures, ...]:
    short = spectra.short
    return tuple(
        ModuleFigures(
            module=one.module,
            block=one.block,
            kind=one.kind,
            spectral_norm=short(one.norm),
            frobenius_norm=short(one.frobenius),
            stable_rank=short((one.frobenius / one.norm) ** 2) if one.norm > 0 else 0.0,
            leading_share=short(one.norm / float(one.values.sum())) if one.norm > 0 else 0.0,
            singular_values=tuple(map(short, one.values.tolist())),
        )
        for one in sorted(updates, key=lambda one: (one.block, one.kind))
    )


def judge(
    statistics: Mapping[str, float], population: Population | None, *, threshold: float = THRESHOLD
) -> Judgement:
    """Compare an adapter with clean ones.

    Args:
        statistics: of the adapter. One that the population has and the adapter has not, or that is not
        finite,
            is as unusual as can be; one that the population has not is ignored.
        population: the clean ones; None if there are none.
        threshold: the largest combined p-value that asks for a review, above 0 and below 1.
    """
    if population is None:
        return Judgement(threshold=threshold, why="there is no population of its base, rank and recipe")
    if not statistics:
        return Judgement(threshold=threshold, why="there is nothing to compare: its updates are zero")
    if 1 / (population.size + 1) > threshold:
        needed = int(np.ceil(1 / threshold - 1e-9)) - 1
        why = f"the population has {population.size} adapters; p <= {threshold:g} needs {needed}"
        return Judgement(threshold=threshold, why=why)
    clean = np.array(population.values, np.float64)
    mine = np.array([_number(statistics.get(name)) for name in population.statistics])
    bag = _standardised(np.vstack([clean, mine]))
    if population.sides == "upper":
        bag = np.maximum(bag, 0.0)
    sided = np.abs(bag)
    lengths = _lengths(bag)
    combined = conformal_p(lengths)
    return Judgement(
        p={name: conformal_p(sided[:, at]) for at, name in enumerate(population.statistics)},
        combined=combined,
        score=float(-np.log10(combined)),
        distance=float(lengths[-1]),
        threshold=threshold,
        verdict="review" if combined <= threshold else "pass",
    )


def distances(population: Population) -> F64:
    """Return how far each clean adapter is from the others: the distance that `judge` gives it among them."""
    bag = _standardised(np.array(population.values, np.float64))
    return _lengths(np.maximum(bag, 0.0) if population.sides == "upper" else bag)


def conformal_p(scores: F64) -> float:
    """Return the conformal p-value of the last of some nonconformity scores among all of them."""
    return float(np.mean(scores >= scores[-1]))


def _number(value: float | None) -> float:
    return float(value) if value is not None and np.isfinite(value) else np.inf


def _standardised(bag: F64) -> F64:
    """Each column in robust standard deviations from its median, at most `_FARTHEST` of them."""
    finite = np.where(np.isfinite(bag), bag, np.nan)
    centre = np.nanmedian(finite, axis=0)
    away = np.abs(finite - centre)
    spread = 1.4826 * np.nanmedian(away, axis=0)
    # Half of the values may be equal (a share that is mostly zero): then the mean deviation is the scale.
    spread = np.where(spread > 0, spread, 1.2533 * np.nanmean(away, axis=0))
    floor = 1e-6 * np.maximum(np.abs(centre), 1e-3)
    scaled = (bag - centre) / np.maximum(spread, floor)
    return np.asarray(np.clip(scaled, -_FARTHEST, _FARTHEST))


def _lengths(bag: F64) -> F64:
    """The Mahalanobis length of each row under the shrunk spatial-sign covariance of all of them."""
    count, width = bag.shape
    plain = np.linalg.norm(bag, axis=1, keepdims=True)
    directions = bag / np.where(plain > 0, plain, 1.0)  # from the robust centre, which is the origin
    second = directions.T @ directions * (width / count)
    trace, squares = float(np.trace(second)), float(np.sum(second**2))
    if trace == 0:
        return np.asarray(plain[:, 0])
    numerator = (1 - 2 / width) * squares + trace**2
    denominator = (count + 1 - 2 / width) * (squares - trace**2 / width)
    shrink = min(1.0, max(0.0, numerator / denominator)) if denominator > 0 else 1.0
    target = np.eye(width) * trace / width
    values, vectors = np.linalg.eigh((1 - shrink) * second + shrink * target)
    values = np.maximum(values, 1e-3 * values[-1])
    return np.asarray(np.sqrt(np.sum((bag @ vectors) ** 2 / values, axis=1)))
