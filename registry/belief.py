"""Which of the statements in a store are believed, and by whose keys: for people and for exports.

Admission decides by itself whether an adapter may be loaded, and refuses one with a single false statement.
Here every statement is looked at for its own sake, so that people see what is wrong with which.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from registry import attestation
from registry.attestation import KINDS, ROLE_OF, Statement
from registry.digest import Digest, digest_bytes
from registry.errors import BadSignature, InvalidDocument, Unsigned, shown
from registry.signing import envelope

if TYPE_CHECKING:
    from registry.signing.envelope import PublicKey


class Keys(Protocol):
    """What an export asks of the trust root."""

    def keys(self, role: str) -> Sequence[PublicKey]:
        """Return the keys of a role; none for an unknown role."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Believed:
    """A statement whose signatures hold.

    Attributes:
        statement: what it says.
        envelope: the bytes that the store keeps.
        keys: the keys of its role that signed it, by key id.
    """

    statement: Statement
    envelope: bytes
    keys: tuple[PublicKey, ...]

    @property
    def role(self) -> str:
        """Whose keys signed."""
        return ROLE_OF[self.statement.kind]


def believe(
    digest: Digest, envelopes: Iterable[bytes], trust: Keys
) -> tuple[tuple[Believed, ...], tuple[str, ...]]:
    """Sort out the statements about a manifest that a key of the right role signed.

    Args:
        digest: the manifest.
        envelopes: hostile bytes.
        trust: the keys of the roles.

    Returns:
        The believed statements by kind, in an order that depends on their content only; and one sentence for
        each envelope that is not believed.
    """
    believed, left_out = [], []
    for data in sorted(set(envelopes)):
        try:
            believed.append(believe_one(digest, data, trust))
        except (BadSignature, Unsigned, InvalidDocument) as error:
            left_out.append(f"{digest_bytes(data)[:19]}: {error.message}")
    believed.sort(key=lambda found: KINDS.index(found.statement.kind))
    return tuple(believed), tuple(left_out)


def believe_one(digest: Digest, data: bytes, trust: Keys) -> Believed:
    """Return a statement that a key of the right role signed about a manifest.

    Args:
        digest: the manifest.
        data: hostile bytes.
        trust: the keys of the roles.

    Raises:
        Unsigned: the envelope carries no signature at all.
        BadSignature: no key of its role signed it, or it is about something else.
        InvalidDocument: it is no statement.
    """
    claimed = attestation.parse_statement(envelope.unverified_payload(data))
    found = []
    for key in sorted(trust.keys(ROLE_OF[claimed.kind]), key=lambda key: key.keyid):
        try:
            payload, _ = envelope.verified(data, [key])
        except BadSignature:
            continue
        found.append((key, payload))
    if not found:
        raise BadSignature(f"no key of the {ROLE_OF[claimed.kind]} signed this {claimed.kind} statement")
    statement = attestation.parse_statement(found[0][1])
    if statement.digest != digest:
        raise BadSignature(f"this {statement.kind} statement is about {shown(statement.subject_name)}")
    return Believed(statement=statement, envelope=data, keys=tuple(key for key, _ in found))
