"""LoRA files as other programs write them, made with numpy alone.

``spelled(values, "kohya", alpha=8)`` takes the factors of a canonical adapter and writes them in another
dialect; ``lora_file`` writes any tensors.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fakes.adapters import TINY_BASE, Factors, encode, raw_container
from registry.content import Content
from registry.dialects import reading, writing
from registry.dialects.reading import LoraFile
from registry.dialects.writing import Written
from registry.families import BaseFacts
from registry.formats import parse_key

#: dialect -> what stands before a module, its two factors, and whether its dots are underscores.
SPELLED: Mapping[str, tuple[str, str, str, bool]] = {
    "diffusers": ("transformer.", ".lora_A.weight", ".lora_B.weight", False),
    "old diffusers": ("transformer.", ".lora.down.weight", ".lora.up.weight", False),
    "OneTrainer": ("transformer.", ".lora_down.weight", ".lora_up.weight", False),
    "PEFT": ("base_model.model.", ".lora_A.weight", ".lora_B.weight", False),
    "kohya": ("lora_unet_", ".lora_down.weight", ".lora_up.weight", True),
    "ComfyUI": ("diffusion_model.", ".lora_A.weight", ".lora_B.weight", False),
    "DiffSynth": ("", ".lora_A.default.weight", ".lora_B.default.weight", False),
    "LightX2V": ("", ".lora_down.weight", ".lora_up.weight", False),
}

Tensors = dict[str, tuple[str, NDArray[Any]]]
"""Key -> dtype and values."""


def key_of(dialect: str, module: str, role: str) -> str:
    """The key of a module's "A", "B" or "alpha"."""
    if dialect == "PixelSmile":
        renamed = module.split(".", 2)[2] in ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
        dialect = "old diffusers" if renamed else "diffusers"
    prefix, a, b, flat = SPELLED[dialect]
    stem = module.replace(".", "_") if flat else module
    return prefix + stem + {"A": a, "B": b, "alpha": ".alpha"}[role]


def spelled(
    values: Factors,
    dialect: str,
    *,
    dtype: str = "BF16",
    alpha: float | Callable[[str], float] | None = None,
    alpha_dtype: str = "F32",
) -> Tensors:
    """The tensors of a LoRA file in a dialect; ``alpha`` of each module, or of all, or none."""
    tensors: Tensors = {}
    for key, value in values.items():
        parsed = parse_key(key)
        assert parsed is not None
        tensors[key_of(dialect, parsed.module, parsed.factor)] = dtype, value
        if alpha is not None and parsed.factor == "A":
            number = alpha(parsed.module) if callable(alpha) else alpha
            tensors[key_of(dialect, parsed.module, "alpha")] = alpha_dtype, np.array(number)
    return tensors


def lora_file(tensors: Tensors, metadata: Mapping[str, str] | None = None) -> bytes:
    """A container with these tensors, in their order."""
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    data = b""
    for key, (dtype, values) in tensors.items():
        if dtype in ("I64", "I32"):
            piece = values.astype("<i8" if dtype == "I64" else "<i4").tobytes()
        elif dtype == "F64":
            piece = values.astype("<f8").tobytes()
        else:
            piece = encode(np.asarray(values, dtype=np.float32), dtype)
        offsets = [len(data), len(data) + len(piece)]
        entries[key] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": offsets}
        data += piece
    return raw_container(json.dumps(entries), data)


def peft_config(rank: int, alpha: float, **more: Any) -> bytes:
    """An ``adapter_config.json`` as PEFT writes it, with the fields that matter here."""
    values = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "bias": "none", "use_dora": False}
    values |= {"rank_pattern": {}, "alpha_pattern": {}, "init_lora_weights": True, "modules_to_save": None}
    return json.dumps(values | more).encode()


def rewritten(
    content: Content,
    to: str = "diffusers",
    base: BaseFacts = TINY_BASE,
    *,
    config: bytes | None = None,
    alpha: float | None = None,
    dtype: str | None = None,
) -> tuple[bytes, LoraFile, Written]:
    """The same LoRA in the dialect ``to``, what was read, and how exactly it was written."""
    lora = reading.read(content, base, config=config, alpha=alpha)
    sink = io.BytesIO()
    written = writing.write(lora, content, to, sink.write, dtype)
    return sink.getvalue(), lora, written
