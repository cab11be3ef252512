"""Who shall hold which role: the keys of a root as plain values, what changes, and the next root.

A root lists its own keys and the online keys in TUF's way, and the keys of people who sign statements in a
field of its own; approvers are in both, because they also sign aliases. A plan is the one place that knows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from registry.errors import UsageError, shown
from registry.signing.edition import expiry
from registry.signing.signers import ONLINE, ROLES, ROOT, STATEMENT_ROLES
from registry.signing.trust import REVOKED_KEYS_FIELD, ROLES_FIELD

if TYPE_CHECKING:
    from tuf.api.metadata import Root

KEYID_SHOWN = 12
_TUF_ROLES: Mapping[str, tuple[str, ...]] = {
    ROOT: ("root",),
    "approver": ("targets",),
    ONLINE: ("snapshot", "timestamp"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Holders:
    """Who holds a role.

    Attributes:
        threshold: how many of them must sign.
        keys: public keys by key id, as TUF writes them.
        retired: former keys by key id: ``{"root": number of the first root without it, "key": …}``.
    """

    threshold: int
    keys: Mapping[str, Mapping[str, Any]]
    retired: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Who holds which role under one root.

    Attributes:
        holders: by role.
        revoked: ids of keys that must never be listed again.
    """

    holders: Mapping[str, Holders]
    revoked: tuple[str, ...] = ()

    @classmethod
    def of(cls, root: Mapping[str, Any]) -> Plan:
        """What the signed part of a root says."""
        holders = {}
        for role in (ROOT, ONLINE):
            entry = root["roles"][_TUF_ROLES[role][0]]
            keys = {keyid: root["keys"][keyid] for keyid in entry["keyids"]}
            holders[role] = Holders(threshold=entry["threshold"], keys=keys)
        for role in STATEMENT_ROLES:
            entry = root[ROLES_FIELD][role]
            holders[role] = Holders(
                threshold=entry["threshold"], keys=entry["keys"], retired=entry.get("retired", {})
            )
        return cls(holders=holders, revoked=tuple(root.get(REVOKED_KEYS_FIELD, ())))

    def root(self, version: int) -> Root:
        """The root that says this, with a new life."""
        from securesystemslib.signer import Key
        from tuf.api.metadata import Root

        fields: dict[str, Any] = {ROLES_FIELD: {}, REVOKED_KEYS_FIELD: sorted(self.revoked)}
        for role in STATEMENT_ROLES:
            held = self.holders[role]
            entry: dict[str, Any] = {"threshold": held.threshold, "keys": dict(held.keys)}
            if held.retired:
                entry["retired"] = dict(held.retired)
            fields[ROLES_FIELD][role] = entry
        root = Root(version=version, expires=expiry("root"), unrecognized_fields=fields)
        for role, tuf_roles in _TUF_ROLES.items():
            held = self.holders[role]
            for tuf_role in tuf_roles:
                for keyid in sorted(held.keys):
                    root.add_key(Key.from_dict(keyid, dict(held.keys[keyid])), tuf_role)
            # Any one approver may move an alias; how many must approve is a matter of statements.
            root.roles[tuf_roles[0]].threshold = held.threshold if role == ROOT else 1
        return root

    def adding(self, role: str, keyid: str, key: Mapping[str, Any]) -> Plan:
        """With one more key in a role.

        Raises:
            UsageError: the key was revoked, or it is there already under another id.
        """
        if keyid in self.revoked:
            raise UsageError(
                f"the key {shown(keyid[:KEYID_SHOWN])} was revoked and cannot come back",
                "make a new key with `registry trust rotate` or `registry trust key`",
            )
        held = self._of(role)
        same = _material(key)
        if any(other != keyid and _material(known) == same for other, known in held.keys.items()):
            raise UsageError(f"the role {role} lists this key already under another id")
        retired = {other: old for other, old in held.retired.items() if other != keyid}
        return self._with(role, replace(held, keys={**held.keys, keyid: dict(key)}, retired=retired))

    def retiring(self, role: str, keyid: str, root: int) -> Plan:
        """Without a key that was never in wrong hands; what it signed before the root `root` stays good."""
        held = self._of(role)
        retired = dict(held.retired)
        if role in STATEMENT_ROLES:
            retired[keyid] = {"root": root, "key": held.keys[keyid]}
        keys = {other: key for other, key in held.keys.items() if other != keyid}
        return self._with(role, replace(held, keys=keys, retired=retired))

    def revoking(self, keyid: str) -> Plan:
        """Without a key in any role, now and later, retired ones included."""
        plan = replace(self, revoked=tuple(sorted({*self.revoked, keyid})))
        for role, held in self.holders.items():
            keys = {other: key for other, key in held.keys.items() if other != keyid}
            retired = {other: old for other, old in held.retired.items() if other != keyid}
            plan = plan._with(role, replace(held, keys=keys, retired=retired))
        return plan

    def requiring(self, role: str, threshold: int) -> Plan:
        """With another threshold of a role.

        Raises:
            UsageError: the role cannot have one.
        """
        if role == ONLINE and threshold != 1:
            raise UsageError(
                "the online role signs by machine, with one key", "raise the threshold of another role"
            )
        return self._with(role, replace(self._of(role), threshold=threshold))

    def checked(self) -> Plan:
        """The plan, if every role can reach its threshold.

        Raises:
            UsageError: a role cannot.
        """
        for role, held in self.holders.items():
            if not 1 <= held.threshold <= len({_material(key) for key in held.keys.values()}):
                raise UsageError(
                    f"the role {role} would have {len(held.keys)} keys and need {held.threshold} of them",
                    f"first add a key (`registry trust add {role}`) or lower the threshold "
                    f"(`registry trust threshold {role}`)",
                )
        return self

    def find(self, keyid: str) -> str:
        """The full id of a listed or retired key that begins so.

        Raises:
            UsageError: no key or several begin so.
        """
        known = {full for held in self.holders.values() for full in (*held.keys, *held.retired)}
        found = [full for full in known if full.startswith(keyid)]
        if len(keyid) < 8 or len(found) != 1:
            raise UsageError(
                f"{shown(keyid)!r} names {len(found)} of the listed keys",
                "give at least 8 digits of one id that `registry trust show` lists",
            )
        return found[0]

    def changes(self, new: Plan) -> Iterator[str]:
        """What another plan changes, one line each, for people who shall sign it."""
        for role in ROLES:
            old, then = self.holders[role], new.holders[role]
            for keyid in sorted({*old.keys, *then.keys}):
                if keyid not in old.keys:
                    key = then.keys[keyid]
                    yield f"{role}: + {shown(keyid[:KEYID_SHOWN])} ({shown(key['keytype'])})"
                elif keyid not in then.keys:
                    how = "retired" if keyid in then.retired else "removed"
                    yield f"{role}: - {shown(keyid[:KEYID_SHOWN])} ({how})"
                elif old.keys[keyid] != then.keys[keyid]:
                    # A key id has no meaning of its own: a change under the same id must not go unseen.
                    yield f"{role}: ! {shown(keyid[:KEYID_SHOWN])} becomes another key under the same id"
            if old.threshold != then.threshold:
                yield f"{role}: threshold {old.threshold} -> {then.threshold}"
            for keyid in sorted({*then.retired} - {*old.retired} - {*old.keys}):
                yield f"{role}: + {shown(keyid[:KEYID_SHOWN])} as a retired key, which was never listed"
            for keyid in sorted({*old.retired} & {*then.retired}):
                if old.retired[keyid] != then.retired[keyid]:
                    yield f"{role}: ! {shown(keyid[:KEYID_SHOWN])} (retired) changes under the same id"
            for keyid in sorted({*old.retired} - {*then.retired} - {*then.keys}):
                yield f"{role}: - {shown(keyid[:KEYID_SHOWN])} (retired before)"
        for keyid in sorted({*new.revoked} ^ {*self.revoked}):
            verb = "revoked for good" if keyid in new.revoked else "not revoked any more"
            yield f"{shown(keyid[:KEYID_SHOWN])}: {verb}"

    def _of(self, role: str) -> Holders:
        if role not in self.holders:
            raise UsageError(f"there is no role {shown(role)!r}", f"roles are: {', '.join(ROLES)}")
        return self.holders[role]

    def _with(self, role: str, holders: Holders) -> Plan:
        return replace(self, holders={**self.holders, role: holders})


def _material(key: Mapping[str, Any]) -> str:
    """What makes two keys the same, whatever their ids say."""
    return "".join(str(key["keyval"]["public"]).split()).lower()
