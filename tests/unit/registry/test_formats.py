"""The container's parser against arbitrary bytes, and against the reference reader."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes.adapters import BASES, card, clean_adapter, container, factors, padded, raw_container
from registry.content import FileContent
from registry.formats import (
    FormatError,
    LoraKey,
    foreign_dialect,
    parse_key,
    read_header,
    serialise,
    serialise_to,
)
from registry.manifest import WEIGHTS_NAME, AdapterCard
from registry.scanning import scan
from registry.scanning.container import check as check_container

CLEAN = clean_adapter()[WEIGHTS_NAME]
HEADER_END = 8 + int.from_bytes(CLEAN[:8], "little")
CARD = AdapterCard.parse(json.dumps(card()).encode())

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 1 << 40) | st.sampled_from(["F16", "BF16", "x"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "a"]), inner, max_size=3)
    ),
    max_leaves=8,
)


def reads_as_the_reference_does(data: bytes) -> None:
    """What our parser accepts, the reference reader accepts with the very same tensors."""
    try:
        header = read_header(data)
    except FormatError:
        return
    read = dict(safetensors.deserialize(data))
    assert set(read) == set(header.tensors)
    for key, info in header.tensors.items():
        assert (read[key]["dtype"], tuple(read[key]["shape"])) == (info.dtype, info.shape)
        assert bytes(read[key]["data"]) == data[info.start : info.end]


def test_a_clean_container_is_read_as_the_reference_does() -> None:
    assert len(read_header(CLEAN).tensors) == 48
    reads_as_the_reference_does(CLEAN)


@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    reads_as_the_reference_does(data)


@given(st.dictionaries(st.text(max_size=4), json_values, max_size=3), st.binary(max_size=16))
def test_any_json_header(header: dict[str, object], data: bytes) -> None:
    reads_as_the_reference_does(raw_container(json.dumps(header), data))


@settings(max_examples=300)
@given(st.integers(0, HEADER_END - 1), st.binary(min_size=1, max_size=4))
def test_any_change_of_the_header(at: int, piece: bytes) -> None:
    reads_as_the_reference_does(CLEAN[:at] + piece + CLEAN[at + len(piece) :])


@given(st.integers(0, HEADER_END - 1), st.integers(0, 40))
def test_any_cut_out_of_the_header(at: int, size: int) -> None:
    reads_as_the_reference_does(CLEAN[:at] + CLEAN[at + size :])


@given(
    st.dictionaries(
        st.from_regex(r"[a-z.]{1,12}", fullmatch=True),
        st.lists(st.integers(1, 4), min_size=1, max_size=3),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from(["F16", "BF16", "F32"]),
    st.randoms(use_true_random=False),
)
def test_the_canonical_form_is_one_form(tensors: dict[str, list[int]], dtype: str, random: object) -> None:
    """Any order of the same tensors serialises to the same bytes, which serialise to themselves.

    Of one dtype, as adapters are: with several, sorting by name may put one at an odd address.
    """
    names = sorted(tensors)
    shuffled = sorted(names, key=lambda name: hash((name, str(random))))
    forms = []
    for order in (names, shuffled):
        entries, data = {}, b""
        for name in order:
            shape = tensors[name]
            size = int(np.prod(shape)) * {"F16": 2, "BF16": 2, "F32": 4}[dtype]
            entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + size]}
            data += (name.encode() * size)[:size]
        weights = raw_container(padded(json.dumps(entries)), data)
        forms.append(serialise(read_header(weights), weights))
    assert forms[0] == forms[1]
    assert serialise(read_header(forms[0]), forms[0]) == forms[0]
    reads_as_the_reference_does(forms[0])


def test_a_container_on_disk_is_never_whole_in_memory(tmp_path: Path) -> None:
    """The file and its canonical form are read and written piece by piece."""
    path = tmp_path / "weights.safetensors"
    path.write_bytes(CLEAN)
    largest = 0

    class Counted(FileContent):
        def __getitem__(self, where: slice, /) -> bytes:
            nonlocal largest
            piece = super().__getitem__(where)
            largest = max(largest, len(piece))
            return piece

    with Counted(path) as content, (tmp_path / "canonical").open("wb") as output:
        header = read_header(content)
        serialise_to(header, content, output.write)
    assert (tmp_path / "canonical").read_bytes() == serialise(read_header(CLEAN), CLEAN)
    assert largest <= max(HEADER_END, *(info.end - info.start for info in header.tensors.values()))


@given(st.binary(max_size=120))
def test_a_scan_never_raises(data: bytes) -> None:
    assert scan(data, CARD, bases=BASES).verdict == "block"


@settings(max_examples=60)
@given(st.integers(0, len(CLEAN) - 1), st.binary(min_size=1, max_size=8))
def test_a_scan_of_a_changed_file_never_raises(at: int, piece: bytes) -> None:
    report = scan(CLEAN[:at] + piece + CLEAN[at + len(piece) :], CARD, bases=BASES)
    assert report.text().isascii()
    assert "ADP-SCN-001" not in {found.rule for found in report.findings}


def test_four_bytes_of_zip_by_chance_are_no_archive() -> None:
    values = factors()
    weights = bytearray(container(values))
    weights[-200:-100] = b"PK\x05\x06" + b"\x11" * 96
    header, findings = check_container(bytes(weights))
    assert header is not None
    assert findings == []


def test_keys() -> None:
    key = "transformer.transformer_blocks.12.attn.to_out.0.lora_B.weight"
    parsed = parse_key(key)
    assert parsed == LoraKey(module="transformer_blocks.12.attn.to_out.0", factor="B")
    assert str(parsed) == key


@pytest.mark.parametrize(
    ("key", "dialect"),
    [
        ("lora_unet_transformer_blocks_0_attn_to_q.lora_down.weight", "kohya"),
        ("base_model.model.transformer_blocks.0.attn.to_q.lora_A.weight", "PEFT"),
        ("diffusion_model.transformer_blocks.0.attn.to_q.lora_A.weight", "ComfyUI"),
        ("transformer_blocks.0.attn.to_q.lora_A.default.weight", "DiffSynth"),
        ("transformer.transformer_blocks.0.attn.to_q.lora.down.weight", "old diffusers"),
        ("transformer_blocks.0.attn.to_q.lora_A.weight", "bare module names"),
        ("nonsense", None),
    ],
)
def test_foreign_dialects_are_named(key: str, dialect: str | None) -> None:
    assert parse_key(key) is None
    assert foreign_dialect(key) == dialect
