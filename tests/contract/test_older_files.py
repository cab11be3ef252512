"""Files that version 0.1.0 has written are read, whatever comes after it.

Statements, manifests, cards, dialects and bundles have their own tests beside their code; databases are in
``test_migrations``. A format that changes gets a second file here, and the first one stays.
"""

from __future__ import annotations

import json
from pathlib import Path

from registry.policy import RegistryPolicy
from registry.signing import archived
from registry.vault import Manifest
from serving.http.keyring import Keys
from trainer.scoring.decisions import Decisions

GOLDEN = Path(__file__).parent.parent / "golden"


def test_trust_metadata() -> None:
    """A root, names, an alias and a version, verified whatever the time is now."""
    documents = {f"trust/{path.name}": path.read_bytes() for path in (GOLDEN / "trust-1").iterdir()}
    state = archived.verify(documents, documents["trust/1.root.json"])
    assert state.names() == ("pixelsmile",)
    assert state.aliases()["pixelsmile@prod"].digest == state.versions()["pixelsmile:1"].digest
    assert [len(state.keys(role)) for role in ("publisher", "scanner", "evaluator", "approver")] == [1] * 4
    anchor = state.ledger_anchor()
    assert anchor is not None
    assert anchor["length"] == 4


def test_the_manifest_of_a_backup() -> None:
    found = Manifest.parse((GOLDEN / "backup-1.json").read_bytes())
    assert {dump.path: dump.kind for dump in found.databases} == {"ledger": "sqlite", "mlflow": "sqlite"}
    assert len(found.objects) == 8
    assert any(kept.path == "registry/keys/approver.pem" for kept in found.files)


def test_keys_of_the_service() -> None:
    (key,) = Keys(GOLDEN / "serving-keys-1.json").all()
    assert key.name == "studio"
    assert key.scopes == ("edit", "read")
    assert key.alive(1_900_000_000.0)


def test_decisions_of_reviewers() -> None:
    found = Decisions(GOLDEN / "decisions-1.jsonl").read("vlm")
    assert [one.decision for one in found.values()] == ["accept", "reject"]
    assert {one.by for one in found.values()} == {"Kim"}


def test_a_policy() -> None:
    found = RegistryPolicy.load(GOLDEN / "policy-1.toml")
    told = json.loads(found.model_dump_json())
    assert told["gates"]["prod"]["approvals"] == 2
    assert told["gates"]["prod"]["metrics"]["top1_accuracy"]["min"] == 0.85
    assert told["scan"]["waiver_days"] == 30
