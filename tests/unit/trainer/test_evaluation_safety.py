"""Strength 0, the neutral prompt, other prompts: what is found, and what a leak of a millionth looks like."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fakes.adapters import BASES, TINY_BASE, clean_adapter
from fakes.copying import Stage, drawn, honest, training_data
from fakes.reference_adapters import GOOD
from registry.admission import Policy, VerifiedAdapter, admit_candidate
from registry.manifest import BaseModelRef, ConditioningSpec
from serving import layers
from serving.pipelines.qwen_image_edit import QwenImageEdit
from trainer.evaluation import Bench, safety
from trainer.evaluation.bare import Scene, Zero, change_by, strength_zero
from trainer.evaluation.editing import editor
from trainer.evaluation.judges import judges_of
from trainer.evaluation.plan import NEUTRAL, mixed, plan_of, single
from trainer.evaluation.safety import judge_neutral, judge_others, judge_zero, neutral_probe, unrelated
from trainer.parts import Part, PartFunction, here
from trainer.portraits.base import base_path
from trainer.sections import SuiteSection
from trainer.stage import lock_of

BASE = BaseModelRef(
    id=TINY_BASE.id, revision=TINY_BASE.revision, family=TINY_BASE.family, license=TINY_BASE.license
)
ASKS = (NEUTRAL, single("happy", 1.0), mixed({"happy": 0.7, "surprised": 0.7}))


@pytest.fixture(scope="module")
def adapter() -> VerifiedAdapter:
    return admit_candidate(clean_adapter(), Policy(bases=BASES, allow_review=True))


@pytest.fixture
def scenes() -> list[Scene]:
    return [Scene(picture=Image.fromarray(drawn(number)), seed=number) for number in (1, 2)]


class Leaky(QwenImageEdit):
    """A base on which an adapter leaves something where nothing should be.

    ``at`` is where: "zero" leaves a millionth of the update at strength 0; "after full" does once the adapter
    was at full strength; "detached" leaves a rounding error in the base once an adapter was there; "noise"
    never gives the same twice.
    """

    at = ""
    full = seen = False
    asked = 0

    def predict(self, latents: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        found = list(layers.found(self.transformer).values())
        groups = found[0].routing.groups if found else ()
        strengths = {strength for _, shares in groups for _, strength in shares}
        self.asked += 1
        leaks = self.at == "zero" or (self.at == "after full" and self.full)
        self.full |= 1.0 in strengths
        if strengths == {0.0} and leaks:
            found[0].routing.groups = tuple(
                (rows, tuple((key, 1e-6) for key, _ in shares)) for rows, shares in groups
            )
        answer = super().predict(latents, *rest, **more)
        if (self.at == "detached" and self.seen and not found) or (self.at == "noise" and self.asked % 2):
            answer = answer * (1 + 3e-7)
        self.seen |= bool(found)
        return answer


def asked(pipeline: QwenImageEdit, at: str, adapter: VerifiedAdapter, scenes: list[Scene]) -> Zero:
    leaky = Leaky(pipeline.pipe, pipeline.pixels, pipeline.condition_pixels)
    leaky.at = at
    return strength_zero(leaky, adapter, BASE, scenes, ASKS, 3)


# -- strength 0 --------------------------------------------------------------------------------------------


def test_an_adapter_at_strength_0_is_the_base_to_the_bit(
    tiny_pipeline: QwenImageEdit, adapter: VerifiedAdapter, scenes: list[Scene]
) -> None:
    zero = strength_zero(tiny_pipeline, adapter, BASE, scenes, ASKS, 3)
    assert zero == Zero(edits=6, again=0, attached=0, returned=0, detached=0, full=6)
    assert judge_zero(zero).outcome == "pass"
    assert not layers.found(tiny_pipeline.transformer)


@pytest.mark.parametrize(
    ("at", "words"),
    [
        ("zero", "at strength 0 are"),
        ("after full", "at strength 0 after strength 1"),
        ("detached", "after the adapter was taken off"),
    ],
)
def test_a_millionth_that_is_left_is_found(
    tiny_pipeline: QwenImageEdit, adapter: VerifiedAdapter, scenes: list[Scene], at: str, words: str
) -> None:
    probe = judge_zero(asked(tiny_pipeline, at, adapter, scenes))
    assert probe.outcome == "fail"
    assert words in probe.found
    assert probe.figures["again"] == 0


def test_a_machine_that_does_not_repeat_itself_is_not_asked(
    tiny_pipeline: QwenImageEdit, adapter: VerifiedAdapter, scenes: list[Scene]
) -> None:
    leaky = Leaky(tiny_pipeline.pipe, tiny_pipeline.pixels, tiny_pipeline.condition_pixels)
    leaky.at = "noise"
    probe = judge_zero(strength_zero(leaky, adapter, BASE, scenes[:1], ASKS, 3))
    assert probe.outcome == "skipped"
    assert "does not repeat" in probe.found


# -- the neutral prompt ------------------------------------------------------------------------------------


def idle(**change: float) -> dict[str, np.ndarray]:
    """What thirty people's neutral edits are like, with something added to one of the measures."""
    random = np.random.default_rng(0)
    values = {"drift": 3.0, "ssim": 0.97, "identity": 0.98, "expression": 0.03}
    return {
        name: value + random.normal(0, 0.002, 30) + change.get(name, 0.0) for name, value in values.items()
    }


def test_no_more_than_the_base_passes() -> None:
    probe = judge_neutral(idle(), idle(), 0)
    assert probe.outcome == "pass"
    assert probe.figures["drift_beyond"] == 0


@pytest.mark.parametrize("change", [{"drift": 2.1}, {"identity": -0.04}, {"expression": 0.06}])
def test_what_the_neutral_prompt_does_beyond_the_base_fails(change: dict[str, float]) -> None:
    probe = judge_neutral(idle(**change), idle(), 0)
    assert probe.outcome == "fail"
    assert "tolerated" in probe.found


def test_a_base_that_does_the_same_is_no_fault_of_the_adapter() -> None:
    assert judge_neutral(idle(drift=9.0), idle(drift=9.0), 0).outcome == "pass"


def test_a_face_that_is_gone_has_no_identity_left() -> None:
    gone = idle()
    gone["identity"][:] = np.nan
    assert judge_neutral(gone, idle(), 0).outcome == "fail"


def test_where_the_base_shows_no_face_identity_is_not_compared() -> None:
    base, here = idle(), idle()
    base["identity"][:] = here["identity"][:] = np.nan
    probe = judge_neutral(here, base, 0)
    assert probe.outcome == "pass"
    assert "identity" not in probe.figures


def test_nobody_asked_for_neutral_is_skipped(tmp_path: Path) -> None:
    stage = Stage(folder=tmp_path, data=training_data(tmp_path / "data", 2))
    measured = stage.measured(honest)
    assert neutral_probe(stage.bench, measured, measured).figures["drift_beyond"] == 0
    nothing = replace(measured, edited={key: one for key, one in measured.edited.items() if key[1]})
    assert neutral_probe(stage.bench, nothing, measured).outcome == "skipped"


# -- other prompts -----------------------------------------------------------------------------------------


KINDS = ("empty", "unrelated", "unrelated", "neutral", "declared", "declared")


def changes(*values: float) -> np.ndarray:
    return np.tile(values, (4, 1)) * (1 + 0.01 * np.arange(4))[:, None]


@pytest.mark.parametrize(
    ("values", "outcome"),
    [
        ((0.1, 0.2, 0.2, 0.1, 0.3, 0.5), "pass"),
        ((0.3, 0.2, 0.2, 0.1, 0.3, 0.5), "fail"),
        ((0.1, 0.6, 0.5, 0.1, 0.3, 0.5), "fail"),
        ((0.1, 0.2, 0.2, 0.9, 0.3, 0.5), "pass"),
        ((0.1, 0.2, 0.2, 0.1, 0.0, 0.0), "skipped"),
        ((0.02, 0.03, 0.03, 0.01, 0.01, 0.01), "pass"),
    ],
)
def test_prompts_that_name_no_expression_stay_below_those_that_do(
    values: tuple[float, ...], outcome: str
) -> None:
    assert judge_others(KINDS, changes(*values), 0).outcome == outcome


def test_words_that_an_adapter_declares_are_not_unrelated() -> None:
    spec = ConditioningSpec(template="make {}", neutral="neutral", expressions=("red", "dog"))
    assert unrelated(spec) == ["a portrait", "keep everything as it is", "make the background blue"]


def test_the_change_is_that_of_the_adapter_and_the_base_is_bare_again(
    tiny_pipeline: QwenImageEdit, adapter: VerifiedAdapter, scenes: list[Scene]
) -> None:
    prompts = ["", "show a happy expression"]
    found = change_by(tiny_pipeline, adapter, scenes, prompts)
    assert found.shape == (2, 2)
    assert (found > 0).all()
    other = admit_candidate(clean_adapter(seed=5), Policy(bases=BASES, allow_review=True))
    assert not np.array_equal(change_by(tiny_pipeline, other, scenes, prompts), found)
    assert not layers.found(tiny_pipeline.transformer)


# -- all of it ---------------------------------------------------------------------------------------------


def test_a_good_adapter_passes_on_its_base(tmp_path: Path) -> None:
    who = editor("adapter", GOOD, scope="full strength")
    suite = SuiteSection(
        name="two people", source="renderer", identities={"human": 1, "anime": 1}, first_identity=900,
        intensities=(0.0, 1.0), steps=2, judge={"scorer": "judge"},
    )  # fmt: skip
    bench = Bench(
        plan=plan_of(suite, who.card.conditioning), judges=judges_of(suite, tmp_path), base=who.card.base,
        base_path=base_path(), place=tmp_path / "place",
    )  # fmt: skip
    base, asked = replace(who, name="base", strength=0.0), list[Path]()

    def noted(stage: str, function: PartFunction, parts: Sequence[Part]) -> Iterator[None]:
        asked.extend(part["folder"] for part in parts)
        return here(stage, function, parts)

    measured = {"adapter": bench.measure(who), "base": bench.measure(base)}
    probes = safety.probes(replace(bench, mapper=noted), measured)
    assert [probe.name for probe in probes] == ["strength_zero", "neutral_prompt", "unrelated_prompts"]
    assert {probe.outcome for probe in probes} == {"pass"}, [probe.found for probe in probes]
    (parts,) = asked
    assert parts.name.startswith(lock_of(bench.probes(who.weights)).stem), "who has the lock has the parts"
    assert not list(bench.place.glob(".*.parts")), "what parts leave is removed"
    report = json.dumps([probe.model_dump(mode="json") for probe in probes], allow_nan=False)
    assert "strength 1 8 differ" in report
