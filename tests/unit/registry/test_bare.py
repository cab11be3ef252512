"""A LoRA file without a card: its dialect, its base and its strength are found, and honest files pass."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes.adapters import (
    BASES,
    RANK,
    TINY_BASE,
    TRAINED_KINDS,
    card,
    container,
    encode,
    factors,
    modules,
    raw_container,
)
from fakes.dialects import SPELLED, key_of, lora_file, peft_config, rewritten, spelled
from registry.dialects import reading
from registry.dialects.canonical import CanonicalContent
from registry.errors import UsageError
from registry.families import FAMILIES, KNOWN_BASES
from registry.formats import read_header
from registry.manifest import AdapterCard
from registry.scanning import scan
from registry.scanning.bare import scan_bare
from registry.scanning.product import tensor

PORTRAITS = KNOWN_BASES["adapter-foundry/portraits-base"]
TINY = {TINY_BASE.id: TINY_BASE}
CONFIG = peft_config(RANK, 4.0, target_modules=[*TRAINED_KINDS])


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("dialect", sorted(SPELLED))
def test_an_honest_file_of_any_dialect_passes(dialect: str, dtype: str) -> None:
    alpha = 4.0 if dialect in ("kohya", "OneTrainer", "LightX2V") else None
    data = lora_file(spelled(factors(), dialect, dtype=dtype, alpha=alpha), {"format": "pt"})
    report = scan_bare(data, bases=TINY, config=CONFIG if dialect == "PEFT" else None)
    assert report.verdict == "pass", report.text()
    assert report.base == TINY_BASE
    assert report.about["dialect"] == dialect
    assert report.about["base"] == TINY_BASE.id
    assert report.about["dtype"] == dtype
    assert report.facts["rank"] == RANK
    assert report.facts["strength_min"] == report.facts["strength_max"] == 1.0


def test_it_measures_what_the_scan_with_a_card_measures() -> None:
    weights = container(factors())
    with_card = scan(weights, AdapterCard.parse(json.dumps(card()).encode()), bases=BASES)
    for dialect in ("diffusers", "kohya", "ComfyUI"):
        report = scan_bare(lora_file(spelled(factors(), dialect)), bases=TINY)
        assert {name: report.facts[name] for name in with_card.facts if name != "tensors"} == {
            name: value for name, value in with_card.facts.items() if name != "tensors"
        }
        assert report.modules == with_card.modules


def test_modules_of_the_modulation_are_targets_too() -> None:
    kinds = FAMILIES[TINY_BASE.family].kinds
    report = scan_bare(lora_file(spelled(factors(kinds=kinds), "DiffSynth")), bases=TINY)
    assert report.verdict == "pass", report.text()
    assert "txt_mod.1" in report.about["targets"]


# --- the base ---------------------------------------------------------------------------------------------


def test_the_base_is_known_by_its_shapes() -> None:
    report = scan_bare(lora_file(spelled(factors(PORTRAITS), "kohya", alpha=4.0)))
    assert report.verdict == "pass", report.text()
    assert report.about["base"] == PORTRAITS.id
    assert "fits" not in report.about


def test_of_several_bases_the_one_that_the_file_names_is_taken() -> None:
    twin = replace(TINY_BASE, id="tests/twin")
    bases = {TINY_BASE.id: TINY_BASE, twin.id: twin}
    for named, expected in ((None, TINY_BASE.id), (twin.id, twin.id), ("tests/other", TINY_BASE.id)):
        tags = {"base": named} if named else {}
        report = scan_bare(lora_file(spelled(factors(), "diffusers"), tags), bases=bases)
        assert report.about["base"] == expected
        assert report.about["fits"] == f"{TINY_BASE.id}, {twin.id}"
    assert scan_bare(lora_file(spelled(factors(), "diffusers")), bases=bases, base=twin.id).base == twin


def test_a_file_for_another_base_is_blocked() -> None:
    data = lora_file(spelled(factors(PORTRAITS), "kohya", alpha=4.0))
    named = scan_bare(data, bases=BASES, base=TINY_BASE.id)
    assert {found.rule for found in named.findings} == {"ADP-STR-003"}
    assert named.base is None
    unknown = scan_bare(data, bases=TINY | {"tests/twin": replace(TINY_BASE, id="tests/twin")})
    assert {found.rule for found in unknown.findings} == {"ADP-STR-003"}
    assert "it fits no known base; the nearest" in unknown.text()


def test_a_base_that_nobody_knows_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="no/such"):
        scan_bare(container(factors()), base="no/such")


# --- the strength -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dialect", "rank", "alpha"),
    [
        ("kohya", 16, 1.0),
        ("OneTrainer", 16, 1.0),
        ("LightX2V", 16, 2.0),
        ("kohya", 8, 32.0),
        ("kohya", 8, 8.0),
    ],
)
def test_alphas_that_trainers_give_are_no_finding(dialect: str, rank: int, alpha: float) -> None:
    """kohya and OneTrainer leave alpha at 1, LightX2V takes 8 at rank 64."""
    report = scan_bare(lora_file(spelled(factors(rank=rank), dialect, alpha=alpha)), bases=TINY)
    assert report.verdict == "pass", report.text()
    assert report.facts["strength_min"] == report.facts["strength_max"] == pytest.approx(alpha / rank)


def test_rank_stabilisation_explains_a_high_strength() -> None:
    values = {"transformer.r": 16, "transformer.lora_alpha": 32, "transformer.use_rslora": True}
    data = lora_file(
        spelled(factors(rank=16), "diffusers"),
        {"lora_adapter_metadata": json.dumps(values | {"transformer.target_modules": modules()})},
    )
    report = scan_bare(data, bases=TINY)
    assert report.verdict == "pass", report.text()
    assert report.facts["strength_max"] == 8.0


def test_where_the_strength_stands_is_told() -> None:
    told = {
        scan_bare(data, bases=TINY, config=config).about["strength"]
        for data, config in (
            (lora_file(spelled(factors(), "kohya", alpha=4.0)), None),
            (lora_file(spelled(factors(), "ComfyUI")), None),
            (lora_file(spelled(factors(), "PEFT")), CONFIG),
        )
    }
    assert told == {
        "the file's alpha tensors",
        "nobody: loaders take the rank for alpha",
        "adapter_config.json",
    }


# --- the canonical form, made while it is read ------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(modules()), st.tuples(st.integers(1, 5), st.sampled_from([1.0, 2.5, 8.0]))
    ),
    st.sampled_from(["F16", "BF16", "F32"]),
    st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 1 << 16)), max_size=4),
)
def test_it_is_what_an_import_writes(
    wanted: dict[str, tuple[int, float]], dtype: str, ranges: list[tuple[int, int]]
) -> None:
    wanted = wanted or {modules()[0]: (RANK, 2.0)}
    values = {}
    for module, (rank, _) in wanted.items():
        made = factors(rank=rank)
        values |= {key: value for key, value in made.items() if f".{module}." in f".{key}"}
    data = lora_file(spelled(values, "kohya", dtype=dtype, alpha=lambda module: wanted[module][1]))
    written, lora, _ = rewritten(data)
    made_up = CanonicalContent(lora, data)
    header = read_header(written)
    assert made_up.header.tensors.keys() == header.tensors.keys()
    for key, info in made_up.header.tensors.items():
        other = header.tensors[key]
        assert (info.dtype, info.shape) == (other.dtype, other.shape)
        assert made_up[info.start : info.end] == written[other.start : other.end], key
    whole = made_up[0 : len(made_up)]
    assert len(whole) == len(made_up)
    for start, stop in ranges:
        assert made_up[start:stop] == whole[start:stop]


def test_numbers_that_are_not_finite_stay_so() -> None:
    values = factors()
    key = f"transformer.{modules()[0]}.lora_B.weight"
    values[key][0, :3] = [np.nan, np.inf, -np.inf]
    for dtype in ("F16", "BF16", "F32"):
        data = lora_file(spelled(values, "kohya", dtype=dtype, alpha=3.0))
        content = CanonicalContent(reading.read(data, TINY_BASE), data)
        read = tensor(content, content.header.tensors[key])[0, :3]
        assert np.isnan(read[0])
        assert list(read[1:]) == [np.inf, -np.inf]


def test_a_large_file_is_never_whole_in_memory(tmp_path: Path) -> None:
    """170 MB at the shapes of the real base, at a strength that scales every number."""
    base = KNOWN_BASES["Qwen/Qwen-Image-Edit-2511"]
    source, rank = tmp_path / "lora.safetensors", 64
    names = [name for name in modules(base, ["attn.to_q", "img_mlp.net.2"]) if name.split(".")[1] < "4"]
    entries, at = {}, 0
    pieces = []
    for module in names:
        out, into = base.spec[module]
        for role, shape in (("A", [rank, into]), ("B", [out, rank]), ("alpha", [])):
            size = 4 if role == "alpha" else shape[0] * shape[1] * 2
            kind = "F32" if role == "alpha" else "BF16"
            entries[key_of("kohya", module, role)] = {
                "dtype": kind,
                "shape": shape,
                "data_offsets": [at, at + size],
            }
            at += size
            pieces.append((role, size))
    noise = encode(np.random.default_rng(0).normal(0, 0.02, 1 << 20).astype(np.float32), "BF16")
    with source.open("wb") as sink:
        sink.write(raw_container(json.dumps(entries), b""))
        for role, size in pieces:
            sink.write(np.float32(48.0).tobytes() if role == "alpha" else noise[:size])
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from registry.content import FileContent\n"
        "from registry.scanning.bare import scan_bare\n"
        "report = scan_bare(FileContent(Path(sys.argv[1])))\n"
        "peak = Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0]\n"
        "print(report.facts['strength_max'], report.facts['modules'], peak)\n"
    )
    command = [sys.executable, "-c", script, str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    strength, count, peak = map(float, done.stdout.split())
    assert (strength, count) == (0.75, len(names))
    assert at > 60_000_000
    assert peak < 200_000  # KiB; Python and numpy alone are a third of it
