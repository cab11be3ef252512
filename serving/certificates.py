"""Certificates for trying out content credentials: an authority of one's own, and a signer it vouches for.

C2PA refuses a signer that vouches for itself, so there are two certificates. Nobody else trusts such an
authority; for pictures that leave the house, buy a certificate for e-mail or for signing documents.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from serving.errors import UsageError

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

DAYS = 365
MAX_NAME = 64
"""Characters; more do not fit into a certificate."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """A signer's files: who checks pictures needs the authority, the service needs the other two."""

    authority: Path
    certificates: Path
    key: Path

    @property
    def setting(self) -> str:
        """The value of content_credentials."""
        return f"{self.certificates},{self.key}"


def make(folder: Path, name: str, *, days: float = DAYS) -> Made:
    """Write ``authority.pem``, ``certificates.pem`` and ``key.pem``; the authority's key is kept nowhere.

    Args:
        folder: is made where it is not there.
        name: of who signs; 1 to `MAX_NAME` characters.
        days: after which both certificates end.

    Raises:
        UsageError: one of the files is there already, or the name is too long.
    """
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    if not 1 <= len(name) <= MAX_NAME:
        raise UsageError(f"a name has 1 to {MAX_NAME} characters", "choose a shorter one")
    made = Made(
        authority=folder / "authority.pem", certificates=folder / "certificates.pem", key=folder / "key.pem"
    )
    there = [path for path in (made.authority, made.certificates, made.key) if path.exists()]
    if there:
        raise UsageError(f"{there[0]} is there already", "name another folder; no key is overwritten")
    authority, signer = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    ends = datetime.now(UTC) + timedelta(days=days)
    root = _certificate(authority, f"{name} (test authority)", authority, f"{name} (test authority)", ends)
    leaf = _certificate(signer, name, authority, f"{name} (test authority)", ends)
    folder.mkdir(parents=True, exist_ok=True)
    made.authority.write_bytes(root.public_bytes(Encoding.PEM))
    made.certificates.write_bytes(leaf.public_bytes(Encoding.PEM) + root.public_bytes(Encoding.PEM))
    private = signer.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    with os.fdopen(os.open(made.key, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
        stream.write(private)
    return made


def _certificate(
    key: EllipticCurvePrivateKey, name: str, issuer: EllipticCurvePrivateKey, by: str, ends: datetime
) -> x509.Certificate:
    """Return a certificate of ``key``; one that is issued by its own key is an authority's."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    def named(text: str) -> x509.Name:
        # C2PA shows the organisation as the signer
        return x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, text),
                x509.NameAttribute(NameOID.COMMON_NAME, text[:MAX_NAME]),
            ]
        )

    own = key is issuer
    usage = x509.KeyUsage(
        digital_signature=not own, key_cert_sign=own, crl_sign=own, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False,
        decipher_only=False,
    )  # fmt: skip
    builder = (
        x509.CertificateBuilder()
        .subject_name(named(name))
        .issuer_name(named(by))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(datetime.now(UTC), ends) - timedelta(minutes=5))
        .not_valid_after(ends)
        .add_extension(x509.BasicConstraints(ca=own, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.public_key()), critical=False
        )
    )
    if not own:
        purpose = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])
        builder = builder.add_extension(purpose, critical=False)
    return builder.sign(issuer, hashes.SHA256())
