"""Attacks on the scanner: each hostile file is stopped by the rule that is there for it.

A case is a name, what it changes of a clean adapter, and the rule that must answer. Without the rule the case
fails, even where another rule happens to stop the file too.
"""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fakes.adapters import (
    BASES,
    RANK,
    TINY_BASE,
    Factors,
    card,
    changed,
    clean_adapter,
    container,
    factors,
    raw_container,
    table,
)
from fakes.hostile_tensors import CASES
from registry import formats
from registry.families import BaseFacts
from registry.manifest import WEIGHTS_NAME, AdapterCard
from registry.scanning import ScanReport, scan
from registry.scanning.rules import RULES

Q = "transformer.transformer_blocks.0.attn.to_q"
SILENT = "transformer.transformer_blocks.1.txt_mlp.net.2"


def scanned(weights: bytes, card_values: Mapping[str, Any] | None = None) -> ScanReport:
    values = card() if card_values is None else card_values
    return scan(weights, AdapterCard.parse(json.dumps(values).encode()), bases=BASES)


def rules(report: ScanReport) -> set[str]:
    return {found.rule for found in report.findings}


# --- container: how the file is built ---------------------------------------------------------------------


def honest() -> tuple[dict[str, Any], bytes]:
    return table(factors())


def with_header(change: Callable[[dict[str, Any]], object]) -> bytes:
    entries, data = honest()
    change(entries)
    return raw_container(json.dumps(entries), data)


def with_text(change: Callable[[str], str]) -> bytes:
    entries, data = honest()
    return raw_container(change(json.dumps(entries)), data)


def with_entry(key: str, value: Any) -> bytes:
    return with_header(lambda entries: entries[f"{Q}.lora_A.weight"].__setitem__(key, value))


def duplicate_key() -> bytes:
    """The second entry of the key wins in lenient readers; here it names a tensor of the same size."""
    entries, data = honest()
    text = json.dumps(entries)
    key = f"{Q}.lora_A.weight"
    again = json.dumps({key: {**entries[key], "shape": list(reversed(entries[key]["shape"]))}})
    return raw_container(text[:-1] + ", " + again[1:], data)


def duplicate_inner_key() -> bytes:
    return with_text(lambda text: text.replace('"dtype": "BF16"', '"dtype": "F16", "dtype": "BF16"', 1))


def zip_archive(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def zip_polyglot(archive: bytes) -> bytes:
    """A valid container whose last tensor's bytes are an archive that zip readers open."""
    entries, data = honest()
    archive = b"\0" * (len(archive) % 2) + archive
    entries["zz.weight"] = {
        "dtype": "BF16",
        "shape": [len(archive) // 2],
        "data_offsets": [len(data), len(data) + len(archive)],
    }
    return raw_container(json.dumps(entries), data + archive)


def overlap() -> bytes:
    """Two tensors share their bytes, so that a change of one changes the other."""
    entries, data = honest()
    entries["alias"] = entries[min(entries)]
    return raw_container(json.dumps(entries), data)


def gap() -> bytes:
    entries, data = honest()
    for entry in entries.values():
        entry["data_offsets"] = [at + 64 for at in entry["data_offsets"]]
    return raw_container(json.dumps(entries), b"hidden!!" * 8 + data)


def metadata(tags: Any) -> bytes:
    return container(factors(), metadata=tags)


def deep() -> str:
    return '{"a": ' + "[" * 5000 + "]" * 5000 + "}"


CONTAINER: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty file": (lambda: b"", "ADP-CON-001"),
    "nothing but a length": (lambda: (2).to_bytes(8, "little"), "ADP-CON-001"),
    "pickle": (lambda: pickle.dumps({"weights": [1.0] * 50}), "ADP-CON-002"),
    "zip archive": (lambda: zip_archive({"archive/data.pkl": b"x" * 50}), "ADP-CON-002"),
    "container that is a zip archive too": (
        lambda: zip_polyglot(zip_archive({"data.pkl": b"x"})),
        "ADP-CON-002",
    ),
    "container that is an empty zip archive too": (lambda: zip_polyglot(zip_archive({})), "ADP-CON-002"),
    "zip archive behind a decoy": (
        lambda: zip_polyglot(b"PK\x05\x06 a decoy of an end" + zip_archive({"data.pkl": b"x"})),
        "ADP-CON-002",
    ),
    "64-bit zip archive": (
        lambda: zip_polyglot(b"PK\x06\x07" + bytes(16) + b"PK\x05\x06" + bytes(4) + b"\xff" * 12 + bytes(2)),
        "ADP-CON-002",
    ),
    "header of zero bytes": (lambda: raw_container("", b"x" * 64), "ADP-CON-003"),
    "header longer than the file": (lambda: raw_container("{}", b"x" * 64, length=1 << 16), "ADP-CON-003"),
    "header of 2^63 bytes": (lambda: raw_container("{}", b"x" * 64, length=1 << 63), "ADP-CON-003"),
    "header longer than the limit": (
        lambda: raw_container(json.dumps(honest()[0]) + " " * formats.MAX_HEADER_BYTES, honest()[1]),
        "ADP-CON-003",
    ),
    "header that is no JSON": (lambda: raw_container("{nothing}", b"x" * 64), "ADP-CON-004"),
    "header that is a list": (lambda: raw_container("[1, 2, 3]", b"x" * 64), "ADP-CON-004"),
    "header behind a space": (lambda: with_text(lambda text: " " + text), "ADP-CON-004"),
    "header before a line break": (lambda: with_text(lambda text: text + "\n"), "ADP-CON-004"),
    "header with text behind it": (lambda: with_text(lambda text: text + "{}"), "ADP-CON-004"),
    "header nested five thousand levels deep": (lambda: raw_container(deep(), b"x" * 64), "ADP-CON-004"),
    "header nested four levels deep": (
        lambda: raw_container('{"__metadata__": {"a": {"b": [[]]}}}', b"x" * 64),
        "ADP-CON-004",
    ),
    "header with a number of a million digits": (
        lambda: with_text(lambda text: text.replace("[0,", "[" + "0" * 1_000_000 + ",", 1)),
        "ADP-CON-004",
    ),
    "header with a key that is not ASCII": (
        lambda: with_text(lambda text: text.replace("attn.to_q", "attn.to_q\u0430", 1)),
        "ADP-CON-004",
    ),
    "header with offsets in floating point": (
        lambda: with_text(lambda text: text.replace("[0,", "[0.0,", 1)),
        "ADP-CON-004",
    ),
    "header with NaN": (lambda: with_text(lambda text: text.replace("[0,", "[NaN,", 1)), "ADP-CON-004"),
    "tensor named twice": (duplicate_key, "ADP-CON-005"),
    "dtype named twice": (duplicate_inner_key, "ADP-CON-005"),
    "no tensor": (lambda: raw_container("{}        ", b""), "ADP-CON-006"),
    "ten thousand tensors": (
        lambda: with_header(
            lambda entries: entries.update(
                {
                    f"t{index}": {"dtype": "F16", "shape": [1], "data_offsets": [0, 2]}
                    for index in range(10_000)
                }
            )
        ),
        "ADP-CON-006",
    ),
    "name with an escape sequence": (
        lambda: with_header(lambda entries: entries.update({"\x1b[2J": entries.pop(f"{Q}.lora_A.weight")})),
        "ADP-CON-006",
    ),
    "name of a thousand characters": (
        lambda: with_header(lambda entries: entries.update({"x" * 1000: entries.pop(f"{Q}.lora_A.weight")})),
        "ADP-CON-006",
    ),
    "entry with another field": (lambda: with_entry("strides", [1, 1]), "ADP-CON-006"),
    "entry that is a list": (
        lambda: with_header(lambda entries: entries.update({f"{Q}.lora_A.weight": [1]})),
        "ADP-CON-006",
    ),
    "shape with true for one": (lambda: with_entry("shape", [True, 128]), "ADP-CON-006"),
    "shape with a negative size": (lambda: with_entry("shape", [-4, -32]), "ADP-CON-006"),
    "shape with a zero": (lambda: with_entry("shape", [0, 32]), "ADP-CON-006"),
    "shape that overflows 64 bits": (lambda: with_entry("shape", [1 << 40, 1 << 40]), "ADP-CON-006"),
    "shape without sizes": (lambda: with_entry("shape", []), "ADP-CON-006"),
    "three offsets": (lambda: with_entry("data_offsets", [0, 1, 2]), "ADP-CON-006"),
    "float64 numbers": (lambda: container(factors(), "F64"), "ADP-CON-007"),
    "integers": (lambda: with_entry("dtype", "I16"), "ADP-CON-007"),
    "dtype that is a list": (lambda: with_entry("dtype", ["BF16"]), "ADP-CON-007"),
    "shape larger than its bytes": (lambda: with_entry("shape", [RANK, 33]), "ADP-CON-008"),
    "dtype larger than its bytes": (lambda: with_entry("dtype", "F32"), "ADP-CON-008"),
    "offsets in reverse": (lambda: with_entry("data_offsets", [512, 256]), "ADP-CON-008"),
    "offset before the data": (lambda: with_entry("data_offsets", [-256, 0]), "ADP-CON-008"),
    "tensors that overlap": (overlap, "ADP-CON-009"),
    "bytes hidden before the tensors": (gap, "ADP-CON-009"),
    "bytes behind the tensors": (lambda: container(factors()) + b"#!/bin/sh", "ADP-CON-009"),
    "file cut short": (lambda: container(factors())[:-64], "ADP-CON-009"),
    "metadata that is a list": (
        lambda: with_header(lambda entries: entries.update({"__metadata__": ["pt"]})),
        "ADP-CON-010",
    ),
    "metadata with a number": (lambda: metadata({"format": "pt", "base": 1}), "ADP-CON-010"),
    "metadata with a hundred entries": (lambda: metadata({f"t{n}": "" for n in range(100)}), "ADP-CON-010"),
    "metadata of a megabyte": (lambda: metadata({"base": "x" * (1 << 20)}), "ADP-CON-010"),
    "metadata with a terminal escape": (lambda: metadata({"base": "\x1b]0;owned\x07"}), "ADP-CON-010"),
    "metadata with a homoglyph": (lambda: metadata({"base": "\u0430pache"}), "ADP-CON-010"),
    "metadata with a strange label": (lambda: metadata({"__class__": "none"}), "ADP-CON-010"),
    "metadata of another framework": (lambda: metadata({"format": "tf"}), "ADP-CON-010"),
    "adapter metadata that scales": (
        lambda: metadata(
            {"format": "pt", "lora_adapter_metadata": '{"transformer.lora_alpha": 400, "r": 4}'}
        ),
        "ADP-MET-001",
    ),
    "kohya's alpha in the metadata": (lambda: metadata({"ss_network_alpha": "128"}), "ADP-MET-001"),
}


@pytest.mark.parametrize("name", CONTAINER)
def test_hostile_container_is_blocked(name: str) -> None:
    build, rule = CONTAINER[name]
    report = scanned(build())
    assert report.verdict == "block"
    assert rules(report) == {rule}, report.text()


def test_a_file_beyond_the_limit_is_blocked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "MAX_WEIGHTS_BYTES", 10_000)
    assert rules(scanned(container(factors()))) == {"ADP-CON-001"}


# --- structure: what the tensors claim to be --------------------------------------------------------------


def renamed(old: str, new: str) -> Factors:
    return {key.replace(old, new): values for key, values in factors().items()}


def added(key: str, shape: tuple[int, ...] = (1,)) -> Factors:
    return {**factors(), key: np.ones(shape, np.float32)}


def replaced(key: str, values: Any) -> Factors:
    return {**factors(), key: np.asarray(values, np.float32)}


def without(part: str) -> Factors:
    return {key: values for key, values in factors().items() if part not in key}


STRUCTURE: dict[str, tuple[Callable[[], Factors], str]] = {
    "kohya keys": (
        lambda: renamed(f"{Q}.lora_A", "lora_unet_transformer_blocks_0_attn_to_q.lora_down"),
        "ADP-STR-001",
    ),
    "PEFT keys": (lambda: renamed("transformer.", "base_model.model."), "ADP-STR-001"),
    "ComfyUI keys": (lambda: renamed("transformer.", "diffusion_model."), "ADP-STR-001"),
    "a mixture of prefixes": (lambda: renamed(f"{Q}.", "transformer_blocks.0.attn.to_q."), "ADP-STR-001"),
    "LoKr factors": (lambda: added(f"{Q}.lokr_w1", (2, 2)), "ADP-STR-014"),
    "LoHa factors": (lambda: added(f"{Q}.hada_w1_a", (2, 2)), "ADP-STR-014"),
    "a Tucker core": (lambda: added(f"{Q}.lora_mid.weight", (2, 2)), "ADP-STR-014"),
    "a bias beside the factors": (lambda: added(f"{Q}.lora_B.bias", (32,)), "ADP-STR-013"),
    "a whole weight": (lambda: added(f"{Q}.weight", (32, 32)), "ADP-STR-013"),
    "a whole weight in PEFT's wrapping": (lambda: added(f"{Q}.base_layer.weight", (32, 32)), "ADP-STR-013"),
    "a difference of ComfyUI": (lambda: added("diffusion_model.img_in.diff", (32, 32)), "ADP-STR-013"),
    "a key with a trailing space": (
        lambda: renamed(f"{Q}.lora_A.weight", f"{Q}.lora_A.weight "),
        "ADP-STR-001",
    ),
    "text encoder": (lambda: added("text_encoder.layers.0.q_proj.lora_A.weight", (RANK, 32)), "ADP-STR-002"),
    "VAE": (lambda: added("vae.encoder.conv_in.lora_A.weight", (RANK, 32)), "ADP-STR-002"),
    "a block that the base lacks": (
        lambda: renamed("transformer_blocks.1.", "transformer_blocks.7."),
        "ADP-STR-003",
    ),
    "a block written with a zero before it": (
        lambda: renamed("transformer_blocks.1.", "transformer_blocks.01."),
        "ADP-STR-003",
    ),
    "a module that the base lacks": (lambda: renamed("attn.to_q", "attn.to_z"), "ADP-STR-003"),
    "the timestep embedder": (
        lambda: {
            **added("transformer.time_text_embed.linear.lora_A.weight", (RANK, 32)),
            "transformer.time_text_embed.linear.lora_B.weight": np.ones((32, RANK), np.float32),
        },
        "ADP-STR-003",
    ),
    "A without B": (lambda: without(f"{Q}.lora_B"), "ADP-STR-004"),
    "B without A": (lambda: without(f"{Q}.lora_A"), "ADP-STR-004"),
    "A for a narrower base": (lambda: replaced(f"{Q}.lora_A.weight", np.ones((RANK, 16))), "ADP-STR-005"),
    "A and B swapped": (
        lambda: {
            **factors(),
            f"{Q}.lora_A.weight": factors()[f"{Q}.lora_B.weight"],
            f"{Q}.lora_B.weight": factors()[f"{Q}.lora_A.weight"],
        },
        "ADP-STR-005",
    ),
    "B with three axes": (lambda: replaced(f"{Q}.lora_B.weight", np.ones((32, RANK, 1))), "ADP-STR-005"),
    "one module of another rank": (
        lambda: {
            **factors(),
            f"{Q}.lora_A.weight": np.ones((8, 32), np.float32),
            f"{Q}.lora_B.weight": np.ones((32, 8), np.float32),
        },
        "ADP-STR-006",
    ),
    "all modules of another rank": (lambda: factors(rank=2), "ADP-STR-006"),
    "a declared target is missing": (lambda: without("img_mlp.net.2"), "ADP-STR-007"),
    "a target is missing in one block": (
        lambda: without("transformer_blocks.0.img_mlp.net.2"),
        "ADP-STR-008",
    ),
    "one tensor with and without the prefix": (
        lambda: added(f"{Q.removeprefix('transformer.')}.lora_A.weight", (RANK, 32)),
        "ADP-STR-011",
    ),
    "one tensor by its old and its new name": (
        lambda: added(f"{Q}.lora.down.weight", (RANK, 32)),
        "ADP-STR-011",
    ),
    "one tensor with dots and underscores": (
        lambda: added("lora_unet_transformer_blocks_0_attn_to_q.lora_down.weight", (RANK, 32)),
        "ADP-STR-011",
    ),
    "one tensor in two cases": (lambda: added(f"{Q.upper()}.LORA_A.WEIGHT", (RANK, 32)), "ADP-STR-011"),
    "one tensor in two blocks 1": (
        lambda: added(f"{Q.replace('.0.', '.00.')}.lora_A.weight", (RANK, 32)),
        "ADP-STR-011",
    ),
    "a module with a zero for an O": (lambda: renamed("attn.to_out.0", "attn.t0_out.0"), "ADP-STR-012"),
    "a module in upper case": (lambda: renamed("attn.to_q", "attn.to_Q"), "ADP-STR-012"),
    "a block number with an l": (
        lambda: renamed("transformer_blocks.1.", "transformer_blocks.l."),
        "ADP-STR-012",
    ),
    "a module with rn for m": (lambda: renamed("img_mlp.net.2", "irng_mlp.net.2"), "ADP-STR-012"),
    "a module with two dots": (
        lambda: renamed(f"{Q}.lora_A.weight", f"{Q.replace('.attn', '..attn')}.lora_A.weight"),
        "ADP-STR-012",
    ),
    "a rank that the module cannot use": (lambda: factors(rank=64), "ADP-STR-015"),
    "an alpha tensor": (lambda: added(f"{Q}.alpha"), "ADP-MET-002"),
    "a DoRA magnitude of one module": (lambda: added(f"{Q}.lora_magnitude_vector", (32,)), "ADP-STR-017"),
    "a DoRA magnitude of kohya": (lambda: added(f"{Q}.dora_scale", (32,)), "ADP-MET-002"),
    "a DoRA magnitude in PEFT's wrapping": (
        lambda: added(f"{Q}.lora_magnitude_vector.default.weight", (32,)),
        "ADP-MET-002",
    ),
}


@pytest.mark.parametrize("name", STRUCTURE)
def test_hostile_structure_is_found(name: str) -> None:
    build, rule = STRUCTURE[name]
    values = build()
    # Some need a card that declares the rank, so that nothing else is wrong with them.
    rank = 64 if rule == "ADP-STR-015" else RANK
    report = scanned(container(values), card(rank=rank))
    assert rule in rules(report), report.text()
    assert report.verdict == RULES[rule].severity


def test_an_undeclared_target_is_blocked() -> None:
    targets = [kind for kind in card()["lora"]["targets"] if kind != "attn.to_q"]
    report = scanned(container(factors()), changed(card(), "lora.targets", targets))
    assert rules(report) == {"ADP-STR-007"}
    assert "not declared" in report.text()


def test_another_dtype_than_the_card_says_is_blocked() -> None:
    assert rules(scanned(container(factors(), "F16"))) == {"ADP-STR-009"}


@pytest.mark.parametrize(("path", "value"), [("base.id", "someone/else"), ("base.family", "flux")])
def test_an_unknown_base_is_blocked(path: str, value: str) -> None:
    assert rules(scanned(container(factors()), changed(card(), path, value))) == {"ADP-STR-010"}


# --- numerics: what the numbers do ------------------------------------------------------------------------


def scaled(key: str, by: float) -> Factors:
    return replaced(key, factors()[key] * by)


def poked(key: str, value: float) -> Factors:
    values = factors()[key].copy()
    values[1, 2] = value
    return replaced(key, values)


NUMERICS: dict[str, tuple[Callable[[], Factors], str]] = {
    "one NaN": (lambda: poked(f"{Q}.lora_A.weight", np.nan), "ADP-NUM-001"),
    "one infinity": (lambda: poked(f"{Q}.lora_B.weight", -np.inf), "ADP-NUM-001"),
    "a NaN where the update must be zero": (lambda: poked(f"{SILENT}.lora_A.weight", np.nan), "ADP-NUM-001"),
    "infinite in float16": (lambda: poked(f"{Q}.lora_A.weight", 7e4), "ADP-NUM-002"),
    "squares overflow float32": (lambda: poked(f"{Q}.lora_A.weight", 3e38), "ADP-NUM-002"),
    "all B are zero": (
        lambda: {key: values * (0 if "lora_B" in key else 1) for key, values in factors().items()},
        "ADP-NUM-003",
    ),
    "one dead module": (lambda: scaled(f"{Q}.lora_B.weight", 0), "ADP-NUM-004"),
    "an update that training cannot make": (
        lambda: replaced(f"{SILENT}.lora_B.weight", np.full((32, RANK), 1e-3)),
        "ADP-NUM-005",
    ),
    "an update that drowns the base": (lambda: scaled(f"{Q}.lora_B.weight", 3e4), "ADP-NUM-006"),
    "a large update in balanced factors": (
        lambda: {
            **factors(),
            f"{Q}.lora_A.weight": factors()[f"{Q}.lora_A.weight"] * 300,
            f"{Q}.lora_B.weight": factors()[f"{Q}.lora_B.weight"] * 300,
        },
        "ADP-NUM-006",
    ),
    "scale moved from B to A": (
        lambda: {
            **factors(),
            f"{Q}.lora_A.weight": factors()[f"{Q}.lora_A.weight"] * 1e4,
            f"{Q}.lora_B.weight": factors()[f"{Q}.lora_B.weight"] * 1e-4,
        },
        "ADP-NUM-007",
    ),
}


@pytest.mark.parametrize("name", NUMERICS)
def test_hostile_numbers_are_found(name: str) -> None:
    build, rule = NUMERICS[name]
    report = scanned(container(build()))
    assert rules(report) == {rule}, report.text()
    assert report.verdict == RULES[rule].severity


# --- the scanner itself -----------------------------------------------------------------------------------


def test_a_scanner_that_fails_blocks() -> None:
    broken = BaseFacts(
        id=TINY_BASE.id, family=TINY_BASE.family, license="Apache-2.0", revision="1", config={}
    )
    parsed = AdapterCard.parse(json.dumps(card()).encode())
    report = scan(container(factors()), parsed, bases={TINY_BASE.id: broken})
    assert report.verdict == "block"
    assert rules(report) == {"ADP-SCN-001"}


def test_hostile_names_cannot_write_on_the_terminal() -> None:
    weights = container(
        added("transformer.::error::\\u001b"), metadata={"format": "pt", "alpha": "::warning::x"}
    )
    text = scanned(weights).text()
    assert text.isascii()
    assert "::error::" not in text
    assert "::warning::" not in text
    assert all(line.isprintable() for line in text.splitlines())


def test_a_clean_adapter_passes_in_every_dtype() -> None:
    for dtype in ("F16", "BF16", "F32"):
        report = scanned(clean_adapter(dtype=dtype)[WEIGHTS_NAME], card(dtype=dtype))
        assert report.verdict == "pass", report.text()


def test_silent_modules_may_be_left_out() -> None:
    assert scanned(container(without("transformer_blocks.1.txt_mlp."))).verdict == "pass"


def test_every_rule_has_an_attack() -> None:
    """In the lists above, in the corpus, or by its id in another test of this folder.

    Behaviour and provenance are judged from signed statements; their attacks are those of the gates.
    """
    attacked = {rule for cases in (CONTAINER, STRUCTURE, NUMERICS) for _, rule in cases.values()}
    attacked |= {case.rule for case in CASES}
    tests = "".join(path.read_text("utf-8") for path in sorted(Path(__file__).parent.glob("test_*.py")))
    elsewhere = {rule for rule in RULES if RULES[rule].layer in ("behaviour", "provenance")}
    assert {rule for rule in RULES if f'"{rule}"' not in tests} - attacked - elsewhere == set()
    assert attacked <= set(RULES)
