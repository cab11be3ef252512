"""Attacks on the scan of files without a card: each is stopped by the rule that is there for it.

The files are of other programs' dialects, and most of what is wrong with them is what a loader would make of
them. Names of rules beyond those of ``test_scanner.py`` have their attack here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fakes.adapters import BASES, RANK, TINY_BASE, Factors, factors, modules
from fakes.dialects import Tensors, key_of, lora_file, peft_config, spelled
from registry.families import FAMILIES, KNOWN_BASES
from registry.scanning import ScanReport
from registry.scanning.bare import scan_bare
from registry.scanning.rules import RULES

Q = "transformer_blocks.0.attn.to_q"
GATE = "transformer_blocks.1.txt_mod.1"
ALL = FAMILIES[TINY_BASE.family].kinds
PORTRAITS = KNOWN_BASES["adapter-foundry/portraits-base"]
KNOWN = {TINY_BASE.id: TINY_BASE, PORTRAITS.id: PORTRAITS}

Case = tuple[Tensors, dict[str, str], bytes | None]


def scanned(case: Case) -> ScanReport:
    tensors, metadata, config = case
    return scan_bare(lora_file(tensors, metadata), bases=KNOWN, config=config)


def made(
    dialect: str = "kohya",
    values: Factors | None = None,
    *,
    alpha: Any = 4.0,
    dtype: str = "BF16",
    metadata: dict[str, str] | None = None,
    config: bytes | None = None,
    more: Tensors | None = None,
) -> Case:
    """A file of a dialect with one thing changed."""
    tensors = spelled(factors() if values is None else values, dialect, dtype=dtype, alpha=alpha)
    return tensors | (more or {}), metadata or {}, config


def peft(**fields: Any) -> Case:
    fields = {"target_modules": modules()} | fields
    rank, alpha = fields.pop("r", RANK), fields.pop("lora_alpha", 4.0)
    return made("PEFT", alpha=None, config=peft_config(rank, alpha, **fields))


def header(
    dialect: str = "diffusers", *, alpha: Any = None, part: str = "transformer.", **fields: Any
) -> Case:
    """A file with a configuration in its header."""
    values = {"r": RANK, "lora_alpha": 8, "target_modules": modules()} | fields
    text = json.dumps({part + name: value for name, value in values.items()})
    return made(dialect, alpha=alpha, metadata={"lora_adapter_metadata": text})


def with_key(key: str, shape: tuple[int, ...] = (RANK, 32)) -> Case:
    return made(more={key: ("BF16", np.ones(shape, np.float32))})


def without(role: str) -> Case:
    tensors, metadata, config = made()
    del tensors[key_of("kohya", Q, role)]
    return tensors, metadata, config


def moved(dialect: str, *, module: str = Q) -> Case:
    """The keys of one module in the way of another dialect."""
    tensors, metadata, config = made(alpha=None)
    for role in "AB":
        tensors[key_of(dialect, module, role)] = tensors.pop(key_of("kohya", module, role))
    return tensors, metadata, config


def twice(dialect: str) -> Case:
    """Two updates for one module: whichever the loader takes, the other one is what people see."""
    tensors, metadata, config = made(alpha=None)
    for role in "AB":
        tensors[key_of(dialect, Q, role)] = tensors[key_of("kohya", Q, role)]
    return tensors, metadata, config


def poked(value: float, alpha: float, dtype: str = "BF16") -> Case:
    values = factors()
    values[f"transformer.{Q}.lora_B.weight"][1, 2] = value
    return made(values=values, alpha=alpha, dtype=dtype)


def modulated(rows: slice, value: float = 1e-3) -> Case:
    """Updates of the modulation, too; some rows of the last text one are not what training leaves."""
    values = factors(kinds=ALL)
    values[f"transformer.{GATE}.lora_B.weight"][rows] = value
    return made("DiffSynth", values, alpha=None)


FILES: dict[str, tuple[Callable[[], Case], str]] = {
    "an alpha and a header that disagree": (
        lambda: made(metadata={"ss_network_alpha": "8"}),
        "ADP-MET-010",
    ),
    "an alpha of zero": (lambda: made(alpha=0.0), "ADP-MET-010"),
    "an alpha that is no number": (lambda: made(alpha=float("nan")), "ADP-MET-010"),
    "an alpha below zero": (lambda: made(alpha=-4.0), "ADP-MET-010"),
    "an alpha for some modules only": (lambda: without("alpha"), "ADP-MET-010"),
    "an alpha of two numbers": (
        lambda: made(more={key_of("kohya", Q, "alpha"): ("F32", np.ones(2, np.float32))}),
        "ADP-MET-010",
    ),
    "PEFT without its configuration": (lambda: made("PEFT", alpha=None), "ADP-MET-010"),
    "targets that are an expression without end": (
        lambda: header(target_modules="(.*)*(.*)*x"),
        "ADP-MET-010",
    ),
    "targets that are an expression, for PEFT": (lambda: peft(target_modules="(a+)+$"), "ADP-MET-010"),
    "a target that is an expression": (lambda: header(target_modules=["(a+)+$"]), "ADP-MET-010"),
    "targets that leave modules of the file out": (lambda: peft(target_modules=["to_q"]), "ADP-MET-010"),
    "modules that are excluded": (lambda: peft(exclude_modules=["to_q"]), "ADP-MET-010"),
    "layers that are left out": (lambda: peft(layers_to_transform=[0]), "ADP-MET-010"),
    "layers that a pattern picks": (lambda: peft(layers_pattern="transformer_blocks"), "ADP-MET-010"),
    "layers of random updates": (lambda: peft(init_lora_weights=False), "ADP-MET-010"),
    "a library to be imported": (lambda: peft(auto_mapping={"parent_library": "evil"}), "ADP-MET-010"),
    "another library to be imported": (lambda: header(megatron_core="evil.core"), "ADP-MET-010"),
    "a configuration that asks for DoRA": (lambda: header(use_dora=True), "ADP-MET-010"),
    "a yes that is not true": (lambda: header(use_rslora="no"), "ADP-MET-010"),
    "a configuration of the text encoder": (lambda: header(part="text_encoder."), "ADP-MET-010"),
    "a configuration that is no JSON": (
        lambda: made(metadata={"lora_adapter_metadata": "{"}),
        "ADP-MET-010",
    ),
    "ranks that the tensors have not": (lambda: header(r=8), "ADP-MET-010"),
    "two alphas that are multiplied": (
        lambda: header("ComfyUI", alpha=8.0),
        "ADP-MET-011",
    ),
    "an alpha that only the header states": (
        lambda: made(alpha=None, metadata={"ss_network_alpha": "8"}),
        "ADP-MET-011",
    ),
    "a configuration that diffusers does not see": (
        lambda: (
            spelled(factors(rank=8), "diffusers"),
            {"lora_adapter_metadata": json.dumps({"r": 8, "lora_alpha": 16})},
            None,
        ),
        "ADP-MET-011",
    ),
    "alpha 128 at rank 4": (lambda: made(alpha=128.0), "ADP-MET-012"),
    "alpha 400 in the header": (lambda: header(lora_alpha=400), "ADP-MET-012"),
    "alpha 400 beside the file": (lambda: peft(lora_alpha=400), "ADP-MET-012"),
    "one module thirty times as strong": (
        lambda: made(alpha=lambda module: 120.0 if module == Q else 4.0),
        "ADP-MET-012",
    ),
    "rank stabilisation that raises it eight times": (
        lambda: header(use_rslora=True, lora_alpha=32),
        "ADP-MET-012",
    ),
    "alpha of a twentieth": (lambda: made(alpha=0.05), "ADP-MET-013"),
    "one module thirty times as strong as another": (
        lambda: made(values=factors(rank=8), alpha=lambda module: 32.0 if module == Q else 1.0),
        "ADP-MET-013",
    ),
    "kohya and ComfyUI": (lambda: moved("ComfyUI"), "ADP-STR-020"),
    "kohya and diffusers": (lambda: moved("diffusers"), "ADP-STR-020"),
    "a module in two dialects": (lambda: twice("LightX2V"), "ADP-STR-020"),
    "PixelSmile's release": (
        lambda: made("PixelSmile", factors(PORTRAITS, rank=64), alpha=None),
        "ADP-STR-021",
    ),
    "a key that nobody writes": (lambda: with_key("lora_unet_x.weights"), "ADP-STR-001"),
    "the text encoder": (lambda: with_key("lora_te_text_model.lora_down.weight"), "ADP-STR-002"),
    "the VAE": (lambda: with_key("vae.decoder.conv_in.lora_A.weight"), "ADP-STR-002"),
    "DoRA": (lambda: with_key("lora_unet_transformer_blocks_0_attn_to_q.dora_scale"), "ADP-MET-002"),
    "LoKr": (lambda: with_key("lora_unet_transformer_blocks_0_attn_to_q.lokr_w1"), "ADP-STR-014"),
    "a whole bias": (lambda: with_key("diffusion_model.img_in.diff_b"), "ADP-STR-013"),
    "a module that the base lacks": (
        lambda: with_key("lora_unet_transformer_blocks_0_attn_to_z.lora_down.weight"),
        "ADP-STR-003",
    ),
    "a block that the base lacks": (
        lambda: with_key("lora_unet_transformer_blocks_7_attn_to_q.lora_down.weight"),
        "ADP-STR-003",
    ),
    "A without B": (lambda: without("B"), "ADP-STR-004"),
    "an alpha without factors": (
        lambda: made(
            values={key: value for key, value in factors().items() if Q not in key},
            more={key_of("kohya", Q, "alpha"): ("F32", np.array(4.0))},
        ),
        "ADP-STR-004",
    ),
    "A for a narrower base": (
        lambda: with_key("lora_unet_transformer_blocks_0_attn_to_q.lora_down.weight", (RANK, 16)),
        "ADP-STR-005",
    ),
    "NaN in a file that is scaled": (lambda: poked(float("nan"), alpha=3.0), "ADP-NUM-001"),
    "infinity in a file that is scaled": (lambda: poked(float("inf"), alpha=3.0), "ADP-NUM-001"),
    "infinite at its strength": (lambda: poked(60000.0, alpha=12.0, dtype="F16"), "ADP-NUM-001"),
    "a gate of the text that nothing reads": (lambda: modulated(slice(64, 96)), "ADP-NUM-005"),
    "one row of the text's last shift": (lambda: modulated(slice(96, 97)), "ADP-NUM-005"),
    "the last row": (lambda: modulated(slice(191, 192), 1e-30), "ADP-NUM-005"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_file_is_stopped(name: str) -> None:
    build, rule = FILES[name]
    report = scanned(build())
    assert {found.rule for found in report.findings} == {rule}, report.text()
    assert report.verdict == RULES[rule].severity


def test_rows_of_the_modulation_that_are_read_may_change() -> None:
    assert scanned(modulated(slice(0, 64))).verdict == "pass"


def test_metadata_of_strangers_is_no_finding_but_its_container_is() -> None:
    tags = {f"ss_tag_{number}": "\u00fc" * 50 for number in range(200)}
    assert scanned(made(metadata=tags)).verdict == "pass"
    data = lora_file(made()[0])
    assert {found.rule for found in scan_bare(data + b"#!", bases=BASES).findings} == {"ADP-CON-009"}
    assert {found.rule for found in scan_bare(b"\x80\x02}q\0.", bases=BASES).findings} == {"ADP-CON-002"}


def test_the_layers_behind_a_container_that_is_blocked_do_not_run() -> None:
    data = lora_file(made()[0])
    start = 8 + int.from_bytes(data[:8], "little")
    report = scan_bare(data[:start] + b"PK\x03\x04\x14\0" + data[start + 6 :], bases=KNOWN)
    assert {found.rule for found in report.findings} == {"ADP-CON-013"}
    assert "tensors" not in report.facts


def test_a_scanner_that_fails_blocks() -> None:
    from dataclasses import replace

    broken = replace(TINY_BASE, config={})
    report = scan_bare(lora_file(made()[0]), bases={broken.id: broken})
    assert {found.rule for found in report.findings} == {"ADP-SCN-001"}


def test_hostile_names_cannot_write_on_the_terminal() -> None:
    report = scanned(
        made(metadata={"base": "\x1b]0;owned\x07"}, more={"x::error::": ("BF16", np.ones((1, 1)))})
    )
    assert report.verdict == "block"
    assert report.text().isascii()
    assert "::error::" not in report.text()
