"""Where a base model lies while a LoRA is trained on it, in which numbers, and how its blocks are run.

The denoiser goes to the device block by block, and each block becomes small on its way (`serving.frozen`), so
the device never holds the base as it was published. Text encoders stay away once everything is cached. What
`training` hooks into the denoiser is gone afterwards; its numbers stay those of the recipe.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.utils.checkpoint import checkpoint

from serving.frozen import PLAIN, FrozenLinear, Stored
from serving.placement import Waiting, blocks, networks, spread
from trainer.errors import BaseModelError

if TYPE_CHECKING:
    from serving.pipelines.base import EditPipeline
    from trainer.recipe import Recipe
    from trainer.sections import PrecisionSection

_INPUTS = frozenset({"sample", "hidden_states", "encoder_hidden_states", "pooled_projections"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Placed:
    """What this process keeps of the frozen denoiser.

    Attributes:
        held_bytes: on the device that computes.
        waiting_bytes: in the machine's memory, fetched block by block.
    """

    held_bytes: int
    waiting_bytes: int


def formats(precision: PrecisionSection, device: torch.device | str) -> tuple[Stored, torch.dtype]:
    """Return in which format the weights of the blocks are kept, and in which dtype is computed."""
    own: Stored = "fp32" if torch.device(device).type == "cpu" else "bf16"
    stored: Stored = own if precision.base == "auto" else precision.base
    return stored, PLAIN[own if precision.compute == "auto" else precision.compute]


def encoding(pipeline: EditPipeline, device: torch.device | str) -> None:
    """Bring the encoders of prompts and pictures to ``device``; the denoiser stays where it is."""
    for part in networks(pipeline).values():
        if part is not pipeline.transformer:
            part.to(device)


@contextmanager
def training(pipeline: EditPipeline, recipe: Recipe, device: torch.device | str) -> Iterator[Placed]:
    """Have the denoiser ready to be trained on, as ``precision`` and ``running`` of the recipe say.

    LoRA layers go in afterwards and come out before the end. With ``running.shard`` and several processes the
    denoiser stays spread over them for good, and each of them has to take part in every forward pass.

    Raises:
        BaseModelError: the denoiser was made small in another format before.
    """
    running, model = recipe.running, pipeline.transformer
    stored, compute = formats(recipe.precision, device)
    for name, part in networks(pipeline).items():
        if part is not model:
            used = not name.startswith("text_encoder") or bool(recipe.lora.text_encoder)
            part.to(device if used else "cpu")
    model.requires_grad_(False)
    mesh = _mesh(device) if running.shard else None
    with ExitStack() as undo:
        waiting = Waiting(torch.device(device))
        undo.callback(waiting.end)
        found = blocks(model)
        apart = spread(len(found), running.offload_blocks)
        for index, (_, block) in enumerate(found):
            _settle_linears(block, stored, compute, device, always=index in apart)
            _settle_rest(block, compute, device)
            if index in apart:
                waiting.add(block)
            elif mesh is not None:
                _shard(block, mesh)
        _settle_rest(model, compute, device, leave=waiting.tensors())
        if mesh is not None:
            _shard(model, mesh)
        undo.callback(model.register_forward_pre_hook(_casting(compute), with_kwargs=True).remove)
        if running.checkpointing:
            model.enable_gradient_checkpointing(_again)  # type: ignore[operator]
            undo.callback(cast(Any, model).disable_gradient_checkpointing)
        if running.compile:
            for _, block in found:
                block.compile()
                undo.callback(setattr, block, "_compiled_call_impl", None)
        yield Placed(held_bytes=_bytes(model.parameters()) - waiting.bytes(), waiting_bytes=waiting.bytes())


def _settle_linears(
    block: torch.nn.Module, stored: Stored, compute: torch.dtype, device: torch.device | str, always: bool
) -> None:
    """Bring the linear layers of a block into their format, each on its way to the device.

    A layer that is kept as it is computed stays an ordinary one, unless ``always`` wants it to be ours.
    """
    for name, linear in list(block.named_modules()):
        if isinstance(linear, FrozenLinear):
            if linear.stored != stored:
                raise BaseModelError(
                    f"the base was made {linear.stored} before and the recipe wants {stored}",
                    "load the base again for another precision.base",
                )
            linear.to(device)
        elif isinstance(linear, torch.nn.Linear):
            linear.to(device)
            if always or PLAIN.get(stored) != compute:
                parent, _, child = name.rpartition(".")
                setattr(block.get_submodule(parent), child, FrozenLinear(linear, stored))


def _settle_rest(
    model: torch.nn.Module,
    compute: torch.dtype,
    device: torch.device | str,
    leave: frozenset[int] = frozenset(),
) -> None:
    """Bring everything but the layers of `serving.frozen` to the device and into the compute dtype."""
    from torch.distributed.tensor import DTensor

    for module in model.modules():
        own = isinstance(module, FrozenLinear)
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in leave and not isinstance(parameter, DTensor):
                kept = own or not parameter.is_floating_point()
                moved = parameter.detach().to(device, parameter.dtype if kept else compute)
                module.register_parameter(name, torch.nn.Parameter(moved, requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[name] = buffer.to(device)


def _casting(compute: torch.dtype) -> Any:
    """Return a hook that brings what the denoiser looks at into the compute dtype; levels stay exact."""

    def cast_one(value: Any) -> Any:
        return value.to(compute) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        named = {name: cast_one(value) if name in _INPUTS else value for name, value in kwargs.items()}
        return (*map(cast_one, args[:1]), *args[1:]), named

    return hook


def _again(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run a block so that its backward pass computes its activations again; nothing in it is random."""
    return checkpoint(module.__call__, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def _mesh(device: torch.device | str) -> Any:
    """Return all processes as one row of devices, or None if there is only this one."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh

    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return None
    return init_device_mesh(torch.device(device).type, (distributed.get_world_size(),))


def _shard(module: torch.nn.Module, mesh: Any) -> None:
    """Leave this process its part of a module's weights; they are gathered for as long as they are used."""
    from torch.distributed.fsdp import fully_shard

    fully_shard(module, mesh=mesh)


def _bytes(tensors: Any) -> int:
    """Return the bytes of tensors that lie in this process."""
    local = (getattr(tensor, "to_local", lambda tensor=tensor: tensor)() for tensor in tensors)
    return sum(tensor.numel() * tensor.element_size() for tensor in local)
