"""The detector: valid p-values for honest adapters, small ones for odd ones, silence where it cannot know."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes.adapters import BASES, TINY_BASE, Factors, card, clean_adapter, container, factors
from registry.manifest import WEIGHTS_NAME, AdapterCard
from registry.scanning import ScanReport, detector, population, scan, spectra
from registry.scanning.detector import conformal_p, judge
from registry.scanning.population import Band, Population

COUNT = 120
TARGETS = tuple(card()["lora"]["targets"])
F64 = np.ndarray[Any, np.dtype[np.float64]]


def drawn(rows: F64, kind: str = "weights", **options: Any) -> Population:
    """A population of these rows; statistic number n is called s<n>."""
    named = [{f"s{at}": float(value) for at, value in enumerate(row)} for row in rows]
    return Population.make(
        base="tests/tiny-base", rank=4, recipe="r", kind=kind, rows=named, **options  # type: ignore[arg-type]
    )  # fmt: skip


def row(values: Any) -> dict[str, float]:
    return {f"s{at}": float(value) for at, value in enumerate(values)}


# --- p-values ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["normal", "heavy tails", "lumps", "skewed", "ties"])
def test_honest_adapters_are_rarely_unusual(shape: str) -> None:
    """P(p <= t) <= t for whatever distribution, as long as the adapter is one of it: 400 draws of each."""
    generator = np.random.default_rng(0)
    draw = {
        "normal": lambda count: generator.normal(size=(count, 4)) @ np.triu(np.ones((4, 4))),
        "heavy tails": lambda count: generator.standard_t(1.5, (count, 4)),
        "lumps": lambda count: generator.normal(size=(count, 4)) + 20 * generator.integers(0, 3, (count, 1)),
        "skewed": lambda count: generator.lognormal(0, 2, (count, 4)),
        "ties": lambda count: generator.integers(0, 3, (count, 4)).astype(float),
    }[shape]
    p = []
    for _ in range(400):
        values = draw(100)
        judged = judge(row(values[-1]), drawn(values[:-1]))
        assert judged.combined is not None
        p.append(judged.combined)
    for level in (0.01, 0.05, 0.2):
        assert np.mean(np.array(p) <= level) <= level + 3 * np.sqrt(level * (1 - level) / 400)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40))
def test_a_conformal_p_is_a_rank(scores: list[float]) -> None:
    p = conformal_p(np.array(scores))
    assert p * len(scores) == pytest.approx(sum(score >= scores[-1] for score in scores))
    assert 1 / len(scores) <= p <= 1


@pytest.mark.parametrize("away", [-8.0, 8.0])
def test_weights_are_judged_on_both_sides_behaviour_on_one(away: float) -> None:
    rows = np.random.default_rng(1).normal(size=(COUNT, 3))
    odd = row([0.0, away, 0.0])
    both = judge(odd, drawn(rows))
    assert (both.verdict, both.combined) == ("review", 1 / (COUNT + 1))
    assert both.p["s1"] == 1 / (COUNT + 1)
    upper = judge(odd, drawn(rows, "behaviour"))
    assert upper.verdict == ("review" if away > 0 else "pass")
    assert upper.score == pytest.approx(-np.log10(upper.combined))


def test_a_combination_that_no_clean_adapter_has_is_unusual() -> None:
    """Every figure by itself is in the middle of the clean ones; how they go together is not."""
    generator = np.random.default_rng(2)
    common = generator.normal(size=(COUNT, 1))
    rows = common + 0.05 * generator.normal(size=(COUNT, 4))
    judged = judge(row([1.0, -1.0, 1.0, -1.0]), drawn(rows))
    assert judged.verdict == "review"
    assert min(judged.p.values()) > 0.05


def test_a_few_bad_rows_hide_nobody() -> None:
    """Masking: twenty poisoned adapters in the population stretch no yardstick; only their number counts."""
    generator = np.random.default_rng(3)
    rows = generator.normal(size=(COUNT, 4))
    rows[:20] += [100, -100, 100, -100]
    judged = judge(row([102, -102, 102, -102]), drawn(rows), threshold=0.2)
    assert judged.verdict == "review"
    assert judged.combined is not None
    assert judged.combined <= 21 / (COUNT + 1)


def test_outliers_do_not_blur_how_statistics_go_together() -> None:
    """Four wild adapters in the population, and the combination that no other one has still shows."""
    generator = np.random.default_rng(9)
    common = generator.normal(size=(COUNT, 1))
    rows = common + 0.05 * generator.normal(size=(COUNT, 4))
    rows[:4] = 1000 * generator.normal(size=(4, 4))
    judged = judge(row([1.0, -1.0, 1.0, -1.0]), drawn(rows), threshold=0.05)
    assert judged.verdict == "review"
    assert judged.combined == 5 / (COUNT + 1)


def test_a_wild_value_is_no_yardstick_for_its_statistic() -> None:
    """Three clean adapters are far off in one statistic; another one that is less far off is still odd."""
    rows = np.random.default_rng(10).normal(size=(COUNT, 3))
    rows[:3, 1] = 1e4
    judged = judge(row([0.0, 9.0, 0.0]), drawn(rows), threshold=0.05)
    assert (judged.verdict, judged.combined) == ("review", 4 / (COUNT + 1))


def test_a_statistic_that_is_mostly_zero_hides_no_other() -> None:
    """Where half of the values are equal their median deviation is zero, and no yardstick for the others."""
    generator = np.random.default_rng(8)
    rows = generator.normal(size=(COUNT, 3))
    rows[:, 2] = np.where(generator.random(COUNT) < 0.3, 0.1, 0.0)
    assert judge(row([0.0, 9.0, 0.0]), drawn(rows)).verdict == "review"


def test_a_missing_or_broken_statistic_is_as_unusual_as_can_be() -> None:
    rows = np.random.default_rng(4).normal(size=(COUNT, 2))
    for statistics in ({"s0": 0.0}, {"s0": 0.0, "s1": float("nan")}, {"s0": 0.0, "s1": float("inf")}):
        judged = judge(statistics, drawn(rows))
        assert judged.verdict == "review"
        assert judged.p["s1"] == 1 / (COUNT + 1)
    assert judge({"s0": 0.0, "s1": 0.0, "other": 1e9}, drawn(rows)).verdict == "pass"


def test_a_constant_statistic_is_no_trouble() -> None:
    rows = np.random.default_rng(5).normal(size=(COUNT, 2))
    rows[:, 1] = 0.0
    assert judge(row([0.0, 0.0]), drawn(rows)).verdict == "pass"
    assert judge(row([0.0, 0.5]), drawn(rows)).verdict == "review"


# --- nothing is judged where nothing can be known ---------------------------------------------------------


def test_without_a_large_enough_population_nothing_is_judged() -> None:
    rows = np.random.default_rng(6).normal(size=(99, 2))
    odd = row([50.0, 50.0])
    assert judge(odd, drawn(rows)).verdict == "review"
    small = judge(odd, drawn(rows[:98]))
    assert (small.verdict, small.p, small.combined, small.score) == ("not judged", {}, None, None)
    assert small.why == "the population has 98 adapters; p <= 0.01 needs 99"
    assert judge(odd, drawn(rows[:98]), threshold=0.05).verdict == "review"
    assert judge(odd, None).verdict == "not judged"
    assert judge({}, drawn(rows)).verdict == "not judged"


def test_distances_are_those_of_each_among_the_others() -> None:
    rows = np.random.default_rng(7).normal(size=(COUNT, 3))
    alone = detector.distances(drawn(rows))
    for at in (0, 17, COUNT - 1):
        judged = judge(row(rows[at]), drawn(np.delete(rows, at, axis=0)))
        assert judged.distance == pytest.approx(alone[at])


# --- the layer in a scan ----------------------------------------------------------------------------------


def statistics_of(seed: int) -> dict[str, float]:
    report = scanned(clean_adapter(seed=seed)[WEIGHTS_NAME])
    assert report.space is not None
    return dict(report.space.statistics)


def scanned(weights: bytes, clean: Population | None = None) -> ScanReport:
    parsed = AdapterCard.parse(json.dumps(card()).encode())
    return scan(weights, parsed, bases=BASES, population=clean)


@pytest.fixture(scope="module")
def clean() -> Population:
    """A hundred and twenty clean adapters of the tiny base."""
    return Population.make(
        base=TINY_BASE.id,
        rank=4,
        recipe=population.recipe_key(TARGETS),
        kind="weights",
        rows=[statistics_of(seed) for seed in range(COUNT)],
        spectra={"attn.to_q": Band(low=(1.0, 0.1), middle=(1.0, 0.2), high=(1.0, 0.4))},
    )


def louder(part: str, by: float) -> Factors:
    return {
        key: values * (by if part in key and ".lora_B." in key else 1)
        for key, values in factors(seed=1000).items()
    }


@pytest.mark.parametrize(
    ("part", "by"), [("0.attn.to_q.", 4.0), ("add_", 0.2), ("txt_mlp", 3.0), ("", 0.25), ("blocks.1.", 2.0)]
)
def test_unusual_weights_ask_for_a_review(part: str, by: float, clean: Population) -> None:
    report = scanned(container(louder(part, by)), clean)
    assert {found.rule for found in report.findings} == {"ADP-WGT-001"}
    assert report.verdict == "review"
    assert report.space is not None
    assert report.space.verdict == "review"
    evidence = report.findings[0].evidence
    assert evidence.startswith(f"p {1 / (COUNT + 1):.2g} beside {COUNT} clean adapters: ")
    name = evidence.split(": ")[1].split(" ")[0]
    column = clean.column(name)
    value = f"{report.space.statistics[name]:.4g}"
    assert f"{name} {value} (clean {column[0]:.4g} to {column[-1]:.4g}, p 0.0083)" in evidence


def test_usual_weights_pass_and_the_report_says_beside_whom(clean: Population) -> None:
    report = scanned(clean_adapter(seed=1000)[WEIGHTS_NAME], clean)
    assert (report.verdict, report.findings) == ("pass", ())
    space = report.space
    assert space is not None
    assert space.reference is not None
    assert (space.verdict, space.reference.digest, space.reference.size) == ("pass", clean.digest, COUNT)
    assert space.statistics.keys() == space.p.keys() == set(clean.statistics)
    bands = {spectrum.kind: spectrum.low for spectrum in space.spectra}
    assert bands["attn.to_q"] == (1.0, 0.1)
    assert bands["attn.to_k"] == ()


def test_without_a_population_the_report_says_not_judged() -> None:
    report = scanned(container(louder("", 0.25)))
    assert report.verdict == "pass"  # of the other layers
    assert report.space is not None
    assert report.space.verdict == "not judged"
    assert "no population" in report.space.why


def test_a_population_that_ships_is_found_by_the_card(
    clean: Population, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {(clean.kind, clean.base, clean.rank, clean.recipe): clean}
    monkeypatch.setattr(population, "shipped", lambda: known)
    assert scanned(container(louder("", 0.25))).verdict == "review"


def test_a_finding_that_blocks_leaves_nothing_to_judge(clean: Population) -> None:
    values = factors()
    values["transformer.transformer_blocks.0.attn.to_q.lora_B.weight"][0, 0] = np.nan
    report = scanned(container(values), clean)
    assert {found.rule for found in report.findings} == {"ADP-NUM-001"}
    assert report.space is None


def test_the_modules_of_a_report_are_measured(clean: Population) -> None:
    report = scanned(clean_adapter()[WEIGHTS_NAME], clean)
    one = next(found for found in report.modules if found.module == "transformer_blocks.1.attn.to_k")
    key = f"transformer.{one.module}"
    exact = factors()
    values = np.linalg.svd(exact[f"{key}.lora_B.weight"] @ exact[f"{key}.lora_A.weight"], compute_uv=False)[
        :4
    ]
    assert (one.block, one.kind) == (1, "attn.to_k")
    assert one.singular_values == pytest.approx(values, rel=2e-2)  # bfloat16 in the file
    assert one.stable_rank == pytest.approx(np.sum(values**2) / values[0] ** 2, rel=2e-2)
    assert one.leading_share == pytest.approx(values[0] / values.sum(), rel=2e-2)
    assert spectra.short(one.frobenius_norm) == one.frobenius_norm
