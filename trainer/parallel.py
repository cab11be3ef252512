"""The processes of one training: which of them this is, sums over all, and one's word told to the others.

torchrun, and `accelerate launch` which starts it, tell each process its place in the environment. There is no
more to it: the model is not wrapped, nothing is read from a launcher's configuration, and so what is trained
does not depend on how it was started. What processes tell each other is JSON and tensors, never a pickle.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from trainer.errors import ProcessLost, TrainerError

_CPU = torch.device("cpu")
_PATIENCE = timedelta(hours=2)  # the launcher ends all when one dies, so nobody waits that long for the dead


@dataclass(frozen=True, kw_only=True, slots=True)
class Processes:
    """The processes of a training, seen from one of them.

    Attributes:
        rank: which one this is, from 0; number 0 is the main one, that writes.
        count: how many there are.
        device: what this one computes on.
    """

    rank: int = 0
    count: int = 1
    device: torch.device = _CPU

    @property
    def main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def add_up(self, tensor: torch.Tensor) -> None:
        """Replace a tensor by its sum over all processes, the same to the bit in each.

        Raises:
            ProcessLost: another process is gone; so in the other methods.
        """
        if self.count > 1:
            with _others():
                dist.all_reduce(tensor)

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """Overwrite a tensor with that of the main process and return it."""
        if self.count > 1:
            with _others():
                dist.broadcast(tensor, 0)
        return tensor

    def tell(self, value: Any, source: int = 0) -> Any:
        """Return the JSON value that process ``source`` has."""
        if self.count == 1:
            return value
        data = json.dumps(value).encode() if self.rank == source else b""
        size = torch.tensor([len(data)])
        with _others():
            dist.broadcast(size, source)
            body = torch.zeros(int(size), dtype=torch.uint8)
            if self.rank == source:
                body = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            dist.broadcast(body, source)
        return json.loads(body.numpy().tobytes())

    def gather(self, value: Any) -> list[Any]:
        """Return the JSON values of all processes, in their order."""
        return [self.tell(value, source) for source in range(self.count)]


@contextmanager
def _others() -> Iterator[None]:
    """Explain what torch says when another process is gone."""
    try:
        yield
    except RuntimeError as error:
        raise ProcessLost(
            f"another process of this training is gone: {error}",
            "see what it said, or whether it was killed; run the same command again to go on",
        ) from error


def gpus() -> int:
    """Return how many processes to start: one a GPU, or one."""
    return max(1, torch.cuda.device_count())


def device() -> torch.device:
    """Return what this process computes on."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def start() -> Processes:
    """Return the place of this process, after meeting the others if there are any.

    Raises:
        TrainerError: there are more processes than GPUs.
    """
    mine = device()
    if mine.type == "cuda":
        if mine.index >= gpus():
            raise TrainerError(
                f"process {mine.index} of this machine has no GPU of its own, for there are {gpus()}",
                "start one process for each GPU",
            )
        torch.cuda.set_device(mine)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes(device=mine)
    if not dist.is_initialized():
        # gloo for what lies in the machine's memory: words and checkpoints
        backend = "cuda:nccl,cpu:gloo" if mine.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=_PATIENCE)
    return Processes(rank=dist.get_rank(), count=dist.get_world_size(), device=mine)


def end() -> None:
    """Part from the other processes."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


class Gradients:
    """The gradients of all parameters in one fp32 buffer, and room behind them for what is summed with them.

    Every parameter's ``grad`` is a view of it: a backward pass adds to it, one collective sums it over the
    processes, one kernel measures it.
    """

    _ROOM = 32

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], processes: Processes) -> None:
        self._processes = processes
        self._size = sum(parameter.numel() for parameter in parameters.values())
        self._buffer = torch.zeros(self._size + self._ROOM, device=processes.device)
        begin = 0
        for parameter in parameters.values():
            parameter.grad = self._buffer[begin : begin + parameter.numel()].view_as(parameter)
            begin += parameter.numel()

    def clear(self) -> None:
        """Start anew."""
        self._buffer.zero_()

    def scale(self, factor: float) -> None:
        """Multiply all gradients."""
        self._buffer[: self._size].mul_(factor)

    def norm(self) -> torch.Tensor:
        """Return the Euclidean length of all gradients together, a scalar on the device."""
        return torch.linalg.vector_norm(self._buffer[: self._size])

    def add_up(self, sums: Mapping[str, torch.Tensor], stop: bool) -> tuple[dict[str, float], bool]:
        """Sum the gradients and some scalars over all processes; wait for the device once.

        Args:
            sums: of this process, of the same names in all of them.
            stop: whether this process was asked to stop.

        Returns:
            the summed scalars with the length of the summed gradient as "gradient", and whether any process
            was asked to stop.
        """
        end = self._size + len(sums) + 1
        tail = self._buffer[self._size : end]
        tail[:-1] = torch.stack([value.to(tail) for value in sums.values()])
        tail[-1].fill_(stop)
        self._processes.add_up(self._buffer[:end])
        *values, stops, norm = torch.cat([tail, self.norm()[None]]).tolist()
        return {**dict(zip(sums, values, strict=True)), "gradient": norm}, stops > 0
