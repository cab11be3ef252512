"""Attacks on evaluations: another adapter's, against another baseline, with forged or ambiguous figures.

A stolen evaluator's key can say anything about an adapter. What it cannot do is said by other keys or by the
policy: which adapter a statement is about, what an alias means now, and which end of a metric is better.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from fakes.registries import NAME, adapter_files, adapter_folder, copy_registry
from fakes.statements import evaluation, row
from fakes.trust import publish
from registry.attestation import DEMANDED
from registry.attesting import sign
from registry.client import Registry
from registry.digest import Digest, digest_bytes
from registry.errors import BadSignature, NotFound, PolicyRefused, RegistryError, Unsigned, UsageError
from registry.manifest import WEIGHTS_NAME, AdapterManifest

OTHER = digest_bytes(b"another adapter")
POLICY = """
[gates.prod.metrics.top1_accuracy]
min = 0.8
max_regression = 0.02
"""
BETTER = row(difference=(0.03, 0.01, 0.05))
WORSE = row(difference=(-0.03, -0.05, -0.01))


@pytest.fixture
def registry(home: Path) -> Registry:
    """``pixelsmile@prod`` means version 1, and must not get worse."""
    copy_registry(home)
    (home / "registry" / "policy.toml").write_text(POLICY)
    return Registry.open(home)


def weights_of(registry: Registry, reference: str) -> Digest:
    return registry.show(reference).manifest.file(WEIGHTS_NAME).sha256


def mine(seed: int) -> Digest:
    return digest_bytes(adapter_files(seed)[WEIGHTS_NAME])


def pushed(registry: Registry, folder: Path, *reports: dict[str, Any], seed: int = 1) -> str:
    """A version with signed evaluations, approved."""
    reference = registry.push(adapter_folder(folder / f"seed-{seed}", seed=seed), NAME).reference
    manifest = registry.show(reference).manifest
    for report in reports:
        # As somebody signs who has the evaluator's key and a program of his own.
        sign(registry, manifest, "evaluation", report, {})
    registry.approve(reference, "a person", "looks right")
    return reference


def outcomes(registry: Registry, reference: str) -> dict[str, str]:
    return {check.name: check.outcome for check in registry.gates(reference, "prod").checks}


REGRESSION = "top1_accuracy, no regression"


def test_an_honest_evaluation_against_what_production_runs_is_promoted(
    registry: Registry, tmp_path: Path
) -> None:
    prod = weights_of(registry, f"{NAME}@prod")
    reference = pushed(registry, tmp_path, evaluation(mine(1), BETTER, against=prod))
    assert registry.promote(reference, "prod").version == 2


# -- which adapter it is about -----------------------------------------------------------------------------


def test_an_evaluation_of_another_adapter_is_not_signed(registry: Registry, tmp_path: Path) -> None:
    report = evaluation(OTHER, BETTER)
    with pytest.raises(UsageError, match="about the weights"):
        registry.attest(f"{NAME}:1", "evaluation", report)
    with pytest.raises(UsageError, match="about the weights"):
        registry.push(adapter_folder(tmp_path / "a", seed=1), NAME, evaluation=report)
    assert [found.reference for found in registry.list()] == [f"{NAME}:1"]
    assert registry.attest(f"{NAME}:1", "evaluation", evaluation(mine(0))).kind == "evaluation"


def test_an_evaluation_of_another_adapter_is_not_believed() -> None:
    """Signed by the evaluator's own key, about this very manifest, and measured on other weights."""
    honest = publish()
    manifest = AdapterManifest.parse(honest.manifest)
    own = manifest.file(WEIGHTS_NAME).sha256
    assert publish(kinds=DEMANDED, predicates={"evaluation": evaluation(own)}).admit()
    with pytest.raises(BadSignature, match="about the weights"):
        publish(kinds=DEMANDED, predicates={"evaluation": evaluation(OTHER)}).admit()


def test_an_evaluation_of_another_adapter_promotes_nothing(registry: Registry, tmp_path: Path) -> None:
    prod = weights_of(registry, f"{NAME}@prod")
    reference = registry.push(adapter_folder(tmp_path / "a", seed=1), NAME).reference
    manifest = registry.show(reference).manifest
    sign(registry, manifest, "evaluation", evaluation(OTHER, BETTER, against=prod), {})
    with pytest.raises(BadSignature, match="about the weights"):
        registry.approve(reference, "a person", "looks right")
    with pytest.raises(BadSignature, match="about the weights"):
        registry.promote(reference, "prod")
    found = outcomes(registry, reference)
    assert (found["evaluation"], found["top1_accuracy"], found[REGRESSION]) == ("fail", "missing", "missing")


def test_leaving_out_what_was_judged_does_not_help(registry: Registry, tmp_path: Path) -> None:
    report = evaluation(OTHER, BETTER, against=weights_of(registry, f"{NAME}@prod"))
    del report["digests"]["adapter"]
    reference = pushed(registry, tmp_path, report)
    assert outcomes(registry, reference)[REGRESSION] == "missing"


# -- what it is compared with ------------------------------------------------------------------------------


@pytest.mark.parametrize("against", [OTHER, None])
def test_a_comparison_with_something_weaker_is_none(
    registry: Registry, tmp_path: Path, against: Digest | None
) -> None:
    """An older version, the base, or nothing: whatever it is better than, it is not what production runs."""
    reference = pushed(registry, tmp_path, evaluation(mine(1), BETTER, against=against))
    with pytest.raises(Unsigned, match="no signed evaluation compares it with pixelsmile:1") as refusal:
        registry.promote(reference, "prod")
    assert f"trainer evaluate ... --against {NAME}@prod" in refusal.value.mend


def test_a_comparison_ends_with_the_next_promotion(registry: Registry, tmp_path: Path) -> None:
    """Two candidates are better than version 1; when one is released, the other is compared with it."""
    first = weights_of(registry, f"{NAME}@prod")
    second = pushed(registry, tmp_path, evaluation(mine(1), BETTER, against=first))
    third = pushed(registry, tmp_path, evaluation(mine(2), BETTER, against=first), seed=2)
    registry.promote(second, "prod")
    with pytest.raises(Unsigned, match="compares it with pixelsmile:2"):
        registry.promote(third, "prod")
    registry.attest(third, "evaluation", evaluation(mine(2), BETTER, against=mine(1)))
    assert registry.promote(third, "prod").version == 3


def test_a_comparison_that_was_lost_is_not_outvoted(registry: Registry, tmp_path: Path) -> None:
    """The same comparison measured twice, until it fits."""
    prod = weights_of(registry, f"{NAME}@prod")
    reports = [evaluation(mine(1), found, against=prod) for found in (WORSE, BETTER)]
    reference = pushed(registry, tmp_path, *reports)
    with pytest.raises(PolicyRefused, match=r"at most 0\.02 worse"):
        registry.promote(reference, "prod")


# -- figures -----------------------------------------------------------------------------------------------


FORGED: dict[str, tuple[dict[str, Any], str]] = {
    "a worse metric": (WORSE, "fail"),
    "a difference without the metric": (BETTER | {"value": None}, "missing"),
    "a difference of another metric": (BETTER | {"name": "basic_accuracy"}, "missing"),
    "no difference": (row(), "missing"),
    "a difference without its interval": (row() | {"difference": {"value": 0.1, "n": 96}}, "missing"),
    "an interval that does not hold its value": (row(difference=(0.1, 0.2, 0.3)), "missing"),
    "an interval turned around": (row(difference=(0.0, 0.5, -0.5)), "missing"),
    "words": (row() | {"difference": {"value": "0", "low": "0", "high": "0", "n": 96}}, "missing"),
    "truth": (row() | {"difference": {"value": True, "low": True, "high": True, "n": 96}}, "missing"),
    "one person": (row() | {"difference": BETTER["difference"] | {"n": 1}}, "missing"),
    "people that are none": (row() | {"difference": BETTER["difference"] | {"n": True}}, "missing"),
    "accuracy turned around": (row(difference=(-0.5, -0.6, -0.4), direction="lower"), "fail"),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_figure_that_shows_nothing_promotes_nothing(registry: Registry, tmp_path: Path, name: str) -> None:
    told, outcome = FORGED[name]
    prod = weights_of(registry, f"{NAME}@prod")
    reference = pushed(registry, tmp_path, evaluation(mine(1), told, against=prod))
    assert outcomes(registry, reference)[REGRESSION] == outcome
    with pytest.raises(RegistryError):
        registry.promote(reference, "prod")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_never_signed(registry: Registry, value: float) -> None:
    with pytest.raises(UsageError, match="not JSON"):
        registry.attest(f"{NAME}:1", "evaluation", evaluation(mine(0), row(value=0.9) | {"value": value}))


@pytest.mark.parametrize(
    ("report", "words"),
    [
        (evaluation(mine(0), row(value=0.99), row(value=0.1)), "twice"),
        (evaluation(mine(0), *(row(f"metric-{number}") for number in range(513))), "at most 512"),
        (evaluation(mine(0)) | {"digests": {"adapter": "the best one"}}, "no digest"),
        (evaluation(mine(0)) | {"against": {"weights": "production"}}, "no digest"),
    ],
)
def test_an_evaluation_with_two_readings_is_not_signed(
    registry: Registry, report: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        registry.attest(f"{NAME}:1", "evaluation", report)


def test_an_evaluation_with_two_readings_is_not_believed() -> None:
    """The first row is good, the second is bad; somebody's program has signed it."""
    own = AdapterManifest.parse(publish().manifest).file(WEIGHTS_NAME).sha256
    report = evaluation(own, row(value=0.99), row(value=0.1))
    with pytest.raises(BadSignature, match="twice"):
        publish(predicates={"evaluation": report}).admit()


def test_a_number_beside_the_rows_does_not_stand_for_one(registry: Registry, tmp_path: Path) -> None:
    prod = weights_of(registry, f"{NAME}@prod")
    report = evaluation(mine(1), row(value=0.1, difference=(0, 0, 0)), against=prod) | {"top1_accuracy": 0.99}
    reference = pushed(registry, tmp_path, report)
    assert outcomes(registry, reference)["top1_accuracy"] == "fail"


# -- what an alias means -----------------------------------------------------------------------------------


def test_a_store_that_hides_what_production_runs_promotes_nothing(registry: Registry, tmp_path: Path) -> None:
    prod = registry.show(f"{NAME}@prod").manifest
    reference = pushed(registry, tmp_path, evaluation(mine(1), BETTER, against=OTHER))
    for path in (registry.place.home / "registry" / "objects").rglob(f"*{prod.digest.hex}*"):
        if path.is_file():
            path.unlink()
    assert outcomes(registry, reference)["what the alias means"] == "fail"
    with pytest.raises(NotFound):
        registry.promote(reference, "prod")


def test_words_in_an_evaluation_rewrite_no_terminal(registry: Registry, tmp_path: Path) -> None:
    evil = "x\x1b[2J\n::error::promoted"
    told = row(value=0.1, examples=[{"subject": evil, "asked": {evil: 1.0}}], direction=evil)
    report = evaluation(mine(1), told, against=weights_of(registry, f"{NAME}@prod"))
    reference = pushed(registry, tmp_path, report)
    assert outcomes(registry, reference)[REGRESSION] == "fail"
    for check in registry.gates(reference, "prod").checks:
        assert "\x1b" not in json.dumps(check.detail, ensure_ascii=False)
        assert "\n" not in check.detail
        assert "::error::" not in check.detail
