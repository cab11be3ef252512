"""Keys that never leave a key service: AWS, Google and Azure KMS, PKCS#11 tokens, HashiCorp Vault, TKey.

securesystemslib signs; this module names its schemes, finds a key's public half once, and turns what vendors
raise into the registry's errors. Only imported when such a key is used.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final
from urllib.parse import parse_qsl, urlsplit

from securesystemslib.exceptions import UnsupportedLibraryError
from securesystemslib.signer import (
    SIGNER_FOR_URI_SCHEME,
    AWSSigner,
    AzureSigner,
    GCPSigner,
    HSMSigner,
    Key,
    SecretsHandler,
    Signature,
    Signer,
    SSlibKey,
    TKeySigner,
    VaultSigner,
)

from registry.errors import BadSignature, NetworkError, RegistryError, UsageError, shown

EXTRAS: Final = {
    "awskms": "awskms",
    "gcpkms": "gcpkms",
    "azurekms": "azurekms",
    "hsm": "hsm",
    "hv": "vault",
    "tkey": "tkey",
}
"""URI scheme -> extra of securesystemslib that brings the vendor's package."""

# Foreign error classes by name: their packages are optional, so they cannot be imported here.
_UNREACHABLE: Final = {
    "ConnectTimeoutError",
    "ConnectionClosedError",
    "ConnectionError",
    "DeadlineExceeded",
    "EndpointConnectionError",
    "ReadTimeoutError",
    "RetryError",
    "ServiceRequestError",
    "ServiceResponseError",
    "ServiceUnavailable",
    "Timeout",
}
_UNCONFIGURED: Final = {
    "ClientAuthenticationError",
    "CredentialUnavailableError",
    "DefaultCredentialsError",
    "NoCredentialsError",
    "NoRegionError",
    "PartialCredentialsError",
    "ProfileNotFound",
}


class KmsSigner(Signer):  # type: ignore[misc]  # securesystemslib ships no types
    """A key service's signer whose errors explain themselves and whose signatures are checked at once.

    Args:
        signer: securesystemslib's signer.
        role: for messages.
        uri: for messages.
    """

    def __init__(self, signer: Signer, role: str, uri: str) -> None:
        self._signer = signer
        self._role = role
        self._uri = uri

    @property
    def public_key(self) -> Key:
        """The public half."""
        return self._signer.public_key

    @classmethod
    def from_priv_key_uri(
        cls, priv_key_uri: str, public_key: Key, secrets_handler: SecretsHandler | None = None
    ) -> KmsSigner:
        """See securesystemslib; raises the registry's errors."""
        with _explained("", priv_key_uri):
            signer = Signer.from_priv_key_uri(priv_key_uri, public_key, secrets_handler)
        return cls(signer, "", priv_key_uri)

    def sign(self, payload: bytes) -> Signature:
        """Signs, and makes sure that the key is still the one that the public half belongs to.

        Raises:
            BadSignature: it is another key.
            RegistryError: the service refuses or does not answer.
        """
        from securesystemslib.exceptions import UnverifiedSignatureError

        with _explained(self._role, self._uri):
            signature = self._signer.sign(payload)
        try:
            self.public_key.verify_signature(signature, payload)
        except UnverifiedSignatureError as error:
            raise BadSignature(
                f"{shown(self._uri)} signs with another key than the one known for it",
                "a rotated key is a new key: add it with `registry trust add`, under its own URI",
            ) from error
        return signature


def open_key(uri: str, role: str, memory: Path, secret: str | None) -> Signer:
    """Open the key of a role in a key service.

    Args:
        uri: the key, in one of securesystemslib's schemes.
        role: for messages.
        memory: file that keeps the public half, so that the service is asked for it once.
        secret: PIN or passphrase, where the service needs one.

    Raises:
        UsageError: the scheme is unknown, or its package or configuration is missing.
        NetworkError: the service does not answer.
        RegistryError: the service refuses.
    """
    check_scheme(uri)
    public = _remembered(uri, memory)
    if public is None:
        uri_of_service, public = import_key(uri, role, secret)
        _remember(uri, uri_of_service, public, memory)
    with _explained(role, uri):
        found = Signer.from_priv_key_uri(uri, public, _handler(secret))
    return KmsSigner(found, role, uri)


def import_key(uri: str, role: str, secret: str | None) -> tuple[str, SSlibKey]:
    """Ask a key service for the public half of a key.

    Raises:
        RegistryError: as `open_key`.
    """
    check_scheme(uri)
    parts = urlsplit(uri)
    importers: dict[str, Callable[[], tuple[str, SSlibKey]]] = {
        "awskms": lambda: AWSSigner.import_(uri.removeprefix("awskms:")),
        "gcpkms": lambda: GCPSigner.import_(parts.path),
        "azurekms": lambda: AzureSigner.import_(parts.netloc.partition(".")[0], parts.path.split("/")[2]),
        "hsm": lambda: HSMSigner.import_(
            int(parts.path) if parts.path else None,
            dict(parse_qsl(parts.query)).get("label"),
            _handler(secret),
        ),
        "hv": lambda: VaultSigner.import_(parts.path.partition("/")[0]),
        "tkey": lambda: TKeySigner.import_(parts.path or None),
    }
    with _explained(role, uri):
        return importers[parts.scheme]()


def check_scheme(uri: str) -> str:
    """Return the scheme of a key service's URI.

    Raises:
        UsageError: securesystemslib has none of that name.
    """
    scheme = uri.partition(":")[0]
    if scheme not in EXTRAS or scheme not in SIGNER_FOR_URI_SCHEME:
        raise UsageError(
            f"no key can be opened by {shown(uri)!r}",
            f"keys are named by file:<path>, env:<VARIABLE> or one of {', '.join(f'{s}:' for s in EXTRAS)}",
        )
    return scheme


def _handler(secret: str | None) -> SecretsHandler:
    def answer(what: str) -> str:
        if secret is None:
            raise UsageError(f"the key asks for its {shown(what)}", "set ADAPTER_FOUNDRY_KEY_PASSPHRASE")
        return secret

    return answer


def _remembered(uri: str, memory: Path) -> SSlibKey | None:
    try:
        known = json.loads(memory.read_bytes())
        return SSlibKey.from_dict(known["keyid"], known["key"]) if known["uri"] == uri else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _remember(uri: str, exact: str, public: SSlibKey, memory: Path) -> None:
    if urlsplit(exact).path.rstrip("/") != urlsplit(uri).path.rstrip("/"):
        # Azure and Vault name one version of a key; a URI without it would change its meaning one day.
        raise UsageError(f"{shown(uri)} names no version of the key", f"name it exactly: {exact}")
    memory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    memory.write_text(json.dumps({"uri": uri, "keyid": public.keyid, "key": public.to_dict()}))


@contextmanager
def _explained(role: str, uri: str) -> Iterator[None]:
    """Turn whatever a vendor's package raises into an explained error; there is no list of what it may be."""
    what = f"the {role} key {shown(uri)}" if role else f"the key {shown(uri)}"
    try:
        yield
    except RegistryError:
        raise
    except UnsupportedLibraryError as error:
        extra = EXTRAS[uri.partition(":")[0]]
        raise UsageError(
            f"{what} needs a package that is not installed: {error}",
            f"pip install 'securesystemslib[{extra}]'",
        ) from error
    except Exception as error:
        names = {kind.__name__ for kind in type(error).__mro__}
        said = shown(error)
        if names & _UNREACHABLE:
            raise NetworkError(f"{what} cannot be used: {said}", "is the service reachable?") from error
        if names & _UNCONFIGURED:
            raise UsageError(
                f"{what} cannot be used: {said}", "configure the vendor's credentials and region"
            ) from error
        raise RegistryError(
            f"{what} cannot be used: {said}",
            "check the key's name, and that this identity may read its public half and sign with it",
        ) from error
