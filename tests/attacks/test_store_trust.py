"""Whoever controls store and index, and some keys, lies about names: no client believes it."""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from fakes.registries import (
    NAME,
    PASSING,
    adapter_folder,
    copy_registry,
    envelope_fields,
    expire,
    forget_trust,
    kept,
    key_ring,
    newest,
    objects,
    one,
    overwrite,
    resign,
)
from registry import attestation
from registry.client import Registry
from registry.digest import Digest, digest_bytes
from registry.errors import (
    BadSignature,
    DigestMismatch,
    NotFound,
    PolicyRefused,
    Revoked,
    ScanRefused,
    StaleTrust,
    Unsigned,
)
from registry.manifest import WEIGHTS_NAME
from registry.signing import envelope
from registry.signing.trust import REVOKED_FIELD, ROLES_FIELD, bin_role
from registry.storage.base import statements_prefix

PROD = f"{NAME}@prod"


@pytest.fixture
def registry(home: Path) -> Registry:
    return copy_registry(home)


def push_second(registry: Registry, tmp_path: Path, name: str = NAME, **options: Any) -> Digest:
    """A second adapter that its publisher signed and nobody approved."""
    return registry.push(adapter_folder(tmp_path / "second", seed=1), name, **options).digest


def statement_keys(home: Path, digest: Digest) -> list[Path]:
    return sorted((objects(home) / statements_prefix(digest)).iterdir())


# -- names --


def test_an_alias_moved_in_mlflow_is_not_believed(registry: Registry, home: Path, tmp_path: Path) -> None:
    first = registry.pull(PROD).digest
    push_second(registry, tmp_path)
    with sqlite3.connect(home / "registry" / "mlflow.db") as database:
        moved = database.execute("UPDATE registered_model_aliases SET version = 2 WHERE alias = 'prod'")
        assert moved.rowcount == 1
    assert registry.pull(PROD).digest == first


def test_a_source_and_tags_rewritten_in_mlflow_are_not_believed(registry: Registry, home: Path) -> None:
    with sqlite3.connect(home / "registry" / "mlflow.db") as database:
        database.execute(
            "UPDATE model_versions SET source = 'file:///evil', storage_location = 'file:///evil'"
        )
        database.execute("UPDATE model_version_tags SET value = 'evil'")
    assert registry.pull(PROD).manifest is not None


def test_blobs_of_two_versions_swapped_are_refused(registry: Registry, home: Path, tmp_path: Path) -> None:
    push_second(registry, tmp_path)
    paths = sorted(objects(home).glob(f"models/*/adapter_weights/{WEIGHTS_NAME}"))
    assert len(paths) == 2
    contents = [path.read_bytes() for path in paths]
    for path, data in zip(paths, reversed(contents), strict=True):
        overwrite(path, data)
    with pytest.raises(DigestMismatch):
        registry.pull(PROD)
    assert not kept(home)


def test_swapped_manifests_of_two_adapters_are_refused(
    registry: Registry, home: Path, tmp_path: Path
) -> None:
    push_second(registry, tmp_path, "grumpy")
    paths = sorted((objects(home) / "manifests" / "sha256").iterdir())
    contents = [path.read_bytes() for path in paths]
    for path, data in zip(paths, reversed(contents), strict=True):
        overwrite(path, data)
    with pytest.raises(DigestMismatch):
        registry.pull(PROD)
    assert not kept(home)


def test_statements_of_another_adapter_do_not_help(registry: Registry, home: Path, tmp_path: Path) -> None:
    digest = push_second(registry, tmp_path)
    for path in statement_keys(home, registry.pull(PROD).digest):
        if path.name.startswith(("approval.", "evaluation.")):
            shutil.copy(path, objects(home) / statements_prefix(digest))
    with pytest.raises(BadSignature, match="is about"):
        registry.promote(f"{NAME}:2", "prod")


def test_the_publisher_cannot_sign_an_alias(registry: Registry, home: Path, tmp_path: Path) -> None:
    """The publisher's key is stolen along with the store: it may speak about versions only."""
    from tuf.api.metadata import TargetFile

    digest = push_second(registry, tmp_path, evaluation=PASSING)

    def sneak_in(versions: Any) -> None:
        for path in (f"{NAME}@staging", PROD):
            versions.targets[path] = TargetFile(1, {"sha256": digest.hex}, path)

    resign(home, {"versions": sneak_in})
    with pytest.raises(NotFound):
        registry.pull(f"{NAME}@staging")
    assert [row.reference for row in registry.list()] == [f"{NAME}:1", f"{NAME}:2"]
    assert registry.pull(PROD).reference == f"{NAME}:1"


@pytest.mark.parametrize("thief", ["publisher", "scanner", "evaluator", "online"])
def test_an_alias_signed_by_another_role_is_refused(
    registry: Registry, home: Path, tmp_path: Path, thief: str
) -> None:
    from tuf.api.metadata import TargetFile

    digest = push_second(registry, tmp_path, evaluation=PASSING)

    def move(targets: Any) -> None:
        targets.targets[PROD] = TargetFile(1, {"sha256": digest.hex}, PROD)

    resign(home, {"targets": move}, {"targets": thief})
    with pytest.raises(BadSignature):
        registry.pull(PROD)
    assert not kept(home)


def test_an_approver_cannot_promote_past_admission(registry: Registry, home: Path, tmp_path: Path) -> None:
    """A signed alias does not replace the statements: a client checks them itself."""
    from tuf.api.metadata import TargetFile

    digest = push_second(registry, tmp_path)

    def move(targets: Any) -> None:
        targets.targets[PROD] = TargetFile(1, {"sha256": digest.hex}, PROD)

    resign(home, {"targets": move})
    with pytest.raises(Unsigned, match="evaluation, approval"):
        registry.pull(PROD)
    assert not kept(home)


def test_a_name_that_means_another_adapter_is_refused(registry: Registry, home: Path, tmp_path: Path) -> None:
    from tuf.api.metadata import TargetFile

    digest = push_second(registry, tmp_path, "grumpy", evaluation=PASSING)
    registry.approve("grumpy:1", "a person", "fine")

    def rename(targets: Any) -> None:
        targets.targets[PROD] = TargetFile(1, {"sha256": digest.hex}, PROD)

    resign(home, {"targets": rename})
    with pytest.raises(DigestMismatch, match="asked for"):
        registry.pull(PROD)
    assert not kept(home)


def test_a_name_that_means_another_adapter_is_refused_also_from_a_warm_cache(
    registry: Registry, home: Path, tmp_path: Path
) -> None:
    """The other adapter was admitted honestly, under an alias with the very same gate."""
    from tuf.api.metadata import TargetFile

    digest = push_second(registry, tmp_path, "grumpy", evaluation=PASSING)
    registry.approve("grumpy:1", "a person", "fine")
    registry.promote("grumpy:1", "prod")
    assert registry.pull("grumpy@prod").digest == digest

    def rename(targets: Any) -> None:
        targets.targets[PROD] = TargetFile(1, {"sha256": digest.hex}, PROD)

    resign(home, {"targets": rename})
    with pytest.raises(DigestMismatch, match="asked for"):
        registry.pull(PROD)


@pytest.mark.parametrize("name", ["adapter_config.json", "pytorch_lora_weights.bin", ".hidden"])
def test_a_file_beside_a_pulled_adapter_is_named(registry: Registry, tmp_path: Path, name: str) -> None:
    """A configuration beside the weights changes what loaders make of them."""
    output = tmp_path / "output"
    registry.pull(PROD, output=output)
    assert registry.verify_folder(output).reference == f"{NAME}:1"
    (output / name).write_bytes(b"{}")
    with pytest.raises(DigestMismatch, match="no manifest names"):
        registry.verify_folder(output)


# -- keys --


def test_another_registry_in_the_same_place_is_refused(
    registry: Registry, home: Path, tmp_path: Path
) -> None:
    foreign = tmp_path / "foreign"
    copy_of_foreign = Registry.init(foreign)
    copy_of_foreign.push(adapter_folder(tmp_path / "evil", seed=2), NAME, evaluation=PASSING)
    copy_of_foreign.approve(f"{NAME}:1", "nobody", "none")
    copy_of_foreign.promote(f"{NAME}:1", "prod")
    shutil.rmtree(objects(home))
    shutil.copytree(objects(foreign), objects(home))
    for _ in ("machine that pulled before", "new machine"):
        with pytest.raises((BadSignature, StaleTrust, DigestMismatch)):
            registry.pull(PROD)
        forget_trust(home)
    assert not kept(home)


def test_keys_swapped_in_the_root_are_refused(registry: Registry, home: Path) -> None:
    path = one(home, "trust/*.root.json")
    document = json.loads(path.read_bytes())
    roles = document["signed"][ROLES_FIELD]
    roles["approver"] = roles["publisher"]
    overwrite(path, json.dumps(document, separators=(",", ":"), sort_keys=True).encode())
    forget_trust(home)
    with pytest.raises(DigestMismatch):
        registry.pull(PROD)


def test_a_new_root_that_the_old_one_did_not_sign_is_refused(registry: Registry, home: Path) -> None:
    """Somebody offers version 2 of the root, signed by the key that it introduces."""
    from tuf.api.metadata import Metadata

    path = one(home, "trust/*.root.json")
    root = Metadata.from_bytes(path.read_bytes())
    root.signed.version = 2
    root.signed.unrecognized_fields[ROLES_FIELD]["approver"]["threshold"] = 1
    thief = key_ring(home).signer("publisher")
    root.signed.add_key(thief.public_key, "root")
    root.sign(thief)
    overwrite(path.with_name("2.root.json"), root.to_bytes())
    with pytest.raises(BadSignature):
        registry.pull(PROD)
    assert not kept(home)


@pytest.mark.parametrize("kind", ["evaluation", "approval"])
@pytest.mark.parametrize("thief", ["publisher", "scanner"])
def test_a_statement_signed_by_another_role_is_refused(
    registry: Registry, home: Path, tmp_path: Path, kind: Any, thief: str
) -> None:
    push_second(registry, tmp_path)
    said = {
        "evaluation": PASSING,
        "approval": attestation.approval_predicate(by="me", reason="mine", at="now"),
    }
    digest = registry.show(f"{NAME}:2").listed.digest
    for forged in ("evaluation", "approval"):
        signer = key_ring(home).signer(thief if forged == kind else attestation.ROLE_OF[forged])  # type: ignore[index]
        payload = attestation.statement(forged, f"{NAME}:2", digest, said[forged])  # type: ignore[arg-type]
        data = envelope.sign(payload, [signer])
        overwrite(objects(home) / f"{statements_prefix(digest)}{forged}.{digest_bytes(data).hex}.json", data)
    with pytest.raises(BadSignature):
        registry.promote(f"{NAME}:2", "prod")


def test_a_changed_statement_under_its_new_digest_is_refused(registry: Registry, home: Path) -> None:
    """The name of a statement is no secret: whoever changes it can also rename it."""
    path = one(home, "statements/*/evaluation.*")
    fields = envelope_fields(path)
    signature = bytearray(fields["signatures"][0]["sig"].encode())
    signature[3] = ord("A") if signature[3] != ord("A") else ord("B")
    fields["signatures"][0]["sig"] = signature.decode()
    data = json.dumps(fields).encode()
    path.unlink()
    overwrite(path.with_name(f"evaluation.{digest_bytes(data).hex}.json"), data)
    with pytest.raises(BadSignature):
        registry.pull(PROD)
    assert not kept(home)


# -- time --


def test_an_older_state_of_the_store_is_refused(registry: Registry, home: Path, tmp_path: Path) -> None:
    """Rollback: genuine, unexpired metadata from before the second version was promoted."""
    trust = objects(home) / "trust"
    before = tmp_path / "before"
    shutil.copytree(trust, before)
    push_second(registry, tmp_path, evaluation=PASSING)
    registry.approve(f"{NAME}:2", "a person", "better")
    registry.promote(f"{NAME}:2", "prod")
    shutil.rmtree(trust)
    shutil.copytree(before, trust)
    with pytest.raises(StaleTrust, match="older"):
        registry.pull(PROD)
    assert not kept(home)


def test_old_aliases_under_a_new_timestamp_are_refused(
    registry: Registry, home: Path, tmp_path: Path
) -> None:
    """Rollback with a stolen online key: new snapshot and timestamp over old targets."""
    from tuf.api.metadata import MetaFile

    trust = objects(home) / "trust"
    name, data = newest(home, "targets").name, newest(home, "targets").read_bytes()
    push_second(registry, tmp_path, evaluation=PASSING)
    registry.approve(f"{NAME}:2", "a person", "better")
    registry.promote(f"{NAME}:2", "prod")
    for path in trust.glob("*.targets.json"):
        path.unlink()
    overwrite(trust / name, data)

    def go_back(snapshot: Any) -> None:
        snapshot.meta["targets.json"] = MetaFile.from_data(int(name.partition(".")[0]), data, ["sha256"])

    resign(home, {"snapshot": go_back})
    with pytest.raises(StaleTrust, match="older"):
        registry.pull(PROD)
    assert not kept(home)


@pytest.mark.parametrize(
    ("role", "known"),
    [
        *((role, known) for role in ("snapshot", "targets", "names") for known in (True, False)),
        # A machine that has read the newest bin does not read it again.
        (bin_role(NAME), False),
    ],
)
def test_metadata_of_two_editions_mixed_are_refused(
    registry: Registry, home: Path, tmp_path: Path, role: str, known: bool
) -> None:
    """Each file is genuine and unexpired; together they were never signed."""
    before = newest(home, role).read_bytes()
    push_second(registry, tmp_path, evaluation=PASSING)
    push_second(registry, tmp_path, "grumpy")
    registry.approve(f"{NAME}:2", "a person", "better")
    registry.promote(f"{NAME}:2", "prod")
    assert newest(home, role).read_bytes() != before
    overwrite(newest(home, role), before)
    if not known:
        forget_trust(home)
    with pytest.raises((DigestMismatch, StaleTrust)):
        registry.pull(f"{NAME}:2" if role == bin_role(NAME) else f"{NAME}@prod")
    assert not kept(home)


@pytest.mark.parametrize("kind", ["timestamp", "snapshot", "targets", "names", "versions"])
@pytest.mark.parametrize("known", [True, False], ids=["machine that pulled before", "new machine"])
def test_expired_metadata_is_refused(registry: Registry, home: Path, kind: str, known: bool) -> None:
    """Freezing: the store stops showing news. Nobody here can renew what it shows."""
    resign(home, {kind: expire})
    (home / "registry" / "keys" / "online.pem").unlink()
    if not known:
        forget_trust(home)
    with pytest.raises(StaleTrust, match="expired") as refusal:
        registry.pull(f"{NAME}:1" if kind == "versions" else PROD)
    assert refusal.value.mend
    assert not kept(home)


def test_an_expired_state_is_renewed_only_if_it_was_verified_before(registry: Registry, home: Path) -> None:
    """A machine with the online key must not put its signature on what it has never seen."""
    resign(home, {"timestamp": expire})
    forget_trust(home)
    with pytest.raises(StaleTrust):
        registry.pull(PROD)


# -- gates --


def test_without_an_evaluation_nothing_is_promoted(registry: Registry, tmp_path: Path) -> None:
    push_second(registry, tmp_path)
    with pytest.raises(Unsigned, match="evaluation"):
        registry.approve(f"{NAME}:2", "a person", "looks right")
    with pytest.raises(Unsigned, match="evaluation"):
        registry.promote(f"{NAME}:2", "prod")
    assert registry.pull(PROD).reference == f"{NAME}:1"


def test_without_an_approval_nothing_is_promoted(registry: Registry, tmp_path: Path) -> None:
    push_second(registry, tmp_path, evaluation=PASSING)
    with pytest.raises(Unsigned, match="approval"):
        registry.promote(f"{NAME}:2", "prod")
    assert registry.pull(PROD).reference == f"{NAME}:1"


def test_a_failed_evaluation_is_not_approved_or_promoted(registry: Registry, tmp_path: Path) -> None:
    push_second(registry, tmp_path, evaluation={"verdict": "fail"})
    with pytest.raises(PolicyRefused, match="failed"):
        registry.approve(f"{NAME}:2", "a person", "never mind")
    registry.attest(f"{NAME}:2", "evaluation", PASSING)
    registry.attest(f"{NAME}:2", "approval", attestation.approval_predicate(by="me", reason="mine", at="now"))
    with pytest.raises(PolicyRefused, match="failed"):
        registry.promote(f"{NAME}:2", "prod")


def test_a_file_that_fails_the_scan_is_not_pushed(registry: Registry, home: Path, tmp_path: Path) -> None:
    before = sorted(objects(home).rglob("*"))
    folder = adapter_folder(tmp_path / "evil")
    (folder / WEIGHTS_NAME).write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(ScanRefused):
        registry.push(folder, NAME, evaluation=PASSING)
    assert sorted(objects(home).rglob("*")) == before


def test_a_revoked_adapter_is_refused_even_from_a_warm_cache(registry: Registry, home: Path) -> None:
    assert kept(home) == []
    registry.pull(PROD)
    registry.revoke(f"{NAME}:1", "it leaks")
    for reference in (PROD, f"{NAME}:1"):
        with pytest.raises(Revoked, match="it leaks"):
            registry.pull(reference)
    assert not kept(home)
    with pytest.raises(Revoked):
        registry.promote(f"{NAME}:1", "canary")


def test_a_revocation_taken_back_by_another_role_is_not_believed(registry: Registry, home: Path) -> None:
    registry.revoke(f"{NAME}:1", "it leaks")
    resign(
        home,
        {"targets": lambda signed: signed.unrecognized_fields.update({REVOKED_FIELD: {}})},
        {"targets": "online"},
    )
    with pytest.raises(BadSignature):
        registry.pull(PROD)


# -- the cache --


@pytest.mark.parametrize("name", [WEIGHTS_NAME, "adapter.json", "manifest.json"])
def test_a_damaged_cache_is_not_believed(registry: Registry, home: Path, name: str) -> None:
    folder = registry.pull(PROD).path
    good = registry.load(PROD)
    assert folder is not None
    target = folder / name
    genuine = target.read_bytes()
    overwrite(target, genuine[:-1] + bytes([genuine[-1] ^ 1]))
    assert registry.load(PROD).weights == good.weights
    assert target.read_bytes() == genuine


def test_envelopes_that_the_cache_lost_are_asked_for_again(registry: Registry, home: Path) -> None:
    registry.pull(PROD)
    (lost,) = (home / "cache" / "receipts").glob("*.statements.json")
    lost.unlink()
    assert registry.load(PROD).reference == f"{NAME}:1"


def test_a_warm_cache_does_not_miss_a_later_refusal(registry: Registry) -> None:
    registry.pull(PROD)
    registry.attest(f"{NAME}:1", "evaluation", {"verdict": "fail"})
    with pytest.raises(PolicyRefused, match="failed"):
        registry.pull(PROD)


def test_a_damaged_cache_is_emptied_when_the_store_is_damaged_too(registry: Registry, home: Path) -> None:
    folder = registry.pull(PROD).path
    assert folder is not None
    weights = one(home, f"models/*/adapter_weights/{WEIGHTS_NAME}")
    overwrite(weights, b"x" * weights.stat().st_size)
    overwrite(folder / WEIGHTS_NAME, b"x")
    with pytest.raises(DigestMismatch):
        registry.load(PROD)
    assert not kept(home)
