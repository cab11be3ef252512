"""Two versions side by side: the spectral difference against dense linear algebra, and what is signed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes.adapters import Factors, container, factors
from fakes.registries import NAME, PASSING, adapter_files, adapter_folder, copy_registry, one, overwrite
from registry import comparison, spectral
from registry.client import Registry
from registry.errors import DigestMismatch, InvalidDocument
from registry.manifest import CARD_NAME, WEIGHTS_NAME
from registry.reference import Reference

MODULE = "transformer_blocks.0.attn.to_q"


def key(factor: str, module: str = MODULE) -> str:
    return f"transformer.{module}.lora_{factor}.weight"


def weights(values: Factors) -> bytes:
    """A container whose numbers are exactly these."""
    return container(values, "F32")


def one_module(a: Any, b: Any, module: str = MODULE) -> Factors:
    return {key("A", module): a.astype(np.float32), key("B", module): b.astype(np.float32)}


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Factors, Factors]:
    """Two updates of one module, of ranks of their own, some of them nearly the same."""
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))

    def factor(shape: tuple[int, int]) -> Any:
        values = generator.normal(0, 10.0 ** draw(st.integers(-3, 2)), shape)
        return values * generator.integers(0, 2, shape) if draw(st.booleans()) else values

    found = []
    for _ in range(2):
        rank = draw(st.integers(1, 5))
        found.append(one_module(factor((rank, columns)), factor((rows, rank))))
    if draw(st.booleans()):
        noise = 10.0 ** draw(st.integers(-8, -1))
        found[1] = {name: (value * (1 + noise)).astype(np.float32) for name, value in found[0].items()}
    return found[0], found[1]


def dense(values: Factors) -> Any:
    return values[key("B")].astype(np.float64) @ values[key("A")].astype(np.float64)


@settings(max_examples=150, deadline=None)
@given(pairs())
def test_every_figure_is_that_of_dense_matrices(both: tuple[Factors, Factors]) -> None:
    first, second = map(dense, both)
    found = spectral.compare(*map(weights, both))
    (change,) = found.modules
    scale = max(np.linalg.norm(first, 2), np.linalg.norm(second, 2))
    close = {"rtol": 1e-9, "atol": 1e-12 * scale}
    np.testing.assert_allclose(change.norm, np.linalg.norm(first, 2), **close)
    np.testing.assert_allclose(change.other, np.linalg.norm(second, 2), **close)
    np.testing.assert_allclose(change.difference, np.linalg.norm(first - second, 2), **close)
    np.testing.assert_allclose(found.difference, np.linalg.norm(first - second), **close)
    if found.norm > 0 and found.other > 0:
        expected = np.sum(first * second) / (np.linalg.norm(first) * np.linalg.norm(second))
        np.testing.assert_allclose(found.cosine, expected, rtol=1e-9, atol=1e-9)
    else:
        assert found.cosine is None


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_an_adapter_does_not_differ_from_itself(seed: int) -> None:
    data = weights(factors(seed=seed))
    found = spectral.compare(data, data)
    assert found.relative == 0
    assert all(change.difference == 0 and change.norm == change.other for change in found.modules)
    assert found.cosine == pytest.approx(1)
    assert found.most_changed() == ()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), scale=st.floats(-3, 3, width=32), into_a=st.booleans())
def test_a_scaled_copy_differs_by_the_scale(seed: int, scale: float, into_a: bool) -> None:
    """|1 - c|, whichever factor carries c; modules whose update is zero stay zero."""
    plain = factors(seed=seed)
    which = "lora_A" if into_a else "lora_B"
    scaled = {name: value * np.float32(scale) if which in name else value for name, value in plain.items()}
    found = spectral.compare(weights(plain), weights(scaled))
    assert found.relative == pytest.approx(abs(1 - scale), rel=1e-5, abs=2e-7)
    for change in found.modules:
        if change.norm > 0:
            assert change.relative == pytest.approx(abs(1 - scale), rel=1e-5, abs=2e-7)
        else:
            assert change.relative == 0
    if abs(scale) > 1e-3:
        assert found.cosine == pytest.approx(np.sign(scale), abs=1e-6)


def test_scale_that_moves_between_the_factors_changes_nothing() -> None:
    plain = factors(seed=3)
    moved = {name: value * np.float32(8 if "lora_A" in name else 0.125) for name, value in plain.items()}
    found = spectral.compare(weights(plain), weights(moved))
    assert found.relative == pytest.approx(0, abs=1e-14)


def test_a_tiny_change_is_not_lost_in_rounding() -> None:
    """Gram matrices square the rounding error and would find none of this."""
    generator = np.random.default_rng(1)
    a, b = generator.normal(size=(4, 64)), generator.normal(size=(64, 4)).astype(np.float32)
    changed = b.copy()
    changed[0, 0] = np.nextafter(b[0, 0], np.float32(9))
    found = spectral.compare(weights(one_module(a, b)), weights(one_module(a, changed)))
    expected = abs(float(changed[0, 0]) - float(b[0, 0])) * np.linalg.norm(a.astype(np.float32)[0])
    assert found.modules[0].difference == pytest.approx(expected, rel=1e-6)


def test_a_module_of_one_adapter_only_counts_from_zero() -> None:
    left, right = one_module(np.ones((1, 3)), np.ones((2, 1))), factors(seed=1)
    right = {name: right[name] for name in (key("A", "transformer_blocks.1.attn.to_k"),
                                            key("B", "transformer_blocks.1.attn.to_k"))}  # fmt: skip
    found = spectral.compare(weights(left), weights(right))
    gone, new = found.modules
    assert (gone.relative, gone.other) == (1, 0)
    assert (new.relative, new.norm) == (None, 0)
    assert [change.module for change in found.most_changed(1)] == [new.module]
    assert found.cosine == 0


@pytest.mark.parametrize(
    "other",
    [
        one_module(np.ones((1, 4)), np.ones((2, 1))),
        one_module(np.ones((2, 3)), np.ones((2, 1))),
        one_module(np.full((1, 3), np.nan), np.ones((2, 1))),
        {key("A"): np.ones((1, 3), np.float32)},
        {"transformer.proj.weight": np.ones((1, 3), np.float32)},
        {key("A"): np.ones(3, np.float32), key("B"): np.ones((2, 1), np.float32)},
    ],
    ids=["other base", "other ranks", "nan", "half a pair", "no factor", "no matrix"],
)
def test_what_cannot_be_compared_is_said(other: Factors) -> None:
    honest = weights(one_module(np.ones((1, 3)), np.ones((2, 1))))
    with pytest.raises(InvalidDocument):
        spectral.compare(honest, weights(other))


def test_memory_holds_a_module_at_a_time() -> None:
    """Reading goes forwards through the file in slices no larger than a tensor."""
    reads: list[int] = []

    class Watched(bytes):
        def __getitem__(self, where: Any) -> Any:
            piece = super().__getitem__(where)
            reads.append(len(piece))
            return piece

    values = factors(seed=1)
    data = weights(values)
    spectral.compare(Watched(data), weights(factors(seed=2)))
    largest = max(value.nbytes for value in values.values())
    header = int.from_bytes(data[:8], "little")
    assert max(reads) <= max(largest, header)


# -- two versions of a registry --


@pytest.fixture
def registry(home: Path, tmp_path: Path) -> Registry:
    registry = copy_registry(home)
    folder = adapter_folder(tmp_path / "second", seed=1)
    card = json.loads(adapter_files(1)[CARD_NAME])
    card["training"]["steps"] = 250
    card["ingredients"][1]["license"] = "CC-BY-4.0"
    (folder / CARD_NAME).write_text(json.dumps(card))
    registry.push(folder, NAME, evaluation={"verdict": "pass", "metrics": {"top1": 0.95, "loss": 0.5}})
    return registry


def compare(registry: Registry, first: str, second: str) -> comparison.Comparison:
    return comparison.diff(registry, Reference.parse(first), Reference.parse(second))


def test_what_is_signed_is_put_side_by_side(registry: Registry) -> None:
    found = compare(registry, f"{NAME}@prod", f"{NAME}:2")
    facts = {field.name: (field.first, field.second) for field in found.fields if not field.same}
    assert facts["aliases"] == ("prod", None)
    assert facts["training.steps"] == (100, 250)
    assert facts["ingredient tiny portraits"][1].startswith("dataset, CC-BY-4.0")
    assert facts["statement approval"] == ("pass, by a person", None)
    assert "base.id" not in facts
    metrics = {field.name: (field.first, field.second, field.difference) for field in found.metrics}
    assert metrics["top1"] == (0.93, 0.95, pytest.approx(0.02))
    assert metrics["loss"] == (None, 0.5, None)
    assert found.problem is None
    assert found.weights is not None
    assert found.weights.relative == pytest.approx(1.41, abs=0.05), "two random updates are at right angles"


def test_a_version_and_itself_are_the_same(registry: Registry) -> None:
    found = compare(registry, f"{NAME}@prod", f"{NAME}:1")
    assert all(field.same for field in (*found.fields, *found.metrics))
    assert found.weights is not None
    assert (found.weights.relative, found.weights.cosine) == (0, pytest.approx(1))


def test_an_evaluation_that_nobody_believes_gives_no_metrics(registry: Registry, home: Path) -> None:
    digest = registry.show(f"{NAME}:2").manifest.digest
    foreign = one(home, f"statements/{digest.hex}/evaluation.*")
    data = json.loads(foreign.read_bytes())
    data["signatures"][0]["sig"] = "A" * len(data["signatures"][0]["sig"])
    from registry.digest import digest_bytes

    forged = json.dumps(data).encode()
    foreign.unlink()
    overwrite(foreign.with_name(f"evaluation.{digest_bytes(forged).hex}.json"), forged)
    found = compare(registry, f"{NAME}:1", f"{NAME}:2")
    assert {field.name: field.second for field in found.metrics} == {"top1": None}
    (field,) = [field for field in found.fields if field.name == "statement evaluation"]
    assert str(field.second).startswith("NOT BELIEVED")


def test_weights_come_from_the_cache_if_they_are_there(registry: Registry, home: Path) -> None:
    registry.pull(f"{NAME}@prod")
    one(home, f"models/{registry.show(f'{NAME}:1').manifest.file(WEIGHTS_NAME).blake3}/adapter*/*").unlink()
    assert compare(registry, f"{NAME}:1", f"{NAME}:1").weights is not None


@pytest.mark.parametrize("place", ["store", "cache"])
def test_tampered_weights_are_not_compared(registry: Registry, home: Path, place: str) -> None:
    entry = registry.show(f"{NAME}:1").manifest.file(WEIGHTS_NAME)
    path = one(home, f"models/{entry.blake3}/adapter_weights/*")
    if place == "cache":
        path = registry.pull(f"{NAME}:1").path / WEIGHTS_NAME  # type: ignore[operator]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    overwrite(path, bytes(data))
    with pytest.raises(DigestMismatch):
        compare(registry, f"{NAME}:1", f"{NAME}:2")


def test_a_revoked_version_can_still_be_compared(registry: Registry) -> None:
    registry.revoke(f"{NAME}:2", "it leaks")
    fields = {field.name: field.second for field in compare(registry, f"{NAME}:1", f"{NAME}:2").fields}
    assert fields["revoked"] == "it leaks"
    assert PASSING["metrics"]["top1"] == 0.93
