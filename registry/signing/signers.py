"""Private keys, opened by URI.

==================  =======================================================================================
``file:<path>``     PKCS#8 PEM that only its owner may read, encrypted if a passphrase is set
``env:<VARIABLE>``  the same PEM in an environment variable, for build machines
``awskms:`` …       a key service of securesystemslib, see ``registry.signing.kms``
==================  =======================================================================================

``registry init`` makes ed25519 keys in files; ECDSA keys that others made are good, too.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from registry.errors import NotFound, RegistryError, UsageError

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner, Signer, SSlibKey

ROOT = "root"
ONLINE = "online"
STATEMENT_ROLES = ("publisher", "scanner", "evaluator", "approver")
"""Roles whose keys sign statements. The publisher also signs versions, the approver also signs aliases."""
ROLES = (ROOT, *STATEMENT_ROLES, ONLINE)

_FILE, _ENV = "file:", "env:"


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyRing:
    """The private keys that this machine can sign with.

    Attributes:
        folder: where ``registry init`` keeps its key files, one ``<role>.pem`` a role.
        uris: URI of the key of a role that is kept elsewhere.
        passphrase: opens encrypted keys; never printed.
    """

    folder: Path
    uris: Mapping[str, str] = field(default_factory=dict)
    passphrase: str | None = field(default=None, repr=False)

    def uri(self, role: str) -> str:
        """Where the private key of a role is looked for."""
        return self.uris.get(role) or f"{_FILE}{self.folder / role}.pem"

    def holds(self, role: str) -> bool:
        """Whether the key of a role is on this machine; says nothing about whether it can be opened."""
        return self._holds(self.uri(role))

    def signer(self, role: str) -> Signer:
        """Opens the private key of a role.

        Raises:
            NotFound: it is not on this machine.
            UsageError: others may read the file, the passphrase is missing or wrong, or the scheme is
                unknown.
            RegistryError: a key service refuses or does not answer.
        """
        return self.open(self.uri(role), role)

    def open(self, uri: str, role: str) -> Signer:
        """Opens any private key by its URI, for a role; raises as `signer`."""
        if uri.startswith((_FILE, _ENV)):
            return load(uri, role, self.passphrase)
        from registry.signing import kms

        return kms.open_key(uri, role, self.folder / f"{role}.public.json", self.passphrase)

    def generate(self, role: str) -> Signer:
        """Makes the key of a role, or opens it if it exists already.

        Raises:
            UsageError: an existing key cannot be opened.
            RegistryError: the file cannot be written.
        """
        if self.holds(role) or not self.uri(role).startswith(_FILE):
            return self.signer(role)
        from securesystemslib.signer import CryptoSigner

        signer = CryptoSigner.generate_ed25519()
        _write_private(file_of(self.uri(role)), _pem(signer, self.passphrase))
        return signer

    def file(self, role: str) -> Path:
        """The key file of a role: the one that its URI names, or where one would be."""
        uri = self.uri(role)
        return file_of(uri) if uri.startswith(_FILE) else self.folder / f"{role}.pem"

    def elsewhere(self, role: str, uri: str) -> KeyRing:
        """The same keys, but that of a role by another URI."""
        return replace(self, uris={**self.uris, role: uri})

    def _holds(self, uri: str) -> bool:
        if uri.startswith(_ENV):
            return uri.removeprefix(_ENV) in os.environ
        return file_of(uri).is_file() if uri.startswith(_FILE) else True


def load(uri: str, role: str, passphrase: str | None = None) -> CryptoSigner:
    """Opens a private key in a file or an environment variable.

    Raises:
        NotFound: there is no such key.
        UsageError: others may read the file, the passphrase is missing or wrong, or it is no key.
    """
    from cryptography.hazmat.primitives.serialization import load_pem_private_key
    from securesystemslib.signer import CryptoSigner

    pem, where = _read_variable(uri, role) if uri.startswith(_ENV) else _read_private(file_of(uri), role)
    try:
        key = load_pem_private_key(pem, passphrase.encode() if passphrase else None)
    # TypeError is cryptography's way to say that a passphrase is missing, or that none is needed.
    except TypeError as error:
        need = "is not encrypted, but a passphrase is set" if passphrase else "is encrypted"
        mend = "unset" if passphrase else "set"
        raise UsageError(
            f"the {role} key {where} {need}", mend=f"{mend} ADAPTER_FOUNDRY_KEY_PASSPHRASE"
        ) from error
    except ValueError as error:
        raise UsageError(
            f"the {role} key {where} cannot be opened",
            mend="check ADAPTER_FOUNDRY_KEY_PASSPHRASE and the key, which is a PKCS#8 PEM",
        ) from error
    try:
        signer = CryptoSigner(key)
        check_strength(signer.public_key)
    except ValueError as error:
        raise UsageError(
            f"the {role} key {where} is of a kind that cannot sign here: {error}",
            mend="use an ed25519 key or an ECDSA key on P-256, P-384 or P-521",
        ) from error
    return signer


def public_key(pem: bytes) -> SSlibKey:
    """Reads a public key that somebody sent as a PEM file.

    Raises:
        UsageError: it is none, or of a kind that cannot be used.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_public_key
    from securesystemslib.signer import SSlibKey

    if b"PRIVATE KEY" in pem:
        raise UsageError(
            "this is a private key, which never leaves its machine",
            mend="ask for the public half: `registry trust key ROLE` prints it where the key is kept",
        )
    try:
        key = SSlibKey.from_crypto(load_pem_public_key(pem))
        check_strength(key)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UsageError(
            f"this is no public key that can be used: {error}",
            mend="give a PEM of an ed25519 key or an ECDSA key on P-256, P-384 or P-521",
        ) from error
    return key


def check_strength(key: SSlibKey) -> None:
    """Refuse kinds of keys that are easy to get wrong; RSA is only for key services.

    Raises:
        ValueError: of another kind than ed25519 and ECDSA.
    """
    if key.keytype not in ("ed25519", "ecdsa"):
        raise ValueError(f"{key.keytype} keys are not used here")


def pem_of(key: SSlibKey) -> str:
    """A public key as PEM, to be sent to who signs the root."""
    if key.keytype != "ed25519":
        return str(key.keyval["public"])
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(key.keyval["public"]))
    return public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def file_of(uri: str) -> Path:
    """The path in a ``file:`` URI.

    Raises:
        UsageError: it is another kind of URI.
    """
    if not uri.startswith(_FILE):
        raise UsageError(f"{uri} is not in a file", mend="name a key file by file:<path>")
    return Path(uri.removeprefix(_FILE).removeprefix("//")).expanduser()


def is_uri(text: str) -> bool:
    """Whether text names a private key by URI rather than a file with a public key."""
    scheme, colon, _ = text.partition(":")
    return bool(colon) and scheme.isalnum() and "/" not in scheme


def _read_variable(uri: str, role: str) -> tuple[bytes, str]:
    name = uri.removeprefix(_ENV)
    pem = os.environ.get(name)
    if pem is None:
        raise NotFound(
            f"the {role} key is not in this environment (${name})",
            mend=f"set {name} to the key's PEM, or correct its URI in the settings",
        )
    # Build systems often keep a secret in one line.
    return pem.replace("\\n", "\n").encode(), f"${name}"


def _read_private(path: Path, role: str) -> tuple[bytes, str]:
    try:
        with path.open("rb") as stream:
            mode = stat.S_IMODE(os.fstat(stream.fileno()).st_mode)
            if mode & 0o077:
                raise UsageError(
                    f"the {role} key {path} can be read or changed by others (mode {mode:04o})",
                    mend=f"chmod 600 {path}, and replace the key if others may have read it",
                )
            return stream.read(), str(path)
    except FileNotFoundError:
        raise NotFound(
            f"the {role} key is not on this machine ({path})",
            mend=f"do this where the {role} key is kept; `registry init` makes the keys of a new registry",
        ) from None
    except OSError as error:
        raise RegistryError(
            f"the {role} key {path} cannot be read: {error.strerror}", mend="check the file"
        ) from error


def _pem(signer: CryptoSigner, passphrase: str | None) -> bytes:
    if not passphrase:
        return bytes(signer.private_bytes)
    from cryptography.hazmat.primitives.serialization import (
        BestAvailableEncryption,
        Encoding,
        PrivateFormat,
        load_pem_private_key,
    )

    key = load_pem_private_key(signer.private_bytes, None)
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(passphrase.encode()))


def _write_private(path: Path, pem: bytes) -> None:
    """Writes a file that is private from its first moment on; an existing file is never overwritten."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
            stream.write(pem)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise RegistryError(
            f"the key file {path} cannot be written: {error.strerror}", mend="check the folder"
        ) from error
