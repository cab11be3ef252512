"""The adapter card of a LoRA file from elsewhere: checked against the file, or drafted from what is known."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

from registry.dialects.grammar import DialectError
from registry.dialects.reading import LoraFile
from registry.digest import Digest
from registry.errors import shown
from registry.manifest import AdapterCard

DRAFT_NAME: Final = "adapter.draft.json"
"""The card of an imported adapter until a person has filled in what the file cannot tell."""

_OPTIONAL: Final = frozenset({"run_id", "token_window", "digest"})
_MAX_TEXT = 300
_MAX_STEPS = 100_000_000


def check(card: AdapterCard, lora: LoraFile, dtype: str) -> None:
    """Demand that a card describes the file.

    Args:
        card: what a person says about it.
        lora: what the file says.
        dtype: the dtype that is written.

    Raises:
        DialectError: they disagree; every field is named.
    """
    facts = card.lora
    pairs = [
        ("base.id", card.base.id, lora.base.id),
        ("base.family", card.base.family, lora.base.family),
        ("lora.rank", facts.rank, lora.rank),
        ("lora.targets", sorted(facts.targets), list(lora.targets)),
        ("lora.dtype", facts.dtype, dtype),
    ]
    wrong = [
        f"{name} is {shown(said)} in the card and {shown(found)} in the file"
        for name, said, found in pairs
        if said != found
    ]
    # A file without alpha has it folded in: what the training's was, only its card can say.
    stated = lora.alpha if lora.states_alpha else None
    if stated is not None and not math.isclose(facts.alpha, stated, rel_tol=1e-2):
        wrong.append(f"lora.alpha is {facts.alpha:g} in the card and {stated:g} in the file")
    if wrong:
        raise DialectError(
            "the card describes another adapter: " + "; ".join(wrong),
            "correct the card, or leave --card away for a draft of the right one",
        )


def draft(lora: LoraFile, dtype: str, name: str, source: Digest) -> dict[str, Any]:
    """Return the JSON values of a card with everything that is known; what is open is None.

    Args:
        lora: what the file says.
        dtype: the dtype that is written.
        name: the name of the original file.
        source: the digest of the original file.
    """
    base, claims = lora.base, _claims(lora.metadata)
    return {
        "base": {"id": base.id, "revision": base.revision, "family": base.family, "license": base.license},
        "lora": {
            "rank": lora.rank,
            "alpha": lora.alpha,
            "targets": list(lora.targets),
            "dtype": dtype,
        },
        "conditioning": {
            "template": None,
            "neutral": "neutral",
            "expressions": None,
            "token_window": None,
            "strength_min": 0.0,
            "strength_max": 1.5,
        },
        "license": claims.get("license"),
        "ingredients": [
            {
                "name": base.id,
                "kind": "base",
                "license": base.license,
                "source": f"{base.id}@{base.revision}",
            },
            {
                "name": shown(name, 120),
                "kind": "adapter",
                "license": claims.get("license"),
                "source": None,
                "digest": str(source),
            },
        ],
        "training": {
            "recipe": None,
            "dataset": None,
            "seed": claims.get("seed"),
            "steps": claims.get("steps"),
            "code_version": None,
            "run_id": None,
        },
        "description": claims.get("title", ""),
    }


def open_fields(values: Any, path: str = "") -> Iterator[str]:
    """Yield the dotted paths of the fields that a person has to fill in."""
    if isinstance(values, Mapping):
        for name, value in values.items():
            if value is not None:
                yield from open_fields(value, f"{path}.{name}" if path else name)
            elif name not in _OPTIONAL:
                yield f"{path}.{name}" if path else name
    elif isinstance(values, list):
        for index, value in enumerate(values):
            yield from open_fields(value, f"{path}.{index}")


def _claims(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return what the file's own tags say about it; nobody has checked them."""
    claims: dict[str, Any] = {}
    for name, tag, highest in (("seed", "ss_seed", 1 << 62), ("steps", "ss_steps", _MAX_STEPS)):
        text = metadata.get(tag, "")
        if text.isascii() and text.isdecimal() and len(text) < 20 and 1 <= int(text) <= highest:
            claims[name] = int(text)
    for name, tag in (("license", "modelspec.license"), ("title", "modelspec.title")):
        text = metadata.get(tag, "")
        if text and text.isascii() and text.isprintable() and len(text) <= _MAX_TEXT:
            claims[name] = text
    return claims
