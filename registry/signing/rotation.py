"""Changing keys: who may sign what, in an order that an interruption cannot spoil.

A change of keys is up to three publications:

1. what is signed by keys that leave is signed by keys that stay or come, too: valid before and after;
2. the new root, signed by the thresholds of the old and the new root keys. While signatures are missing it
   waits in the store as a draft, which nobody believes, for ``registry trust sign`` on other machines;
3. the delegation of versions drops keys that left, or lets new ones in if that could not be done before.

After each of them readers find a state in which everything is signed by keys that the root lists. Running the
same command again completes what was interrupted.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from registry.errors import BadSignature, Conflict, NotFound, RegistryError, UsageError
from registry.signing import edition as editions
from registry.signing.authority import Authority, delegations
from registry.signing.edition import Edition
from registry.signing.plan import Plan
from registry.signing.signers import ONLINE, ROOT, KeyRing
from registry.signing.trust import NAMES, PREFIX, Document, TrustState, all_bins, key_role
from registry.storage.base import read

if TYPE_CHECKING:
    from securesystemslib.signer import Signer
    from tuf.api.metadata import Metadata, Root

DRAFT = PREFIX + "draft.root.json"
AHEAD = 100_000
"""Publications that nobody makes between two backups; numbers have nine digits."""

Keys = Mapping[str, Mapping[str, Any]]
"""Public keys by key id, as TUF writes them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """A root that waits for signatures.

    Attributes:
        version: its number.
        changes: what it changes, for people.
        missing: how many more root keys must sign it; 0 when it is complete.
        digest: of what is signed, in hex; empty if there is nothing to sign.
    """

    version: int
    changes: tuple[str, ...]
    missing: int
    digest: str


class Rotation:
    """Changes the keys of a registry with the private keys of this machine.

    Args:
        authority: publishes.
        coming: keys of this machine that shall replace its own, where that is what is done.
    """

    def __init__(self, authority: Authority, coming: KeyRing | None = None) -> None:
        self._authority = authority
        self._store = authority.store
        self._rings = (authority.keys,) if coming is None else (authority.keys, coming)

    def enact(self, plan: Plan) -> Draft:
        """Make a plan real, or as far as this machine's root keys allow; the same plan again goes on.

        Raises:
            UsageError: the plan leaves a role without enough keys.
            Conflict: a draft of another plan waits for signatures, or somebody else changes keys, too.
            BadSignature: this machine lacks a key that the change needs; nothing was changed.
        """
        plan.checked()
        state = self._authority.signing_state()
        version = state.version("root")
        if plan == Plan.of(state.signed("root")):
            self.tidy()
            return Draft(version=version, changes=(), missing=0, digest="")
        waiting = self._draft(state)
        if waiting is None:
            self._root_signers(state, plan)
            self._prepare(plan)
            return self._propose(state, _unsigned(plan.root(version + 1)))
        told = self._described(state, waiting)
        if Plan.of(copy.deepcopy(waiting.signed.to_dict())) != plan:
            raise Conflict(
                "a draft of another new root waits for signatures",
                "`registry trust sign` shows and signs it, `registry trust sign --drop` drops it",
            )
        self._prepare(plan)
        return self.sign(told.digest)

    def can_renew(self, now: datetime) -> bool:
        """Whether `renew` would give a new life to something of `TrustState.expiring`."""
        state = self._authority.signing_state()
        ending = [role for role, _ in state.expiring(now)]
        if "root" in ending and self._authority.keys.holds(ROOT) and self._draft(state) is None:
            return True
        return self._held(state, "timestamp") and any(
            self._held(state, role) for role in ending if role != "root"
        )

    def renew(self) -> Draft:
        """Give a new life to the root and to everything whose key is on this machine."""

        def touch(edition: Edition) -> None:
            for role in ("targets", NAMES, *edition.state.bins()):
                if self._held(edition.state, role):
                    edition.part(role)

        if self._held(self._authority.signing_state(), "timestamp"):
            self._authority.change(touch, always=True)
            self.tidy()
        state = self._authority.signing_state()
        waiting = self._draft(state)
        if not self._authority.keys.holds(ROOT):
            return Draft(version=state.version("root"), changes=(), missing=0, digest="")
        if waiting is not None:
            return self._described(state, waiting)
        plan = Plan.of(state.signed("root"))
        return self._propose(state, _unsigned(plan.root(state.version("root") + 1)))

    def advance(self) -> tuple[str, ...]:
        """Raise the numbers of all metadata whose key is here far above whatever readers have seen.

        After a restore from a backup readers that have seen newer metadata refuse the restored ones as rolled
        back. This says, with the keys that may say so, that what was restored is the newest. Roots keep their
        numbers: a reader that has seen a newer root needs that very root in the store.

        Returns:
            The metadata whose key is on another machine; the same has to be done there.

        Raises:
            NotFound: the online key is not on this machine.
        """
        left: list[str] = []

        def touch(edition: Edition) -> None:
            left.clear()
            # Readers miss a bin that they have seen, so those that are empty now are written as well.
            for role in ("targets", NAMES, *all_bins()):
                if self._held(edition.state, role):
                    edition.part(role)
                else:
                    left.append(role)
            edition.ahead = AHEAD

        self._authority.keys.signer(ONLINE)
        self._authority.change(touch, always=True)
        return tuple(left)

    def follow(self, plan: Plan, roots: Mapping[int, bytes]) -> None:
        """Publish roots that were signed before, when what the store shows holds under the last of them, too.

        Args:
            plan: of the last one.
            roots: by their numbers, verified: each follows from the one before.

        Raises:
            BadSignature: this machine lacks a key; the roots are not published.
            Conflict: the store has another root of one of these numbers.
        """
        self._prepare(plan)
        for number in sorted(roots):
            key = f"{PREFIX}{number}.root.json"
            if not self._store.put(key, roots[number]) and read(self._store, key) != roots[number]:
                raise Conflict(
                    f"the store has another root {number} by now", "readers who have seen this one pin anew"
                )
        self._authority.client.refresh(signing=True)
        self.tidy()

    def look(self) -> Draft | None:
        """The draft that waits for signatures, checked, or None.

        Raises:
            BadSignature: nobody who may propose a root has signed it, or it hides something.
        """
        state = self._authority.signing_state()
        found = self._draft(state)
        return None if found is None else self._described(state, found)

    def sign(self, digest: str) -> Draft:
        """Add this machine's root signature to the draft, and publish it when it is complete.

        Args:
            digest: of the draft that somebody has looked at; the store may show another one now.

        Raises:
            NotFound: there is no draft.
            Conflict: it is another draft.
            BadSignature: the draft or this machine's root key is not good.
        """
        state = self._authority.signing_state()
        found = self._draft(state)
        if found is None:
            raise NotFound("no draft of a root waits for signatures", "`registry trust show` tells the keys")
        # Before it is signed here: our own signature must not be what makes a stranger's draft credible.
        if self._described(state, found).digest != digest:
            raise Conflict("the draft of the root is not the one that was looked at", "look at it again")
        return self._propose(state, found)

    def drop(self) -> None:
        """Forget the draft."""
        self._store.delete(DRAFT)

    def tidy(self) -> bool:
        """Let the delegation of versions list the publishers of the root and nobody else, if possible here.

        It needs an approver's key, and a publisher's if versions are signed by a key that goes. People who
        keep them apart run ``registry trust renew`` one after the other, publishers first.

        Returns:
            Whether the delegation is that of the root now.
        """
        state = self._authority.signing_state()
        plan = Plan.of(state.signed("root"))
        wanted = plan.holders["publisher"].keys
        if _delegated(state).keys() != wanted.keys() and self._can_delegate(state, wanted):
            state = self._authority.change(
                lambda edition: _delegate(edition, wanted),
                signers=lambda role: self._signers(state, plan, role),
            )
        return _delegated(state).keys() == wanted.keys()

    # -- 1. --

    def _prepare(self, plan: Plan) -> None:
        """Publish an edition that holds before and after the new root, if the present one does not."""
        state = self._authority.signing_state()
        held = plan.holders["publisher"]
        known = _delegated(state)
        # Whoever was revoked goes at once, whoever retires goes when the new root is there.
        wanted = {keyid: key for keyid, key in known.items() if keyid in held.retired} | dict(held.keys)
        delegating = wanted.keys() != known.keys() and self._can_delegate(state, wanted)

        def change(edition: Edition) -> None:
            if not _valid(edition.state.document("targets"), plan.holders["approver"].keys):
                edition.part("targets")
            if delegating:
                _delegate(edition, wanted)

        online = plan.holders[ONLINE].keys
        always = not all(_valid(state.document(role), online) for role in ("snapshot", "timestamp"))
        self._authority.change(change, signers=lambda role: self._signers(state, plan, role), always=always)

    def _can_delegate(self, state: TrustState, wanted: Keys) -> bool:
        """Whether this machine has the keys to let other publishers sign versions."""
        approver = any(
            one.public_key.keyid in editions.listed_keyids(state, "targets") for one in self._own("approver")
        )
        publisher = any(one.public_key.keyid in wanted for one in self._own("publisher"))
        signed = all(_valid(state.document(role), wanted) for role in (NAMES, *state.bins()))
        return approver and (publisher or signed)

    def _signers(self, state: TrustState, plan: Plan, role: str) -> Sequence[Signer]:
        """One key that readers accept before the new root, and one that they accept after it."""
        whose = key_role(role)
        after = [*plan.holders[whose].keys]
        # The delegation changes in the same edition, so that publishers of the plan are good for both.
        before = after if whose == "publisher" else editions.listed_keyids(state, role)
        found: dict[str, Signer] = {}
        for accepted in (before, after):
            signer = next((one for one in self._own(whose) if one.public_key.keyid in accepted), None)
            if signer is None:
                raise BadSignature(
                    f"{role} must be signed by a {whose} key that stays, and none is on this machine",
                    f"run `registry trust renew` where another {whose} key is kept (or what began "
                    "this), then this again; readers see the old state",
                )
            found[signer.public_key.keyid] = signer
        return tuple(found.values())

    def _own(self, role: str) -> list[Signer]:
        """Keys of a role on this machine: the present one, and the one that shall replace it."""
        found = {}
        for ring in self._rings:
            if ring.holds(role):
                signer = ring.signer(role)
                found[signer.public_key.keyid] = signer
        return list(found.values())

    def _held(self, state: TrustState, role: str) -> bool:
        """Whether this machine can sign a TUF role so that readers accept it."""
        try:
            editions.trusted_signer(state, self._authority.keys, role)
        except RegistryError:
            return False
        return True

    # -- 2. --

    def _propose(self, state: TrustState, metadata: Metadata[Root]) -> Draft:
        """Sign a root with what this machine has; publish it if that is enough, else keep it as a draft."""
        tag = self._tag()
        root = metadata.signed
        plan = Plan.of(copy.deepcopy(root.to_dict()))
        for signer in self._root_signers(state, plan):
            metadata.sign(signer, append=True)
        told = self._described(state, metadata)
        if told.missing:
            self._store.replace(DRAFT, metadata.to_bytes(), tag)
            return told
        # Others may have published since the draft was made: what they signed must hold under it, too.
        try:
            self._prepare(plan)
        except RegistryError:
            self._store.replace(DRAFT, metadata.to_bytes(), tag)
            raise
        if not self._store.put(f"{PREFIX}{root.version}.root.json", metadata.to_bytes()):
            raise Conflict("somebody else has just published a root", "run the same command again")
        self.drop()
        self._authority.client.refresh(signing=True)
        self.tidy()
        return told

    def _root_signers(self, state: TrustState, plan: Plan) -> list[Signer]:
        may = {*Plan.of(state.signed("root")).holders[ROOT].keys, *plan.holders[ROOT].keys}
        signers = [one for one in self._own(ROOT) if one.public_key.keyid in may]
        if not signers:
            raise BadSignature(
                "no root key of this registry is on this machine",
                "do this where a root key is kept, or insert the medium that holds it",
            )
        return signers

    def _tag(self) -> str | None:
        try:
            return self._store.stat(DRAFT).tag
        except NotFound:
            return None

    def _draft(self, state: TrustState) -> Metadata[Root] | None:
        """The draft in the store, hostile until it is described; one that is superseded counts as none."""
        from tuf.api.metadata import Metadata, Root
        from tuf.api.serialization import DeserializationError

        try:
            data = read(self._store, DRAFT)
        except NotFound:
            return None
        try:
            found = Metadata[Root].from_bytes(data)
        except DeserializationError as error:
            raise BadSignature(
                "the draft of a root cannot be read", "`registry trust sign --drop`"
            ) from error
        if not isinstance(found.signed, Root) or found.signed.version <= state.version("root"):
            return None
        return found

    def _described(self, state: TrustState, found: Metadata[Root]) -> Draft:
        """What a draft changes and what it lacks, after it has shown that it is an honest proposal."""
        mend = "do not sign it; `registry trust sign --drop` drops it"
        root = found.signed
        now = editions.metadata_of(state.document("root")).signed
        try:
            plan = Plan.of(copy.deepcopy(root.to_dict())).checked()
            rebuilt = plan.root(root.version)
            rebuilt.expires = min(root.expires, rebuilt.expires)
        except (KeyError, TypeError, ValueError, UsageError) as error:
            raise BadSignature(f"the draft of a root is no root of this registry: {error}", mend) from error
        if root.version != state.version("root") + 1 or rebuilt.to_dict() != root.to_dict():
            raise BadSignature("the draft of a root says more than who holds which role", mend)
        result = root.get_root_verification_result(now, found.signed_bytes, found.signatures)
        # Only the present root says whose proposal this is: a draft can list any key under any id.
        if not result.first.signed:
            raise BadSignature("no root key of this registry has signed the draft of a root", mend)
        return Draft(
            version=root.version,
            changes=tuple(Plan.of(state.signed("root")).changes(plan)),
            missing=max(result.first.missing, result.second.missing),
            digest=hashlib.sha256(found.signed_bytes).hexdigest(),
        )


def _unsigned(root: Root) -> Metadata[Root]:
    from tuf.api.metadata import Metadata

    return Metadata(root)


def _delegated(state: TrustState) -> Keys:
    found: Keys = state.signed("targets")["delegations"]["keys"]
    return found


def _delegate(edition: Edition, wanted: Keys) -> None:
    """Lets exactly these publishers sign versions; what none of them has signed is signed anew."""
    from securesystemslib.signer import Key

    publishers = [Key.from_dict(keyid, copy.deepcopy(dict(key))) for keyid, key in wanted.items()]
    edition.part("targets").delegations = delegations(publishers)
    for role in (NAMES, *edition.state.bins()):
        if not _valid(edition.state.document(role), wanted):
            edition.part(role)


def _valid(document: Document, keys: Keys) -> int:
    """How many of some keys have signed a document."""
    from securesystemslib.exceptions import UnverifiedSignatureError
    from securesystemslib.signer import Key

    metadata = editions.metadata_of(document)
    found = 0
    for keyid, key in keys.items():
        signature = metadata.signatures.get(keyid)
        if signature is not None:
            try:
                Key.from_dict(keyid, copy.deepcopy(dict(key))).verify_signature(
                    signature, metadata.signed_bytes
                )
                found += 1
            except UnverifiedSignatureError:
                continue
    return found
