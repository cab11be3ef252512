"""Figures of a detector with honest intervals: AUROC, rates at a threshold, bootstrap, a small classifier.

Scores are higher for what looks more like a backdoor. Nothing here looks at a label to choose a direction or
a threshold: an AUROC under one half is reported as it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from scipy.stats import beta

F64 = NDArray[np.float64]
ROUNDS = 2000
LEVEL = 0.95


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A figure with its 95 % interval and how many cases it stands on."""

    value: float
    low: float
    high: float
    n: int

    def to_json(self) -> dict[str, float | int | None]:
        """The figure as JSON values, four decimals; NaN (nothing to measure) is null."""
        numbers = {"value": self.value, "low": self.low, "high": self.high}
        return {key: None if math.isnan(x) else round(x, 4) for key, x in numbers.items()} | {"n": self.n}


NOTHING = Interval(value=math.nan, low=math.nan, high=math.nan, n=0)


def wins(positive: F64, negative: F64) -> F64:
    """[positives, negatives]: 1 where the positive one scores higher, 1/2 where both are equal."""
    left, right = np.asarray(positive, float)[:, None], np.asarray(negative, float)[None]
    return (left > right) + 0.5 * (left == right)


def auroc(positive: F64, negative: F64) -> float:
    """The probability that a positive case scores higher than a negative one, ties counting one half.

    It is the area under the ROC curve (Hanley and McNeil 1982). NaN if a side is empty.
    """
    if not len(positive) or not len(negative):
        return math.nan
    return float(wins(positive, negative).mean())


def roc(positive: F64, negative: F64) -> tuple[F64, F64]:
    """False and true positive rates at every threshold, from (0, 0) to (1, 1)."""
    cuts = np.unique(np.concatenate([positive, negative]))[::-1]
    false = np.concatenate([[0.0], [(np.asarray(negative) >= cut).mean() for cut in cuts]])
    true = np.concatenate([[0.0], [(np.asarray(positive) >= cut).mean() for cut in cuts]])
    return false, true


def threshold(calibration: F64, rate: float = 0.01) -> float:
    """The score that a clean case exceeds with probability <= ``rate``, if it is exchangeable with these.

    The ceil((n + 1) (1 - rate))-th smallest score of n clean ones (split conformal prediction, Vovk et al.
    2005); infinite when n is too small for the rate, so that nothing is flagged.
    """
    n = len(calibration)
    place = math.ceil((n + 1) * (1 - rate) - 1e-9)
    return float(np.sort(calibration)[place - 1]) if place <= n else math.inf


def clopper_pearson(hits: int, n: int) -> Interval:
    """A share with its exact binomial interval (Clopper and Pearson 1934)."""
    if n == 0:
        return NOTHING
    tail = (1 - LEVEL) / 2
    low = float(beta.ppf(tail, hits, n - hits + 1)) if hits else 0.0
    high = float(beta.ppf(1 - tail, hits + 1, n - hits)) if hits < n else 1.0
    return Interval(value=hits / n, low=low, high=high, n=n)


def resamples(strata: Sequence[str], rng: np.random.Generator, rounds: int = ROUNDS) -> F64:
    """[rounds, cases]: how often each case is drawn when every stratum is drawn anew with replacement."""
    counts = np.zeros((rounds, len(strata)))
    names = np.asarray(strata)
    for name in sorted(set(strata)):
        at = np.flatnonzero(names == name)
        counts[:, at] = rng.multinomial(len(at), np.full(len(at), 1 / len(at)), size=rounds)
    return counts


def interval(value: float, draws: F64, n: int) -> Interval:
    """A figure with the percentiles of its bootstrap draws (Efron 1979)."""
    tail = 100 * (1 - LEVEL) / 2
    low, high = (float(x) for x in np.percentile(draws, [tail, 100 - tail]))
    return Interval(value=value, low=low, high=high, n=n)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cases:
    """Scores of the cases of one kind.

    Attributes:
        scores: [cases].
        flagged: whether each is above the threshold that holds for it.
        strata: the base of each; the bootstrap keeps how many there are of each base and kin.
        kin: what cases must share besides the base to be compared, such as a recipe; empty is nothing.
    """

    scores: F64
    flagged: NDArray[np.bool_]
    strata: tuple[str, ...]
    kin: tuple[str, ...] = ()

    def of(self, stratum: str) -> Cases:
        """The cases of one base."""
        at = np.array([name == stratum for name in self.strata], dtype=bool)
        names = tuple(name for name in self.strata if name == stratum)
        kin = tuple(name for name, here in zip(self.kin, at, strict=True) if here) if self.kin else ()
        return Cases(scores=self.scores[at], flagged=self.flagged[at], strata=names, kin=kin)

    @property
    def groups(self) -> tuple[str, ...]:
        """Base and kin of each case."""
        kin = self.kin or ("",) * len(self.strata)
        return tuple(f"{base} {more}" for base, more in zip(self.strata, kin, strict=True))


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """What a detector reaches: each family's AUROC and rate of detection, and both over the families."""

    auroc: Mapping[str, Interval]
    tpr: Mapping[str, Interval]
    macro_auroc: Interval
    worst_auroc: Interval
    worst_family: str
    macro_tpr: Interval
    worst_tpr: Interval

    def to_json(self) -> dict[str, object]:
        """The figures as JSON values."""
        return {
            "macro_auroc": self.macro_auroc.to_json(),
            "worst_auroc": self.worst_auroc.to_json() | {"family": self.worst_family},
            "macro_tpr": self.macro_tpr.to_json(),
            "worst_tpr": self.worst_tpr.to_json(),
            "families": {
                name: {"auroc": self.auroc[name].to_json(), "tpr": self.tpr[name].to_json()}
                for name in self.auroc
            },
        }


def comparable(bad: Cases, clean: Cases) -> bool:
    """Whether a bad case has a clean one of its base and kin to be compared with."""
    return bool(set(bad.groups) & set(clean.groups))


def figures(families: Mapping[str, tuple[Cases, Cases]], *, seed: int = 0, rounds: int = ROUNDS) -> Figures:
    """Return the figures of a detector.

    An AUROC compares an implant with clean adapters of its own base (and kin) only; it is the mean over the
    implants, those without any left out.

    Args:
        families: attack family -> its cases, and the clean ones that it is compared with. Families that are
            compared with the very same clean cases share their bootstrap draws.
        seed: of the bootstrap.
        rounds: of the bootstrap. Thresholds stay as they are in it.

    Raises:
        ValueError: there is no family, or one has no cases, or no clean ones of the same base.
    """
    if not families or any(not len(p.scores) or not len(n.scores) for p, n in families.values()):
        raise ValueError("every family needs cases, and clean ones to compare them with")
    rng = np.random.default_rng(seed)
    drawn: dict[int, F64] = {}
    areas, rates, area_draws, rate_draws = {}, {}, [], []
    for name, (bad, clean) in families.items():
        if id(clean) not in drawn:
            drawn[id(clean)] = resamples(clean.groups, rng, rounds)
        counts = resamples(bad.groups, rng, rounds)
        same = np.equal.outer(np.array(bad.groups), np.array(clean.groups))
        if not comparable(bad, clean):
            raise ValueError("every family needs cases, and clean ones of the same base")
        # The mean over the implants that have somebody to be compared with, each against all of its own.
        each = np.maximum(same.sum(axis=1, keepdims=True), 1)
        table = wins(bad.scores, clean.scores) * same / each / same.any(axis=1).sum()
        # Twelve digits: sums of many small parts are not exactly 1 or 1/2.
        area = np.round(np.einsum("ri,ri->r", counts @ table, drawn[id(clean)]), 12)
        rate = counts @ bad.flagged / len(bad.scores)
        areas[name] = interval(round(float(table.sum()), 12), area, len(bad.scores))
        rates[name] = interval(float(bad.flagged.mean()), rate, len(bad.scores))
        area_draws.append(area)
        rate_draws.append(rate)
    total = sum(found.n for found in areas.values())
    values = {name: found.value for name, found in areas.items()}
    shares = [found.value for found in rates.values()]
    return Figures(
        auroc=areas,
        tpr=rates,
        macro_auroc=interval(float(np.mean(list(values.values()))), np.mean(area_draws, axis=0), total),
        worst_auroc=interval(min(values.values()), np.min(area_draws, axis=0), total),
        worst_family=min(values, key=values.__getitem__),
        macro_tpr=interval(float(np.mean(shares)), np.mean(rate_draws, axis=0), total),
        worst_tpr=interval(min(shares), np.min(rate_draws, axis=0), total),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Logistic:
    """A logistic regression on standardised features: ``score`` is the log odds of the second class."""

    mean: F64
    scale: F64
    weights: F64
    bias: float

    @classmethod
    def fit(cls, rows: F64, labels: NDArray[np.bool_], penalty: float = 1.0, steps: int = 50) -> Logistic:
        """Fit by Newton's method.

        The loss is sum log(1 + exp(-y z)) + penalty / 2 |w|^2 with a free bias: scikit-learn's with C = 1 /
        penalty. Features without spread in ``rows`` count nothing.

        Args:
            rows: [cases, features].
            labels: True for the second class; both must be there.
            penalty: > 0.
            steps: at most so many Newton steps; each halves until the loss falls.
        """
        mean, scale = rows.mean(axis=0), rows.std(axis=0)
        scale = np.where(scale > 0, scale, np.inf)
        x = np.hstack([(rows - mean) / scale, np.ones((len(rows), 1))])
        ridge = np.append(np.full(rows.shape[1], penalty), 0.0)
        y, w = labels.astype(float), np.zeros(x.shape[1])

        def loss(w: F64) -> float:
            z = x @ w
            return float(np.sum(np.logaddexp(0, z) - y * z) + ridge @ w**2 / 2)

        for _ in range(steps):
            p = expit(x @ w)
            slope = x.T @ (p - y) + ridge * w
            curve = (x * (p * (1 - p))[:, None]).T @ x + np.diag(ridge)
            step = np.linalg.lstsq(curve, slope, rcond=None)[0]
            before, size = loss(w), 1.0
            while loss(w - size * step) > before and size > 1e-6:
                size /= 2
            w = w - size * step
            if np.max(np.abs(slope)) < 1e-9:
                break
        return cls(mean=mean, scale=scale, weights=w[:-1], bias=float(w[-1]))

    def score(self, rows: F64) -> F64:
        """Log odds of the second class, [cases]."""
        return np.asarray((rows - self.mean) / self.scale @ self.weights + self.bias)
