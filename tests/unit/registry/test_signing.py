"""Envelopes count keys, not signatures; private keys stay private."""

from __future__ import annotations

import contextlib
import json
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes.trust import public_key, signer
from registry.errors import BadSignature, NotFound, UsageError
from registry.errors import Unsigned as UnsignedError
from registry.signing import envelope, signers
from registry.signing.signers import KeyRing

PAYLOAD = b'{"_type":"https://in-toto.io/Statement/v1"}'


def changed(data: bytes, change: Any) -> bytes:
    fields = json.loads(data)
    change(fields)
    return json.dumps(fields).encode()


def test_what_was_signed_comes_back_byte_for_byte() -> None:
    data = envelope.sign(PAYLOAD, [signer("a")])
    assert envelope.verify(data, [public_key("a")], 1) == PAYLOAD
    assert envelope.unverified_payload(data) == PAYLOAD
    assert envelope.signer_ids(data) == (public_key("a").keyid,)


def test_signing_twice_gives_the_same_bytes() -> None:
    assert envelope.sign(PAYLOAD, [signer("a")]) == envelope.sign(PAYLOAD, [signer("a")])


@pytest.mark.parametrize(
    ("signed_by", "trusted", "threshold", "accepted"),
    [
        (["a"], ["a"], 1, True),
        (["a"], ["b"], 1, False),
        (["a"], [], 1, False),
        (["a"], ["a", "b"], 2, False),
        (["a", "b"], ["a", "b"], 2, True),
        (["a", "b"], ["b", "c"], 2, False),
        (["a", "b", "c"], ["a", "c"], 2, True),
    ],
)
def test_a_threshold_counts_trusted_keys(
    signed_by: list[str], trusted: list[str], threshold: int, accepted: bool
) -> None:
    data = envelope.sign(PAYLOAD, [signer(name) for name in signed_by])
    keys = [public_key(name) for name in trusted]
    if accepted:
        assert envelope.verify(data, keys, threshold) == PAYLOAD
    else:
        with pytest.raises(BadSignature):
            envelope.verify(data, keys, threshold)


def test_one_key_under_two_ids_counts_once() -> None:
    """A trust root may list a key twice; whoever has it must not reach a threshold of two with it."""
    key = public_key("a")
    twin = replace(key, keyid="twin")
    signed = envelope.sign(PAYLOAD, [signer("a")])
    both = changed(signed, lambda e: e["signatures"].append(e["signatures"][0] | {"keyid": "twin"}))
    assert envelope.verify(both, [key, twin], 1) == PAYLOAD
    with pytest.raises(BadSignature, match="1 of the 2"):
        envelope.verify(both, [key, twin], 2)


@pytest.mark.parametrize(
    "change",
    [
        lambda e: e.update(payload="e30="),
        lambda e: e.update(payloadType="application/json"),
        lambda e: e.update(payload="not base64!"),
        lambda e: e.pop("signatures"),
        lambda e: e.update(signatures=[7]),
        lambda e: e["signatures"].append(e["signatures"][0]),
        lambda e: e["signatures"][0].update(sig="AAAA"),
    ],
)
def test_a_changed_envelope_is_refused(change: Any) -> None:
    data = changed(envelope.sign(PAYLOAD, [signer("a")]), change)
    with pytest.raises(BadSignature):
        envelope.verify(data, [public_key("a")], 1)


def test_an_envelope_without_signatures_is_unsigned() -> None:
    data = changed(envelope.sign(PAYLOAD, [signer("a")]), lambda e: e.update(signatures=[]))
    with pytest.raises(UnsignedError):
        envelope.verify(data, [public_key("a")], 1)


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"\xff", b"[" * 100_000, b" " * (5 << 20)])
def test_what_is_no_envelope_is_refused(data: bytes) -> None:
    with pytest.raises(BadSignature):
        envelope.verify(data, [public_key("a")], 1)


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=300))
def test_any_payload_survives_the_round_trip(payload: bytes) -> None:
    assert envelope.verify(envelope.sign(payload, [signer("a")]), [public_key("a")], 1) == payload


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_no_single_changed_byte_is_accepted_as_something_else(data: st.DataObject) -> None:
    genuine = bytearray(envelope.sign(PAYLOAD, [signer("a")]))
    at = data.draw(st.integers(0, len(genuine) - 1))
    genuine[at] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(BadSignature, UnsignedError):
        assert envelope.verify(bytes(genuine), [public_key("a")], 1) == PAYLOAD


def test_nobody_and_zero_are_programming_errors() -> None:
    with pytest.raises(ValueError, match="signer"):
        envelope.sign(PAYLOAD, [])
    with pytest.raises(ValueError, match="threshold"):
        envelope.verify(envelope.sign(PAYLOAD, [signer("a")]), [public_key("a")], 0)


# -- private keys --


def test_a_key_file_is_private_and_opens_again(tmp_path: Path) -> None:
    ring = KeyRing(folder=tmp_path / "keys")
    made = ring.generate("publisher")
    path = tmp_path / "keys" / "publisher.pem"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert ring.signer("publisher").public_key == made.public_key
    assert ring.generate("publisher").public_key == made.public_key, "an existing key is never replaced"


def test_a_passphrase_encrypts_the_file(tmp_path: Path) -> None:
    ring = KeyRing(folder=tmp_path, passphrase="correct horse")
    made = ring.generate("root")
    assert b"ENCRYPTED" in (tmp_path / "root.pem").read_bytes()
    assert ring.signer("root").public_key == made.public_key
    assert "correct horse" not in repr(ring)
    with pytest.raises(UsageError, match="ADAPTER_FOUNDRY_KEY_PASSPHRASE"):
        KeyRing(folder=tmp_path).signer("root")
    with pytest.raises(UsageError, match="cannot be opened"):
        KeyRing(folder=tmp_path, passphrase="wrong").signer("root")


def test_a_passphrase_for_a_plain_file_is_explained(tmp_path: Path) -> None:
    KeyRing(folder=tmp_path).generate("root")
    with pytest.raises(UsageError, match="not encrypted"):
        KeyRing(folder=tmp_path, passphrase="x").signer("root")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_a_key_that_others_can_read_is_not_used(tmp_path: Path, mode: int) -> None:
    ring = KeyRing(folder=tmp_path)
    ring.generate("approver")
    (tmp_path / "approver.pem").chmod(mode)
    with pytest.raises(UsageError, match="chmod 600"):
        ring.signer("approver")


def test_a_missing_key_and_a_foreign_scheme_are_explained(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="not on this machine"):
        KeyRing(folder=tmp_path).signer("approver")
    with pytest.raises(UsageError, match="file:"):
        signers.load("carrier-pigeon:coop", "approver")


def test_a_key_is_found_by_its_uri(tmp_path: Path) -> None:
    made = KeyRing(folder=tmp_path / "usb").generate("root")
    ring = KeyRing(folder=tmp_path / "keys", uris={"root": f"file:{tmp_path}/usb/root.pem"})
    assert ring.holds("root")
    assert ring.signer("root").public_key == made.public_key


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"]
)
def test_what_is_no_key_is_explained(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "root.pem"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(UsageError, match="cannot be opened"):
        KeyRing(folder=tmp_path).signer("root")
