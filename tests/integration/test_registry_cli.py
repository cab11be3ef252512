"""The real command line in its own process: what it prints, where, and with which exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fakes.registries import (
    NAME,
    PASSING,
    adapter_folder,
    copy_registry,
    forget_trust,
    kept,
    one,
    overwrite,
)
from registry.manifest import WEIGHTS_NAME

pytestmark = pytest.mark.integration

PROD = f"{NAME}@prod"


def registry(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "registry.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), check=False)


def answer(*arguments: str, code: int = 0) -> Any:
    """The one JSON object of a command; nothing else may be on stdout."""
    result = registry(*arguments, "--json")
    assert result.returncode == code, result.stderr
    return json.loads(result.stdout)


def test_the_way_of_an_adapter(home: Path, tmp_path: Path) -> None:
    made = answer("init")
    assert made["created"] is True
    folder = adapter_folder(tmp_path / "adapter")
    report = tmp_path / "evaluation.json"
    report.write_text(json.dumps(PASSING))

    pushed = answer("push", str(folder), "--name", NAME, "--evaluation", str(report))
    assert pushed["reference"] == f"{NAME}:1"
    assert answer("pull", f"{NAME}:1", code=10)["error"]["kind"] == "Unsigned"
    answer("approve", f"{NAME}:1", "--by", "a person", "--reason", "looks right")
    assert answer("promote", f"{NAME}:1", "--to", "prod")["reference"] == PROD
    assert answer("list")["adapters"][0]["aliases"] == ["prod"]
    pulled = answer("pull", PROD)
    assert pulled["digest"] == pushed["digest"]
    assert (Path(pulled["path"]) / WEIGHTS_NAME).read_bytes() == (folder / WEIGHTS_NAME).read_bytes()


def test_a_tampered_byte_exits_13_and_leaves_nothing(home: Path) -> None:
    copy_registry(home)
    forget_trust(home)
    blob = one(home, "models/*/adapter_weights/*")
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    overwrite(blob, bytes(data))
    result = registry("pull", PROD)
    assert result.returncode == 13
    assert result.stdout == ""
    assert "What to do" in result.stderr
    assert not kept(home)


def test_people_read_what_programs_read(home: Path) -> None:
    copy_registry(home)
    shown = registry("show", PROD, "--attestations")
    assert shown.returncode == 0
    assert "signed by the approver key" in shown.stdout
    assert "  top1  0.93\n" in shown.stdout
    verified = registry("verify", PROD)
    assert "19. The scanner of today finds nothing" in verified.stdout
    assert [check["number"] for check in answer("verify", PROD)["checks"]] == list(range(1, 20))


@pytest.mark.parametrize(
    ("arguments", "code", "kind"),
    [
        (["pull", NAME], 2, "UsageError"),
        (["pull"], 2, "MissingParameter"),
        (["pull", PROD, "--bogus"], 2, "NoSuchOption"),
        (["pull", f"{NAME}:7"], 11, "NotFound"),
    ],
)
def test_errors_are_objects_too(home: Path, arguments: list[str], code: int, kind: str) -> None:
    copy_registry(home)
    error = answer(*arguments, code=code)["error"]
    assert (error["kind"], error["exit_code"]) == (kind, code)
    assert error["message"]
    assert error["mend"]


def test_scan_answers_by_its_exit_code(tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path / "adapter")
    assert answer("scan", str(folder))["verdict"] == "pass"
    (folder / WEIGHTS_NAME).write_bytes(b"\x80\x04.")
    assert answer("scan", str(folder), code=14)["verdict"] == "block"
    refused = registry("scan", str(folder))
    assert (refused.returncode, "ADP-CON" in refused.stdout) == (14, True)


def test_a_revoked_adapter_exits_15(home: Path) -> None:
    copy_registry(home)
    assert answer("revoke", f"{NAME}:1", "--reason", "it leaks")["revoked"] == "it leaks"
    assert registry("pull", PROD).returncode == 15
    assert "REVOKED: it leaks" in registry("list").stdout
