"""Honest figures: an interval over subjects for every value, and what two editors differ by on the same ones.

Subjects are the unit of resampling because edits of one picture are not independent. A `Sample` keeps what
each subject adds to a metric, so that one estimator serves means, rates and means of rates, whoever was asked
for what.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

RESAMPLES = 2000
LEVEL = 0.95
POWER = 0.8
THREE = 3
"""Rule of three: what never happened in N edits happens in 3 / N of them at most, with 95 % confidence."""
FEW = 6
"""Where six edits are expected to differ, more than `THREE` do in `POWER` of all cases."""
_ROUNDING = 1e-12


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """What S subjects add to a metric in G strata: ``value = mean over strata of sum(sums) / sum(counts)``.

    A plain mean over subjects has one stratum and counts of 1. A rate over edits counts the edits of each
    subject. A mean of rates, such as that over confusing pairs, has a stratum for each rate.

    Attributes:
        sums: [S, G] finite.
        counts: [S, G] not negative; a stratum without any count has no part in the value.
        rate: every single value is 0 or 1.
    """

    sums: Array
    counts: Array
    rate: bool = False

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
        *,
        rate: bool = False,
    ) -> Sample:
        """A sample of a value for each edit.

        Args:
            values: [N], NaN where there is nothing to measure.
            subjects: [N] whose edit it is, 0 to ``count`` - 1.
            count: number of subjects S.
            strata: [N] which stratum, from 0 on; None is one stratum.
            rate: every value is 0 or 1.
        """
        found, whose = np.asarray(values, np.float64), np.asarray(subjects, np.int64)
        which = np.zeros(found.size, np.int64) if strata is None else np.asarray(strata, np.int64)
        groups = int(which.max(initial=0)) + 1
        there = np.isfinite(found)
        sums, counts = np.zeros((count, groups)), np.zeros((count, groups))
        np.add.at(sums, (whose[there], which[there]), found[there])
        np.add.at(counts, (whose[there], which[there]), 1.0)
        return cls(sums=sums, counts=counts, rate=rate)

    @property
    def subjects(self) -> int:
        """How many subjects add something."""
        return int((self.counts.sum(axis=1) > 0).sum())

    def told(self) -> Sample:
        """The same without the subjects that add nothing: nobody draws them."""
        there = self.counts.sum(axis=1) > 0
        return Sample(sums=self.sums[there], counts=self.counts[there], rate=self.rate)

    @property
    def samples(self) -> int:
        """How many values it rests on."""
        return int(self.counts.sum())

    def value(self, weights: Array | None = None) -> Array:
        """The metric [R] of draws, with each subject as often as ``weights`` [R, S] says; without them [1].

        NaN where nothing is there.
        """
        drawn = np.ones((1, len(self.sums))) if weights is None else weights
        return _mean_of_rates(drawn @ self.sums, drawn @ self.counts)


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
        spread: standard deviation of one subject's part in the difference, as the bootstrap sees it.
        detectable: the smallest true difference that these subjects would show in `POWER` of all cases; of a
            rate at least that of `FEW` edits, for editors that agree everywhere do not tell what they would
            differ by.
    """

    value: float
    low: float
    high: float
    p: float
    n: int
    spread: float
    detectable: float


@lru_cache(maxsize=4)
def weights(subjects: int, *, seed: int, resamples: int = RESAMPLES) -> Array:
    """How often each subject is drawn [R, S], read-only; the same for all metrics and editors of a seed."""
    draws = np.random.default_rng(seed).integers(0, subjects, size=(resamples, subjects))
    found = np.zeros((resamples, subjects))
    np.add.at(found, (np.arange(resamples)[:, None], draws), 1.0)
    found.flags.writeable = False
    return found


def estimate(sample: Sample, *, seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL) -> Estimate:
    """The metric over all subjects with a percentile-bootstrap interval.

    Formula: draw as many of the subjects that have a value, with replacement, ``resamples`` times; the
    (1-level)/2 and (1+level)/2 quantiles of the draws' values. That is a
    point where all subjects agree; of a rate it reaches `THREE` / number of values beyond the value at least.
    Source: Efron, "Bootstrap methods: another look at the jackknife", 1979.

    Raises:
        ValueError: nothing was measured.
    """
    if sample.subjects == 0:
        raise ValueError("nothing was measured: no subject has a value")
    sample = sample.told()
    value = float(sample.value()[0])
    drawn = sample.value(weights(sample.subjects, seed=seed, resamples=resamples))
    low, high = _interval(drawn, value, sample, level)
    if sample.rate:
        low, high = max(low, 0.0), min(high, 1.0)
    return Estimate(value=value, low=low, high=high, n=sample.subjects, samples=sample.samples)


def difference(
    first: Sample, second: Sample, *, seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL
) -> Difference:
    """The paired difference first - second, its interval and p-value.

    The interval draws the same subjects for both. The test exchanges both editors of randomly chosen subjects
    (Fisher's randomisation test); p = (1 + draws at least as far from 0) / (1 + draws). Of a rate the
    interval reaches `THREE` / number of values beyond the difference at least. detectable = (z((1 + level) /
    2) + z(POWER)) * standard deviation of the bootstrap's differences; of rates, whose values are 0 or 1, at
    least `FEW` / number of values.

    Raises:
        ValueError: they are not of the same subjects and edits, or nothing was measured.
    """
    if first.sums.shape != second.sums.shape:
        raise ValueError("a paired difference needs both editors on the same subjects")
    if not np.array_equal(first.counts, second.counts):
        raise ValueError("a paired difference needs both editors asked for the same")
    if first.subjects == 0:
        raise ValueError("nothing was measured: no subject has a value")
    first, second = first.told(), second.told()
    count, value = first.subjects, float(first.value()[0] - second.value()[0])
    drawn = weights(count, seed=seed, resamples=resamples)
    found = first.value(drawn) - second.value(drawn)
    low, high = _interval(found, value, first, level)
    error = float(np.nanstd(found, ddof=1))
    return Difference(
        value=value,
        low=low,
        high=high,
        p=_exchanged(first, second, value, seed, resamples),
        n=count,
        # Draws with replacement spread by (n - 1) / n less than subjects do.
        spread=error * count / max(1, count - 1) ** 0.5,
        detectable=max(_reach(level) * error, FEW / first.samples if first.rate else 0.0),
    )


def needed(spread: float, margin: float, *, level: float = LEVEL) -> int:
    """How many subjects tell a true difference from 0 in `POWER` of all cases.

    Formula: ((z((1 + level) / 2) + z(POWER)) * spread / margin)^2, rounded up: the usual sample size of a
    paired test.

    Args:
        spread: standard deviation of one subject's difference; see `Difference.spread`.
        margin: the true difference.
        level: of the interval that must not contain 0.

    Raises:
        ValueError: a margin that is not positive.
    """
    if margin <= 0:
        raise ValueError("no number of subjects tells a difference of 0 from 0")
    return max(2, ceil((_reach(level) * spread / margin) ** 2))


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


def _reach(level: float) -> float:
    """How many standard errors a true difference must measure to be seen in `POWER` of all cases."""
    normal = NormalDist()
    return normal.inv_cdf((1 + level) / 2) + normal.inv_cdf(POWER)


def _interval(found: Array, value: float, sample: Sample, level: float) -> tuple[float, float]:
    """The interval of draws around their value, of a rate never narrower than the rule of three."""
    low, high = np.nanquantile(found, [(1 - level) / 2, (1 + level) / 2])
    # The value itself can leave the quantiles by a rounding error when all subjects agree.
    least = THREE / sample.samples if sample.rate else 0.0
    return min(float(low), value - least), max(float(high), value + least)


def _exchanged(first: Sample, second: Sample, value: float, seed: int, resamples: int) -> float:
    """The p-value of the randomisation test; both samples count the same edits."""
    drawn = np.random.default_rng([seed, 1]).integers(0, 2, size=(resamples, len(first.sums)))
    moved = drawn.astype(np.float64) @ (second.sums - first.sums)
    counts = first.counts.sum(axis=0, keepdims=True)
    here, there = first.sums.sum(axis=0) + moved, second.sums.sum(axis=0) - moved
    found = _mean_of_rates(here, counts) - _mean_of_rates(there, counts)
    further = np.abs(found) >= abs(value) - _ROUNDING
    return float((1 + further.sum()) / (1 + resamples))


def _mean_of_rates(sums: Array, counts: Array) -> Array:
    """The mean [R] over strata of sums [R, G] / counts; strata without a count have no part in it."""
    with np.errstate(invalid="ignore", divide="ignore"):
        rates = np.where(counts > 0, sums / counts, 0.0)
        return np.asarray(rates.sum(axis=1) / (counts > 0).sum(axis=1))
