"""Trust state and statements as they are shown to people."""

from __future__ import annotations

from registry import attestation
from registry.attestation import ROLE_OF
from registry.errors import BadSignature, InvalidDocument, Unsigned
from registry.results import Listed, StatementView
from registry.signing import envelope
from registry.signing.trust import TrustState


def listing(state: TrustState) -> tuple[Listed, ...]:
    """Every signed version, by name and number."""
    aliases = state.aliases()
    listed = []
    for path, target in state.versions().items():
        name = path.partition(":")[0]
        mine = (
            alias
            for alias, to in aliases.items()
            if to.digest == target.digest and alias.startswith(f"{name}@")
        )
        listed.append(
            Listed(
                reference=path,
                digest=target.digest,
                aliases=tuple(alias.partition("@")[2] for alias in mine),
                revoked=state.is_revoked(target.digest),
            )
        )
    return tuple(sorted(listed, key=lambda found: _order(found.reference)))


def _order(reference: str) -> tuple[str, int]:
    name, _, version = reference.partition(":")
    return name, int(version)


def statement_view(state: TrustState, key: str, data: bytes) -> StatementView:
    """Reads one envelope for display: what it claims to be, and whether that is believed."""
    kind, role = "unknown", ""
    ids: tuple[str, ...] = ()
    try:
        ids = envelope.signer_ids(data)
        claimed = attestation.parse_statement(envelope.unverified_payload(data)).kind
        kind, role = claimed, ROLE_OF[claimed]
        predicate = attestation.parse_statement(
            envelope.verify(data, state.keys(role), state.threshold(role))
        ).predicate
    except (BadSignature, Unsigned, InvalidDocument) as error:
        return StatementView(
            key=key, kind=kind, role=role, signed=False, problem=error.message, key_ids=ids, predicate={}
        )
    return StatementView(
        key=key, kind=kind, role=role, signed=True, problem=None, key_ids=ids, predicate=predicate
    )
