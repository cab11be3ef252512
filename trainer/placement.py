"""Where a base model lies while a LoRA is trained on it, in which numbers, and how its blocks are run.

The denoiser goes to the device block by block, and each block becomes small on its way (`trainer.frozen`), so
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

from trainer.errors import BaseModelError
from trainer.frozen import FrozenLinear, Stored

if TYPE_CHECKING:
    from serving.pipelines.base import EditPipeline
    from trainer.recipe import Recipe
    from trainer.sections import PrecisionSection

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
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
    return stored, _DTYPES[own if precision.compute == "auto" else precision.compute]


def blocks(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """Return the repeated blocks of a denoiser by name, in the order of its lists."""
    return [
        (f"{name}.{child}", block)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and name.endswith("transformer_blocks")
        for child, block in module.named_children()
    ]


def stored_modules(model: torch.nn.Module) -> list[str]:
    """Return the linear layers whose weights take the format of `formats`; the rest has the compute dtype."""
    return [
        f"{name}.{child}"
        for name, block in blocks(model)
        for child, module in block.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]


def encoding(pipeline: EditPipeline, device: torch.device | str) -> None:
    """Bring the encoders of prompts and pictures to ``device``; the denoiser stays where it is."""
    for part in _parts(pipeline).values():
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
    for name, part in _parts(pipeline).items():
        if part is not model:
            used = not name.startswith("text_encoder") or bool(recipe.lora.text_encoder)
            part.to(device if used else "cpu")
    model.requires_grad_(False)
    mesh = _mesh(device) if running.shard else None
    with ExitStack() as undo:
        waiting = _Waiting(torch.device(device))
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


def spread(count: int, chosen: int) -> frozenset[int]:
    """Return ``chosen`` of ``count`` places, evenly apart, so that each fetch has long to finish.

    The first block stays: nothing runs before it that could hide its fetch.
    """
    chosen = min(chosen, count)
    return frozenset(count - 1 - number * count // chosen for number in range(chosen))


def _parts(pipeline: EditPipeline) -> dict[str, torch.nn.Module]:
    """Return the networks of a pipeline by their names in diffusers."""
    components: dict[str, Any] = cast(Any, pipeline).pipe.components
    return {name: part for name, part in components.items() if isinstance(part, torch.nn.Module)}


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
            if always or _DTYPES.get(stored) != compute:
                parent, _, child = name.rpartition(".")
                setattr(block.get_submodule(parent), child, FrozenLinear(linear, stored))


def _settle_rest(
    model: torch.nn.Module,
    compute: torch.dtype,
    device: torch.device | str,
    leave: frozenset[int] = frozenset(),
) -> None:
    """Bring everything but the layers of `trainer.frozen` to the device and into the compute dtype."""
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


class _Waiting:
    """Blocks whose weights wait in the machine's memory and are fetched for their forward pass.

    A forward pass happens twice for each block, the second time within the backward pass (checkpointing),
    which keeps the copies for as long as it needs them. The next block is fetched while one runs: on CUDA
    from pinned memory on a stream of its own.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._blocks: list[list[FrozenLinear]] = []
        self._undo = ExitStack()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: tuple[int, list[tuple[torch.Tensor | None, ...]]] | None = None
        self._mark: torch.cuda.Event | None = None
        self._last = -1

    def add(self, block: torch.nn.Module) -> None:
        """Let the linear layers of a block wait from now on."""
        number = len(self._blocks)
        layers = [module for module in block.modules() if isinstance(module, FrozenLinear)]
        for parameter in (parameter for layer in layers for parameter in layer.parameters()):
            away = parameter.data.to("cpu")
            parameter.data = away.pin_memory() if self._stream is not None else away
        self._blocks.append(layers)
        before = block.register_forward_pre_hook(lambda *_: self._fetch(number))
        after = block.register_forward_hook(lambda *_: self._drop(number), always_call=True)
        self._undo.callback(before.remove)
        self._undo.callback(after.remove)
        self._undo.callback(_thaw, block)

    def tensors(self) -> frozenset[int]:
        """Return the ids of the parameters that wait."""
        return frozenset(
            id(parameter) for layers in self._blocks for layer in layers for parameter in layer.parameters()
        )

    def bytes(self) -> int:
        """Return how much waits."""
        return _bytes(p for layers in self._blocks for layer in layers for p in layer.parameters())

    def end(self) -> None:
        """Take the hooks out; the blocks stay in the machine's memory."""
        self._ahead = None
        self._undo.close()

    def _fetch(self, number: int) -> None:
        if self._ahead is None or self._ahead[0] != number:
            self._ahead = None  # frees what was fetched in vain before more is
            self._ahead = self._start(number)
        copies, self._ahead = self._ahead[1], None
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            # Without this the host would run ahead and have copies of many blocks made at once.
            if self._mark is not None:
                self._mark.synchronize()
            self._mark = current.record_event()
            for tensor in (tensor for group in copies for tensor in group if tensor is not None):
                tensor.record_stream(current)
        for layer, tensors in zip(self._blocks[number], copies, strict=True):
            layer.fetched = tensors
        # Forward passes go up; in the backward pass they come down again.
        up = number >= self._last
        self._last = number
        following = number + 1 if up else number - 1
        if not 0 <= following < len(self._blocks):
            following = number - 1 if up else number + 1
        if 0 <= following < len(self._blocks):
            self._ahead = self._start(following)

    def _start(self, number: int) -> tuple[int, list[tuple[torch.Tensor | None, ...]]]:
        """Begin to copy a block to the device."""
        with torch.cuda.stream(self._stream):
            return number, [
                tuple(
                    None if tensor is None else tensor.data.to(self._device, non_blocking=True, copy=True)
                    for tensor in (layer.weight, layer.scale, layer.bias)
                )
                for layer in self._blocks[number]
            ]

    def _drop(self, number: int) -> None:
        for layer in self._blocks[number]:
            layer.fetched = None


def _thaw(block: torch.nn.Module) -> None:
    """Make ordinary layers of those in a block whose numbers are ordinary."""
    for name, layer in list(block.named_modules()):
        if isinstance(layer, FrozenLinear) and layer.stored in _DTYPES:
            parent, _, child = name.rpartition(".")
            setattr(block.get_submodule(parent), child, layer.thawed())
