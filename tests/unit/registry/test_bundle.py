"""Exported statements: other people's software reads them, and verifies them with the exported keys."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from securesystemslib.dsse import Envelope
from securesystemslib.signer import CryptoSigner, SSlibKey

from fakes.trust import FakeTrust, Published, publish, signed, signer
from registry import bundle
from registry.attestation import KINDS, PREDICATE_TYPES, ROLE_OF, Kind
from registry.belief import believe
from registry.bundle import LINES_NAME, MANIFEST_NAME, MEDIA_TYPE, Bundle, export
from registry.digest import digest_bytes
from registry.errors import NotFound, UsageError
from registry.manifest import AdapterManifest
from registry.signing import envelope
from registry.signing.envelope import PublicKey

APPROVAL = {"verdict": "pass", "by": "b", "reason": "r", "at": "2026-01-01T00:00:00Z"}


class Trust:
    """Exactly these keys, for every role."""

    def __init__(self, *keys: PublicKey) -> None:
        self._keys = keys

    def keys(self, role: str) -> tuple[PublicKey, ...]:
        return self._keys


@pytest.fixture(scope="module")
def published() -> Published:
    return publish(kinds=KINDS)


@pytest.fixture(scope="module")
def exported(published: Published) -> Bundle:
    return exporting(published)


def exporting(published: Published, *more: bytes) -> Bundle:
    manifest = AdapterManifest.parse(published.manifest)
    return export(manifest, [*published.statements, *more], published.trust)


def fields(exported: Bundle, name: str) -> Any:
    return json.loads(exported.files[name])


def pem_of(exported: Bundle, role: str) -> bytes:
    (pem,) = (data for name, data in exported.files.items() if name.startswith(f"keys/{role}-"))
    return pem


def pae(payload: bytes) -> bytes:
    """What DSSE signs, as its specification says; written here without any code of the registry."""
    return b"DSSEv1 28 application/vnd.in-toto+json %d %s" % (len(payload), payload)


def test_what_an_export_holds(exported: Bundle, published: Published) -> None:
    names = set(exported.files)
    assert {f"{kind}.sigstore.json" for kind in KINDS} < names
    assert {MANIFEST_NAME, LINES_NAME, "README.md"} < names
    assert sum(name.startswith("keys/") for name in names) == 4
    assert exported.files[MANIFEST_NAME] == published.manifest
    assert exported.left_out == ()


def test_the_shape_of_a_sigstore_bundle(published: Published, repository: Path) -> None:
    """Version 0.3 as cosign writes it. Signature and key change with every key, everything else is golden."""
    key = PublicKey(keyid="k" * 64, keytype="ed25519", scheme="ed25519", public="ab" * 32)
    statement = (repository / "tests" / "golden" / "statements" / "approval-1.json").read_bytes()
    data = {
        "payload": base64.b64encode(statement).decode(),
        "payloadType": "application/vnd.in-toto+json",
        "signatures": [{"keyid": "another", "sig": "AAAA"}, {"keyid": key.keyid, "sig": "c2ln"}],
    }
    golden = repository / "tests" / "golden" / "bundle-approval-1.sigstore.json"
    assert bundle.sigstore_bundle(json.dumps(data).encode(), key) == golden.read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_the_sigstore_models_read_it(kind: str, exported: Bundle) -> None:
    from sigstore_models.bundle.v1 import Bundle as Theirs

    found = Theirs.from_json(exported.files[f"{kind}.sigstore.json"])
    assert found.media_type == MEDIA_TYPE
    assert found.verification_material.public_key is not None
    assert found.dsse_envelope is not None
    assert len(found.dsse_envelope.signatures) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_exported_key_verifies_the_signature(kind: Kind, exported: Bundle) -> None:
    """With plain ed25519 over the bytes that DSSE defines; the hint is cosign's, the sha256 of the key."""
    pem = pem_of(exported, ROLE_OF[kind])
    key = load_pem_public_key(pem)
    assert isinstance(key, ed25519.Ed25519PublicKey)
    content = fields(exported, f"{kind}.sigstore.json")
    payload = base64.b64decode(content["dsseEnvelope"]["payload"])
    (signature,) = content["dsseEnvelope"]["signatures"]
    key.verify(base64.b64decode(signature["sig"]), pae(payload))
    with pytest.raises(InvalidSignature):
        key.verify(base64.b64decode(signature["sig"]), pae(payload + b" "))
    der = base64.b64decode(b"".join(pem.splitlines()[1:-1]))
    hint = content["verificationMaterial"]["publicKey"]["hint"]
    assert base64.b64decode(hint) == hashlib.sha256(der).digest()


def test_gos_dsse_library_does_not_skip_the_signature(exported: Bundle) -> None:
    """It skips a signature whose key id is neither empty nor the SSH fingerprint that it computes itself."""
    for kind in KINDS:
        (signature,) = fields(exported, f"{kind}.sigstore.json")["dsseEnvelope"]["signatures"]
        assert signature["keyid"] == ""


@pytest.mark.parametrize("kind", KINDS)
def test_the_subject_is_the_exported_manifest(kind: str, exported: Bundle) -> None:
    """That is what cosign compares: the sha256 of the file that the command names."""
    payload = base64.b64decode(fields(exported, f"{kind}.sigstore.json")["dsseEnvelope"]["payload"])
    statement = json.loads(payload)
    assert statement["subject"][0]["digest"] == {
        "sha256": hashlib.sha256(exported.files[MANIFEST_NAME]).hexdigest()
    }
    assert f"--bundle {kind}.sigstore.json --type {statement['predicateType']} {MANIFEST_NAME}" in (
        exported.files["README.md"].decode()
    )


def test_the_in_toto_bundle_verifies_line_by_line(exported: Bundle) -> None:
    lines = exported.files[LINES_NAME].splitlines()
    seen = set()
    for line in lines:
        found = Envelope.from_dict(json.loads(line))
        (keyid,) = found.signatures
        (pem,) = (data for name, data in exported.files.items() if name.endswith(f"-{keyid[:12]}.pem"))
        found.verify([SSlibKey.from_crypto(load_pem_public_key(pem), keyid)], 1)
        seen.add(json.loads(found.payload)["predicateType"])
    assert seen == set(PREDICATE_TYPES.values())


def test_openssl_verifies_with_the_commands_of_the_readme(exported: Bundle, tmp_path: Path) -> None:
    """The printed commands, with Python in place of jq, which is not on every machine."""
    for name, data in exported.files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    readme = exported.files["README.md"].decode()
    (printf, verify) = re.findall(r"^(?:\(printf|openssl pkeyutl).*$", readme, re.MULTILINE)
    content = fields(exported, "training.sigstore.json")["dsseEnvelope"]
    (tmp_path / "payload").write_bytes(base64.b64decode(content["payload"]))
    (tmp_path / "signature").write_bytes(base64.b64decode(content["signatures"][0]["sig"]))
    run = {"cwd": tmp_path, "capture_output": True, "text": True, "check": False}
    assert subprocess.run(["sh", "-c", printf], **run).returncode == 0
    assert subprocess.run(["sh", "-c", verify], **run).returncode == 0
    (tmp_path / "payload").write_bytes(b"something else")
    assert subprocess.run(["sh", "-c", printf], **run).returncode == 0
    assert subprocess.run(["sh", "-c", verify], **run).returncode != 0


def test_every_approver_gets_a_bundle(published: Published) -> None:
    """A sigstore bundle has exactly one signature, so an envelope with two becomes two bundles."""
    trust = FakeTrust(signers={**published.trust.signers, "approver": ("approver", "another")})
    data = signed("approval", "pixelsmile:3", published.expected, APPROVAL, ["approver", "another"])
    manifest = AdapterManifest.parse(published.manifest)
    found = export(manifest, [data], trust)
    bundles = [found.files[f"approval-{number}.sigstore.json"] for number in (1, 2)]
    assert len({json.loads(data)["verificationMaterial"]["publicKey"]["hint"] for data in bundles}) == 2
    assert "approval.sigstore.json" not in found.files
    assert len(found.files[LINES_NAME].splitlines()) == 1


@pytest.mark.parametrize(
    ("curve", "digest"), [(ec.SECP256R1(), hashes.SHA256()), (ec.SECP384R1(), hashes.SHA384())]
)
def test_keys_of_a_kms_are_exported_as_they_are(
    curve: ec.EllipticCurve, digest: hashes.HashAlgorithm, published: Published
) -> None:
    """AWS, Google and Azure sign with ECDSA; the registry knows such keys by their PEM form."""
    private = CryptoSigner(ec.generate_private_key(curve))
    key = PublicKey.of(private.public_key)
    payload = envelope.unverified_payload(published.statements[0])
    manifest = AdapterManifest.parse(published.manifest)
    found = export(manifest, [envelope.sign(payload, [private])], Trust(key))
    public = load_pem_public_key(pem_of(found, "publisher"))
    assert isinstance(public, ec.EllipticCurvePublicKey)
    (signature,) = fields(found, "training.sigstore.json")["dsseEnvelope"]["signatures"]
    public.verify(base64.b64decode(signature["sig"]), pae(payload), ec.ECDSA(digest))
    # cosign verifies with sha256 whatever the curve, so only P-256 gets a command.
    assert ("cosign verify" in found.files["README.md"].decode()) == (digest.name == "sha256")


def test_a_key_without_a_pem_form_is_explained() -> None:
    with pytest.raises(UsageError, match="cannot be written as PEM"):
        bundle.public_pem(PublicKey(keyid="k", keytype="sphincs", scheme="sphincs", public="00"))


def test_what_is_not_believed_is_left_out_and_named(published: Published) -> None:
    other = digest_bytes(b"another manifest")
    forged = {
        "no key of the approver": signed("approval", "pixelsmile:3", published.expected, APPROVAL, ["thief"]),
        "no key of the evaluator": signed(
            "evaluation", "pixelsmile:3", published.expected, {"verdict": "pass"}, ["publisher"]
        ),
        "is about pixelsmile:2": signed("approval", "pixelsmile:2", other, APPROVAL),
        "carries no signature": json.dumps(
            {**json.loads(published.statements[0]), "signatures": []}
        ).encode(),
        "cannot be parsed": b"\x00",
    }
    found = exporting(published, *forged.values())
    assert len(found.left_out) == len(forged)
    for why in forged:
        assert any(why in line for line in found.left_out), why
    assert found.files == exporting(published).files


def test_a_signature_of_a_stranger_is_not_exported_beside_a_good_one(published: Published) -> None:
    data = signed("approval", "pixelsmile:3", published.expected, APPROVAL, ["approver", "thief"])
    believed, left_out = believe(published.expected, [data], published.trust)
    assert ([key.keyid for key in believed[0].keys], left_out) == ([signer("approver").public_key.keyid], ())


def test_the_export_depends_on_content_only(published: Published) -> None:
    manifest = AdapterManifest.parse(published.manifest)
    backwards = export(manifest, [*reversed(published.statements), published.statements[0]], published.trust)
    assert backwards == exporting(published)


def test_nothing_believed_is_an_error(published: Published) -> None:
    manifest = AdapterManifest.parse(published.manifest)
    with pytest.raises(NotFound, match="trusted key"):
        export(manifest, [b"{}"], published.trust)
