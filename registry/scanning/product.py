"""The product B @ A of one module, measured without forming it.

With A = (G_A)^(1/2) Q, where G_A = A A^T and Q has orthonormal rows, the singular values of s * B @ A are
those of s * B G_A^(1/2): the roots of the eigenvalues of G_A^(1/2) G_B G_A^(1/2), where G_B = B^T B, all of
them rank x rank (Golub and Van Loan, "Matrix Computations", 4th ed., 8.6). With the leading eigenvector y the
leading singular vectors are u ~ B G_A^(1/2) y and v ~ A^T B^T u. The squared norms of the rows of B @ A are
the diagonal of B G_A B^T, those of its columns the diagonal of A^T G_B A. None of it changes under A -> R A,
B -> B R^-1.

Squares lose half of the digits: in float64 a singular value is off by up to 1e-8 |A| |B| (spectral norms),
which is nothing unless the factors cancel. Where |A| |B| is more than `CANCELLED` times the largest one, the
singular values are computed again from the QR decompositions of both factors (the product SVD by QR of Golub,
Solna and Van Dooren, SIAM J. Matrix Anal. Appl. 22 (2000), 1-19), which squares nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from registry.content import Content
from registry.formats import TensorInfo

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

CANCELLED: Final = 1e3
"""Above this ratio of |A| |B| (Frobenius) to |B @ A| the singular values are computed by QR."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Factor:
    """Figures of one factor.

    Attributes:
        largest: its largest magnitude; NaN or infinity where an entry is.
        rms: root mean square of its entries.
        norms: (rank,) Euclidean norm of each component: of A's rows, of B's columns.
    """

    largest: float
    rms: float
    norms: F64


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """What was measured of one module's update s * B @ A.

    Attributes:
        module: the base's module.
        block: place of its block in the forward pass, from 0.
        kind: what it is within the block, such as "attn.to_q".
        shape: (out, in).
        scale: what the loader multiplies B @ A with, > 0.
        a, b: figures of the factors as they stand in the file.
        values: (rank,) singular values, largest first, each >= 0.
        row_share: largest share of a row in the squared Frobenius norm, 1/out to 1; 0 for an update of zero.
        column_share: the same of a column.
        left: (out,) unit vector, the leading left singular vector; zeros for an update of zero.
        right: (in,) the same on the right.
    """

    module: str
    block: int
    kind: str
    shape: tuple[int, int]
    scale: float
    a: Factor
    b: Factor
    values: F64
    row_share: float
    column_share: float
    left: F32
    right: F32

    @property
    def norm(self) -> float:
        """The spectral norm."""
        return float(self.values[0])

    @property
    def frobenius(self) -> float:
        """The Frobenius norm."""
        return float(np.sqrt(np.sum(self.values**2)))

    @property
    def finite(self) -> bool:
        """Whether every number of both factors is finite; nothing else was measured where one is not."""
        return bool(np.isfinite(self.a.largest) and np.isfinite(self.b.largest))


def tensor(weights: Content, info: TensorInfo) -> F32:
    """Return a tensor as float32, of its own shape."""
    return decoded(weights[info.start : info.end], info)


def decoded(piece: bytes, info: TensorInfo) -> F32:
    """Return the bytes of a tensor as float32, of its own shape."""
    flat: NDArray[Any]
    if info.dtype == "BF16":
        # bfloat16 is the upper half of a float32.
        flat = (np.frombuffer(piece, dtype="<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        flat = np.frombuffer(piece, dtype="<f2" if info.dtype == "F16" else "<f4")
    return flat.astype(np.float32, copy=False).reshape(info.shape)


def measure(
    a: F32, b: F32, *, module: str = "", block: int = 0, kind: str = "", scale: float = 1.0
) -> Update:
    """Measure an update.

    Args:
        a: (rank, in).
        b: (out, rank).
        module, block, kind: where it belongs.
        scale: what the loader multiplies B @ A with; its sign changes no figure.
    """
    rank, shape = len(a), (b.shape[0], a.shape[1])
    largest = [float(np.abs(factor).max()) for factor in (a, b)]
    if not np.isfinite(largest).all():
        nothing = np.zeros(rank)
        broken = [Factor(largest=top, rms=0.0, norms=nothing) for top in largest]
        left, right = np.zeros(shape[0], np.float32), np.zeros(shape[1], np.float32)
        return Update(
            module=module, block=block, kind=kind, shape=shape, scale=abs(scale), a=broken[0], b=broken[1],
            values=nothing, row_share=0.0, column_share=0.0, left=left, right=right,
        )  # fmt: skip
    wide, tall = a.astype(np.float64), b.astype(np.float64)
    gram_a, gram_b = wide @ wide.T, tall.T @ tall
    figures = [
        Factor(
            largest=top, rms=float(np.sqrt(np.trace(gram) / factor.size)), norms=np.sqrt(np.diagonal(gram))
        )
        for top, gram, factor in zip(largest, (gram_a, gram_b), (a, b), strict=True)
    ]
    values, left64 = _leading(wide, tall, gram_a, gram_b)
    return Update(
        module=module, block=block, kind=kind, shape=shape, scale=abs(scale), a=figures[0], b=figures[1],
        values=values * abs(scale), row_share=_share(b, gram_a), column_share=_share(a.T, gram_b),
        left=left64.astype(np.float32), right=_unit(wide.T @ (tall.T @ left64)).astype(np.float32),
    )  # fmt: skip


def _leading(a: F64, b: F64, gram_a: F64, gram_b: F64) -> tuple[F64, F64]:
    """The singular values of B @ A, and the leading left singular vector (zeros for an update of zero)."""
    root = _root(gram_a)
    squares, vectors = np.linalg.eigh(root.T @ gram_b @ root)
    values = np.sqrt(np.clip(squares[::-1], 0.0, None))
    left = _unit(b @ (root @ vectors[:, -1]))
    limit = np.sqrt(np.trace(gram_a) * np.trace(gram_b))  # at least |A| |B|
    if limit > CANCELLED * values[0]:
        exact = singular_values(a, b)
        values = np.concatenate([exact, np.zeros(len(a) - len(exact))])
    return values, left


def _share(factor: F32, gram: F64) -> float:
    """The largest share of a row of ``factor`` @ X in its squared norm, where ``gram`` is X @ X^T."""
    scale = float(np.trace(gram))
    if scale == 0:
        return 0.0
    # Six digits need no float64; the size of the numbers is out of them before they are squared.
    with np.errstate(over="ignore", invalid="ignore"):
        rows = np.einsum("ij,ij->i", factor @ (gram / scale).astype(np.float32), factor)
    total = float(np.sum(rows, dtype=np.float64))
    return float(np.max(rows)) / total if total > 0 and np.isfinite(total) else 0.0


def _root(gram: F64) -> F64:
    """A matrix whose product with its own transpose is ``gram``."""
    values, vectors = np.linalg.eigh(gram)
    return np.asarray(vectors * np.sqrt(np.clip(values, 0.0, None)))


def _unit(vector: F64) -> F64:
    length = float(np.linalg.norm(vector))
    return vector / length if length > 0 else vector


def spectral_norm(gram_a: F64, gram_b: F64) -> float:
    """Return the largest singular value of B @ A from A A^T and B^T B, both (rank, rank)."""
    root = _root(gram_a)
    return float(np.sqrt(max(0.0, float(np.linalg.eigvalsh(root.T @ gram_b @ root)[-1]))))


def singular_values(a: F64, b: F64) -> F64:
    """Return the singular values of B @ A that can be other than zero, largest first.

    Args:
        a: (r, in), r >= 1.
        b: (out, r).

    Returns:
        min(r, in, out) of them.
    """
    left: F64 = np.asarray(np.linalg.qr(b, mode="r"))
    right: F64 = np.asarray(np.linalg.qr(a.T, mode="r"))
    return np.asarray(np.linalg.svd(left @ right.T, compute_uv=False))
