"""Several adapters on one base: each row its own, stacks, swaps, memory, and merging that leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from registry.admission import VerifiedAdapter
from serving import layers
from serving.adapters import AdapterSlots, Stack
from serving.engine import EditEngine
from serving.errors import AdapterMismatch, Overloaded, StrengthOutOfRange, UsageError
from serving.frozen import FrozenLinear
from serving.pipelines.base import PromptEmbeds
from serving.runs import Run
from serving.schema import SweepRequest

Make = Callable[..., VerifiedAdapter]
SOME = ("attn.to_q", "img_mlp.net.2")


@pytest.fixture
def velocity(pipeline: Any) -> Callable[[int], torch.Tensor]:
    """One forward pass of so many equal rows."""
    noise = torch.Generator().manual_seed(0)
    latents, control = (torch.randn(1, 64, 64, generator=noise) for _ in range(2))
    embeds = torch.randn(1, 17, 128, generator=noise)

    def run(rows: int = 1) -> torch.Tensor:
        prompts = PromptEmbeds(
            embeds=embeds.expand(rows, -1, -1), mask=torch.ones(rows, 17, dtype=torch.bool)
        )
        inputs = latents.expand(rows, -1, -1), control.expand(rows, -1, -1)
        with torch.no_grad():
            return pipeline.predict(*inputs, prompts, torch.full((rows,), 0.4))

    return run


@pytest.fixture
def engine(pipeline: Any, make_adapter: Make) -> EditEngine:
    return EditEngine(pipeline, base=make_adapter(1).card.base, allow_candidates=True)


def asked(portrait: Image.Image, *rows: dict[str, float], **values: Any) -> SweepRequest:
    return SweepRequest(image=portrait, rows=rows or ({"happy": 0.8},), **{"steps": 3, **values})


def finished(engine: EditEngine, *runs: Run) -> list[np.ndarray]:
    """Take runs to their ends together; those that are done leave, as they would in a service."""
    open_ = list(runs)
    while open_:
        engine.advance(open_)
        open_ = [run for run in open_ if not run.done]
    return [run.denoising.latents.numpy() for run in runs]


def test_rows_of_one_batch_get_their_own_adapters(
    pipeline: Any, make_adapter: Make, velocity: Callable[[int], torch.Tensor]
) -> None:
    one, other = make_adapter(1, rank=8), make_adapter(2, rank=2, targets=SOME)
    slots = AdapterSlots(pipeline)
    for adapter in (one, other):
        slots.load(adapter)
    stacks: list[Stack] = [
        ((one, 1.0),), ((other, 0.7),), (), ((one, 0.4), (other, 1.2)), ((one, 1.0),), ((one, 0.0),),
    ]  # fmt: skip
    with slots.routed(stacks):
        together = velocity(len(stacks))
    for row, stack in enumerate(stacks):
        with slots.routed([stack]):
            torch.testing.assert_close(together[row], velocity(1)[0], rtol=0, atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-3)


def test_a_row_without_an_adapter_is_the_base_to_the_bit(
    pipeline: Any, make_adapter: Make, velocity: Callable[[int], torch.Tensor]
) -> None:
    before = velocity(1)
    slots = AdapterSlots(pipeline)
    slots.load(make_adapter(1))
    assert torch.equal(velocity(1), before), "a resident adapter serves nobody who did not ask for it"
    with slots.routed([()]):
        assert torch.equal(velocity(1), before)


def test_a_stack_is_the_sum_of_its_updates(
    pipeline: Any, make_adapter: Make, velocity: Callable[[int], torch.Tensor]
) -> None:
    from safetensors.torch import load

    stack = ((make_adapter(1), 0.6), (make_adapter(2, rank=2, targets=SOME), 1.3))
    slots = AdapterSlots(pipeline)
    for adapter, _ in stack:
        slots.load(adapter)
    with slots.routed([stack]):
        stacked = velocity(1)
    slots.detach()
    weights = {name: value.clone() for name, value in pipeline.transformer.state_dict().items()}
    for adapter, strength in stack:
        tensors = load(adapter.weights)
        for key in tensors:
            if key.endswith(".lora_A.weight"):
                name = key.removeprefix("transformer.").replace(".lora_A", "")
                update = tensors[key.replace("lora_A", "lora_B")] @ tensors[key]
                pipeline.transformer.get_parameter(name).data += strength * update
    try:
        torch.testing.assert_close(stacked, velocity(1), rtol=1e-4, atol=1e-5)
    finally:
        pipeline.transformer.load_state_dict(weights)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ranks=st.tuples(st.sampled_from([1, 3, 8]), st.sampled_from([1, 3, 8])),
    some=st.tuples(st.booleans(), st.booleans()),
    strengths=st.tuples(st.floats(0, 1.5), st.floats(0, 1.5)),
)
def test_a_swap_equals_a_fresh_start(
    pipeline: Any,
    make_adapter: Make,
    velocity: Callable[[int], torch.Tensor],
    ranks: tuple[int, int],
    some: tuple[bool, bool],
    strengths: tuple[float, float],
) -> None:
    layers.unwrap(pipeline.transformer)
    first, second = (
        make_adapter(seed, rank=rank, **({"targets": SOME} if few else {}))
        for seed, rank, few in zip((1, 2), ranks, some, strict=True)
    )
    fresh = AdapterSlots(pipeline)
    fresh.use(second, strengths[1])
    expected = velocity(1)
    fresh.detach()
    slots = AdapterSlots(pipeline)
    slots.use(first, strengths[0])
    velocity(1)
    slots.use(second, strengths[1])
    assert torch.equal(velocity(1), expected)
    slots.detach()


def test_merging_a_hundred_times_leaves_the_base_as_it_was(
    pipeline: Any, make_adapter: Make, velocity: Callable[[int], torch.Tensor]
) -> None:
    weights = {name: value.clone() for name, value in pipeline.transformer.state_dict().items()}
    before = velocity(1)
    slots = AdapterSlots(pipeline)
    adapters = [make_adapter(seed, rank=rank) for seed, rank in ((1, 4), (2, 8))]
    stacks: list[Stack] = [
        ((adapters[0], 1.0),),
        ((adapters[1], 0.7),),
        ((adapters[0], 0.3), (adapters[1], 1.1)),
    ]
    for adapter in adapters:
        slots.load(adapter)
    for stack in stacks:
        with slots.routed([stack]):
            beside = velocity(1)
        assert slots.merge(stack)
        with slots.routed([stack]):
            torch.testing.assert_close(velocity(1), beside, rtol=1e-4, atol=1e-5)
    for cycle in range(100):
        assert slots.merge(stacks[cycle % 3])
        if cycle % 2:
            slots.unmerge()
    slots.detach()
    assert torch.equal(velocity(1), before)
    after = pipeline.transformer.state_dict()
    assert all(torch.equal(after[name], weights[name]) for name in weights)


def test_another_stack_in_between_unmerges_first(
    pipeline: Any, make_adapter: Make, velocity: Callable[[int], torch.Tensor]
) -> None:
    one, other = make_adapter(1), make_adapter(2)
    slots = AdapterSlots(pipeline)
    for adapter in (one, other):
        slots.load(adapter)
    with slots.routed([((other, 1.0),)]):
        expected = velocity(1)
    slots.merge(((one, 1.0),))
    with slots.routed([((other, 1.0),)]):
        assert torch.equal(velocity(1), expected)


class Full(layers.Placed):
    """An update that is larger than the memory that is left; it counts how often it is tried."""

    tried = 0

    def weight(self, base: torch.Tensor, strength: float) -> torch.Tensor:
        Full.tried += 1
        raise torch.OutOfMemoryError("CUDA out of memory")


def without_memory(slots: AdapterSlots, adapter: VerifiedAdapter) -> None:
    """Make an adapter resident whose updates have no room in the weights from the fifth on."""
    resident = slots.prepare(adapter)
    updates = {
        where: update if number < 4 else Full(a=update.a, b=update.b)
        for number, (where, update) in enumerate(resident.updates.items())
    }
    slots.install(replace(resident, updates=updates))


def test_a_merge_for_which_there_is_no_memory_leaves_the_base_as_it_was(
    pipeline: Any, make_adapter: Make, velocity: Callable[[int], torch.Tensor]
) -> None:
    before = velocity(1)
    adapter = make_adapter(1)
    slots = AdapterSlots(pipeline)
    without_memory(slots, adapter)
    with slots.routed([((adapter, 1.0),)]):
        beside = velocity(1)
    assert not slots.merge(((adapter, 1.0),))
    with slots.routed([((adapter, 1.0),), ()]):
        torch.testing.assert_close(velocity(2), torch.cat([beside, before]), rtol=0, atol=1e-5)
    slots.detach()
    assert torch.equal(velocity(1), before)


def test_edits_go_on_where_there_is_no_memory_to_merge(
    pipeline: Any, make_adapter: Make, portrait: Image.Image
) -> None:
    adapter = make_adapter(1)
    plain = EditEngine(pipeline, base=adapter.card.base, allow_candidates=True)
    request = asked(portrait, steps=30)
    expected = finished(plain, plain.begin(request, ((adapter, 1.0),)))[0]
    plain.detach()
    merging = EditEngine(pipeline, base=adapter.card.base, allow_candidates=True, merge=True)
    without_memory(merging.slots, adapter)
    Full.tried = 0
    assert np.array_equal(finished(merging, merging.begin(request, ((adapter, 1.0),)))[0], expected)
    assert Full.tried == 1, "it was tried again at once"


def test_a_quantised_base_is_never_merged_into(pipeline: Any, make_adapter: Make) -> None:
    adapter = make_adapter(1, targets=("attn.to_q",))
    name = "transformer_blocks.0.attn.to_q"
    linear = pipeline.transformer.get_submodule(name)
    layers.replace(pipeline.transformer, name, FrozenLinear(linear, "fp8"))
    try:
        slots = AdapterSlots(pipeline)
        slots.load(adapter)
        kept = pipeline.transformer.get_submodule(name).base_layer.weight.clone()
        assert not slots.merge(((adapter, 1.0),))
        assert torch.equal(pipeline.transformer.get_submodule(name).base_layer.weight, kept)
        slots.detach()
    finally:
        layers.replace(pipeline.transformer, name, linear)


def test_adapters_that_arrive_together_are_ours(pipeline: Any, make_adapter: Make) -> None:
    slots, model = AdapterSlots(pipeline), pipeline.transformer
    arriving = [slots.prepare(make_adapter(2))]

    def named_modules(*values: Any) -> Any:
        # Another thread puts its layers in while this one looks for those of somebody else.
        while arriving:
            slots.install(arriving.pop())
        return type(model).named_modules(model, *values)

    model.named_modules = named_modules
    try:
        slots.load(make_adapter(1, targets=SOME))
    finally:
        del model.named_modules
    assert len(slots.residents) == 2
    with pytest.raises(AdapterMismatch, match="not attached here"):
        AdapterSlots(pipeline).prepare(make_adapter(3))


def test_the_least_recently_used_make_room_and_pinned_ones_stay(pipeline: Any, make_adapter: Make) -> None:
    adapters = [make_adapter(seed) for seed in range(4)]
    size = AdapterSlots(pipeline).prepare(adapters[0]).nbytes
    slots = AdapterSlots(pipeline, budget=2 * size)
    for adapter in adapters[:2]:
        slots.load(adapter)
    slots.pin(adapters[0])
    slots.load(adapters[2])
    assert slots.residents == (adapters[0], adapters[2])
    assert slots.memory == 2 * size
    slots.pin(adapters[2])
    with pytest.raises(Overloaded, match="set aside for adapters"):
        slots.load(adapters[3])
    assert not slots.evict(adapters[0])
    slots.unpin(adapters[0])
    assert slots.evict(adapters[0])
    slots.load(adapters[3])
    assert slots.residents == (adapters[2], adapters[3])
    slots.detach()
    assert not layers.found(pipeline.transformer)


def test_the_memory_of_adapters_is_told_while_another_arrives(pipeline: Any, make_adapter: Make) -> None:
    slots = AdapterSlots(pipeline)

    class Size(int):
        """A size that is added up at the very moment at which a loader installs another adapter."""

        def __radd__(self, other: int) -> int:
            slots.install(second)
            return other + int(self)

    first, second = (slots.prepare(make_adapter(seed)) for seed in range(2))
    slots.install(replace(first, nbytes=Size(first.nbytes)))
    assert slots.memory == first.nbytes
    assert slots.memory == first.nbytes + second.nbytes


def test_edits_join_and_leave_at_any_step(
    engine: EditEngine, make_adapter: Make, portrait: Image.Image
) -> None:
    one, other = make_adapter(1), make_adapter(2, rank=8)
    requests = [
        (asked(portrait, {"happy": 0.5}, {"sad": 1.0}, seed=1), ((one, 1.0),)),
        (asked(portrait.rotate(90), {"surprised": 1.0}, seed=2, steps=5), ((other, 0.7),)),
        (asked(portrait, {"happy": 0.5}, seed=1, steps=2), ((one, 0.5), (other, 0.5))),
    ]
    alone = [finished(engine, engine.begin(request, stack))[0] for request, stack in requests]
    first, second, third = (engine.begin(request, stack) for request, stack in requests)
    engine.advance([second])
    engine.advance([first, second])
    engine.advance([second, third, first])
    together = finished(engine, first, second, third) if not third.done else []
    for got, expected in zip(together, alone, strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
    assert [run.step for run in (first, second, third)] == [3, 5, 2]


def test_a_part_of_a_sweep_is_that_part(
    engine: EditEngine, make_adapter: Make, portrait: Image.Image
) -> None:
    stack = ((make_adapter(1), 1.0),)
    rows = ({"happy": 0.2}, {"happy": 0.9}, {"sad": 0.4})
    whole = finished(engine, engine.begin(asked(portrait, *rows, seed=4), stack))[0]
    part = finished(engine, engine.begin(asked(portrait, *rows[1:], seed=4), stack))[0]
    np.testing.assert_allclose(part, whole[1:], rtol=0, atol=1e-5)


def test_seeds_of_rows(engine: EditEngine, make_adapter: Make, portrait: Image.Image) -> None:
    stack = ((make_adapter(1), 1.0),)
    both = engine.begin(asked(portrait, {"happy": 1.0}, {"happy": 1.0}, seeds=(4, 9)), stack)
    latents = finished(engine, both)[0]
    one = finished(engine, engine.begin(asked(portrait, {"happy": 1.0}, seed=9), stack))[0]
    np.testing.assert_allclose(latents[1], one[0], rtol=0, atol=1e-5)
    assert [result.seed for result in engine.finish(both)] == [4, 9]
    with pytest.raises(UsageError, match="1 seeds for 2 rows"):
        SweepRequest.make(image=portrait, rows=({}, {}), seeds=(1,))


def test_pictures_of_other_sizes(engine: EditEngine, make_adapter: Make, portrait: Image.Image) -> None:
    stack = ((make_adapter(1), 1.0),)
    run = engine.begin(asked(portrait, size=(96, 64)), stack)
    assert run.shape != engine.begin(asked(portrait), stack).shape
    finished(engine, run)
    result = engine.finish(run)[0]
    assert result.image.size == (64, 96)
    assert result.facts()["size"] == [96, 64]
    with pytest.raises(UsageError, match="is not a multiple of"):
        engine.begin(asked(portrait, size=(90, 64)), stack)


def test_encodings_are_kept_for_the_next_request(
    engine: EditEngine, make_adapter: Make, portrait: Image.Image
) -> None:
    stack = ((make_adapter(1), 1.0),)
    for row in ({"happy": 0.2}, {"happy": 0.8}):
        finished(engine, engine.begin(asked(portrait, row), stack))
    info = engine.cache_info()
    assert (info["prompts"].hits, info["prompts"].misses) == (2, 2)
    assert (info["pictures"].hits, info["pictures"].misses) == (1, 1)
    assert info["prompts"].nbytes > 0
    engine.begin(asked(portrait.rotate(90)), stack)
    assert engine.cache_info()["prompts"].misses == 4, "this family's prompts are seen beside the picture"


def test_caches_stay_within_their_bound(pipeline: Any, make_adapter: Make, portrait: Image.Image) -> None:
    adapter = make_adapter(1)
    engine = EditEngine(pipeline, base=adapter.card.base, allow_candidates=True, cache_memory=60_000)
    for turn in range(8):
        engine.drop(engine.begin(asked(portrait.rotate(turn)), ((adapter, 1.0),)))
        assert all(0 < info.nbytes <= 30_000 for info in engine.cache_info().values())


def test_what_does_not_fit_is_refused_before_anything_is_encoded(
    engine: EditEngine, make_adapter: Make, portrait: Image.Image
) -> None:
    good = make_adapter(1)
    wrong = make_adapter(2, config={"num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 16})
    with pytest.raises(StrengthOutOfRange, match="the strength is 2"):
        engine.check(asked(portrait), ((good, 1.0), (good, 2.0)))
    with pytest.raises(UsageError, match="no adapter is asked for"):
        engine.begin(asked(portrait), ())
    with pytest.raises(AdapterMismatch):
        engine.begin(asked(portrait), ((good, 1.0), (wrong, 1.0)))
    assert engine.cache_info()["prompts"].misses == 0
    assert engine.slots.evict(good), "a request that was refused holds nothing"


def test_a_run_holds_its_adapters_until_it_is_over(
    engine: EditEngine, make_adapter: Make, portrait: Image.Image
) -> None:
    adapter = make_adapter(1)
    run = engine.begin(asked(portrait), ((adapter, 1.0),))
    assert not engine.slots.evict(adapter)
    finished(engine, run)
    assert len(engine.finish(run)) == 1
    engine.drop(run)
    assert engine.slots.evict(adapter)
    cancelled = engine.begin(asked(portrait), ((adapter, 1.0),))
    engine.drop(cancelled)
    assert engine.slots.evict(adapter)


def test_previews_come_nearer_to_the_picture(
    engine: EditEngine, make_adapter: Make, portrait: Image.Image
) -> None:
    run = engine.begin(asked(portrait, steps=8), ((make_adapter(1, scale=0.05), 1.0),))
    seen = []
    while not run.done:
        engine.advance([run])
        seen.append(np.asarray(engine.preview(run)[0]).astype(float))
    final = np.asarray(engine.finish(run)[0].image).astype(float)
    errors = [np.abs(picture - final).mean() for picture in seen]
    assert errors[-1] == 0
    assert errors[5] < errors[0]


def test_merging_serves_the_same_pictures(pipeline: Any, make_adapter: Make, portrait: Image.Image) -> None:
    adapter, other = make_adapter(1), make_adapter(2)
    plain = EditEngine(pipeline, base=adapter.card.base, allow_candidates=True)
    request = asked(portrait, {"happy": 0.3}, {"happy": 1.0}, steps=20)
    expected = finished(plain, plain.begin(request, ((adapter, 1.0),)))[0]
    expected_other = finished(plain, plain.begin(asked(portrait), ((other, 1.0),)))[0]
    plain.detach()
    merging = EditEngine(pipeline, base=adapter.card.base, allow_candidates=True, merge=True)
    run = merging.begin(request, ((adapter, 1.0),))
    weight = pipeline.transformer.transformer_blocks[0].attn.to_q.base_layer.weight
    before, merged = weight.clone(), False
    while not run.done:
        merging.advance([run])
        merged |= not torch.equal(weight, before)
    assert merged
    np.testing.assert_allclose(run.denoising.latents.numpy(), expected, rtol=0, atol=1e-4)
    late = finished(merging, merging.begin(asked(portrait), ((other, 1.0),)))[0]
    np.testing.assert_allclose(late, expected_other, rtol=0, atol=1e-6)
    merging.detach()
    assert torch.equal(weight, before)


def test_an_exact_request_shares_no_step(pipeline: Any, make_adapter: Make, portrait: Image.Image) -> None:
    stack = ((make_adapter(1), 1.0),)
    engine = EditEngine(pipeline, base=stack[0][0].card.base, allow_candidates=True, merge=True)
    request = asked(portrait, exact=True, steps=4)
    first, second = engine.begin(request, stack), engine.begin(request, stack)
    assert first.shape != second.shape
    alone = finished(engine, first)[0]
    finished(engine, engine.begin(asked(portrait, steps=20), stack))  # long enough to be merged
    assert np.array_equal(finished(engine, second)[0], alone)
    with pytest.raises(UsageError, match="one row at a time"):
        engine.begin(asked(portrait, {}, {"happy": 1.0}, exact=True), stack)
