"""What the registry says now: one round to the store, however many references are followed.

A server must not stop because its registry does. So a state that was verified stays in use until a newer one
is: while the store is down, while it shows what is not signed, and after its time is over. What cannot be
seen for so long is said in `problem`.
"""

from __future__ import annotations

import copy
import logging
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from registry.errors import Explained, NetworkError, Revoked, StaleTrust, shown
from registry.manifest import WEIGHTS_NAME
from serving.errors import NotServed, ServingError

if TYPE_CHECKING:
    from registry.admission import VerifiedAdapter
    from registry.digest import Digest
    from registry.reference import Reference
    from registry.settings import Layout
    from registry.signing.authority import Authority
    from registry.signing.trust import Target, TrustState, VersionView
    from serving.metrics import Metrics

_logger = logging.getLogger(__name__)

_ANSWER_SECONDS: Final = 5.0
_RENEWAL_SECONDS: Final = 60.0
_OFFLINE_SECONDS: Final = 86400.0
"""How old the memory may be that is taken without another look; its own expiry counts anyway."""


class Watch:
    """Asks the registry of a data folder and keeps the newest answer that was verified; thread-safe.

    Args:
        place: the registry.
        metrics: is told whether the registry answers and what was refused.

    Attributes:
        state: the newest verified state; None before the first.
        error: why the last round brought nothing; None is well. ``problem`` says it in words.
        checked: time in seconds since the epoch of the last round that the registry confirmed.
    """

    def __init__(self, place: Layout, metrics: Metrics | None = None) -> None:
        self._place = place
        self._metrics = metrics
        self._authority: Authority | None = None
        self._renewed = float("-inf")
        self._lock = threading.Lock()
        self.state: TrustState | None = None
        self.error: Explained | None = None
        self.checked: float | None = None

    @property
    def problem(self) -> str | None:
        """Why the last round brought nothing, in words; None is well."""
        error = self.error  # once: a round may end meanwhile, and take it away
        if error is None:
            return None
        if isinstance(error, NetworkError):
            return f"the registry does not answer: {said(error)}"
        return f"the registry cannot be believed: {said(error)}"

    @property
    def place(self) -> Layout:
        """The registry as a load should open it: with its memory while the store does not answer.

        It would come to that by itself, after waiting for the store each time that it is asked.
        """
        if not isinstance(self.error, NetworkError):
            return self._place
        settings = self._place.settings.model_copy(update={"trust_max_age": _OFFLINE_SECONDS})
        return replace(self._place, settings=settings)

    def refresh(self) -> bool:
        """Ask the registry once; what went wrong is kept in ``problem`` and logged when it is new.

        Returns:
            Whether the registry confirmed its state.
        """
        with self._lock:
            try:
                state = self._newest()
                self._require_newer(state)
            except Exception as error:  # the thread that follows must outlive whatever a store does
                self._failed(error)
                return False
            self.state = state
            if state.remembered:
                self._failed(NetworkError("this machine uses what it verified before"))
                return False
            if self.error is not None:
                _logger.info("the registry answers again")
            self._tell(up=True)
            self.error, self.checked = None, time.time()
            return True

    def resolve(self, reference: Reference) -> Target:
        """Return what a reference means by the newest verified state.

        Raises:
            NotFound: nothing of that name is signed.
            RegistryError: the registry was never reached, or has signed names that cannot be read.
        """
        error, state = self.error, self.state  # once and in this order: a round may end meanwhile
        if state is not None:
            return state.resolve(reference)
        if error is not None:
            raise bare(error)
        raise NotServed("the registry was not asked yet", "try again in a moment")

    def about(self, reference: Reference) -> VersionView:
        """Return the keys that count for statements about what a reference means; raises as `resolve`."""
        target = self.resolve(reference)
        assert self.state is not None  # or nothing had been resolved
        return self.state.about(target)

    def revoked(self, *digests: Digest) -> str | None:
        """Return the signed reason why one of some manifests or files was withdrawn, or None; no IO."""
        state = self.state
        if state is None:
            return None
        return next((reason for one in digests if (reason := state.is_revoked(one)) is not None), None)

    def check(self, adapter: VerifiedAdapter) -> None:
        """Make sure that an adapter was not withdrawn since it was admitted; no IO, microseconds.

        Raises:
            Revoked: it was.
        """
        reason = self.revoked(*digests_of(adapter))
        if reason is not None:
            raise revoked_error(adapter.reference or adapter.digest, reason)

    def _newest(self) -> TrustState:
        from registry.signing.signers import ONLINE
        from registry.signing.trust import ExpiredTrust

        if self._authority is None:
            self._authority = self._open()
        if self.state is None:
            return self._authority.state()  # what a restarted machine remembers counts while its time lasts
        due = time.monotonic() >= self._renewed + _RENEWAL_SECONDS and self._authority.keys.holds(ONLINE)
        try:
            state = self._authority.client.refresh()
            due = due and state.renewal_due(datetime.now(UTC))
        except ExpiredTrust:
            if not due:
                raise
        if due:
            # Where the online key is on this machine, as on a laptop, nobody else renews the timestamp.
            self._renewed = time.monotonic()
            return self._authority.state()
        return state

    def _open(self) -> Authority:
        """The trust of the data folder over a store that is given up on soon: the next round tries again."""
        from registry.client import Registry
        from registry.signing.authority import Authority
        from registry.signing.refresh import TrustClient
        from registry.storage.stores import open_store
        from registry.storage.wire import Patience

        patience = Patience(answer=_ANSWER_SECONDS, attempts=2)
        store = open_store(self._place.store_uri, patience=patience)
        return Authority(store, Registry(self._place).keys, TrustClient(store, self._place.trust))

    def _require_newer(self, state: TrustState) -> None:
        """Refuse a state older than the one in use, which the folder on the disk may have forgotten."""
        if self.state is not None and _age(state) < _age(self.state):
            raise StaleTrust(
                "the store shows older trust metadata than this server has already seen",
                "do not use this store until its owner explains",
            )

    def _failed(self, error: Exception) -> None:
        self._tell(up=False)  # first: who reads the words finds the figure to them
        before, self.error = self.error, bare(error)
        new = type(before) is not type(self.error)
        if new:
            detail = None if isinstance(error, Explained) else error
            _logger.warning("%s; what was verified before goes on", self.problem, exc_info=detail)
            if self._metrics is not None and not isinstance(error, NetworkError):
                self._metrics.refused(self.error)

    def _tell(self, *, up: bool) -> None:
        if self._metrics is not None:
            self._metrics.registry_up.set(1 if up else 0)


def digests_of(adapter: VerifiedAdapter) -> tuple[Digest, ...]:
    """Return the digests whose revocation withdraws an adapter: of its manifest and of its weights."""
    if adapter.manifest is None:
        return (adapter.digest,)
    return adapter.digest, adapter.manifest.file(WEIGHTS_NAME).sha256


def revoked_error(what: object, reason: str) -> Revoked:
    """Return the error that whoever asks for a withdrawn adapter gets."""
    return Revoked(f"{what} was revoked: {shown(reason)}", "use another version; `registry list` shows them")


def bare(error: Exception) -> Explained:
    """Return an error to keep, or to raise in many threads: without the frames and bytes of its traceback."""
    if isinstance(error, Explained):
        return copy.copy(error)
    return ServingError(said(error), "the server's log says more")


def said(error: BaseException) -> str:
    """Return what an error says, in one line."""
    if isinstance(error, Explained):
        return error.message
    return f"{type(error).__name__}: {shown(error)}"


def _age(state: TrustState) -> tuple[int, int]:
    """A newer root may begin the timestamps anew, after a theft of their key."""
    return state.version("root"), state.version("timestamp")
