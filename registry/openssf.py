"""OpenSSF model signing: an adapter's folder with a signature that others verify with their own tool.

The signature is made by the ``model_signing`` library (extra ``openssf``), wrapped strictly, because the
library is lenient where a registry is not:

- It signs whatever lies in a folder, so the folder is compared with the manifest, and so are the digests that
  were signed: between admission and signing nobody can slip a file in.
- It leaves ``.git*`` out of signature and verification; an adapter folder has no such files, and is refused
  if it has.
- It does not bind a name: a renamed folder verifies. The signed folder therefore holds the manifest, which
  says name and version; whoever verifies has to read it.
- It knows ECDSA keys on the NIST curves only, and fails with a traceback otherwise; such keys are explained.
- With certificates it accepts expired ones and those of web servers, so that only plain keys are offered.
"""

from __future__ import annotations

import base64
import json
import os
import stat
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from registry.errors import BadSignature, DigestMismatch, RegistryError, UsageError, shown
from registry.signing import signers

if TYPE_CHECKING:
    from registry.manifest import AdapterManifest

SIGNATURE_NAME: Final = "model.sig"
KEY_NAME: Final = "publisher.pem"
MANIFEST_NAME: Final = "manifest.json"

_SCHEMES: Final = ("ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521")
_PREDICATE_TYPE: Final = "https://model_signing/signature/v1.0"
_MAX_SIGNATURE_BYTES: Final = 1 << 20
_MAKE_KEY: Final = "openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out model-signing.pem"


def folder_name(manifest: AdapterManifest) -> str:
    """Return the name of the signed folder; it becomes the subject of the signature."""
    return f"{manifest.name}-{manifest.version}"


def sign(out: Path, manifest: AdapterManifest, key: str, passphrase: str | None = None) -> None:
    """Sign the folder of an adapter that was admitted, and verify the signature as others will.

    Args:
        out: holds the folder `folder_name` with the adapter's files and its manifest; gets the signature, the
            public key and a README.
        manifest: the manifest of the adapter.
        key: URI of an ECDSA private key in a file, ``file:<path>``.
        passphrase: opens an encrypted key.

    Raises:
        UsageError: the key is not of a kind that the format knows, or the extra is not installed.
        DigestMismatch: the folder does not hold exactly the adapter.
        BadSignature: what was written does not verify.
        RegistryError: the library failed.
    """
    public = public_key(key, passphrase)
    signing, hashing = _library("signing"), _library("hashing")
    folder = out / folder_name(manifest)
    _check_folder(folder, manifest)
    config = signing.Config().use_elliptic_key_signer(
        private_key=signers.file_of(key), password=passphrase.encode() if passphrase else None
    )
    try:
        config.set_hashing_config(_hashing(hashing)).sign(folder, out / SIGNATURE_NAME)
    except (OSError, ValueError, TypeError) as error:
        raise RegistryError(f"the folder cannot be signed: {shown(error)}", "check the key file") from error
    (out / KEY_NAME).write_bytes(public)
    verify(out, manifest)
    text = (resources.files("registry") / "data" / "openssf.md").read_text("utf-8")
    (out / "README.md").write_text(
        text.format(
            folder=folder_name(manifest),
            name=f"{manifest.name}:{manifest.version}",
            digest=manifest.digest,
            signature=SIGNATURE_NAME,
            key=KEY_NAME,
        ),
        "utf-8",
    )


def verify(out: Path, manifest: AdapterManifest, public_key: Path | None = None) -> None:
    """Verify a signed folder by the library, and that what is signed is exactly this adapter.

    Args:
        out: holds the folder and its signature.
        manifest: what the folder has to hold.
        public_key: the key in PEM; None takes the one beside the signature, which is only good for a
            signature that was just made.

    Raises:
        BadSignature: the signature does not hold, or signs something else.
        DigestMismatch: the folder does not hold exactly the adapter.
    """
    verifying, hashing = _library("verifying"), _library("hashing")
    folder, signature = out / folder_name(manifest), out / SIGNATURE_NAME
    _check_folder(folder, manifest)
    mend = "somebody changed the folder or the signature; export it again"
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=public_key or out / KEY_NAME)
        config.set_hashing_config(_hashing(hashing)).verify(folder, signature)
        payload = _payload(signature)
    # The library raises whatever its parsers and cryptography raise.
    except Exception as error:
        reason = shown(error) or type(error).__name__
        raise BadSignature(f"the OpenSSF signature does not hold: {reason}", mend) from error
    if _signed(payload) != _wanted(manifest):
        raise BadSignature(f"the OpenSSF signature is not about {manifest.name}:{manifest.version}", mend)


def public_key(key: str, passphrase: str | None) -> bytes:
    """Return the public half of a private key, in PEM.

    Raises:
        NotFound: there is no such file.
        UsageError: the key is not of a kind that the format knows.
    """
    if not key.startswith("file:"):
        raise UsageError(
            f"{shown(key)} is no key that OpenSSF model signing can use",
            f"give an ECDSA key in a file, --key file:<path>; this makes one: {_MAKE_KEY}",
        )
    found = signers.load(key, "model-signing", passphrase).public_key
    if found.scheme not in _SCHEMES:
        raise UsageError(
            f"{shown(key)} is an {found.keytype} key; OpenSSF model signing knows ECDSA keys on P-256, P-384 "
            "and P-521 only",
            f"make a key for it: {_MAKE_KEY}; `openssl pkey -pubout -in model-signing.pem` prints its public "
            "half, to be published",
        )
    return str(found.keyval["public"]).encode()


def _library(name: str) -> Any:
    try:
        import importlib

        return importlib.import_module(f"model_signing.{name}")
    except ImportError as error:
        raise UsageError(
            f"OpenSSF model signing is not installed ({shown(error)})",
            "pip install 'adapter-foundry[openssf]'",
        ) from None


def _hashing(hashing: Any) -> Any:
    """Every file, by sha256, no links; nothing is left out."""
    config = hashing.Config().use_file_serialization(hashing_algorithm="sha256", allow_symlinks=False)
    return config.set_ignored_paths(paths=(), ignore_git_paths=False)


def _check_folder(folder: Path, manifest: AdapterManifest) -> None:
    """Compare the names and sizes in the folder with the manifest; the signature compares the bytes."""
    wanted = {entry.path: entry.size for entry in manifest.files}
    wanted[MANIFEST_NAME] = len(manifest.canonical_bytes())
    found = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            status = entry.stat(follow_symlinks=False)
            found[entry.name] = status.st_size if stat.S_ISREG(status.st_mode) else -1
    if found != wanted:
        odd = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        raise DigestMismatch(
            f"the folder does not hold exactly the adapter: {', '.join(map(shown, odd))}",
            "export it again into a new folder",
        )


def _payload(signature: Path) -> Any:
    with signature.open("rb") as stream:
        bundle = json.loads(stream.read(_MAX_SIGNATURE_BYTES))
    return json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"], validate=True))


def _signed(statement: Any) -> dict[str, str] | None:
    """Return the digests that a signature is about; None for any other form of it."""
    try:
        predicate = statement["predicate"]
        if statement["predicateType"] != _PREDICATE_TYPE or predicate["serialization"]["method"] != "files":
            return None
        if any(found["algorithm"] != "sha256" for found in predicate["resources"]):
            return None
        return {found["name"]: f"sha256:{found['digest']}" for found in predicate["resources"]}
    except (KeyError, TypeError):
        return None


def _wanted(manifest: AdapterManifest) -> dict[str, str]:
    return {
        MANIFEST_NAME: str(manifest.digest),
        **{entry.path: str(entry.sha256) for entry in manifest.files},
    }
