"""Content credentials: a signed C2PA manifest in every picture, that says what made it from what.

The manifest names the uploaded picture as its parent by the sha256 of its bytes, the action (edited with a
trained model), and in an assertion of our own everything that reproduces the edit: adapter with version and
digest, base with revision, expressions, strength, seed, steps. Of the upload nothing enters but its digest:
the library never sees the file, so its EXIF, XMP, thumbnails and own manifests cannot leak, and a link in it
to a manifest elsewhere is not followed. No time-stamp authority is asked: signing touches no network.
"""

from __future__ import annotations

import importlib.metadata
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from registry.errors import shown
from serving.errors import ServingError, UsageError

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

    from serving.schema import EditResult

ASSERTION: Final = "adapter-foundry.edit"
GENERATOR: Final = "adapter-foundry"
PARENT: Final = "urn:sha256:"
_SOURCE: Final = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"
_OFFLINE: Final = {"verify_after_sign": False, "remote_manifest_fetch": False, "ocsp_fetch": False}
_MAGIC: Final = ((b"\x89PNG", "image/png"), (b"\xff\xd8\xff", "image/jpeg"), (b"RIFF", "image/webp"))
_MEND: Final = "`serving credentials make` makes a pair that works, for trying it out"


class ContentCredentials:
    """Signs manifests into pictures; safe to use from several threads.

    Args:
        certificates: PEM, the signer's first, then those that vouch for it.
        key: PEM of the signer's private key, not encrypted.

    Raises:
        UsageError: the key does not fit, the certificate is over, is no signer's by the rules of C2PA, or the
            ``provenance`` extra is not installed.
    """

    def __init__(self, certificates: bytes, key: bytes) -> None:
        try:
            import c2pa
        except ImportError as error:
            raise UsageError(
                "content_credentials is set, and c2pa is not installed",
                "install adapter-foundry[provenance], or remove the setting",
            ) from error
        leaf, private = _pair(certificates, key)
        self._expires = leaf.not_valid_after_utc
        self._c2pa = c2pa
        settings = {"version": 1, "verify": _OFFLINE, "builder": {"thumbnail": {"enabled": False}}}
        self._context = c2pa.Context(settings=c2pa.Settings.from_dict(settings))
        try:
            info = c2pa.C2paSignerInfo(_algorithm(private), certificates, _pkcs8(private), None)
            self._signer = c2pa.Signer.from_info(info)
            self._try()
        except c2pa.C2paError as error:
            raise UsageError(f"C2PA refuses the certificate: {shown(error)}", _MEND) from error

    @classmethod
    def open(cls, setting: str) -> ContentCredentials:
        """Read the files of the setting ``certificates,key``.

        Raises:
            UsageError: there are not two files, or as the class.
        """
        paths = [Path(part.strip()).expanduser() for part in setting.split(",")]
        if len(paths) != 2:
            raise UsageError(
                "content_credentials names no two files",
                "write the certificates' file, a comma, and the key's",
            )
        try:
            certificates, key = (path.read_bytes() for path in paths)
        except OSError as error:
            raise UsageError(
                f"{shown(error.filename)} cannot be read: {error.strerror}", "correct content_credentials"
            ) from error
        return cls(certificates, key)

    @property
    def expires(self) -> datetime:
        """When the signer's certificate ends."""
        return self._expires

    def sign(self, data: bytes, kind: str, result: EditResult, parent: bytes) -> bytes:
        """Return a picture with a signed manifest in it.

        Args:
            data: the file of ``result``: PNG, JPEG or WebP.
            kind: its media type.
            result: what was made.
            parent: the file that was edited.

        Raises:
            ServingError: the certificate is over; a picture without credentials is not given instead.
        """
        if datetime.now(UTC) >= self._expires:
            raise ServingError(
                f"the certificate that signs pictures ended on {self._expires:%Y-%m-%d}",
                "set content_credentials to a new one and start the service again",
            )
        height, width = result.size
        facts = {
            **result.facts(),
            # c2pa's reader takes a list of whole numbers for bytes, and shows [512, 512] as two zeros
            "size": {"height": height, "width": width},
            "parent_sha256": sha256(parent).hexdigest(),
        }
        return self._signed(data, kind, facts, media_type(parent))

    def _signed(self, data: bytes, kind: str, facts: Mapping[str, Any], parent_type: str) -> bytes:
        version = importlib.metadata.version("adapter-foundry")
        manifest = _manifest(facts, kind, parent_type, version)
        signed = io.BytesIO()
        with self._c2pa.Builder(manifest, self._context) as builder:
            builder.sign(self._signer, kind, io.BytesIO(data), signed)
        return signed.getvalue()

    def _try(self) -> None:
        """Sign and read a picture, so that a certificate that validators refuse fails at the start."""
        from PIL import Image

        picture = io.BytesIO()
        Image.new("RGB", (8, 8)).save(picture, "PNG")
        signed = self._signed(picture.getvalue(), "image/png", {"parent_sha256": "0" * 64}, "image/png")
        problems = [one for one in check(signed, "image/png").problems if "untrusted" not in one]
        if problems:
            raise self._c2pa.C2paError("; ".join(problems))


@dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """What the manifest of a picture says, and whether it holds.

    Attributes:
        state: ``trusted`` (intact, its signer is vouched for), ``valid`` (intact), ``invalid`` or ``none``.
        signer: name in the signer's certificate.
        facts: of the edit; empty where it is not one of ours.
        parent: sha256 of the file that was edited.
        problems: codes of C2PA.
    """

    state: str
    signer: str | None = None
    facts: Mapping[str, Any]
    parent: str | None = None
    problems: Sequence[str] = ()

    def as_json(self) -> dict[str, Any]:
        """The same, ready for JSON."""
        return {**asdict(self), "facts": dict(self.facts), "problems": list(self.problems)}


def check(data: bytes, kind: str, anchors: bytes = b"") -> Checked:
    """Return what a picture's manifest says; without network.

    Args:
        data: the file.
        kind: its media type.
        anchors: PEM certificates of those who vouch for signers.
    """
    import c2pa

    settings: dict[str, Any] = {"version": 1, "verify": {**_OFFLINE, "verify_trust": True}}
    if anchors:
        settings["trust"] = {"trust_anchors": anchors.decode("utf-8", "replace")}
    try:
        context = c2pa.Context(settings=c2pa.Settings.from_dict(settings))
        with c2pa.Reader(kind, io.BytesIO(data), context=context) as reader:
            report = json.loads(reader.json())
    except c2pa.C2paError.ManifestNotFound:
        return Checked(state="none", facts={})
    except c2pa.C2paError as error:
        return Checked(state="invalid", facts={}, problems=(shown(error),))
    return _checked(report)


def _checked(report: Mapping[str, Any]) -> Checked:
    active = report["manifests"][report["active_manifest"]]
    found = report.get("validation_results", {}).get("activeManifest", {}).get("failure", ())
    said = [one["data"] for one in active.get("assertions", ()) if one.get("label") == ASSERTION]
    parents = [
        str(one.get("instance_id", ""))
        for one in active.get("ingredients", ())
        if one.get("relationship") == "parentOf"
    ]
    return Checked(
        state=str(report.get("validation_state", "invalid")).lower(),
        signer=active.get("signature_info", {}).get("common_name"),
        facts=said[0] if len(said) == 1 and isinstance(said[0], dict) else {},
        parent=next((one.removeprefix(PARENT) for one in parents if one.startswith(PARENT)), None),
        problems=tuple(shown(one.get("code", "")) for one in found),
    )


def _manifest(facts: Mapping[str, Any], kind: str, parent_type: str, version: str) -> dict[str, Any]:
    agent = {"name": GENERATOR, "version": version}
    actions = [
        {"action": "c2pa.opened", "parameters": {"ingredientIds": ["parent"]}},
        {
            "action": "c2pa.edited",
            "digitalSourceType": _SOURCE,
            "softwareAgent": agent,
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    ]
    return {
        "claim_generator_info": [agent],
        "title": "edit",
        "format": kind,
        "ingredients": [
            {
                "label": "parent",
                "title": "uploaded picture",
                "format": parent_type,
                "relationship": "parentOf",
                "instance_id": PARENT + facts["parent_sha256"],
            }
        ],
        "assertions": [
            {"label": "c2pa.actions.v2", "data": {"actions": actions}},
            {"label": ASSERTION, "data": facts},
        ],
    }


def media_type(data: bytes) -> str:
    """Return what kind of picture a file is by its first bytes."""
    return next((kind for magic, kind in _MAGIC if data.startswith(magic)), "application/octet-stream")


def _pair(certificates: bytes, key: bytes) -> tuple[x509.Certificate, PrivateKeyTypes]:
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        leaf, *_ = x509.load_pem_x509_certificates(certificates)
        private = load_pem_private_key(key, password=None)
    except (ValueError, TypeError) as error:
        # cryptography raises TypeError for a key that is encrypted
        raise UsageError(
            "content_credentials: the certificates or the key are not readable PEM",
            "the first file holds the chain, the second the signer's private key, not encrypted",
        ) from error
    if private.public_key() != leaf.public_key():
        raise UsageError(
            "content_credentials: the key is not that of the first certificate",
            "put the signer's certificate first in the file of certificates",
        )
    if not leaf.not_valid_before_utc <= datetime.now(UTC) < leaf.not_valid_after_utc:
        raise UsageError(
            f"content_credentials: the certificate is valid from {leaf.not_valid_before_utc:%Y-%m-%d} to"
            f" {leaf.not_valid_after_utc:%Y-%m-%d}",
            "ask your authority for a new one",
        )
    return leaf, private


def _algorithm(key: PrivateKeyTypes) -> str:
    """Return the name that C2PA gives to a key's algorithm."""
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    if isinstance(key, ed25519.Ed25519PrivateKey):
        return "ed25519"
    if isinstance(key, rsa.RSAPrivateKey):
        return "ps256"
    curves = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}
    if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name in curves:
        return curves[key.curve.name]
    raise UsageError(
        "content_credentials: C2PA does not sign with this kind of key",
        "use a key on the curve P-256, P-384 or P-521, an Ed25519 or an RSA key",
    )


def _pkcs8(key: PrivateKeyTypes) -> bytes:
    """Return a key in the one form that the library reads."""
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
