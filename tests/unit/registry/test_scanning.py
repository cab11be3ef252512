"""The scanner's arithmetic and its report."""

from __future__ import annotations

import json
import pickle
import pickletools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes.adapters import BASES, TINY_BASE, card, clean_adapter, container, encode, factors, modules
from fakes.dialects import SPELLED, key_of
from registry.errors import UsageError
from registry.families import FAMILIES, KNOWN_BASES, base_spec
from registry.formats import TensorInfo
from registry.manifest import WEIGHTS_NAME, AdapterCard
from registry.scanning import scan
from registry.scanning.names import Imitations, same_tensor, twins
from registry.scanning.polyglots import is_tar, pickle_import, polyglot
from registry.scanning.product import spectral_norm, tensor
from registry.scanning.rules import RULES

CARD = AdapterCard.parse(json.dumps(card()).encode())


@given(st.integers(1, 8), st.integers(1, 20), st.integers(1, 20), st.integers(0, 1000))
def test_the_spectral_norm_is_that_of_the_product(rank: int, out: int, into: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    a, b = generator.normal(size=(rank, into)), generator.normal(size=(out, rank))
    direct = np.linalg.svd(b @ a, compute_uv=False)[0]
    assert spectral_norm(a @ a.T, b.T @ b) == pytest.approx(direct, rel=1e-6)


def test_the_spectral_norm_does_not_see_the_gauge() -> None:
    generator = np.random.default_rng(0)
    a, b, mix = generator.normal(size=(4, 32)), generator.normal(size=(32, 4)), generator.normal(size=(4, 4))
    moved_a, moved_b = mix @ a, b @ np.linalg.inv(mix)
    assert spectral_norm(moved_a @ moved_a.T, moved_b.T @ moved_b) == pytest.approx(
        spectral_norm(a @ a.T, b.T @ b), rel=1e-6
    )


@pytest.mark.parametrize(("dtype", "precision"), [("F32", 0.0), ("F16", 1e-3), ("BF16", 8e-3)])
def test_tensors_are_read_in_every_dtype(dtype: str, precision: float) -> None:
    values = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    data = encode(values, dtype)
    read = tensor(b"head" + data, TensorInfo(dtype=dtype, shape=(3, 5), start=4, end=4 + len(data)))
    assert read.dtype == np.float32
    np.testing.assert_allclose(read, values, rtol=precision, atol=0)


def test_the_report_of_a_clean_adapter() -> None:
    report = scan(clean_adapter()[WEIGHTS_NAME], CARD, bases=BASES)
    assert report.verdict == "pass"
    # No clean adapters of this base ship, and statements are no part of a scan.
    ran = {rule for rule in RULES if rule.split("-")[1] not in ("BEH", "PRV", "WGT")}
    assert report.passed_rules == tuple(sorted(ran))
    assert report.facts["modules"] == 24
    assert json.loads(json.dumps(report.to_json()))["findings"] == []
    assert scan(clean_adapter()[WEIGHTS_NAME], CARD, bases=BASES) == report


def test_a_report_stays_readable_when_every_tensor_is_wrong() -> None:
    values = {key.replace("transformer.", "model."): value for key, value in factors().items()}
    report = scan(container(values), CARD, bases=BASES)
    assert len([found for found in report.findings if found.rule == "ADP-STR-001"]) == 20
    assert report.omitted == 28
    assert "28 more" in report.text()
    assert report.passed_rules == ()


def test_a_blocking_finding_comes_before_a_review() -> None:
    values = factors()
    values["transformer.transformer_blocks.0.attn.to_q.lora_B.weight"] *= 0
    values["transformer.transformer_blocks.0.attn.to_k.lora_B.weight"] *= 1e5
    report = scan(container(values), CARD, bases=BASES)
    assert [found.severity for found in report.findings] == ["block", "review"]
    assert report.verdict == "block"


def test_every_rule_explains_itself() -> None:
    for rule in RULES.values():
        assert rule.title
        assert rule.help.endswith(".")


def test_the_shapes_of_the_real_base() -> None:
    spec = KNOWN_BASES["Qwen/Qwen-Image-Edit-2511"].spec
    assert len(spec) == 60 * 14
    assert spec["transformer_blocks.59.attn.to_out.0"] == (3072, 3072)
    assert spec["transformer_blocks.0.img_mlp.net.0.proj"] == (12288, 3072)
    assert spec["transformer_blocks.0.txt_mlp.net.2"] == (3072, 12288)
    assert spec["transformer_blocks.0.txt_mod.1"] == (18432, 3072)
    # r64 in bfloat16 on the twelve kinds of the published PixelSmile adapter, and on all.
    released = [spec[name] for name in modules(KNOWN_BASES["Qwen/Qwen-Image-Edit-2511"])]
    assert sum(64 * (out + into) for out, into in released) == 424_673_280
    assert sum(64 * (out + into) for out, into in spec.values()) == 589_824_000


def test_the_table_of_the_portraits_base_is_its_config(repository: object) -> None:
    from pathlib import Path

    config = (
        Path(str(repository)) / "trainer" / "portraits" / "weights" / "base" / "transformer" / "config.json"
    )
    facts = KNOWN_BASES["adapter-foundry/portraits-base"]
    if not config.exists():
        pytest.skip("the portraits base is not built in this checkout")
    values = json.loads(config.read_text())
    assert {key: values[key] for key in facts.config} == facts.config


@pytest.mark.parametrize("value", [0, -1, "6", True, None, 1 << 20])
def test_a_config_with_impossible_sizes_is_refused(value: object) -> None:
    with pytest.raises(UsageError, match="num_layers"):
        base_spec("qwen-image-edit", {**TINY_BASE.config, "num_layers": value})


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(UsageError, match="qwen-image-edit"):
        base_spec("flux-9", TINY_BASE.config)


def test_the_spec_is_that_of_the_real_class() -> None:
    """Every linear layer that we name exists in diffusers' transformer, with the shape that we say."""
    diffusers = pytest.importorskip("diffusers")
    import torch

    with torch.device("meta"):
        model = diffusers.QwenImageTransformer2DModel(
            num_layers=2, num_attention_heads=2, attention_head_dim=16, joint_attention_dim=32,
            axes_dims_rope=(4, 6, 6),
        )  # fmt: skip
    modules = dict(model.named_modules())
    assert {name: tuple(modules[name].weight.shape) for name in TINY_BASE.spec} == dict(TINY_BASE.spec)
    assert len(FAMILIES["qwen-image-edit"].kinds) == 14


# --- what else a file is ------------------------------------------------------------------------------------


@given(st.binary(max_size=600))
def test_no_bytes_upset_the_search_for_other_formats(data: bytes) -> None:
    """Random bytes are at most what their first few say; nothing is raised and nothing goes on for ever."""
    found = polyglot(data)
    assert found is None or found.isascii()


harmless = st.recursive(st.integers() | st.text(max_size=4) | st.floats(), st.lists, max_leaves=6)


@given(harmless, st.integers(0, 5))
def test_a_pickle_without_an_import_is_walked_to_its_end(value: object, protocol: int) -> None:
    """What pickletools of the standard library finds no import in, we find none in."""
    data = pickle.dumps(value, protocol)
    names = {step.name for step, _, _ in pickletools.genops(data)}
    assert not names & {"GLOBAL", "STACK_GLOBAL", "INST"}
    found = pickle_import(data, 0)
    assert found is None or (found.startswith("goes on") and len([*pickletools.genops(data)]) >= 200)


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_with_an_import_is_found_in_every_protocol(protocol: int) -> None:
    assert pickle_import(pickle.dumps([1, "two", {"three": json.dumps}], protocol), 0) is not None


def test_the_instructions_of_the_pickle_machine_are_those_of_the_standard_library() -> None:
    """Each walks as far as pickletools says."""
    for code in pickletools.opcodes:
        size = code.arg.n if code.arg is not None else 0
        tail = b"\x01" + bytes(7) + b"a" if size < -1 else b"a\nb\n" if size == -1 else bytes(max(size, 0))
        data = code.code.encode("latin-1") + tail + b"cos\ngetcwd\n"
        if code.name in ("STOP", "GLOBAL", "INST", "STACK_GLOBAL"):
            continue
        if size < -1:
            width = {-2: 1, -3: 4, -4: 4, -5: 8}[size]
            data = code.code.encode("latin-1") + (1).to_bytes(width, "little") + b"a" + b"cos\ngetcwd\n"
        elif size == -1:
            data = code.code.encode("latin-1") + b"a\n" + b"cos\ngetcwd\n"
        assert pickle_import(data, 0) == "imports os.getcwd", code.name


def test_chance_makes_no_archive_of_honest_numbers() -> None:
    numbers = np.random.default_rng(0).normal(0, 0.02, 1 << 20).astype("<f4").tobytes()
    assert not any(is_tar(numbers[at : at + 512]) for at in range(0, 1 << 20, 512))
    assert all(pickle_import(numbers, at) is None for at in range(1 << 16))


# --- names --------------------------------------------------------------------------------------------------


def test_a_tensor_has_one_name_in_every_dialect() -> None:
    for module in TINY_BASE.spec:
        for role in ("A", "B"):
            spellings = {same_tensor(key_of(dialect, module, role)) for dialect in SPELLED}
            assert len(spellings) == 1, module
    names = {same_tensor(f"transformer.{module}.lora_A.weight") for module in TINY_BASE.spec}
    assert len(names) == len(TINY_BASE.spec)


def test_no_module_imitates_another_one_of_its_base() -> None:
    for facts in KNOWN_BASES.values():
        imitations = Imitations(facts.spec)
        assert all(imitations.of(module) == module for module in facts.spec), facts.id


def test_honest_files_have_no_key_twice() -> None:
    for dialect in SPELLED:
        keys = [key_of(dialect, module, role) for module in TINY_BASE.spec for role in ("A", "B", "alpha")]
        assert twins(keys) == []
