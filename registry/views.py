"""Trust state and statements as they are shown to people."""

from __future__ import annotations

from collections.abc import Iterable

from registry import attestation
from registry.attestation import ROLE_OF
from registry.belief import Keys, believe_one
from registry.digest import Digest
from registry.errors import BadSignature, InvalidDocument, Unsigned
from registry.results import Listed, StatementView
from registry.signing import envelope
from registry.signing.trust import Target, TrustState


def listing(state: TrustState, name: str | None = None) -> tuple[Listed, ...]:
    """Every signed version, by name and number; or those of one adapter."""
    aliases: dict[Digest, list[str]] = {}
    for path, target in state.aliases().items():
        aliases.setdefault(target.digest, []).append(path)
    versions = (
        state.versions()
        if name is None
        else {f"{name}:{number}": target for number, target in state.versions_of(name).items()}
    )
    found = [
        _listed(state, path, target, aliases.get(target.digest, ())) for path, target in versions.items()
    ]
    return tuple(sorted(found, key=lambda row: _order(row.reference)))


def listed(state: TrustState, name: str, version: int, digest: Digest) -> Listed:
    """One signed version."""
    target = state.versions_of(name)[version]
    mine = [path for path, to in state.aliases().items() if to.digest == digest]
    return _listed(state, f"{name}:{version}", target, mine)


def _listed(state: TrustState, path: str, target: Target, aliases: Iterable[str]) -> Listed:
    name = path.partition(":")[0]
    return Listed(
        reference=path,
        digest=target.digest,
        aliases=tuple(alias.partition("@")[2] for alias in aliases if alias.startswith(f"{name}@")),
        revoked=state.is_revoked(target.digest),
        yanked=state.is_yanked(target.digest),
        facts={key: value for key, value in target.custom.items() if key != "content"},
    )


def _order(reference: str) -> tuple[str, int]:
    name, _, version = reference.partition(":")
    return name, int(version)


def statement_view(trust: Keys, digest: Digest, key: str, data: bytes) -> StatementView:
    """Reads one envelope for display: what it claims to be, and whether that is believed.

    Args:
        trust: the keys of the roles.
        digest: the manifest that it should be about.
        key: where the store keeps it.
        data: hostile bytes.
    """
    kind, role = "unknown", ""
    ids: tuple[str, ...] = ()
    try:
        ids = envelope.signer_ids(data)
        kind = attestation.parse_statement(envelope.unverified_payload(data)).kind
        role = ROLE_OF[kind]
        found = believe_one(digest, data, trust)
    except (BadSignature, Unsigned, InvalidDocument) as error:
        return StatementView(
            key=key, kind=kind, role=role, signed=False, problem=error.message, key_ids=ids, predicate={}
        )
    return StatementView(
        key=key,
        kind=kind,
        role=role,
        signed=True,
        problem=None,
        # Whoever else signed the same envelope is nobody here.
        key_ids=tuple(public.keyid for public in found.keys),
        predicate=found.statement.predicate,
    )
