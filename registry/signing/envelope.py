"""DSSE envelopes around in-toto statements: sign, and verify against a threshold of a role's keys.

The envelope format is `DSSE <https://github.com/secure-systems-lab/dsse>`_ through securesystemslib. Bytes
in, bytes out: what a caller gets from `verify` is exactly the payload whose signatures were checked, so
nothing is parsed before it is trusted.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from registry.errors import BadSignature, Unsigned, shown

if TYPE_CHECKING:
    from securesystemslib.dsse import Envelope as SslibEnvelope
    from securesystemslib.signer import Signer, SSlibKey

PAYLOAD_TYPE = "application/vnd.in-toto+json"

MAX_ENVELOPE_BYTES = 4 * 1024 * 1024
"""Upper bound of one envelope; an evaluation statement of a full suite stays far below it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PublicKey:
    """A public key that a trust root lists for a role.

    Attributes:
        keyid: name of the key inside signatures (no security meaning of its own).
        keytype: securesystemslib key type, such as ``ed25519``.
        scheme: signature scheme, such as ``ed25519``.
        public: the key itself (hex for ed25519, PEM for other kinds).
    """

    keyid: str
    keytype: str
    scheme: str
    public: str

    @classmethod
    def of(cls, key: SSlibKey) -> PublicKey:
        """The same key as a plain value."""
        return cls(keyid=key.keyid, keytype=key.keytype, scheme=key.scheme, public=str(key.keyval["public"]))

    def sslib(self) -> SSlibKey:
        """The securesystemslib object that can verify signatures."""
        from securesystemslib.signer import SSlibKey

        return SSlibKey(self.keyid, self.keytype, self.scheme, {"public": self.public})


def sign(payload: bytes, signers: Iterable[Signer]) -> bytes:
    """Wraps a statement in an envelope that every signer signs.

    Args:
        payload: the statement, already serialised; signed byte for byte.
        signers: at least one signer.

    Returns:
        The envelope as compact JSON with sorted keys.

    Raises:
        ValueError: no signer was given.
    """
    from securesystemslib.dsse import Envelope

    envelope = Envelope(payload, PAYLOAD_TYPE, {})
    for signer in signers:
        envelope.sign(signer)
    if not envelope.signatures:
        raise ValueError("an envelope needs at least one signer")
    return json.dumps(envelope.to_dict(), sort_keys=True, separators=(",", ":")).encode()


def verified(envelope: bytes, keys: Sequence[PublicKey]) -> tuple[bytes, frozenset[str]]:
    """Returns the payload and which of `keys` signed it; at least one must have.

    A key is named by what it is, however often it signed and under however many key ids a trust root lists
    it, so that the answers for several envelopes can be counted together.

    Args:
        envelope: hostile bytes.
        keys: the keys of the role that should have signed.

    Returns:
        The verified payload and the identities of the keys.

    Raises:
        Unsigned: the envelope carries no signature at all.
        BadSignature: the bytes are no DSSE envelope of an in-toto statement, or none of the keys signed.
    """
    parsed = _parse(envelope)
    if not parsed.signatures:
        raise Unsigned(
            "a statement carries no signature",
            mend="ask the publisher to push the adapter again; unsigned statements are never believed",
        )
    signed_by = frozenset(_identity(key) for key in keys if _signed(parsed, key))
    if not signed_by:
        raise _too_few(0, 1, parsed)
    return bytes(parsed.payload), signed_by


def verify(envelope: bytes, keys: Sequence[PublicKey], threshold: int) -> bytes:
    """Returns the payload if at least `threshold` different keys out of `keys` signed this envelope.

    Args:
        envelope: hostile bytes.
        keys: the keys of the role that should have signed.
        threshold: how many of them must have signed; >= 1.

    Returns:
        The verified payload.

    Raises:
        Unsigned: the envelope carries no signature at all.
        BadSignature: the bytes are no DSSE envelope of an in-toto statement, or fewer than `threshold` keys
            signed.
    """
    if threshold < 1:
        raise ValueError(f"a threshold of {threshold} would trust everybody")
    payload, signed_by = verified(envelope, keys)
    if len(signed_by) < threshold:
        raise _too_few(len(signed_by), threshold, _parse(envelope))
    return payload


def _too_few(found: int, needed: int, parsed: SslibEnvelope) -> BadSignature:
    return BadSignature(
        f"a statement is signed by {found} of the {needed} trusted keys it needs "
        f"(signatures by: {', '.join(sorted(shown(keyid[:12]) for keyid in parsed.signatures))})",
        mend="the store may have been tampered with, or a key signed that the trust root does not list "
        "for this role; compare with `registry show --attestations`",
    )


def only(envelope: bytes, keys: Sequence[PublicKey]) -> bytes:
    """Returns the envelope with the signatures of `keys` and nothing else that came with it.

    Raises:
        Unsigned, BadSignature: as `verified`.
    """
    from securesystemslib.dsse import Envelope

    payload, _ = verified(envelope, keys)
    parsed = _parse(envelope)
    kept = {key.keyid: parsed.signatures[key.keyid] for key in keys if _signed(parsed, key)}
    fields = Envelope(payload, PAYLOAD_TYPE, kept).to_dict()
    return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()


def unverified_payload(envelope: bytes) -> bytes:
    """The payload without any check of its signatures: only to find out which role's keys must be asked.

    Raises:
        BadSignature: the bytes are no DSSE envelope of an in-toto statement.
    """
    return bytes(_parse(envelope).payload)


def signer_ids(envelope: bytes) -> tuple[str, ...]:
    """Key ids that claim to have signed, for display only.

    Raises:
        BadSignature: the bytes are no DSSE envelope of an in-toto statement.
    """
    return tuple(sorted(_parse(envelope).signatures))


def _parse(data: bytes) -> SslibEnvelope:
    from securesystemslib.dsse import Envelope

    if len(data) > MAX_ENVELOPE_BYTES:
        raise _malformed(f"it is larger than {MAX_ENVELOPE_BYTES} bytes")
    try:
        fields: Any = json.loads(data)
        if not isinstance(fields, dict):
            raise TypeError("not a JSON object")
        envelope = Envelope.from_dict(fields)
    # RecursionError: deeply nested JSON is an attack on the parser, not a bug of ours.
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _malformed(f"it cannot be parsed ({type(error).__name__})") from error
    if envelope.payload_type != PAYLOAD_TYPE:
        raise _malformed(f"its payload type is {envelope.payload_type!r}, not {PAYLOAD_TYPE!r}")
    return envelope


def _malformed(why: str) -> BadSignature:
    return BadSignature(
        f"a statement is not a DSSE envelope of an in-toto statement: {why}",
        mend="the store may have been tampered with; ask the publisher to push the adapter again",
    )


def _identity(key: PublicKey) -> str:
    """What makes two listed keys the same key, whatever their key ids, types and line breaks say."""
    return "".join(key.public.split()).lower()


def _signed(envelope: SslibEnvelope, key: PublicKey) -> bool:
    from securesystemslib.exceptions import UnverifiedSignatureError

    signature = envelope.signatures.get(key.keyid)
    if signature is None:
        return False
    try:
        key.sslib().verify_signature(signature, envelope.pae())
    except (UnverifiedSignatureError, ValueError):
        return False
    return True
