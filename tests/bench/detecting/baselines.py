"""The published statistics that the scanner is measured against, computed from an adapter's file.

* WSD, arXiv 2602.15195: for each of the projections query, key, value and output the largest singular value,
  the Frobenius norm, the energy concentration sigma_1 / sum sigma, the entropy -sum pi log pi of pi = sigma
  / sum sigma, and the kurtosis of the entries of the update; a logistic regression on these 20 numbers. The
  paper takes one layer of a language model. A transformer of two streams has each projection twice a block,
  so the statistics are means over the blocks and both streams; a module that the adapter does not change
  counts as an update of zero, whose five statistics are 0.
* Norm dispersion, arXiv 2605.30189: the standard deviation over the modules of |BA|_F / sqrt(in out).
* The total norm, root of the sum of |BA|_F^2: no detector, but what the matched-norm control matches.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from registry.content import FileContent
from registry.formats import TensorInfo, parse_key, read_header
from registry.scanning.product import singular_values, tensor

F64 = NDArray[np.float64]
PROJECTIONS: Mapping[str, tuple[str, str]] = {
    "q": ("attn.to_q", "attn.add_q_proj"),
    "k": ("attn.to_k", "attn.add_k_proj"),
    "v": ("attn.to_v", "attn.add_v_proj"),
    "o": ("attn.to_out.0", "attn.to_add_out"),
}
STATISTICS = ("sigma1", "frobenius", "energy", "entropy", "kurtosis")
WSD = tuple(f"wsd.{name}.{statistic}" for name in PROJECTIONS for statistic in STATISTICS)
DISPERSION = "norm_dispersion"
NORM = "total_norm"


def baselines(weights: Path) -> dict[str, float]:
    """Return the 22 statistics of a file in the registry's dialect: WSD, DISPERSION and NORM."""
    updates = _updates(weights)
    blocks = {module.split(".")[1] for module in updates}
    found: dict[str, float] = {}
    for name, kinds in PROJECTIONS.items():
        modules = [f"transformer_blocks.{block}.{kind}" for block in blocks for kind in kinds]
        rows = np.array([wsd(*updates[module]) if module in updates else np.zeros(5) for module in modules])
        means = rows.mean(axis=0) if len(rows) else np.zeros(5)
        found |= {f"wsd.{name}.{key}": float(x) for key, x in zip(STATISTICS, means, strict=True)}
    norms = {module: float(np.linalg.norm(singular_values(a, b))) for module, (a, b) in updates.items()}
    sizes = [norms[module] / np.sqrt(a.shape[1] * len(b)) for module, (a, b) in updates.items()]
    found[DISPERSION] = float(np.std(sizes))
    found[NORM] = float(np.linalg.norm(list(norms.values())))
    return found


def wsd(a: F64, b: F64) -> F64:
    """The five statistics of one update B @ A, in the order of STATISTICS; A is (r, in), B is (out, r)."""
    values = singular_values(a, b)
    total = values.sum()
    if total == 0:
        return np.zeros(5)
    shares = values / total
    entropy = -np.sum(shares * np.log(np.where(shares > 0, shares, 1.0)))
    entries = (b @ a).ravel()
    centred = entries - entries.mean()
    spread = np.mean(centred**2)
    kurtosis = np.mean(centred**4) / spread**2 if spread > 0 else 0.0
    return np.array([values[0], np.linalg.norm(values), shares[0], entropy, kurtosis])


def _updates(weights: Path) -> dict[str, tuple[F64, F64]]:
    """Module -> (A, B) in float64, every scale folded in, as the dialect has it."""
    factors: dict[str, dict[str, TensorInfo]] = {}
    content = FileContent(weights)
    try:
        for key, info in read_header(content).tensors.items():
            parsed = parse_key(key)
            if parsed is None:
                raise ValueError(f"{weights} holds {key}, which is no key of the registry's dialect")
            factors.setdefault(parsed.module, {})[parsed.factor] = info
        return {
            module: (
                tensor(content, pair["A"]).astype(np.float64),
                tensor(content, pair["B"]).astype(np.float64),
            )
            for module, pair in sorted(factors.items())
        }
    finally:
        content.close()
