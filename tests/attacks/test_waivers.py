"""Attacks on waivers: everything that tries to get a finding past admission by a word that does not count.

The adapter asks for a person: one of its modules does nothing (ADP-NUM-004), and its signed scan says so. One
genuine waiver admits it; every attack changes one thing about that waiver, or about what it is laid beside.
"""

from __future__ import annotations

import base64
import functools
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fakes.adapters import card, container, factors, folder
from fakes.followed import soon
from fakes.registries import BASE, NAME, PASSING, copy_registry, one
from fakes.trust import TODAY, FakeTrust, Published, publish, signed, waiver
from registry.client import Registry
from registry.digest import digest_bytes
from registry.errors import (
    BadSignature,
    DigestMismatch,
    NeedsReview,
    RegistryError,
    ScanRefused,
    Unsigned,
    UsageError,
)
from registry.manifest import WEIGHTS_NAME, AdapterManifest

RULE, OTHER = "ADP-NUM-004", "ADP-STR-008"
SILENT = "transformer_blocks.0.attn.to_q"
DAY = timedelta(days=1)


def silenced(base: Any = None, module: str = SILENT) -> dict[str, bytes]:
    """A folder whose adapter leaves a module at zero."""
    values = factors() if base is None else factors(base)
    values[f"transformer.{module}.lora_B.weight"] *= 0
    return folder(container(values), card() if base is None else card(base))


@functools.cache
def reviewed() -> Published:
    """Published with an honest scan statement that warns, and without a waiver."""
    return publish(silenced())


def manifest_of(found: Published) -> AdapterManifest:
    return AdapterManifest.parse(found.manifest)


def beside(found: Published, *waivers: bytes) -> Published:
    return replace(found, statements=(*found.statements, *waivers))


def waived(*rules: str, signers: tuple[str, ...] | None = None, **more: Any) -> bytes:
    found = reviewed()
    values = waiver(manifest_of(found), *rules, **more)
    return signed("waiver", "pixelsmile:3", found.expected, values, signers)


def altered(**changes: Any) -> bytes:
    """A waiver that no honest program writes, signed by an approver."""
    found = reviewed()
    values = {**waiver(manifest_of(found)), **changes}
    return signed("waiver", "pixelsmile:3", found.expected, values)


def edited() -> bytes:
    """A waiver that is over is prolonged behind its signature."""
    document = json.loads(waived(at=TODAY - 40 * DAY))
    payload = json.loads(base64.b64decode(document["payload"]))
    payload["predicate"]["expires"] = "2026-06-20T00:00:00Z"
    document["payload"] = base64.b64encode(json.dumps(payload).encode()).decode()
    return json.dumps(document).encode()


def without_signature() -> bytes:
    return json.dumps({**json.loads(waived()), "signatures": []}).encode()


def of_another_adapter() -> bytes:
    other = publish(silenced(), version=2)
    values = waiver(manifest_of(other))
    return signed("waiver", "pixelsmile:2", other.expected, values)


def two_needed(*waivers: bytes) -> Published:
    trust = FakeTrust(
        signers={**FakeTrust().signers, "approver": ("approver", "second approver")},
        thresholds={"approver": 2},
    )
    found = replace(reviewed(), trust=trust)
    needed = tuple(kind for kind in found.policy.required if kind != "approval")
    return beside(replace(found, policy=replace(found.policy, required=needed)), *waivers)


def another_finding() -> Published:
    """The signed scan names the rule that is waived, the bytes break another one too."""
    values = factors()
    values[f"transformer.{SILENT}.lora_B.weight"] *= 0
    key = "transformer.transformer_blocks.0.attn.to_k"
    values[f"{key}.lora_A.weight"] *= np.float32(1e4)
    values[f"{key}.lora_B.weight"] *= np.float32(1e-4)
    files = folder(container(values), card())
    told = {"result": "WARNED", "configuration": [], "warnedTests": [RULE], "failedTests": []}
    found = publish(files, predicates={"scan": told})
    values_ = waiver(manifest_of(found))
    return beside(found, signed("waiver", "pixelsmile:3", found.expected, values_))


def another_warning() -> Published:
    """The bytes are as waived, a scanner has signed that something else is wrong with them."""
    told = {"result": "WARNED", "configuration": [], "warnedTests": [RULE, OTHER], "failedTests": []}
    found = publish(silenced(), predicates={"scan": told})
    values = waiver(manifest_of(found))
    return beside(found, signed("waiver", "pixelsmile:3", found.expected, values))


def warning_without_rules() -> Published:
    """A warned scan that names nothing could not be covered by anything, or by everything."""
    found = publish(silenced(), predicates={"scan": {"result": "WARNED", "warnedTests": []}})
    values = waiver(manifest_of(found))
    return beside(found, signed("waiver", "pixelsmile:3", found.expected, values))


def blocked() -> Published:
    """Blocked bytes behind a signed PASSED, with a waiver of the very rule."""
    values = {**factors(), "vae.conv.lora_A.weight": np.ones((4, 4), np.float32)}
    found = publish(folder(container(values), card()))
    honest = publish()
    found = publish(
        dict(found.files),
        predicates={"scan": {"result": "PASSED", "configuration": [], "failedTests": []}},
    )
    told = {**waiver(manifest_of(found)), "rules": ["ADP-STR-002"]}
    assert honest.admit()
    return beside(found, signed("waiver", "pixelsmile:3", found.expected, told))


def unknown_time() -> Published:
    found = beside(reviewed(), waived())
    return replace(found, policy=replace(found.policy, at=None))


ATTACKS: dict[str, tuple[Callable[[], Published], type[RegistryError], str]] = {
    "none": (reviewed, NeedsReview, RULE),
    "over since a day": (
        lambda: beside(reviewed(), waived(at=TODAY - 31 * DAY, days=30)),
        NeedsReview,
        RULE,
    ),
    "over since this second": (
        lambda: beside(reviewed(), waived(at=TODAY - 30 * DAY, days=30)),
        NeedsReview,
        RULE,
    ),
    "dated tomorrow": (lambda: beside(reviewed(), waived(at=TODAY + DAY)), NeedsReview, RULE),
    "longer than the policy allows": (lambda: beside(reviewed(), waived(days=91)), NeedsReview, RULE),
    "at a time that nobody knows": (unknown_time, NeedsReview, RULE),
    "over other weights": (
        lambda: beside(reviewed(), altered(weights={"sha256": digest_bytes(b"others").hex})),
        NeedsReview,
        RULE,
    ),
    "of another version": (
        lambda: beside(reviewed(), of_another_adapter()),
        BadSignature,
        "about pixelsmile:2",
    ),
    "of another rule": (lambda: beside(reviewed(), waived(OTHER)), NeedsReview, RULE),
    "of a rule that nobody knows": (
        lambda: beside(reviewed(), altered(rules=["ADP-NUM-999"])),
        NeedsReview,
        RULE,
    ),
    "at another place": (
        lambda: beside(reviewed(), waived(where="transformer_blocks.1.attn.to_q")),
        NeedsReview,
        SILENT,
    ),
    "unsigned": (lambda: beside(reviewed(), without_signature()), Unsigned, "no signature"),
    "signed by the publisher": (
        lambda: beside(reviewed(), waived(signers=("publisher",))),
        BadSignature,
        "approver",
    ),
    "signed by the scanner": (
        lambda: beside(reviewed(), waived(signers=("scanner",))),
        BadSignature,
        "approver",
    ),
    "signed by a stranger": (
        lambda: beside(reviewed(), waived(signers=("nobody",))),
        BadSignature,
        "approver",
    ),
    "by a key that was rotated away": (
        lambda: beside(
            replace(
                publish(silenced(), kinds=["training", "evaluation", "scan", "licence"]),
                trust=FakeTrust(signers={**FakeTrust().signers, "approver": ("new approver",)}),
                policy=replace(reviewed().policy, required=("training", "scan")),
            ),
            waived(),
        ),
        BadSignature,
        "approver",
    ),
    "prolonged behind its signature": (lambda: beside(reviewed(), edited()), BadSignature, "approver"),
    "without an end": (lambda: beside(reviewed(), altered(expires=None)), BadSignature, "not valid"),
    "with a pattern for a rule": (
        lambda: beside(reviewed(), altered(rules=["ADP-*"])),
        BadSignature,
        "not valid",
    ),
    "by one approver of two": (lambda: two_needed(waived()), NeedsReview, RULE),
    "by one approver twice": (
        lambda: two_needed(waived(), waived(reason="once more")),
        NeedsReview,
        RULE,
    ),
    "by two approvers at two places": (
        lambda: two_needed(waived(where="elsewhere"), waived(where="nowhere", signers=("second approver",))),
        NeedsReview,
        SILENT,
    ),
    "of a part of what the bytes show": (another_finding, NeedsReview, "ADP-NUM-007"),
    "of a part of what the scan says": (another_warning, NeedsReview, OTHER),
    "of a warning that names nothing": (warning_without_rules, NeedsReview, "scan"),
    "of a rule that blocks": (blocked, ScanRefused, "ADP-STR-002"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_waiver_that_does_not_count_lets_nothing_pass(name: str) -> None:
    build, error, evidence = ATTACKS[name]
    attack = build()
    with pytest.raises(RegistryError) as caught:
        attack.admit()
    assert isinstance(caught.value, error), caught.value
    assert evidence in str(caught.value)
    assert caught.value.mend


GENUINE: dict[str, Callable[[], Published]] = {
    "of the rule": lambda: beside(reviewed(), waived()),
    "at the place": lambda: beside(reviewed(), waived(where=SILENT)),
    "until tomorrow": lambda: beside(reviewed(), waived(at=TODAY - 29 * DAY)),
    "since this second": lambda: beside(reviewed(), waived(at=TODAY)),
    "beside one that is over": lambda: beside(reviewed(), waived(at=TODAY - 60 * DAY), waived()),
    "by two approvers of two": lambda: two_needed(
        waived(), waived(reason="me too", signers=("second approver",))
    ),
    "by two approvers in one envelope": lambda: two_needed(waived(signers=("approver", "second approver"))),
}


@pytest.mark.parametrize("name", GENUINE)
def test_a_genuine_waiver_lets_its_finding_pass(name: str) -> None:
    adapter = GENUINE[name]().admit()
    assert {found.rule for found in adapter.scan.findings} == {RULE}
    assert adapter.scan.verdict == "review"


def test_a_waiver_changes_nothing_about_an_adapter_that_passes() -> None:
    honest = publish()
    values = waiver(manifest_of(honest))
    assert beside(honest, signed("waiver", "pixelsmile:3", honest.expected, values)).admit()


# --- in a registry ----------------------------------------------------------------------------------------


@pytest.fixture
def registry(home: Path) -> Registry:
    return copy_registry(home)


def write(path: Path, files: Mapping[str, bytes]) -> Path:
    path.mkdir()
    for name, data in files.items():
        (path / name).write_bytes(data)
    return path


def pushed(registry: Registry, tmp_path: Path) -> str:
    result = registry.push(
        write(tmp_path / "silenced", silenced(BASE)), NAME, evaluation=PASSING, for_review=True
    )
    assert result.findings == (RULE,)
    return result.reference


def test_what_asks_for_a_review_is_pushed_only_for_one(registry: Registry, tmp_path: Path) -> None:
    adapter = write(tmp_path / "silenced", silenced(BASE))
    before = len(registry.list())
    with pytest.raises(NeedsReview, match=RULE) as refused:
        registry.push(adapter, NAME, evaluation=PASSING)
    assert "--for-review" in refused.value.mend
    assert len(registry.list()) == before
    reference = registry.push(adapter, NAME, evaluation=PASSING, for_review=True).reference
    with pytest.raises(NeedsReview, match=RULE):
        registry.approve(reference, "a person", "looks right")
    found = {check.name: check.outcome for check in registry.gates(reference, "prod").checks}
    assert (found["scan"], found["files and scan"], found["approval"]) == ("fail", "fail", "missing")


def test_what_blocks_is_not_pushed_for_a_review(registry: Registry, tmp_path: Path) -> None:
    files = silenced(BASE)
    adapter = write(tmp_path / "cut", {**files, WEIGHTS_NAME: files[WEIGHTS_NAME][:-1]})
    with pytest.raises(ScanRefused):
        registry.push(adapter, NAME, evaluation=PASSING, for_review=True)


def test_a_waived_version_is_approved_promoted_and_loaded(registry: Registry, tmp_path: Path) -> None:
    reference = pushed(registry, tmp_path)
    registry.waive(reference, RULE, by="Kim", reason="left out on purpose", days=30)
    registry.approve(reference, "a person", "looks right")
    report = registry.gates(reference, "prod")
    told = {check.name: (check.outcome, check.detail) for check in report.checks}
    assert {outcome for outcome, _ in told.values()} == {"pass"}
    for gate in ("scan", "waiver", "files and scan"):
        assert f"UTC: {RULE}" in told[gate][1], gate
    assert registry.promote(reference, "prod").version == 2
    assert registry.load(f"{NAME}@prod").scan.verdict == "review"
    assert registry.ledger.head().length
    assert [entry.action for entry in registry.ledger.entries()][-3:] == ["waive", "approve", "promote"]


def test_a_version_is_refused_when_its_waiver_ends_also_from_a_warm_cache(
    registry: Registry, tmp_path: Path
) -> None:
    reference = pushed(registry, tmp_path)
    manifest = registry.show(reference).manifest
    began = time.monotonic()
    registry.pull(f"{NAME}:1")
    start = datetime.now(UTC).replace(microsecond=0)
    end = start + soon(time.monotonic() - began)
    told = {
        **waiver(manifest, at=start),
        "issued": f"{start:%Y-%m-%dT%H:%M:%SZ}",
        "expires": f"{end:%Y-%m-%dT%H:%M:%SZ}",
    }
    registry.attest(reference, "waiver", told)
    registry.approve(reference, "a person", "looks right")
    assert registry.pull(reference).fetched_bytes > 0
    assert registry.pull(reference).fetched_bytes == 0, "warm while the waiver counts"
    time.sleep(max(0.0, (end - datetime.now(UTC)).total_seconds()) + 0.1)
    with pytest.raises(NeedsReview, match=RULE):
        registry.pull(reference)
    with pytest.raises(NeedsReview, match=RULE):
        registry.load(reference)
    assert not (registry.place.cache / "sha256" / manifest.digest.hex).exists()


@pytest.mark.parametrize(
    ("rules", "more", "evidence"),
    [
        (["ADP-CON-002"], {}, "cannot be waived"),
        (["ADP-NUM-999"], {}, "no rule"),
        ([RULE], {"days": 91}, "91 days"),
        ([RULE], {"reason": " "}, "reason"),
    ],
)
def test_a_waiver_that_would_not_count_is_not_signed(
    registry: Registry, rules: list[str], more: dict[str, Any], evidence: str
) -> None:
    before = registry.show(f"{NAME}:1").statements
    given = {"by": "Kim", "reason": "because", "days": 30, **more}
    with pytest.raises(UsageError, match=evidence):
        registry.waive(f"{NAME}:1", *rules, **given)
    assert registry.show(f"{NAME}:1").statements == before


def test_a_waiver_that_the_store_moves_to_another_version_is_refused(
    registry: Registry, home: Path, tmp_path: Path
) -> None:
    reference = pushed(registry, tmp_path)
    registry.waive(reference, RULE, by="Kim", reason="explained", days=30)
    digest = registry.show(reference).manifest.digest
    envelope = one(home, f"statements/{digest.hex}/waiver.*.json")
    first = registry.show(f"{NAME}:1").manifest.digest
    (envelope.parent.parent / first.hex / envelope.name).write_bytes(envelope.read_bytes())
    with pytest.raises((BadSignature, DigestMismatch), match="about pixelsmile:2"):
        registry.verify(f"{NAME}:1")
