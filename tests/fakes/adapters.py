"""Clean adapters in the right format, made with numpy alone, and the parts to break them with.

``clean_adapter()`` is a folder that passes every check for a base with two blocks of width 32. Tests change
one thing of it: the numbers (``factors``), the container (``container``, ``raw_container``) or the card
(``card``).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from registry.dialects.grammar import RELEASED_KINDS
from registry.digest import digest_bytes
from registry.families import FAMILIES, KNOWN_BASES, BaseFacts
from registry.manifest import CARD_NAME, WEIGHTS_NAME

RANK = 4

TINY_BASE = BaseFacts(
    id="tests/tiny-base",
    family="qwen-image-edit",
    license="Apache-2.0",
    revision="1",
    config={"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16},
)
"""Two blocks of width 32."""

BASES: Mapping[str, BaseFacts] = {**KNOWN_BASES, TINY_BASE.id: TINY_BASE}
"""For ``Policy(bases=BASES)`` and ``scan(..., bases=BASES)``."""

TRAINED_KINDS: tuple[str, ...] = tuple(sorted(RELEASED_KINDS))
"""The twelve kinds of modules that PixelSmile and the shipped recipes train."""

MAGNITUDE = "lora_magnitude_vector"
Factors = dict[str, NDArray[np.float32]]


def modules(base: BaseFacts = TINY_BASE, kinds: Collection[str] = TRAINED_KINDS) -> list[str]:
    """The base's modules of some kinds, sorted."""
    return sorted(name for name in base.spec if FAMILIES[base.family].block_of(name)[1] in kinds)


def factors(
    base: BaseFacts = TINY_BASE,
    *,
    rank: int = RANK,
    seed: int = 0,
    kinds: Collection[str] = TRAINED_KINDS,
) -> Factors:
    """Key -> values of a plausible trained adapter: A is (rank, in), B is (out, rank)."""
    family = FAMILIES[base.family]
    generator = np.random.default_rng(seed)
    silent, rows = family.silent(base.spec), family.silent_rows(base.spec)
    values: Factors = {}
    for module, (out, into) in base.spec.items():
        if family.block_of(module)[1] not in kinds:
            continue
        a = generator.normal(0, 1 / np.sqrt(into), (rank, into))
        b = np.zeros((out, rank)) if module in silent else generator.normal(0, 0.02, (out, rank))
        b[rows.get(module, slice(0))] = 0
        values[f"{family.key(module)}.lora_A.weight"] = a.astype(np.float32)
        values[f"{family.key(module)}.lora_B.weight"] = b.astype(np.float32)
    return values


def rescaled(values: Factors, *, seed: int = 0) -> Factors:
    """The same with DoRA's magnitudes (out), as far from 1 as the rows of real weights are."""
    generator = np.random.default_rng(seed)
    return values | {
        key.replace("lora_B.weight", MAGNITUDE): generator.uniform(0.4, 3.0, len(b)).astype(np.float32)
        for key, b in values.items()
        if key.endswith("lora_B.weight")
    }


def encode(values: NDArray[np.float32], dtype: str) -> bytes:
    """The little-endian bytes of float32 values in a safetensors dtype (bfloat16 rounds towards zero)."""
    if dtype == "BF16":
        return (np.ascontiguousarray(values, dtype="<f4").view("<u4") >> 16).astype("<u2").tobytes()
    with np.errstate(over="ignore"):
        kind = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype]
        return np.ascontiguousarray(values).astype(kind).tobytes()


def raw_container(header: str | bytes, data: bytes, *, length: int | None = None) -> bytes:
    """A container with any header text, honest or not."""
    text = header.encode() if isinstance(header, str) else header
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def table(values: Mapping[str, NDArray[np.float32]], dtype: str = "BF16") -> tuple[dict[str, Any], bytes]:
    """The header entries and the data of an honest container; magnitudes are F32 in any."""
    entries: dict[str, Any] = {}
    data = b""
    for key in sorted(values):
        kept = "F32" if key.endswith(MAGNITUDE) else dtype
        piece = encode(values[key], kept)
        entries[key] = {
            "dtype": kept,
            "shape": list(values[key].shape),
            "data_offsets": [len(data), len(data) + len(piece)],
        }
        data += piece
    return entries, data


def container(
    values: Mapping[str, NDArray[np.float32]],
    dtype: str = "BF16",
    metadata: Mapping[str, Any] | None = None,
) -> bytes:
    """An honest container; ``metadata`` defaults to what the trainer writes."""
    entries, data = table(values, dtype)
    tags = {"format": "pt", "base": TINY_BASE.id} if metadata is None else dict(metadata)
    return raw_container(padded(json.dumps({"__metadata__": tags, **entries})), data)


def padded(header: str) -> str:
    """A header with spaces behind it, so that the data begins at a multiple of eight bytes."""
    return header + " " * (-len(header.encode()) % 8)


def card(
    base: BaseFacts = TINY_BASE,
    *,
    rank: int = RANK,
    dtype: str = "BF16",
    targets: Collection[str] = TRAINED_KINDS,
) -> dict[str, Any]:
    """The JSON values of a clean card; change them and write them with ``json.dumps``."""
    return {
        "base": {"id": base.id, "revision": base.revision, "family": base.family, "license": base.license},
        "lora": {
            "rank": rank,
            "alpha": 8.0,
            "targets": [*targets],
            "dtype": dtype,
        },
        "conditioning": {
            "template": "show a {} expression",
            "neutral": "neutral",
            "expressions": ["happy", "surprised"],
        },
        "license": "LicenseRef-Proprietary",
        "ingredients": [
            {"name": base.id, "kind": "base", "license": base.license, "source": "https://example.org/base"},
            {
                "name": "tiny portraits",
                "kind": "dataset",
                "license": "LicenseRef-Proprietary",
                "source": "rendered",
                "digest": digest_bytes(b"dataset"),
            },
        ],
        "training": {
            "recipe": digest_bytes(b"recipe"),
            "dataset": digest_bytes(b"dataset"),
            "seed": 7,
            "steps": 100,
            "code_version": "0.1.0",
            "run_id": "run-1",
        },
        "description": "a tiny adapter for tests",
    }


def changed(document: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of JSON values with the one at a dotted path replaced; numbers index lists."""
    result: Any = copy.deepcopy(dict(document))
    at = result
    *parents, last = path.split(".")
    for part in parents:
        at = at[int(part)] if isinstance(at, list) else at[part]
    if isinstance(at, list):
        at[int(last)] = value
    else:
        at[last] = value
    return result


def folder(weights: bytes, card_values: Mapping[str, Any]) -> dict[str, bytes]:
    """The files of an adapter folder."""
    return {WEIGHTS_NAME: weights, CARD_NAME: json.dumps(card_values).encode()}


def clean_adapter(
    base: BaseFacts = TINY_BASE, *, rank: int = RANK, dtype: str = "BF16", seed: int = 0
) -> dict[str, bytes]:
    """The files of an adapter that passes every check."""
    weights = container(factors(base, rank=rank, seed=seed), dtype)
    return folder(weights, card(base, rank=rank, dtype=dtype))
