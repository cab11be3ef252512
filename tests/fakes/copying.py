"""Editors that answer with drawn pictures, and the small dataset that they were trained on; no model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fakes.adapters import card
from fakes.datasets import small_dataset
from registry.digest import Digest, digest_bytes
from registry.manifest import AdapterCard, BaseModelRef, ConditioningSpec
from trainer.data.blobs import Blobs, encode_png
from trainer.data.dataset import Dataset
from trainer.evaluation.bench import Bench, Measured
from trainer.evaluation.editing import Edited, Editor
from trainer.evaluation.judges import judges_of
from trainer.evaluation.plan import Ask, Plan, Portrait, plan_of
from trainer.evaluation.readings import VALUES, Readings
from trainer.portraits.renderer import Domain, identity, one_hot, pose, render
from trainer.sections import SuiteSection

EXPRESSIONS = ("fear", "surprised", "happy", "sad")
BASE = BaseModelRef(id="nobody/nothing", revision="1", family="qwen-image-edit", license="Apache-2.0")

Answer = Callable[[Plan, int, Ask], Portrait]
"""What an editor returns for a subject and a request."""


def drawn(number: int, expression: str = "neutral", *, place: int | None = None) -> Portrait:
    """A person of the portrait world: anime if the number is odd. ``place`` is the number of another pose."""
    domain: Domain = "anime" if number % 2 else "human"
    where = pose(number if place is None else place)
    return render(identity(number, domain), one_hot(expression), place=where)


def training_data(folder: Path, people: int = 12, first: int = 100) -> Path:
    """A dataset of drawn people, neutral, in fear and surprised; the last of them is for the validation."""
    numbers = range(first, first + people)
    return small_dataset(
        folder,
        [
            (
                "validation" if number == numbers[-1] else "train",
                f"person {number}",
                [drawn(number), drawn(number, "fear"), drawn(number, "surprised")],
            )
            for number in numbers
        ],
    )


@dataclass(frozen=True)
class Stage:
    """A bench with ten held-out people, and editors that answer as they are told.

    Attributes:
        folder: for what is written.
        data: folder of the dataset.
        first: number of the first held-out person.
    """

    folder: Path
    data: Path
    first: int = 900

    @cached_property
    def bench(self) -> Bench:
        suite = SuiteSection(
            name="ten people", source="renderer", identities={"human": 6, "anime": 4},
            first_identity=self.first, intensities=(0.0, 1.0), steps=2, judge={"scorer": "judge"},
        )  # fmt: skip
        spec = ConditioningSpec(template="show a {} expression", neutral="neutral", expressions=EXPRESSIONS)
        return Bench(
            plan=plan_of(suite, spec), judges=judges_of(suite, self.folder), base=BASE, base_path=self.folder,
            place=self.folder / "place",
        )  # fmt: skip

    @property
    def training(self) -> list[Portrait]:
        """The pictures that were trained on."""
        data = Dataset.open(self.data)
        return data.pictures([row for one in data.triplets if one.split == "train" for row in one.rows])

    def card(self, dataset: Digest | None = None) -> AdapterCard:
        """The card of an adapter that was trained on the dataset, or on another one."""
        values: dict[str, Any] = card()
        values["ingredients"][1]["digest"] = str(dataset or Dataset.open(self.data).digest)
        return AdapterCard.model_validate(values)

    def measured(self, answer: Answer, *, dataset: Digest | None = None, name: str = "edits") -> Measured:
        """What an editor did that answers so."""
        plan, blobs, edited = self.bench.plan, Blobs(self.folder / name), Edited()
        for index, subject in enumerate(plan.subjects):
            for ask in subject.asks:
                edited[index, ask] = blobs.add(encode_png(answer(plan, index, ask)), "image/png")
        editor = Editor(
            name="adapter", folder=self.folder, weights=digest_bytes(b""), card=self.card(dataset)
        )
        return Measured(editor=editor, readings=unread(edited, len(plan.judged)), edited=edited, blobs=blobs)


def unread(edited: Edited, judged: int, values: Mapping[str, float] | None = None) -> Readings:
    """Readings of pictures that nobody looked at, or that all have the same values."""
    told = {name: float("nan") for name in VALUES} | dict(values or {})
    return Readings(
        subjects=np.array([index for index, _ in edited], np.int64),
        asks=tuple(ask for _, ask in edited),
        judged=np.zeros((len(edited), judged)),
        values={name: np.full(len(edited), value) for name, value in told.items()},
    )


def honest(plan: Plan, index: int, ask: Ask) -> Portrait:
    """The true answer, with the noise of a model."""
    picture = plan.pictures.truth(index, ask)
    assert picture is not None
    noise = np.random.default_rng([index, len(ask)]).normal(0, 6, picture.shape)
    return np.clip(picture + noise, 0, 255).astype(np.uint8)


def copying(training: list[NDArray[np.uint8]], share: float = 1.0, every: int = 1) -> Answer:
    """An editor that blends a training picture into every n-th edit; ``share`` 1 is the whole picture."""

    def answer(plan: Plan, index: int, ask: Ask) -> Portrait:
        place = index * 31 + sum(map(ord, "".join(name for name, _ in ask)))
        picture = honest(plan, index, ask)
        if place % every:
            return picture
        return (share * training[place % len(training)] + (1 - share) * picture).round().astype(np.uint8)

    return answer
