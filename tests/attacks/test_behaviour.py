"""Attacks on behaviour statements, and on adapters that are harmless alone and not together.

Every attack begins with an adapter whose behaviour was honestly probed, and changes one thing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fakes.registries import NAME, PASSING, adapter_folder, copy_registry, objects
from fakes.trust import Published, probe, publish, signed, waiver
from registry.attestation import DEMANDED
from registry.attesting import sign
from registry.behaviour import ALONE_RULE, FAILED_RULE, PAIR_RULE
from registry.client import Registry
from registry.digest import Digest, digest_bytes
from registry.errors import (
    BadSignature,
    Conflict,
    NeedsReview,
    PolicyRefused,
    RegistryError,
    Unsigned,
    UsageError,
)
from registry.manifest import WEIGHTS_NAME, AdapterManifest
from registry.promotion import promote
from registry.scanning.rules import RULES

SUBJECT = "pixelsmile:3"


def told(found: Published, *, signers: tuple[str, ...] | None = None, **changes: Any) -> bytes:
    """A behaviour statement about an adapter, honest but for some values."""
    values = {**probe(AdapterManifest.parse(found.manifest)), **changes}
    return signed("behaviour", SUBJECT, found.expected, values, signers)


def beside(*statements: bytes, required: bool = False) -> Published:
    found = publish()
    policy = replace(found.policy, required=(*DEMANDED, "behaviour")) if required else found.policy
    return replace(found, statements=(*found.statements, *statements), policy=policy)


def with_probe(**changes: Any) -> Published:
    return beside(told(publish(), **changes), required=True)


def waiving(rule: str, forged: str | None = None, **more: Any) -> bytes:
    found = publish()
    values = waiver(AdapterManifest.parse(found.manifest), rule, **more)
    values |= {} if forged is None else {"rules": [forged]}
    return signed("waiver", SUBJECT, found.expected, values)


ATTACKS: dict[str, tuple[Callable[[], Published], type[RegistryError], str]] = {
    "none where the gate demands one": (lambda: beside(required=True), Unsigned, "behaviour"),
    "a probe that failed": (lambda: with_probe(verdict="fail"), PolicyRefused, "failed"),
    "a failed probe that no gate demands": (
        lambda: beside(told(publish(), verdict="fail")),
        PolicyRefused,
        "failed",
    ),
    "a failed probe that a passed one outvotes": (
        lambda: beside(told(publish(), verdict="fail"), told(publish()), required=True),
        PolicyRefused,
        "failed",
    ),
    "a failed probe that is waived": (
        lambda: beside(told(publish(), verdict="fail"), waiving(ALONE_RULE, forged=FAILED_RULE)),
        PolicyRefused,
        "failed",
    ),
    "a probe that asks for a review": (lambda: with_probe(verdict="review"), NeedsReview, ALONE_RULE),
    "a review that no gate demands": (
        lambda: beside(told(publish(), verdict="review")),
        NeedsReview,
        ALONE_RULE,
    ),
    "a review with a waiver of the scan": (
        lambda: beside(told(publish(), verdict="review"), waiving("ADP-NUM-004")),
        NeedsReview,
        ALONE_RULE,
    ),
    "a review with a waiver of a pair": (
        lambda: beside(told(publish(), verdict="review"), waiving(PAIR_RULE)),
        NeedsReview,
        ALONE_RULE,
    ),
    "a review with a waiver for another place": (
        lambda: beside(told(publish(), verdict="review"), waiving(ALONE_RULE, where="one word")),
        NeedsReview,
        ALONE_RULE,
    ),
    "a probe of other weights": (
        lambda: with_probe(weights={"sha256": digest_bytes(b"others").hex}),
        BadSignature,
        "about the weights",
    ),
    "a probe on another base": (
        lambda: with_probe(base={"id": "tests/another-base", "revision": "1"}),
        BadSignature,
        "probed on tests/another-base",
    ),
    "a probe on another revision": (
        lambda: with_probe(base={"id": "tests/tiny-base", "revision": "2"}),
        BadSignature,
        "probed on tests/tiny-base at 2",
    ),
    "signed by the publisher": (
        lambda: with_probe(signers=("publisher",)),
        BadSignature,
        "scanner",
    ),
    "signed by the evaluator": (
        lambda: with_probe(signers=("evaluator",)),
        BadSignature,
        "scanner",
    ),
    "another word for yes": (lambda: with_probe(verdict="PASS"), BadSignature, "not valid"),
    "no word": (lambda: with_probe(verdict=None), BadSignature, "not valid"),
    "a number that is none": (lambda: with_probe(statistics={"gap": "1"}), BadSignature, "not valid"),
    "a chance above one": (lambda: with_probe(p_values={"gap": 2.0}), BadSignature, "not valid"),
    "a token that rewrites a terminal": (
        lambda: with_probe(tokens=[{"text": "\x1b[2J", "score": 1.0}]),
        BadSignature,
        "not valid",
    ),
    "a pair of nothing": (
        lambda: with_probe(pairs=[{"with": "all", "verdict": "pass", "score": 0.0}]),
        BadSignature,
        "not valid",
    ),
    "more than it says": (lambda: with_probe(note="trust me"), BadSignature, "not valid"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_behaviour_that_is_not_shown_to_be_clean_is_refused(name: str) -> None:
    build, error, evidence = ATTACKS[name]
    attack = build()
    with pytest.raises(RegistryError) as caught:
        attack.admit()
    assert type(caught.value) is error, caught.value
    assert evidence in str(caught.value)
    assert caught.value.mend


def test_a_clean_behaviour_is_admitted() -> None:
    assert with_probe().admit()
    assert beside(told(publish())).admit(), "also where no gate demands it"
    assert with_probe(statistics={"gap": 1, "diversity": 0.5}).admit(), "an integer is a number"


def test_a_behaviour_review_passes_with_its_waiver() -> None:
    review = told(publish(), verdict="review")
    assert beside(review, waiving(ALONE_RULE), required=True).admit()


def test_weight_space_alone_never_blocks_and_provenance_always_does() -> None:
    """What a layer may say, by the facts: weight statistics invert across recipes, so a person decides."""
    layers: dict[str, set[str]] = {}
    for rule in RULES.values():
        layers.setdefault(rule.layer, set()).add(rule.severity)
    assert layers["weight space"] == {"review"}
    assert layers["provenance"] == layers["container"] == {"block"}
    assert "block" in layers["structure"] & layers["strength"] & layers["numerics"] & layers["behaviour"]


# --- adapters that serving may load together --------------------------------------------------------------

PROD, OTHER = f"{NAME}@prod", "watercolour@prod"
POLICY = f'[[scan.pairs]]\ntogether = ["{PROD}", "{OTHER}"]\n'


@pytest.fixture
def registry(home: Path) -> Registry:
    """``pixelsmile@prod`` is released, and may be loaded together with ``watercolour@prod``, which is not."""
    copy_registry(home)
    (home / "registry" / "policy.toml").write_text(POLICY)
    return Registry.open(home)


def weights_of(registry: Registry, reference: str) -> Digest:
    return registry.show(reference).manifest.file(WEIGHTS_NAME).sha256


def pushed(registry: Registry, tmp_path: Path, name: str = "watercolour", seed: int = 1) -> str:
    folder = adapter_folder(tmp_path / f"{name}-{seed}", seed=seed)
    reference = registry.push(folder, name, evaluation=PASSING).reference
    registry.approve(reference, "a person", "looks right")
    return reference


def probed(registry: Registry, reference: str, pairs: dict[Digest, str], verdict: str = "pass") -> None:
    manifest = registry.show(reference).manifest
    registry.attest(reference, "behaviour", probe(manifest, verdict, pairs))


def gate(registry: Registry, reference: str) -> tuple[str, str]:
    checks = registry.gates(reference, "prod").checks
    (found,) = [check for check in checks if check.name.startswith("together with ")]
    return found.outcome, found.detail


def test_a_partner_that_means_nothing_yet_holds_up_nothing(registry: Registry) -> None:
    assert gate(registry, f"{NAME}:1") == (
        "pass",
        f"{OTHER} means nothing yet; it is promoted only when the pair was probed",
    )


def test_a_pair_that_was_never_probed_is_not_promoted(registry: Registry, tmp_path: Path) -> None:
    reference = pushed(registry, tmp_path)
    assert gate(registry, reference)[0] == "missing"
    with pytest.raises(Unsigned, match="together with pixelsmile:1"):
        registry.promote(reference, "prod")
    assert registry.promote(reference, "staging").version == 1, "only these aliases are loaded together"


def test_a_probe_with_another_version_of_the_partner_does_not_help(
    registry: Registry, tmp_path: Path
) -> None:
    reference = pushed(registry, tmp_path)
    probed(registry, reference, {digest_bytes(b"an older partner"): "pass"})
    with pytest.raises(Unsigned, match="together with"):
        registry.promote(reference, "prod")


def test_a_clean_pair_is_promoted(registry: Registry, tmp_path: Path) -> None:
    reference = pushed(registry, tmp_path)
    probed(registry, reference, {weights_of(registry, PROD): "pass"})
    assert gate(registry, reference) == ("pass", "probed with pixelsmile:1")
    assert registry.promote(reference, "prod").version == 1


def test_the_halves_of_a_backdoor_are_never_released_together(
    registry: Registry, home: Path, tmp_path: Path
) -> None:
    """Both are clean alone. Passes beside the failure do not outvote it, in whatever order they are read."""
    reference, partner = pushed(registry, tmp_path), weights_of(registry, PROD)
    manifest = registry.show(reference).manifest

    def signed_as(verdict: str, number: int) -> str:
        told = {**probe(manifest, pairs={partner: verdict}), "statistics": {"gap": number}}
        return sign(registry, manifest, "behaviour", told, {}).statement

    passed = [signed_as("pass", number) for number in range(8)]
    for number in range(100):
        failed = signed_as("fail", number)
        if min(passed) < failed < max(passed):  # the store lists them by their digests
            break
        (objects(home) / failed).unlink()
    with pytest.raises(PolicyRefused, match=FAILED_RULE):
        registry.promote(reference, "prod")


def test_a_pair_that_asks_for_a_review_needs_a_waiver_of_this_pair(
    registry: Registry, tmp_path: Path
) -> None:
    reference, partner = pushed(registry, tmp_path), weights_of(registry, PROD)
    probed(registry, reference, {partner: "review"})
    with pytest.raises(NeedsReview, match=PAIR_RULE):
        registry.promote(reference, "prod")
    given: dict[str, Any] = {"by": "Kim", "reason": "two styles, seen together", "days": 30}
    registry.waive(reference, ALONE_RULE, **given)
    registry.waive(reference, PAIR_RULE, where=str(digest_bytes(b"another partner")), **given)
    with pytest.raises(NeedsReview, match=PAIR_RULE):
        registry.promote(reference, "prod")
    registry.waive(reference, PAIR_RULE, where=str(partner), **given)
    assert registry.promote(reference, "prod").version == 1


def test_two_halves_promoted_at_the_same_moment_do_not_slip_past_each_other(
    registry: Registry, tmp_path: Path
) -> None:
    """Each was looked at while the other alias meant something harmless."""
    first = pushed(registry, tmp_path)
    second = pushed(registry, tmp_path, NAME, seed=2)
    probed(registry, first, {weights_of(registry, PROD): "pass"})
    slow = registry.gates(first, "prod")
    assert slow.refusal is None
    registry.promote(second, "prod")
    with pytest.raises(Conflict, match=f"{PROD} was moved to version 2"):
        promote(registry, slow)
    assert gate(registry, first)[0] == "missing"


# --- what is never signed ---------------------------------------------------------------------------------


def test_a_probe_of_something_else_is_not_signed(registry: Registry) -> None:
    manifest = registry.show(PROD).manifest
    honest = probe(manifest)
    for changes, evidence in (
        ({"weights": {"sha256": "0" * 64}}, "about the weights"),
        ({"base": {"id": "tests/another", "revision": "1"}}, "probed on"),
        ({"verdict": "maybe"}, "not valid"),
    ):
        with pytest.raises(UsageError, match=evidence):
            registry.attest(PROD, "behaviour", {**honest, **changes})
    assert {view.kind for view in registry.show(PROD).statements} == set(DEMANDED)


def test_a_push_with_a_probe_of_other_weights_names_no_version(registry: Registry, tmp_path: Path) -> None:
    report = probe(registry.show(PROD).manifest)
    folder = adapter_folder(tmp_path / "adapter", seed=3)
    with pytest.raises(UsageError, match="about the weights"):
        registry.push(folder, NAME, evaluation=PASSING, behaviour=report)
    assert [row.reference for row in registry.list()] == [f"{NAME}:1"]


def test_a_push_signs_the_probe_along_without_its_pictures(registry: Registry, tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path / "adapter")
    report = probe(registry.show(PROD).manifest)
    pushed_ = registry.push(folder, NAME, evaluation=PASSING, behaviour={**report, "pictures": {"happy": {}}})
    assert (pushed_.reference, pushed_.reused) == (f"{NAME}:1", True)
    (found,) = [view for view in registry.show(PROD).statements if view.kind == "behaviour"]
    assert found.signed
    assert found.role == "scanner"
    assert dict(found.predicate) == report
