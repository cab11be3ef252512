"""Fourth layer: do the numbers look like a trained update, and are they nothing but numbers?

What counts is the product B @ A of each module, which is never formed (see `registry.scanning.product`), so
that an attacker who moves scale from one factor into the other changes no finding. What is hidden between the
factors is looked for by itself: an imbalance of a whole factor or of one component, components that cancel,
an update that vanishes when a loader casts to float16. What is hidden inside the numbers is
`registry.scanning.mantissa`'s.

The file is read once, module by module and in its order; two modules are measured at a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from registry.content import Content
from registry.families import BaseSpec, FamilyFacts
from registry.scanning import mantissa
from registry.scanning.product import F32, Update, decoded, measure
from registry.scanning.report import Finding, finding
from registry.scanning.spectra import short
from registry.scanning.structure import Pair

MAX_SPECTRAL_NORM: Final = 1000.0
"""Largest believable spectral norm of an update: a trained linear layer itself has one of about 1 to 30."""

MAX_IMBALANCE: Final = 1e6
"""Largest ratio between the root mean squares of the two factors, or the norms of a component, either way."""

MAX_CANCELLATION: Final = 30.0
"""Largest believable ratio of the components' norms to that of their sum; trained adapters have 0.3 to 3."""

MAX_CAST_LOSS: Final = 0.25
"""Largest part of an update that a cast of its factors to float16 may change."""

_F16_MAX: Final = 65504.0
_SMALLEST_CARED: Final = 1e-5  # float16 has steps of 6e-8: far above them a cast loses next to nothing
_WORKERS: Final = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Survey:
    """What one pass over the numbers found.

    Attributes:
        findings: of this layer, in the order of the file.
        facts: name -> a figure of the whole file.
        updates: the modules' measurements, in the order of the file.
    """

    findings: tuple[Finding, ...]
    facts: Mapping[str, float]
    updates: tuple[Update, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Seen:
    """One module: its measurements, and what only its numbers themselves tell.

    Attributes:
        update: see `product.Update`.
        silent_rows: largest magnitude of B in the output features that the base discards; 0 if A is zero.
        cast_loss: which part of the update changes in float16.
        hidden: (factor, rule, evidence) of what is hidden in the numbers.
        magnitudes: the smallest and the largest of DoRA's, NaN where one is; None without them.
    """

    update: Update
    silent_rows: float
    cast_loss: float
    hidden: tuple[tuple[str, str, str], ...]
    magnitudes: tuple[float, float] | None = None


def survey(
    weights: Content,
    pairs: Iterable[Pair],
    family: FamilyFacts,
    spec: BaseSpec,
    scales: Mapping[str, float] | None = None,
) -> Survey:
    """Read and judge the numbers, one module at a time.

    Args:
        weights: the bytes of the file.
        pairs: the modules' factors, as the structure layer found them.
        family: facts about the base's family.
        spec: the modules of the base.
        scales: module -> what the loader multiplies its B @ A with, where that is not 1.

    Raises:
        DigestMismatch, NetworkError: whatever reading the weights raises.
    """
    findings: list[Finding] = []
    dead: list[str] = []
    updates: list[Update] = []
    rescaled, lowest, highest = 0, np.inf, 0.0
    silent = family.silent(spec)
    for seen in _each(weights, pairs, family, spec, scales or {}):
        update = seen.update
        updates.append(update)
        problem = _number_finding(update) or _magnitude_finding(seen)
        if problem is not None:
            findings.append(problem)
            continue
        findings += [
            finding(rule, f"{update.module}.{factor}", evidence) for factor, rule, evidence in seen.hidden
        ]
        if seen.magnitudes is not None:
            rescaled += 1
            lowest, highest = min(lowest, seen.magnitudes[0]), max(highest, seen.magnitudes[1])
        zero = update.a.largest == 0 or update.b.largest == 0
        if update.module in silent:
            if not zero:
                evidence = f"spectral norm {update.norm:.4g}"
                findings.append(finding("ADP-NUM-005", update.module, evidence))
            continue
        if seen.silent_rows > 0:
            evidence = f"entries up to {seen.silent_rows:.4g} in rows of B that the last block discards"
            findings.append(finding("ADP-NUM-005", update.module, evidence))
        if update.norm == 0:
            dead.append(update.module)
        findings += [*_size_findings(update), *_gauge_findings(update, seen.cast_loss)]
    if not findings and not any(update.norm for update in updates):
        findings.append(finding("ADP-NUM-003", "the file", f"all {len(updates)} updates are zero"))
    else:
        findings += [finding("ADP-NUM-004", module, "its update is zero") for module in dead]
    if rescaled:
        evidence = f"{rescaled} modules have magnitudes, from {lowest:.3g} to {highest:.3g}"
        findings.append(finding("ADP-NUM-012", "the file", evidence))
    return Survey(findings=tuple(findings), facts=_facts(updates), updates=tuple(updates))


def _each(
    weights: Content,
    pairs: Iterable[Pair],
    family: FamilyFacts,
    spec: BaseSpec,
    scales: Mapping[str, float],
) -> Iterator[_Seen]:
    """Yield each module in order: this thread reads, others measure, and few modules are in memory."""
    from concurrent.futures import Future, ThreadPoolExecutor

    places, rows = family.places(spec), family.silent_rows(spec)
    with ThreadPoolExecutor(_WORKERS, thread_name_prefix="scan") as pool:
        waiting: deque[Future[_Seen]] = deque()
        try:
            for pair in pairs:
                block, kind = family.block_of(pair.module)
                discarded = rows.get(pair.module, slice(0))
                tensors = (pair.a, pair.b) if pair.magnitude is None else (pair.a, pair.b, pair.magnitude)
                pieces = [weights[info.start : info.end] for info in tensors]
                scale = scales.get(pair.module, 1.0)
                waiting.append(pool.submit(_see, pair, pieces, places[block], kind, scale, discarded))
                if len(waiting) > 2 * _WORKERS:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _see(pair: Pair, pieces: Sequence[bytes], block: int, kind: str, scale: float, discarded: slice) -> _Seen:
    a, b = decoded(pieces[0], pair.a), decoded(pieces[1], pair.b)
    update = measure(a, b, module=pair.module, block=block, kind=kind, scale=scale)
    hidden = [
        (factor, rule, evidence)
        for factor, piece, info, figures in (
            ("lora_A", pieces[0], pair.a, update.a),
            ("lora_B", pieces[1], pair.b, update.b),
        )
        if figures.largest > 0
        for rule, evidence in mantissa.hidden(piece, info)
    ]
    magnitudes = None
    if pair.magnitude is not None:
        values = decoded(pieces[2], pair.magnitude)
        magnitudes = float(values.min()), float(values.max())
        hidden += [
            ("lora_magnitude_vector", rule, evidence)
            for rule, evidence in mantissa.hidden(pieces[2], replace(pair.magnitude, shape=(1, len(values))))
        ]
    rows = b[discarded]
    silent_rows = float(np.abs(rows).max()) if rows.size and update.a.largest > 0 else 0.0
    loss = _cast_loss(a, b, update) if update.finite and update.norm > 0 else 0.0
    return _Seen(
        update=update, silent_rows=silent_rows, cast_loss=loss, hidden=tuple(hidden), magnitudes=magnitudes
    )


def _cast_loss(a: F32, b: F32, update: Update) -> float:
    """Which part of the update (Frobenius norm) a cast of its factors to float16 changes."""
    if (
        min(update.a.rms, update.b.rms) > _SMALLEST_CARED
        or max(update.a.largest, update.b.largest) > _F16_MAX
    ):
        return 0.0
    cast_a, cast_b = a.astype(np.float16).astype(np.float32), b.astype(np.float16).astype(np.float32)
    # The difference B A - B' A' is one product of stacked factors.
    difference = measure(np.vstack([a, cast_a]), np.hstack([b, -cast_b]))
    return difference.frobenius / (update.frobenius / update.scale)


def _number_finding(update: Update) -> Finding | None:
    for name, factor in (("lora_A", update.a), ("lora_B", update.b)):
        if not np.isfinite(factor.largest):
            return finding("ADP-NUM-001", f"{update.module}.{name}", "NaN or infinity")
        if factor.largest > _F16_MAX:
            evidence = f"largest magnitude {factor.largest:.4g}"
            return finding("ADP-NUM-002", f"{update.module}.{name}", evidence)
    return None


def _magnitude_finding(seen: _Seen) -> Finding | None:
    """What is wrong with DoRA's magnitudes: each is the length of a row of a trained weight."""
    if seen.magnitudes is None:
        return None
    where, (lowest, highest) = f"{seen.update.module}.lora_magnitude_vector", seen.magnitudes
    if not np.isfinite([lowest, highest]).all():
        return finding("ADP-NUM-001", where, "NaN or infinity")
    if lowest <= 0:
        return finding("ADP-NUM-013", where, f"the smallest is {lowest:.4g}")
    if highest > MAX_SPECTRAL_NORM:  # no row is longer than its matrix
        evidence = f"the largest is {highest:.4g}; at most {MAX_SPECTRAL_NORM:g} is believable"
        return finding("ADP-NUM-006", where, evidence)
    return None


def _size_findings(update: Update) -> Iterator[Finding]:
    if update.norm > MAX_SPECTRAL_NORM:
        evidence = f"spectral norm {update.norm:.4g}; at most {MAX_SPECTRAL_NORM:g} is believable"
        yield finding("ADP-NUM-006", update.module, evidence)


def _gauge_findings(update: Update, cast_loss: float) -> Iterator[Finding]:
    """What the factors do to each other without changing their product."""
    a, b = update.a, update.b
    if a.rms > 0 and b.rms > 0 and max(a.rms / b.rms, b.rms / a.rms) > MAX_IMBALANCE:
        yield finding("ADP-NUM-007", update.module, f"root mean square {a.rms:.3g} of A, {b.rms:.3g} of B")
    elif (ratio := imbalance(update)) > MAX_IMBALANCE:
        evidence = f"in one of its components a factor is {ratio:.3g} times as large as the other"
        yield finding("ADP-NUM-007", update.module, evidence)
    if (ratio := cancellation(update)) > MAX_CANCELLATION:
        evidence = f"its components have {ratio:.3g} times the norm of their sum"
        yield finding("ADP-NUM-008", update.module, evidence)
    if cast_loss > MAX_CAST_LOSS:
        evidence = f"in float16 {100 * cast_loss:.0f} % of it is another one"
        yield finding("ADP-NUM-009", update.module, evidence)


def imbalance(update: Update) -> float:
    """Return the largest ratio of the norms of a component's two halves, either way; 1 without components."""
    live = (update.a.norms > 0) & (update.b.norms > 0)
    if not live.any():
        return 1.0
    ratios = np.log(update.a.norms[live]) - np.log(update.b.norms[live])
    return float(np.exp(min(700.0, float(np.abs(ratios).max()))))


def cancellation(update: Update) -> float:
    """Return the root of the sum of the components' squared norms over that of their sum; 0 without any.

    It is 1 for orthogonal components and at least 1 / sqrt(rank); components that cancel make it large.
    """
    parts = float(np.sqrt(np.sum((update.a.norms * update.b.norms) ** 2)))
    if parts == 0 or update.scale == 0:
        return 0.0
    whole = update.frobenius / update.scale
    return parts / whole if whole > 0 else np.inf


def _facts(updates: Sequence[Update]) -> dict[str, float]:
    good = [update for update in updates if update.finite]
    if not good:
        return {}
    norms = np.array([update.norm for update in good])
    padded = [int(np.sum((update.a.norms == 0) | (update.b.norms == 0))) for update in good if update.norm]
    return {
        "modules": float(len(good)),
        "spectral_norm_max": short(norms.max()),
        "spectral_norm_median": short(float(np.median(norms))),
        "empty_components": float(sum(padded)),
        "cancellation_max": short(min(1e300, max(cancellation(update) for update in good))),
    }
