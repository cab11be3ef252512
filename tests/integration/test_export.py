"""attest and export on the real command line, and what other people's programs make of the exports."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from fakes.registries import NAME, copy_registry, kept, objects, one, overwrite
from fakes.trust import probe, reproduction
from registry.attestation import DEMANDED, KINDS
from registry.cli import main
from registry.commands import statements
from registry.manifest import WEIGHTS_NAME

pytestmark = pytest.mark.integration

PROD = f"{NAME}@prod"


def registry(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "registry.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), check=False)


def answer(*arguments: str, code: int = 0) -> Any:
    """The one JSON object of a command."""
    result = registry(*arguments, "--json")
    assert result.returncode == code, result.stderr + result.stdout
    return json.loads(result.stdout)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """The error object of a command that is used wrongly; in this process, which is faster."""
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--json"])
    assert caught.value.code == 2
    return json.loads(capsys.readouterr().out)["error"]


def written(path: Path, content: Any) -> str:
    path.write_text(json.dumps(content))
    return str(path)


@pytest.fixture
def key(tmp_path: Path) -> str:
    """An ECDSA key, made by the command that the error message of another key prints."""
    path = tmp_path / "model-signing.pem"
    command = ["openssl", "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out"]
    subprocess.run([*command, str(path)], check=True, capture_output=True)
    return f"file:{path}"


def test_the_kinds_of_the_command_are_all_but_what_approvers_sign() -> None:
    assert set(statements.KINDS) == set(KINDS) - {"approval", "waiver"}


def test_a_second_evaluation_is_signed_once(home: Path, tmp_path: Path) -> None:
    copy_registry(home)
    report = written(tmp_path / "report.json", {"verdict": "pass", "metrics": {"blend": 0.5}})
    arguments = ("attest", f"{NAME}:1", "--kind", "evaluation", "--predicate", report)
    first = answer(*arguments, "--role", "evaluator")
    assert (first["role"], first["outcome"], first["reused"]) == ("evaluator", "pass", False)
    assert answer(*arguments)["reused"] is True
    shown = registry("show", PROD, "--attestations").stdout
    assert "  blend  0.5\n" in shown
    assert "  top1  0.93\n" in shown
    assert answer("pull", PROD)["reference"] == PROD


def test_a_no_is_signed_too_and_ends_every_pull(home: Path, tmp_path: Path) -> None:
    copy_registry(home)
    verdict = {"passed": False, "failed": ["top1"], "reasons": ["top1 is 0.4"]}
    report = written(tmp_path / "evaluation.json", {"verdict": verdict, "metrics": []})
    result = registry("attest", f"{NAME}:1", "--kind", "evaluation", "--predicate", report)
    assert (result.returncode, "pulls of pixelsmile:1 are refused" in result.stderr) == (0, True)
    assert registry("pull", PROD).returncode == 14
    assert "because   top1 is 0.4" in registry("show", PROD, "--attestations").stdout


@pytest.mark.parametrize(
    ("kind", "predicate", "more", "says"),
    [
        ("evaluation", {"top1": 0.9}, [], "verdict"),
        ("evaluation", {"verdict": "pass"}, ["--role", "publisher"], "only believed from the evaluator"),
        ("scan", {"verdict": "pass"}, [], "result"),
        ("training", {"buildDefinition": {}}, [], "materials"),
        ("approval", {"verdict": "pass"}, [], "approval"),
        ("evaluation", [], [], "JSON object"),
    ],
)
def test_what_would_never_be_believed_is_not_signed(
    kind: str,
    predicate: Any,
    more: list[str],
    says: str,
    home: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy_registry(home)
    before = sorted(objects(home).glob("statements/**/*.json"))
    file = written(tmp_path / "predicate.json", predicate)
    error = refusal(capsys, "attest", f"{NAME}:1", "--kind", kind, "--predicate", file, *more)
    assert says in error["message"] + error["mend"]
    assert sorted(objects(home).glob("statements/**/*.json")) == before


def test_a_bundle_verifies_without_the_registry(home: Path, tmp_path: Path) -> None:
    """With nothing but the files: the PEM keys, the definition of DSSE, and sha256."""
    report = written(tmp_path / "behaviour.json", probe(copy_registry(home).show(PROD).manifest))
    probed = answer("attest", PROD, "--kind", "behaviour", "--predicate", report)
    assert (probed["role"], probed["outcome"]) == ("scanner", "pass")
    again = reproduction(copy_registry(home).show(PROD).manifest)
    made = answer(
        "attest", PROD, "--kind", "reproduction", "--predicate", written(tmp_path / "again.json", again)
    )
    assert (made["role"], made["outcome"]) == ("evaluator", "pass")
    waived = answer("waive", PROD, "ADP-NUM-004", "--reason", "left out on purpose", "--by", "Kim")
    assert (waived["rules"], waived["by"], waived["reused"]) == (["ADP-NUM-004"], "Kim", False)
    out = tmp_path / "statements"
    said = answer("export", PROD, "--format", "bundle", "--output", str(out))
    assert said["files"] == sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert said["warnings"] == []
    subject = hashlib.sha256((out / "manifest.json").read_bytes()).hexdigest()
    assert said["digest"] == f"sha256:{subject}"
    hints = {}
    for path in (out / "keys").iterdir():
        der = base64.b64decode("".join(path.read_text().splitlines()[1:-1]))
        hint = base64.b64encode(hashlib.sha256(der).digest()).decode()
        hints[hint] = load_pem_public_key(path.read_bytes())
    bundles = sorted(out.glob("*.sigstore.json"))
    assert len(bundles) == len(KINDS)
    for path in bundles:
        content = json.loads(path.read_bytes())
        envelope = content["dsseEnvelope"]
        payload = base64.b64decode(envelope["payload"])
        signed = b"DSSEv1 28 application/vnd.in-toto+json %d %s" % (len(payload), payload)
        public = hints[content["verificationMaterial"]["publicKey"]["hint"]]
        assert isinstance(public, Ed25519PublicKey)
        public.verify(base64.b64decode(envelope["signatures"][0]["sig"]), signed)
        assert json.loads(payload)["subject"][0]["digest"]["sha256"] == subject


def test_a_forged_statement_is_named_and_left_out(home: Path, tmp_path: Path) -> None:
    copy_registry(home)
    genuine = one(home, "statements/*/approval.*.json")
    forged = json.loads(genuine.read_bytes())
    forged["signatures"][0]["sig"] = base64.b64encode(bytes(64)).decode()
    data = json.dumps(forged).encode()
    name = f"approval.{hashlib.sha256(data).hexdigest()}.json"
    overwrite(genuine.with_name(name), data)
    out = tmp_path / "statements"
    result = registry("export", PROD, "--format", "bundle", "--output", str(out))
    assert result.returncode == 0
    assert "no key of the approver signed" in result.stderr
    assert len([*out.glob("approval*.sigstore.json")]) == 1
    assert len((out / "manifest.json.intoto.jsonl").read_bytes().splitlines()) == len(DEMANDED)


def test_a_bill_of_materials_on_stdout_and_in_a_file(home: Path, tmp_path: Path) -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    copy_registry(home)
    printed = registry("export", PROD, "--format", "cyclonedx").stdout
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(printed) is None
    file = tmp_path / "adapter.cdx.json"
    said = answer("export", f"{NAME}:1", "--format", "cyclonedx", "--output", str(file))
    assert file.read_text() == printed
    assert json.loads(printed) == said["bom"]
    card = said["bom"]["metadata"]["component"]["modelCard"]
    assert card["quantitativeAnalysis"]["performanceMetrics"] == [{"type": "top1", "value": "0.93"}]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_files_with_an_openssf_signature(home: Path, tmp_path: Path, key: str) -> None:
    copy_registry(home)
    out = tmp_path / "signed"
    said = answer("export", PROD, "--format", "model-signing", "--output", str(out), "--key", key)
    folder = f"{NAME}-1"
    assert set(said["files"]) == {
        "README.md",
        "model.sig",
        "publisher.pem",
        *(f"{folder}/{name}" for name in ("manifest.json", "adapter.json", WEIGHTS_NAME)),
    }
    words = f"verify key --public_key publisher.pem --signature model.sig {folder}".split()
    command = [sys.executable, "-m", "model_signing", *words]
    result = subprocess.run(command, cwd=out, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_nothing_is_left_of_an_export_that_fails(home: Path, tmp_path: Path, key: str) -> None:
    copy_registry(home)
    out = tmp_path / "out" / "signed"
    assert answer("revoke", f"{NAME}:1", "--reason", "it leaks")["revoked"] == "it leaks"
    result = registry("export", PROD, "--format", "model-signing", "--output", str(out), "--key", key)
    assert result.returncode == 15
    assert [*out.parent.iterdir()] == []
    assert not kept(home)
    # What was signed about it stays readable, for whoever has to find out what happened.
    result = registry("export", f"{NAME}:1", "--format", "bundle", "--output", str(out))
    assert (result.returncode, "revoked: it leaks" in result.stderr) == (0, True)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--format", "bundle"], "--output"),
        (["--format", "model-signing", "--output", "x"], "--key"),
        (["--format", "bundle", "--output", "x", "--key", "file:k"], "--key"),
        (["--format", "spdx"], "spdx"),
        (["--format", "bundle", "--output", "."], "is there already"),
        (["--format", "model-signing", "--output", "x", "--key", "awskms:alias/x"], "in a file"),
    ],
)
def test_wrong_options_are_explained(
    arguments: list[str],
    says: str,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy_registry(home)
    monkeypatch.chdir(home)
    error = refusal(capsys, "export", PROD, *arguments)
    assert says in error["message"] + error["mend"]
    assert not (home / "x").exists()
