"""The tensors that were used last, in memory up to a limit."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class Held:
    """Remembers what ``read`` returned, least recently used first out. Threads may share it.

    Args:
        read: returns the tensors of keys, in order.
        limit: bytes of tensors that stay.
    """

    def __init__(self, read: Callable[[Sequence[str]], list[torch.Tensor]], limit: int) -> None:
        self._read, self._limit = read, limit
        self._tensors: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._lock = threading.Lock()
        self.bytes = 0
        self.reads = 0

    def __len__(self) -> int:
        return len(self._tensors)

    def get(self, keys: Sequence[str]) -> list[torch.Tensor]:
        """Return the tensors of ``keys``, in order; they must not be changed."""
        found: dict[str, torch.Tensor] = {}
        with self._lock:
            for key in keys:
                if key in self._tensors:
                    self._tensors.move_to_end(key)
                    found[key] = self._tensors[key]
        missing = list(dict.fromkeys(key for key in keys if key not in found))
        if missing:
            # Outside of the lock: the other thread may go on with what is there.
            found.update(zip(missing, self._read(missing), strict=True))
            self._keep({key: found[key] for key in missing})
        return [found[key] for key in keys]

    def _keep(self, tensors: dict[str, torch.Tensor]) -> None:
        with self._lock:
            self.reads += len(tensors)
            for key, value in tensors.items():
                if key not in self._tensors:
                    self._tensors[key] = value
                    self.bytes += value.nbytes
            while self.bytes > self._limit and self._tensors:
                self.bytes -= self._tensors.popitem(last=False)[1].nbytes
