"""LoRA layers in a base model: fp32 weights over a frozen base of any precision.

The layers are our own: nothing is looked up or decided while the model runs, a compiler sees plain
arithmetic, and the base comes out as it went in. Their arithmetic is that of peft, which loads the export:
W x + scale B A x, or with DoRA (Liu et al., arXiv 2402.09353) m (W + scale B A) x / |W + scale B A| with the
norm over each row taken as a constant (section 4.3).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F

from registry.families import family
from serving.frozen import dense_weight
from trainer.data.batches import generator
from trainer.errors import BaseModelError
from trainer.recipe import Recipe
from trainer.sections import LoraSection


class LoraLinear(torch.nn.Module):
    """A frozen linear layer and its update.

    The weights are kept in fp32 and rounded to the dtype of the input for each product; gradients come back
    in fp32.

    Args:
        base: the frozen layer.
        a: the start of A, fp32 [rank, in]; B starts at zero, so the first step is the base itself.
        settings: scale, and whether to train magnitudes.
        device: of the weights; the base's own may wait elsewhere.
    """

    def __init__(
        self, base: torch.nn.Linear, a: torch.Tensor, settings: LoraSection, device: torch.device | str
    ) -> None:
        super().__init__()
        self.base_layer = base
        self.scale = settings.scale
        self.lora_A = torch.nn.Parameter(a.to(device))
        self.lora_B = torch.nn.Parameter(torch.zeros(base.out_features, len(a), device=device))
        self.lora_magnitude_vector: torch.nn.Parameter | None = None
        if settings.dora:
            squares = dense_weight(base, torch.float32).square().sum(1).to(device)
            self.register_buffer("squares", squares, persistent=False)
            self.lora_magnitude_vector = torch.nn.Parameter(squares.sqrt())

    @property
    def weight(self) -> torch.Tensor:
        """The base's weight: some models ask a layer for its dtype."""
        return self.base_layer.weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The base's bias."""
        return self.base_layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's output with the update."""
        rows = x.flatten(0, -2)
        output: torch.Tensor = self.base_layer(rows)
        hidden = F.linear(rows, self.lora_A.to(x.dtype)) * self.scale
        b = self.lora_B.to(x.dtype)
        if self.lora_magnitude_vector is None:
            # Into the base's fresh output: a large tensor is neither written nor read once more.
            output.addmm_(hidden, b.T)
        else:
            gain = self.lora_magnitude_vector / self._norm(x.dtype)
            plain = output if self.bias is None else output - self.bias.to(x.dtype)
            # gain - 1 and not gain: what is left of a gain near 1 in bf16 would be one of 256 steps.
            output = output + (gain - 1).to(x.dtype) * plain + gain.to(x.dtype) * F.linear(hidden, b)
        return output.unflatten(0, x.shape[:-1])

    @torch.no_grad()
    def _norm(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the fp32 norm [out] of each row of W + scale B A, without forming B A.

        |w + s b A|^2 = |w|^2 + 2 s b . (A w) + s^2 b A A^T b; at B = 0 that is |w|^2 to the bit.
        """
        a, b, s = self.lora_A, self.lora_B, self.scale
        across = F.linear(dense_weight(self.base_layer, dtype), a.to(dtype)).float()
        squares = self.squares + 2 * s * (b * across).sum(1) + s * s * (b @ (a @ a.T) * b).sum(1)
        return squares.clamp_min(torch.finfo(torch.float32).tiny).sqrt()


def target_modules(transformer: torch.nn.Module, family_name: str, targets: tuple[str, ...]) -> list[str]:
    """Return the full names of the modules that get a LoRA, in the order of the blocks.

    Modules whose output the last block throws away are left out: they would never get a gradient.

    Raises:
        BaseModelError: a target matches no linear layer of the transformer.
    """
    facts = family(family_name)
    linear = sorted(
        (
            name for name, module in transformer.named_modules()
            if isinstance(module, torch.nn.Linear) and facts.is_target(name)
        ),
        key=_natural,
    )  # fmt: skip
    kind_of = {name: facts.block_of(name)[1] for name in linear}
    kinds = sorted(set(kind_of.values()))
    for target in targets:
        if target not in kinds:
            near = difflib.get_close_matches(target, kinds, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise BaseModelError(
                f"the base has no modules {target!r} for a LoRA{hint}", "choose from: " + ", ".join(kinds)
            )
    silent = facts.silent(linear)
    return [name for name in linear if kind_of[name] in targets and name not in silent]


def inject(
    transformer: torch.nn.Module, recipe: Recipe, device: torch.device | str | None = None
) -> dict[str, torch.nn.Parameter]:
    """Put the LoRA layers of a recipe into a frozen transformer.

    Args:
        transformer: is changed in place.
        recipe: names the kinds of modules.
        device: see `wrap`.

    Returns:
        see `wrap`.

    Raises:
        BaseModelError: a target matches nothing, or the transformer carries a LoRA already.
    """
    names = target_modules(transformer, recipe.base.family, recipe.targets)
    return wrap(transformer, names, recipe.lora, recipe.seed, device=device)


def wrap(
    model: torch.nn.Module,
    names: Iterable[str],
    settings: LoraSection,
    seed: int,
    component: str = "",
    device: torch.device | str | None = None,
) -> dict[str, torch.nn.Parameter]:
    """Freeze a model and put LoRA layers over some of its linear layers.

    A starts uniform in +-1/sqrt(in) from the seed and its name alone.

    Args:
        model: is changed in place; `remove` undoes that.
        names: full names of linear layers.
        settings: rank, scale and kind of the update.
        seed: of the recipe.
        component: stands before every name, for models beside the denoiser ("text_encoder").
        device: of the new weights; None is where each layer's own are.

    Returns:
        "<module>.lora_A.weight", "<module>.lora_B.weight" and with DoRA "<module>.lora_magnitude_vector" ->
        fp32 parameter, in the order of ``names``.

    Raises:
        BaseModelError: the model carries a LoRA already.
    """
    if carries(model):
        raise BaseModelError("the base carries a LoRA already", "load the base again before training on it")
    model.requires_grad_(False)
    found: dict[str, torch.nn.Parameter] = {}
    for name in names:
        full = f"{component}.{name}" if component else name
        base = model.get_submodule(name)
        assert isinstance(base, torch.nn.Linear)
        source = generator(seed, "lora", full)
        a = torch.rand((settings.rank, base.in_features), generator=source) * 2 - 1
        layer = LoraLinear(
            base, a * (1 / math.sqrt(base.in_features)), settings, device or base.weight.device
        )
        _replace(model, name, layer)
        found[f"{full}.lora_A.weight"], found[f"{full}.lora_B.weight"] = layer.lora_A, layer.lora_B
        if layer.lora_magnitude_vector is not None:
            found[f"{full}.lora_magnitude_vector"] = layer.lora_magnitude_vector
    return found


def carries(model: torch.nn.Module) -> bool:
    """Return whether a model has LoRA layers, ours or those of peft."""
    # By name: peft takes seconds to import, and is there already if it made any.
    return any(
        kind is LoraLinear or kind.__name__ == "BaseTunerLayer"
        for module in model.modules()
        for kind in type(module).__mro__
    )


def remove(model: torch.nn.Module) -> None:
    """Take the LoRA layers out again; the base is as it was."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLinear):
            _replace(model, name, module.base_layer)


def put(parameters: Mapping[str, torch.nn.Parameter], values: Mapping[str, torch.Tensor]) -> None:
    """Copy ``values`` into the parameters of the same names."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])


def _replace(model: torch.nn.Module, name: str, module: torch.nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
