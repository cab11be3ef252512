"""Private keys: made by ``registry init``, loaded by URI, one scheme a vendor.

``file:<path>`` is an ed25519 key in a PKCS#8 PEM file that only its owner may read, encrypted if a
passphrase is set.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from registry.errors import NotFound, RegistryError, UsageError, shown

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner

ROOT = "root"
ONLINE = "online"
STATEMENT_ROLES = ("publisher", "scanner", "evaluator", "approver")
"""Roles whose keys sign statements. The publisher also signs versions, the approver also signs aliases."""
ROLES = (ROOT, *STATEMENT_ROLES, ONLINE)

_FILE_SCHEME = "file:"


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyRing:
    """The private keys that this machine can sign with.

    Attributes:
        folder: where ``registry init`` keeps its key files, one ``<role>.pem`` a role.
        uris: URI of the key of a role that is kept elsewhere.
        passphrase: opens encrypted key files; never printed.
    """

    folder: Path
    uris: Mapping[str, str] = field(default_factory=dict)
    passphrase: str | None = field(default=None, repr=False)

    def uri(self, role: str) -> str:
        """Where the private key of a role is looked for."""
        return self.uris.get(role) or f"{_FILE_SCHEME}{self.folder / role}.pem"

    def holds(self, role: str) -> bool:
        """Whether the key of a role is on this machine; says nothing about whether it can be opened."""
        return _path(self.uri(role)).is_file()

    def signer(self, role: str) -> CryptoSigner:
        """Opens the private key of a role.

        Raises:
            NotFound: it is not on this machine.
            UsageError: others may read the file, the passphrase is missing or wrong, or the scheme is
                unknown.
        """
        return load(self.uri(role), role, self.passphrase)

    def generate(self, role: str) -> CryptoSigner:
        """Makes the key of a role, or opens it if it exists already.

        Raises:
            UsageError: an existing key cannot be opened.
            RegistryError: the file cannot be written.
        """
        if self.holds(role):
            return self.signer(role)
        from securesystemslib.signer import CryptoSigner

        signer = CryptoSigner.generate_ed25519()
        _write_private(_path(self.uri(role)), _pem(signer, self.passphrase))
        return signer


def load(uri: str, role: str, passphrase: str | None = None) -> CryptoSigner:
    """Opens a private key by its URI.

    Raises:
        NotFound: there is no such key.
        UsageError: others may read the file, the passphrase is missing or wrong, or the scheme is unknown.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key
    from securesystemslib.signer import CryptoSigner

    path = _path(uri)
    pem = _read_private(path, role)
    try:
        key = load_pem_private_key(pem, passphrase.encode() if passphrase else None)
    except (
        TypeError
    ) as error:  # cryptography's way to say that a passphrase is missing, or that none is needed
        need = "is not encrypted, but a passphrase is set" if passphrase else "is encrypted"
        mend = "unset" if passphrase else "set"
        raise UsageError(
            f"the {role} key {path} {need}", mend=f"{mend} ADAPTER_FOUNDRY_KEY_PASSPHRASE"
        ) from error
    except ValueError as error:
        raise UsageError(
            f"the {role} key {path} cannot be opened",
            mend="check ADAPTER_FOUNDRY_KEY_PASSPHRASE and the file",
        ) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise UsageError(
            f"the {role} key {path} is not an ed25519 key", mend="use the key that `registry init` made"
        )
    return CryptoSigner(key)


def _path(uri: str) -> Path:
    if not uri.startswith(_FILE_SCHEME):
        raise UsageError(
            f"no key can be opened by {shown(uri)!r}",
            mend="keys are named by file:<path>, such as file:/etc/key.pem",
        )
    return Path(uri.removeprefix(_FILE_SCHEME).removeprefix("//")).expanduser()


def _read_private(path: Path, role: str) -> bytes:
    try:
        with path.open("rb") as stream:
            mode = stat.S_IMODE(os.fstat(stream.fileno()).st_mode)
            if mode & 0o077:
                raise UsageError(
                    f"the {role} key {path} can be read or changed by others (mode {mode:04o})",
                    mend=f"chmod 600 {path}, and replace the key if others may have read it",
                )
            return stream.read()
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
