"""The average of the weights: in fp32, by name, soon free of where it started."""

from __future__ import annotations

import pytest
import torch

from trainer.ema import Ema
from trainer.sections import EmaSection


def test_it_is_the_textbook_average() -> None:
    settings = EmaSection(decay=0.8, warmup=1)
    draw = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(4, 3, generator=draw) for name in ("a", "b")}
    ema = Ema(weights, settings)
    expected = {name: value.double().clone() for name, value in weights.items()}
    for _ in range(20):
        for name, value in weights.items():
            value.add_(torch.randn(4, 3, generator=draw))
            expected[name] = 0.8 * expected[name] + 0.2 * value.double()
        ema.update(weights)
    for name, value in expected.items():
        torch.testing.assert_close(ema.values[name].double(), value, rtol=1e-5, atol=1e-6)


def test_the_decay_grows_until_it_is_the_recipe_s() -> None:
    ema = Ema({}, EmaSection(decay=0.99, warmup=10))
    decays = [ema.decay(update) for update in range(1, 2000)]
    assert decays[0] == pytest.approx(2 / 11)
    assert decays == sorted(decays)
    assert decays[-1] == 0.99
    # At update 90 the average still looks at about the last tenth of what there was.
    assert decays[89] == pytest.approx(91 / 100)


def test_it_keeps_fp32_and_does_not_share_memory() -> None:
    weights = {"a": torch.ones(2, dtype=torch.bfloat16), "b": torch.ones(2)}
    ema = Ema(weights, EmaSection())
    assert {value.dtype for value in ema.values.values()} == {torch.float32}
    weights["b"].fill_(5)
    assert float(ema.values["b"][0]) == 1


def test_a_tiny_change_is_not_lost() -> None:
    """In bf16 a step of 1e-3 of the way from 1 to 1.001 would be none."""
    weights = {"a": torch.ones(1)}
    ema = Ema(weights, EmaSection(decay=0.999, warmup=1))
    weights["a"] += 1e-3
    for _ in range(1000):
        ema.update(weights)
    assert 0.0006 < float(ema.values["a"][0]) - 1 < 0.001


def test_it_goes_by_name_and_not_by_order() -> None:
    weights = {"a": torch.zeros(1), "b": torch.zeros(1)}
    ema = Ema(weights, EmaSection(decay=0.0, warmup=1))
    ema.update({"b": torch.ones(1), "a": torch.full((1,), 2.0)})
    assert (float(ema.values["a"][0]), float(ema.values["b"][0])) == (2.0, 1.0)


def test_it_continues_where_it_was_saved() -> None:
    settings, draw = EmaSection(decay=0.9, warmup=10), torch.Generator().manual_seed(1)
    weights = {"a": torch.zeros(3)}
    steps = [torch.randn(3, generator=draw) for _ in range(6)]
    through = Ema(weights, settings)
    for value in steps:
        through.update({"a": value})
    first = Ema(weights, settings)
    for value in steps[:3]:
        first.update({"a": value})
    second = Ema(weights, settings)
    second.load(first.values, first.updates)
    for value in steps[3:]:
        second.update({"a": value})
    assert torch.equal(second.values["a"], through.values["a"])
    assert second.updates == 6
