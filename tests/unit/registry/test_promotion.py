"""Promotion: all gates at once, and aliases that move only from what was seen."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from fakes.registries import NAME, PASSING, adapter_folder, copy_registry, objects, overwrite
from fakes.statements import evaluation, row
from registry.cli import cli
from registry.client import Registry
from registry.digest import Digest, digest_bytes
from registry.errors import (
    Conflict,
    DigestMismatch,
    NotFound,
    PolicyRefused,
    RegistryError,
    Revoked,
    Unsigned,
    UsageError,
)
from registry.manifest import WEIGHTS_NAME
from registry.promotion import promote
from registry.settings import CONFIG_NAME

PROD = f"{NAME}@prod"
POLICY = """
[gates.prod.metrics."metrics.top1"]
min = 0.9
[gates.prod.metrics."metrics.identity"]
min = 0.5
[gates.staging]
require = ["training", "scan", "licence"]
approvals = 0
"""
PROBED = """
[gates.prod]
require = ["training", "scan", "licence", "behaviour"]
approvals = 0
"""


@pytest.fixture
def registry(home: Path) -> Registry:
    return copy_registry(home)


def second(registry: Registry, tmp_path: Path, evaluation: Mapping[str, Any] | None = PASSING) -> str:
    folder = adapter_folder(tmp_path / "second", seed=1)
    return registry.push(folder, NAME, evaluation=evaluation).reference


def with_policy(home: Path, text: str = POLICY) -> Registry:
    """The registry of a data folder under a policy file."""
    (home / "registry" / "policy.toml").write_text(text)
    return Registry.open(home)


def outcomes(registry: Registry, reference: str, alias: str = "prod") -> dict[str, str]:
    return {check.name: check.outcome for check in registry.gates(reference, alias).checks}


def test_a_refusal_by_one_gate_leaves_what_is_fetched_for_another(registry: Registry, home: Path) -> None:
    registry = with_policy(home, PROBED)
    refused: list[str] = []

    def refuse(stage: str = "", done: int = 1, total: int = 1) -> None:
        if done and stage not in refused:
            refused.append(stage)
            with pytest.raises(Unsigned, match="behaviour"):
                Registry.open(home).pull(PROD)

    refuse()
    assert registry.pull(f"{NAME}:1", progress=refuse).fetched_bytes > 0
    assert refused == ["", "download"]
    assert registry.pull(f"{NAME}:1").fetched_bytes == 0


def test_all_gates_of_a_good_version_pass(registry: Registry) -> None:
    report = registry.gates(f"{NAME}:1", "prod")
    assert report.refusal is None
    assert [check.name for check in report.checks] == [
        "named",
        "not revoked",
        "not yanked",
        "training",
        "evaluation",
        "scan",
        "licence",
        "approval",
        "licence policy",
        "files and scan",
    ]
    assert {check.outcome for check in report.checks} == {"pass"}


def test_every_gate_is_looked_at_also_behind_one_that_fails(registry: Registry, tmp_path: Path) -> None:
    reference = second(registry, tmp_path, evaluation=None)
    found = outcomes(registry, reference)
    assert {name for name, outcome in found.items() if outcome == "missing"} == {"evaluation", "approval"}
    assert found["files and scan"] == "pass"
    with pytest.raises(Unsigned, match="evaluation"):
        registry.promote(reference, "prod")


def test_a_refusal_is_a_failure_and_an_absence_is_missing(registry: Registry, tmp_path: Path) -> None:
    reference = second(registry, tmp_path, evaluation={"verdict": "fail", "metrics": {}})
    found = outcomes(registry, reference)
    assert (found["evaluation"], found["approval"]) == ("fail", "missing")
    with pytest.raises(PolicyRefused, match="evaluation"):
        registry.promote(reference, "prod")


def test_thresholds_name_what_is_too_low_and_what_is_not_there(home: Path, registry: Registry) -> None:
    found = outcomes(with_policy(home), f"{NAME}:1")
    assert (found["metrics.top1"], found["metrics.identity"]) == ("pass", "missing")
    stricter = with_policy(home, '[gates.prod.metrics."metrics.top1"]\nmin = 0.95\n')
    with pytest.raises(PolicyRefused, match=r"metrics\.top1"):
        stricter.promote(f"{NAME}:1", "prod")


NO_WORSE = """
[gates.prod.metrics.top1_accuracy]
min = 0.8
max_regression = 0.02
"""
LINE = "top1_accuracy, no regression"


def compared(
    registry: Registry, folder: Path, apart: float, against: str | None = PROD, seed: int = 1
) -> str:
    """An approved version whose accuracy is so much above that of another version, give or take 0.01."""
    path = adapter_folder(folder / f"seed-{seed}", seed=seed)
    beside = None if against is None else weights_of(registry, against)
    told = row(value=0.9, difference=None if beside is None else (apart, apart - 0.01, apart + 0.01))
    report = evaluation(digest_bytes((path / WEIGHTS_NAME).read_bytes()), told, against=beside)
    reference = registry.push(path, NAME, evaluation=report).reference
    registry.approve(reference, "a person", "looks right")
    return reference


def weights_of(registry: Registry, reference: str) -> Digest:
    return registry.show(reference).manifest.file(WEIGHTS_NAME).sha256


def found(registry: Registry, reference: str, alias: str = "prod") -> tuple[str, str]:
    """What the no-regression rule says."""
    (check,) = [check for check in registry.gates(reference, alias).checks if check.name == LINE]
    return check.outcome, check.detail


@pytest.mark.parametrize(
    ("apart", "outcome"), [(0.05, "pass"), (0.0, "pass"), (-0.015, "fail"), (-0.2, "fail")]
)
def test_a_version_that_may_be_worse_is_not_promoted(
    home: Path, registry: Registry, tmp_path: Path, apart: float, outcome: str
) -> None:
    strict = with_policy(home, NO_WORSE)
    reference = compared(strict, tmp_path, apart)
    assert found(strict, reference) == (
        outcome,
        f"against pixelsmile:1, which {PROD} means: difference {apart:+.4g} (95 % interval "
        f"{apart - 0.01:+.4g} to {apart + 0.01:+.4g}, p = 0.25), required at most 0.02 worse",
    )
    if outcome == "pass":
        assert strict.promote(reference, "prod").version == 2
    else:
        with pytest.raises(PolicyRefused, match="top1_accuracy: against pixelsmile:1"):
            strict.promote(reference, "prod")
        assert strict.load(PROD).reference == f"{NAME}:1"


def test_the_first_version_of_an_alias_has_nothing_to_be_worse_than(
    home: Path, registry: Registry, tmp_path: Path
) -> None:
    strict = with_policy(home, NO_WORSE.replace("prod", "beta"))
    reference = compared(strict, tmp_path, 0.0, against=None)
    assert found(strict, reference, "beta") == ("pass", f"the first version: {NAME}@beta means nothing yet")
    assert strict.promote(reference, "beta").version == 2


def test_what_an_alias_means_can_be_promoted_again(home: Path, registry: Registry, tmp_path: Path) -> None:
    """Also when its evaluation was against an older version, and for the same weights in another version."""
    strict = with_policy(home, NO_WORSE)
    reference = compared(strict, tmp_path, 0.05)
    strict.promote(reference, "prod")
    assert found(strict, reference) == ("pass", f"{PROD} means these very weights")
    assert strict.promote(reference, "prod").reused


def test_a_rollback_is_not_asked_whether_it_is_worse(home: Path, registry: Registry, tmp_path: Path) -> None:
    """What the alias means is bad, and version 2 was never compared with it; a promotion would be refused."""
    first, strict = compared(registry, tmp_path, 0.05), with_policy(home, NO_WORSE)
    strict.promote(first, "prod")
    third = compared(strict, tmp_path, 0.05, seed=2)
    strict.promote(third, "prod")
    with pytest.raises(Unsigned, match="compares it with pixelsmile:3"):
        strict.promote(first, "prod")
    assert strict.rollback(NAME, "prod").version == 2
    low = with_policy(home, NO_WORSE.replace("0.8", "0.95"))
    with pytest.raises(PolicyRefused, match="top1_accuracy"):
        low.rollback(NAME, "prod", to=3)


def test_a_revoked_version_is_nothing_to_be_compared_with(
    home: Path, registry: Registry, tmp_path: Path
) -> None:
    """Nobody can load it, so nobody could ever be compared with it."""
    reference, strict = compared(registry, tmp_path, 0.0, against=None), with_policy(home, NO_WORSE)
    assert found(strict, reference)[0] == "missing"
    strict.revoke(f"{NAME}:1", "it leaks")
    assert found(strict, reference) == ("pass", f"{NAME}:1, which {PROD} means, is revoked")
    assert strict.promote(reference, "prod").version == 2


def test_a_refused_version_tells_by_how_much(home: Path, registry: Registry, tmp_path: Path) -> None:
    """The evaluation says no; its reasons and its figures are shown, and promote nothing."""
    strict, path = with_policy(home, NO_WORSE), adapter_folder(tmp_path / "refused", seed=1)
    report = evaluation(
        digest_bytes((path / WEIGHTS_NAME).read_bytes()),
        row(value=0.7, difference=(0.1, 0.05, 0.15)),
        against=weights_of(registry, PROD),
        verdict="fail",
        reasons=["top1_accuracy is 0.7\x1b"],
    )
    reference = strict.push(path, NAME, evaluation=report).reference
    checks = {check.name: check for check in strict.gates(reference, "prod").checks}
    assert checks["evaluation"].detail.endswith("says that it failed: top1_accuracy is 0.7\\x1b")
    assert [checks[name].outcome for name in ("evaluation", "top1_accuracy", LINE)] == [
        "fail",
        "fail",
        "pass",
    ]
    assert "0.7 (95 % interval" in checks["top1_accuracy"].detail
    with pytest.raises(PolicyRefused, match="says that it failed"):
        strict.promote(reference, "prod")


def test_the_command_tells_the_figures_of_a_metric(home: Path, registry: Registry, tmp_path: Path) -> None:
    strict = with_policy(home, NO_WORSE)
    reference = compared(strict, tmp_path, -0.2)
    answer = CliRunner().invoke(cli, ["promote", reference, "--to", "prod", "--json"])
    assert answer.exit_code == PolicyRefused.exit_code
    checks = {check["name"]: check for check in json.loads(answer.stdout)["checks"]}
    metric = checks[LINE]["metric"]
    assert checks["top1_accuracy"]["metric"] == metric
    assert metric["name"] == "top1_accuracy"
    assert metric["rule"] == {"min": 0.8, "max_regression": 0.02}
    figure = metric["figure"]
    assert (figure["value"], figure["low"], figure["high"]) == (0.9, 0.9 - 0.05, 0.9 + 0.05)
    assert (figure["difference"]["value"], figure["difference"]["p"], figure["difference"]["n"]) == (
        -0.2,
        0.25,
        96,
    )
    assert "metric" not in checks["approval"]
    text = CliRunner().invoke(cli, ["promote", reference, "--to", "prod"]).stdout
    (line,) = [line for line in text.splitlines() if line.startswith(LINE)]
    assert "FAIL" in line
    assert "p = 0.25), required at most 0.02 worse" in line


def test_each_alias_has_its_own_gate(home: Path, registry: Registry, tmp_path: Path) -> None:
    strict = with_policy(home)
    reference = second(strict, tmp_path, evaluation=None)
    assert strict.promote(reference, "staging").version == 2
    assert strict.load(f"{NAME}@staging").reference == reference
    with pytest.raises(Unsigned):
        strict.load(reference)


def test_a_gate_reads_every_byte_of_the_store(registry: Registry, home: Path) -> None:
    (weights,) = objects(home).glob("models/*/adapter_weights/*")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    overwrite(weights, bytes(data))
    assert outcomes(registry, f"{NAME}:1", "staging")["files and scan"] == "fail"
    with pytest.raises(DigestMismatch):
        registry.promote(f"{NAME}:1", "staging")


def test_of_two_promotions_at_once_one_wins_and_the_other_is_told(registry: Registry, tmp_path: Path) -> None:
    reference = second(registry, tmp_path)
    registry.approve(reference, "a person", "better")
    slow = registry.gates(f"{NAME}:1", "staging")
    registry.promote(reference, "staging")
    with pytest.raises(Conflict):
        promote(registry, slow)
    assert registry.pull(f"{NAME}@staging").reference == reference
    *_, tried, failed = registry.ledger.entries()
    assert (tried.action, failed.action) == ("promote", "promote failed")
    assert "while you were" in failed.details


def test_a_rollback_goes_back_and_passes_the_gates_of_today(registry: Registry, tmp_path: Path) -> None:
    reference = second(registry, tmp_path)
    registry.approve(reference, "a person", "better")
    registry.promote(reference, "prod")
    back = registry.rollback(NAME, "prod")
    assert (back.version, back.previous) == (1, 2)
    assert registry.pull(PROD).reference == f"{NAME}:1"
    assert registry.rollback(NAME, "prod").version == 2
    registry.revoke(f"{NAME}:1", "it leaks")
    with pytest.raises(Revoked):
        registry.rollback(NAME, "prod", to=1)


@pytest.mark.parametrize(
    ("name", "alias", "to"), [(NAME, "prod", None), (NAME, "prod", 7), (NAME, "beta", None)]
)
def test_a_rollback_to_nowhere_is_explained(
    registry: Registry, name: str, alias: str, to: int | None
) -> None:
    with pytest.raises(NotFound) as refusal:
        registry.rollback(name, alias, to)
    assert refusal.value.mend


def test_a_demoted_alias_means_nothing(registry: Registry) -> None:
    assert registry.demote(NAME, "prod").previous == 1
    with pytest.raises(NotFound):
        registry.pull(PROD)
    with pytest.raises(NotFound):
        registry.demote(NAME, "prod")
    assert registry.load(f"{NAME}:1").reference == f"{NAME}:1"


def test_a_yanked_version_is_pulled_with_a_warning_and_promoted_nowhere(registry: Registry) -> None:
    assert registry.yank(f"{NAME}:1", "blurs mouths").yanked == "blurs mouths"
    (warning,) = registry.pull(f"{NAME}:1").warnings
    assert "blurs mouths" in warning
    assert outcomes(registry, f"{NAME}:1", "staging")["not yanked"] == "fail"
    assert registry.yank(f"{NAME}:1", None).yanked is None
    assert registry.pull(f"{NAME}:1").warnings == ()
    with pytest.raises(UsageError):
        registry.yank(f"{NAME}:1", " ")


def test_a_version_is_never_overwritten(registry: Registry, tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path / "second", seed=1)
    with pytest.raises(Conflict, match="immutable"):
        registry.push(folder, NAME, version=1)
    assert registry.push(folder, NAME, version=5).version == 5
    assert registry.push(folder, NAME, version=5).reused
    assert [row.reference for row in registry.list()] == [f"{NAME}:1", f"{NAME}:5"]


def test_every_change_is_a_line_of_the_audit_log(registry: Registry, tmp_path: Path) -> None:
    reference = second(registry, tmp_path)
    registry.approve(reference, "Kim", "better")
    registry.promote(reference, "prod")
    registry.rollback(NAME, "prod")
    registry.yank(reference, "blurs")
    registry.revoke(reference, "it leaks")
    registry.demote(NAME, "prod")
    lines = [*registry.ledger.entries()]
    assert [line.action for line in lines] == [
        "init", "push", "approve", "promote", "push", "approve", "promote", "rollback", "yank", "revoke",
        "demote",
    ]  # fmt: skip
    assert lines[5].actor == "Kim"
    anchor = registry.authority.state().ledger_anchor()
    assert anchor is not None
    assert anchor["length"] == len(lines)


def test_nothing_is_signed_without_its_line_in_the_log(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def down(*_: object) -> None:
        raise RegistryError("the database is down")

    monkeypatch.setattr("registry.storage.ledger.Ledger.append", down)
    with pytest.raises(RegistryError, match="down"):
        registry.revoke(f"{NAME}:1", "it leaks")
    assert registry.pull(PROD).reference == f"{NAME}:1"


def test_a_teams_settings_are_kept_without_passwords(home: Path) -> None:
    from registry.settings import layout, save

    with pytest.raises(UsageError, match="password"):
        save(home, {"ledger": "postgresql+psycopg://me:secret@host/db"})
    save(home, {"ledger": "postgresql+psycopg://me@host/db", "store": "s3://adapters/team"})
    assert layout(home).ledger_uri == "postgresql+psycopg://me@host/db"
    assert layout(home).store_uri == "s3://adapters/team"
    save(home, {"ledger": "postgresql+psycopg://me@host/db", "store": "s3://adapters/team"})
    with pytest.raises(UsageError, match=CONFIG_NAME):
        save(home, {"store": "s3://adapters/other"})
