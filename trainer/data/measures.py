"""What is measured of each picture, and how far apart perceptual hashes are.

All are numbers of one picture alone, so they are measured once and in any place. Sharpness is reckoned in
whole numbers: it is the same on every machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

BITS: Final = 256
"""Bits of a perceptual hash."""
MIN_QUALITY: Final = 50
"""PDQ hashes of less quality (0 to 100) say little, as those of flat pictures: they are not compared."""

_BLOCK = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """What a picture looks like.

    Attributes:
        sharpness: see `sharpness`.
        pdq: perceptual hash, 64 hex digits.
        quality: of the hash, 0 to 100.
    """

    sharpness: float
    pdq: str
    quality: int


def look(pixels: np.ndarray) -> Look:
    """Measure a picture, uint8 [H, W, 3] RGB."""
    pdq, quality = perceptual_hash(pixels)
    return Look(sharpness=sharpness(pixels), pdq=pdq, quality=quality)


def sharpness(pixels: np.ndarray) -> float:
    """Return the variance of the Laplacian of a picture's luma; 0 is flat.

    After Pech-Pacheco et al., "Diatom autofocusing in brightfield microscopy" (ICPR 2000). The luma is that
    of ITU-R BT.601, rounded to whole numbers 0 to 255; the Laplacian has the kernel [0 1 0; 1 -4 1; 0 1 0],
    and places at the edge, where it would look outside, are left out.

    Args:
        pixels: uint8 [H, W, 3] RGB, both sides at least 3.
    """
    red, green, blue = (pixels[..., channel].astype(np.int32) for channel in range(3))
    luma = (299 * red + 587 * green + 114 * blue + 500) // 1000
    inner = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:] - 4 * luma[1:-1, 1:-1]
    count, total = inner.size, int(inner.sum(dtype=np.int64))
    squares = int(np.square(inner).sum(dtype=np.int64))
    return (count * squares - total * total) / (count * count)


def perceptual_hash(pixels: np.ndarray) -> tuple[str, int]:
    """Return the PDQ hash of a picture (64 hex digits) and its quality (0 to 100).

    PDQ is Meta's: "The TMK+PDQF Video-Hashing Algorithm and the PDQ Image-Hashing Algorithm" (2019). It takes
    the signs of the 16 x 16 low frequencies of the luma against their median.

    Args:
        pixels: uint8 [H, W, 3] RGB.
    """
    import pdqhash

    bits, quality = pdqhash.compute(np.ascontiguousarray(pixels))
    return np.packbits(bits.astype(np.uint8)).tobytes().hex(), int(quality)


def packed(hashes: list[str]) -> np.ndarray:
    """Return hashes as uint64 [N, 4]."""
    return np.frombuffer(bytes.fromhex("".join(hashes)), np.uint64).reshape(-1, BITS // 64)


def distance(first: str, second: str) -> int:
    """Return in how many bits two hashes differ."""
    return (int(first, 16) ^ int(second, 16)).bit_count()


def near(hashes: np.ndarray, most: int) -> Iterator[tuple[int, int, int]]:
    """Yield (first, second, bits) for all pairs first < second that differ in at most ``most`` bits.

    All pairs are compared, in blocks: N squared / 2 comparisons of 32 bytes in numpy, with memory for 256 x N
    of them. 10,000 hashes take about a second, 50,000 about half a minute; beyond that an index is needed.

    Args:
        hashes: uint64 [N, 4].
        most: bits.
    """
    for begin in range(0, len(hashes), _BLOCK):
        rest = hashes[begin:]
        bits = np.zeros((min(_BLOCK, len(rest)), len(rest)), np.uint16)
        for word in range(hashes.shape[1]):
            bits += np.bitwise_count(rest[: len(bits), None, word] ^ rest[None, :, word])
        first, second = np.nonzero(bits <= most)
        for x, y in zip(first.tolist(), second.tolist(), strict=True):
            if x < y:
                yield begin + x, begin + y, int(bits[x, y])
