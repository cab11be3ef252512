"""Versions that were admitted, and the references that they serve."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from registry.digest import Digest
from registry.errors import Explained, NetworkError, NotFound, Revoked
from registry.manifest import WEIGHTS_NAME
from registry.reference import Reference
from serving import badges
from serving.backend import AdapterStatus, State
from serving.errors import NotServed
from serving.trust import Watch, bare, revoked_error, said

if TYPE_CHECKING:
    from registry.admission import VerifiedAdapter
    from registry.client import Registry
    from registry.manifest import AdapterManifest
    from registry.signing.trust import Target


@dataclass(frozen=True, kw_only=True, slots=True)
class Version:
    """A version that was admitted.

    Attributes:
        name: of the adapter.
        number: its version.
        digest: of its manifest.
        digests: those whose revocation withdraws it.
        facts: of its signed card, see `serving.badges`.
        adapter: the adapter itself; None in a follower that holds no weights.
    """

    name: str
    number: int
    digest: Digest
    digests: tuple[Digest, ...]
    facts: Mapping[str, Any] = field(repr=False)
    adapter: VerifiedAdapter | None = field(repr=False)

    @classmethod
    def of(
        cls, manifest: AdapterManifest, adapter: VerifiedAdapter | None, registry: Registry, watch: Watch
    ) -> Version:
        """Return the record of an adapter that was just admitted; its statements are those in the cache."""
        from registry.cache import AdapterCache

        digest = manifest.digest
        statements = AdapterCache(registry.place.cache).read_statements(digest) or ()
        trust = watch.about(Reference(name=manifest.name, digest=digest))
        return cls(
            name=manifest.name,
            number=manifest.version,
            digest=digest,
            digests=(digest, manifest.file(WEIGHTS_NAME).sha256),
            facts=badges.facts(manifest, statements, trust, None if adapter is None else adapter.scan),
            adapter=adapter,
        )

    def answers(self, reference: Reference) -> bool:
        """Whether it is the adapter that a reference names, as far as the reference says."""
        return (
            reference.name == self.name
            and reference.version in (None, self.number)
            and reference.digest in (None, self.digest)
        )

    def in_memory(self) -> VerifiedAdapter:
        """Return the adapter itself.

        Raises:
            NotServed: this process holds no weights.
        """
        if self.adapter is None:
            raise NotServed("this process holds no weights", "ask one that does")
        return self.adapter

    @property
    def size(self) -> int:
        """Bytes of its weights in memory."""
        return 0 if self.adapter is None else len(self.adapter.weights)

    def __str__(self) -> str:
        return f"{self.name}:{self.number}"


@dataclass(kw_only=True, slots=True)
class Entry:
    """A reference, what it means and what serves it; the follower changes it under its lock.

    Attributes:
        reference: as it was configured or asked for.
        followed: it was configured.
        meant: what the newest verified state says that it means.
        served: the version that answers.
        since, checked: see `AdapterStatus`.
        error: why what it means is not served.
        doubt: why what is served would not be admitted today.
        judge_at: when that is looked at again, on the monotonic clock.
        pause: seconds until it is tried again after the last refusal.
        retry_at: on the monotonic clock.
        loading: the loading that goes on.
        judging: the judgement of what is served that goes on.
        settled: it was known once what becomes of it: served, refused, revoked, or not promoted.
    """

    reference: Reference
    followed: bool = False
    meant: Target | None = None
    served: Version | None = None
    since: float | None = None
    checked: float | None = None
    error: Explained | None = None
    doubt: Explained | None = None
    judge_at: float = 0.0
    pause: float = 0.0
    retry_at: float = 0.0
    loading: Future[None] | None = None
    judging: Future[None] | None = None
    settled: bool = False

    @property
    def state(self) -> State:
        """See `AdapterStatus.state`."""
        if self.served is not None:
            return "ready"
        if isinstance(self.error, Revoked):
            return "revoked"
        # What nobody has signed yet was not refused either: it is waited for.
        waited_for = self.error is None or isinstance(self.error, (NetworkError, NotFound))
        return "loading" if waited_for else "refused"

    def answer(self) -> Version:
        """Return the version that serves the reference.

        Raises:
            NotServed: none does, yet.
            Explained: why none does.
        """
        version, error = self.served, self.error
        if version is not None:
            return version
        if error is not None:
            raise bare(error)
        raise NotServed(f"{self.reference} is not loaded yet", "try again in a moment")

    def status(self, watch: Watch) -> AdapterStatus:
        """Return how the reference is served."""
        version, state, error = self.served, self.state, self.error
        if version is not None and (reason := watch.revoked(*version.digests)) is not None:
            version, state, error = None, "revoked", revoked_error(version, reason)
        told = [said(error)] if error is not None else []
        if version is None and self.followed and isinstance(error, NotFound):
            told = [f"it waits until {self.reference} is promoted"]
        if version is not None and self.doubt is not None:
            told.append(f"{version} would not be admitted today: {said(self.doubt)}")
        problem = watch.problem  # once: another thread's round may take it away
        if problem is not None and not any(text in problem for text in told):
            told.append(problem)
        number = digest = None
        if version is not None:
            number, digest = version.number, version.digest
        elif state == "revoked" and self.meant is not None:
            number, digest = number_of(self.meant), self.meant.digest
        return AdapterStatus(
            reference=str(self.reference),
            followed=self.followed,
            state=state,
            name=self.reference.name,
            version=number,
            digest=digest,
            facts=None if version is None else version.facts,
            problem="; ".join(told) or None,
            since=None if version is None else self.since,
            checked=self.checked,
        )


def missing(followed: Collection[Entry], watch: Watch) -> str | None:
    """Return why requests should not be sent to who serves some references; None where they may be.

    Each one is waited for until it is known what becomes of it. One that is refused, revoked, or that nobody
    has promoted is answered with just that, and takes nobody away from the others: every server of a fleet
    says the same of it. Where nothing serves at all, a revocation has to be told to whoever asks.
    """
    waited_for = [one.status(watch) for one in followed if not one.settled]
    if not waited_for:
        waited_for = [one.status(watch) for one in followed]
        if any(one.state in ("ready", "revoked") for one in waited_for):
            return None
    for status in waited_for:
        return f"{status.reference} is {status.state}: {status.problem or 'it takes a moment'}"
    return None


def number_of(target: Target) -> int:
    """Return the version that a signed name speaks of."""
    return int(target.custom.get("version") or target.path.rpartition(":")[2])
