"""What this machine believes: TUF metadata that it verified, starting from the root it pinned.

``registry.signing.refresh`` fetches and verifies the metadata; this module reads from it what the product
needs to know. Bytes in, plain answers out, no IO:

===========  ===========  =======================================================================
metadata     signed by    says
===========  ===========  =======================================================================
root         root         which keys, how many of them, may sign statements of each role
targets      approver     ``name@alias`` -> manifest digest; which digests are revoked, and why
versions     publisher    ``name:version`` -> manifest digest (a delegation that cannot speak about aliases)
===========  ===========  =======================================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from registry.digest import Digest
from registry.errors import BadSignature, NotFound, StaleTrust
from registry.reference import Reference
from registry.signing import envelope as dsse

if TYPE_CHECKING:
    from tuf.api.metadata import Root, Snapshot, Targets, Timestamp

PREFIX = "trust/"
VERSIONS = "versions"
VERSIONS_PATTERN = "*:*"
ROLES_FIELD = "x-adapter-foundry-roles"
REVOKED_FIELD = "x-adapter-foundry-revoked"

NAMES_RENEWAL = timedelta(days=30)
"""Signed names with less life than this are signed anew whenever something is published."""


class ExpiredTrust(StaleTrust):
    """The metadata is genuine and the newest known, but its time is over; a signer can renew it."""


class RoleKeys(BaseModel):
    """Who may sign statements of one role: the shape that the signed root carries.

    Attributes:
        threshold: how many different keys must sign; 1 <= threshold <= number of keys.
        keys: public keys by key id, as TUF writes them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    threshold: Annotated[int, Field(ge=1, strict=True)]
    keys: Mapping[str, Mapping[str, Any]]

    def public_keys(self) -> tuple[dsse.PublicKey, ...]:
        """The keys as plain values."""
        return tuple(
            dsse.PublicKey(
                keyid=keyid,
                keytype=str(key["keytype"]),
                scheme=str(key["scheme"]),
                public=str(key["keyval"]["public"]),
            )
            for keyid, key in self.keys.items()
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A manifest that a signed name points to.

    Attributes:
        path: the signed name, ``name@alias`` or ``name:version``.
        digest: digest of the manifest.
        custom: what else the signer said about it.
    """

    path: str
    digest: Digest
    custom: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrustState:
    """One consistent, verified state of the trust metadata; implements admission's ``TrustView``."""

    root: Root
    timestamp: Timestamp
    snapshot: Snapshot
    targets: Targets
    version_targets: Targets

    def role(self, name: str) -> RoleKeys:
        """The keys of a statement role, as the root signed them.

        Raises:
            BadSignature: the root knows no such role.
        """
        try:
            return RoleKeys.model_validate(self.root.unrecognized_fields[ROLES_FIELD][name])
        except (KeyError, TypeError, ValidationError) as error:
            raise BadSignature(
                f"the trust root lists no keys for the role {name!r}",
                mend="ask the root's owner for a newer root",
            ) from error

    def keys(self, role: str) -> Sequence[dsse.PublicKey]:
        """The keys that may sign statements of a role."""
        return self.role(role).public_keys()

    def threshold(self, role: str) -> int:
        """How many different keys of a role must sign; >= 1."""
        return self.role(role).threshold

    def is_revoked(self, digest: Digest) -> str | None:
        """The signed reason why a manifest or a file is revoked, or None."""
        reasons = self.targets.unrecognized_fields.get(REVOKED_FIELD, {})
        return str(reasons[digest]) if digest in reasons else None

    def aliases(self) -> dict[str, Target]:
        """Every signed alias, by ``name@alias``."""
        return _targets(self.targets, "@")

    def versions(self) -> dict[str, Target]:
        """Every signed version, by ``name:version``."""
        return _targets(self.version_targets, ":")

    def versions_of(self, name: str) -> dict[int, Target]:
        """The signed versions of one adapter, by number, in order."""
        numbered = {
            int(path.partition(":")[2]): target
            for path, target in self.versions().items()
            if path.partition(":")[0] == name
        }
        return dict(sorted(numbered.items()))

    def resolve(self, reference: Reference) -> Target:
        """Finds what a reference means, from signed names only.

        Raises:
            NotFound: nobody who may do so signed that name.
        """
        if reference.digest is not None:
            for target in self.versions_of(reference.name).values():
                if target.digest == reference.digest:
                    return target
        else:
            found = (self.aliases() if reference.alias is not None else self.versions()).get(str(reference))
            if found is not None:
                return found
        raise NotFound(f"there is no {reference} in this registry", mend=self._nearest(reference))

    def _nearest(self, reference: Reference) -> str:
        names = [
            name
            for name in (*self.aliases(), *self.versions())
            if name.split("@")[0].split(":")[0] == reference.name
        ]
        if not names:
            return "`registry list` shows what there is"
        hint = f"signed names of this adapter: {', '.join(sorted(names)[:8])}"
        if reference.alias is not None:
            hint += f"; an alias is made by `registry promote {reference.name}:<version> {reference.alias}`"
        return hint

    def renewal_due(self, now: datetime) -> bool:
        """Whether timestamp or snapshot should be signed anew: a quarter of their life is left."""
        return self.timestamp.expires - now < timedelta(hours=6) or self.snapshot.expires - now < timedelta(
            hours=42
        )

    def renewal_of_names_due(self, now: datetime) -> bool:
        """Whether versions or aliases expire soon, so that publishing again is worth it without a change."""
        return min(self.targets.expires, self.version_targets.expires) - now < NAMES_RENEWAL


def _targets(signed: Targets, mark: str) -> dict[str, Target]:
    """The signed names that a role may speak about; names of another kind are not its business."""
    return {
        path: Target(path=path, digest=Digest("sha256:" + file.hashes["sha256"]), custom=file.custom or {})
        for path, file in sorted(signed.targets.items())
        if mark in path and not set(path) & ({"@", ":"} - {mark})
    }
