"""Honest figures: an interval over subjects for every value, and what two editors differ by on the same ones.

Subjects are the unit of resampling because edits of one picture are not independent. A `Sample` keeps what each
subject adds to a metric, so that one estimator serves means, rates and means of rates, whoever was asked for what.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

RESAMPLES = 2000
LEVEL = 0.95
POWER = 0.8


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """What S subjects add to a metric in G strata: ``value = mean over strata of sum(sums) / sum(counts)``.

    A plain mean over subjects has one stratum and counts of 1. A rate over edits counts the edits of each subject. A
    mean of rates, such as that over confusing pairs, has a stratum for each rate.

    Attributes:
        sums: [S, G] finite.
        counts: [S, G] not negative; a stratum without any count has no part in the value.
    """

    sums: Array
    counts: Array

    @classmethod
    def of(cls, values: ArrayLike) -> Sample:
        """A sample of one value [S] for each subject; NaN where a subject has none."""
        found = np.asarray(values, np.float64)
        return cls.rows(found, np.arange(found.size), found.size)

    @classmethod
    def rows(
        cls,
        values: ArrayLike,
        subjects: ArrayLike,
        count: int,
        strata: ArrayLike | None = None,
    ) -> Sample:
        """A sample of a value for each edit.

        Args:
            values: [N], NaN where there is nothing to measure.
            subjects: [N] whose edit it is, 0 to ``count`` - 1.
            count: number of subjects S.
            strata: [N] which stratum, from 0 on; None is one stratum.
        """
        found, whose = np.asarray(values, np.float64), np.asarray(subjects, np.int64)
        which = np.zeros(found.size, np.int64) if strata is None else np.asarray(strata, np.int64)
        groups = int(which.max(initial=0)) + 1
        there = np.isfinite(found)
        sums, counts = np.zeros((count, groups)), np.zeros((count, groups))
        np.add.at(sums, (whose[there], which[there]), found[there])
        np.add.at(counts, (whose[there], which[there]), 1.0)
        return cls(sums=sums, counts=counts)

    @property
    def subjects(self) -> int:
        """How many subjects add something."""
        return int((self.counts.sum(axis=1) > 0).sum())

    @property
    def samples(self) -> int:
        """How many values it rests on."""
        return int(self.counts.sum())

    def value(self, weights: Array | None = None) -> Array:
        """The metric [R] of draws, with each subject as often as ``weights`` [R, S] says; without them [1].

        NaN where nothing is there.
        """
        drawn = np.ones((1, len(self.sums))) if weights is None else weights
        sums, counts = drawn @ self.sums, drawn @ self.counts
        with np.errstate(invalid="ignore", divide="ignore"):
            rates = np.where(counts > 0, sums / counts, np.nan)
        known = np.isfinite(rates)
        total = np.where(known, rates, 0.0).sum(axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(known.any(axis=1), total / known.sum(axis=1), np.nan)


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A metric with its bootstrap interval.

    Attributes:
        value: of all subjects.
        low: lower end of the interval.
        high: upper end of the interval.
        n: number of subjects.
        samples: number of values behind it.
    """

    value: float
    low: float
    high: float
    n: int
    samples: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """What a metric of one editor is above that of another on the same subjects.

    Attributes:
        value: first minus second.
        low: lower end of the paired bootstrap interval.
        high: upper end of it.
        p: two-sided p-value of a sign-flip permutation test: how often chance alone gives as much.
        n: number of subjects.
        detectable: the smallest true difference that these subjects would show in `POWER` of all cases.
    """

    value: float
    low: float
    high: float
    p: float
    n: int
    detectable: float


def weights(subjects: int, *, seed: int, resamples: int = RESAMPLES) -> Array:
    """How often each subject is drawn [R, S]; the same seed gives the same draws for every metric and editor."""
    draws = np.random.default_rng(seed).integers(0, subjects, size=(resamples, subjects))
    found = np.zeros((resamples, subjects))
    np.add.at(found, (np.arange(resamples)[:, None], draws), 1.0)
    return found


def estimate(sample: Sample, *, seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL) -> Estimate:
    """The metric over all subjects with a percentile-bootstrap interval.

    Formula: draw S subjects with replacement ``resamples`` times; the (1-level)/2 and (1+level)/2 quantiles of the
    draws' values. Source: Efron, "Bootstrap methods: another look at the jackknife", 1979.

    Raises:
        ValueError: nothing was measured.
    """
    if sample.subjects == 0:
        raise ValueError("nothing was measured: no subject has a value")
    value = float(sample.value()[0])
    low, high = _interval(sample.value(weights(len(sample.sums), seed=seed, resamples=resamples)), level)
    # The value itself can leave the quantiles by a rounding error when all subjects agree.
    return Estimate(
        value=value, low=min(low, value), high=max(high, value), n=sample.subjects, samples=sample.samples
    )


def difference(
    first: Sample, second: Sample, *, seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL
) -> Difference:
    """The paired difference first - second, its interval and p-value.

    The interval draws the same subjects for both. The test exchanges both editors of randomly chosen subjects
    (Fisher's randomisation test); p = (1 + draws at least as far from 0) / (1 + draws).

    Raises:
        ValueError: they are not of the same subjects, or nothing was measured.
    """
    if first.sums.shape != second.sums.shape:
        raise ValueError("a paired difference needs both editors on the same subjects")
    if not np.array_equal(first.counts > 0, second.counts > 0) or first.subjects == 0:
        raise ValueError("a paired difference needs both editors asked for the same")
    value = float(first.value()[0] - second.value()[0])
    drawn = weights(len(first.sums), seed=seed, resamples=resamples)
    found = first.value(drawn) - second.value(drawn)
    low, high = _interval(found, level)
    spread = float(np.nanstd(found, ddof=1))
    normal = NormalDist()
    reach = normal.inv_cdf((1 + level) / 2) + normal.inv_cdf(POWER)
    return Difference(
        value=value,
        low=min(low, value),
        high=max(high, value),
        p=_exchanged(first, second, value, seed, resamples),
        n=first.subjects,
        detectable=reach * spread,
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values of several tests, corrected so that the chance of any false alarm stays that of one.

    Source: Holm, "A simple sequentially rejective multiple test procedure", 1979.
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected, running = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = running
    return corrected


def _interval(found: Array, level: float) -> tuple[float, float]:
    low, high = np.nanquantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _exchanged(first: Sample, second: Sample, value: float, seed: int, resamples: int) -> float:
    signs = np.random.default_rng([seed, 1]).integers(0, 2, size=(resamples, len(first.sums))).astype(np.float64)
    mixed = []
    for here, there in ((first, second), (second, first)):
        sums = signs @ here.sums + (1 - signs) @ there.sums
        counts = signs @ here.counts + (1 - signs) @ there.counts
        with np.errstate(invalid="ignore", divide="ignore"):
            mixed.append(np.nanmean(np.where(counts > 0, sums / counts, np.nan), axis=1))
    further = np.abs(mixed[0] - mixed[1]) >= abs(value) - 1e-12
    return float((1 + further.sum()) / (1 + resamples))
