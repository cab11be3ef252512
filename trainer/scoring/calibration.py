"""How true a scorer's numbers are: it looks at drawn people whose expressions are known to the last digit.

The people are drawn for this alone: their seeds are neither those of a recipe nor those that the shipped
models were trained on. Every person is shown neutral and with each expression at each intensity, so the truth
of every picture is known for all twelve expressions. What is found holds for drawn faces; a model may see
photographs better or worse, and the confusions show which words of a rubric it does not tell apart.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from trainer.data.blobs import Blobs, encode_png
from trainer.evaluation.report import Curve, Value
from trainer.evaluation.statistics import Sample, estimate
from trainer.portraits.expressions import EXPRESSIONS
from trainer.portraits.renderer import Domain, identity, one_hot, pose, render
from trainer.progress import Progress, silent
from trainer.scoring.scorer import Picture, Scored, Scorer

DEFINITIONS_VERSION = "2"
FIRST_IDENTITY = 80_000
"""Seed of the first person: no shipped recipe, test or model uses the people from here on."""
_BINS = 10
_WORST = 8
_PEOPLE_AT_ONCE = 4


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Sight(_Frozen):
    """How one expression is seen; t is the true intensity, s the score of the expression.

    Attributes:
        curve: mean of s for each t, with its 95 % interval over people; at t = 0 of neutral faces.
        slope, offset: least-squares line s = slope t + offset over neutral faces and faces with the
            expression; 1 and 0 are ideal.
        mae: mean of abs(s - t) over all pictures, of which most lack the expression.
        absent: mean of s over pictures of the other expressions: what leaks in; 0 is ideal.
        spearman: rank correlation of s and t over neutral faces and faces with the expression, -1 to 1.
        ece: expected calibration error: pictures in ten equal bins by s, the mean over pictures of
            abs(mean s - mean t) of their bin; 0 is ideal, 1 the worst of scores in 0 to 1. After Guo et al.,
            "On calibration of modern neural networks", 2017, with intensities in the place of hits.
    """

    curve: Curve
    slope: float
    offset: float
    mae: float
    absent: float
    spearman: float
    ece: float


class Miss(_Frozen):
    """A picture that was scored far from its truth, named so that it can be drawn again."""

    domain: Domain
    identity: int
    expression: str | None
    intensity: float
    wrong: str
    score: float
    truth: float


class CalibrationReport(_Frozen):
    """What was found.

    Attributes:
        scorer: its name.
        definitions: version of the formulas.
        people: how many of each domain.
        first_identity: seed of the first; the others follow.
        intensities: of each expression, beside the neutral face.
        size: side of the pictures in pixels.
        images: pictures that were shown.
        status: how many were scored, in review (they count here) and quarantined (they do not).
        reasons: why pictures were quarantined.
        sights: one for each of the twelve expressions.
        top1: share of faces at the highest intensity whose strongest score is the drawn expression.
        confusion: rates, drawn expressions down and strongest scores across; rows sum to 1, or to 0 where
            no picture has a score.
        worst: the largest errors.
    """

    scorer: str
    definitions: str = DEFINITIONS_VERSION
    people: dict[str, int]
    first_identity: int
    intensities: tuple[float, ...]
    size: int
    images: int
    status: dict[str, int]
    reasons: dict[str, int]
    sights: tuple[Sight, ...]
    top1: Value
    confusion: tuple[tuple[float, ...], ...]
    worst: tuple[Miss, ...]

    def mean(self, name: str) -> float:
        """Return the mean of a number over the twelve expressions."""
        return float(np.mean([getattr(sight, name) for sight in self.sights]))


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Who is shown.

    Attributes:
        people: how many of each domain.
        first_identity: seed of the first.
        intensities: rising, each above 0; the last one is that of the confusions.
        size: side of the pictures in pixels.
    """

    people: dict[Domain, int]
    first_identity: int = FIRST_IDENTITY
    intensities: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    size: int = 64

    @property
    def seeds(self) -> list[tuple[Domain, int]]:
        """Domain and seed of each person."""
        domains = [domain for domain in sorted(self.people) for _ in range(self.people[domain])]
        return [(domain, self.first_identity + number) for number, domain in enumerate(domains)]

    @property
    def faces(self) -> list[tuple[str | None, float]]:
        """What each person shows."""
        return [(None, 0.0), *((name, level) for name in EXPRESSIONS for level in self.intensities)]


def calibrate(scorer: Scorer, plan: Plan, progress: Progress = silent) -> CalibrationReport:
    """Show people to a scorer and compare.

    Args:
        scorer: sees the twelve expressions.
        plan: who is shown.
        progress: is told after every few people.

    Raises:
        ValueError: the plan has no people, or no picture was scored.
        ApiError: see `Scorer`.
    """
    faces, seeds = plan.faces, plan.seeds
    if not seeds:
        raise ValueError("a calibration needs people")
    found: list[Scored] = []
    with tempfile.TemporaryDirectory(prefix="calibration-") as folder:
        for begin in range(0, len(seeds), _PEOPLE_AT_ONCE):
            blobs = Blobs(Path(folder) / str(begin))
            shown = [
                Picture(digest=blobs.add(encode_png(draw(person, face, plan.size)), "image/png"), blobs=blobs)
                for person in seeds[begin : begin + _PEOPLE_AT_ONCE]
                for face in faces
            ]
            found += scorer(shown)
            progress("calibrate", min(begin + _PEOPLE_AT_ONCE, len(seeds)), len(seeds), "people")
    order = [scorer.expressions.index(name) for name in EXPRESSIONS]
    missing = [float("nan")] * len(EXPRESSIONS)
    scores = np.array([[one.scores[place] for place in order] if one.scores else missing for one in found])
    truth = np.array([one_hot(name or "neutral", level) for _ in seeds for name, level in faces], np.float64)
    people = np.repeat(np.arange(len(seeds)), len(faces))
    if not np.isfinite(scores).any():
        raise ValueError(f"{scorer.name} scored no picture")
    return CalibrationReport(
        scorer=scorer.name,
        people={domain: count for domain, count in plan.people.items() if count},
        first_identity=plan.first_identity,
        intensities=plan.intensities,
        size=plan.size,
        images=len(found),
        status=dict(Counter(one.status for one in found)),
        reasons=dict(Counter(str(one.reason) for one in found if one.status == "quarantined").most_common(9)),
        sights=tuple(sight(number, truth, scores, people) for number in range(len(EXPRESSIONS))),
        top1=top1(truth, scores, people),
        confusion=tuple(map(tuple, confusion(truth, scores).tolist())),
        worst=_worst(plan, truth, scores),
    )


def draw(person: tuple[Domain, int], face: tuple[str | None, float], size: int) -> np.ndarray:
    """Return a person with an expression (None is neutral) at an intensity, uint8 [size, size, 3]."""
    domain, seed = person
    name, level = face
    return render(identity(seed, domain), one_hot(name or "neutral", level), size, pose(seed))


def sight(number: int, truth: np.ndarray, scores: np.ndarray, people: np.ndarray) -> Sight:
    """Return how an expression is seen; see `Sight` for the formulas.

    Args:
        number: of the expression.
        truth: [N, 12] intensities.
        scores: [N, 12]; rows of NaN have no score and are left out.
        people: [N] which person it is.
    """
    there = np.isfinite(scores).all(axis=1)
    truth, scores, people = truth[there], scores[there], people[there]
    t, s = truth[:, number], scores[:, number]
    neutral = truth.max(axis=1) == 0
    own = neutral | (t > 0)
    levels = sorted(set(t[own].tolist()))
    means = [_value(s[own & (t == level)], people[own & (t == level)]) for level in levels]
    slope, offset = line(t[own], s[own])
    return Sight(
        curve=Curve(expression=EXPRESSIONS[number], asked=tuple(levels), judged=tuple(means)),
        slope=slope,
        offset=offset,
        mae=float(np.abs(s - t).mean()),
        absent=float(s[~own].mean()) if (~own).any() else 0.0,
        spearman=spearman(t[own], s[own]),
        ece=calibration_error(t, s),
    )


def line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Return slope and offset of the least-squares line; slope 0 where x does not move."""
    dx = x - x.mean()
    spread = float((dx**2).sum())
    slope = float((dx * (y - y.mean())).sum() / spread) if spread > 0 else 0.0
    return slope, float(y.mean() - slope * x.mean())


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Return the rank correlation, ties with the mean of their ranks; 0 where one of both does not move."""
    a, b = _ranks(x), _ranks(y)
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a**2).sum() * (b**2).sum()))
    return float((a * b).sum() / scale) if scale > 0 else 0.0


def calibration_error(truth: np.ndarray, scores: np.ndarray, bins: int = _BINS) -> float:
    """Return the expected calibration error, see `Sight`; scores outside of 0 to 1 go to the outer bins."""
    bin_of = np.clip((scores * bins).astype(int), 0, bins - 1)
    counts = np.bincount(bin_of, minlength=bins)
    gap = np.abs(np.bincount(bin_of, scores - truth, minlength=bins))
    return float(gap[counts > 0].sum() / len(scores))


def top1(truth: np.ndarray, scores: np.ndarray, people: np.ndarray) -> Value:
    """Return the share of faces at the highest intensity whose strongest score is what was drawn."""
    asked = (truth.max(axis=1) == truth.max()) & np.isfinite(scores).all(axis=1)
    hits = scores[asked].argmax(axis=1) == truth[asked].argmax(axis=1)
    return _value(hits.astype(np.float64), people[asked], rate=True)


def confusion(truth: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return rates [12, 12] of the strongest score (across) for what was drawn (down), highest intensity."""
    asked = (truth.max(axis=1) == truth.max()) & np.isfinite(scores).all(axis=1)
    counts = np.zeros((len(EXPRESSIONS), len(EXPRESSIONS)))
    np.add.at(counts, (truth[asked].argmax(axis=1), scores[asked].argmax(axis=1)), 1)
    return np.asarray(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1))


def _value(values: np.ndarray, people: np.ndarray, *, rate: bool = False) -> Value:
    """Return a mean over pictures with its interval over people, whose pictures are not independent."""
    _, whose = np.unique(people, return_inverse=True)
    return Value.of(estimate(Sample.rows(values, whose, int(whose.max()) + 1, rate=rate)))


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return np.asarray((last - (counts - 1) / 2)[place])


def _worst(plan: Plan, truth: np.ndarray, scores: np.ndarray) -> tuple[Miss, ...]:
    """Return the pictures with the largest errors, of each person one."""
    errors = np.nan_to_num(np.abs(scores - truth), nan=-1.0)
    faces, seeds = plan.faces, plan.seeds
    found: dict[int, Miss] = {}
    for row in np.argsort(-errors.max(axis=1), kind="stable"):
        person, face = divmod(int(row), len(faces))
        if person in found or errors[row].max() < 0:
            continue
        wrong = int(errors[row].argmax())
        found[person] = Miss(
            domain=seeds[person][0],
            identity=seeds[person][1],
            expression=faces[face][0],
            intensity=faces[face][1],
            wrong=EXPRESSIONS[wrong],
            score=float(scores[row, wrong]),
            truth=float(truth[row, wrong]),
        )
        if len(found) == _WORST:
            break
    return tuple(found.values())
