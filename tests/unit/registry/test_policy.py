"""The policy file: strict to read, with gates that inherit, and metrics that must have been measured."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import registry
from registry import admission
from registry.attestation import DEMANDED, KINDS
from registry.errors import UsageError
from registry.policy import DEFAULT_GATE, Gate, RegistryPolicy, Threshold, check_metrics

SHIPPED = Path(registry.__file__).parent / "data" / "policy.toml"

EXAMPLE = b"""
[license]
purpose = "commercial-use"
declared = ["annual-revenue-below-1m-usd"]
[scan]
allow_review = true
[gates.default]
approvals = 3
[gates.prod.metrics."expression.top1"]
min = 0.9
[gates.staging]
require = ["training", "scan", "licence"]
approvals = 0
"""


def test_the_shipped_file_is_the_default() -> None:
    shipped = RegistryPolicy.load(SHIPPED)
    assert shipped == RegistryPolicy.load(None) == RegistryPolicy()
    assert shipped.digest == RegistryPolicy().digest


def test_the_shipped_file_names_every_key_with_a_comment() -> None:
    lines = SHIPPED.read_text("utf-8").splitlines()
    for key in ("purpose", "declared", "allow_review", "waiver_days", "require", "approvals"):
        (at,) = [number for number, line in enumerate(lines) if line.startswith(f"{key} =")]
        assert lines[at - 1].startswith("# "), key


def test_the_examples_in_the_shipped_file_are_valid() -> None:
    text = SHIPPED.read_text("utf-8")
    examples = text[text.index("# [gates.prod]") :].splitlines()
    code = [line[2:] for line in examples if line.startswith(("# [", "# min", "# approvals", "# require"))]
    found = RegistryPolicy.parse((text + "\n" + "\n".join(code)).encode())
    assert found.gate("prod").approvals == 2
    assert found.gate("prod").metrics["expression.top1"] == Threshold(min=0.9)
    assert found.gate("staging").require == ("training", "scan", "licence")


def test_without_a_file_everything_is_required() -> None:
    found = RegistryPolicy.load(None)
    assert found.gate("prod") == found.gate(None) == Gate(require=DEMANDED, approvals=1)
    assert set(DEMANDED) == set(KINDS) - {"behaviour", "reproduction", "waiver"}
    assert found.license.purpose == "commercial-redistribution"
    assert not found.scan.allow_review


def test_a_gate_takes_from_the_default_what_it_leaves_out() -> None:
    found = RegistryPolicy.parse(EXAMPLE)
    assert found.gate("prod").approvals == 3
    assert found.gate("prod").require == DEMANDED
    assert found.gate("prod").metrics == {"expression.top1": Threshold(min=0.9)}
    assert found.gate("other") == found.gate(None) == found.gates[DEFAULT_GATE]
    assert found.gate("staging").approvals == 0


def test_admission_gets_what_it_needs() -> None:
    found = RegistryPolicy.parse(EXAMPLE)
    policy = found.admission("staging")
    assert policy.required == ("training", "scan", "licence")
    assert (policy.approvals, policy.allow_review) == (0, True)
    assert (policy.purpose, policy.declared) == ("commercial-use", ("annual-revenue-below-1m-usd",))
    assert policy.digest == found.digest
    default = RegistryPolicy().admission(None)
    for field in fields(admission.Policy):
        if field.name != "digest":
            assert getattr(default, field.name) == getattr(admission.Policy(), field.name), field.name


def test_partners_are_found_from_both_sides_and_once() -> None:
    rows = "".join(
        f'[[scan.pairs]]\ntogether = ["{one}", "{other}"]\n'
        for one, other in (("a@prod", "b@prod"), ("c@prod", "a@prod"), ("b@prod", "a@prod"))
    )
    scan = RegistryPolicy.parse(rows.encode()).scan
    assert scan.partners("a@prod") == ("b@prod", "c@prod")
    assert scan.partners("b@prod") == ("a@prod",)
    assert scan.partners("a@staging") == ()


def test_a_gate_may_require_the_behaviour() -> None:
    text = b'[gates.prod]\nrequire = ["training", "scan", "licence", "behaviour"]\napprovals = 0\n'
    found = RegistryPolicy.parse(text)
    assert "behaviour" in found.admission("prod").required
    assert "behaviour" not in found.admission("staging").required


def test_the_digest_follows_values_not_layout() -> None:
    assert RegistryPolicy.parse(b"# a comment\n" + EXAMPLE).digest == RegistryPolicy.parse(EXAMPLE).digest
    other = EXAMPLE.replace(b"approvals = 3", b"approvals = 2")
    assert RegistryPolicy.parse(other).digest != RegistryPolicy.parse(EXAMPLE).digest


WRONG: dict[str, tuple[str, str]] = {
    "unknown table": ("[licence]", "did you mean 'license'?"),
    "unknown key": ('[license]\npurpos = "commercial-use"', "did you mean 'purpose'?"),
    "unknown key of a gate": ("[gates.prod]\napproval = 2", "did you mean 'approvals'?"),
    "unknown key of a threshold": ("[gates.prod.metrics.psnr]\nminimum = 2", "did you mean 'min'?"),
    "unknown purpose": ('[license]\npurpose = "anything"', "license.purpose"),
    "unknown declaration": (
        '[license]\ndeclared = ["annual-revenue-below-1m"]',
        "annual-revenue-below-1m-usd",
    ),
    "unknown statement": ('[gates.prod]\nrequire = ["signature"]', "gates.prod.require"),
    "statement twice": ('[gates.prod]\nrequire = ["scan", "scan", "approval"]', "twice"),
    "text for a number": ('[gates.prod]\napprovals = "2"', "gates.prod.approvals"),
    "fraction of approvals": ("[gates.prod]\napprovals = 1.5", "gates.prod.approvals"),
    "truth for a number": ("[gates.prod]\napprovals = true", "gates.prod.approvals"),
    "number for truth": ("[scan]\nallow_review = 1", "scan.allow_review"),
    "a waiver that is required": ('[gates.prod]\nrequire = ["waiver", "approval"]', "only a finding needs"),
    "waivers for years": ("[scan]\nwaiver_days = 1000", "scan.waiver_days"),
    "a pair of three": ('[[scan.pairs]]\ntogether = ["a@b", "c@d", "e@f"]', "scan.pairs.0.together"),
    "a pair of one": ('[[scan.pairs]]\ntogether = ["a@b", "a@b"]', "two different aliases"),
    "a pair of versions": ('[[scan.pairs]]\ntogether = ["a:1", "b@c"]', "scan.pairs.0.together.0"),
    "unknown key of a pair": ('[[scan.pairs]]\ntogeter = ["a@b", "c@d"]', "did you mean 'together'?"),
    "negative approvals": ("[gates.prod]\napprovals = -1", "gates.prod.approvals"),
    "approvals without approval": ('[gates.prod]\nrequire = ["scan"]', "does not name approval"),
    "approval of nobody": ("[gates.prod]\napprovals = 0", "approvals = 0"),
    "metrics without evaluation": (
        '[gates.prod]\nrequire = ["scan", "approval"]\n[gates.prod.metrics.psnr]\nmin = 1',
        "does not name evaluation",
    ),
    "threshold without an end": ("[gates.prod.metrics.psnr]", "min or max"),
    "threshold that nothing passes": ("[gates.prod.metrics.psnr]\nmin = 2\nmax = 1", "nothing could pass"),
    "threshold that is no number": ("[gates.prod.metrics.psnr]\nmin = nan", "gates.prod.metrics.psnr.min"),
    "no alias": ('[gates."Prod!"]\napprovals = 2', "gates.Prod!"),
    "no TOML": ("[license", "is not a policy in TOML"),
    "a date": ("[license]\npurpose = 2026-01-01", "is not a policy in TOML"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_policy_is_explained(name: str) -> None:
    text, expected = WRONG[name]
    with pytest.raises(UsageError) as caught:
        RegistryPolicy.parse(text.encode(), "policy.toml")
    assert expected in caught.value.message
    assert caught.value.message.startswith("policy.toml")
    assert caught.value.mend


def test_what_cannot_be_read_is_explained(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        RegistryPolicy.load(tmp_path / "nothing.toml")
    with pytest.raises(UsageError, match="not a policy"):
        RegistryPolicy.parse(b"\xff")
    with pytest.raises(UsageError, match="at most"):
        RegistryPolicy.parse(b"#" * (2 << 20))


PREDICATE: dict[str, Any] = {
    "verdict": "pass",
    "metrics": {"top1": 0.9, "psnr": 30, "not.nested": 4.0, "nan": float("nan"), "yes": True, "text": "0.99"},
    "expression.top1": 0.5,
    "expression": {"top1": 0.8},
}


@pytest.mark.parametrize(
    ("path", "threshold", "found", "outcome"),
    [
        ("metrics.top1", {"min": 0.9}, 0.9, "pass"),
        ("metrics.top1", {"min": 0.91}, 0.9, "fail"),
        ("metrics.top1", {"max": 0.9}, 0.9, "pass"),
        ("metrics.psnr", {"max": 29}, 30.0, "fail"),
        ("metrics.psnr", {"min": 20, "max": 40}, 30.0, "pass"),
        ("metrics.not.nested", {"min": 1}, 4.0, "pass"),
        ("expression.top1", {"min": 0.6}, 0.5, "fail"),
        ("metrics.nan", {"max": 1}, None, "missing"),
        ("metrics.yes", {"min": 0}, None, "missing"),
        ("metrics.text", {"min": 0}, None, "missing"),
        ("metrics", {"min": 0}, None, "missing"),
        ("metrics.top1.more", {"min": 0}, None, "missing"),
        ("nothing.at.all", {"min": 0}, None, "missing"),
        (".", {"min": 0}, None, "missing"),
    ],
)
def test_metrics(path: str, threshold: dict[str, float], found: float | None, outcome: str) -> None:
    gate = Gate(metrics={path: Threshold(**threshold)})
    (check,) = check_metrics(gate, PREDICATE)
    assert (check.name, check.found, check.outcome) == (path, found, outcome)
    assert any(sign in check.wanted for sign in (">=", "<="))


def test_no_evaluation_is_missing_not_passed() -> None:
    gate = Gate(metrics={"a": Threshold(min=0), "b": Threshold(max=0)})
    assert [check.outcome for check in check_metrics(gate, None)] == ["missing", "missing"]
    assert check_metrics(Gate(), None) == ()
