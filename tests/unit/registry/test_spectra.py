"""The statistics of the weight space: against dense linear algebra, in every gauge, and by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes.adapters import TINY_BASE, Factors, clean_adapter, container, factors
from registry.families import FAMILIES
from registry.formats import read_header
from registry.manifest import WEIGHTS_NAME
from registry.scanning import spectra
from registry.scanning.product import Update, measure
from registry.scanning.structure import Pair

FAMILY = FAMILIES[TINY_BASE.family]
F64 = np.ndarray[Any, np.dtype[np.float64]]


def pairs(weights: bytes) -> list[Pair]:
    found: dict[str, dict[str, Any]] = {}
    for key, info in read_header(weights).tensors.items():
        module, _, factor = key.removeprefix("transformer.").partition(".lora_")
        found.setdefault(module, {})[factor[0]] = info
    return [Pair(module=name, a=one["A"], b=one["B"]) for name, one in sorted(found.items())]


def statistics(values: Factors, dtype: str = "F32") -> dict[str, float]:
    weights = container(values, dtype)
    return spectra.statistics(weights, pairs(weights), FAMILY)


def update(a: F64, b: F64, module: str = "transformer_blocks.0.attn.to_q", scale: float = 1.0) -> Update:
    name, kind = FAMILY.block_of(module)
    block = int(name.rpartition(".")[2])
    return measure(
        a.astype(np.float32), b.astype(np.float32), module=module, block=block, kind=kind, scale=scale
    )


@st.composite
def two_factors(draw: st.DrawFn) -> tuple[F64, F64]:
    """Factors of any small shape, with singular values that fall by up to twelve orders of magnitude."""
    rank, out, into = draw(st.integers(1, 8)), draw(st.integers(8, 24)), draw(st.integers(8, 24))
    generator = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    fall = draw(st.sampled_from([0.0, 2.0, 6.0, 12.0]))
    scales = 10 ** (-fall * np.arange(rank) / max(1, rank - 1))
    return generator.normal(size=(rank, into)) * scales[:, None], generator.normal(size=(out, rank))


@given(two_factors())
def test_singular_values_are_those_of_the_product(given_factors: tuple[F64, F64]) -> None:
    a, b = (factor.astype(np.float32).astype(np.float64) for factor in given_factors)
    direct = np.linalg.svd(b @ a, compute_uv=False)[: len(a)]
    measured = update(a, b).values
    assert np.abs(measured - direct).max() <= 1e-6 * direct[0]


@given(two_factors())
def test_shares_and_directions_are_those_of_the_product(given_factors: tuple[F64, F64]) -> None:
    a, b = (factor.astype(np.float32).astype(np.float64) for factor in given_factors)
    whole = b @ a
    measured = update(a, b)
    squares = whole**2
    assert measured.row_share == pytest.approx(squares.sum(1).max() / squares.sum(), rel=1e-4)
    assert measured.column_share == pytest.approx(squares.sum(0).max() / squares.sum(), rel=1e-4)
    left, values, right = np.linalg.svd(whole)
    if len(a) == 1 or values[0] > 1.01 * values[1]:  # otherwise no direction is the leading one
        assert abs(left[:, 0] @ measured.left) == pytest.approx(1, abs=1e-3)
        assert abs(right[0] @ measured.right) == pytest.approx(1, abs=1e-3)


def test_factors_that_cancel_are_measured_by_qr() -> None:
    """Factors 1e8 times their product in size: Gram matrices lose its smaller values, QR does not."""
    generator = np.random.default_rng(0)
    left, right = (np.linalg.qr(generator.normal(size=(4, 4)))[0] for _ in range(2))
    mix = left @ np.diag([1e4, 1.0, 1.0, 1e-4]) @ right
    a = (mix @ generator.normal(size=(4, 64))).astype(np.float32).astype(np.float64)
    b = (generator.normal(size=(64, 4)) @ np.linalg.inv(mix)).astype(np.float32).astype(np.float64)
    direct = np.linalg.svd(b @ a, compute_uv=False)[:4]
    measured = update(a, b).values
    assert np.abs(measured - direct).max() <= 1e-4 * direct[-1]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1 << 30))
def test_no_statistic_sees_the_gauge(seed: int) -> None:
    generator = np.random.default_rng(seed)
    values = factors(rank=4, seed=seed)
    moved = dict(values)
    for key in values:
        if ".lora_A." in key:
            other = key.replace(".lora_A.", ".lora_B.")
            left, right = (np.linalg.qr(generator.normal(size=(4, 4)))[0] for _ in range(2))
            mix = left @ np.diag(generator.uniform(0.2, 5, 4)) @ right
            moved[key] = (mix @ values[key]).astype(np.float32)
            moved[other] = (values[other] @ np.linalg.inv(mix)).astype(np.float32)
    before, after = statistics(values), statistics(moved)
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert after[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name


def test_the_strength_is_in_the_norm_and_nowhere_else() -> None:
    weights = container(factors(), "F32")
    found = pairs(weights)
    plain = spectra.statistics(weights, found, FAMILY)
    doubled = spectra.statistics(weights, found, FAMILY, {pair.module: -2.0 for pair in found})
    assert doubled["norm"] == pytest.approx(plain["norm"] + np.log10(2), rel=1e-5)
    for name in plain.keys() - {"norm"}:
        assert doubled[name] == pytest.approx(plain[name], rel=1e-5), name


def test_every_statistic_of_a_known_update() -> None:
    """Two blocks of to_q whose updates are diagonal: every figure follows from the definition by hand."""
    a = np.eye(4, 32)
    b = np.zeros((32, 4))
    b[np.arange(4), np.arange(4)] = [4.0, 2.0, 1.0, 1.0]
    values = {}
    for block, size in ((0, 1.0), (1, 3.0)):
        key = f"transformer.transformer_blocks.{block}.attn.to_q"
        values[f"{key}.lora_A.weight"] = a.astype(np.float32)
        values[f"{key}.lora_B.weight"] = (size * b).astype(np.float32)
    found = statistics(values)
    shares = np.array([4, 2, 1, 1]) / 8
    entropy = -np.sum(shares * np.log(shares))
    assert found == pytest.approx(
        {
            "norm": np.log10(np.sqrt(22 + 9 * 22)),
            "norm_dispersion": 0.5,
            "norm_dispersion_kinds": 0.5,
            "norm_log_spread": np.log(3) / 2,
            "leading_share": 0.5,
            "leading_share_max": 0.5,
            "entropy": entropy / np.log(4),
            "effective_rank": np.exp(entropy) / 4,
            "stable_rank": 22 / 16,
            "stable_rank_min": 22 / 16,
            "spectral_kurtosis": 4 * (256 + 16 + 1 + 1) / 22**2,
            "rank_padding": 0.0,
            "row_concentration": np.log(32 * 16 / 22),
            "row_concentration_max": np.log(32 * 16 / 22),
            "column_concentration": np.log(32 * 16 / 22),
            "column_concentration_max": np.log(32 * 16 / 22),
            "depth_slope": np.log(9),
        },
        rel=1e-5,
    )


def test_places_and_directions_of_known_updates() -> None:
    """One direction in all queries, keys and values; the text stream has a fifth of the energy."""
    direction, target = np.zeros((1, 32)), np.zeros((32, 1))
    direction[0, 3], target[5, 0] = 1.0, 1.0
    values: Factors = {}
    for block in range(2):
        sizes = {"attn.to_q": 2.0, "attn.to_k": 2.0, "attn.to_v": 2.0, "attn.to_out.0": 2.0,
                 "attn.add_q_proj": 2.0, "attn.add_k_proj": 1e-3}  # fmt: skip
        for kind, size in sizes.items():
            key = f"transformer.transformer_blocks.{block}.{kind}"
            values[f"{key}.lora_A.weight"] = direction.astype(np.float32)
            values[f"{key}.lora_B.weight"] = (size * target).astype(np.float32)
    found = statistics(values)
    assert found["text_share"] == pytest.approx(0.2, rel=1e-4)
    assert found["input_agreement_image"] == found["input_agreement_text"] == pytest.approx(1.0, rel=1e-5)
    assert found["output_agreement"] == pytest.approx(1.0, rel=1e-5)
    assert "feedforward_share" not in found  # it has no such module
    apart = dict(values)
    other = np.zeros((1, 32), np.float32)
    other[0, 4] = 1.0
    for block in range(2):
        apart[f"transformer.transformer_blocks.{block}.attn.to_k.lora_A.weight"] = other
    assert statistics(apart)["input_agreement_image"] == pytest.approx(1 / 3, rel=1e-5)


def test_a_padded_rank_shows() -> None:
    values = factors(rank=8)
    for key in values:
        if ".lora_B." in key:
            values[key][:, 6:] = 0
    assert statistics(values)["rank_padding"] == pytest.approx(0.25)


def test_modules_of_zero_count_for_nothing() -> None:
    values = factors()
    fewer = {key: value for key, value in values.items() if "blocks.1.txt_mlp.net.2" not in key}
    assert statistics(values) == statistics(fewer)  # silent in the last block: its update is zero


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_nothing_is_said_about_no_update(value: float) -> None:
    values = {key: part * np.float32(0) + np.float32(value) for key, part in factors().items()}
    assert statistics(values) == {}


def test_statistics_are_the_same_every_time_and_short() -> None:
    weights = clean_adapter(seed=4)[WEIGHTS_NAME]
    first, second = (spectra.statistics(weights, pairs(weights), FAMILY) for _ in range(2))
    assert first == second
    assert all(value == float(f"{value:.6g}") for value in first.values())


def test_every_statistic_is_in_the_table() -> None:
    table = spectra.__doc__ or ""
    for name in statistics(factors()):
        assert f"\n{name} " in table, name


def test_curves_are_the_mean_fall_of_a_kind() -> None:
    steep = update(np.eye(2, 32), np.eye(32, 2) * [4.0, 1.0])
    flat = update(np.eye(2, 32), np.eye(32, 2), "transformer_blocks.1.attn.to_q")
    assert spectra.curves([steep, flat]) == {"attn.to_q": (1.0, 0.625)}
