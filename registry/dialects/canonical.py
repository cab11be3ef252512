"""A LoRA file of any dialect as its canonical one, made while it is read.

Nothing is written: each tensor is made of the original's bytes when somebody asks for it, so that a file of
any size is looked at module by module. Where the strength is 1 the bytes are the original's. Numbers that are
not finite stay so; what a dtype cannot hold after scaling becomes infinite: to find that is for who looks.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import Final

import numpy as np

from registry.content import Content
from registry.dialects.grammar import DIFFUSERS, Role
from registry.dialects.reading import LoraFile, Update
from registry.families import FAMILIES
from registry.formats import DTYPE_BYTES, Header, TensorInfo
from registry.scanning.product import F32, tensor

_ROLES: Final[tuple[Role, Role]] = ("A", "B")


class CanonicalContent:
    """The tensors of the canonical file, one behind the other; see `Content`.

    The tensor that was read last is kept, so that reading forwards in steps makes each once.

    Args:
        lora: what ``reading.read`` understood.
        content: the file that it was read from.
    """

    def __init__(self, lora: LoraFile, content: Content) -> None:
        self._content = content
        self._made: list[tuple[TensorInfo, Update, Role]] = []
        self._kept: tuple[int, bytes] | None = None
        tensors: dict[str, TensorInfo] = {}
        at, family = 0, FAMILIES[lora.base.family]
        for update in lora.updates:
            for role in _ROLES:
                shape = _shape(lora, update, role)
                size = math.prod(shape) * DTYPE_BYTES[lora.dtype]
                info = TensorInfo(dtype=lora.dtype, shape=shape, start=at, end=at + size)
                tensors[DIFFUSERS.key(update.factors.module, role, family)] = info
                self._made.append((info, update, role))
                at += size
        self._starts = [info.start for info, *_ in self._made]
        self._size = at
        self.header = Header(tensors=tensors, metadata={"format": "pt"})

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, where: slice, /) -> bytes:
        start, stop, step = where.indices(self._size)
        assert step == 1, "content is read forwards"
        pieces = []
        while start < stop:
            number = bisect_right(self._starts, start) - 1
            info = self._made[number][0]
            pieces.append(self._tensor(number)[start - info.start : stop - info.start])
            start = info.end
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _tensor(self, number: int) -> bytes:
        kept = self._kept
        if kept is not None and kept[0] == number:
            return kept[1]
        info, update, role = self._made[number]
        data = _bytes(self._content, update, role, info)
        self._kept = (number, data)
        return data


def _shape(lora: LoraFile, update: Update, role: Role) -> tuple[int, int]:
    if role == "A":
        return lora.rank, update.factors.a.shape[1]
    return update.factors.b.shape[0], lora.rank


def _bytes(content: Content, update: Update, role: Role, made: TensorInfo) -> bytes:
    """Return the bytes of a tensor of the canonical file."""
    source = update.factors.a if role == "A" else update.factors.b
    scale = update.scale if role == "B" else 1.0
    if source.dtype == made.dtype and scale == 1.0 and source.shape == made.shape:
        return content[source.start : source.end]
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        values = tensor(content, source) * np.float32(scale)
        padding = [(0, wanted - has) for wanted, has in zip(made.shape, source.shape, strict=True)]
        return _encoded(np.pad(values, padding), made.dtype)


def _encoded(values: F32, dtype: str) -> bytes:
    """Return numbers of a dtype, little-endian, rounded to the nearest, ties to even."""
    if dtype != "BF16":
        return values.astype("<f2" if dtype == "F16" else "<f4").tobytes()
    bits = np.ascontiguousarray(values, dtype="<f4").view(np.uint32)
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)
    # Rounding would carry the bits of NaN over; they come from bfloat16, so that none of them is cut off.
    halves = np.where(np.isfinite(values), rounded, bits) >> 16
    return halves.astype("<u2").tobytes()
