"""Third layer: do the numbers look like a trained update?

What matters is the product B @ A of each module. It is never formed: with G_A = A A^T and G_B = B^T B, both
rank x rank, the squared singular values of B @ A are the eigenvalues of G_A^(1/2) G_B G_A^(1/2). They do not
change when an attacker moves scale from one factor into the other.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from registry.content import Content
from registry.families import BaseSpec, FamilyFacts
from registry.formats import TensorInfo
from registry.scanning.report import Finding, finding
from registry.scanning.structure import Pair

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

MAX_SPECTRAL_NORM: Final = 1000.0
"""Largest believable spectral norm of an update: a trained linear layer itself has one of about 1 to 30."""

MAX_IMBALANCE: Final = 1e6
"""Largest ratio between the root mean squares of the entries of the two factors, either way."""

_F16_MAX: Final = 65504.0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Measured:
    """Figures of one factor: its largest magnitude, root mean square, and Gram matrix (rank x rank)."""

    largest: float
    rms: float
    gram: F64


def check(
    weights: Content, pairs: Iterable[Pair], family: FamilyFacts, spec: BaseSpec
) -> tuple[list[Finding], dict[str, float]]:
    """Return the findings and the figures of the numbers, reading one module at a time.

    Args:
        weights: the bytes of the file.
        pairs: the modules' factors, as the structure layer found them.
        family: facts about the base's family.
        spec: the modules of the base.
    """
    findings: list[Finding] = []
    norms: dict[str, float] = {}
    dead: list[str] = []
    last = max(family.block_of(module)[0] for module in spec)
    for pair in pairs:
        values = tensor(weights, pair.b)
        a, b = _measure(tensor(weights, pair.a), rows=True), _measure(values, rows=False)
        problem = _number_finding(pair.module, a, b)
        if problem is not None:
            findings.append(problem)
            continue
        norm = spectral_norm(a.gram, b.gram)
        norms[pair.module] = norm
        index, kind = family.block_of(pair.module)
        zero = a.largest == 0 or b.largest == 0
        if index == last and kind in family.silent_in_last_block:
            if not zero:
                findings.append(finding("ADP-NUM-005", pair.module, f"spectral norm {norm:.4g}"))
            continue
        if index == last:
            findings += _silent_rows(pair.module, values, family.silent_rows_in_last_block.get(kind), spec)
        if zero:
            dead.append(pair.module)
        findings += _size_findings(pair.module, norm, a, b)
    if not findings and not any(norms.values()):
        findings.append(finding("ADP-NUM-003", "the file", f"all {len(norms)} updates are zero"))
    else:
        findings += [finding("ADP-NUM-004", module, "its update is zero") for module in dead]
    return findings, _figures(norms)


def tensor(weights: Content, info: TensorInfo) -> F32:
    """Return a tensor as float32, of its own shape."""
    piece = weights[info.start : info.end]
    flat: NDArray[Any]
    if info.dtype == "BF16":
        # bfloat16 is the upper half of a float32.
        flat = (np.frombuffer(piece, dtype="<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        flat = np.frombuffer(piece, dtype="<f2" if info.dtype == "F16" else "<f4")
    return flat.astype(np.float32, copy=False).reshape(info.shape)


def spectral_norm(gram_a: F64, gram_b: F64) -> float:
    """Return the largest singular value of B @ A from A A^T and B^T B, both (rank, rank)."""
    values, vectors = np.linalg.eigh(gram_a)
    root = vectors * np.sqrt(np.clip(values, 0.0, None))
    product = root.T @ gram_b @ root
    return float(np.sqrt(max(0.0, float(np.linalg.eigvalsh(product)[-1]))))


def _measure(values: F32, *, rows: bool) -> _Measured:
    """Measure a factor whose rank is its first axis (``rows``) or its second."""
    wide = values if rows else values.T
    with np.errstate(over="ignore", invalid="ignore"):
        largest = float(np.max(np.abs(wide)))
        gram = (wide @ wide.T).astype(np.float64) if largest < 1e15 else np.zeros((len(wide), len(wide)))
    rms = float(np.sqrt(np.trace(gram) / wide.size))
    return _Measured(largest=largest, rms=rms, gram=gram)


def _number_finding(module: str, a: _Measured, b: _Measured) -> Finding | None:
    for name, factor in (("lora_A", a), ("lora_B", b)):
        if not np.isfinite(factor.largest):
            return finding("ADP-NUM-001", f"{module}.{name}", "NaN or infinity")
        if factor.largest > _F16_MAX:
            return finding("ADP-NUM-002", f"{module}.{name}", f"largest magnitude {factor.largest:.4g}")
    return None


def _silent_rows(module: str, b: F32, rows: tuple[int, int] | None, spec: BaseSpec) -> list[Finding]:
    """Demand zeros in the rows of B, given in multiples of the width, that the last block discards."""
    if rows is None:
        return []
    width = spec[module][1]
    silent = np.abs(b[rows[0] * width : rows[1] * width])
    if not silent.any():
        return []
    evidence = f"rows {rows[0] * width} to {rows[1] * width - 1} of B reach {float(silent.max()):.4g}"
    return [finding("ADP-NUM-005", module, evidence)]


def _size_findings(module: str, norm: float, a: _Measured, b: _Measured) -> list[Finding]:
    findings = []
    if norm > MAX_SPECTRAL_NORM:
        evidence = f"spectral norm {norm:.4g}; at most {MAX_SPECTRAL_NORM:g} is believable"
        findings.append(finding("ADP-NUM-006", module, evidence))
    if a.rms > 0 and b.rms > 0 and max(a.rms / b.rms, b.rms / a.rms) > MAX_IMBALANCE:
        findings.append(
            finding("ADP-NUM-007", module, f"root mean square {a.rms:.3g} of A, {b.rms:.3g} of B")
        )
    return findings


def _figures(norms: dict[str, float]) -> dict[str, float]:
    if not norms:
        return {}
    values = np.array(list(norms.values()))
    return {
        "modules": float(len(norms)),
        "spectral_norm_max": _short(values.max()),
        "spectral_norm_median": _short(np.median(values)),
    }


def _short(value: Any) -> float:
    """Six significant digits: enough for a report, and the same on every processor."""
    return float(f"{float(value):.6g}")
