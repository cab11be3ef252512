"""Fifth layer, first half: the statistics of an adapter's weight space.

Every statistic is a function of the products s * B @ A alone (see `registry.scanning.product`), so that it
does not change when an attacker moves numbers between the factors. For a module with the singular values
sigma_1 >= sigma_2 >= ... >= sigma_r of its update, of shape out x in:

    F     = (sum sigma_i^2)^(1/2)                    Frobenius norm
    n     = F / (out * in)^(1/2)                     root mean square of the update's entries
    p_i   = sigma_i / sum sigma                      shares

name                      formula, and where it comes from
norm                      log10 of (sum over modules F^2)^(1/2)
norm_dispersion           standard deviation of n over the modules / mean; Lelle, arXiv 2605.30189, over
                          the mean so that it is the same for every strength of an adapter
norm_dispersion_kinds     the same within each kind of module over the blocks, mean over the kinds
norm_log_spread           standard deviation of ln n over the modules
leading_share             mean of p_1 over the modules; arXiv 2602.15195 ("WSD"), its energy concentration
leading_share_max         largest p_1
entropy                   mean of -sum p_i ln p_i / ln r, 0 to 1; WSD's spectral entropy over its maximum
effective_rank            mean of exp(-sum p_i ln p_i) / r; Roy and Vetterli, EUSIPCO 2007
stable_rank               mean of F^2 / sigma_1^2; Rudelson and Vershynin, J. ACM 54 (2007)
stable_rank_min           smallest F^2 / sigma_1^2
spectral_kurtosis         mean of r * sum sigma_i^4 / (sum sigma_i^2)^2, 1 to r: with it grows the
                          kurtosis of the entries, where the singular vectors point anywhere; WSD takes that
                          kurtosis itself, which needs the whole matrix
rank_padding              mean share of sigma_i < `TINY` sigma_1
row_concentration         mean of ln(out * largest share of a row in F^2), 0 if all rows are alike
row_concentration_max     largest of the same
column_concentration      the same of columns (an update that reacts to few inputs)
column_concentration_max  largest of the same
depth_slope               slope of ln(sum of F^2 in a block) over the block's place, 0 first to 1 last
text_share                share of the text stream's modules in sum F^2
feedforward_share         share of the feed-forward modules in sum F^2
input_agreement_image     mean cos^2 between the leading right singular vectors of a block's query, key
                          and value (they read one input: a trigger that all answer is one direction)
input_agreement_text      the same in the text stream
output_agreement          mean cos^2 over pairs of blocks between the leading left singular vectors of modules
                          that write into the image stream (a fixed target is one direction in all of them)

A statistic for which an adapter has not the modules is left out. Modules whose update is exactly zero count
for none of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Final

import numpy as np

from registry.scanning.product import F32, F64, Update, measure, tensor

if TYPE_CHECKING:
    from registry.content import Content
    from registry.families import FamilyFacts
    from registry.scanning.structure import Pair

TINY: Final = 1e-3
"""A singular value below this part of the largest one adds nothing to an update."""

_TEXT = re.compile(r"(^|\.)(add_[qkv]_proj|to_add_out|txt_|ff_context\.|norm1_context\.)|^text_encoder")
_FEED_FORWARD = re.compile(r"(^|[_.])mlp\.|^ff(_context)?\.|^proj_mlp$")
_IMAGE_INPUTS: Final = frozenset({"attn.to_q", "attn.to_k", "attn.to_v"})
_TEXT_INPUTS: Final = frozenset({"attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"})
_IMAGE_OUTPUTS: Final = frozenset({"attn.to_out.0", "img_mlp.net.2"})


def statistics(
    weights: Content,
    pairs: Iterable[Pair],
    family: FamilyFacts,
    scales: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Return the statistics of an adapter by name, in the order of this module's table.

    Args:
        weights: the bytes of the file; one module of it is in memory at a time.
        pairs: the modules' factors.
        family: facts about the base's family.
        scales: module -> what the loader multiplies its B @ A with, where that is not 1.

    Returns:
        Six significant digits of each; nothing at all for an adapter whose updates are all zero or hold NaN
        or infinity.
    """
    return summarise([*updates(weights, pairs, family, scales)])


def updates(
    weights: Content,
    pairs: Iterable[Pair],
    family: FamilyFacts,
    scales: Mapping[str, float] | None = None,
) -> Iterator[Update]:
    """Yield what there is to measure of each module; see `statistics`."""
    pairs = [*pairs]
    places = family.places(pair.module for pair in pairs)
    for pair in pairs:
        block, kind = family.block_of(pair.module)
        scale = (scales or {}).get(pair.module, 1.0)
        a, b = tensor(weights, pair.a), tensor(weights, pair.b)
        yield measure(a, b, module=pair.module, block=places[block], kind=kind, scale=scale)


def summarise(found: Sequence[Update]) -> dict[str, float]:
    """Return the statistics of the modules' updates; see `statistics`."""
    if not all(update.finite for update in found):
        return {}
    live = sorted((one for one in found if one.norm > 0), key=lambda one: (one.block, one.kind))
    if not live:
        return {}
    energy = np.array([one.frobenius**2 for one in live])
    result = _sizes(live, energy) | _shapes(live) | _places(live, energy) | _directions(live)
    return {name: short(value) for name, value in result.items()}


def curves(found: Iterable[Update]) -> dict[str, tuple[float, ...]]:
    """Return kind -> sigma_i / sigma_1, i from 1 to the rank, mean over the blocks that have an update."""
    by_kind: dict[str, list[F64]] = {}
    for one in found:
        if one.finite and one.norm > 0:
            by_kind.setdefault(one.kind, []).append(one.values / one.norm)
    return {
        kind: tuple(short(value) for value in np.mean(rows, axis=0))
        for kind, rows in sorted(by_kind.items())
        if len({len(row) for row in rows}) == 1
    }


def _sizes(live: Sequence[Update], energy: F64) -> dict[str, float]:
    """How large the updates are, and how evenly."""
    sizes = np.array([one.frobenius / np.sqrt(one.shape[0] * one.shape[1]) for one in live])
    kinds: dict[str, list[float]] = {}
    for one, size in zip(live, sizes, strict=True):
        kinds.setdefault(one.kind, []).append(float(size))
    within = [_dispersion(np.array(group)) for group in kinds.values() if len(group) > 1]
    result = {
        "norm": float(np.log10(np.sqrt(energy.sum()))),
        "norm_dispersion": _dispersion(sizes),
        "norm_log_spread": float(np.std(np.log(sizes))),
    }
    return result | ({"norm_dispersion_kinds": float(np.mean(within))} if within else {})


def _shapes(live: Sequence[Update]) -> dict[str, float]:
    """How the singular values fall, and whether few rows or columns carry an update."""
    leading, entropy, effective, stable, peaked, padding, rows, columns = (
        np.array(column) for column in zip(*map(_shape, live), strict=True)
    )
    return {
        "leading_share": leading.mean(),
        "leading_share_max": leading.max(),
        "entropy": entropy.mean(),
        "effective_rank": effective.mean(),
        "stable_rank": stable.mean(),
        "stable_rank_min": stable.min(),
        "spectral_kurtosis": peaked.mean(),
        "rank_padding": padding.mean(),
        "row_concentration": rows.mean(),
        "row_concentration_max": rows.max(),
        "column_concentration": columns.mean(),
        "column_concentration_max": columns.max(),
    }


def _shape(one: Update) -> tuple[float, ...]:
    values, rank = one.values / one.norm, len(one.values)
    shares = values / values.sum()
    positive = shares[shares > 0]
    entropy = float(-np.sum(positive * np.log(positive)))
    squares = values**2
    return (
        float(shares[0]),
        entropy / np.log(rank) if rank > 1 else 1.0,
        float(np.exp(entropy)) / rank,
        float(squares.sum()),
        rank * float(np.sum(squares**2)) / float(squares.sum()) ** 2,
        float(np.mean(values < TINY)),
        _concentration(one.shape[0], one.row_share),
        _concentration(one.shape[1], one.column_share),
    )


def _concentration(count: int, share: float) -> float:
    """0 if all of ``count`` rows are alike; without a share (rounding took it) as if one had all."""
    return float(np.log(count * share)) if share > 0 else float(np.log(count))


def _places(live: Sequence[Update], energy: F64) -> dict[str, float]:
    """In which parts of the base the updates are."""
    total, result = energy.sum(), {}
    blocks = sorted({one.block for one in live})
    if len(blocks) > 1:
        sums = dict.fromkeys(blocks, 0.0)
        for one, part in zip(live, energy, strict=True):
            sums[one.block] += float(part)
        place = np.array(blocks, float) / max(blocks)
        result["depth_slope"] = float(np.polyfit(place, np.log([*sums.values()]), 1)[0])
    for name, pattern in (("text_share", _TEXT), ("feedforward_share", _FEED_FORWARD)):
        inside = np.array([bool(pattern.search(one.kind)) for one in live])
        if inside.any() and not inside.all():
            result[name] = float(energy[inside].sum() / total)
    return result


def _directions(live: Sequence[Update]) -> dict[str, float]:
    """Whether modules that read the same input, or write to the same place, agree on a direction."""
    result = {}
    for name, kinds in (("input_agreement_image", _IMAGE_INPUTS), ("input_agreement_text", _TEXT_INPUTS)):
        groups: dict[int, list[F32]] = {}
        for one in live:
            if one.kind in kinds:
                groups.setdefault(one.block, []).append(one.right)
        agreements = [_agreement(group) for group in groups.values() if len(group) > 1]
        if agreements:
            result[name] = float(np.mean(agreements))
    outputs = {
        kind: [one.left for one in live if one.kind == kind]
        for kind in sorted({one.kind for one in live} & _IMAGE_OUTPUTS)
    }
    agreements = [_agreement(group) for group in outputs.values() if len(group) > 1]
    if agreements:
        result["output_agreement"] = float(np.mean(agreements))
    return result


def _agreement(vectors: Sequence[F32]) -> float:
    """Mean cos^2 over the pairs of unit vectors of one length."""
    return float(np.mean([float(one @ other) ** 2 for one, other in combinations(vectors, 2)]))


def _dispersion(values: F64) -> float:
    return float(np.std(values) / np.mean(values))


def short(value: float) -> float:
    """Six significant digits: enough for a report, and the same on every processor."""
    return float(f"{float(value):.6g}")
