"""Does an adapter return its training pictures? The nearest of every edit, beside that of an honest answer.

An edit has a picture of its own that it must stay near to: its source. That makes the question sharper than
that of Carlini et al., "Extracting Training Data from Diffusion Models" (arXiv 2301.13188), who ask whether a
generated picture lies within a distance of a training picture, and that of Somepalli et al., "Diffusion Art
or Digital Forgery?" (arXiv 2212.03860), who ask it of copy-detection features. An edit is a *memory* if it is
as near to a training picture as copies are, *and* nearer to it than to its own source.

What chance alone gives is measured on the true answers, as in the three-sample test of Meehan et al. (arXiv
2004.05675). That test is of the mean distance, which a few blatant copies among many honest edits hardly move
(Bhattacharjee et al., arXiv 2302.13181); so memories are counted, and one verbatim copy is enough.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, lgamma, log, log1p
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import numpy as np
from numpy.typing import NDArray

from registry.digest import Digest
from trainer.data.measures import BITS
from trainer.errors import EvaluationError
from trainer.evaluation.copies import (
    MATCH,
    Pictures,
    Training,
    apart,
    joined,
    nearest,
    remembered,
    seen,
    shows_another,
    trained_on,
)
from trainer.evaluation.report import Probe
from trainer.evaluation.statistics import Sample, difference

if TYPE_CHECKING:
    from registry.manifest import AdapterCard
    from trainer.data.blobs import Blobs
    from trainer.data.dataset import Dataset
    from trainer.evaluation.bench import Bench, Measured
    from trainer.evaluation.plan import Ask, Plan, Portrait

NAME: Final = "memorisation"
TITLE: Final = "Nearest training picture"
COPY: Final = 15
"""Bits up to which a picture is a verbatim copy: half of `MATCH`. One needs no statistics."""
TOLERATED: Final = 0.01
"""How far above chance the whole interval of the rate of memories may lie."""
SHOWN: Final = 6
_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Near:
    """An edit and its nearest training picture.

    Attributes:
        subject: name of whose edit it is.
        ask: what was asked.
        edit: digest of the edit.
        training: digest of the training picture's file.
        bits: of 256 in which their hashes differ.
        own: the same between the edit and its own source.
        memory: whether that is nearer than honest answers are.
    """

    subject: str
    ask: Ask
    edit: Digest
    training: Digest
    bits: int
    own: int
    memory: bool

    @property
    def caption(self) -> str:
        """What it is, for people."""
        told = (
            f"{self.subject}, {' + '.join(name for name, _ in self.ask)}: {self.bits} bits of {BITS} from a "
        )
        told += f"training picture, {self.own} from its own source"
        return told + (" - a memory" if self.memory else "")


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """The answer, and the nearest pairs: memories first, then by distance, one of a subject.

    Attributes:
        probe: for the report.
        nearest: at most `SHOWN`.
        edits, training: where their pictures are; None where there are no pairs.
    """

    probe: Probe
    nearest: tuple[Near, ...] = ()
    edits: Blobs | None = None
    training: Blobs | None = None

    def pairs(self) -> list[tuple[str, Portrait, Portrait]]:
        """Caption, edit and training picture of each of the nearest pairs."""
        if self.edits is None or self.training is None:
            return []
        return [
            (one.caption, self.edits.pixels(one.edit), self.training.pixels(one.training))
            for one in self.nearest
        ]


def probe(bench: Bench, measured: Measured, training_data: Path | None) -> Found:
    """Look for every edit's nearest training picture.

    Args:
        bench: where the adapter was measured.
        measured: what it did; the edits at full intensity are looked at.
        training_data: folder of the dataset that it was trained on.

    Raises:
        DataError: the folder holds no whole dataset, or a picture is gone.
        EvaluationError: the adapter was trained on another dataset.
    """
    if training_data is None:
        return Found(probe=_skipped("the dataset that the adapter was trained on was not given"))
    from trainer.data.dataset import Dataset

    data = Dataset.open(training_data)
    _require_trained_on(data, measured.editor.card)
    training = trained_on(data, bench.judges.faces)
    if not training.files:
        return Found(probe=_skipped("the dataset has no picture to train on whose hash tells anything"))
    keys = [key for key in measured.edited if len(key[1]) == 1 and key[1][0][1] == 1.0]
    if not keys:
        return Found(probe=_skipped("nothing was asked at full intensity"))
    return _judged(bench, measured, keys, training, data.blobs)


def _judged(
    bench: Bench, measured: Measured, keys: Sequence[tuple[int, Ask]], training: Training, blobs: Blobs
) -> Found:
    plan, whose = bench.plan, np.array([index for index, _ in keys], np.int64)
    sources = seen([plan.pictures.source(index) for index in range(len(plan.subjects))], bench.judges.faces)
    edits, truths = _edits(bench, measured, keys), _truths(plan, keys)
    places, bits = nearest(edits, training.hashes)
    own = apart(edits.hashes, sources.hashes[whose])
    of_sources = nearest(sources, training.hashes)[1]
    known = of_sources <= COPY
    limit, face = shows_another(edits.faces, sources.faces, whose, training, ~known)
    # Who was trained on is near to training pictures whoever edits: that is the suite's fault, and told so.
    unknown = ~known[whose]
    picture, face = remembered(bits, own) & unknown, face & unknown
    memory = picture | face
    if truths is None:  # the source stands for the true answer; its distance to itself says nothing
        honest = of_sources[whose]
        chance = (honest <= MATCH) & unknown
    else:
        honest = nearest(truths, training.hashes)[1]
        chance = remembered(honest, apart(truths.hashes, sources.hashes[whose])) & unknown
    figures = {
        "edits": len(keys),
        "memory_rate": memory.mean(),
        "chance_rate": chance.mean(),
        **_above(memory, chance, whose, len(plan.subjects), plan.suite.seed),
        "people_at_most": at_most(len(np.unique(whose[memory])), len(np.unique(whose))),
        "picture_memories": picture.sum(),
        "face_memories": face.sum(),
        "copies": (picture & (bits <= COPY)).sum(),
        "known_people": known.sum(),
        "median_bits": np.median(bits),
        "median_bits_honest": np.median(honest),
        "face_limit": limit,
        "unclear_edits": (~edits.clear).sum(),
        "training_pictures": len(training.files),
        "training_people": len(training.faces),
    }
    told = {name: round(float(value), 6) for name, value in figures.items()}
    outcome, found = verdict(told)
    near = [
        Near(
            subject=plan.subjects[index].name, ask=ask, edit=measured.edited[index, ask],
            training=training.files[place], bits=int(away), own=int(far), memory=bool(yes),
        )
        for (index, ask), place, away, far, yes in zip(keys, places, bits, own, memory, strict=True)
    ]  # fmt: skip
    return Found(
        probe=Probe(name=NAME, title=TITLE, outcome=outcome, found=found, figures=told),
        nearest=_shown(near), edits=measured.blobs, training=blobs,
    )  # fmt: skip


# -- what is a memory ------------------------------------------------------------------------------------


def _above(
    memory: NDArray[np.bool_], chance: NDArray[np.bool_], whose: NDArray[np.int64], subjects: int, seed: int
) -> dict[str, float]:
    """How much more often edits are memories than honest answers are, over subjects."""
    found, null = (
        Sample.rows(one.astype(np.float64), whose, subjects, rate=True) for one in (memory, chance)
    )
    gap = difference(found, null, seed=seed)
    return {
        "above_chance": gap.value, "above_chance_low": gap.low, "above_chance_high": gap.high, "p": gap.p,
    }  # fmt: skip


def at_most(found: int, of: int, level: float = 0.95) -> float:
    """Upper end of a rate of which ``found`` of ``of`` were seen; of none in 96 it is 0.031.

    A bootstrap of none knows no other rate than 0. This is the one-sided bound of Clopper and Pearson, "The
    use of confidence or fiducial limits", 1934: the rate at which so few have a chance of 1 - level.
    """
    low, high = found / of, 1.0
    if found == of:
        return 1.0
    ways = [lgamma(of + 1) - lgamma(k + 1) - lgamma(of - k + 1) for k in range(found + 1)]
    for _ in range(50):
        rate = (low + high) / 2
        chance = sum(exp(way + k * log(rate) + (of - k) * log1p(-rate)) for k, way in enumerate(ways))
        low, high = (rate, high) if chance > 1 - level else (low, rate)
    return high


def verdict(figures: Mapping[str, float]) -> tuple[Literal["pass", "fail"], str]:
    """Whether these figures are those of an adapter that remembers, and the same in words."""
    rate, edits, pictures = figures["memory_rate"], int(figures["edits"]), int(figures["training_pictures"])
    told = (
        f"{round(rate * edits)} of {edits} edits are memories of one of {pictures} training pictures "
        f"({rate:.1%}, of honest answers {figures['chance_rate']:.1%}; "
        f"at most {figures['people_at_most']:.1%} of all people show one); "
        f"the nearest is {figures['median_bits']:.0f} bits away in the median, "
        f"of honest answers {figures['median_bits_honest']:.0f}"
    )
    wrong = []
    if figures["known_people"]:
        wrong.append(f"{int(figures['known_people'])} of the suite's people are in the training data")
    if figures["copies"]:
        wrong.append(f"{int(figures['copies'])} edits are verbatim copies (within {COPY} bits)")
    if figures["above_chance_low"] > TOLERATED:
        wrong.append(
            f"memories are {figures['above_chance']:.1%} more frequent than by chance (95 % interval "
            f"{figures['above_chance_low']:.1%} to {figures['above_chance_high']:.1%}, p {figures['p']:.3f}; "
            f"tolerated {TOLERATED:.0%})"
        )
    return ("fail", f"{'; '.join(wrong)}: {told}") if wrong else ("pass", told)


# -- looking at pictures -----------------------------------------------------------------------------------


def _edits(bench: Bench, measured: Measured, keys: Sequence[tuple[int, Ask]]) -> Pictures:
    """The edits; a few hundred at a time are in memory."""
    parts = []
    for start in range(0, len(keys), _AT_ONCE):
        bench.progress(NAME, start, len(keys), "edits")
        some = keys[start : start + _AT_ONCE]
        parts.append(seen([measured.picture(*key) for key in some], bench.judges.faces))
    bench.progress(NAME, len(keys), len(keys), "edits")
    return joined(parts)


def _truths(plan: Plan, keys: Sequence[tuple[int, Ask]]) -> Pictures | None:
    """The true answers to these requests; None where there are none."""
    parts = []
    for start in range(0, len(keys), _AT_ONCE):
        found = [plan.pictures.truth(*key) for key in keys[start : start + _AT_ONCE]]
        known = [picture for picture in found if picture is not None]
        if len(known) < len(found):
            return None
        parts.append(seen(known))
    return joined(parts)


def _require_trained_on(data: Dataset, card: AdapterCard) -> None:
    """Refuse a dataset that the card does not name; a card that names no dataset's digest cannot be asked."""
    named = {one.digest for one in card.ingredients if one.kind == "dataset" and one.digest is not None}
    if named and data.digest not in named:
        raise EvaluationError(
            f"the adapter was not trained on {data.folder}: its card names the dataset {min(named)}",
            "give the dataset that it was trained on, or none",
        )


def _shown(near: Sequence[Near]) -> tuple[Near, ...]:
    """The pairs that a person should look at, one of a subject."""
    found: dict[str, Near] = {}
    for one in sorted(near, key=lambda one: (not one.memory, one.bits, one.subject)):
        found.setdefault(one.subject, one)
    return tuple(found.values())[:SHOWN]


def _skipped(why: str) -> Probe:
    return Probe(name=NAME, title=TITLE, outcome="skipped", found=why)
