"""The layers that hold adapters beside a base's own modules: put in, found again, taken out.

A layer holds the updates of every adapter that is resident. Which of them a row of the batch gets, and how
strongly, is said once for all layers by their `Routing`: another adapter serves as soon as it says so, with
no byte copied, and rows of one batch can have different ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer

from serving.errors import AdapterMismatch
from serving.frozen import FrozenLinear, home_of

Key = str
"""What a resident adapter is called here: its digest."""

Shares = tuple[tuple[Key, float], ...]
"""Resident adapters and the strength of each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """What an adapter does to one module.

    Attributes:
        a: [rank, in].
        b: [out, rank].
        magnitude: with DoRA the lengths [out] of the rows of the weight that B A was added to, fp32.
    """

    a: torch.Tensor
    b: torch.Tensor
    magnitude: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Placed:
    """An update where its module computes, in the numbers that it computes in.

    Attributes:
        gain: with DoRA what each row of W + B A is multiplied with [out], fp32.
    """

    a: torch.Tensor
    b: torch.Tensor
    gain: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return sum(tensor.nbytes for tensor in (self.a, self.b, self.gain) if tensor is not None)

    def weight(self, base: torch.Tensor, strength: float) -> torch.Tensor:
        """Return in fp32 what a weight [out, in] changes by at a strength."""
        product = self.b.float() @ self.a.float()
        if self.gain is None:
            return strength * product
        gain = self.gain[:, None]
        return strength * ((gain - 1) * base.float() + gain * product)


@dataclass(slots=True)
class Routing:
    """Which adapters each row of a batch gets; one for all layers of a base.

    Attributes:
        groups: how many rows have which adapters, one group after another; a single group is all rows,
            however many they are.
    """

    groups: tuple[tuple[int, Shares], ...] = field(default_factory=tuple)

    def set(self, rows: Sequence[Shares]) -> None:
        """Say it for the rows of the next forward passes; neighbours with the same adapters go together."""
        groups: list[tuple[int, Shares]] = []
        for shares in rows:
            if groups and groups[-1][1] == shares:
                groups[-1] = (groups[-1][0] + 1, shares)
            else:
                groups.append((1, shares))
        self.groups = tuple(groups)


class AdaptedLinear(torch.nn.Module):
    """A linear layer of the base, and the updates that adapters have for it.

    The output for a row is W x + bias + sum_k s_k B_k A_k x over the adapters k of its row. With DoRA the
    trained weight is W' = m (W + B A) / |W + B A|, row by row (Liu et al., arXiv 2402.09353, eq. 5), and its
    term is s (W' - W) x. At strength 0 a term is left out, not multiplied, so the row is the base's to the
    bit.

    Args:
        base: the base's own layer.
        routing: says who gets what.
    """

    def __init__(self, base: torch.nn.Linear, routing: Routing) -> None:
        super().__init__()
        self.base_layer = base
        self.routing = routing
        self.updates: dict[Key, Placed] = {}
        self.train(base.training)

    @property
    def weight(self) -> torch.Tensor:
        """The base's weight: some models ask a layer for its dtype."""
        return self.base_layer.weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The base's bias."""
        return self.base_layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's output [..., out] for x [rows, ..., in].

        Some models put the same rows twice into a layer, one whole batch after the other.
        """
        output: torch.Tensor = self.base_layer(x)
        groups = self.routing.groups
        if len(groups) == 1:
            for change, strength in self._changes(output, x, groups[0][1]):
                output = torch.add(output, change, alpha=strength)
            return output
        rows = sum(count for count, _ in groups)
        for first in range(0, len(x) if rows else 0, rows or 1):
            for count, shares in groups:
                part, first = slice(first, first + count), first + count
                for change, strength in self._changes(output[part], x[part], shares):
                    output[part].add_(change, alpha=strength)
        return output

    def _changes(
        self, plain: torch.Tensor, x: torch.Tensor, shares: Shares
    ) -> list[tuple[torch.Tensor, float]]:
        """What each adapter adds to the base's output for some rows, and how strongly."""
        found = []
        for key, strength in shares:
            update = self.updates.get(key)
            if update is None or strength == 0:
                continue
            change = F.linear(F.linear(x, update.a), update.b)
            if update.gain is not None:
                bare = plain if self.bias is None else plain - self.bias.to(plain.dtype)
                # gain - 1 is taken in fp32: what is left of a gain near 1 in bf16 would be one of 256 steps.
                change = (update.gain - 1).to(x.dtype) * bare + update.gain.to(x.dtype) * change
            found.append((change, strength))
        return found


def place(update: Update, linear: torch.nn.Linear, weight: torch.Tensor | None = None) -> Placed:
    """Copy an update to where a module of the base computes.

    Args:
        update: of the module.
        linear: the module.
        weight: [out, in] as the base has it, where the module's holds merged updates at the moment.

    Raises:
        AdapterMismatch: it is DoRA, and the base is quantised.
    """
    device, dtype = home_of(linear)
    if update.magnitude is None:
        return Placed(a=_copied(update.a, device, dtype), b=_copied(update.b, device, dtype))
    if not _is_plain(linear):
        raise AdapterMismatch(
            "the adapter is DoRA, which needs the lengths of the base's rows, and the base is quantised",
            "serve it on the base in bfloat16, or train a plain LoRA",
        )
    a, b, magnitude = (tensor.to(device, torch.float32) for tensor in (update.a, update.b, update.magnitude))
    with torch.no_grad():
        base = linear.weight if weight is None else weight
        lengths = (base.to(device).float() + b @ a).norm(dim=1)
    # A row of zeros has no direction to give a length to.
    gain = torch.where(lengths > 0, magnitude / lengths.clamp_min(torch.finfo(torch.float32).tiny), 1.0)
    return Placed(a=_copied(a, device, dtype), b=_copied(b, device, dtype), gain=gain)


def _copied(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """A tensor there; on a processor the file's own bytes serve, which nothing writes to."""
    return tensor.to(device=device, dtype=dtype, non_blocking=True)


def mergeable(linear: torch.nn.Linear) -> bool:
    """Whether a weight is plain numbers that stay where the layer computes; copies of what waits do not."""
    waits = getattr(linear, "home", None) is not None
    return _is_plain(linear) and not isinstance(linear, FrozenLinear) and not waits


def _is_plain(linear: torch.nn.Linear) -> bool:
    return linear.weight.dtype in (torch.float32, torch.bfloat16, torch.float16)


def found(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Return every layer that wraps one of the base's with an update, ours or anybody's, by module name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, AdaptedLinear | BaseTunerLayer)
        or (hasattr(module, "base_layer") and hasattr(module, "lora_A"))
    }


def unwrap(model: torch.nn.Module) -> None:
    """Put the base's own modules back into their places."""
    for name, layer in found(model).items():
        base = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer.base_layer
        replace(model, name, base)  # type: ignore[arg-type]


def replace(model: torch.nn.Module, name: str, module: torch.nn.Module) -> None:
    """Put a module into the place of another."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
