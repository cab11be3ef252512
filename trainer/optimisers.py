"""The optimisers by name, the schedule, and states as plain tensors and numbers.

The loop sets the learning rate of each step; Prodigy multiplies it with the step size d that it finds.
"""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from typing import Any

import torch

from trainer.errors import TrainerError
from trainer.sections import OptimiserSection


def build(parameters: Mapping[str, torch.nn.Parameter], settings: OptimiserSection) -> torch.optim.Optimizer:
    """Return the optimiser of a recipe over named fp32 parameters.

    AdamW is Loshchilov and Hutter's (arXiv 1711.05101), with moments in blocks of 8 bits by Dettmers et al.
    (arXiv 2110.02861), Prodigy is Mishchenko and Defazio's (arXiv 2306.06101).

    Raises:
        TrainerError: the package of this optimiser is not installed.
    """
    values = list(parameters.values())
    common: dict[str, Any] = {
        "lr": settings.learning_rate, "betas": settings.betas, "weight_decay": settings.weight_decay
    }  # fmt: skip
    try:
        if settings.name == "adamw-8bit":
            # On a CPU it misses a kernel for 4-bit products, which no optimiser needs, and says so.
            logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
            from bitsandbytes.optim import AdamW8bit

            return AdamW8bit(values, **common)
        if settings.name == "prodigy":
            from prodigyopt import Prodigy

            with redirect_stdout(io.StringIO()):  # it prints a remark, and stdout is for data
                return Prodigy(values, **common, use_bias_correction=True, safeguard_warmup=True)
    except ImportError as error:
        raise TrainerError(
            f"the optimiser {settings.name} needs {error.name}, which is not installed",
            "pip install 'adapter-foundry[large]', or set optimiser.name to adamw",
        ) from None
    return torch.optim.AdamW(values, **common, foreach=True)


def state(
    optimiser: torch.optim.Optimizer, names: Sequence[str]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Take an optimiser's state apart.

    Args:
        optimiser: any; its tensors are returned as they are, not copied.
        names: of its parameters, in the order that it was given them.

    Returns:
        tensors named "<what>/<parameter>", and all else as JSON values: the numbers kept for a parameter, and
        those of the groups of parameters.
    """
    # The plain method: bitsandbytes' own hides its tensors from FSDP in a further mapping.
    found = torch.optim.Optimizer.state_dict(optimiser)
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for index, values in found["state"].items():
        for what, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{what}/{names[index]}"] = value
            else:
                numbers.setdefault(what, {})[names[index]] = value
    groups = [
        {key: value for key, value in group.items() if key != "params"} for group in found["param_groups"]
    ]
    return tensors, {"each": numbers, "groups": groups}


def put(
    optimiser: torch.optim.Optimizer,
    names: Sequence[str],
    tensors: Mapping[str, torch.Tensor],
    numbers: Mapping[str, Any],
) -> None:
    """Give an optimiser the state that `state` took apart; tensors are copied."""
    each: dict[int, dict[str, Any]] = {}
    place = {name: number for number, name in enumerate(names)}
    for key, value in tensors.items():
        what, name = key.split("/", 1)
        each.setdefault(place[name], {})[what] = value.clone()
    for what, values in numbers["each"].items():
        for name, value in values.items():
            each.setdefault(place[name], {})[what] = value
    groups = [
        {key: tuple(value) if isinstance(value, list) else value for key, value in group.items()}
        for group in numbers["groups"]
    ]
    begin = 0
    for group, now in zip(groups, optimiser.param_groups, strict=True):
        group["params"] = list(range(begin, begin + len(now["params"])))
        begin += len(now["params"])
    optimiser.load_state_dict({"state": each, "param_groups": groups})


def learning_rate(settings: OptimiserSection, step: int, total: int) -> float:
    """Return the learning rate of a step of ``total``, counted from 0: a warm-up, then the schedule."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    share = (step - settings.warmup_steps) / max(1, total - settings.warmup_steps)
    left = {"cosine": 0.5 * (1 + math.cos(math.pi * share)), "linear": 1 - share, "constant": 1.0}
    final = settings.final_share
    return settings.learning_rate * (final + (1 - final) * left[settings.schedule])
