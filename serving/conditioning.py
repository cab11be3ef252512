"""Textual latent interpolation: how strong an expression is, and how several are mixed.

PixelSmile (arXiv 2603.25728) steers an edit between a neutral and an expressive face by moving the text
conditioning in a straight line from the embedding of the neutral prompt to that of the expression's:

    E = E_neutral + sum_k a_k (E_k - E_neutral)

with one intensity a_k an expression; 0 is neutral, 1 the expression as trained, above 1 exaggerates, and
several at once blend. Training and serving use this one function, on all tokens or on the token window that
was signed with the adapter; outside of the window the neutral embedding stays as it is. Where a family also
gives each prompt one pooled vector, the same weights move that, always as a whole.

The sum is computed as (1 - sum_k a_k) E_neutral + sum_k a_k E_k, the same value in exact arithmetic: so a = 0
gives the neutral embedding and a single a = 1 the expression's embedding bit by bit.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from registry.errors import shown
from registry.manifest import ConditioningSpec
from serving.errors import ConditioningError, StrengthOutOfRange, UnknownExpression

if TYPE_CHECKING:
    import torch

    from serving.pipelines.base import PromptEmbeds

Window = tuple[int, int]


def blend(
    neutral: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, window: Window | None = None
) -> torch.Tensor:
    """Return ``neutral + sum_k weights[:, k] (targets[:, k] - neutral)``, row by row.

    Args:
        neutral: embeddings of the neutral prompt [N, L, D], or [1, L, D] for all rows.
        targets: embeddings of K expressions [N, K, L, D], or [1, K, L, D] for all rows.
        weights: intensities [N, K], on the device of the embeddings.
        window: half-open range of tokens that moves; None is all of them.

    Returns:
        [N, L, D] in the dtype of ``neutral``; at least float32 inside.

    Raises:
        ConditioningError: shapes that do not belong together, or a window that the prompt does not have.
    """
    import torch

    if targets.ndim != 4 or targets.shape[2:] != neutral.shape[1:] or targets.shape[1] != weights.shape[1]:
        raise ConditioningError(
            f"embeddings {list(neutral.shape)} (neutral), {list(targets.shape)} (expressions) and "
            f"intensities {list(weights.shape)} do not belong together",
            "encode all prompts of an image with the same encoder",
        )
    length = neutral.shape[1]
    start, stop = window or (0, length)
    if not 0 <= start < stop <= length:
        raise ConditioningError(
            f"the token window {start} to {stop} does not lie inside a prompt of {length} tokens",
            "the adapter was made for longer prompts: use its own template and base model",
        )
    dtype = torch.promote_types(neutral.dtype, torch.float32)
    share = weights.to(dtype)
    moved = (1 - share.sum(1))[:, None, None] * neutral[:, start:stop].to(dtype)
    for index in range(targets.shape[1]):
        moved = moved + share[:, index, None, None] * targets[:, index, start:stop].to(dtype)
    result = neutral.expand(len(weights), -1, -1).clone()
    result[:, start:stop] = moved.to(neutral.dtype)
    return result


def blend_pooled(neutral: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the formula of `blend` for pooled vectors: they are no tokens, so there is no window.

    Args:
        neutral: of the neutral prompt [N, P], or [1, P] for all rows.
        targets: of K expressions [N, K, P], or [1, K, P] for all rows.
        weights: intensities [N, K].

    Returns:
        [N, P] in the dtype of ``neutral``.

    Raises:
        ConditioningError: shapes that do not belong together.
    """
    return blend(neutral.unsqueeze(-2), targets.unsqueeze(-2), weights)[:, 0]


def blend_prompts(
    neutral: PromptEmbeds, targets: PromptEmbeds, weights: torch.Tensor, window: Window | None = None
) -> PromptEmbeds:
    """Return the conditioning of one picture at the intensities of each row.

    Args:
        neutral: its neutral prompt, one row.
        targets: its prompts of K expressions, K rows.
        weights: intensities [N, K]; N rows come out.
        window: half-open range of tokens that moves; None is all of them.

    Raises:
        ConditioningError: see `blend`.
    """
    pooled = None
    if neutral.pooled is not None and targets.pooled is not None:
        pooled = blend_pooled(neutral.pooled, targets.pooled[None], weights)
    return type(neutral)(
        embeds=blend(neutral.embeds, targets.embeds[None], weights, window),
        mask=neutral.mask.expand(len(weights), -1),
        pooled=pooled,
    )


def interpolate(
    neutral: PromptEmbeds,
    targets: Mapping[str, PromptEmbeds],
    intensities: Mapping[str, float],
    window: Window | None = None,
) -> PromptEmbeds:
    """Return the conditioning of expressions at the given intensities.

    Args:
        neutral: N neutral prompts [N, L, D].
        targets: expression -> its N prompts for the same images, [N, L, D].
        intensities: expression -> intensity, one for all N rows; each has to be in ``targets``.
        window: half-open range of tokens that moves; None is all of them.

    Raises:
        ConditioningError: an expression without an embedding, an intensity that is not finite, prompts of
            different lengths, or a window outside of the prompt.
    """
    import torch

    names = sorted(intensities)  # one order of summing, whatever the order of the mapping
    for name in names:
        if name not in targets:
            raise ConditioningError(f"there is no embedding of {name!r}", "encode its prompt first")
        if not math.isfinite(intensities[name]):
            raise ConditioningError(
                f"the intensity of {name!r} is not a finite number", "use for example 0.8"
            )
        require_equal_lengths(neutral, targets[name], name)
    if not names:
        return neutral
    weights = torch.tensor(
        [[float(intensities[name]) for name in names]] * len(neutral), device=neutral.embeds.device
    )
    stacked = torch.stack([targets[name].embeds for name in names], dim=1)
    pooled = neutral.pooled
    if pooled is not None:
        vectors = [vector for name in names if (vector := targets[name].pooled) is not None]
        pooled = blend_pooled(pooled, torch.stack(vectors, dim=1), weights)
    return type(neutral)(
        embeds=blend(neutral.embeds, stacked, weights, window), mask=neutral.mask, pooled=pooled
    )


def require_equal_lengths(neutral: PromptEmbeds, target: PromptEmbeds, name: str) -> None:
    """Refuse prompts whose tokens do not stand in the same places: a line between them has no meaning.

    Raises:
        ConditioningError: the lengths differ, or only one of them has a pooled vector.
    """
    if (neutral.pooled is None) != (target.pooled is None):
        raise ConditioningError(
            f"of the neutral prompt and that of {name!r} only one has a pooled vector",
            "encode all prompts of an image with the same encoder",
        )
    same = neutral.mask.shape == target.mask.shape and bool((neutral.mask == target.mask).all())
    if not same or neutral.embeds.shape != target.embeds.shape:
        lengths = [int(prompts.mask.sum(1).max()) for prompts in (neutral, target)]
        raise ConditioningError(
            f"the prompt of {name!r} has {lengths[1]} tokens, the neutral one {lengths[0]}; they cannot be "
            "interpolated",
            "choose words of equally many tokens, both for the neutral word and for the expressions",
        )


def require_offered(spec: ConditioningSpec, rows: Sequence[Mapping[str, float]]) -> None:
    """Refuse expressions and intensities that a signed conditioning does not offer.

    Raises:
        UnknownExpression: the adapter has no such expression; the nearest is named.
        StrengthOutOfRange: an intensity is outside of the signed range.
    """
    for name in {name: None for row in rows for name in row}:
        if name not in spec.expressions:
            near = difflib.get_close_matches(name, spec.expressions, n=1, cutoff=0.0)[0]
            raise UnknownExpression(
                f"the adapter has no expression {shown(name)!r}",
                f"did you mean {near!r}? It has: {', '.join(spec.expressions)}",
            )
    for row in rows:
        for name, value in row.items():
            require_strength(spec, value, f"the intensity of {name!r}")


def usual_strength(least: float, most: float) -> float:
    """Return the strength where nobody names one: 1, as trained, or what a signed range has nearest to it."""
    return min(max(1.0, least), most)


def strength_of(spec: ConditioningSpec, asked: float | None = None) -> float:
    """Return the strength that is asked for, or the usual one of an adapter where nobody names one."""
    return usual_strength(spec.strength_min, spec.strength_max) if asked is None else asked


def require_strength(spec: ConditioningSpec, value: float, what: str = "the strength") -> None:
    """Refuse a strength outside of the signed range.

    Raises:
        StrengthOutOfRange: it is.
    """
    if not spec.strength_min <= value <= spec.strength_max:
        signed = f"{spec.strength_min:g} to {spec.strength_max:g}"
        raise StrengthOutOfRange(
            f"{what} is {value:g}; the adapter is signed for {signed}", f"choose a value from {signed}"
        )
