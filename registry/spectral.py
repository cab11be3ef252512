"""How much two low-rank updates differ, exactly and without forming a matrix of the base's size.

The difference of the updates of one module is a product of stacked factors,

    D = B1 A1 - B2 A2 = [B1  -B2] [A1; A2]           (out x r) (r x in),  r = r1 + r2.

With the QR decompositions [B1 -B2] = Q_B R_B and [A1; A2]^T = Q_A R_A, whose Q have orthonormal columns,
D = Q_B (R_B R_A^T) Q_A^T has the singular values of the r x r matrix R_B R_A^T: the spectral norm is its
largest one, the Frobenius norm the root of the sum of their squares. This is the product SVD by QR of Golub,
Solna and Van Dooren, "Computing the SVD of a general matrix product/quotient", SIAM J. Matrix Anal. Appl. 22
(2000), 1-19, for two factors; see also Golub and Van Loan, "Matrix Computations", 4th ed., 5.2 (QR) and 8.6.
Far cheaper are the Gram matrices G_A = [A1; A2] [A1; A2]^T and G_B = [B1 -B2]^T [B1 -B2]: the squares of
the same singular values are the eigenvalues of G_A^(1/2) G_B G_A^(1/2). But two similar updates cancel, and
squares double the digits that are lost: below `CANCELLED` the difference is computed again by QR, so that a
relative change of 1e-8 is told from none. Both factors of an update are scaled to the same Frobenius norm
first, which changes nothing but the rounding.

Sums need the Gram matrices only: <B1 A1, B2 A2> = tr(A1^T B1^T B2 A2) = sum((B1^T B2) * (A1 A2^T)).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from registry.content import Content
from registry.errors import InvalidDocument
from registry.formats import Header, TensorInfo, parse_key, read_header
from registry.scanning.product import F64, singular_values, spectral_norm, tensor

Factors = tuple[F64, F64]
"""A module's update B @ A as (A, B): A is (rank, in), B is (out, rank)."""

CANCELLED: Final = 1e-2
"""A difference that is smaller than this part of the updates (Frobenius) is computed by QR."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleChange:
    """How the update of one module differs.

    Attributes:
        module: the base's module.
        norm: spectral norm of the first update; 0 if it has none.
        other: spectral norm of the second one.
        difference: spectral norm of the first minus the second.
    """

    module: str
    norm: float
    other: float
    difference: float

    @property
    def relative(self) -> float | None:
        """The difference as a part of the first update; None if there is none but a difference."""
        if self.norm > 0:
            return self.difference / self.norm
        return 0.0 if self.difference == 0 else None


@dataclass(frozen=True, kw_only=True, slots=True)
class SpectralChange:
    """How two adapters differ as linear maps.

    Attributes:
        modules: every module that at least one of them changes, by name.
        norm: Frobenius norm of all updates of the first adapter together.
        other: the same of the second one.
        difference: Frobenius norm of all differences.
        cosine: of the angle between the two, as vectors of all entries; None if one of them is zero.
    """

    modules: tuple[ModuleChange, ...]
    norm: float
    other: float
    difference: float
    cosine: float | None

    @property
    def relative(self) -> float | None:
        """The Frobenius norm of the difference as a part of the first adapter; None if that is zero."""
        if self.norm > 0:
            return self.difference / self.norm
        return 0.0 if self.difference == 0 else None

    def most_changed(self, count: int = 5) -> tuple[ModuleChange, ...]:
        """The modules that differ most, relative to the first adapter; ties by their name."""

        def order(change: ModuleChange) -> tuple[float, str]:
            relative = change.relative
            return (-np.inf if relative is None else -relative, change.module)

        return tuple(sorted((found for found in self.modules if found.difference > 0), key=order)[:count])


def compare(first: Content, second: Content) -> SpectralChange:
    """Compare the weights of two adapters, one module in memory at a time.

    Args:
        first: a safetensors file in the canonical layout, with alpha folded into B.
        second: another one.

    Raises:
        InvalidDocument: a file holds something else than pairs of factors with finite numbers, or the two
            are for modules of different shapes.
        DigestMismatch, NetworkError: whatever reading the contents raises.
    """
    left, right = _pairs(read_header(first)), _pairs(read_header(second))
    changes, sums = [], np.zeros(4)
    for module in sorted(left.keys() | right.keys()):
        one = _factors(first, left.get(module), module)
        two = _factors(second, right.get(module), module)
        change, squares = _compare(module, one or _none(two), two or _none(one))
        changes.append(change)
        sums += squares
    norm, other, difference = np.sqrt(np.maximum(sums[:3], 0.0))
    cosine = None
    if norm > 0 and other > 0:
        cosine = float(np.clip(sums[3] / (norm * other), -1.0, 1.0))
    return SpectralChange(
        modules=tuple(changes),
        norm=float(norm),
        other=float(other),
        difference=float(difference),
        cosine=cosine,
    )


def _compare(module: str, one: Factors, two: Factors) -> tuple[ModuleChange, F64]:
    """A module's change, and its squared Frobenius norms (first, second, difference) and inner product."""
    if (one[0].shape[1], one[1].shape[0]) != (two[0].shape[1], two[1].shape[0]):
        raise InvalidDocument(
            f"the two adapters change {module} in different shapes, so that their weights cannot be compared",
            "compare adapters for the same base model",
        )
    same = all(np.array_equal(mine, other) for mine, other in zip(one, two, strict=True))
    (a1, b1), (a2, b2) = _balanced(*one), _balanced(*two)
    a, b, rank = np.vstack([a1, a2]), np.hstack([b1, -b2]), len(a1)
    gram_a, gram_b = a @ a.T, b.T @ b
    first, second, across = np.s_[:rank, :rank], np.s_[rank:, rank:], np.s_[:rank, rank:]
    products = gram_a * gram_b
    squares = np.array([products[first].sum(), products[second].sum(), products.sum(), 0.0])
    squares[3] = -products[across].sum()
    norm, other = spectral_norm(gram_a[first], gram_b[first]), spectral_norm(gram_a[second], gram_b[second])
    difference = spectral_norm(gram_a, gram_b)
    if same:  # equal bytes differ by nothing at all, not by rounding errors
        other, difference, squares[1], squares[2] = norm, 0.0, squares[0], 0.0
    elif squares[2] < CANCELLED**2 * (squares[0] + squares[1]):
        values = singular_values(a, b)
        difference, squares[2] = float(values[0]), float(np.sum(values**2))
    return ModuleChange(module=module, norm=norm, other=other, difference=difference), squares


def _balanced(a: F64, b: F64) -> Factors:
    """The same update from factors of the same size."""
    left, right = np.linalg.norm(a), np.linalg.norm(b)
    if left == 0 or right == 0:
        return np.zeros_like(a), np.zeros_like(b)
    scale = np.sqrt(right / left)
    return a * scale, b / scale


def _pairs(header: Header) -> Mapping[str, tuple[TensorInfo, TensorInfo]]:
    found: dict[str, dict[str, TensorInfo]] = {}
    for key, info in header.tensors.items():
        parsed = parse_key(key)
        if parsed is not None and parsed.factor == "magnitude":
            raise InvalidDocument(
                "DoRA adapters cannot be compared: what they do depends on the base's rows, which are not in "
                "the files",
                "compare their evaluations",
            )
        if parsed is None or len(info.shape) != 2:
            raise _no_adapter(f"it holds {key}")
        found.setdefault(parsed.module, {})[parsed.factor] = info
    for module, factors in found.items():
        if len(factors) != 2 or factors["A"].shape[0] != factors["B"].shape[1]:
            raise _no_adapter(f"the factors of {module} do not fit")
    return {module: (factors["A"], factors["B"]) for module, factors in found.items()}


def _factors(content: Content, pair: tuple[TensorInfo, TensorInfo] | None, module: str) -> Factors | None:
    if pair is None:
        return None
    a, b = (tensor(content, info).astype(np.float64) for info in pair)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise _no_adapter(f"{module} holds NaN or infinity")
    return a, b


def _none(like: Factors | None) -> Factors:
    """An update by nothing, in the shape of the other adapter's."""
    assert like is not None, "a module is in one of the two"
    return np.zeros((1, like[0].shape[1])), np.zeros((like[1].shape[0], 1))


def _no_adapter(why: str) -> InvalidDocument:
    return InvalidDocument(
        f"the weights are not in the layout of this registry: {why}", "`registry scan` tells what is wrong"
    )


def shorten(value: float | None) -> float | None:
    """Four significant digits: as many as anybody reads, and the same on every processor."""
    return None if value is None else float(f"{value:.4g}")


def figures(change: SpectralChange) -> Iterator[tuple[str, float | None]]:
    """Yield the figures of a whole comparison by name."""
    yield "relative_difference", shorten(change.relative)
    yield "cosine", shorten(change.cosine)
    yield "norm", shorten(change.norm)
    yield "other_norm", shorten(change.other)
    yield "difference_norm", shorten(change.difference)
