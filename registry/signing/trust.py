"""What this machine believes: TUF metadata that it verified, starting from the root it pinned.

``registry.signing.refresh`` fetches and verifies the metadata; this module reads from it what the product
needs to know. Verified documents in, plain answers out; tuf itself is not needed for reading.

============  ===========  ======================================================================
metadata      signed by    says
============  ===========  ======================================================================
root          root         which keys, how many of them, may sign statements of each role
targets       approver     ``name@alias`` -> manifest digest; which digests are revoked or yanked
names         publisher    which adapters there are
versions-xx   publisher    ``name:version`` -> manifest digest, for the names of one bin
============  ===========  ======================================================================

Versions lie in 64 bins by a hash of the adapter's name, so that what is read and signed for one adapter does
not grow with the registry (docs/adr/0003-version-bins.md). A bin is read when somebody asks about one of its
names. Publishers sign by delegation and cannot speak about aliases. The file is longer than others because
one state answers every question.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from registry.digest import Digest
from registry.errors import BadSignature, NotFound, StaleTrust
from registry.reference import Reference
from registry.signing import envelope as dsse

PREFIX = "trust/"
NAMES = "names"
NAMES_PATTERN = "names/*"
BINS = tuple(f"{number:02x}" for number in range(64))
TOP = ("root", "timestamp", "snapshot", "targets", NAMES)
"""The metadata that is read at every refresh; bins come on demand."""

ROLES_FIELD = "x-adapter-foundry-roles"
REVOKED_KEYS_FIELD = "x-adapter-foundry-revoked-keys"
REVOKED_FIELD = "x-adapter-foundry-revoked"
YANKED_FIELD = "x-adapter-foundry-yanked"
NAMES_FIELD = "x-adapter-foundry-names"
LEDGER_FIELD = "x-adapter-foundry-ledger"
ROOT_FIELD = "x-adapter-foundry-root"
"""In a version: number of the root that was valid when the version was signed."""
EXPIRES_FIELD = "x-adapter-foundry-expires"
"""In the snapshot, beside a bin's version: when it expires, so that it can be renewed without being read."""

NAMES_RENEWAL = timedelta(days=30)
"""Signed names with less life than this are signed anew whenever something is published."""

_AT_ONCE = datetime.min.replace(tzinfo=UTC)

Document = Mapping[str, Any]
"""Metadata as it was signed: ``{"signatures": …, "signed": …}``."""


class ExpiredTrust(StaleTrust):
    """The metadata is genuine and the newest known, but its time is over; a signer can renew it."""


class RetiredKey(BaseModel):
    """A key that left its role by a planned rotation and was never in wrong hands.

    Attributes:
        root: number of the first root without it. Its statements stay good for versions from before.
        key: the public key, as TUF writes it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    root: Annotated[int, Field(ge=2, strict=True)]
    key: Mapping[str, Any]


class RoleKeys(BaseModel):
    """Who may sign statements of one role: the shape that the signed root carries.

    Attributes:
        threshold: how many different keys must sign; 1 <= threshold <= number of keys.
        keys: public keys by key id, as TUF writes them.
        retired: keys of earlier roots, by key id.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    threshold: Annotated[int, Field(ge=1, strict=True)]
    keys: Mapping[str, Mapping[str, Any]]
    retired: Mapping[str, RetiredKey] = Field(default_factory=dict)

    def public_keys(self, registered: int | None = None) -> tuple[dsse.PublicKey, ...]:
        """The keys as plain values.

        Args:
            registered: number of the root under which the version was signed that statements are about;
                None is now.
        """
        listed = dict(self.keys)
        if registered is not None:
            listed |= {keyid: old.key for keyid, old in self.retired.items() if registered < old.root}
        return tuple(
            dsse.PublicKey(
                keyid=keyid,
                keytype=str(key["keytype"]),
                scheme=str(key["scheme"]),
                public=str(key["keyval"]["public"]),
            )
            for keyid, key in listed.items()
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A manifest that a signed name points to.

    Attributes:
        path: the signed name, ``name@alias`` or ``name:version``.
        digest: digest of the manifest.
        custom: what else the signer said about it.
        root: number of the root that was valid when a version was signed; 0 for an alias.
    """

    path: str
    digest: Digest
    custom: Mapping[str, Any]
    root: int = 0

    @property
    def name(self) -> str:
        """The adapter's name."""
        return self.path.partition("@")[0].partition(":")[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrustState:
    """One consistent, verified state of the trust metadata; implements admission's ``TrustView``.

    Attributes:
        documents: verified metadata by role, those of `TOP`.
        read_bin: reads and verifies the metadata of a bin that the snapshot names.
        remembered: it comes from this machine's memory; the store was not asked.
    """

    documents: Mapping[str, Document]
    read_bin: Callable[[str], Document] = field(repr=False)
    remembered: bool = False
    _bins: dict[str, Document] = field(default_factory=dict, repr=False)

    def document(self, role: str) -> Document:
        """Verified metadata of a role, bins included.

        Raises:
            NotFound: the snapshot names no such metadata.
            RegistryError: it is a bin that cannot be read or verified.
        """
        if role in self.documents:
            return self.documents[role]
        if role not in self._bins:
            if f"{role}.json" not in self.signed("snapshot")["meta"]:
                raise NotFound(f"the snapshot names no metadata {role}")
            self._bins[role] = self.read_bin(role)
        return self._bins[role]

    def signed(self, role: str) -> Mapping[str, Any]:
        """The signed part of a role's metadata; errors are those of `document`."""
        signed: Mapping[str, Any] = self.document(role)["signed"]
        return signed

    def version(self, role: str) -> int:
        """Number of a role's metadata."""
        return int(self.signed(role)["version"])

    def expires(self, role: str) -> datetime:
        """When a role's metadata stops being believed; a bin need not be read for that."""
        if role in self.documents or role in self._bins:
            return _time(self.signed(role)["expires"])
        return _hint(self.signed("snapshot")["meta"][f"{role}.json"].get(EXPIRES_FIELD))

    # -- keys --

    def role(self, name: str) -> RoleKeys:
        """The keys of a statement role, as the root signed them.

        Raises:
            BadSignature: the root knows no such role.
        """
        try:
            return RoleKeys.model_validate(self.signed("root")[ROLES_FIELD][name])
        except (KeyError, TypeError, ValidationError) as error:
            raise BadSignature(
                f"the trust root lists no keys for the role {name!r}",
                mend="ask the root's owner for a newer root",
            ) from error

    def keys(self, role: str) -> Sequence[dsse.PublicKey]:
        """The keys that may sign statements of a role today."""
        return self.role(role).public_keys()

    def threshold(self, role: str) -> int:
        """How many different keys of a role must sign; >= 1."""
        return self.role(role).threshold

    def is_revoked(self, digest: Digest) -> str | None:
        """The signed reason why a manifest or a file is revoked, or None."""
        return _reason(self.signed("targets"), REVOKED_FIELD, digest)

    def is_yanked(self, digest: Digest) -> str | None:
        """The signed reason why a manifest is hidden from lists and promotions, or None."""
        return _reason(self.signed("targets"), YANKED_FIELD, digest)

    def about(self, target: Target) -> VersionView:
        """What admission asks about one manifest: retired keys count for versions from their time."""
        registered = None
        if any(self.role(role).retired for role in self.signed("root")[ROLES_FIELD]):
            versions = self.versions_of(target.name).values()
            registered = next((found.root for found in versions if found.digest == target.digest), None)
        return VersionView(state=self, registered=registered)

    # -- names --

    def names(self) -> tuple[str, ...]:
        """Every adapter that has a signed version, in order."""
        return tuple(sorted(str(name) for name in self.signed(NAMES).get(NAMES_FIELD, ())))

    def aliases(self) -> dict[str, Target]:
        """Every signed alias, by ``name@alias``."""
        found = {path: _target(path, entry) for path, entry in self.signed("targets")["targets"].items()}
        return {path: found[path] for path in sorted(found) if "@" in path and ":" not in path}

    def versions(self) -> dict[str, Target]:
        """Every signed version, by ``name:version``; reads every bin."""
        found: dict[str, Target] = {}
        for role in self.bins():
            found |= self._versions_in(role)
        return dict(sorted(found.items()))

    def versions_of(self, name: str) -> dict[int, Target]:
        """The signed versions of one adapter, by number, in order; reads one bin."""
        role = bin_role(name)
        if role not in self.bins():
            return {}
        numbered = {
            int(path.partition(":")[2]): target
            for path, target in self._versions_in(role).items()
            if target.name == name
        }
        return dict(sorted(numbered.items()))

    def bins(self) -> tuple[str, ...]:
        """The roles of the bins that hold something."""
        meta = self.signed("snapshot")["meta"]
        return tuple(role for role in map(_role_of_bin, BINS) if f"{role}.json" in meta)

    def resolve(self, reference: Reference) -> Target:
        """Finds what a reference means, from signed names only.

        Raises:
            NotFound: nobody who may do so signed that name.
        """
        found: Target | None = None
        if reference.alias is not None:
            entry = self.signed("targets")["targets"].get(str(reference))
            found = None if entry is None else _target(str(reference), entry)
        else:
            for target in self.versions_of(reference.name).values():
                if target.digest == reference.digest or target.path == str(reference):
                    found = target
                    break
        if found is None:
            raise NotFound(f"there is no {reference} in this registry", mend=self._nearest(reference))
        return found

    def _versions_in(self, role: str) -> dict[str, Target]:
        """What a bin says about names that belong into it; other names are not its business."""
        found = {}
        for path, entry in self.signed(role)["targets"].items():
            place, _, name = path.partition("/")
            adapter, _, number = name.partition(":")
            if role == _role_of_bin(place) == bin_role(adapter) and number.isdecimal() and "@" not in adapter:
                found[name] = _target(name, entry)
        return found

    def _nearest(self, reference: Reference) -> str:
        names = [name for name, target in self.aliases().items() if target.name == reference.name]
        names += [f"{reference.name}:{number}" for number in self.versions_of(reference.name)]
        if not names:
            return "`registry list` shows what there is"
        hint = f"signed names of this adapter: {', '.join(sorted(names)[:8])}"
        if reference.alias is not None:
            hint += f"; an alias is made by `registry promote {reference.name}:<version> {reference.alias}`"
        return hint

    # -- time and audit --

    def renewal_due(self, now: datetime) -> bool:
        """Whether timestamp or snapshot should be signed anew: a quarter of their life is left."""
        return self.expires("timestamp") - now < timedelta(hours=6) or self.expires(
            "snapshot"
        ) - now < timedelta(hours=42)

    def renewal_of_names_due(self, now: datetime) -> bool:
        """Whether versions or aliases expire soon, so that publishing again is worth it without a change."""
        return any(role != "root" for role, _ in self.expiring(now))

    def expiring(self, now: datetime) -> Iterator[tuple[str, datetime]]:
        """Metadata that a person has to renew within `NAMES_RENEWAL`, and when it ends."""
        for role in ("root", "targets", NAMES, *self.bins()):
            if self.expires(role) - now < NAMES_RENEWAL:
                yield role, self.expires(role)

    def ledger_anchor(self) -> Mapping[str, Any] | None:
        """Length and digest of the audit log as they were signed last, or None."""
        anchor: Mapping[str, Any] | None = self.signed("snapshot").get(LEDGER_FIELD)
        return anchor


@dataclass(frozen=True, kw_only=True, slots=True)
class VersionView:
    """A `TrustState` as it counts for one version; implements admission's ``TrustView``.

    Attributes:
        state: the state.
        registered: number of the root under which the version was signed; None if nobody signed one.
    """

    state: TrustState
    registered: int | None

    def keys(self, role: str) -> Sequence[dsse.PublicKey]:
        """The keys whose statements about the version count."""
        return self.state.role(role).public_keys(self.registered)

    def threshold(self, role: str) -> int:
        """See `TrustState.threshold`."""
        return self.state.threshold(role)

    def is_revoked(self, digest: Digest) -> str | None:
        """See `TrustState.is_revoked`."""
        return self.state.is_revoked(digest)


def bin_role(name: str) -> str:
    """The role whose metadata holds the versions of an adapter."""
    return _role_of_bin(_bin_of(name))


def version_path(path: str) -> str:
    """The TUF target path of ``name:version``; its folder is the bin that may speak about it."""
    return f"{_bin_of(path.partition(':')[0])}/{path}"


def bin_pattern(role: str) -> str:
    """The TUF target paths that a bin may speak about."""
    return f"{role.removeprefix('versions-')}/*:*"


def all_bins() -> tuple[str, ...]:
    """The roles of all bins, those without metadata included."""
    return tuple(map(_role_of_bin, BINS))


def key_role(role: str) -> str:
    """Whose private key signs metadata of a TUF role."""
    return {"root": "root", "targets": "approver", "snapshot": "online", "timestamp": "online"}.get(
        role, "publisher"
    )


def _bin_of(name: str) -> str:
    return BINS[hashlib.sha256(name.encode()).digest()[0] % len(BINS)]


def _role_of_bin(place: str) -> str:
    return f"versions-{place}"


def _reason(targets: Mapping[str, Any], kind: str, digest: Digest) -> str | None:
    reasons = targets.get(kind, {})
    return str(reasons[digest]) if digest in reasons else None


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text)


def _hint(value: Any) -> datetime:
    """When a bin is said to expire; a snapshot that does not say it well makes the bin due at once."""
    try:
        found = _time(value)
    except (TypeError, ValueError):
        return _AT_ONCE
    return found if found.tzinfo is not None else _AT_ONCE


def _target(path: str, entry: Mapping[str, Any]) -> Target:
    return Target(
        path=path,
        digest=Digest("sha256:" + entry["hashes"]["sha256"]),
        custom=entry.get("custom") or {},
        root=int(entry.get(ROOT_FIELD, 0)),
    )
