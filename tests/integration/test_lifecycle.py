"""The life of adapters through the command line, on a folder and on a real S3 server."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fakes.registries import NAME, PASSING, adapter_files, adapter_folder
from registry.cli import main
from registry.manifest import WEIGHTS_NAME

if TYPE_CHECKING:
    from servers.weed import Weed

pytestmark = pytest.mark.integration

PROD = f"{NAME}@prod"


def registry(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command on a machine of its own, in this process: MLflow alone takes seconds to import."""
    out, err, patch = io.StringIO(), io.StringIO(), pytest.MonkeyPatch()
    patch.setenv("ADAPTER_FOUNDRY_HOME", str(home))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stop:
        main(arguments)
    patch.undo()
    assert isinstance(stop.value.code, int)
    return subprocess.CompletedProcess(arguments, stop.value.code, out.getvalue(), err.getvalue())


def answer(home: Path, *arguments: str, code: int = 0) -> Any:
    """The one JSON object of a command."""
    result = registry(home, *arguments, "--json")
    assert result.returncode == code, (arguments, result.returncode, result.stderr, result.stdout)
    return json.loads(result.stdout)


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Where the objects of the registry are."""
    if request.param == "folder":
        uri = (tmp_path / "objects").as_uri()
    else:
        weed: Weed = request.getfixturevalue("weed")
        for name, value in weed.environment().items():
            monkeypatch.setenv(name, value)
        uri = f"s3://{weed.bucket()}/team"
    monkeypatch.setenv("ADAPTER_FOUNDRY_STORE", uri)
    return uri


def push(home: Path, folder: Path, seed: int, *, approve: bool = True) -> str:
    report = folder / f"evaluation-{seed}.json"
    report.write_text(json.dumps({"verdict": "pass", "metrics": {"top1": 0.9 + seed / 100}}))
    adapter = adapter_folder(folder / f"adapter-{seed}", seed=seed)
    pushed = answer(home, "push", str(adapter), "--name", NAME, "--evaluation", str(report))
    if approve:
        answer(home, "approve", pushed["reference"], "--by", "a person", "--reason", "looks right")
    return str(pushed["reference"])


def references(listed: Any) -> list[str]:
    return [row["reference"] for row in listed["adapters"]]


def test_the_life_of_adapters(
    home: Path, tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(home, "init")
    first, second = push(home, tmp_path, 0), push(home, tmp_path, 1)
    assert (first, second) == (f"{NAME}:1", f"{NAME}:2")
    answer(home, "promote", first, "--to", "prod")

    # look
    assert references(answer(home, "list")) == [first, second]
    assert references(answer(home, "versions", NAME)) == [first, second]
    assert references(answer(home, "search", "portraits-base", "tiny")) == [first, second]
    assert references(answer(home, "search", "no-such-thing")) == []
    assert answer(home, "show", PROD)["aliases"] == ["prod"]
    health = answer(home, "doctor", "--deep")
    assert health["healthy"], [found for found in health["findings"] if found["outcome"] != "ok"]

    # compare
    found = answer(home, "diff", PROD, second)
    assert [(one["name"], one["first"], one["second"], one["difference"]) for one in found["metrics"]] == [
        ("top1", 0.9, 0.91, 0.01)
    ]
    assert 1.3 < found["weights"]["relative_difference"] < 1.5
    assert len(found["weights"]["most_changed"]) == 5
    same = answer(home, "diff", PROD, first)["weights"]
    assert (same["relative_difference"], same["cosine"], same["most_changed"]) == (0, 1, [])
    shown = registry(home, "diff", first, second).stdout
    assert "cosine between the two updates" in shown
    assert "+0.01" in shown

    # yank: hidden, but not gone
    answer(home, "yank", second, "--reason", "washed-out colours")
    assert references(answer(home, "list")) == [first]
    assert references(answer(home, "list", "--all")) == [first, second]
    assert references(answer(home, "search", NAME)) == [first]
    pulled = answer(home, "pull", second)
    assert "washed-out colours" in pulled["warnings"][0]
    assert "washed-out colours" in registry(home, "pull", second).stderr
    assert answer(home, "promote", second, "--to", "prod", code=14)["promoted"] is False
    answer(home, "yank", second, "--undo")
    assert references(answer(home, "list")) == [first, second]

    # carry it to a site without a network
    archive = tmp_path / "adapters.tar"
    exported = answer(home, "mirror", "export", str(archive), PROD)
    assert exported["references"] == [first]
    away = tmp_path / "away"
    with monkeypatch.context() as patch:
        patch.delenv("ADAPTER_FOUNDRY_STORE")
        patch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        patch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
        assert registry(away, "mirror", "import", str(archive)).returncode == 11, "nothing is pinned yet"
        root = home / "trust" / "pinned.root.json"
        pin(away, root)
        taken = answer(away, "mirror", "import", str(archive))
        assert (taken["references"], taken["left_out"]) == ([first], [])
        assert answer(away, "mirror", "import", str(archive))["file_bytes"] == 0
        there = answer(away, "pull", PROD)
        assert (Path(there["path"]) / WEIGHTS_NAME).read_bytes() == adapter_files(0)[WEIGHTS_NAME]
        assert answer(away, "doctor", "--deep")["healthy"]

    # revoke: refused from a warm cache, here and, with the next archive, there
    assert answer(home, "pull", PROD)["version"] == 1
    answer(home, "revoke", first, "--reason", "it leaks faces")
    assert answer(home, "pull", PROD, code=15)["error"]["kind"] == "Revoked"
    assert answer(home, "pull", first, code=15)["error"]["message"].count("it leaks faces") == 1
    assert "REVOKED: it leaks faces" in registry(home, "list").stdout
    answer(home, "promote", second, "--to", "prod")
    newer = tmp_path / "newer.tar"
    told = answer(home, "mirror", "export", str(newer))
    assert [left["exit_code"] for left in told["left_out"]] == [15]
    with monkeypatch.context() as patch:
        patch.delenv("ADAPTER_FOUNDRY_STORE")
        answer(away, "mirror", "import", str(newer))
        assert answer(away, "pull", first, code=15)["error"]["kind"] == "Revoked"
        assert answer(away, "pull", PROD)["version"] == 2
        assert answer(away, "mirror", "import", str(archive), code=16)["error"]["kind"] == "StaleTrust"

    # clean up
    assert answer(home, "gc")["removed"] == []
    time.sleep(1.1)  # S3 tells whole seconds
    looked = answer(home, "gc", "--grace", "0", "--revoked", "--dry-run")
    assert looked["bytes"] >= len(adapter_files(0)[WEIGHTS_NAME])
    removed = answer(home, "gc", "--grace", "0", "--revoked")
    assert (removed["removed"], removed["dry_run"]) == (looked["removed"], False)
    assert any(item["name"].endswith(WEIGHTS_NAME) for item in removed["removed"])
    assert answer(home, "gc", "--grace", "0", "--revoked")["removed"] == []
    assert answer(home, "verify", PROD)["version"] == 2
    assert answer(home, "show", first)["revoked"] == "it leaks faces"
    assert answer(home, "gc", "--cache", "--keep-bytes", "0")["kept_bytes"] == 0
    assert answer(home, "pull", PROD)["fetched_bytes"] > 0
    health = answer(home, "doctor", "--deep")
    assert health["healthy"], [found for found in health["findings"] if found["outcome"] != "ok"]
    actions = {row["action"] for row in answer(home, "log", "--verify")["entries"]}
    assert {"init", "push", "approve", "promote", "yank", "unyank", "revoke", "gc"} <= actions


def pin(home: Path, root: Path) -> None:
    """What the operator of a site does once, with a root that came by a trusted way."""
    result = registry(home, "trust", "pin", str(root))
    assert result.returncode == 0, result.stderr


def test_unfinished_uploads_are_cleaned_up(
    home: Path, tmp_path: Path, weed: Weed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts of an upload that was killed cost money until somebody ends it."""
    for name, value in weed.environment().items():
        monkeypatch.setenv(name, value)
    bucket = weed.bucket()
    monkeypatch.setenv("ADAPTER_FOUNDRY_STORE", f"s3://{bucket}/team")
    answer(home, "init")
    client = weed.client("admin")
    key = "team/models/" + "0" * 64 + f"/adapter_weights/{WEIGHTS_NAME}"
    begun = client.create_multipart_upload(Bucket=bucket, Key=key)
    client.upload_part(Bucket=bucket, Key=key, UploadId=begun["UploadId"], PartNumber=1, Body=b"x" * 1000)
    assert answer(home, "gc")["unfinished"] == []
    time.sleep(1.1)
    assert [one["name"] for one in answer(home, "gc", "--grace", "0")["unfinished"]] == [
        key.removeprefix("team/")
    ]
    assert not client.list_multipart_uploads(Bucket=bucket).get("Uploads")


def test_the_doctor_in_a_process_of_its_own(home: Path) -> None:
    """An empty machine: what is missing is said, the exit code tells, and nothing is made."""
    command = [sys.executable, "-m", "registry.cli", "doctor"]
    result = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), check=False)
    assert result.returncode == 11
    assert "What to do:" in result.stdout
    assert "registry init" in result.stdout
    assert [*home.iterdir()] == []


def test_wrong_options_are_explained(home: Path) -> None:
    for arguments in (["gc", "--revoked", "--cache"], ["gc", "--keep-bytes", "3"], ["diff", NAME, NAME]):
        error = answer(home, *arguments, code=2)["error"]
        assert error["kind"] == "UsageError"
        assert error["mend"]
    assert answer(home, "doctor", code=11)["healthy"] is False
    assert PASSING["verdict"] == "pass"
