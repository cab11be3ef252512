"""``registry trust`` in its own process: what people type when keys come and go."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fakes.registries import NAME, copy_registry

pytestmark = pytest.mark.integration


def registry(*arguments: str, home: Path | None = None, text: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "registry.cli", *arguments]
    env = dict(os.environ) | ({} if home is None else {"ADAPTER_FOUNDRY_HOME": str(home)})
    return subprocess.run(command, input=text, capture_output=True, text=True, env=env, check=False)


def answer(*arguments: str, code: int = 0, home: Path | None = None) -> Any:
    """The one JSON object of a command; nothing else may be on stdout."""
    result = registry(*arguments, "--json", home=home)
    assert result.returncode == code, result.stderr
    return json.loads(result.stdout)


def test_a_second_person_joins_approves_and_leaves(home: Path, tmp_path: Path) -> None:
    """The way that docs/keys.md describes, command for command."""
    copy_registry(home)
    (home / "adapter-foundry.toml").write_text(f'[registry]\nstore = "file://{home}/registry/objects"\n')
    other = tmp_path / "other"
    other.mkdir()
    (other / "adapter-foundry.toml").write_text((home / "adapter-foundry.toml").read_text())

    exported = answer("trust", "export")
    (tmp_path / "root.json").write_text(exported["root"])
    wrong = answer("trust", "pin", str(tmp_path / "root.json"), "--sha256", "0" * 64, code=12, home=other)
    assert wrong["error"]["kind"] == "BadSignature"
    pinned = answer("trust", "pin", str(tmp_path / "root.json"), "--sha256", exported["sha256"], home=other)
    assert pinned["sha256"] == exported["sha256"]

    pem = tmp_path / "approver.pem"
    made = answer("trust", "key", "approver", "--output", str(pem), home=other)
    assert "PRIVATE" not in pem.read_text()
    added = answer("trust", "add", "approver", str(pem), "--threshold", "2")
    assert added["missing"] == 0
    shown = answer("trust", "show", home=other)
    approvers = shown["roles"]["approver"]
    assert (approvers["threshold"], len(approvers["keys"])) == (2, 2)
    assert [key["keyid"] for key in approvers["keys"] if key["here"]] == [made["keyid"]]

    # One of two approvals is not enough, whoever asks.
    assert answer("pull", f"{NAME}@prod", code=12)["error"]["kind"] == "BadSignature"
    refused = answer("trust", "revoke-key", made["keyid"][:10], code=2)
    assert "threshold" in refused["error"]["mend"]
    answer("trust", "threshold", "approver", "1")
    answer("trust", "revoke-key", made["keyid"][:10])
    assert answer("pull", f"{NAME}@prod")["digest"]
    assert answer("trust", "add", "approver", str(pem), code=2)["error"]["kind"] == "UsageError"

    lines = [entry for entry in answer("log")["entries"] if entry["action"] == "trust"]
    assert len(lines) == 5, "tried changes are in the audit log, too"


def test_rotation_keeps_adapters_loadable(home: Path) -> None:
    copy_registry(home)
    for role in ("publisher", "scanner", "evaluator", "approver", "online", "root"):
        assert answer("trust", "rotate", role)["kept"].endswith(".old.pem")
    assert answer("pull", f"{NAME}@prod")["digest"]
    shown = registry("trust", "show").stdout
    assert shown.count("on this machine") == 6
    assert shown.count("retired") == 4
    assert answer("trust", "renew")["root"] == 8


def test_a_draft_is_shown_before_it_is_signed(home: Path, tmp_path: Path) -> None:
    copy_registry(home)
    (home / "adapter-foundry.toml").write_text(f'[registry]\nstore = "file://{home}/registry/objects"\n')
    other = tmp_path / "other"
    other.mkdir()
    (other / "adapter-foundry.toml").write_text((home / "adapter-foundry.toml").read_text())
    assert registry("trust", "pin", "-", home=other, text=answer("trust", "export")["root"]).returncode == 0
    pem = tmp_path / "root.pem"
    answer("trust", "key", "root", "--output", str(pem), home=other)
    assert answer("trust", "add", "root", str(pem), "--threshold", "2")["missing"] == 1
    assert "waits for signatures" in registry("trust", "show", home=other).stdout

    refused = registry("trust", "sign", home=other, text="n\n")
    assert "root: threshold 1 -> 2" in refused.stderr
    assert refused.returncode != 0
    assert answer("trust", "show")["root"]["version"] == 1
    assert answer("trust", "sign", "--yes", home=other)["missing"] == 0
    assert answer("trust", "show")["root"]["version"] == 2
    assert answer("trust", "sign", "--yes", code=11)["error"]["kind"] == "NotFound"


def test_after_a_revocation_what_was_signed_is_swept_and_signed_anew(home: Path, tmp_path: Path) -> None:
    copy_registry(home)
    stolen = next(key["keyid"] for key in answer("trust", "show")["roles"]["approver"]["keys"])
    rotated = answer("trust", "rotate", "approver")
    assert answer("pull", f"{NAME}@prod")["digest"], "a retired key is still good for its time"
    answer("trust", "revoke-key", stolen)
    assert answer("pull", f"{NAME}@prod", code=12)["error"]["kind"] == "BadSignature"
    approve = ("approve", f"{NAME}:1", "--by", "somebody else", "--reason", "looked again")
    assert answer(*approve, code=12)["error"]["kind"] == "BadSignature"

    told = answer("trust", "sweep", "--dry-run")["versions"]
    assert [one["reference"] for one in told] == [f"{NAME}:1"]
    (statement,) = told[0]["statements"]
    assert "approval" in statement
    assert answer("trust", "sweep")["versions"] == told
    assert answer("trust", "sweep")["versions"] == []
    assert answer("pull", f"{NAME}@prod", code=10)["error"]["kind"] == "Unsigned"
    answer(*approve)
    assert answer("pull", f"{NAME}@prod")["digest"]
    assert rotated["new"] != stolen
