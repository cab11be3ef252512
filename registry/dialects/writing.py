"""Writing a LoRA file in any dialect, one tensor at a time.

What is written has one rank and one dtype, and its strength folded into B, so that B @ A as it stands is the
update; where a dialect states alpha, it states the rank. Numbers are scaled in float32 and rounded to the
nearest, ties to even: a scale that is a power of two changes no digit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from registry.content import Content
from registry.dialects.grammar import KOHYA, TAKEN, TEXT, WRITABLE, DialectError, Role, Spelling
from registry.dialects.reading import LoraFile, Update
from registry.families import FAMILIES
from registry.formats import DTYPE_BYTES, TensorInfo, write_container
from registry.scanning.product import tensor

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

TOLERANCE: Final[Mapping[str, float]] = {"F32": 1e-6, "F16": 2**-10, "BF16": 2**-7}
"""How far rounding may move a module's strength: what is farther off was lost below the smallest number."""

_BLOCK = 1 << 20
"""Numbers that are scaled at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """What was written.

    Attributes:
        ratio: the length of a module's written update along the one that the file means, of the module where
            it is farthest from 1.0, which is exact.
        exact: whether every number is exactly the one that was meant.
    """

    ratio: float
    exact: bool


def write(
    lora: LoraFile,
    content: Content,
    to: str,
    sink: Callable[[bytes], object],
    dtype: str | None = None,
) -> Written:
    """Write a LoRA file in the dialect ``to``; "diffusers" is the registry's canonical layout.

    Args:
        lora: what ``reading.read`` understood.
        content: the file that it was read from; one module of it is in memory at a time.
        to: a name in WRITABLE.
        sink: takes the pieces of the new file in order, all of each.
        dtype: F16, BF16 or F32; None for the file's own.

    Raises:
        DialectError: a number is not finite, or the dtype cannot hold it; or the dialect has no name for a
            module.
    """
    spelling, dtype, family = WRITABLE[to], dtype or lora.dtype, FAMILIES[lora.base.family]
    _refuse_untaken(lora, to)
    contents: dict[str, tuple[Update, Role]] = {}
    tensors: dict[str, TensorInfo] = {}
    for update in lora.updates:
        for role, shape in _shapes(lora, update, spelling).items():
            key = spelling.key(update.factors.module, role, family)
            contents[key] = update, role
            kept = "F32" if role == "alpha" else dtype
            tensors[key] = TensorInfo(dtype=kept, shape=shape, start=0, end=0)
    rounded: dict[str, Update] = {}

    def pieces(key: str) -> Iterable[bytes]:
        update, role = contents[key]
        if role == "alpha":
            yield encode(np.array([lora.rank], dtype=np.float32), "F32", key)
            return
        for block in _blocks(content, update, role, dtype):
            if not block.exact:
                rounded[update.factors.module] = update
            yield block.padded(lora.rank, role, dtype)
        if role == "A" and update.factors.rank < lora.rank:
            yield bytes((lora.rank - update.factors.rank) * tensors[key].shape[1] * DTYPE_BYTES[dtype])

    write_container(tensors, pieces, sink)
    ratios = [_ratio(content, update, dtype) for update in rounded.values()]
    return Written(ratio=max(ratios, key=lambda ratio: abs(ratio - 1), default=1.0), exact=not rounded)


def peft_config(lora: LoraFile) -> bytes:
    """Return the ``adapter_config.json`` that belongs to a file in PEFT's dialect."""
    values = {
        "peft_type": "LORA",
        "base_model_name_or_path": lora.base.id,
        "revision": lora.base.revision,
        "r": lora.rank,
        "lora_alpha": lora.rank,
        "target_modules": [update.factors.module for update in lora.updates],
        "bias": "none",
        "inference_mode": True,
    }
    return json.dumps(values, indent=1).encode("ascii") + b"\n"


def encode(values: F32, dtype: str, where: str) -> bytes:
    """Return float32 values as little-endian bytes of a dtype, rounded to the nearest, ties to even.

    Raises:
        DialectError: a value is not finite, or too large for the dtype.
    """
    if not np.isfinite(values).all():
        raise DialectError("the numbers are not all finite", keys=[where])
    if dtype == "BF16":
        bits = np.ascontiguousarray(values, dtype="<f4").view(np.uint32)
        bits = bits + 0x7FFF + ((bits >> 16) & 1)
        halves = (bits >> 16).astype("<u2")
        fits = bool(((halves & 0x7F80) != 0x7F80).all())
        data = halves.tobytes()
    else:
        with np.errstate(over="ignore", under="ignore"):
            narrow = values.astype("<f2" if dtype == "F16" else "<f4")
        fits = bool(np.isfinite(narrow).all())
        data = narrow.tobytes()
    if not fits:
        raise DialectError(
            f"{dtype} cannot hold the numbers", "write it with more range (--dtype F32)", keys=[where]
        )
    return data


def _refuse_untaken(lora: LoraFile, to: str) -> None:
    """Write nothing that the loaders of a dialect would drop.

    Raises:
        DialectError: they know the family's modules by other names, or the file changes a text encoder, which
            only diffusers has one spelling for.
    """
    if to not in TAKEN.get(lora.base.family, {"diffusers", "peft"}):
        raise DialectError(
            f"programs that read {to} have other names for the modules of the family {lora.base.family}, and "
            "would load nothing without a word",
            "write it in the diffusers dialect (--to diffusers)",
        )
    texts = [update.factors.module for update in lora.updates if update.factors.module.startswith(TEXT)]
    if texts and to != "diffusers":
        raise DialectError(
            f"{to} has no name for modules of a text encoder that every loader takes for one",
            "write it in the diffusers dialect (--to diffusers)",
            keys=texts,
        )


def _shapes(lora: LoraFile, update: Update, spelling: Spelling) -> dict[Role, tuple[int, ...]]:
    into, out = update.factors.a.shape[1], update.factors.b.shape[0]
    shapes: dict[Role, tuple[int, ...]] = {"A": (lora.rank, into), "B": (out, lora.rank)}
    if spelling == KOHYA:
        shapes["alpha"] = ()
    return shapes


@dataclass(frozen=True, kw_only=True, slots=True)
class _Block:
    """Some rows of a factor: what the file means, and what the dtype made of it, also as bytes."""

    meant: F64
    written: F64
    data: bytes

    @property
    def exact(self) -> bool:
        return np.array_equal(self.meant, self.written)

    def padded(self, rank: int, role: Role, dtype: str) -> bytes:
        """Return the bytes with the columns of B filled up with zeros; the rows of A are filled up later."""
        rows, columns = self.meant.shape
        if role == "A" or columns == rank:
            return self.data
        size = DTYPE_BYTES[dtype]
        cells = np.frombuffer(self.data, dtype=np.uint8).reshape(rows, columns * size)
        return np.pad(cells, ((0, 0), (0, (rank - columns) * size))).tobytes()


def _blocks(content: Content, update: Update, role: Role, dtype: str) -> Iterator[_Block]:
    """Yield the rows of a factor as they are written."""
    info = update.factors.a if role == "A" else update.factors.b
    scale = update.scale if role == "B" else 1.0
    where = f"{update.factors.module}, factor {role}"
    rows, columns = info.shape
    row_bytes, step = columns * DTYPE_BYTES[info.dtype], max(1, _BLOCK // columns)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        part = TensorInfo(
            dtype=info.dtype,
            shape=(stop - start, columns),
            start=info.start + start * row_bytes,
            end=info.start + stop * row_bytes,
        )
        values = tensor(content, part)
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            data = encode(values * np.float32(scale), dtype, where)
        read = TensorInfo(dtype=dtype, shape=part.shape, start=0, end=len(data))
        yield _Block(
            meant=values.astype(np.float64) * scale,
            written=tensor(data, read).astype(np.float64),
            data=data,
        )


def _ratio(content: Content, update: Update, dtype: str) -> float:
    """Return how much of a module's update was written: <B'A', BA> / <BA, BA>, without forming a product.

    Raises:
        DialectError: it is farther from 1 than rounding explains.
    """
    a_along, a_length = _grams(content, update, "A", dtype)
    b_along, b_length = _grams(content, update, "B", dtype)
    length = float(np.sum(a_length * b_length))
    ratio = float(np.sum(a_along * b_along)) / length if length > 0 else 1.0
    if not abs(ratio - 1) <= TOLERANCE[dtype]:
        raise DialectError(
            f"{dtype} cannot hold the numbers of {update.factors.module} at their strength: {ratio:.4f} "
            "of it would be left",
            "write it with more precision (--dtype F32)",
        )
    return ratio


def _grams(content: Content, update: Update, role: Role, dtype: str) -> tuple[F64, F64]:
    """Return the products of the written with the meant factor, and of the meant one with itself, over all
    but the rank: both are (rank, rank)."""
    rank = update.factors.rank
    if role == "B":
        along, length = np.zeros((rank, rank)), np.zeros((rank, rank))
        for block in _blocks(content, update, role, dtype):
            along += block.written.T @ block.meant
            length += block.meant.T @ block.meant
        return along, length
    blocks = list(_blocks(content, update, role, dtype))
    meant = np.concatenate([block.meant for block in blocks])
    written = np.concatenate([block.written for block in blocks])
    return written @ meant.T, meant @ meant.T
