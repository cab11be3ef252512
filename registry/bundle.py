"""Statements for other people's tools: sigstore bundles, an in-toto bundle, keys and a README.

Nothing is signed anew. A sigstore bundle (v0.3) is the same DSSE envelope with one of its signatures and a
hint at the key, so that ``cosign verify-blob-attestation --key`` and the sigstore libraries verify what the
registry's own keys signed; the in-toto bundle holds the envelopes as the registry keeps them, one a line. The
subject of every statement is the manifest, which lies beside them.

| file                       | holds                                                       |
| -------------------------- | ----------------------------------------------------------- |
| manifest.json              | the subject: its sha256 is what every statement names       |
| <kind>.sigstore.json       | a statement with one signature (a number, if there are more)|
| manifest.json.intoto.jsonl | every envelope, one a line                                  |
| keys/<role>-<key>.pem      | public keys, as far as they signed one of the statements    |
| README.md                  | commands that verify all of it                              |
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any, Final

from registry.attestation import KINDS, PREDICATE_TYPES, ROLE_OF, Kind
from registry.belief import Keys, believe
from registry.errors import NotFound, UsageError, shown
from registry.signing import signers

if TYPE_CHECKING:
    from registry.manifest import AdapterManifest
    from registry.signing.envelope import PublicKey

MEDIA_TYPE: Final = "application/vnd.dev.sigstore.bundle.v0.3+json"
MANIFEST_NAME: Final = "manifest.json"
LINES_NAME: Final = f"{MANIFEST_NAME}.intoto.jsonl"

# What cosign and the sigstore libraries verify as they are: for these the scheme of the registry is theirs.
_COSIGN_SCHEMES: Final = frozenset({"ed25519", "ecdsa-sha2-nistp256"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Bundle:
    """An export: the content of each file, by its path, and why statements were left out."""

    files: Mapping[str, bytes]
    left_out: tuple[str, ...]


def public_pem(key: PublicKey) -> bytes:
    """Return a public key as PEM (SubjectPublicKeyInfo), the form that openssl and cosign read.

    Raises:
        UsageError: the key is of a kind that has no such form here.
    """
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

    try:
        found = load_pem_public_key(signers.pem_of(key.sslib()).encode())
        return bytes(found.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    except ValueError:
        raise UsageError(
            f"the {shown(key.keytype)} key {shown(key.keyid[:12])} cannot be written as PEM",
            "export the statements of the other roles with their own keys",
        ) from None


def sigstore_bundle(data: bytes, key: PublicKey) -> bytes:
    """Return a sigstore bundle v0.3 of an envelope with the signature of one key.

    The specification allows exactly one signature. Its key id is left empty: Go's DSSE library, which cosign
    uses, skips a signature whose key id is not the one that it computes itself. The hint is what cosign
    writes, the base64 of the sha256 of the key's DER form.

    Args:
        data: an envelope that ``key`` signed.
        key: the key.
    """
    fields = json.loads(data)
    signature = next(found["sig"] for found in fields["signatures"] if found["keyid"] == key.keyid)
    content = {
        "mediaType": MEDIA_TYPE,
        "verificationMaterial": {"publicKey": {"hint": _hint(key)}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": fields["payload"],
            "payloadType": fields["payloadType"],
            "signatures": [{"sig": signature, "keyid": ""}],
        },
    }
    return _json(content)


def export(manifest: AdapterManifest, envelopes: Iterable[bytes], trust: Keys) -> Bundle:
    """Return everything that others need to verify what is signed about an adapter.

    Args:
        manifest: the adapter.
        envelopes: the statements about it as the store keeps them; hostile bytes.
        trust: the keys that count.

    Raises:
        NotFound: nothing that is signed about it is believed.
    """
    believed, left_out = believe(manifest.digest, envelopes, trust)
    if not believed:
        raise NotFound(
            f"there is no statement about {manifest.name}:{manifest.version} that a trusted key signed",
            "`registry show --attestations` tells why each is not believed",
        )
    files: dict[str, bytes] = {MANIFEST_NAME: manifest.canonical_bytes()}
    rows: list[_Row] = []
    for kind in KINDS:
        pairs = [(found, key) for found in believed if found.statement.kind == kind for key in found.keys]
        for number, (found, key) in enumerate(pairs, start=1):
            name = f"{kind}.sigstore.json" if len(pairs) == 1 else f"{kind}-{number}.sigstore.json"
            row = _Row(kind=kind, name=name, pem=f"keys/{found.role}-{key.keyid[:12]}.pem", key=key)
            files[name] = sigstore_bundle(found.envelope, key)
            files[row.pem] = public_pem(key)
            rows.append(row)
    files[LINES_NAME] = b"".join(_line(found.envelope) for found in believed)
    files["README.md"] = _readme(manifest, rows).encode()
    return Bundle(files=files, left_out=left_out)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Row:
    kind: Kind
    name: str
    pem: str
    key: PublicKey


def _readme(manifest: AdapterManifest, rows: Sequence[_Row]) -> str:
    keys = {row.pem: row for row in rows}
    commands = "\n".join(
        f"cosign verify-blob-attestation --insecure-ignore-tlog --key {row.pem} \\\n"
        f"  --bundle {row.name} --type {PREDICATE_TYPES[row.kind]} {MANIFEST_NAME}"
        for row in rows
        if row.key.scheme in _COSIGN_SCHEMES
    )
    others = sorted({row.key.scheme for row in rows} - _COSIGN_SCHEMES)
    limits = f"\nSignatures of the kind {', '.join(others)} need the in-toto way below.\n" if others else ""
    first = next((row for row in rows if row.key.scheme == "ed25519"), rows[0])
    text = (resources.files("registry") / "data" / "bundle.md").read_text("utf-8")
    return text.format(
        name=f"{manifest.name}:{manifest.version}",
        digest=manifest.digest,
        hex=manifest.digest.hex,
        keys="\n".join(
            f"- `{pem}`: {ROLE_OF[row.kind]}\n  key id {row.key.keyid}\n"
            f"  sha256 of the key (DER) {hashlib.sha256(_der(row.key)).hexdigest()}"
            for pem, row in keys.items()
        ),
        cosign=commands,
        limits=limits,
        pem=first.pem,
        bundle=first.name,
        role=ROLE_OF[first.kind],
    )


def _der(key: PublicKey) -> bytes:
    lines = public_pem(key).decode().splitlines()
    return base64.b64decode("".join(line for line in lines if not line.startswith("-----")))


def _hint(key: PublicKey) -> str:
    return base64.b64encode(hashlib.sha256(_der(key)).digest()).decode()


def _line(data: bytes) -> bytes:
    """One envelope in one line, whatever line breaks the store's bytes have between their fields."""
    return json.dumps(json.loads(data), sort_keys=True, separators=(",", ":")).encode() + b"\n"


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=2).encode() + b"\n"
