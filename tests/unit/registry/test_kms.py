"""Keys in key services and environment variables: securesystemslib signs, errors explain themselves."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from fakes import kms as fake
from fakes.kms import FakeKms
from registry.digest import digest_bytes
from registry.errors import BadSignature, NetworkError, NotFound, RegistryError, UsageError
from registry.signing import envelope, signers
from registry.signing import keys as people
from registry.signing.authority import Authority
from registry.signing.refresh import TrustClient
from registry.signing.signers import KeyRing
from registry.storage.local import LocalObjects

PAYLOAD = b'{"_type":"https://in-toto.io/Statement/v1"}'


@pytest.fixture
def kms(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeKms]:
    with fake.running() as service:
        monkeypatch.setenv("AWS_ENDPOINT_URL_KMS", service.url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        # boto3 remembers the credentials of the first client that a process makes.
        monkeypatch.setattr("boto3.DEFAULT_SESSION", None)
        yield service


def test_a_key_in_aws_signs_statements(kms: FakeKms, tmp_path: Path) -> None:
    ring = KeyRing(folder=tmp_path, uris={"approver": kms.make("approver")})
    assert ring.holds("approver")
    signer = ring.signer("approver")
    data = envelope.sign(PAYLOAD, [signer])
    assert envelope.verify(data, [envelope.PublicKey.of(signer.public_key)], 1) == PAYLOAD
    ring.signer("approver")
    assert kms.calls == ["GetPublicKey", "Sign"], "the public half is asked for once"


def test_a_whole_registry_moves_to_aws(kms: FakeKms, tmp_path: Path) -> None:
    """Keys in files are rotated to the service; everything is signed there afterwards."""
    store = LocalObjects(tmp_path / "objects")
    ring = KeyRing(folder=tmp_path / "keys")

    def authority(keys: KeyRing) -> Authority:
        return Authority(store, keys, TrustClient(store, tmp_path / "trust"))

    authority(ring).initialise()
    for role in ("publisher", "approver", "online"):
        result = people.rotate(authority(ring), role, kms.make(role))
        assert result.kept is not None
        ring = ring.elsewhere(role, f"awskms:alias/{role}")
    mine = authority(ring)
    mine.add_version("x:1", digest_bytes(b"1"), 1)
    state = mine.set_alias("x@prod", digest_bytes(b"1"), 1, {}, None)
    assert {key.keytype for key in state.keys("approver")} == {"ecdsa"}
    assert "x@prod" in TrustClient(store, tmp_path / "trust").refresh().aliases()


def test_a_key_of_the_service_is_added_by_its_uri(kms: FakeKms, tmp_path: Path) -> None:
    store = LocalObjects(tmp_path / "objects")
    authority = Authority(store, KeyRing(folder=tmp_path / "keys"), TrustClient(store, tmp_path / "trust"))
    authority.initialise()
    people.add(authority, "approver", kms.make("second"), threshold=2)
    assert len(authority.state().keys("approver")) == 2


def test_a_key_that_was_exchanged_in_the_service_signs_nothing(kms: FakeKms, tmp_path: Path) -> None:
    """Somebody points the alias to another key: its signature would be refused by every reader."""
    ring = KeyRing(folder=tmp_path, uris={"approver": kms.make("approver")})
    ring.signer("approver")
    kms.make("approver")
    with pytest.raises(BadSignature, match="another key"):
        envelope.sign(PAYLOAD, [ring.signer("approver")])


def test_what_the_service_refuses_is_explained(kms: FakeKms, tmp_path: Path) -> None:
    ring = KeyRing(folder=tmp_path, uris={"approver": "awskms:alias/missing"})
    with pytest.raises(RegistryError, match="NotFoundException") as missing:
        ring.signer("approver")
    assert "identity may" in missing.value.mend
    ring = KeyRing(folder=tmp_path, uris={"scanner": kms.make("scanner")})
    signer = ring.signer("scanner")
    kms.denied.add("Sign")
    with pytest.raises(RegistryError, match="not authorized"):
        envelope.sign(PAYLOAD, [signer])


def test_a_service_that_is_away_is_a_network_error(
    kms: FakeKms, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_KMS", "http://127.0.0.1:9")
    with pytest.raises(NetworkError, match="awskms:alias/approver"):
        KeyRing(folder=tmp_path, uris={"approver": "awskms:alias/approver"}).signer("approver")


def test_missing_credentials_are_explained(
    kms: FakeKms, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(UsageError, match="credentials"):
        KeyRing(folder=tmp_path, uris={"approver": kms.make("approver")}).signer("approver")
    assert kms.calls == []


@pytest.mark.parametrize(
    ("uri", "extra"),
    [
        ("gcpkms:projects/p/locations/l/keyRings/r/cryptoKeys/k/cryptoKeyVersions/1", "gcpkms"),
        ("azurekms://vault.vault.azure.net/keys/k/1", "azurekms"),
        ("hsm:2?label=token", "hsm"),
        ("hv:key/1", "vault"),
        ("tkey:", "tkey"),
    ],
)
def test_a_vendor_whose_package_is_missing_is_named(uri: str, extra: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not installed") as refusal:
        KeyRing(folder=tmp_path, uris={"approver": uri}).signer("approver")
    assert f"securesystemslib[{extra}]" in refusal.value.mend


@pytest.mark.parametrize("uri", ["carrier-pigeon:coop", "gnupg:", "file2:/etc/key", "awskmss:alias/x"])
def test_a_foreign_scheme_is_explained(uri: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no key can be opened") as refusal:
        KeyRing(folder=tmp_path, uris={"approver": uri}).signer("approver")
    assert "awskms:" in refusal.value.mend


# -- environment variables --


def pem(tmp_path: Path, passphrase: str | None = None) -> str:
    ring = KeyRing(folder=tmp_path / "made", passphrase=passphrase)
    ring.generate("publisher")
    return (tmp_path / "made" / "publisher.pem").read_text()


@pytest.mark.parametrize("one_line", [True, False])
@pytest.mark.parametrize("passphrase", [None, "correct horse"])
def test_a_key_comes_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_line: bool, passphrase: str | None
) -> None:
    text = pem(tmp_path, passphrase)
    monkeypatch.setenv("PUBLISHER_KEY", text.replace("\n", "\\n") if one_line else text)
    ring = KeyRing(folder=tmp_path, uris={"publisher": "env:PUBLISHER_KEY"}, passphrase=passphrase)
    assert ring.holds("publisher")
    made = KeyRing(folder=tmp_path / "made", passphrase=passphrase).signer("publisher")
    assert ring.signer("publisher").public_key == made.public_key


def test_a_missing_variable_and_rubbish_in_it_are_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ring = KeyRing(folder=tmp_path, uris={"publisher": "env:PUBLISHER_KEY"})
    assert not ring.holds("publisher")
    with pytest.raises(NotFound, match="PUBLISHER_KEY"):
        ring.signer("publisher")
    monkeypatch.setenv("PUBLISHER_KEY", "rubbish that must not be printed")
    with pytest.raises(UsageError, match="cannot be opened") as refusal:
        ring.signer("publisher")
    assert "rubbish" not in str(refusal.value)
    assert os.environ["PUBLISHER_KEY"]


def test_kinds_of_keys_that_are_not_used_are_refused(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric import dsa, ec, rsa
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
        PublicFormat,
    )

    weak = [
        rsa.generate_private_key(65537, 1024),
        dsa.generate_private_key(1024),
        ec.generate_private_key(ec.SECP256K1()),
    ]
    for number, key in enumerate(weak):
        path = tmp_path / f"{number}.pem"
        path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        path.chmod(0o600)
        with pytest.raises(UsageError, match="cannot sign here"):
            signers.load(f"file:{path}", "publisher")
        public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        with pytest.raises(UsageError, match="no public key"):
            signers.public_key(public)


def test_public_keys_survive_the_way_to_the_root(tmp_path: Path) -> None:
    made = people.make(KeyRing(folder=tmp_path), "approver")
    assert signers.public_key(signers.pem_of(made).encode()) == made
    with pytest.raises(UsageError, match="no public key"):
        signers.public_key(b"rubbish")
