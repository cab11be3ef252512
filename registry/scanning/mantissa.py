"""Data inside the numbers: what the low bits of a tensor say that training and rounding cannot have said.

A trained number is rounded, and the last bits of rounded numbers are as good as coin throws (Benford's law
flattens with each digit; Knuth, "The Art of Computer Programming", vol. 2, 4.2.4). A program or a text that
was written over them is not, unless it was compressed or encrypted: then no statistic can tell it from
rounding, and only writing the file in a shorter format removes it. What is looked for:

text and magic numbers   The bits that a writer would replace are read as bytes: those of the tensor, and the
                         lowest 1, 2, 4 or 8 bits of each number one after the other, at every offset and in
                         both orders of bits. `TEXT_BYTES` printable characters in a row are a text, and some
                         file formats begin with bytes that no chance gives. (A printable byte has a leading
                         zero: 24 of them at distance eight are what makes a closer look.)
a period of eight        The lowest bits of honest numbers do not know their place. Bytes do: in the lowest
                         bits, read as bytes, no place may be set more often than another by more than
                         `MAX_PHASE`. Finds data that is no text but has structure, such as machine code.
broken precision         (F32) A component of numbers that were float16 or bfloat16 before has zeros in its
                         low bits; one that was not has few of them. No rounding makes a component with more
                         than `_SCALED`, but not all, of such numbers.

The histogram of the values themselves is no evidence: a float16 or bfloat16 number times an alpha lies on few
values, unevenly, and so do numbers after few steps of Adam. Honest reasons for other oddities are left alone:
components of zeros (a lower rank padded to a higher one), whole components of a shorter precision (merges,
casts), numbers so small that float16 had fewer bits for them, inputs that training never reached, tensors too
small for a statistic.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from registry.formats import TensorInfo

TEXT_BYTES: Final = 40
"""Printable characters in a row that are a text: in random bytes once in 10^17."""

MAX_PHASE: Final = 0.08
"""How much more often than the mean one bit in eight may be set."""

MIN_NUMBERS: Final = 2048
"""A statistic of fewer numbers says nothing."""

_U8 = NDArray[np.uint8]
_Words = NDArray[np.uint16] | NDArray[np.uint32]
# The bits of the exponent, and those of 2^-14: below, a number that was float16 before has fewer bits.
_WHOLE: Final = {
    "F16": (0x7C00, 1 << 10),
    "BF16": (0x7F80, (127 - 14) << 7),
    "F32": (0x7F800000, (127 - 14) << 23),
}
_BELOW_F16: Final = 0x1FFF  # bits of float32 that float16 has not
_MIN_COMPONENT: Final = 64
_SCALED: Final = 0.4
_MAGICS: Final = (
    (b"PK\x03\x04", "a zip archive"),
    (b"\x7fELF", "a program"),
    (b"MZ\x90\x00", "a program"),
    (b"\x80\x04\x95", "a pickle"),
    (b"\x1f\x8b\x08", "a gzip file"),
    (b"\xfd7zXZ", "an xz file"),
    (b"7z\xbc\xaf", "a 7z archive"),
    (b"\x89PNG", "a picture"),
    (b"%PDF", "a PDF file"),
    (b"#!/", "a script"),
)
_TEXT = re.compile(rb"[\t\n\r\x20-\x7e]{%d,}" % TEXT_BYTES)
_DISTINCT = 8  # of the same few characters a constant is made, not a text
_LOOKS = 64  # closer looks at one stream of bits: honest ones need about none
_AROUND = 8 * TEXT_BYTES
_REVERSED = np.array([int(f"{byte:08b}"[::-1], 2) for byte in range(256)], np.uint8)
_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).astype(np.float64)


def hidden(piece: bytes, info: TensorInfo) -> Iterator[tuple[str, str]]:
    """Yield (rule, evidence) of what is hidden in a tensor; at most one a rule.

    Args:
        piece: the bytes of the tensor.
        info: its dtype and shape.
    """
    words = np.frombuffer(piece, "<u4" if info.dtype == "F32" else "<u2")
    for name, stream, aligned in _streams(piece, words):
        what = _content(stream, 0x80 if aligned else 0xFF)
        if what is not None:
            yield "ADP-NUM-010", f"{name} hold {what}"
            break
    oddity = _oddity(words, info)
    if oddity is not None:
        yield "ADP-NUM-011", oddity


def _streams(piece: bytes, words: _Words) -> Iterator[tuple[str, _U8, bool]]:
    """The bytes that may be hidden, and whether bytes of them can only begin where bytes of the tensor do."""
    yield "the tensor's bytes", np.frombuffer(piece, np.uint8), True
    if words.itemsize == 4:
        yield "the low halves of the numbers", words.astype("<u2").view(np.uint8), True
    low = words.astype(np.uint8)
    yield "the low bytes of the numbers", low, True
    even = low[: low.size // 8 * 8]
    # Shifts and masks on whole bytes are several times as fast as numpy's way to single bits.
    yield "the lowest 4 bits of the numbers", _joined(even, 4), False
    yield "the lowest 2 bits of the numbers", _joined(_joined(even, 2), 4), False
    yield "the lowest bits of the numbers", np.packbits(even & 0x01), False


def _joined(values: _U8, bits: int) -> _U8:
    """Each two neighbours in one byte, the first above the second."""
    low = (values[1::2] & ((1 << bits) - 1)).astype(np.uint8)
    return np.asarray((values[0::2] << bits) | low, np.uint8)


def _content(stream: _U8, places: int) -> str | None:
    """Return what a stream of bits spells, or None; ``places`` are the bits at which a byte may begin."""
    start = stream[:8].tobytes()
    for head in (start, _REVERSED[stream[:8]].tobytes()):
        for magic, what in _MAGICS:
            if head.startswith(magic):
                return f"what begins like {what}"
    groups = stream.size // 8
    if groups * 8 < TEXT_BYTES:
        return None
    folded = np.ascontiguousarray(stream[: groups * 8]).view(np.uint64)
    for shift in (32, 16, 8):
        folded = folded | (folded >> np.uint64(shift))
    seen = folded.astype(np.uint8)  # a bit is zero here if it is in all of eight bytes
    runs = seen[:-2] | seen[1:-1] | seen[2:]
    if runs.size == 0:
        runs = seen
    found = np.flatnonzero((runs & places != places) & (runs != 0))
    if found.size > _LOOKS:
        found = found[np.linspace(0, found.size - 1, _LOOKS).astype(int)]
    for at in found.tolist():
        text = _text(stream[max(0, at * 8 - _AROUND) : at * 8 + _AROUND])
        if text is not None:
            return f"the text {text!r}"
    return None


def _text(window: _U8) -> str | None:
    """Return a text in a window of bits, at whatever offset and in whatever order of bits, or None."""
    bits = np.unpackbits(window)
    for offset in range(8):
        aligned = np.packbits(bits[offset : offset + (bits.size - offset) // 8 * 8])
        for data in (aligned.tobytes(), _REVERSED[aligned].tobytes()):
            for match in _TEXT.finditer(data):
                if len(set(match[0])) >= _DISTINCT:
                    return match[0][:TEXT_BYTES].decode("ascii")
    return None


def _oddity(words: _Words, info: TensorInfo) -> str | None:
    """Return what is wrong with the statistics of the low bits, or None."""
    grid = words.reshape(info.shape)
    along = 1 if info.shape[0] <= info.shape[1] else 0  # a component is the long side
    exponent, smallest = _WHOLE[info.dtype]
    whole = (grid & exponent) >= smallest
    if info.dtype == "F32" and (broken := _broken_precision(grid, whole, along)):
        return broken
    # Zeros below every number of a component are a shorter precision; what counts is its own last bit.
    used = np.bitwise_or.reduce(np.where(whole, grid, 0), axis=along, keepdims=True)
    shift = np.log2(np.maximum(used & (~used + 1), 1)).astype(words.dtype)
    shifted = grid >> shift
    if np.count_nonzero(whole) < MIN_NUMBERS:
        return None
    uneven = _phase(shifted.ravel(), whole.ravel())
    if uneven > MAX_PHASE:
        return f"one in eight of the last bits is set {100 * uneven:.0f} % more or less often than the others"
    return None


def _phase(numbers: _Words, whole: NDArray[np.bool_]) -> float:
    """By how much the frequency of one last bit in eight is off the mean of all, beyond chance.

    Args:
        numbers: all of them, in their places.
        whole: which of them count.
    """
    counted = np.bincount(np.packbits(whole), minlength=256) @ _BITS
    last_bits = np.packbits((numbers & 1).astype(bool) & whole)
    enough = counted >= MIN_NUMBERS / 16
    if not enough.any():
        return 0.0
    shares = (np.bincount(last_bits, minlength=256) @ _BITS)[enough] / counted[enough]
    chance = 5 * np.sqrt(0.25 / counted[enough].min())
    return float(np.abs(shares - shares.mean()).max() - chance)


def _broken_precision(grid: _Words, whole: NDArray[np.bool_], along: int) -> str | None:
    """Whether a component is partly of float16's precision or less, and partly not.

    Inputs that are always zero leave their columns of A as they were at the start, in whatever precision that
    was. So a column of A that no component has changed counts for none of them, if most have changed others.
    """
    coarse = whole & ((grid & _BELOW_F16) == 0)
    fine = whole & ~coarse
    counted = whole
    if along == 1 and fine.any(axis=1).mean() > 0.5:
        counted = whole & fine.any(axis=0, keepdims=True)
    counts = counted.sum(axis=along)
    share = (coarse & counted).sum(axis=along) / np.maximum(counts, 1)
    # Of float16 numbers times a third, one in three is a short one again: no honest scale gives more.
    broken = (counts >= _MIN_COMPONENT) & (share > _SCALED) & (share < 1)
    if not broken.any():
        return None
    percent = 100 * float(share[broken].max())
    return f"{percent:.1f} % of a component's numbers have float16's precision or less, the others more"
