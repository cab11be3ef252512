"""Where the parts of a base model lie while they are not used, and how they come to the device that computes.

Two ways to serve a base on a device that is smaller than the base. *Models*: text encoders, VAE and denoiser
wait in the machine's memory and each is copied to the device for as long as it is used. *Blocks*: the
denoiser's blocks wait too, and the next one is copied while one runs. What is copied are the base's own
weights, bit for bit; the originals stay where they are, so that nothing is ever copied back. Layers that an
adapter brings are none of the base's: they stay on the device and may come and go at any time.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Final, cast

import torch

from registry.families import family
from serving.frozen import PLAIN, FrozenLinear, Stored

if TYPE_CHECKING:
    from PIL import Image

    from serving.pipelines.base import EditPipeline, OnStep, PromptEmbeds, Size
    from serving.pipelines.denoising import Denoising

_ALIGNED: Final = 512
_NAMES: Final[Mapping[torch.dtype, Stored]] = {dtype: name for name, dtype in PLAIN.items()}


def blocks(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """Return the repeated blocks of a denoiser by name, in the order of its lists."""
    return [
        (f"{name}.{child}", block)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and name.endswith("transformer_blocks")
        for child, block in module.named_children()
    ]


def stored_modules(model: torch.nn.Module) -> list[str]:
    """Return the linear layers of a denoiser's blocks: those whose weights may be kept small."""
    return [
        f"{name}.{child}"
        for name, block in blocks(model)
        for child, module in block.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]


def spread(count: int, chosen: int) -> frozenset[int]:
    """Return ``chosen`` of ``count`` places, evenly apart, so that each fetch has long to finish.

    The first block stays: nothing runs before it that could hide its fetch.
    """
    chosen = min(chosen, count)
    return frozenset(count - 1 - number * count // chosen for number in range(chosen))


def networks(pipeline: EditPipeline) -> dict[str, torch.nn.Module]:
    """Return the networks of a pipeline by their names in diffusers."""
    components: dict[str, Any] = cast(Any, pipeline).pipe.components
    return {name: part for name, part in components.items() if isinstance(part, torch.nn.Module)}


def freeze(block: torch.nn.Module) -> None:
    """Make layers that can wait of a block's ordinary linear layers; their weights stay as they are."""
    for name, linear in list(block.named_modules()):
        if isinstance(linear, torch.nn.Linear) and not isinstance(linear, FrozenLinear):
            parent, _, child = name.rpartition(".")
            setattr(block.get_submodule(parent), child, FrozenLinear(linear, _NAMES[linear.weight.dtype]))


def thaw(block: torch.nn.Module) -> None:
    """Make ordinary layers of those in a block whose numbers are ordinary."""
    for name, layer in list(block.named_modules()):
        if isinstance(layer, FrozenLinear) and layer.stored in PLAIN:
            parent, _, child = name.rpartition(".")
            setattr(block.get_submodule(parent), child, layer.thawed())


class Waiting:
    """Blocks whose weights wait in the machine's memory and are fetched for their forward pass.

    The next block is fetched while one runs: on CUDA from pinned memory on a stream of its own. A forward
    pass may happen twice for a block, the second time within a backward pass (checkpointing), which keeps the
    copies for as long as it needs them.

    Args:
        device: that computes.
        around: forward passes only, one after another: the order of the first pass is that of all, and after
            its last block comes its first. Otherwise passes go up and, within a backward pass, down again.
        room: where the blocks wait; None makes one.
    """

    def __init__(self, device: torch.device, *, around: bool = False, room: Room | None = None) -> None:
        self._device = device
        self._room = room or Room(device)
        self._around = around
        self._blocks: list[list[FrozenLinear]] = []
        self._undo = ExitStack()
        self._stream: Any = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._ahead: tuple[int, list[tuple[torch.Tensor | None, ...]]] | None = None
        self._mark: torch.cuda.Event | None = None
        self._last = -1
        self._after: dict[int, int] = {}

    def add(self, block: torch.nn.Module) -> None:
        """Let the linear layers of a block, which are `FrozenLinear`, wait from now on."""
        number = len(self._blocks)
        layers = [module for module in block.modules() if isinstance(module, FrozenLinear)]
        for layer in layers:
            layer.home = self._device
            for parameter in layer.parameters():
                parameter.data = self._room.keep(parameter.data)
        self._blocks.append(layers)
        before = block.register_forward_pre_hook(lambda *_: self._fetch(number))
        after = block.register_forward_hook(lambda *_: self._drop(number), always_call=True)
        self._undo.callback(before.remove)
        self._undo.callback(after.remove)
        self._undo.callback(thaw, block)

    def tensors(self) -> frozenset[int]:
        """Return the ids of the parameters that wait."""
        return frozenset(
            id(parameter) for layers in self._blocks for layer in layers for parameter in layer.parameters()
        )

    def bytes(self) -> int:
        """Return how much waits."""
        return sum(p.nbytes for layers in self._blocks for layer in layers for p in layer.parameters())

    def rest(self) -> None:
        """Give back what was fetched ahead; the next pass fetches it again."""
        self._ahead, self._last = None, -1

    def end(self) -> None:
        """Take the hooks out; the blocks stay in the machine's memory."""
        self._ahead = None
        for layer in (layer for layers in self._blocks for layer in layers):
            layer.home = None
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
        following = self._following(number)
        self._last = number
        if following != number and 0 <= following < len(self._blocks):
            self._ahead = self._start(following)

    def _following(self, number: int) -> int:
        """Return the block that is fetched while block ``number`` runs; a number of no block means none."""
        if self._around:
            # Some U-Nets run their middle before what is listed before it.
            if self._last >= 0:
                self._after[self._last] = number
            return self._after.get(number, (number + 1) % len(self._blocks))
        # Forward passes go up; in the backward pass they come down again.
        up = number >= self._last
        following = number + 1 if up else number - 1
        if not 0 <= following < len(self._blocks):
            following = number - 1 if up else number + 1
        return following

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


class Room:
    """The machine's memory that weights wait in; pinned where a CUDA device is to fetch them quickly.

    torch rounds each pinned piece up to a power of two, which for the layers of large bases is most of them
    again. So tensors lie side by side in large pieces.

    Args:
        device: that fetches.
        piece: bytes of a piece; a larger tensor has one of its own.
        pinned: whether it is; None follows the device.
    """

    def __init__(self, device: torch.device, *, piece: int = 1 << 30, pinned: bool | None = None) -> None:
        self._pinned = device.type == "cuda" if pinned is None else pinned
        self._size = piece
        self._piece = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the same numbers in this memory."""
        away = tensor.to("cpu")
        if not self._pinned:
            return away
        start = -(-self._used // _ALIGNED) * _ALIGNED
        if start + away.nbytes > len(self._piece):
            start, size = 0, max(self._size, away.nbytes)
            self._piece = torch.empty(size, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        self._used = start + away.nbytes
        place = self._piece[start : self._used].view(away.dtype).view(away.shape)
        return place.copy_(away)


class _Guest:
    """A network that waits in the machine's memory and is copied to the device while it is used."""

    def __init__(self, network: torch.nn.Module, device: torch.device, room: Room) -> None:
        self._device, self.here = device, False
        self._waiting: list[tuple[torch.Tensor, torch.Tensor]] = []
        for tensor in (*network.parameters(), *network.buffers()):
            tensor.data = room.keep(tensor.data)
            self._waiting.append((tensor, tensor.data))
        for module in network.modules():
            if isinstance(module, torch.nn.Linear):
                cast(Any, module).home = device  # for layers that an adapter puts beside it meanwhile

    def come(self) -> None:
        """Copy it to the device, unless it is there."""
        if not self.here:
            self.here = True
            for tensor, original in self._waiting:
                tensor.data = original.to(self._device, non_blocking=True, copy=True)

    def go(self) -> None:
        """Free the copy."""
        if self.here:
            for tensor, original in self._waiting:
                tensor.data = original
            self.here = False


class Offloaded:
    """An `EditPipeline` of which only what is used lies on the device; pictures are the same, bit for bit.

    Text encoders and denoiser take turns. The VAE is small: it comes when it is used and drives nobody away,
    so that a preview in the middle of a run does not cost a copy of the denoiser. One call at a time: the
    others wait.

    Args:
        pipeline: a loaded base whose networks are in the machine's memory.
        device: that computes.
        stream: whether the denoiser's blocks are fetched one by one; what is outside of them stays on the
            device then.
    """

    __slots__ = ("_denoiser", "_device", "_lock", "_pipeline", "_stream", "_texts", "_vae")

    def __init__(self, pipeline: EditPipeline, device: torch.device, *, stream: bool) -> None:
        self._pipeline, self._device = pipeline, device
        self._lock = threading.RLock()
        parts = networks(pipeline)
        model = parts.pop(family(pipeline.family).prefix)
        room = Room(device)
        self._vae = _Guest(parts.pop("vae"), device, room)
        self._texts = [_Guest(part, device, room) for part in parts.values()]
        self._stream = Waiting(device, around=True, room=room) if stream else None
        self._denoiser = None if stream else _Guest(model, device, room)
        if self._stream is not None:
            for _, block in blocks(model):
                freeze(block)
                self._stream.add(block)
            away = self._stream.tensors()
            for tensor in (*model.parameters(), *model.buffers()):
                if id(tensor) not in away:
                    tensor.data = tensor.data.to(device)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipeline, name)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._device

    @property
    def waiting_bytes(self) -> int:
        """Bytes of the denoiser that are fetched block by block."""
        return 0 if self._stream is None else self._stream.bytes()

    def encode_prompts(
        self, images: Sequence[Image.Image], prompts: Sequence[str], size: Size | None = None
    ) -> PromptEmbeds:
        """See `EditPipeline`."""
        with self._lock:
            self._settle(texts=True)
            return self._pipeline.encode_prompts(images, prompts, size)

    def encode_images(self, images: Sequence[Image.Image], size: Size | None = None) -> torch.Tensor:
        """See `EditPipeline`."""
        with self._lock, self._vae_here():
            return self._pipeline.encode_images(images, size)

    def predict(
        self,
        latents: torch.Tensor,
        image_latents: torch.Tensor,
        prompts: PromptEmbeds,
        level: torch.Tensor,
        size: Size | None = None,
    ) -> torch.Tensor:
        """See `EditPipeline`."""
        with self._lock:
            self._settle(texts=False)
            return self._pipeline.predict(latents, image_latents, prompts, level, size)

    def advance(self, runs: Sequence[Denoising]) -> None:
        """See `EditPipeline`."""
        with self._lock:
            self._settle(texts=False)
            self._pipeline.advance(runs)

    def denoise(
        self,
        image_latents: torch.Tensor,
        prompts: PromptEmbeds,
        *,
        seeds: Sequence[int],
        steps: int,
        on_step: OnStep | None = None,
        size: Size | None = None,
    ) -> torch.Tensor:
        """See `EditPipeline`."""
        with self._lock:
            self._settle(texts=False)
            return self._pipeline.denoise(
                image_latents, prompts, seeds=seeds, steps=steps, on_step=on_step, size=size
            )

    def decode(self, latents: torch.Tensor, size: Size | None = None) -> torch.Tensor:
        """See `EditPipeline`."""
        with self._lock, self._vae_here():
            return self._pipeline.decode(latents, size)

    def _settle(self, *, texts: bool) -> None:
        """Let the text encoders or the denoiser be on the device, the others first going away."""
        if texts:
            if self._stream is not None:
                self._stream.rest()
            arriving, leaving = self._texts, [self._denoiser] if self._denoiser is not None else []
        else:
            arriving, leaving = [self._denoiser] if self._denoiser is not None else [], self._texts
        if any(guest.here for guest in leaving):
            for guest in leaving:
                guest.go()
            if self._device.type == "cuda":
                # Blocks that the allocator keeps for the sizes of one model do not fit those of the other.
                torch.cuda.empty_cache()
        for guest in arriving:
            guest.come()

    @contextmanager
    def _vae_here(self) -> Iterator[None]:
        self._vae.come()
        try:
            yield
        finally:
            self._vae.go()
