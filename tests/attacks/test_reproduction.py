"""Attacks on reproductions: a forged recipe, other weights, other keys, outcomes that their figures deny."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fakes.registries import copy_registry
from fakes.trust import publish, reproduction, signed
from registry import attestation
from registry import reproduction as reading
from registry.attestation import DEMANDED, Kind, statement
from registry.digest import digest_bytes
from registry.errors import BadSignature, InvalidDocument, PolicyRefused, RegistryError, UsageError
from registry.manifest import AdapterManifest
from registry.storage import shelf
from registry.telling import reproduction_lines
from trainer.reproduction import recorded

WANTED: tuple[Kind, ...] = (*DEMANDED, "reproduction")
OTHER = digest_bytes(b"other")


PUBLISHED = publish(kinds=DEMANDED)


def admit(values: dict[str, Any], required: tuple[Kind, ...], signers: list[str] | None = None) -> None:
    """Admit a published adapter with a reproduction statement beside the others."""
    found = AdapterManifest.parse(PUBLISHED.manifest)
    data = signed("reproduction", f"{found.name}:{found.version}", PUBLISHED.expected, values, signers)
    statements = (*PUBLISHED.statements, data)
    replace(PUBLISHED, statements=statements, policy=replace(PUBLISHED.policy, required=required)).admit()


@pytest.fixture(scope="module")
def manifest() -> AdapterManifest:
    """What the attacks are about."""
    return AdapterManifest.parse(PUBLISHED.manifest)


def test_an_honest_reproduction_is_admitted(manifest: AdapterManifest) -> None:
    for outcome in ("identical", "equivalent"):
        admit(reproduction(manifest, outcome), WANTED)


def test_a_different_reproduction_refuses_only_where_a_gate_asks(manifest: AdapterManifest) -> None:
    admit(reproduction(manifest, "different"), DEMANDED)
    with pytest.raises(PolicyRefused, match="reproduction statement"):
        admit(reproduction(manifest, "different"), WANTED)


FAR = {"relative": 0.01, "cosine": 1.0, "tolerance": 0.1}
FIGURE = {"name": "top1_accuracy", "released": 0.9, "rebuilt": 0.9, "low": 0.8, "high": 1.0}


@pytest.mark.parametrize(
    "half", [{"difference": None, "metrics": [FIGURE]}, {"difference": FAR, "metrics": []}]
)
def test_half_a_comparison_is_read_and_passes_no_gate(
    manifest: AdapterManifest, half: dict[str, Any]
) -> None:
    """Statements of older versions call that equivalent: an alias that asks for nothing is not taken down."""
    values = reproduction(manifest, "equivalent") | half
    found = reading.parse(values)
    assert not found.proves
    assert not reading.close(found.difference, found.metrics)
    assert "not both weights and figures were compared" in " ".join(reproduction_lines(values))
    admit(values, DEMANDED)
    with pytest.raises(PolicyRefused, match="reproduction statement"):
        admit(values, WANTED)


def test_all_of_a_comparison_proves(manifest: AdapterManifest) -> None:
    found = reading.parse(reproduction(manifest, "equivalent") | {"difference": FAR, "metrics": [FIGURE]})
    assert found.proves
    assert reading.close(found.difference, found.metrics)
    assert not reading.proves({"outcome": "identical"})


ATTACKS: dict[str, tuple[dict[str, Any], type[RegistryError], str]] = {
    "about other weights": ({"weights": {"sha256": OTHER.hex}, "rebuilt": {"sha256": OTHER.hex}},
                            BadSignature, "about the weights"),
    "about another recipe": ({"recipe": str(OTHER)}, BadSignature, "another recipe"),
    "identical, and is not": ({"rebuilt": {"sha256": OTHER.hex}}, BadSignature, "identical if and only"),
    "called equivalent far off": (
        {"outcome": "equivalent", "rebuilt": {"sha256": OTHER.hex},
         "difference": {"relative": 0.5, "cosine": 0.9, "tolerance": 0.1}}, BadSignature, "outside"),
    "called equivalent without figures": (
        {"outcome": "equivalent", "rebuilt": {"sha256": OTHER.hex}}, BadSignature, "outside"),
    "called equivalent with a worse metric": (
        {"outcome": "equivalent", "rebuilt": {"sha256": OTHER.hex},
         "difference": {"relative": 0.01, "cosine": 1.0, "tolerance": 0.1},
         "metrics": [{"name": "top1_accuracy", "released": 0.9, "rebuilt": 0.2, "low": 0.8, "high": 1.0}]},
        BadSignature, "outside"),
    "with a key of its own": ({"verdict": "pass"}, BadSignature, "Extra inputs"),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_a_statement_that_cannot_be_believed_is_refused(name: str, manifest: AdapterManifest) -> None:
    more, error, words = ATTACKS[name]
    with pytest.raises(error, match=words):
        admit(reproduction(manifest) | more, DEMANDED)


@pytest.mark.parametrize("role", ["publisher", "approver", "stranger"])
def test_nobody_but_the_evaluator_is_believed(role: str, manifest: AdapterManifest) -> None:
    with pytest.raises(BadSignature, match="needs the role evaluator"):
        admit(reproduction(manifest), DEMANDED, [role])


def test_what_contradicts_itself_is_not_signed(manifest: AdapterManifest) -> None:
    wrong = reproduction(manifest) | {"rebuilt": {"sha256": OTHER.hex}}
    with pytest.raises(InvalidDocument):
        reading.parse(wrong)
    with pytest.raises(UsageError):
        statement("reproduction", "pixelsmile:3", manifest.digest, wrong)


def test_a_forged_recipe_is_not_rebuilt(home: Path) -> None:
    """A stranger signed a training statement beside the honest one, about a recipe that he likes better."""
    registry = copy_registry(home)
    manifest = registry.show("pixelsmile:1").manifest
    honest = attestation.training_predicate(manifest, builder="https://example.org")
    forged = signed("training", "pixelsmile:1", manifest.digest, honest, ["stranger"])
    shelf.put_statement(registry.store, manifest.digest, "training", forged)
    with pytest.raises(BadSignature, match="not believed"):
        recorded(registry, "pixelsmile:1")


def test_an_outcome_about_other_weights_is_not_signed(home: Path) -> None:
    registry = copy_registry(home)
    manifest = registry.show("pixelsmile:1").manifest
    other = reproduction(manifest) | {"weights": {"sha256": OTHER.hex}, "rebuilt": {"sha256": OTHER.hex}}
    with pytest.raises(UsageError, match="about the weights"):
        registry.attest("pixelsmile:1", "reproduction", other)
    assert registry.attest("pixelsmile:1", "reproduction", reproduction(manifest)).kind == "reproduction"
