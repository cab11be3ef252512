"""The policy file: strict to read, with gates that inherit, and metrics that must have been measured."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

import registry
from registry import admission
from registry.attestation import DEMANDED, KINDS
from registry.errors import UsageError
from registry.policy import DEFAULT_GATE, Gate, RegistryPolicy, Threshold

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
    keys = ("# [", "# min", "# max", "# direction", "# approvals", "# require")
    code = [line[2:] for line in examples if line.startswith(keys)]
    found = RegistryPolicy.parse((text + "\n" + "\n".join(code)).encode())
    assert found.gate("prod").approvals == 2
    assert found.gate("prod").metrics == {
        "top1_accuracy": Threshold(min=0.85, max_regression=0.02),
        "structural_confusion": Threshold(max_regression=0.02, direction="lower"),
    }
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
    "threshold without an end": ("[gates.prod.metrics.psnr]", "needs min, max or max_regression"),
    "negative margin": ("[gates.prod.metrics.psnr]\nmin = 2\nmax_regression = -0.1", "psnr.max_regression"),
    "margin that is no number": (
        "[gates.prod.metrics.psnr]\nmin = 2\nmax_regression = nan",
        "max_regression",
    ),
    "margin without an end": ("[gates.prod.metrics.psnr]\nmax_regression = inf\nmin = 1", "max_regression"),
    "margin as text": ('[gates.prod.metrics.psnr]\nmin = 2\nmax_regression = "0.1"', "max_regression"),
    "margin as truth": ("[gates.prod.metrics.psnr]\nmin = 2\nmax_regression = true", "max_regression"),
    "margin in an unknown direction": (
        "[gates.prod.metrics.psnr]\nmax_regression = 0.1",
        "which end is better",
    ),
    "margin in either direction": (
        "[gates.prod.metrics.psnr]\nmin = 1\nmax = 2\nmax_regression = 0.1",
        "which end is better",
    ),
    "another direction": (
        '[gates.prod.metrics.psnr]\nmax_regression = 0.1\ndirection = "up"',
        "gates.prod.metrics.psnr.direction",
    ),
    "direction of a range": ('[gates.prod.metrics.psnr]\nmin = 1\ndirection = "higher"', "max_regression"),
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


@pytest.mark.parametrize(
    ("text", "better"),
    [
        ("min = 0.9\nmax_regression = 0.02", "higher"),
        ("max = 0.1\nmax_regression = 0.02", "lower"),
        ('max_regression = 0\ndirection = "lower"', "lower"),
        ('min = 0\nmax = 1\nmax_regression = 0.02\ndirection = "higher"', "higher"),
        ('min = -1\nmax_regression = 0.02\ndirection = "lower"', "lower"),
    ],
)
def test_the_policy_says_which_end_is_better(text: str, better: str) -> None:
    found = RegistryPolicy.parse(f"[gates.prod.metrics.a]\n{text}\n".encode()).gate("prod").metrics["a"]
    assert found.better == better


def test_a_rule_in_words() -> None:
    assert Threshold(min=0.5, max=1).range == ">= 0.5 and <= 1"
    assert Threshold(max=0.25).range == "<= 0.25"
