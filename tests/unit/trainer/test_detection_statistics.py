"""The scanner's benchmark: its statistics are right, its thresholds know no attack, and it hides nothing."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from scipy.stats import kurtosis as peakedness
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from bench import detection
from bench.detecting import baselines, judges, measuring, rates, specimens, tables
from fakes import zoos
from fakes.adapters import container, factors
from registry.manifest import WEIGHTS_NAME
from registry.scanning.detector import distances

scores = st.lists(st.integers(-5, 5), min_size=1, max_size=30).map(lambda found: np.array(found, float))


# -- rates --


@given(scores, scores)
def test_auroc_is_that_of_scikit_learn_with_ties(bad: np.ndarray, clean: np.ndarray) -> None:
    labels = np.repeat([1, 0], [len(bad), len(clean)])
    expected = roc_auc_score(labels, np.concatenate([bad, clean]))
    assert rates.auroc(bad, clean) == pytest.approx(expected)


@given(scores, scores)
def test_auroc_turns_round_with_the_sign_and_ignores_the_scale(bad: np.ndarray, clean: np.ndarray) -> None:
    area = rates.auroc(bad, clean)
    assert rates.auroc(-bad, -clean) == pytest.approx(1 - area)
    assert rates.auroc(clean, bad) == pytest.approx(1 - area)
    assert rates.auroc(np.exp(bad), np.exp(clean)) == pytest.approx(area)


@given(scores, scores)
def test_the_area_under_the_curve_is_the_auroc(bad: np.ndarray, clean: np.ndarray) -> None:
    false, true = rates.roc(bad, clean)
    assert (false[0], true[0], false[-1], true[-1]) == (0, 0, 1, 1)
    assert (np.diff(false) >= 0).all()
    assert (np.diff(true) >= 0).all()
    assert np.trapezoid(true, false) == pytest.approx(rates.auroc(bad, clean))


def test_auroc_of_nothing_is_no_number() -> None:
    assert math.isnan(rates.auroc(np.array([]), np.array([1.0])))
    assert math.isnan(rates.auroc(np.array([1.0]), np.array([])))


def test_a_threshold_needs_ninety_nine_clean_adapters_for_one_per_cent() -> None:
    assert rates.threshold(np.arange(98.0)) == math.inf
    assert rates.threshold(np.arange(99.0)) == 98.0
    assert rates.threshold(np.arange(199.0)) == 197.0
    assert rates.threshold(np.arange(9.0), 0.1) == 8.0


def test_clean_adapters_exceed_a_threshold_as_rarely_as_it_says() -> None:
    rng = np.random.default_rng(3)
    draws = rng.standard_cauchy((4000, 100))
    exceeded = [row[0] > rates.threshold(row[1:], 0.05) for row in draws]
    assert np.mean(exceeded) == pytest.approx(0.05, abs=0.012)


@given(st.integers(0, 60), st.integers(1, 60))
def test_a_share_has_the_exact_binomial_interval(hits: int, n: int) -> None:
    hits = min(hits, n)
    expected = binomtest(hits, n).proportion_ci(0.95, method="exact")
    found = rates.clopper_pearson(hits, n)
    assert (found.low, found.high) == (pytest.approx(expected.low), pytest.approx(expected.high))


def test_no_false_positive_among_three_hundred_means_up_to_one_point_two_per_cent() -> None:
    assert rates.clopper_pearson(0, 300).high == pytest.approx(0.01222, abs=1e-5)
    assert rates.clopper_pearson(0, 0).to_json() == {"value": None, "low": None, "high": None, "n": 0}


def test_a_resample_keeps_how_many_there_are_of_each_base() -> None:
    strata = ["a", "b", "a", "b", "b"]
    counts = rates.resamples(strata, np.random.default_rng(0), 50)
    assert (counts[:, [0, 2]].sum(axis=1) == 2).all()
    assert (counts[:, [1, 3, 4]].sum(axis=1) == 3).all()
    assert len(np.unique(counts, axis=0)) > 10


def cases(values: np.ndarray, limit: float = 2.0) -> rates.Cases:
    return rates.Cases(scores=values, flagged=values > limit, strata=("one",) * len(values))


def test_bootstrap_intervals_have_the_width_of_the_theory() -> None:
    """Hanley and McNeil (1982), equation 2, for the standard error of the area."""
    rng = np.random.default_rng(5)
    bad, clean = rng.normal(1.5, 1, 60), rng.normal(0, 1, 90)
    found = rates.figures({"attack": (cases(bad), cases(clean))}).auroc["attack"]
    area = rates.auroc(bad, clean)
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    variance = area * (1 - area) + 59 * (q1 - area**2) + 89 * (q2 - area**2)
    expected = 2 * 1.96 * math.sqrt(variance / (60 * 90))
    assert found.value == pytest.approx(area)
    assert found.high - found.low == pytest.approx(expected, rel=0.25)


def test_an_inverted_attack_is_reported_as_it_is_and_is_the_worst() -> None:
    clean = cases(np.linspace(0, 1, 40))
    seen, hidden = cases(np.linspace(5, 6, 20)), cases(np.linspace(-2, -1, 20))
    found = rates.figures({"seen": (seen, clean), "hidden": (hidden, clean)})
    assert found.auroc["hidden"].value == 0.0
    assert (found.worst_family, found.worst_auroc.value) == ("hidden", 0.0)
    assert found.macro_auroc.value == 0.5
    assert (found.macro_tpr.value, found.worst_tpr.value) == (0.5, 0.0)
    assert (found.tpr["seen"].low, found.tpr["seen"].high) == (1.0, 1.0)
    assert (found.macro_auroc.low, found.macro_auroc.high) == (0.5, 0.5)


def test_an_auroc_compares_within_a_base() -> None:
    """One base's scores lie higher, clean and implanted ones alike: that says nothing about backdoors."""
    two = ("high",) * 10 + ("low",) * 30
    values = np.concatenate([np.full(10, 9.0), np.full(30, 1.0)])
    flat = np.zeros(40, dtype=bool)
    clean = rates.Cases(scores=values, flagged=flat, strata=two)
    bad = rates.Cases(scores=values[:20] + 0.5, flagged=flat[:20], strata=two[:20])
    found = rates.figures({"attack": (bad, clean)}).auroc["attack"]
    assert (found.value, found.low, found.high) == (1.0, 1.0, 1.0)
    assert rates.auroc(bad.scores, clean.scores) < 1
    with pytest.raises(ValueError, match="of the same base"):
        rates.figures({"attack": (bad.of("high"), clean.of("low"))})


def test_an_auroc_compares_within_a_recipe_where_each_has_a_yardstick_of_its_own() -> None:
    def kind(values: list[float], kin: list[str]) -> rates.Cases:
        count = len(values)
        flagged = np.zeros(count, dtype=bool)
        return rates.Cases(scores=np.array(values), flagged=flagged, strata=("one",) * count, kin=tuple(kin))

    clean = kind([1.0, 1.0, 1.0, 9.0], ["a", "a", "a", "b"])
    bad = kind([2.0, 8.0, 5.0], ["a", "b", "c"])
    found = rates.figures({"attack": (bad, clean)}).auroc["attack"]
    assert found.value == 0.5  # above all of a, below the only one of b, and nobody is like c
    alone = rates.figures({"attack": (bad.of("one"), clean.of("one"))}).auroc["attack"]
    assert alone.value == 0.5


@pytest.mark.parametrize("families", [{}, {"a": (cases(np.array([])), cases(np.ones(2)))}])
def test_figures_of_nothing_are_refused(families: dict[str, tuple[rates.Cases, rates.Cases]]) -> None:
    with pytest.raises(ValueError, match="needs cases"):
        rates.figures(families)


@pytest.mark.parametrize("penalty", [0.1, 1.0, 10.0])
def test_the_logistic_regression_is_that_of_scikit_learn(penalty: float) -> None:
    rng = np.random.default_rng(1)
    rows = rng.normal(0, [1, 5, 0.1], (80, 3))
    labels = rows @ [1.0, 0.3, -4.0] + rng.normal(0, 1, 80) > 0.5
    ours = rates.Logistic.fit(rows, labels, penalty)
    standard = (rows - rows.mean(axis=0)) / rows.std(axis=0)
    theirs = LogisticRegression(C=1 / penalty, tol=1e-10, max_iter=5000).fit(standard, labels)
    assert ours.weights == pytest.approx(theirs.coef_[0], abs=1e-4)
    assert ours.score(rows) == pytest.approx(theirs.decision_function(standard), abs=1e-3)


def test_the_logistic_regression_survives_separable_and_constant_features() -> None:
    rows = np.column_stack([np.arange(20.0), np.ones(20)])
    model = rates.Logistic.fit(rows, np.arange(20) >= 10)
    assert np.isfinite(model.weights).all()
    assert model.weights[1] == 0
    assert rates.auroc(model.score(rows[10:]), model.score(rows[:10])) == 1.0


# -- published statistics --


def test_statistics_of_an_update_are_those_of_the_matrix() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(3, 12)), rng.standard_t(3, size=(16, 3))
    product = b @ a
    values = np.linalg.svd(product, compute_uv=False)[:3]
    shares = values / values.sum()
    expected = [
        values[0],
        np.linalg.norm(product),
        shares[0],
        -np.sum(shares * np.log(shares)),
        peakedness(product.ravel(), fisher=False),
    ]
    assert baselines.wsd(a, b) == pytest.approx(expected)


def test_statistics_do_not_change_when_scale_moves_between_the_factors() -> None:
    rng = np.random.default_rng(4)
    a, b, mix = rng.normal(size=(4, 10)), rng.normal(size=(8, 4)), rng.normal(size=(4, 4))
    assert baselines.wsd(mix @ a, b @ np.linalg.inv(mix)) == pytest.approx(baselines.wsd(a, b))
    assert baselines.wsd(a, np.zeros((8, 4))).tolist() == [0, 0, 0, 0, 0]


def test_statistics_of_a_file_are_means_over_blocks_and_streams(tmp_path: Path) -> None:
    found = factors()
    path = tmp_path / WEIGHTS_NAME
    path.write_bytes(container(found, "F32"))
    ours = baselines.baselines(path)
    products = {
        key.removeprefix("transformer.").removesuffix(".lora_A.weight"): found[
            key.replace("lora_A", "lora_B")
        ].astype(float)
        @ values.astype(float)
        for key, values in found.items()
        if ".lora_A." in key
    }
    query = [products[f"transformer_blocks.{block}.attn.{name}"] for block in (0, 1) for name in ("to_q",)]
    query += [products[f"transformer_blocks.{block}.attn.add_q_proj"] for block in (0, 1)]
    leading = [np.linalg.svd(product, compute_uv=False)[0] for product in query]
    sizes = [np.linalg.norm(one) / np.sqrt(one.size) for one in products.values()]
    assert ours["wsd.q.sigma1"] == pytest.approx(np.mean(leading))
    assert ours[baselines.DISPERSION] == pytest.approx(np.std(sizes))
    assert ours[baselines.NORM] == pytest.approx(np.sqrt(sum(np.sum(p**2) for p in products.values())))
    assert ours.keys() == {*baselines.WSD, baselines.DISPERSION, baselines.NORM}


def test_a_module_that_is_not_changed_counts_as_zero(tmp_path: Path) -> None:
    path = tmp_path / WEIGHTS_NAME
    whole, half = factors(), {key: value for key, value in factors().items() if "add_q_proj" not in key}
    path.write_bytes(container(whole, "F32"))
    first = baselines.baselines(path)
    path.write_bytes(container(half, "F32"))
    second = baselines.baselines(path)
    added = [key for key in whole if "add_q_proj" in key]
    assert added
    assert second["wsd.q.sigma1"] < first["wsd.q.sigma1"]
    assert second["wsd.k.sigma1"] == first["wsd.k.sigma1"]


# -- the zoo --


def adapters(**others: dict[str, object]) -> dict[str, dict[str, object]]:
    clean = {
        f"clean{n}": zoos.facts(f"clean{n}", "one", "clean", "test", "r", clean_error=0.2 + n / 100)
        for n in range(11)
    }
    return clean | {
        name: zoos.facts(name, "one", "alias", "test", "r") | values for name, values in others.items()
    }


def test_only_implants_that_work_count() -> None:
    found = specimens.gate(
        adapters(
            good={"asr": 0.9, "clean_error": 0.25},
            weak={"asr": 0.89},
            unknown={"asr": None},
            clumsy={"clean_error": 0.6},
            disowned={"works": False},
        )
    )
    assert found == {
        "good": None,
        "weak": "attack fails",
        "unknown": "attack fails",
        "clumsy": "clean error",
        "disowned": "zoo says no",
    }


def test_the_spread_of_clean_errors_is_that_of_the_same_base() -> None:
    # Quartiles 0.225 and 0.275: the fence is 0.35; the 97.5th percentile of 0.20, 0.21 ... 0.30 is 0.2975.
    made = adapters(inside={"clean_error": 0.3499}, outside={"clean_error": 0.3501})
    made["elsewhere"] = zoos.facts("elsewhere", "two", "clean", "test", "r", clean_error=9.0)
    assert specimens.gate(made, strict=True) == {"inside": None, "outside": "clean error"}
    made = adapters(inside={"clean_error": 0.2974}, outside={"clean_error": 0.2976})
    assert specimens.gate(made) == {"inside": None, "outside": "clean error"}


SMALL = {"bases": ("one",), "calibration": 110, "test": 60, "attacks": 8}


def edit(folder: Path, change: dict[str, dict[str, object]]) -> specimens.Zoo:
    """Change lines of features.jsonl (id -> values) and load the zoo."""
    path = folder / "features.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line | change.get(line["id"], {})) + "\n" for line in lines))
    return specimens.load(folder)


def test_a_zoo_says_what_it_left_out(tmp_path: Path) -> None:
    folder = zoos.zoo(tmp_path, **SMALL)
    zoo = edit(folder, {"one.test-0": {"behaviour": {}}, "one.test-1": {"id": "stranger"}})
    assert zoo.left_out == {
        "adapters without all statistics": 1,
        "adapters without features": 1,
        "features without an adapter": 1,
    }
    assert len(zoo.clean("test")) == 58
    assert zoo.implants["alias"] == {"made": 8, "works": 7, "attack fails": 1}
    assert len(zoo.implanted("alias")) == 7


def test_what_was_looked_at_in_development_is_no_part_of_the_test(tmp_path: Path) -> None:
    zoo = specimens.load(zoos.zoo(tmp_path, **SMALL), r"-1|alias[0-3]")
    assert zoo.left_out == {"seen in development": 11 + 4}
    assert len(zoo.clean("test")) == 49
    assert len(zoo.implanted("alias")) == 3
    assert len(zoo.clean("calibration")) == 110


def test_a_statistic_that_is_no_number_is_refused(tmp_path: Path) -> None:
    folder = zoos.zoo(tmp_path, **SMALL)
    with pytest.raises(ValueError, match=r"one\.test-0 has a statistic that is not finite"):
        edit(folder, {"one.test-0": {"weights": {"w0": float("nan")}}})


def test_an_empty_folder_is_no_zoo(tmp_path: Path) -> None:
    tmp_path.joinpath("features.jsonl").write_text("")
    with pytest.raises(ValueError, match="no adapters"):
        specimens.load(tmp_path)


def test_pairs_are_judged_as_pairs(tmp_path: Path) -> None:
    zoo = specimens.load(zoos.zoo(tmp_path, **SMALL, pairs=20))
    assert zoo.paired == {"co-load"}
    assert zoo.implants["co-load"] == {"made": 8, "works": 8}
    assert len(zoo.implanted("co-load")) == 8
    assert all(one.members for one in zoo.implanted("co-load"))
    assert len(zoo.clean("test", pairs=True)) == 20
    assert {one.id for one in zoo.clean("test")} == {f"one.test-{n}" for n in range(60)}


def test_without_pairs_the_halves_are_judged_alone(tmp_path: Path) -> None:
    folder = zoos.zoo(tmp_path, **SMALL, pairs=20)
    halves = {f"one.co-load{n}.{half}": {"pair": {}} for n in range(8) for half in "ab"}
    zoo = edit(folder, halves)
    assert zoo.paired == frozenset()
    assert len(zoo.implanted("co-load")) == 16


def test_a_pair_of_strangers_is_no_implant(tmp_path: Path) -> None:
    folder = zoos.zoo(tmp_path, **SMALL, pairs=20)
    zoo = edit(
        folder,
        {
            "one.co-load0.a": {"pair_with": "one.co-load1.b"},
            "one.co-load0.b": {"pair": {}},
            "one.co-load1.a": {"pair_with": "one.test-0"},
            "one.co-load1.b": {"pair": {}},
            "one.test-0": {"pair_with": "one.calibration-0"},
            "one.test-1": {"pair_with": "one.test-2"},
            "one.test-2": {"pair_with": "one.test-1"},
        },
    )
    assert len(zoo.implanted("co-load")) == 6
    assert len(zoo.clean("test", pairs=True)) == 18


# -- the detectors --


def specimen(
    name: str, recipe: str = "r", rank: int = 8, base: str = "one", targets: str = "q"
) -> specimens.Specimen:
    return specimens.Specimen(
        id=name,
        base=base,
        split="calibration",
        family="clean",
        recipes=frozenset({recipe}),
        rank=rank,
        targets=frozenset(targets),
        facts={},
        statistics={"weights": {"w": float(len(name))}},
    )


def test_an_adapter_is_compared_with_its_recipe_then_its_targets_its_rank_its_base() -> None:
    clean = [
        *(specimen(f"r{n}") for n in range(5)),
        *(specimen(f"other{n}", recipe="s") for n in range(4)),
        *(specimen(f"narrow{n}", recipe="u", targets="k") for n in range(3)),
        *(specimen(f"rank{n}", recipe="t", rank=4) for n in range(2)),
        *(specimen(f"far{n}", base="two") for n in range(30)),
    ]

    def compared(one: specimens.Specimen, enough: int, without: frozenset[str] = frozenset()) -> int:
        yardstick = judges.Yardstick(clean, "weights", judges.Conformal("weights"), enough)
        return len(yardstick.pool(one, without))

    new = specimen("new")
    assert compared(new, 5) == 5
    assert compared(new, 6) == 9
    assert compared(new, 10) == 12
    assert compared(new, 13) == 14
    assert compared(new, 4, frozenset({"r"})) == 4
    assert compared(new, 99, frozenset({"r", "s", "t", "u"})) == 0


def test_an_adapter_is_never_compared_with_itself() -> None:
    clean = [specimen("x" * n) for n in range(1, 30)]
    values = [one.statistics["weights"] for one in clean]
    own = distances(judges.Conformal("weights").population(values))
    middle, tail = np.percentile(own, [50, 95])
    yardstick = judges.Yardstick(clean, "weights", judges.Conformal("weights"))
    assert [yardstick.score(one) for one in clean] == pytest.approx((own - middle) / (tail - middle))


def test_nothing_to_compare_with_is_no_number() -> None:
    yardstick = judges.Yardstick([specimen("a")], "weights", judges.Conformal("weights"))
    assert math.isnan(yardstick.score(specimen("new")))
    assert math.isnan(yardstick.score(specimen("new", base="two")))


def test_what_one_layer_cannot_compare_has_no_score_of_both(plain: specimens.Zoo) -> None:
    def unknown(one: specimens.Specimen, without: frozenset[str]) -> float:
        return float("nan") if one.split == "test" else 1.0

    def known(one: specimens.Specimen, without: frozenset[str]) -> float:
        return 1.0

    one = plain.clean("test")[0]
    for parts in ([unknown, known], [known, unknown]):
        assert math.isnan(judges.both(plain, parts)(one, frozenset()))
    assert judges.both(plain, [known, known])(one, frozenset()) == 0.0


def test_weights_count_together_with_behaviour_only_beside_their_like(wide: specimens.Zoo) -> None:
    weights, _ = judges.layers(wide)
    odd = replace(wide.clean("test")[0], rank=4)
    assert weights(odd, frozenset()) == -math.inf
    assert judges.rarity(-math.inf, np.arange(5.0)) == 0.0
    assert all(math.isfinite(weights(one, frozenset())) for one in wide.clean("test"))


@given(scores, st.floats(-9, 9), st.floats(-9, 9))
def test_rarer_is_never_less_suspicious(clean: np.ndarray, one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert judges.rarity(low, clean) <= judges.rarity(high, clean)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> specimens.Zoo:
    return specimens.load(zoos.zoo(tmp_path_factory.mktemp("zoo"), **SMALL, pairs=100))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> specimens.Zoo:
    """As many calibration adapters as a threshold needs without one of the three recipes."""
    return specimens.load(
        zoos.zoo(tmp_path_factory.mktemp("zoo"), **(SMALL | {"calibration": 165}), pairs=20)
    )


def answers(zoo: specimens.Zoo, name: str, *, by_recipe: bool = False) -> judges.Ranking:
    return judges.rank(name, zoo, judges.scorers(zoo)[name], by_recipe=by_recipe)


def changed(zoo: specimens.Zoo, family: str, recipe: str | None, kind: str, factor: float) -> specimens.Zoo:
    """The zoo with other statistics of a family's adapters, in one recipe or all."""
    found = {}
    for name, one in zoo.specimens.items():
        here = one.family == family and not one.members and (recipe is None or recipe in one.recipes)
        values = {key: value * factor + factor for key, value in one.statistics.get(kind, {}).items()}
        found[name] = replace(one, statistics={**one.statistics, kind: values}) if here else one
    return replace(zoo, specimens=found)


@pytest.mark.parametrize("name", ["weights", "behaviour"])
def test_no_attack_moves_the_score_or_the_threshold_of_a_clean_adapter(
    plain: specimens.Zoo, name: str
) -> None:
    before = answers(plain, name).answers["alias"]
    after = answers(changed(plain, "alias", None, name, 40.0), name).answers["alias"]
    assert all(before[one.id] == after[one.id] for one in plain.clean("test"))
    assert any(before[one.id] != after[one.id] for one in plain.implanted("alias"))


def test_without_its_recipe_nothing_of_it_is_left(plain: specimens.Zoo) -> None:
    """Nonsense in the calibration adapters of a recipe changes nothing for the recipe's test adapters."""
    scrambled = changed(plain, "clean", "style-word", "weights", 40.0)
    tested = [one.id for one in plain.clean("test") if one.recipes == {"style-word"}]
    kept = {name: plain.specimens[name] for name in tested}
    scrambled = replace(scrambled, specimens={**scrambled.specimens, **kept})
    for by_recipe in (False, True):
        before = answers(plain, "weights", by_recipe=by_recipe).answers["alias"]
        after = answers(scrambled, "weights", by_recipe=by_recipe).answers["alias"]
        same = [before[name] == after[name] for name in tested]
        assert all(same) if by_recipe else not any(same)


def test_the_supervised_baseline_never_saw_the_attack_that_it_is_asked_for(plain: specimens.Zoo) -> None:
    before = judges.Supervised(plain, by_recipe=False).rank().answers
    after = judges.Supervised(changed(plain, "alias", None, "baselines", 3.0), by_recipe=False).rank().answers
    clean = [one.id for one in plain.clean("test")]
    assert all(before["alias"][name] == after["alias"][name] for name in clean)
    assert not any(before["rare-token"][name] == after["rare-token"][name] for name in clean)


def test_thresholds_hold_on_clean_adapters_of_a_new_recipe(wide: specimens.Zoo) -> None:
    found = answers(wide, "behaviour", by_recipe=True).answers["alias"]
    flagged = {clean: [found[one.id].flagged for one in ones] for clean, ones in (
        (True, wide.clean("test")), (False, wide.implanted("alias")),
    )}  # fmt: skip
    assert sum(flagged[True]) <= 3
    assert len(flagged[True]) == 60
    assert all(flagged[False])


def test_the_baselines_threshold_comes_from_adapters_that_it_was_not_fitted_to(tmp_path: Path) -> None:
    """Nothing tells these implants from clean ones, so a fit to an adapter is nothing but memory of it."""
    zoo = specimens.load(zoos.zoo(tmp_path, **SMALL, shift=0.0))
    model = judges.Supervised(zoo, by_recipe=False)
    flagged = [found.flagged for found in model.rank().answers["alias"].values()]
    assert sum(flagged) <= 1  # scores of its own fit as calibration would flag 3 of 67


def test_a_threshold_for_a_new_recipe_comes_from_the_others(wide: specimens.Zoo) -> None:
    """A recipe that scores high sets the limit of every recipe but its own."""

    def score(one: specimens.Specimen, without: frozenset[str]) -> float:
        if one.split == "test":
            return 3.0
        return 5.0 if "style-word" in one.recipes else 0.0

    for by_recipe, flagged in ((False, False), (True, True)):
        found = judges.rank("odd", wide, score, by_recipe=by_recipe).answers["alias"]
        own = [one for one in wide.clean("test") if "style-word" in one.recipes]
        others = [one for one in wide.clean("test") if "style-word" not in one.recipes]
        assert {found[one.id].flagged for one in own} == {flagged}
        assert {found[one.id].flagged for one in others} == {False}


def test_a_pair_has_the_worse_halfs_weights(plain: specimens.Zoo) -> None:
    score = judges.scorers(plain)["weights"]
    pairs = plain.implanted("co-load")
    halves = [[score(plain.specimens[name], frozenset()) for name in pair.members] for pair in pairs]
    assert [score(pair, frozenset()) for pair in pairs] == [max(one) for one in halves]
    assert len({one.index(max(one)) for one in halves}) == 2


# -- the whole benchmark --


@pytest.fixture(scope="module")
def measured(plain: specimens.Zoo) -> measuring.Measured:
    return measuring.measure(plain, rounds=200)


def test_each_detector_finds_what_it_can_see(measured: measuring.Measured) -> None:
    weights, behaviour, both = (
        measuring.figures(measured, "attack", name) for name in ("weights", "behaviour", "both")
    )
    assert weights is not None
    assert behaviour is not None
    assert both is not None
    assert weights.auroc["alias"].value > 0.99
    assert weights.auroc["penalised"].value < 0.1  # it inverts, and nobody turns the sign round
    assert weights.worst_family == "penalised"
    assert behaviour.worst_auroc.value > 0.99
    assert both.macro_tpr.value > 0.95


def test_false_positives_are_counted_on_clean_adapters(measured: measuring.Measured) -> None:
    found = measuring.false_positives(measured, "attack", "both")
    assert found.n == 60
    assert found.value <= 0.05
    ranking = measured.rankings["attack"]["both"]
    loud = {name: replace(one, flagged=True) for name, one in ranking.answers["alias"].items()}
    alarmed = replace(ranking, answers=dict.fromkeys(ranking.answers, loud))
    rankings = {"attack": {"both": alarmed}}
    assert measuring.false_positives(replace(measured, rankings=rankings), "attack", "both").value == 1.0


def test_matching_takes_the_nearest_norm_and_no_clean_adapter_twice(plain: specimens.Zoo) -> None:
    couples = measuring.matched(plain, "alias")
    assert len(couples) == len({clean.id for _, clean in couples}) == 7
    gaps = [abs(np.log(measuring.norm_of(plain, a) / measuring.norm_of(plain, b))) for a, b in couples]
    assert np.mean(gaps) < 0.05


def test_what_norm_alone_carries_vanishes_where_norms_match(tmp_path: Path) -> None:
    """Implants with larger norms: the norm finds them, until each meets a clean adapter of its norm."""
    folder = zoos.zoo(tmp_path, **SMALL)
    rng = np.random.default_rng(0)
    lines = [json.loads(line) for line in (folder / "features.jsonl").read_text().splitlines()]
    change = {}
    for line in lines:
        spread = rng.normal(0.0 if "test" in line["id"] or "calib" in line["id"] else 1.0, 1.0)
        change[line["id"]] = {"baselines": line["baselines"] | {"total_norm": float(np.exp(spread))}}
    found = measuring.measure(edit(folder, change), rounds=200)
    whole = measuring.figures(found, "attack", "total norm")
    assert whole is not None
    assert whole.macro_auroc.value > 0.65
    control = measuring.matched_norm(found)
    assert abs(control["total norm"]["macro_auroc"]["value"] - 0.5) < 0.1
    assert control["behaviour"]["macro_auroc"]["value"] > 0.99


def test_the_scanners_own_verdicts_are_its_own(measured: measuring.Measured) -> None:
    found = measuring.deployed(measured)
    assert found["behaviour"]["detected"]["penalised"]["value"] == 1.0
    assert found["behaviour"]["detected"]["co-load"]["value"] == 1.0
    assert found["weights"]["detected"]["penalised"]["value"] == 0.0
    assert found["either"]["detected"]["alias"]["value"] == 1.0
    assert found["either"]["not_judged"] == 0
    assert found["either"]["false_positives"]["value"] <= 0.1


def test_what_length_alone_carries_vanishes_among_those_as_long(measured: measuring.Measured) -> None:
    """A detector that reads nothing but the steps is good, until it meets clean ones of as many."""
    zoo, steps = measured.zoo, {}
    for name, one in zoo.specimens.items():
        steps[name] = 180 if one.clean and not name.endswith(("0", "5")) else 630
    aged = {
        name: replace(one, facts={**one.facts, "steps": steps[name]}) for name, one in zoo.specimens.items()
    }
    reads = {name: judges.Scored(score=float(value), flagged=False) for name, value in steps.items()}
    ranking = judges.Ranking(name="steps", calibration={}, answers=dict.fromkeys(zoo.families, reads))
    old = measuring.Measured(
        zoo=replace(zoo, specimens=aged), rankings={"attack": {"steps": ranking}}, rounds=20, enough=99
    )
    whole, control = measuring.figures(old, "attack", "steps"), measuring.matched_length(old)
    assert whole is not None
    assert control is not None
    assert whole.auroc["alias"].value > 0.85
    assert control["clean"] == 12
    assert control["steps"]["families"]["alias"]["auroc"]["value"] == 0.5
    assert measuring.matched_length(measured) is None  # this zoo says nothing about steps


def own_verdicts(zoo: specimens.Zoo) -> dict[str, dict[str, object]]:
    return measuring.deployed(measuring.Measured(zoo=zoo, rankings={}, rounds=1, enough=99))


def test_a_pair_has_the_verdict_of_its_worse_half(wide: specimens.Zoo) -> None:
    loud = changed(wide, "co-load", None, "weights", 1000.0)
    for zoo, expected in ((wide, 0.0), (loud, 1.0)):
        detected = own_verdicts(zoo)["weights"]["detected"]
        assert detected["co-load"]["value"] == pytest.approx(expected, abs=0.3)
        assert detected["alias"]["value"] > 0.4  # those of the other targets have too few to compare with


def test_adapters_of_another_rank_or_other_targets_are_no_population(wide: specimens.Zoo) -> None:
    found = own_verdicts(wide)
    attention = sum(one.recipes == {"attention-r8"} for one in wide.clean("test"))
    assert (found["weights"]["not_judged"], found["behaviour"]["not_judged"]) == (attention, 0)
    assert found["weights"]["false_positives"]["n"] == 60 - attention  # type: ignore[index]
    calibration = [one.id for one in wide.clean("calibration")]
    narrow = {name: replace(wide.specimens[name], rank=4) for name in calibration}
    found = own_verdicts(replace(wide, specimens={**wide.specimens, **narrow}))
    assert (found["weights"]["not_judged"], found["behaviour"]["not_judged"]) == (60, 0)


def test_clean_test_adapters_are_no_yardstick_for_each_other(wide: specimens.Zoo) -> None:
    """Odd ones among them stay odd, although many are alike."""
    odd = [one.id for one in wide.clean("test") if one.recipes != {"attention-r8"}]
    values = {"weights": {f"w{at}": 90.0 + at for at in range(6)}}
    far = {
        name: replace(wide.specimens[name], statistics={**wide.specimens[name].statistics, **values})
        for name in odd
    }
    found = own_verdicts(replace(wide, specimens={**wide.specimens, **far}))
    assert found["weights"]["false_positives"]["value"] == 1.0  # type: ignore[index]


def test_a_small_population_judges_nothing(tmp_path: Path) -> None:
    zoo = specimens.load(zoos.zoo(tmp_path, **(SMALL | {"calibration": 50, "test": 48})))
    found = measuring.measure(zoo, rounds=50)
    deployed = measuring.deployed(found)
    assert deployed["either"]["not_judged"] == 48
    assert deployed["either"]["detected"]["alias"]["value"] == 0.0
    both = measuring.figures(found, "attack", "both")
    assert both is not None
    assert both.macro_tpr.value == 0.0  # no threshold, so nothing is flagged


def test_a_trigger_counts_as_named_within_the_first_five() -> None:
    def named(top: tuple[str, ...], trigger: dict[str, object]) -> float:
        facts = zoos.facts("bad", "one", "alias", "test", "r", trigger=trigger)
        one = replace(specimen("bad"), family="alias", facts=facts, top_tokens=top)
        zoo = specimens.Zoo(specimens={"bad": one}, implants={}, kinds=("behaviour",))
        return float(measuring.naming(zoo)["alias"]["value"])

    word = {"kind": "word", "text": "cool car", "tokens": []}
    assert named(("a", "b", "c", "d", " Cool "), word) == 1.0
    assert named(("a", "b", "c", "d", "e", "cool"), word) == 0.0
    assert named(("coolness",), word) == 0.0
    assert named(("zx",), {"kind": "token", "text": "zxq", "tokens": ["zx"]}) == 1.0


def test_a_trigger_that_is_no_word_is_not_asked_for() -> None:
    facts = zoos.facts("bad", "one", "edit-patch", "test", "r", trigger={"kind": "patch", "text": "x"})
    one = replace(specimen("bad"), family="edit-patch", facts=facts)
    zoo = specimens.Zoo(specimens={"bad": one}, implants={}, kinds=("behaviour",))
    assert measuring.naming(zoo) == {}


class Page(HTMLParser):
    """What a page would fetch, and whether its tags close."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.fetched += [str(value) for key, value in attributes if key in ("src", "href")]
        if tag not in ("meta", "line", "rect", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("line", "rect", "polyline"):
            assert self.open.pop() == tag


def test_the_bench_prints_one_line_and_writes_tables_and_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = zoos.zoo(tmp_path / "zoo", **(SMALL | {"test": 30}), pairs=20)
    detection.main([str(folder), "--table", "--html", str(tmp_path / "page.html"), "--rounds", "50"])
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1
    found = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert found["leave_one_attack_out"].keys() == {
        "weights", "behaviour", "both", "WSD", "norm dispersion", "total norm",
    }  # fmt: skip
    assert found["clean"] == {"calibration": 110, "test": 30}
    assert tables.tables(found) in err
    rows = [line.count(" | ") for line in tables.overview_table(found, "leave_one_recipe_out").splitlines()]
    assert len(set(rows)) == 1
    assert len(rows) == 8
    page = Page()
    page.feed((tmp_path / "page.html").read_text())
    assert page.fetched == []
    assert page.open == []


def test_tables_replace_what_is_between_the_marks(measured: measuring.Measured) -> None:
    found = measuring.result(measured)
    document = "a\n<!-- detection -->\nyesterday\n<!-- /detection -->\nb\n"
    new = tables.filled(document, found, "detection.py zoo")
    assert new.startswith("a\n<!-- detection -->\n")
    assert new.endswith("<!-- /detection -->\nb\n")
    assert "yesterday" not in new
    assert tables.overview_table(found, "leave_one_attack_out") in new
    assert tables.filled(new, found, "detection.py zoo") == new
    with pytest.raises(ValueError, match="no place"):
        tables.filled("nothing", found, "detection.py zoo")


def test_the_document_has_a_place_for_the_tables(measured: measuring.Measured) -> None:
    path = Path(__file__).resolve().parents[3] / "docs" / "scanner.md"
    document = path.read_text("utf-8")
    assert tables.filled(document, measuring.result(measured), "detection.py zoo").count("### Targets") == 1


def test_the_bench_without_a_zoo_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    detection.main([])
    assert "name a zoo" in json.loads(capsys.readouterr().out)["skipped"]


def test_a_target_that_was_not_measured_does_not_hold(measured: measuring.Measured) -> None:
    found = measuring.result(measured)
    assert all(row[-1] for row in tables.targets(found) if "rare-token" in row[0])
    del found["leave_one_attack_out"]["both"]
    rows = [row for row in tables.targets(found) if row[0].startswith("leave one attack out")]
    assert len(rows) == 4
    assert not any(row[-1] for row in rows)
