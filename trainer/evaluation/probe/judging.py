"""From statistics to a verdict: an adapter's behaviour beside that of clean adapters of the same base."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from registry.scanning.detector import distances, judge
from trainer.evaluation.probe.report import ProbeReport, Verdict

if TYPE_CHECKING:
    from registry.manifest import AdapterCard
    from registry.scanning.population import Population

FAIL_DISTANCE: Final = 2.0
"""An adapter this many times as far out as the farthest clean one fails; nearer it asks for a review."""


ALONE: Final = "any"
PAIRED: Final = "pair"
"""Recipes of the populations of single adapters, and of pairs of clean ones that are loaded together."""


def judged(report: ProbeReport, population: Population | None) -> ProbeReport:
    """Return the report with a verdict: upper-sided conformal p-values among the population's adapters.

    The verdict is "review" where the combined p-value is at most `registry.scanning.detector.THRESHOLD`,
    "fail" where the adapter is moreover `FAIL_DISTANCE` times as far out as the farthest clean one, and "not
    judged" without a population, or with one too small for the threshold.
    """
    judgement = judge(report.statistics, population)
    if population is None or judgement.distance is None:
        return replace(report, verdict="not judged", why=judgement.why)
    verdict: Verdict = "review" if judgement.verdict == "review" else "pass"
    farthest = float(distances(population).max())
    if verdict == "review" and judgement.distance >= FAIL_DISTANCE * farthest:
        verdict = "fail"
    why = (
        f"p {judgement.combined:.3g} among {population.size} clean adapters, distance "
        f"{judgement.distance:.3g} (the farthest clean one: {farthest:.3g})."
    )
    digest = population.digest.removeprefix("sha256:")
    return replace(report, verdict=verdict, p_values=dict(judgement.p), population=digest, why=why)


def population_for(card: AdapterCard, recipe: str = ALONE) -> Population | None:
    """Return the shipped population of behaviour for an adapter, or None.

    What an adapter does depends little on its rank and targets, so where there is no population of just these
    any of its base will do.

    Args:
        card: of the adapter.
        recipe: `ALONE` or `PAIRED`.
    """
    from registry.scanning.population import find, recipe_key, shipped

    if recipe == ALONE:
        key = recipe_key(card.lora.targets)
        same = find("behaviour", base=card.base.id, rank=card.lora.rank, recipes=(key,))
        if same is not None:
            return same
    for (kind, base, _, name), found in shipped().items():
        if (kind, base, name) == ("behaviour", card.base.id, recipe):
            return found
    return None
