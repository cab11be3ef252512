"""Removing statements that nobody believes any more, after a key was revoked.

Admission refuses an adapter with a single statement that no listed key has signed, because a statement may
be a refusal. So what a revoked key has signed locks an adapter until it is taken away and signed anew by
somebody else. Only who controls the store can do that, and they could withhold any statement before, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from registry.belief import believe_one
from registry.errors import BadSignature, InvalidDocument, Unsigned
from registry.reconcile import index_version
from registry.storage import shelf

if TYPE_CHECKING:
    from registry.client import Registry
    from registry.signing.trust import Target, TrustState


@dataclass(frozen=True, kw_only=True, slots=True)
class Swept:
    """A version with statements that nobody believes.

    Attributes:
        reference: ``name:version``.
        keys: the objects that hold them.
        problems: why each is not believed.
    """

    reference: str
    keys: tuple[str, ...]
    problems: tuple[str, ...]


def sweep(registry: Registry, *, dry_run: bool = False) -> tuple[Swept, ...]:
    """Remove the statements that no listed key of their role has signed, of every version.

    Args:
        registry: the registry; this machine must be able to delete objects of its store.
        dry_run: only tell.

    Raises:
        RegistryError: see the error tree; what was removed until then stays removed.
    """
    state = registry.authority.signing_state()
    done = []
    for reference, target in state.versions().items():
        found = dict(_disbelieved(registry, state, target))
        if not found:
            continue
        if not dry_run:
            registry.record("trust", reference, {"command": "sweep", "statements": sorted(found)})
            for key in found:
                registry.store.delete(key)
            index_version(registry, state, target.digest)
        done.append(Swept(reference=reference, keys=tuple(found), problems=tuple(found.values())))
    if done and not dry_run:
        registry.authority.publish_anchor()
    return tuple(done)


def _disbelieved(registry: Registry, state: TrustState, target: Target) -> Iterator[tuple[str, str]]:
    trust = state.about(target)
    for key, data in shelf.read_statements(registry.store, target.digest).items():
        try:
            believe_one(target.digest, data, trust)
        except (BadSignature, Unsigned, InvalidDocument) as error:
            yield key, error.message
