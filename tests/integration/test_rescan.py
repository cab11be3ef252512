"""A rule change: what is released is scanned again, by command and by flow; and the gate of provenance."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from fakes.adapters import card, container, factors, folder
from fakes.registries import BASE, NAME, PASSING, adapter_folder, copy_registry, objects, one, overwrite
from fakes.trust import predicate
from registry import transfer
from registry.attestation import DEMANDED
from registry.attesting import sign
from registry.cli import cli
from registry.client import Registry
from registry.digest import Fingerprint
from registry.errors import (
    BadSignature,
    NeedsReview,
    NetworkError,
    NotFound,
    PolicyRefused,
    RegistryError,
    ScanRefused,
    Unsigned,
    UsageError,
)
from registry.manifest import CARD_NAME, WEIGHTS_NAME, AdapterCard, AdapterManifest
from registry.publishing import open_folder
from registry.results import StatementView
from registry.scanning.rules import RULES_VERSION
from registry.storage import shelf
from registry.storage.catalog import write_model
from registry.storage.local import LocalObjects

pytestmark = pytest.mark.integration

OLD_SCAN: Mapping[str, Any] = {
    "result": "PASSED",
    "configuration": [
        {
            "name": "scanner-rules",
            "uri": "https://adapter-foundry.dev/attestation/scanner-rules/v1",
            "annotations": {"version": "1"},
        }
    ],
    "passedTests": [],
    "warnedTests": [],
    "failedTests": [],
}
SILENT = "transformer.transformer_blocks.0.attn.to_q.lora_B.weight"


@pytest.fixture
def registry(home: Path) -> Registry:
    return copy_registry(home)


def blocked() -> dict[str, bytes]:
    """What rules that know better block: weights of another part of the pipeline."""
    return folder(
        container({**factors(BASE), "vae.conv.lora_A.weight": np.ones((4, 4), np.float32)}), card(BASE)
    )


def silenced() -> dict[str, bytes]:
    """What asks for a person: a module that does nothing."""
    values = factors(BASE)
    values[SILENT] *= 0
    return folder(container(values), card(BASE))


def released_long_ago(registry: Registry, path: Path, files: Mapping[str, bytes], alias: str) -> str:
    """Release an adapter as a registry did whose scanner found nothing in it: everybody has signed it."""
    path.mkdir()
    for name, data in files.items():
        (path / name).write_bytes(data)
    version = max(registry.authority.state().versions_of(NAME)) + 1
    with open_folder(path) as contents:
        prints = {name: Fingerprint.of(content) for name, content in contents.items()}
        published = transfer.publish(registry.store, contents, prints, transfer.silent)
    draft = AdapterCard.parse(files[CARD_NAME])
    manifest = AdapterManifest.make(draft, name=NAME, version=version, files=published.entries)
    shelf.put_manifest(registry.store, manifest)
    for kind in DEMANDED:
        told = scan_of(manifest) if kind == "scan" else predicate(kind, manifest, b"")
        sign(registry, manifest, kind, told, {})
    write_model(registry.store, manifest)
    reference, size = f"{NAME}:{version}", len(manifest.canonical_bytes())
    registry.authority.add_version(reference, manifest.digest, size, {"content": str(manifest.digest)})
    facts = {"version": version, "history": []}
    registry.authority.set_alias(f"{NAME}@{alias}", manifest.digest, size, facts, None)
    return reference


def scan_of(manifest: AdapterManifest) -> dict[str, Any]:
    weights = {"sha256": manifest.file(WEIGHTS_NAME).sha256.hex}
    scanned = {"name": "weights", "digest": weights}
    return {**OLD_SCAN, "configuration": [*OLD_SCAN["configuration"], scanned]}


def aged(registry: Registry, home: Path) -> None:
    """The released version was scanned by rules of long ago only."""
    manifest = registry.show(f"{NAME}@prod").manifest
    one(home, f"statements/{manifest.digest.hex}/scan.*.json").unlink()
    sign(registry, manifest, "scan", scan_of(manifest), {})


def scans(registry: Registry, reference: str) -> list[StatementView]:
    return [view for view in registry.show(reference).statements if view.kind == "scan"]


def command(*arguments: str) -> tuple[int, Any]:
    result = CliRunner().invoke(cli, ["rescan", *arguments, "--json"], catch_exceptions=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, json.loads(result.stdout)


def test_a_version_with_an_old_scan_still_pulls_and_gets_a_fresh_one(registry: Registry, home: Path) -> None:
    aged(registry, home)
    assert registry.load(f"{NAME}@prod").scan.rules_version == RULES_VERSION
    code, told = command("--all")
    assert (code, told["rules_version"]) == (0, RULES_VERSION)
    assert [(row["reference"], row["aliases"], row["outcome"]) for row in told["rows"]] == [
        (f"{NAME}:1", ["prod"], "pass")
    ]
    fresh = scans(registry, f"{NAME}:1")
    assert len(fresh) == 2
    assert all(view.signed for view in fresh)
    code, told = command(NAME)
    assert (code, told["rows"][0]["outcome"]) == (0, "current")
    assert len(scans(registry, f"{NAME}:1")) == 2, "nothing was signed twice"
    assert registry.pull(f"{NAME}@prod").reference == f"{NAME}:1"
    assert registry.ledger.head().length
    assert [entry.action for entry in registry.ledger.entries()][-1] == "attest"


def test_what_the_rules_of_today_refuse_is_reported_and_nothing_is_revoked(
    registry: Registry, home: Path, tmp_path: Path
) -> None:
    bad = released_long_ago(registry, tmp_path / "bad", blocked(), "legacy")
    odd = released_long_ago(registry, tmp_path / "odd", silenced(), "beta")
    code, told = command("--all")
    assert code == 14
    assert told["error"]["kind"] == "ScanRefused"
    found = {row["reference"]: (row["outcome"], row["rules"]) for row in told["rows"]}
    assert found == {
        f"{NAME}:1": ("current", []),
        bad: ("block", ["ADP-STR-002"]),
        odd: ("review", ["ADP-NUM-004"]),
    }
    assert all(row.revoked is None for row in registry.list())
    assert len(scans(registry, bad)) == len(scans(registry, odd)) == 1, "nothing was signed about them"
    with pytest.raises(ScanRefused):
        registry.pull(f"{NAME}@legacy")

    # A person decides about both.
    registry.revoke(bad, "it changes the VAE")
    code, told = command("--all")
    assert code == 17
    assert bad not in {row["reference"] for row in told["rows"]}
    registry.waive(odd, "ADP-NUM-004", by="Kim", reason="left out on purpose", days=30)
    code, told = command("--all")
    assert code == 0
    assert {row["outcome"] for row in told["rows"]} == {"current", "waived"}
    (waived,) = [row for row in told["rows"] if row["outcome"] == "waived"]
    assert waived["detail"].startswith("until 20"), "people see when it ends"
    assert registry.load(f"{NAME}@beta").scan.verdict == "review"


def test_what_could_not_be_scanned_is_no_pass(registry: Registry, home: Path) -> None:
    aged(registry, home)
    (weights,) = objects(home).glob("models/*/adapter_weights/*")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    overwrite(weights, bytes(data))
    code, told = command("--all")
    assert code == 1
    assert told["rows"][0]["outcome"] == "unfinished"
    assert len(scans(registry, f"{NAME}:1")) == 1


class Away(LocalObjects):
    """A store that does not answer when it is asked for the files of some manifests.

    Attributes:
        manifests: digests of these, in hex.
        asked: those that it was asked for.
    """

    def __init__(self, folder: Path, manifests: set[str]) -> None:
        super().__init__(folder)
        self.manifests = manifests
        self.asked: list[str] = []

    def read(self, key: str, start: int, stop: int) -> bytes:
        for digest in self.manifests:
            if key.startswith("manifests/") and digest in key:
                self.asked.append(digest)
                raise NetworkError("the store is away")
        return super().read(key, start, stop)


def test_a_store_that_is_away_for_a_moment_costs_one_row(
    registry: Registry, home: Path, tmp_path: Path
) -> None:
    bad = released_long_ago(registry, tmp_path / "bad", blocked(), "legacy")
    lost = released_long_ago(registry, tmp_path / "lost", silenced(), "beta")
    odd = released_long_ago(registry, tmp_path / "odd", silenced(), "gamma")
    registry.store = Away(objects(home), {registry.show(lost).manifest.digest.hex})
    found = registry.rescan(everything=True)
    assert [(row["reference"], row["result"]) for row in found.table()] == [
        (f"{NAME}:1", "current"),
        (bad, "block"),
        (lost, "unfinished"),
        (odd, "review"),
    ]
    assert found.rows[2].detail == "the store is away"
    assert isinstance(found.refusal, ScanRefused), "what was found before it is not forgotten"


def test_a_store_that_stays_away_is_not_asked_for_every_version(
    registry: Registry, home: Path, tmp_path: Path
) -> None:
    wanted = [released_long_ago(registry, tmp_path / alias, silenced(), alias) for alias in "abcde"]
    away = Away(objects(home), {registry.show(one).manifest.digest.hex for one in wanted})
    registry.store = away
    found = registry.rescan(everything=True)
    assert len(set(away.asked)) == 3
    assert [row.outcome for row in found.rows] == ["current", *["unfinished"] * 5]
    assert [row.detail for row in found.rows[4:]] == ["not tried: the network failed 3 times in a row"] * 2
    assert found.refusal is not None
    assert wanted[-1] in found.refusal.message


def test_a_scan_that_the_publisher_signed_is_not_current(registry: Registry, home: Path) -> None:
    """Whoever controls the store lays a statement there that nobody of its role has signed."""
    manifest = registry.show(f"{NAME}@prod").manifest
    genuine = one(home, f"statements/{manifest.digest.hex}/scan.*.json")
    document = json.loads(genuine.read_bytes())
    document["signatures"][0]["sig"] = "AAAA"
    genuine.unlink()
    shelf.put_statement(registry.store, manifest.digest, "scan", json.dumps(document).encode())
    assert registry.rescan(NAME).rows[0].outcome == "pass", "it was scanned again"


def test_names_are_needed_and_known(registry: Registry) -> None:
    for names, everything in (((), False), ((NAME,), True)):
        with pytest.raises(UsageError):
            registry.rescan(*names, everything=everything)
    with pytest.raises(NotFound, match="no alias"):
        registry.rescan("watercolour")


def test_without_the_scanners_key_nothing_is_scanned(registry: Registry, home: Path) -> None:
    (home / "registry" / "keys" / "scanner.pem").unlink()
    with pytest.raises(NotFound, match="scanner"):
        Registry.open(home).rescan(everything=True)


# --- as a flow --------------------------------------------------------------------------------------------


def test_the_flow_leaves_a_table_and_fails_when_a_person_is_needed(
    registry: Registry, home: Path, tmp_path: Path
) -> None:
    from prefect.client.orchestration import get_client

    from flows.maintenance import rescan
    from flows.server import attached, managed_server

    aged(registry, home)
    with managed_server(home) as server, attached(home, server.url):
        assert [row["outcome"] for row in rescan()["rows"]] == ["pass"]
        released_long_ago(registry, tmp_path / "odd", silenced(), "beta")
        with pytest.raises(NeedsReview, match=f"{NAME}:2"):
            rescan()
        with get_client(sync_client=True) as client:
            tables = [found for found in client.read_artifacts() if found.key == "rescan"]
    assert len(tables) == 2
    newest = max(tables, key=lambda found: found.created)
    assert [(row["reference"], row["result"]) for row in json.loads(newest.data)] == [
        (f"{NAME}:1", "current"),
        (f"{NAME}:2", "review"),
    ]


# --- provenance -------------------------------------------------------------------------------------------


def test_the_gate_of_provenance_tells_the_chain(registry: Registry) -> None:
    manifest = registry.show(f"{NAME}:1").manifest
    (found,) = [check for check in registry.gates(f"{NAME}:1", "prod").checks if check.name == "training"]
    assert found.outcome == "pass"
    weights = manifest.file(WEIGHTS_NAME).sha256
    for part in (str(manifest.digest), str(weights), "ADP-PRV-001 holds"):
        assert part in found.detail


def missing(registry: Registry, home: Path, manifest: AdapterManifest, other: AdapterManifest) -> None:
    one(home, f"statements/{manifest.digest.hex}/training.*.json").unlink()


def foreign(registry: Registry, home: Path, manifest: AdapterManifest, other: AdapterManifest) -> None:
    missing(registry, home, manifest, other)
    theirs = one(home, f"statements/{other.digest.hex}/training.*.json")
    shelf.put_statement(registry.store, manifest.digest, "training", theirs.read_bytes())


def of_other_materials(
    registry: Registry, home: Path, manifest: AdapterManifest, other: AdapterManifest
) -> None:
    missing(registry, home, manifest, other)
    lineage = manifest.training.model_copy(update={"seed": 99})
    told = predicate("training", manifest.model_copy(update={"training": lineage}), b"")
    sign(registry, manifest, "training", told, {})


@pytest.mark.parametrize(
    ("attack", "error"),
    [(missing, Unsigned), (foreign, BadSignature), (of_other_materials, PolicyRefused)],
)
def test_without_provenance_of_these_bytes_nothing_is_promoted(
    registry: Registry, home: Path, tmp_path: Path, attack: Any, error: type[RegistryError]
) -> None:
    reference = registry.push(adapter_folder(tmp_path / "a", seed=1), NAME, evaluation=PASSING).reference
    registry.approve(reference, "a person", "looks right")
    manifest, other = registry.show(reference).manifest, registry.show(f"{NAME}:1").manifest
    attack(registry, home, manifest, other)
    with pytest.raises(error, match="ADP-PRV-001"):
        registry.promote(reference, "prod")
