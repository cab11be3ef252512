"""Adapters stacked under another: both updates at once, and the schedule that a distilled one wants."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from fakes.followed import PROD
from fakes.stacks import UNDER, two_adapters
from fakes.tiny_bases import inputs
from registry.manifest import BaseModelRef
from registry.reference import Reference
from serving import bases, pipelines, settings
from serving.adapters import AdapterSlots
from serving.engine import EditEngine
from serving.errors import UsageError
from serving.local import LocalBackend
from serving.schedules import Schedule, course, shifted
from serving.schema import DEFAULT_STEPS, SweepRequest
from serving.settings import ServingSettings
from trainer.portraits.base import base_path
from trainer.portraits.bases import build

BASE = BaseModelRef(
    id="adapter-foundry/portraits-base", revision="test", family="qwen-image-edit", license="Apache-2.0"
)
LIGHTNING = Schedule(steps=4, shift=3.0)


class Named:
    """What `course` looks at: a signed name."""

    def __init__(self, name: str) -> None:
        self.manifest = type("Manifest", (), {"name": name})()


def asked(portrait: Any, **values: Any) -> SweepRequest:
    return SweepRequest.make(image=portrait, rows=({"happy": 0.8}, {}), seed=4, **values)


def run(engine: EditEngine, request: SweepRequest, stack: Any) -> Any:
    begun = engine.begin(request, stack)
    while not begun.done:
        engine.advance([begun])
    return engine.finish(begun)


def test_a_stack_adds_both_updates(pipeline: Any, make_adapter: Any) -> None:
    """Each module's output is that of W + s1 B1 A1 + s2 B2 A2, for adapters of unlike rank and targets."""
    expression, distilled = make_adapter(1), make_adapter(2, rank=2, targets=("attn.to_q", "img_mlp.net.2"))
    slots = AdapterSlots(pipeline)
    first, second = slots.load(expression), slots.load(distilled)
    given = inputs(pipeline, 2)
    stack = ((expression, 0.7), (distilled, 1.0))
    with torch.no_grad(), slots.routed([stack] * 2):
        together = pipeline.predict(**given)
    linears = {where: layer.base_layer for where, layer in slots._layers.items()}
    before = {where: base.weight.data.clone() for where, base in linears.items()}
    with torch.no_grad():
        for resident, strength in ((first, 0.7), (second, 1.0)):
            for where, update in resident.updates.items():
                linears[where].weight.data += strength * (update.b @ update.a)
        with slots.routed([()] * 2):
            added = pipeline.predict(**given)
        for where, weight in before.items():
            linears[where].weight.data.copy_(weight)
        with slots.routed([((expression, 0.7),)] * 2):
            alone = pipeline.predict(**given)
    torch.testing.assert_close(together, added, rtol=1e-4, atol=1e-5)
    assert float((together - alone).abs().max()) > 1e-3
    slots.detach()


def test_the_order_of_a_stack_decides_who_conditions_and_nothing_else(
    tiny_base: Path, portrait: Any, make_adapter: Any
) -> None:
    engine = EditEngine(pipelines.load("qwen-image-edit", tiny_base), base=BASE, allow_candidates=True)
    one = make_adapter(1)
    other = make_adapter(2, conditioning={"template": "make it a {} face"})
    results = [
        run(engine, asked(portrait, steps=2), stack)
        for stack in (((one, 1.0), (other, 1.0)), ((other, 1.0), (one, 1.0)))
    ]
    for (first, *_), adapter, under in zip(results, (one, other), (other, one), strict=True):
        assert first.adapter_digest == adapter.digest
        assert [used.digest for used in first.stacked] == [under.digest]
        assert first.facts()["stacked"] == [{"adapter": None, "digest": str(under.digest), "strength": 1.0}]
    assert results[0][0].image.tobytes() != results[1][0].image.tobytes()  # other prompts


def test_the_static_shift_is_that_of_the_scheduler_that_lightning_publishes() -> None:
    """Its `scheduler_config`: base_shift = max_shift = log(3), exponential, no terminal level."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(
        base_image_seq_len=256, base_shift=math.log(3), max_image_seq_len=8192, max_shift=math.log(3),
        shift=1.0, shift_terminal=None, time_shift_type="exponential", use_dynamic_shifting=True,
    )  # fmt: skip
    for steps in (4, 8, 50):
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=math.log(3))
        assert shifted(steps, 3.0) == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)
    assert shifted(4, 1.0) == [1.0, 0.75, 0.5, 0.25, 0.0]


@pytest.mark.parametrize("family", ["qwen-image-edit", "flux", "flux-kontext", "flux2-klein"])
def test_a_shift_takes_the_place_of_the_bases_own_schedule(
    family: str, tmp_path: Path, portrait: Any
) -> None:
    pipeline = pipelines.load(family, build(family, tmp_path / "base"))
    portrait = portrait.resize(pipeline.size[::-1])
    prompts, source = pipeline.encode_prompts([portrait], ["a face"]), pipeline.encode_images([portrait])
    own = pipeline.begin(source, prompts, seeds=[1], steps=4)
    static = pipeline.begin(source, prompts, seeds=[1], steps=4, shift=3.0)
    left = len(static.levels)  # text-to-image bases begin in the middle
    assert static.levels == pytest.approx(tuple(shifted(4, 3.0)[-left:]))
    assert own.levels != static.levels


@pytest.mark.parametrize("family", ["sd3", "sdxl", "sd15"])
def test_a_base_without_a_shift_says_so(family: str, tmp_path: Path, portrait: Any) -> None:
    pipeline = pipelines.load(family, build(family, tmp_path / "base"))
    portrait = portrait.resize(pipeline.size[::-1])
    prompts, source = pipeline.encode_prompts([portrait], ["a face"]), pipeline.encode_images([portrait])
    with pytest.raises(UsageError, match="has no shift"):
        pipeline.begin(source, prompts, seeds=[1], steps=4, shift=3.0)


def test_a_request_without_steps_takes_those_that_the_adapters_want() -> None:
    schedules = {"lightning": LIGHTNING, "turbo": Schedule(steps=2), "fast": Schedule(steps=4, shift=3.0)}
    plain, lightning, turbo = ((Named(name), 1.0) for name in ("pixelsmile", "lightning", "turbo"))
    unsigned: Any = (type("Candidate", (), {"manifest": None})(), 1.0)

    def of(*stack: Any, asked: int | None = None) -> tuple[int, float | None]:
        found = course(schedules, stack, asked, DEFAULT_STEPS)
        return found.steps, found.shift

    assert of(plain) == (8, None)
    assert of(unsigned) == (8, None)
    assert of(plain, lightning) == (4, 3.0)
    assert of(plain, lightning, asked=6) == (6, 3.0)
    assert of(plain, (lightning[0], 0.0)) == (8, None)  # nothing of it is there
    assert of(turbo) == (2, None)
    assert of(lightning, (Named("fast"), 1.0)) == (4, 3.0)  # they want the same
    with pytest.raises(UsageError, match="lightning and turbo want different schedules"):
        of(plain, lightning, turbo)


def test_schedules_are_settings(tmp_path: Path) -> None:
    env = {"ADAPTER_FOUNDRY_SERVING_SCHEDULES": '{"qwen-lightning": {"steps": 8, "shift": 3.0}}'}
    found = settings.load(env, home=tmp_path)
    assert found.schedules == {"qwen-lightning": Schedule(steps=8, shift=3.0)}
    (tmp_path / "adapter-foundry.toml").write_text(
        "[serving.schedules.qwen-lightning]\nsteps = 4\nshift = 3\n"
    )
    assert settings.load({}, home=tmp_path).schedules == {"qwen-lightning": Schedule(steps=4, shift=3.0)}
    for wrong in ({"steps": 0}, {"shift": 0}, {"shift": float("inf")}, {"mu": 1.1}):
        with pytest.raises(ValidationError):
            Schedule.model_validate(wrong)


def test_rows_on_different_schedules_share_their_steps(home: Path, portrait: Any) -> None:
    """Each picture equals that of its run alone, and says on which schedule it was made."""
    registry = two_adapters(home)
    expression, distilled = (registry.load(Reference.parse(one)) for one in (PROD, UNDER))
    engine = EditEngine(
        pipelines.load("qwen-image-edit", base_path()), base=expression.card.base,
        schedules={"lightning": LIGHTNING},
    )  # fmt: skip
    fast, slow = ((expression, 1.0), (distilled, 1.0)), ((expression, 1.0),)
    alone = [run(engine, asked(portrait), stack) for stack in (fast, slow)]
    assert (alone[0][0].steps, alone[0][0].shift) == (4, 3.0)
    assert (alone[0][0].facts()["steps"], alone[0][0].facts()["shift"]) == (4, 3.0)
    assert (alone[1][0].steps, alone[1][0].shift) == (8, None)
    assert "shift" not in alone[1][0].facts()
    runs = [engine.begin(asked(portrait), stack) for stack in (fast, slow)]
    while any(not one.done for one in runs):
        engine.advance([one for one in runs if not one.done])
    for begun, want in zip(runs, alone, strict=True):
        for result, single in zip(engine.finish(begun), want, strict=True):
            difference = np.asarray(result.image, dtype=int) - np.asarray(single.image, dtype=int)
            assert np.abs(difference).max() <= 1


def test_a_distilled_adapter_in_the_settings_takes_part_in_every_edit(home: Path, portrait: Any) -> None:
    """From the settings to the answer: resolved, verified, stacked at strength 1, on its own schedule."""
    given = ServingSettings(
        adapters=(PROD,), stacked={PROD: (UNDER,)}, schedules={"lightning": LIGHTNING},
        follow_seconds=0.1,
    )  # fmt: skip
    registry = two_adapters(home)
    bases.register(base_path(), registry.load(Reference.parse(PROD)).card.base, home)

    async def edited(request: SweepRequest) -> list[Any]:
        backend = LocalBackend(given, registry=registry, home=home)
        try:
            await backend.start()
            return [event async for event in backend.stream(request, key="me")]
        finally:
            await backend.close(0)

    first, *progress, results = asyncio.run(edited(asked(portrait)))
    assert first.steps == 4
    assert [one.step for one in progress] == [1, 2, 3, 4]
    assert {one.adapter for one in results} == {"pixelsmile:1"}
    assert {one.stacked[0].adapter for one in results} == {"lightning:1"}
    assert {(one.steps, one.shift, one.stacked[0].strength) for one in results} == {(4, 3.0, 1.0)}
