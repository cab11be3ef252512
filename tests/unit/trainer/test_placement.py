"""The frozen base in every format and place: what it costs in exactness, and what must not change at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from fakes.tiny_bases import inputs
from serving import pipelines
from serving.frozen import FrozenLinear
from serving.pipelines.base import EditPipeline
from serving.placement import blocks as blocks_of
from serving.placement import networks
from trainer import lora, placement
from trainer.errors import BaseModelError
from trainer.portraits.bases import BUILDERS, build
from trainer.recipe import Recipe
from trainer.sections import PrecisionSection

STORED = ("fp32", "bf16", "fp8", "nf4")


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory):
    """Give the folder of a family's tiny base."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = build(family, tmp_path_factory.mktemp(family))
        return made[family]

    return folder


def changed(recipe: Recipe, family: str = "qwen-image-edit", **sections: dict[str, Any]) -> Recipe:
    """The tiny recipe on another family and with other values in some sections."""
    sections = {"lora": {"targets": "full"}, **sections}
    parts = {name: getattr(recipe, name).model_copy(update=part) for name, part in sections.items()}
    base = recipe.base.model_copy(update={"family": family})
    return recipe.model_copy(update={**parts, "base": base})


@contextmanager
def ready(
    pipeline: EditPipeline, recipe: Recipe
) -> Iterator[tuple[placement.Placed, dict[str, torch.nn.Parameter]]]:
    """A base with a LoRA whose B is not zero, so that all gradients differ from zero."""
    with placement.training(pipeline, recipe, "cpu") as placed:
        parameters = lora.inject(pipeline.transformer, recipe)
        draw = torch.Generator().manual_seed(9)
        with torch.no_grad():
            for name, value in parameters.items():
                if name.endswith("lora_B.weight"):
                    value.copy_(0.05 * torch.randn(value.shape, generator=draw))
        try:
            yield placed, parameters
        finally:
            lora.remove(pipeline.transformer)


def gradients(
    pipeline: EditPipeline, recipe: Recipe, given: dict[str, Any], micro: int | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor], placement.Placed]:
    """Prediction and gradients of the mean square over all rows, of which ``micro`` go at once."""
    rows = len(given["level"])
    found = []
    with ready(pipeline, recipe) as (placed, parameters):
        for begin in range(0, rows, micro or rows):
            part = slice(begin, begin + (micro or rows))
            predicted = pipeline.predict(
                given["latents"][part],
                given["image_latents"][part],
                given["prompts"].rows(part),
                given["level"][part],
            ).float()
            (predicted.square().sum() / given["latents"].numel()).backward()
            found.append(predicted.detach())
        grads = {name: value.grad.clone() for name, value in parameters.items()}
    return torch.cat(found), grads, placed


@pytest.fixture
def load(bases):
    def loaded(family: str = "qwen-image-edit") -> EditPipeline:
        return pipelines.load(family, bases(family))

    return loaded


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def relative(value: torch.Tensor, truth: torch.Tensor) -> float:
    return float((value.float() - truth.float()).norm() / truth.float().norm())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stored", STORED)
def test_two_steps_over_every_format(load, tiny_recipe: Recipe, stored, checkpointing: bool) -> None:
    pipeline = load()
    recipe = changed(
        tiny_recipe, precision={"base": stored, "compute": "bf16"}, running={"checkpointing": checkpointing}
    )
    given = inputs(pipeline)
    with ready(pipeline, recipe) as (_, parameters):
        optimiser = torch.optim.AdamW(parameters.values(), 1e-3)
        losses = []
        for _ in range(2):
            predicted = pipeline.predict(**given)
            assert predicted.dtype == torch.bfloat16
            loss = predicted.float().square().mean()
            loss.backward()
            assert all(value.grad.dtype == torch.float32 for value in parameters.values())
            assert all(bool(value.grad.isfinite().all()) for value in parameters.values())
            optimiser.step()
            optimiser.zero_grad()
            losses.append(float(loss))
        assert losses[1] < losses[0]
        assert {value.dtype for value in parameters.values()} == {torch.float32}
        kinds = {
            type(layer.base_layer) for layer in pipeline.transformer.modules()
            if isinstance(layer, lora.LoraLinear)
        }  # fmt: skip
        assert kinds == {torch.nn.Linear if stored == "bf16" else FrozenLinear}


@pytest.mark.parametrize("family", BUILDERS)
def test_recomputed_activations_change_nothing(load, tiny_recipe: Recipe, family: str) -> None:
    pipeline = load(family)
    given = inputs(pipeline, 2)
    calls = []
    name, block = blocks_of(pipeline.transformer)[0]
    counted = block.register_forward_pre_hook(lambda *_: calls.append(name))
    plain = gradients(pipeline, changed(tiny_recipe, family), given)
    assert len(calls) == 1
    again = gradients(pipeline, changed(tiny_recipe, family, running={"checkpointing": True}), given)
    assert len(calls) == 3  # once forward, once more backward
    counted.remove()
    assert torch.equal(plain[0], again[0])
    assert equal(plain[1], again[1])


@pytest.mark.parametrize("family", BUILDERS)
def test_blocks_that_wait_change_nothing(load, tiny_recipe: Recipe, family: str) -> None:
    pipeline = load(family)
    given = inputs(pipeline, 2)
    before = {name: value.clone() for name, value in pipeline.transformer.state_dict().items()}
    plain = gradients(pipeline, changed(tiny_recipe, family), given)
    running = {"checkpointing": True, "offload_blocks": 2}
    away = gradients(pipeline, changed(tiny_recipe, family, running=running), given)
    assert torch.equal(plain[0], away[0])
    assert equal(plain[1], away[1])
    assert away[2].waiting_bytes > 0
    assert away[2].held_bytes + away[2].waiting_bytes == plain[2].held_bytes
    assert equal(before, dict(pipeline.transformer.state_dict()))
    assert not any(isinstance(module, FrozenLinear) for module in pipeline.transformer.modules())
    assert torch.equal(gradients(pipeline, changed(tiny_recipe, family), given)[0], plain[0])


def test_small_formats_can_wait_too(load, tiny_recipe: Recipe) -> None:
    for stored in ("fp8", "nf4"):
        pipeline = load()
        given = inputs(pipeline, 2)
        recipe = changed(tiny_recipe, precision={"base": stored}, running={"checkpointing": True})
        plain = gradients(pipeline, recipe, given)
        running = recipe.running.model_copy(update={"offload_blocks": 6})
        away = gradients(pipeline, recipe.model_copy(update={"running": running}), given)
        assert torch.equal(plain[0], away[0])
        assert equal(plain[1], away[1])


def test_waiting_weights_are_only_there_while_they_are_used(load, tiny_recipe: Recipe) -> None:
    pipeline = load()
    given = inputs(pipeline, 2)
    recipe = changed(tiny_recipe, running={"checkpointing": True, "offload_blocks": 6})
    fetched: list[int] = []
    with ready(pipeline, recipe):
        layers = [m for m in pipeline.transformer.modules() if isinstance(m, FrozenLinear)]
        for _, block in blocks_of(pipeline.transformer):
            block.register_forward_pre_hook(
                lambda *_: fetched.append(sum(layer.fetched is not None for layer in layers))
            )
        pipeline.predict(**given).square().mean().backward()
        assert not any(layer.fetched for layer in layers)
    in_one = len(layers) // len(blocks_of(pipeline.transformer))
    assert set(fetched) == {in_one}


def test_micro_batches_give_the_gradient_of_the_whole(load, tiny_recipe: Recipe) -> None:
    pipeline = load()
    given = inputs(pipeline)
    one = gradients(pipeline, changed(tiny_recipe), given)
    four = gradients(pipeline, changed(tiny_recipe), given, micro=1)
    for name, value in one[1].items():
        torch.testing.assert_close(four[1][name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", BUILDERS)
def test_every_family_in_every_format(load, tiny_recipe: Recipe, family: str) -> None:
    given = inputs(load(family), 2)
    truth, _, whole_base = gradients(load(family), changed(tiny_recipe, family), given)
    sizes = {"fp32": whole_base.held_bytes}
    for stored, most in (("bf16", 0.03), ("fp8", 0.15), ("nf4", 0.5)):
        recipe = changed(tiny_recipe, family, precision={"base": stored, "compute": "bf16"})
        found, grads, placed = gradients(load(family), recipe, given)
        assert {value.dtype for value in grads.values()} == {torch.float32}
        assert relative(found, truth) < most, stored
        assert all(bool(value.isfinite().all()) for value in grads.values())
        sizes[stored] = placed.held_bytes
    assert sizes["fp32"] > sizes["bf16"] > sizes["fp8"] > sizes["nf4"]


def test_a_base_is_not_made_small_twice(load, tiny_recipe: Recipe) -> None:
    pipeline = load()
    recipe = changed(tiny_recipe, precision={"base": "fp8"})
    given = inputs(pipeline, 2)
    first = gradients(pipeline, recipe, given)
    assert equal(first[1], gradients(pipeline, recipe, given)[1])
    with (
        pytest.raises(BaseModelError, match="made fp8 before and the recipe wants nf4"),
        placement.training(pipeline, changed(tiny_recipe, precision={"base": "nf4"}), "cpu"),
    ):
        pass


def test_formats_follow_the_device_unless_told() -> None:
    auto = PrecisionSection()
    assert placement.formats(auto, "cpu") == ("fp32", torch.float32)
    assert placement.formats(auto, "cuda") == ("bf16", torch.bfloat16)
    told = PrecisionSection(base="nf4", compute="fp32")
    assert placement.formats(told, "cuda") == ("nf4", torch.float32)


def test_text_encoders_are_away_while_training_and_back_to_encode(load, tiny_recipe: Recipe) -> None:
    """On a device that only counts: "meta" has no memory and takes any module."""
    pipeline = load()

    def places() -> dict[str, str]:
        parts = networks(pipeline)
        return {name: next(part.parameters()).device.type for name, part in parts.items()}

    assert set(places().values()) == {"cpu"}
    with placement.training(pipeline, changed(tiny_recipe), "meta"):
        assert places() == {"transformer": "meta", "vae": "meta", "text_encoder": "cpu"}
    other = load()
    placement.encoding(other, "meta")
    pipeline = other
    assert places() == {"transformer": "cpu", "vae": "meta", "text_encoder": "meta"}


@pytest.mark.parametrize("stored", ["fp32", "fp8", "nf4"])
def test_a_compiled_block_gives_the_same_and_is_compiled_once(load, tiny_recipe: Recipe, stored: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    pipeline = load()
    given = inputs(pipeline, 2)
    plain = gradients(pipeline, changed(tiny_recipe, precision={"base": stored}), given)
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    blocks = [block for _, block in blocks_of(pipeline.transformer)]
    compiled = type(blocks[0]).compile
    recipe = changed(tiny_recipe, precision={"base": stored}, running={"compile": True})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(blocks[0]), "compile", lambda self: compiled(self, backend=counter))
        with ready(pipeline, recipe) as (_, parameters):
            seen = []
            for step in range(3):
                for value in parameters.values():
                    value.grad = None
                    value.data.mul_(1 + 0.1 * step).div_(1 + 0.1 * step)
                predicted = pipeline.predict(**given)
                predicted.square().mean().backward()
                seen.append(counter.frame_count)
    # The first block's input needs no gradient and the last block has fewer LoRA layers: three graphs, and
    # none is added when the weights change.
    assert seen == [3, 3, 3]
    assert not torch._dynamo.utils.counters["graph_break"]
    torch.testing.assert_close(predicted.detach(), plain[0], rtol=1e-5, atol=1e-5)
    for name, value in parameters.items():
        torch.testing.assert_close(value.grad, plain[1][name], rtol=1e-4, atol=1e-5)
    assert all(block._compiled_call_impl is None for block in blocks)
