"""The optimisers: fp32 weights over any of them, and a state that comes apart and together to the bit."""

from __future__ import annotations

import builtins
import json

import pytest
import torch

from fakes.trainings import assert_same_tensors
from trainer import optimisers
from trainer.errors import TrainerError
from trainer.sections import OptimiserSection

NAMES = ["adamw", "adamw-8bit", "prodigy"]


def settings(name: str, **values: object) -> OptimiserSection:
    rate = 1.0 if name == "prodigy" else 0.01
    return OptimiserSection(name=name, learning_rate=rate, steps=100, batch_pairs=1, **values)


def parameters() -> dict[str, torch.nn.Parameter]:
    """One small, one large enough for 8-bit moments, one that begins at zero."""
    source = torch.Generator().manual_seed(0)
    shapes = {"small": (4, 8), "large": (64, 80), "zero": (64, 64)}
    return {
        name: torch.nn.Parameter(torch.randn(shape, generator=source) * (name != "zero"))
        for name, shape in shapes.items()
    }


def step(values: dict[str, torch.nn.Parameter], optimiser: torch.optim.Optimizer, number: int) -> None:
    source = torch.Generator().manual_seed(number)
    for value in values.values():
        value.grad = torch.randn(value.shape, generator=source) + value.detach()
    for group in optimiser.param_groups:
        group["lr"] *= 0.99
    optimiser.step()


@pytest.mark.parametrize("name", NAMES)
def test_a_state_that_was_apart_goes_on_to_the_bit(name: str) -> None:
    whole, half = parameters(), parameters()
    first, second = (optimisers.build(one, settings(name, weight_decay=0.01)) for one in (whole, half))
    for number in range(6):
        step(whole, first, number)
        if number < 3:
            step(half, second, number)

    tensors, numbers = optimisers.state(second, list(half))
    resumed = {key: torch.nn.Parameter(value.detach().clone()) for key, value in half.items()}
    third = optimisers.build(resumed, settings(name, weight_decay=0.01))
    optimisers.put(third, list(resumed), tensors, json.loads(json.dumps(numbers)))
    kept = {key: value.clone() for key, value in tensors.items()}
    for number in range(3, 6):
        step(resumed, third, number)

    assert_same_tensors(whole, resumed)
    assert_same_tensors(optimisers.state(first, list(whole))[0], optimisers.state(third, list(resumed))[0])
    assert optimisers.state(first, list(whole))[1] == optimisers.state(third, list(resumed))[1]
    assert_same_tensors(kept, tensors)  # what was given is copied, not written to


def test_the_states_are_what_their_names_say() -> None:
    states = {}
    for name in NAMES:
        values = parameters()
        optimiser = optimisers.build(values, settings(name))
        step(values, optimiser, 0)
        assert {value.dtype for value in values.values()} == {torch.float32}
        states[name] = optimisers.state(optimiser, list(values))
    tensors = states["adamw-8bit"][0]
    assert tensors["state1/large"].dtype == tensors["state2/large"].dtype == torch.uint8
    assert {"qmap1/large", "absmax1/large", "qmap2/large", "absmax2/large"} <= tensors.keys()
    assert tensors["state1/small"].dtype == torch.float32
    assert states["adamw-8bit"][1]["each"]["step"] == {"small": 1, "large": 1, "zero": 1}
    group = states["prodigy"][1]["groups"][0]
    assert group["k"] == 1
    assert {"d_max", "d_numerator", "growth_rate"} <= group.keys()
    assert "exp_avg_sq/zero" in states["adamw"][0]


def test_prodigy_finds_its_step_and_the_schedule_multiplies_it(capsys: pytest.CaptureFixture[str]) -> None:
    values = {"x": torch.nn.Parameter(torch.full((64,), 3.0))}
    optimiser = optimisers.build(values, settings("prodigy", weight_decay=0.1))
    assert capsys.readouterr().out == ""
    for _ in range(60):
        values["x"].grad = 2 * values["x"].detach()
        optimiser.step()
    assert float(values["x"].detach().abs().max()) < 2.9
    found = optimiser.param_groups[0]["d"]
    assert found > 1e-4
    before = values["x"].detach().clone()
    optimiser.param_groups[0]["lr"] = 1e-9
    values["x"].grad = 2 * before
    optimiser.step()
    assert torch.allclose(values["x"].detach(), before, atol=1e-6)
    assert optimiser.param_groups[0]["d"] >= found


@pytest.mark.parametrize(("name", "package"), [("adamw-8bit", "bitsandbytes"), ("prodigy", "prodigyopt")])
def test_a_missing_package_is_explained(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(wanted: str, *rest: object, **more: object) -> object:
        if wanted.split(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        return real(wanted, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(TrainerError, match=f"needs {package}") as caught:
        optimisers.build(parameters(), settings(name))
    assert "adapter-foundry[large]" in caught.value.mend
