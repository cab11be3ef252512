"""The most bytes that are alive at once in a forward pass, counted on the meta device."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak(call: Callable[[], Any]) -> int:
    """Return the most bytes of tensors made by a call that are alive at once, without gradients."""
    alive = _Alive()
    with torch.no_grad(), alive, _Fused():
        call()
    return alive.most


class _Fused(TorchFunctionMode):
    """Within it attention makes its result and nothing else, as a fused kernel does."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value"), args, strict=False), **(kwargs or {}))
            query, value = given["query"], given["value"]
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return func(*args, **(kwargs or {}))


class _Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages of new tensors for as long as a tensor on them lives."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = self._now = 0
        self._users: Counter[int] = Counter()
        self._others: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor) and not self._users[_key(tensor)]:
                self._others.add(_key(tensor))  # weights, and what the caller brought
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and _key(tensor) not in self._others:
                self._add(tensor)
        return result

    def _add(self, tensor: torch.Tensor) -> None:
        key, nbytes = _key(tensor), tensor.untyped_storage().nbytes()
        if not self._users[key]:
            self._now += nbytes
            self.most = max(self.most, self._now)
        self._users[key] += 1
        weakref.finalize(tensor, self._drop, key, nbytes)

    def _drop(self, key: int, nbytes: int) -> None:
        self._users[key] -= 1
        if not self._users[key]:
            self._now -= nbytes


def _key(tensor: torch.Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key
