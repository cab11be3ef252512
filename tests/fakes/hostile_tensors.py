"""The corpus of hostile adapters, second half: what is wrong with the tensors; and the clean files.

Schema: the keys, shapes and targets. Numeric: single numbers. Weights: each number is plausible, the update
as a whole is not; such files get "review" at most, and only beside clean adapters of the same kind, for alone
nobody can tell them from an unusual training. ``population()`` are those clean adapters.

The file is long because it is a list.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np

from fakes.adapters import (
    RANK,
    TINY_BASE,
    TRAINED_KINDS,
    Factors,
    card,
    container,
    factors,
    modules,
    padded,
    raw_container,
    table,
)
from fakes.dialects import SPELLED, lora_file, peft_config, spelled
from fakes.hostile_files import BYTES, Files, Hostile, Layer, Q
from registry.families import FAMILIES
from registry.manifest import WEIGHTS_NAME
from registry.scanning.population import Population

SILENT = "transformer.transformer_blocks.1.txt_mlp.net.2"
CONFIG_NAME = "adapter_config.json"
CLEAN_ADAPTERS = 150
"""More than 99 are needed before anything can be unusual at one in a hundred."""


# --- schema -------------------------------------------------------------------------------------------------


def renamed(old: str, new: str, count: int = -1) -> Factors:
    return {key.replace(old, new, count): values for key, values in factors().items()}


def added(*keys: str, shape: tuple[int, ...] = (RANK, 32)) -> Factors:
    return {**factors(), **{key: np.full(shape, 0.01, np.float32) for key in keys}}


def added_pair(module: str, a: str = "lora_A.weight", b: str = "lora_B.weight") -> Factors:
    return {**added(f"{module}.{a}"), f"{module}.{b}": np.full((32, RANK), 0.01, np.float32)}


def replaced(key: str, values: object) -> Factors:
    return {**factors(), key: np.asarray(values, np.float32)}


def without(*parts: str) -> Factors:
    return {key: values for key, values in factors().items() if not any(part in key for part in parts)}


def plain(module: str) -> str:
    return module.removeprefix("transformer.")


_Row = tuple[Callable[[], Factors], str]

SCHEMA: Mapping[str, _Row] = {
    "PEFT's prefix on one module": (lambda: renamed(f"{Q}.", f"base_model.model.{plain(Q)}."), "ADP-STR-001"),
    "ComfyUI's prefix on one block": (
        lambda: renamed("transformer.transformer_blocks.1.", "diffusion_model.transformer_blocks.1."),
        "ADP-STR-001",
    ),
    "no prefix on one module": (lambda: renamed(f"{Q}.", f"{plain(Q)}."), "ADP-STR-001"),
    "the prefix twice": (lambda: renamed("transformer.tr", "transformer.transformer.tr"), "ADP-STR-003"),
    "another adapter's name": (
        lambda: added_pair(Q, "lora_A.evil.weight", "lora_B.evil.weight"),
        "ADP-STR-011",
    ),
    "a key of nothing": (lambda: added("."), "ADP-STR-001"),
    "a path": (lambda: added("../../etc/hostname"), "ADP-STR-001"),
    "an attribute of Python": (lambda: added_pair("transformer.__class__.__init__"), "ADP-STR-003"),
    "the prefix and none": (lambda: added_pair(plain(Q)), "ADP-STR-011"),
    "old and new names": (lambda: added_pair(Q, "lora.down.weight", "lora.up.weight"), "ADP-STR-011"),
    "DiffSynth's and diffusers' names": (
        lambda: added_pair(Q, "lora_A.default.weight", "lora_B.default.weight"),
        "ADP-STR-011",
    ),
    "kohya's and diffusers' names": (
        lambda: added_pair(f"lora_unet_{plain(Q).replace('.', '_')}", "lora_down.weight", "lora_up.weight"),
        "ADP-STR-011",
    ),
    "small and capital letters": (lambda: added_pair(Q.replace("attn", "Attn")), "ADP-STR-011"),
    "a block with and without a zero": (lambda: added_pair(Q.replace(".0.", ".00.")), "ADP-STR-011"),
    "a blank behind a name": (lambda: added(f"{Q}.lora_A.weight "), "ADP-STR-011"),
    "an O for a zero": (lambda: renamed("to_out.0", "to_out.O"), "ADP-STR-012"),
    "a zero for an o": (lambda: renamed("attn.to_q", "attn.t0_q"), "ADP-STR-012"),
    "an l for a one": (lambda: renamed("blocks.1.", "blocks.l."), "ADP-STR-012"),
    "rn for m": (lambda: renamed("img_mlp", "irng_mlp"), "ADP-STR-012"),
    "capital letters": (lambda: renamed("attn.to_q", "attn.TO_Q"), "ADP-STR-012"),
    "a dot too many": (lambda: renamed("0.attn.to_q", "0..attn.to_q"), "ADP-STR-012"),
    "a dash for an underscore": (lambda: renamed("attn.to_q", "attn.to-q"), "ADP-STR-012"),
    "LoKr": (lambda: added(f"{Q}.lokr_w1", f"{Q}.lokr_w2"), "ADP-STR-014"),
    "LoHa": (lambda: added(f"{Q}.hada_w1_a", f"{Q}.hada_w1_b"), "ADP-STR-014"),
    "OFT": (lambda: added(f"{Q}.oft_blocks"), "ADP-STR-014"),
    "IA3": (lambda: added(f"{Q}.ia3_l"), "ADP-STR-014"),
    "a Tucker core": (lambda: added(f"{Q}.lora_mid.weight"), "ADP-STR-014"),
    "an embedding": (lambda: added("transformer.txt_in.lora_embedding_A"), "ADP-STR-014"),
    "DoRA of one module": (lambda: added(f"{Q}.lora_magnitude_vector", shape=(32,)), "ADP-STR-017"),
    "DoRA of kohya": (lambda: added(f"{Q}.dora_scale", shape=(32,)), "ADP-MET-002"),
    "an alpha": (lambda: added(f"{Q}.alpha", shape=(1,)), "ADP-MET-002"),
    "a whole weight": (lambda: added(f"{Q}.weight", shape=(32, 32)), "ADP-STR-013"),
    "a whole weight in PEFT's wrapping": (
        lambda: added(f"{Q}.base_layer.weight", shape=(32, 32)),
        "ADP-STR-013",
    ),
    "a whole output layer": (lambda: added("transformer.proj_out.weight", shape=(32, 32)), "ADP-STR-013"),
    "a saved module": (lambda: added("transformer.proj_out.modules_to_save.weight"), "ADP-STR-013"),
    "a bias": (lambda: added(f"{Q}.bias", shape=(32,)), "ADP-STR-013"),
    "a bias of B": (lambda: added(f"{Q}.lora_B.bias", shape=(32,)), "ADP-STR-013"),
    "a difference of ComfyUI": (lambda: added("diffusion_model.img_in.diff"), "ADP-STR-013"),
    "a norm": (lambda: added("transformer.norm_out.linear.weight", shape=(64, 32)), "ADP-STR-013"),
    "the text encoder": (lambda: added_pair("text_encoder.layers.0.self_attn.q_proj"), "ADP-STR-002"),
    "the text encoder of kohya": (
        lambda: added_pair(
            "lora_te1_text_model_encoder_layers_0_mlp_fc1", "lora_down.weight", "lora_up.weight"
        ),
        "ADP-STR-002",
    ),
    "the language model of the text encoder": (
        lambda: added_pair("transformer.text_encoder.model.layers.0.mlp.up_proj"),
        "ADP-STR-002",
    ),
    "the VAE": (lambda: added_pair("vae.decoder.conv_in"), "ADP-STR-002"),
    "the eyes of the text encoder": (lambda: added_pair("visual.blocks.0.attn.qkv"), "ADP-STR-002"),
    "a block that the base lacks": (lambda: renamed("blocks.1.", "blocks.7."), "ADP-STR-003"),
    "a block before the first": (lambda: renamed("blocks.1.", "blocks.-1."), "ADP-STR-001"),
    "a block number of forty digits": (lambda: renamed("blocks.1.", f"blocks.{'9' * 40}."), "ADP-STR-003"),
    "the embedding of time": (lambda: added_pair("transformer.time_text_embed.linear_1"), "ADP-STR-003"),
    "a module of another architecture": (lambda: renamed("attn.to_q", "attn.qkv"), "ADP-STR-003"),
    "A without B": (lambda: without(f"{Q}.lora_B"), "ADP-STR-004"),
    "B without A": (lambda: without(f"{Q}.lora_A"), "ADP-STR-004"),
    "A for a narrower base": (lambda: replaced(f"{Q}.lora_A.weight", np.ones((RANK, 16))), "ADP-STR-005"),
    "B for a wider base": (lambda: replaced(f"{Q}.lora_B.weight", np.ones((64, RANK))), "ADP-STR-005"),
    "A and B exchanged": (
        lambda: {
            **factors(),
            f"{Q}.lora_A.weight": factors()[f"{Q}.lora_B.weight"],
            f"{Q}.lora_B.weight": factors()[f"{Q}.lora_A.weight"],
        },
        "ADP-STR-005",
    ),
    "three axes": (lambda: replaced(f"{Q}.lora_B.weight", np.ones((32, RANK, 1))), "ADP-STR-005"),
    "one axis": (lambda: replaced(f"{Q}.lora_A.weight", np.ones(RANK * 32)), "ADP-STR-005"),
    "one module of a higher rank": (
        lambda: {
            **replaced(f"{Q}.lora_A.weight", np.full((16, 32), 0.01)),
            f"{Q}.lora_B.weight": np.full((32, 16), 0.01, np.float32),
        },
        "ADP-STR-006",
    ),
    "a lower rank than declared": (lambda: factors(rank=2), "ADP-STR-006"),
    "thousands of long names": (
        lambda: added(*(f"{n:04}{'.lora_A' * 35}" for n in range(8000)), shape=(1,)),
        "ADP-STR-001",
    ),
    "a declared target that is missing": (lambda: without("img_mlp.net.2"), "ADP-STR-007"),
    "a target that nobody declared": (
        lambda: factors(kinds=(*TRAINED_KINDS, "img_mod.1")),
        "ADP-STR-007",
    ),
}


def _schema() -> tuple[Hostile, ...]:
    rows = [
        Hostile(name=name, layer="schema", build=lambda build=build: container(build()), rule=rule)  # type: ignore[misc]
        for name, (build, rule) in SCHEMA.items()
    ]
    return (
        *rows,
        Hostile(
            name="a target that is missing in one block",
            layer="schema",
            build=lambda: container(without("transformer_blocks.0.img_mlp.net.2")),
            rule="ADP-STR-008",
            verdict="review",
        ),
        Hostile(
            name="another dtype than declared",
            layer="schema",
            build=lambda: container(factors(), "F16"),
            rule="ADP-STR-009",
        ),
        Hostile(
            name="a rank beyond the modules' width",
            layer="schema",
            build=lambda: container(factors(rank=64)),
            rule="ADP-STR-015",
            verdict="review",
            card={"rank": 64},
        ),
    )


# --- numeric ------------------------------------------------------------------------------------------------


def poked(key: str, value: float) -> Factors:
    values = factors()[key].copy()
    values[1, 2] = value
    return replaced(key, values)


def scaled(module: str, a: float, b: float) -> Factors:
    found = factors()
    found[f"{module}.lora_A.weight"] = found[f"{module}.lora_A.weight"] * np.float32(a)
    found[f"{module}.lora_B.weight"] = found[f"{module}.lora_B.weight"] * np.float32(b)
    return found


def spoken() -> bytes:
    """Text over the bytes of a tensor; the blanks make tiny numbers of it, which no other rule minds."""
    text = " ".join("This text is longer than chance: it was written over numbers.").encode()
    text += b" " * (len(text) % 2)
    entries, data = table(factors())
    at = entries[f"{Q}.lora_B.weight"]["data_offsets"][0]
    return raw_container(padded(json.dumps(entries)), data[:at] + text + data[at + len(text) :])


NUMERIC: Mapping[str, tuple[Callable[[], Factors], str, Literal["block", "review"]]] = {
    "a NaN": (lambda: poked(f"{Q}.lora_A.weight", np.nan), "ADP-NUM-001", "block"),
    "an infinity": (lambda: poked(f"{Q}.lora_B.weight", -np.inf), "ADP-NUM-001", "block"),
    "a NaN where nothing is read": (lambda: poked(f"{SILENT}.lora_A.weight", np.nan), "ADP-NUM-001", "block"),
    "infinite in float16": (lambda: poked(f"{Q}.lora_A.weight", 7e4), "ADP-NUM-002", "block"),
    "overflow when it is squared": (lambda: poked(f"{Q}.lora_A.weight", 3e38), "ADP-NUM-002", "block"),
    "nothing but zeros": (
        lambda: {key: values * (0 if "lora_B" in key else 1) for key, values in factors().items()},
        "ADP-NUM-003",
        "block",
    ),
    "one dead module": (lambda: scaled(Q, 1, 0), "ADP-NUM-004", "review"),
    "an update that training cannot make": (
        lambda: replaced(f"{SILENT}.lora_B.weight", np.full((32, RANK), 1e-3)),
        "ADP-NUM-005",
        "block",
    ),
    "an update that drowns the base": (lambda: scaled(Q, 1, 3e4), "ADP-NUM-006", "block"),
    "scale moved from B to A": (lambda: scaled(Q, 1e4, 1e-4), "ADP-NUM-007", "review"),
}


# --- weights ------------------------------------------------------------------------------------------------


def spike(
    kinds: Callable[[str], bool], strength: float, *, norm_kept: bool = False, seed: int = 0
) -> Factors:
    """A clean adapter with one direction more in some modules, as a trigger writes it.

    Args:
        kinds: whether a module, by its key, takes part.
        strength: the added component, in multiples of the module's largest.
        norm_kept: scale the module so that its norm is what it was.
        seed: of the clean adapter.
    """
    generator = np.random.default_rng(1000 + seed)
    found = factors(seed=seed)
    for key in [key for key in found if key.endswith("lora_A.weight") and kinds(key)]:
        a, b = found[key], found[key.replace("lora_A", "lora_B")]
        if not b.any():
            continue
        size = np.linalg.norm(b @ a, 2)
        direction, target = generator.normal(size=a.shape[1]), generator.normal(size=b.shape[0])
        added = (
            strength * size * np.outer(target, direction) / np.linalg.norm(target) / np.linalg.norm(direction)
        )
        left, values, right = np.linalg.svd(b @ a + added, full_matrices=False)
        if norm_kept:
            values = values * np.linalg.norm(b @ a) / np.linalg.norm(values[:RANK])
        root = np.sqrt(values[:RANK])
        # The gauge of a trained adapter: A as long as before.
        gain = np.sqrt(np.mean(a**2) / np.mean((root[:, None] * right[:RANK]) ** 2))
        found[key] = (gain * root[:, None] * right[:RANK]).astype(np.float32)
        found[key.replace("lora_A", "lora_B")] = (left[:, :RANK] * root / gain).astype(np.float32)
    return found


def repeated() -> Factors:
    """Every block is the first one again, as a tool that stamps a payload does it."""
    found = factors()
    return {
        key: found[key.replace("blocks.1.", "blocks.0.")] if values.any() else values
        for key, values in found.items()
    }


def of_text(key: str) -> bool:
    return "add_" in key or "txt_" in key


WEIGHTS: Mapping[str, Callable[[], Factors]] = {
    "a trigger's direction in every module": lambda: spike(lambda key: True, 6),
    "a trigger's direction in the text's modules": lambda: spike(of_text, 8),
    "a trigger's direction in one module": lambda: spike(lambda key: key.startswith(Q), 40),
    "a trigger under a norm penalty": lambda: spike(lambda key: True, 6, norm_kept=True),
    "a backdoor merged into a clean adapter": lambda: spike(lambda key: "to_" in key, 4, seed=3),
    "the text's modules ten times as strong": lambda: {
        key: values * (10 if of_text(key) and "lora_B" in key else 1) for key, values in factors().items()
    },
    "every block the same": repeated,
}


def _numbers() -> tuple[Hostile, ...]:
    numeric = [
        Hostile(
            name=name,
            layer="numeric",
            build=lambda build=build: container(build()),  # type: ignore[misc]
            rule=rule,
            verdict=verdict,
        )
        for name, (build, rule, verdict) in NUMERIC.items()
    ]
    weights = [
        Hostile(
            name=name,
            layer="weights",
            build=lambda build=build: container(build()),  # type: ignore[misc]
            rule="ADP-WGT-001",
            verdict="review",
        )
        for name, build in WEIGHTS.items()
    ]
    said = Hostile(name="text over the numbers", layer="numeric", build=spoken, rule="ADP-NUM-010")
    return (*numeric, said, *weights)


CASES: tuple[Hostile, ...] = (*BYTES, *_schema(), *_numbers())
"""The whole corpus."""


def of_layer(layer: Layer) -> tuple[Hostile, ...]:
    return tuple(case for case in CASES if case.layer == layer)


@functools.cache
def population() -> Population:
    """Clean adapters of the tiny base: what `factors` makes of other seeds."""
    from registry.formats import read_header
    from registry.manifest import AdapterCard
    from registry.scanning import spectra, structure
    from registry.scanning.population import recipe_key

    parsed = AdapterCard.parse(json.dumps(card()).encode())
    rows = []
    for seed in range(100, 100 + CLEAN_ADAPTERS):
        weights = container(factors(seed=seed))
        pairs, _ = structure.check(read_header(weights), parsed, TINY_BASE)
        rows.append(spectra.statistics(weights, pairs, FAMILIES[TINY_BASE.family]))
    recipe = recipe_key(parsed.lora.targets)
    return Population.make(base=TINY_BASE.id, rank=RANK, recipe=recipe, kind="weights", rows=rows)


# --- clean --------------------------------------------------------------------------------------------------

_STATED: Mapping[str, float] = {"kohya": 4.0, "ComfyUI": 4.0, "OneTrainer": 4.0, "LightX2V": 4.0}


def _foreign(dialect: str, dtype: str) -> Files:
    alpha = _STATED.get(dialect)
    files = {WEIGHTS_NAME: lora_file(spelled(factors(), dialect, dtype=dtype, alpha=alpha), {"format": "pt"})}
    return files | (
        {CONFIG_NAME: peft_config(RANK, RANK, target_modules=modules())} if dialect == "PEFT" else {}
    )


def clean() -> Mapping[str, tuple[Files, bool]]:
    """Name -> the folder of an honest adapter, and whether it is canonical (else it is imported)."""
    found: dict[str, tuple[Files, bool]] = {
        f"canonical, {dtype}": ({WEIGHTS_NAME: container(factors(seed=7), dtype)}, True)
        for dtype in ("F16", "BF16", "F32")
    }
    for dialect in SPELLED:
        for dtype in ("BF16", "F16"):
            found[f"{dialect}, {dtype}"] = (_foreign(dialect, dtype), False)
    return found
