"""The one formula of textual latent interpolation, as properties."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.conditioning import blend, blend_pooled, blend_prompts, interpolate
from serving.errors import ConditioningError
from serving.pipelines.base import PromptEmbeds

LENGTH, WIDTH = 5, 3
INTENSITY = st.floats(-1.0, 1.5, width=32)
SEED = st.integers(0, 2**31)
few = settings(max_examples=60, deadline=None)


def prompts(seed: int, rows: int = 2, real: int = LENGTH, dtype: torch.dtype = torch.float32) -> PromptEmbeds:
    embeds = torch.randn(rows, LENGTH, WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype)
    mask = (torch.arange(LENGTH) < real).expand(rows, LENGTH)
    return PromptEmbeds(embeds=embeds * mask[..., None], mask=mask)


def with_pooled(seed: int, rows: int = 2, dtype: torch.dtype = torch.float32) -> PromptEmbeds:
    plain = prompts(seed, rows, dtype=dtype)
    pooled = torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed + 99)).to(dtype)
    return dataclasses.replace(plain, pooled=pooled)


@few
@given(SEED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_is_the_neutral_embedding_bit_by_bit(dtype: torch.dtype, seed: int) -> None:
    neutral, happy = prompts(seed, dtype=dtype), prompts(seed + 1, dtype=dtype)
    mixed = interpolate(neutral, {"happy": happy, "sad": happy}, {"happy": 0.0, "sad": 0.0})
    assert torch.equal(mixed.embeds, neutral.embeds)
    assert mixed.embeds.dtype == dtype


@few
@given(SEED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_is_the_expression_bit_by_bit(dtype: torch.dtype, seed: int) -> None:
    neutral, happy = prompts(seed, dtype=dtype), prompts(seed + 1, dtype=dtype)
    assert torch.equal(interpolate(neutral, {"happy": happy}, {"happy": 1.0}).embeds, happy.embeds)


@few
@given(SEED, INTENSITY, INTENSITY)
def test_is_the_formula_and_linear_in_each_intensity(seed: int, a: float, b: float) -> None:
    neutral, happy, sad = prompts(seed), prompts(seed + 1), prompts(seed + 2)
    mixed = interpolate(neutral, {"happy": happy, "sad": sad}, {"happy": a, "sad": b}).embeds
    by_hand = neutral.embeds + a * (happy.embeds - neutral.embeds) + b * (sad.embeds - neutral.embeds)
    torch.testing.assert_close(mixed, by_hand, rtol=1e-5, atol=2e-5)


@few
@given(SEED, st.permutations(["happy", "sad", "shy"]), st.lists(INTENSITY, min_size=3, max_size=3))
def test_the_order_of_blending_is_irrelevant(seed: int, order: list[str], values: list[float]) -> None:
    embeds = {name: prompts(seed + index + 1) for index, name in enumerate(("happy", "sad", "shy"))}
    asked = dict(zip(("happy", "sad", "shy"), values, strict=True))
    first = interpolate(prompts(seed), embeds, asked)
    second = interpolate(prompts(seed), embeds, {name: asked[name] for name in order})
    assert torch.equal(first.embeds, second.embeds)


@few
@given(SEED, INTENSITY, st.integers(0, LENGTH - 1), st.integers(1, LENGTH))
def test_outside_of_the_window_nothing_moves(seed: int, a: float, start: int, stop: int) -> None:
    neutral, happy = prompts(seed), prompts(seed + 1)
    if start >= stop:
        with pytest.raises(ConditioningError, match="token window"):
            interpolate(neutral, {"happy": happy}, {"happy": a}, (start, stop))
        return
    mixed = interpolate(neutral, {"happy": happy}, {"happy": a}, (start, stop)).embeds
    everywhere = interpolate(neutral, {"happy": happy}, {"happy": a}).embeds
    assert torch.equal(mixed[:, :start], neutral.embeds[:, :start])
    assert torch.equal(mixed[:, stop:], neutral.embeds[:, stop:])
    assert torch.equal(mixed[:, start:stop], everywhere[:, start:stop])


@few
@given(SEED, INTENSITY, INTENSITY)
def test_a_pooled_vector_moves_by_the_same_weights_and_knows_no_window(seed: int, a: float, b: float) -> None:
    neutral, happy, sad = with_pooled(seed), with_pooled(seed + 1), with_pooled(seed + 2)
    mixed = interpolate(neutral, {"happy": happy, "sad": sad}, {"happy": a, "sad": b}, (0, 1)).pooled
    by_hand = neutral.pooled + a * (happy.pooled - neutral.pooled) + b * (sad.pooled - neutral.pooled)
    torch.testing.assert_close(mixed, by_hand, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ends_of_a_pooled_vector_are_bit_exact(dtype: torch.dtype) -> None:
    neutral, happy = with_pooled(0, dtype=dtype), with_pooled(1, dtype=dtype)
    for intensity, end in ((0.0, neutral), (1.0, happy)):
        mixed = interpolate(neutral, {"happy": happy}, {"happy": intensity})
        assert torch.equal(mixed.pooled, end.pooled)
        assert mixed.pooled.dtype == dtype


def test_rows_of_one_picture_are_those_of_interpolate() -> None:
    neutral, targets = with_pooled(0, rows=1), with_pooled(1, rows=2)
    levels = [[0.0, 0.0], [1.0, 0.0], [0.5, 0.25]]
    rows = blend_prompts(neutral, targets, torch.tensor(levels), (1, 4))
    assert rows.mask.shape == (3, LENGTH)
    for row, (happy, sad) in enumerate(levels):
        words = {"happy": targets.rows(slice(0, 1)), "sad": targets.rows(slice(1, 2))}
        single = interpolate(neutral, words, {"happy": happy, "sad": sad}, (1, 4))
        assert torch.equal(rows.embeds[row], single.embeds[0])
        assert torch.equal(rows.pooled[row], single.pooled[0])
    bare = blend_prompts(prompts(0, rows=1), prompts(1, rows=2), torch.tensor(levels))
    assert bare.pooled is None


def test_pooled_vectors_that_do_not_belong_together_are_explained() -> None:
    with pytest.raises(ConditioningError, match="only one has a pooled vector"):
        interpolate(with_pooled(0), {"happy": prompts(1)}, {"happy": 1.0})
    with pytest.raises(ConditioningError, match="do not belong together"):
        blend_pooled(torch.zeros(1, 4), torch.zeros(1, 1, 5), torch.ones(1, 1))


def test_rows_have_their_own_intensities() -> None:
    neutral, happy = prompts(0, rows=3), prompts(1, rows=3)
    rows = blend(neutral.embeds, happy.embeds[:, None], torch.tensor([[0.0], [0.5], [1.0]]))
    assert torch.equal(rows[0], neutral.embeds[0])
    assert torch.equal(rows[2], happy.embeds[2])
    single = interpolate(neutral, {"happy": happy}, {"happy": 0.5}).embeds
    assert torch.equal(rows[1], single[1])


def test_gradients_flow_to_the_embeddings() -> None:
    neutral, happy = prompts(0).embeds.requires_grad_(), prompts(1).embeds.requires_grad_()
    blend(neutral, happy[:, None], torch.full((2, 1), 0.25)).sum().backward()
    torch.testing.assert_close(neutral.grad, torch.full_like(neutral, 0.75))
    torch.testing.assert_close(happy.grad, torch.full_like(happy, 0.25))


def test_the_inputs_are_left_alone() -> None:
    neutral, happy = prompts(0), prompts(1)
    before = neutral.embeds.clone()
    interpolate(neutral, {"happy": happy}, {"happy": 0.7}, (1, 3))
    assert torch.equal(neutral.embeds, before)


@pytest.mark.parametrize(
    ("targets", "intensities", "window", "says"),
    [
        ({"happy": prompts(1, real=4)}, {"happy": 1.0}, None, "4 tokens, the neutral one 5"),
        ({"happy": prompts(1)}, {"sad": 1.0}, None, "no embedding of 'sad'"),
        ({"happy": prompts(1)}, {"happy": float("nan")}, None, "not a finite number"),
        ({"happy": prompts(1)}, {"happy": 1.0}, (3, 9), "token window 3 to 9"),
        ({"happy": prompts(1, rows=3)}, {"happy": 1.0}, None, "cannot be interpolated"),
    ],
)
def test_what_has_no_meaning_is_explained(
    targets: dict[str, PromptEmbeds],
    intensities: dict[str, float],
    window: tuple[int, int] | None,
    says: str,
) -> None:
    with pytest.raises(ConditioningError, match=says) as caught:
        interpolate(prompts(0), targets, intensities, window)
    assert caught.value.mend


def test_no_expressions_is_neutral() -> None:
    neutral = prompts(0)
    assert interpolate(neutral, {}, {}) is neutral
