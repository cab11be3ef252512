"""`compare`: several adapters on the same subjects, and which of their differences are real.

A difference is called real if its 95 % interval excludes 0 and its p-value, corrected by Holm for every pair
of adapters and every metric of the comparison, is below 0.05: then the chance that any of those called real
is none is at most 5 %. An adapter's rank in a metric is 1 + the number of adapters that are really better, so
adapters that cannot be told apart share a rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from math import ceil, log2
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict

from registry.digest import Digest, digest_bytes
from trainer.evaluation import measure
from trainer.evaluation.bench import Bench
from trainer.evaluation.catalogue import METRICS, Direction
from trainer.evaluation.editing import Editor
from trainer.evaluation.evaluating import ENDED, estimated, gap, measured_by, progress_of
from trainer.evaluation.judges import require_able
from trainer.evaluation.readings import Readings
from trainer.evaluation.report import Curve, Gap, Suite, Value
from trainer.evaluation.statistics import RESAMPLES, Difference, Sample, difference, holm
from trainer.export import code_version
from trainer.provenance import running_code
from trainer.stage import StageResult, finished, new_folder, stage_key, write_result

COMPARISON_NAME: Final = "comparison.json"
PAGE: Final = "comparison.html"
SEEN: Final = 0.05
"""A corrected p-value below this, with an interval that excludes 0, is a real difference."""
_DRAWS_PER_TEST, _MOST_DRAWS = 50, 20_000
"""So many permutations that Holm's correction leaves the smallest possible p-value well below `SEEN`."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Compared(_Frozen):
    """An adapter of the comparison; `weights` is None for the base alone."""

    name: str
    reference: str
    weights: Digest | None


class Pair(_Frozen):
    """What a metric of one adapter is above that of another.

    Attributes:
        first, second: names.
        gap: first minus second, on the same subjects; ``p_holm`` counts all pairs and metrics.
        better: the one that is really better; None where no real difference was shown.
    """

    first: str
    second: str
    gap: Gap
    better: str | None


class Row(_Frozen):
    """One metric of every adapter.

    Attributes:
        values: by adapter, as far as it was measured; "true answers" are the judges' own error.
        pairs: every two adapters, in the order that they were given.
        ranks: 1 + how many adapters are really better.
    """

    name: str
    title: str
    definition: str
    direction: Direction
    unit: str
    values: dict[str, Value]
    pairs: tuple[Pair, ...]
    ranks: dict[str, int]


class Comparison(_Frozen):
    """The outcome of a comparison, as comparison.json holds it.

    Attributes:
        adapters: in the order that they were given.
        base: digest of the base model.
        judges: names, and digests of what decides their opinions.
        curves: by adapter, response of each expression to its intensity.
    """

    schema_version: Literal[1] = 1
    code_version: str
    code: Digest
    base: Digest
    judges: dict[str, str]
    judge_digests: dict[str, Digest]
    suite: Suite
    suite_digest: Digest
    adapters: tuple[Compared, ...]
    metrics: tuple[Row, ...]
    curves: dict[str, tuple[Curve, ...]]

    @property
    def warning(self) -> str:
        """What a reader must know before the ranks; empty where people are enough to show a difference."""
        people, tests = len(self.suite.subjects), sum(len(row.pairs) for row in self.metrics)
        # Editors of n people can be exchanged in 2**n ways, of which two are the most extreme ones.
        if not tests or 2.0 ** (1 - people) * tests < SEEN:
            return ""
        return (
            f"{people} people are too few to show any difference among {tests} comparisons, however large it "
            f"is: ranks say nothing here. {ceil(1 + log2(tests / SEEN)) + 1} people could."
        )

    def better(self, first: str, second: str) -> tuple[str, ...]:
        """Names of the metrics in which the first adapter is really better than the second."""
        wanted = {first, second}
        return tuple(
            row.name
            for row in self.metrics
            for pair in row.pairs
            if {pair.first, pair.second} == wanted and pair.better == first
        )


TRUTH: Final = "true answers"
"""Name of the column with the judges' own error."""


def compare(bench: Bench, editors: Mapping[str, Editor], out: Path) -> Comparison:
    """Measure adapters on the same subjects and say which differ.

    Where `out` already holds the very same comparison, that one is returned.

    Args:
        bench: where they are measured.
        editors: by name, each asked for everything; strength 0 is the base alone.
        out: becomes a folder with `COMPARISON_NAME` and `PAGE`.

    Raises:
        EvaluationError: the adapters cannot be compared, or not by these judges.
        TrainerError, RegistryError, ServingError: as `trainer.evaluation.evaluating.evaluate`.
    """
    from trainer.evaluation.comparison_page import page

    require_able(bench.plan.suite, bench.base)
    adapters = tuple(
        Compared(name=name, reference=one.called, weights=None if one.strength == 0 else one.weights)
        for name, one in editors.items()
    )
    facts = {
        "code": running_code(),
        "base": bench.base_digest,
        "judges": bench.judges.names,
        "judge_digests": bench.judges.digests,
        "suite_digest": bench.plan.digest(),
    }
    told = [one.model_dump(mode="json") for one in adapters]
    key = stage_key("compare", adapters=told, **facts)
    if finished(out, key):
        bench.say(f"this very comparison was made before: {out}")
        return Comparison.model_validate_json((out / COMPARISON_NAME).read_bytes())
    whole = progress_of(bench, editors)
    measured, truth = measured_by(bench, editors, whole)
    readings = {name: one.readings for name, one in measured.items()}
    found = Comparison(
        code_version=code_version(),
        suite=bench.plan.describe(),
        adapters=adapters,
        metrics=tables(bench, editors, readings, truth),
        curves={name: measure.response_curves(bench.plan, one) for name, one in readings.items()},
        **facts,
    )
    with new_folder(out) as folder:
        data = found.model_dump_json(indent=1).encode()
        (folder / COMPARISON_NAME).write_bytes(data)
        (folder / PAGE).write_text(page(found, bench.plan, measured), "utf-8")
        write_result(folder, StageResult(stage="compare", folder=out, key=key, digest=digest_bytes(data)))
    whole.end(ENDED)
    return found


def tables(
    bench: Bench, editors: Mapping[str, Editor], readings: Mapping[str, Readings], truth: Readings | None
) -> tuple[Row, ...]:
    """Every metric of every adapter, with all pairs; see the module.

    Args:
        bench: has the plan.
        editors: by name.
        readings: by the same names.
        truth: of the true answers, where there are any.
    """
    seed = bench.plan.suite.seed
    # Some metrics compare with the base, whatever it is called here.
    keys = {name: "base" if one.strength == 0 else f"adapter {name}" for name, one in editors.items()}
    given = {keys[name]: one for name, one in readings.items()}
    if truth is not None:
        given["renders"] = truth
    samples = measure.measure_all(bench.plan, given)
    named = {name: samples[key] for name, key in keys.items()}
    values = estimated({**named, **({TRUTH: samples["renders"]} if truth is not None else {})}, seed)
    pairs = _pairs(named, seed)
    rows = []
    for name, facts in METRICS.items():
        mine = pairs.get(name, ())
        if not any(name in found for found in values.values()):
            continue
        ranks = {who: 1 + sum(_beaten(pair, who) for pair in mine) for who in named if name in named[who]}
        rows.append(
            Row(
                name=name, title=facts.title, definition=facts.definition, direction=facts.direction,
                unit=facts.unit, values={who: found[name] for who, found in values.items() if name in found},
                pairs=mine, ranks=ranks,
            )
        )  # fmt: skip
    return tuple(rows)


def _pairs(samples: Mapping[str, Mapping[str, Sample]], seed: int) -> dict[str, tuple[Pair, ...]]:
    """Metric -> every two adapters, with p-values that count all pairs of all metrics."""
    asked = [
        (metric, first, second)
        for metric in METRICS
        for first, second in combinations(samples, 2)
        if metric in samples[first] and metric in samples[second]
    ]
    draws = min(max(RESAMPLES, _DRAWS_PER_TEST * len(asked)), _MOST_DRAWS)
    found = [
        difference(samples[first][metric], samples[second][metric], seed=seed, resamples=draws)
        for metric, first, second in asked
    ]
    pairs: dict[str, list[Pair]] = {}
    for (metric, first, second), one, p in zip(asked, found, holm([one.p for one in found]), strict=True):
        winner = _winner(metric, first, second, one) if p < SEEN and not one.low <= 0 <= one.high else None
        pairs.setdefault(metric, []).append(Pair(first=first, second=second, gap=gap(one, p), better=winner))
    return {metric: tuple(some) for metric, some in pairs.items()}


def _winner(metric: str, first: str, second: str, one: Difference) -> str:
    return first if (one.value > 0) == (METRICS[metric].direction == "higher") else second


def _beaten(pair: Pair, who: str) -> bool:
    return pair.better is not None and who in (pair.first, pair.second) and pair.better != who


def everything(editors: Sequence[Editor], names: Sequence[str]) -> dict[str, Editor]:
    """Editors by name, each asked for all that the plan has."""
    return {name: replace(one, name=name, scope="all") for name, one in zip(names, editors, strict=True)}
