"""Follows the registry: which verified adapter answers to a reference now.

A reference is served by a `Version`. Each round asks the registry what all references mean; a new meaning is
loaded, admitted and put onto the device by another thread, and only then takes the old one's place, in one
assignment. Whoever holds the old version finishes with it. What is refused changes nothing and is tried again
with growing pauses; what is revoked stops at once. Other references are served on demand, those that were
asked for last, and looked after in the same rounds.

The file is long because everything is in it that happens under the one lock.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import TYPE_CHECKING, Final

from registry.digest import Digest
from registry.errors import Explained, NetworkError, NotFound, Revoked
from registry.reference import Reference
from serving.backend import AdapterStatus
from serving.errors import NotServed, Overloaded
from serving.judging import Judge
from serving.kept import Kept
from serving.logs import event
from serving.pairs import require_declared
from serving.trust import Watch, bare, revoked_error, said
from serving.versions import Entry, Version, missing, number_of

if TYPE_CHECKING:
    from registry.admission import VerifiedAdapter
    from registry.client import Registry
    from registry.signing.trust import Target
    from serving.metrics import Metrics
    from serving.settings import ServingSettings

_logger = logging.getLogger(__name__)

MAX_ON_DEMAND: Final = 64
"""References that are served on demand; the one that was asked for longest ago makes room."""
MAX_LOADING: Final = 8
"""References on demand that are loaded or wait for it; more are answered with 429."""
_LONGEST_PAUSE: Final = 60.0
_LOADERS: Final = 2
_STOP_SECONDS: Final = 2.0


class Follower:
    """Serves the adapters of a registry by reference, and follows what their references mean; thread-safe.

    Args:
        registry: whose adapters; only its data folder and settings are used.
        settings: which references are followed (``adapters`` and all of ``stacked``), how often the registry
            is asked, whether others are served on demand, and how much memory adapters may take that nobody
            follows.
        on_new: is given an adapter before it serves, in a thread of the follower; puts it onto the device. If
            it raises, the adapter is refused.
        on_named: is given a version before a followed reference moves to it, also to one that was served
            before; if it raises, the version is refused. For others that have to be ready for it.
        metrics: counts promotions, loads and refusals.
        light: verify files into the local cache and hold no weights: for a process that only has to know
            which digest a reference means.

    Raises:
        registry.errors.UsageError: a reference in the settings is not written well.
    """

    def __init__(
        self,
        registry: Registry,
        settings: ServingSettings,
        *,
        on_new: Callable[[VerifiedAdapter], None] = lambda adapter: None,
        on_named: Callable[[Version], None] = lambda version: None,
        metrics: Metrics | None = None,
        light: bool = False,
    ) -> None:
        self._place = registry.place
        self._settings = settings
        self._on_new = on_new
        self._on_named = on_named
        self._metrics = metrics
        self._light = light
        self._watch = Watch(registry.place, metrics)
        self._lock = threading.RLock()
        texts = [*settings.adapters, *(text for under in settings.stacked.values() for text in under)]
        references = [Reference.parse(text) for text in texts]
        self._entries: OrderedDict[str, Entry] = OrderedDict(
            (str(one), Entry(reference=one, followed=True)) for one in references
        )
        self._kept = Kept(settings.adapter_memory, MAX_ON_DEMAND)
        # What comes first decides on the base, so that has an order. Later, none waits for another's load.
        self._first = ThreadPoolExecutor(1, "first")
        self._moves = ThreadPoolExecutor(max(1, len(self._entries)), "move")
        self._on_demand = ThreadPoolExecutor(_LOADERS, "load")
        self._judge = Judge(self._watch, self._lock, metrics)
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    # -- rounds --

    def start(self) -> None:
        """Take the first round, with all that is loaded in it, and go on in a thread of its own.

        An adapter that cannot be served yet is no error: `missing` tells, and later rounds try again.
        """
        self.poll()
        self._thread = threading.Thread(target=self._run, name="follower", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the rounds; what is served stays."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(_STOP_SECONDS)  # it may wait for a store that hangs
        for pool in (self._first, self._moves, self._on_demand):
            pool.shutdown(wait=False, cancel_futures=True)
        self._judge.stop()

    def poll(self, *, wait: bool = True) -> None:
        """Take one round: ask the registry once, and move every reference to what it means now.

        Args:
            wait: until what had to be loaded is served or refused.
        """
        confirmed = self._watch.refresh()
        with self._lock:
            # What was refused to somebody who asked is tried again when somebody asks again.
            entries = [one for one in self._entries.values() if one.followed or one.served is not None]
        jobs = [self._look(entry, confirmed=confirmed) for entry in entries]
        if wait:
            futures.wait([job for job in jobs if job is not None])

    def _run(self) -> None:
        while not self._stopped.wait(self._settings.follow_seconds):
            try:
                self.poll(wait=False)
            except Exception:  # a mistake in one round must not end all following
                _logger.exception("a round of following failed")

    def _look(self, entry: Entry, *, confirmed: bool) -> Future[None] | None:
        """Bring one reference to what it means now; returns the loading that it takes, if it takes one."""
        try:
            target = self._watch.resolve(entry.reference)
        except Exception as error:  # never reached, names that cannot be read, a name that is signed no more
            self._unnamed(entry, error)
            return None
        with self._lock:
            if entry.meant is None or entry.meant.digest != target.digest:
                entry.pause = entry.retry_at = 0.0
            entry.meant = target
            if isinstance(entry.error, NotFound):
                entry.error = None  # it is there now, and takes a moment to load
            if confirmed:
                entry.checked = self._watch.checked
            known = self._kept.get(target.digest, entry.reference)
            reason = self._watch.revoked(*((target.digest,) if known is None else known.digests))
            if reason is not None:
                self._withdraw(entry, target, reason)
                return None
            if entry.served is not None and entry.served.digest == target.digest:
                entry.error = None
                return self._judge.look(entry) if confirmed and not self._stopped.is_set() else None
            again = confirmed and isinstance(entry.error, NetworkError)
            due = again or time.monotonic() >= entry.retry_at
            if entry.loading is None and due and not self._stopped.is_set():
                moves = self._first if entry.since is None else self._moves
                pool = moves if entry.followed else self._on_demand
                entry.loading = pool.submit(self._load, entry, target)
            return entry.loading

    def _unnamed(self, entry: Entry, error: Exception) -> None:
        with self._lock:
            if isinstance(error, NotFound) and not entry.followed:
                self._entries.pop(str(entry.reference), None)
            # Taking an alias away withdraws nothing: a revocation does.
            entry.error = bare(error)
            entry.settled |= isinstance(error, NotFound)

    # -- answers --

    def resolve(self, reference: str) -> VerifiedAdapter:
        """Return the adapter that answers to a followed reference now; does not wait, raises as `meant`."""
        return self._answer(self._ask(reference)[0]).in_memory()

    async def meant(self, reference: str) -> Version:
        """Return the version that answers to a reference now; waits while one is loaded on demand.

        Args:
            reference: name@alias, name:version, name@sha256:<hex>, or the bare digest of one in memory.

        Raises:
            NotServed: it is not served here, or not yet.
            Overloaded: too many references are being loaded.
            registry.errors.NotFound: nothing of that name is signed.
            registry.errors.Revoked: what it means was withdrawn.
            registry.errors.RegistryError: it is refused, or no reference.
        """
        found, loading = await asyncio.to_thread(self._ask, reference)
        if loading is not None:
            await _ended(loading)
        return self._answer(found)

    def _ask(self, reference: str) -> tuple[Version | Entry, Future[None] | None]:
        """Find what answers to a reference, and what has to end before it does; does not wait."""
        if reference.startswith("sha256:"):
            return self._with_digest(Digest.parse(reference)), None
        asked = Reference.parse(reference)
        with self._lock:
            entry = self._entries.get(str(asked))
        return self._demand(asked) if entry is None or not entry.followed else (entry, None)

    def _answer(self, found: Version | Entry) -> Version:
        version = found.answer() if isinstance(found, Entry) else found
        reason = self._watch.revoked(*version.digests)
        if reason is not None:
            raise revoked_error(version, reason)
        return version

    def check(self, adapter: VerifiedAdapter) -> None:
        """Make sure that an adapter was not revoked since; without IO, for every step of every request.

        Raises:
            registry.errors.Revoked: it was.
        """
        self._watch.check(adapter)

    def together(self, adapters: Sequence[VerifiedAdapter]) -> None:
        """Make sure that adapters may work together; reads the policy, so that it is today's.

        Raises:
            registry.errors.PolicyRefused: two of them are no declared pair, and the policy refuses that.
        """
        from registry.policy import RegistryPolicy

        state = self._watch.state
        if len(adapters) < 2 or state is None:
            return
        named: list[tuple[str, Digest]] = [(path, meant.digest) for path, meant in state.aliases().items()]
        with self._lock:
            # A version that an alias meant before serves for as long as the new one is not ready.
            named += [
                (str(entry.reference), entry.served.digest)
                for entry in self._entries.values()
                if entry.served is not None and entry.reference.alias is not None
            ]
        require_declared(
            RegistryPolicy.load(self._place.policy).scan,
            [(one, frozenset(path for path, digest in named if digest == one.digest)) for one in adapters],
        )

    @property
    def missing(self) -> str | None:
        """Why requests should go elsewhere; None where they should not, see `serving.versions.missing`."""
        with self._lock:
            return missing([one for one in self._entries.values() if one.followed], self._watch)

    def statuses(self) -> list[AdapterStatus]:
        """Return what is served: the followed references as in the settings, then those on demand."""
        with self._lock:
            return [entry.status(self._watch) for entry in self._entries.values()]

    async def status(self, reference: str) -> AdapterStatus:
        """Return how a reference is served; one on demand is loaded for it, and raises as `meant`."""
        with self._lock:
            entry = self._entries.get(reference)
            if entry is not None and entry.followed:
                return entry.status(self._watch)
        version = await self.meant(reference)
        with self._lock:
            entry = self._entries.get(reference)
            if entry is not None:
                return entry.status(self._watch)
        found = Entry(reference=Reference(name=version.name, digest=version.digest), served=version)
        return found.status(self._watch)

    def _with_digest(self, digest: Digest) -> Version:
        with self._lock:
            held = [one.served for one in self._entries.values()]
            if self._settings.on_demand:
                held.append(self._kept.with_digest(digest))
        for version in held:
            if version is not None and version.digest == digest:
                return version
        reason = self._watch.revoked(digest)
        if reason is not None:
            raise revoked_error(digest, reason)
        raise NotServed(f"{digest} is not served here", f"name it as name@{digest}")

    def _demand(self, asked: Reference) -> tuple[Version | Entry, Future[None] | None]:
        """What a reference means that nobody follows: in memory, or loaded for the first who asks."""
        target = self._watch.resolve(asked)
        with self._lock:
            for one in self._entries.values():
                served = one.served if one.followed else None
                if served is not None and served.digest == target.digest and served.answers(asked):
                    return served, None
            if not self._settings.on_demand:
                raise NotServed(f"{asked} is not served here", f"choose from: {', '.join(self._entries)}")
            entry = self._entries.get(str(asked)) or self._new_entry(asked)
            self._entries.move_to_end(str(asked))
            if entry.served is not None:
                self._kept.touch(entry.served, asked)
                return entry.served, None
        return entry, self._look(entry, confirmed=False)

    def _new_entry(self, asked: Reference) -> Entry:
        others = [one for one in self._entries.values() if not one.followed]
        idle = [one for one in others if one.loading is None]
        if len(others) - len(idle) >= MAX_LOADING:
            raise Overloaded(f"{asked} has to wait: too many adapters are being loaded", "try again", 5.0)
        if len(others) >= MAX_ON_DEMAND:
            del self._entries[str(idle[0].reference)]
        return self._entries.setdefault(str(asked), Entry(reference=asked, followed=False))

    # -- loading --

    def _load(self, entry: Entry, target: Target) -> None:
        try:
            version = self._fetch(entry.reference, target)
            if entry.followed:
                self._on_named(version)
            meant = self._watch.resolve(entry.reference)
        except Exception as error:  # whatever one adapter causes, the others go on
            self._refused(entry, error)
        else:
            self._arrived(entry, version, meant)

    def _fetch(self, reference: Reference, target: Target) -> Version:
        """Admit what a reference means and put it onto the device."""
        from registry.client import Registry

        with self._lock:
            known = self._kept.get(target.digest, reference)
            held = self._kept.with_digest(target.digest)  # perhaps for another reference
        if known is not None:  # a rollback
            if known.adapter is not None:
                self._on_new(known.adapter)
            return known
        registry = Registry(self._watch.place)  # of its own, so that the policy is today's
        adapter = None if held is None else held.adapter
        with self._timed(reference.name):
            if self._light or adapter is not None:
                # Its bytes were admitted; whether this reference may mean them is judged by its own policy.
                manifest = registry.pull(reference).manifest
            else:
                adapter = registry.load(reference)
                assert adapter.manifest is not None  # a registry gives no candidates
                manifest = adapter.manifest
            if manifest.digest != target.digest:
                self._watch.refresh()  # it was moved since the last round
            if adapter is not None:
                self._on_new(adapter)
        return Version.of(manifest, adapter, registry, self._watch)

    def _arrived(self, entry: Entry, version: Version, meant: Target) -> None:
        """Serve a version, unless the registry has said something else while it was loaded."""
        with self._lock:
            entry.loading, entry.meant = None, meant
            self._kept.put(version, entry.reference)
            if meant.digest == version.digest:
                self._serve(entry, version)
            followed = [
                one.served for one in self._entries.values() if one.followed and one.served is not None
            ]
            for gone in self._kept.make_room(followed):
                for text, one in list(self._entries.items()):
                    if not one.followed and one.served is gone:
                        del self._entries[text]

    def _refused(self, entry: Entry, error: Exception) -> None:
        with self._lock:
            entry.loading = None
            entry.pause = min(max(self._settings.follow_seconds, 2 * entry.pause), _LONGEST_PAUSE)
            entry.retry_at = time.monotonic() + entry.pause
            entry.error = bare(error)
            entry.settled |= not isinstance(error, NetworkError)
            if isinstance(error, Revoked):
                entry.served = None
        event("adapter refused", level=logging.WARNING, reference=str(entry.reference), problem=said(error))
        if not isinstance(error, Explained):
            _logger.error("loading %s failed", entry.reference, exc_info=error)
        if self._metrics is not None and not isinstance(error, NetworkError):
            self._metrics.refused(bare(error))

    def _serve(self, entry: Entry, version: Version) -> None:
        before, entry.served, entry.error = entry.served, version, None
        entry.pause = entry.retry_at = 0.0
        entry.settled = True
        self._judge.begin(entry)
        if before is not None:
            self._kept.touch(before, entry.reference)  # who rolls back wants it at once
        entry.since = time.time()
        event(
            "adapter served" if before is None else "adapter promoted", reference=str(entry.reference),
            adapter=version.name, version=version.number, digest=str(version.digest),
        )  # fmt: skip
        if self._metrics is not None and entry.followed:
            self._metrics.followed_version.labels(reference=str(entry.reference)).set(version.number)
            if before is not None:
                self._metrics.promotions.labels(adapter=version.name).inc()

    def _withdraw(self, entry: Entry, target: Target, reason: str) -> None:
        error = revoked_error(f"{target.name}:{number_of(target)}, which {entry.reference} means,", reason)
        if not isinstance(entry.error, Revoked):
            name = str(entry.reference)
            event("adapter withdrawn", level=logging.WARNING, reference=name, problem=error.message)
        entry.served, entry.error, entry.settled = None, error, True
        self._kept.drop(target.digest, entry.reference)

    def _timed(self, name: str) -> AbstractContextManager[None]:
        return nullcontext() if self._metrics is None else self._metrics.loading(name)


async def _ended(job: Future[None]) -> None:
    """Wait until a job of a pool has ended; whoever gives up waiting leaves it to the others."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()

    def tell(_: object) -> None:
        with suppress(RuntimeError):  # the loop was closed, and nobody waits any more
            loop.call_soon_threadsafe(ended.set)

    job.add_done_callback(tell)
    await ended.wait()
