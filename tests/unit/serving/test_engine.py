"""Edits are deterministic, batches equal single edits, and refusals are explained."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from registry.admission import VerifiedAdapter
from registry.manifest import BaseModelRef
from serving.bases import register
from serving.engine import EditEngine
from serving.errors import (
    BaseNotFound,
    Cancelled,
    CandidateRefused,
    ConditioningError,
    StrengthOutOfRange,
    UnknownExpression,
    UsageError,
    WrongBase,
)
from serving.schema import EditRequest, EditResult

Make = Callable[..., VerifiedAdapter]


class Counting:
    """The pipeline with its calls counted; every call still does its work."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline, self.prompts, self.images, self.batches = pipeline, [], 0, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipeline, name)

    def encode_prompts(self, images: Any, prompts: Any, size: Any = None) -> Any:
        self.prompts += prompts
        return self._pipeline.encode_prompts(images, prompts, size)

    def encode_images(self, images: Any, size: Any = None) -> torch.Tensor:
        self.images += len(images)
        return self._pipeline.encode_images(images, size)

    def advance(self, runs: Any) -> None:
        self.batches.append(sum(len(run) for run in runs))
        self._pipeline.advance(runs)
        self.latents = torch.cat([run.latents for run in runs])


@pytest.fixture
def counting(pipeline: Any) -> Counting:
    return Counting(pipeline)


@pytest.fixture
def engine(counting: Counting, make_adapter: Make) -> EditEngine:
    engine = EditEngine(counting, base=make_adapter(1).card.base, allow_candidates=True)
    engine.attach(make_adapter(1))
    return engine


def request(image: Any, **values: Any) -> EditRequest:
    return EditRequest(**{"image": image, "expressions": {"happy": 0.8}, "steps": 2, **values})


def pixels(result: EditResult) -> np.ndarray:
    return np.asarray(result.image)


def test_an_edit_says_what_made_it(engine: EditEngine, portrait: Image.Image) -> None:
    result = engine.edit(request(portrait, seed=5, strength=0.9))
    assert (result.image.size, result.image.mode) == ((64, 64), "RGB")
    assert result.facts() == {
        "adapter": None,
        "adapter_digest": str(engine.adapter.digest),
        "base": "adapter-foundry/portraits-base",
        "base_revision": "test",
        "expressions": {"happy": 0.8},
        "strength": 0.9,
        "stacked": [],
        "seed": 5,
        "steps": 2,
        "size": [64, 64],
    }


def test_a_strength_that_nobody_names_is_one_that_is_signed(
    engine: EditEngine, make_adapter: Make, portrait: Image.Image
) -> None:
    assert engine.edit(request(portrait)).strength == 1.0
    for low, high, usual in ((0.0, 0.8, 0.8), (1.2, 2.0, 1.2), (-2.0, -0.5, -0.5)):
        adapter = make_adapter(1, conditioning={"strength_min": low, "strength_max": high})
        (swept,) = engine.sweep(portrait, adapter, [{}], steps=1)
        assert (swept.strength, engine.edit(request(portrait, expressions={})).strength) == (usual, usual)


def test_the_same_request_gives_the_same_picture(engine: EditEngine, portrait: Image.Image) -> None:
    first = engine.edit(request(portrait, seed=5))
    torch.manual_seed(99)
    assert np.array_equal(pixels(engine.edit(request(portrait, seed=5))), pixels(first))
    assert not np.array_equal(pixels(engine.edit(request(portrait, seed=6))), pixels(first))


def test_bytes_and_pictures_are_the_same_input(engine: EditEngine, portrait: Image.Image) -> None:
    buffer = io.BytesIO()
    portrait.save(buffer, "PNG")
    from_bytes = engine.edit(request(buffer.getvalue()))
    assert np.array_equal(pixels(from_bytes), pixels(engine.edit(request(portrait))))


def test_a_sweep_equals_single_edits_and_encodes_once(
    engine: EditEngine, counting: Counting, make_adapter: Make, portrait: Image.Image
) -> None:
    rows = [{}, {"happy": 0.5}, {"happy": 1.0, "sad": 0.3}, {"sad": 1.5}]
    swept = engine.sweep(portrait, engine.adapter, rows, seed=3, steps=2)
    together = counting.latents
    assert counting.prompts == [
        "show a neutral expression",
        "show a happy expression",
        "show a sad expression",
    ]
    assert (counting.images, counting.batches) == (1, [4, 4])
    for index, row in enumerate(rows):
        single = engine.edit(request(portrait, expressions=row, seed=3))
        torch.testing.assert_close(counting.latents[0], together[index], rtol=0, atol=1e-5)
        assert np.abs(pixels(single).astype(int) - pixels(swept[index])).max() <= 1
        assert swept[index].expressions == row


def test_strength_zero_is_the_base_alone(
    engine: EditEngine, counting: Counting, portrait: Image.Image
) -> None:
    engine.edit(request(portrait, strength=0.0))
    without = counting.latents
    engine.detach()
    from serving.conditioning import interpolate

    neutral, happy = (
        counting.encode_prompts([portrait], [f"show a {word} expression"]) for word in ("neutral", "happy")
    )
    mixed = interpolate(neutral, {"happy": happy}, {"happy": 0.8})
    base = counting.denoise(counting.encode_images([portrait]), mixed, seeds=[0], steps=2)
    assert torch.equal(base, without)


def test_no_expression_is_the_neutral_prompt(engine: EditEngine, portrait: Image.Image) -> None:
    bare = engine.edit(request(portrait, expressions={}))
    zero = engine.edit(request(portrait, expressions={"happy": 0.0}))
    assert np.abs(pixels(bare).astype(int) - pixels(zero)).max() <= 1


def test_the_adapter_changes_the_picture(
    engine: EditEngine, counting: Counting, make_adapter: Make, portrait: Image.Image
) -> None:
    engine.edit(request(portrait))
    first = counting.latents
    engine.attach(make_adapter(2))
    engine.edit(request(portrait))
    assert not torch.allclose(counting.latents, first)
    engine.attach(make_adapter(1))
    engine.edit(request(portrait))
    assert torch.equal(counting.latents, first)


def test_a_request_can_insist_on_an_adapter(
    engine: EditEngine, make_adapter: Make, portrait: Image.Image
) -> None:
    assert engine.edit(request(portrait, adapter=str(engine.adapter.digest)))
    with pytest.raises(UsageError, match="asks for the adapter 'pixelsmile:3'"):
        engine.edit(request(portrait, adapter="pixelsmile:3"))
    engine.detach()
    with pytest.raises(UsageError, match="no adapter is attached"):
        engine.edit(request(portrait))


def test_an_unknown_expression_names_the_nearest(engine: EditEngine, portrait: Image.Image) -> None:
    with pytest.raises(UnknownExpression, match="did you mean 'surprised'") as caught:
        engine.edit(request(portrait, expressions={"surprise": 1.0}))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "values", [{"expressions": {"happy": 1.6}}, {"expressions": {"happy": -0.1}}, {"strength": 1.51}]
)
def test_the_signed_range_holds(engine: EditEngine, portrait: Image.Image, values: dict[str, Any]) -> None:
    with pytest.raises(StrengthOutOfRange, match=r"signed for 0 to 1\.5"):
        engine.edit(request(portrait, **values))


@pytest.mark.parametrize(
    "values",
    [
        {"steps": 0},
        {"steps": 101},
        {"seed": -1},
        {"seed": 1 << 63},
        {"strength": float("nan")},
        {"expressions": {"happy": float("inf")}},
        {"expressions": {str(index): 1.0 for index in range(13)}},
        {"expressions": {"": 1.0}},
        {"seed": "7"},
        {"loud": True},
    ],
)
def test_a_request_has_limits(portrait: Image.Image, values: dict[str, Any]) -> None:
    asked = {"image": portrait, "expressions": {"happy": 1.0}, **values}
    with pytest.raises(UsageError, match="the request is not valid"):
        EditRequest.make(**asked)


def test_a_sweep_has_limits(engine: EditEngine, portrait: Image.Image) -> None:
    for rows in ([], [{"happy": 1.0}] * 65):
        with pytest.raises(UsageError, match="1 to 64 rows"):
            engine.sweep(portrait, engine.adapter, rows)


def test_a_candidate_is_refused_in_production(
    counting: Counting, make_adapter: Make, portrait: Image.Image
) -> None:
    candidate = make_adapter(1)
    engine = EditEngine(counting, base=candidate.card.base)
    with pytest.raises(CandidateRefused) as caught:
        engine.attach(candidate)
    assert caught.value.exit_code == 10
    with pytest.raises(CandidateRefused):
        engine.sweep(portrait, candidate, [{"happy": 1.0}])
    assert engine.adapter is None


@pytest.mark.parametrize("change", [{"revision": "other"}, {"id": "somebody/else"}])
def test_another_base_is_refused(counting: Counting, make_adapter: Make, change: dict[str, str]) -> None:
    adapter = make_adapter(1)
    base = adapter.card.base.model_copy(update=change)
    engine = EditEngine(counting, base=base, allow_candidates=True)
    with pytest.raises(WrongBase, match="was made for the base adapter-foundry/portraits-base") as caught:
        engine.attach(adapter)
    assert caught.value.exit_code == 14


def test_prompts_of_other_lengths_are_refused(
    counting: Counting, make_adapter: Make, portrait: Image.Image
) -> None:
    spec = {"expressions": ("happy", "quite unusually xylophonic")}
    adapter = make_adapter(1, conditioning=spec)
    engine = EditEngine(counting, base=adapter.card.base, allow_candidates=True)
    with pytest.raises(ConditioningError, match="cannot be interpolated"):
        engine.sweep(portrait, adapter, [{"quite unusually xylophonic": 1.0}], steps=1)


def test_steps_are_reported_and_can_stop_the_run(engine: EditEngine, portrait: Image.Image) -> None:
    seen: list[int] = []
    engine.edit(request(portrait, steps=3), on_step=lambda index, latents: seen.append(index) or True)
    assert seen == [0, 1, 2]
    with pytest.raises(Cancelled, match="after step 1"):
        engine.edit(request(portrait, steps=3), on_step=lambda index, latents: False)
    assert engine.edit(request(portrait))


def test_load_finds_a_registered_base(
    home: Path, tiny_base: Path, make_adapter: Make, portrait: Image.Image
) -> None:
    adapter = make_adapter(1)
    with pytest.raises(BaseNotFound, match="is not on this machine"):
        EditEngine.load(adapter.card.base, allow_candidates=True)
    register(tiny_base, adapter.card.base)
    engine = EditEngine.load(adapter.card.base, allow_candidates=True)
    engine.attach(adapter)
    assert engine.edit(request(portrait)).base == adapter.card.base
    other = BaseModelRef(**{**adapter.card.base.model_dump(), "revision": "2"})
    with pytest.raises(WrongBase, match="revision 2"):
        EditEngine.load(other)
