"""Refreshing trust: from the pinned root to the newest metadata, and no byte in between believed unseen.

python-tuf's ``Updater`` is given the store as its network. It walks root -> timestamp -> snapshot -> targets
-> names and catches wrong signatures, rollback, freezing and expiry; what it verified it keeps in a private
folder of this machine, which is also its memory of what it has seen. While that memory is fresh enough for
the user, it is read without tuf and without the store.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.errors import (
    DigestMismatch,
    NetworkError,
    NotFound,
    RegistryError,
    StaleTrust,
    UsageError,
)
from registry.signing.explained import Withheld, changed_error, expired_error, explained, withheld_error
from registry.signing.trust import NAMES, PREFIX, TOP, Document, TrustState
from registry.storage.base import ObjectStore, read

if TYPE_CHECKING:
    from tuf.ngclient import FetcherInterface

_logger = logging.getLogger(__name__)

_BASE_URL = "store:///"
_ATTEMPTS = 4
_PAUSE_S = 0.05
_MEMORY = "memory.json"


class TrustClient:
    """Refreshes the trust metadata of a store, starting from the root that this machine pinned.

    Args:
        store: holds the metadata; hostile.
        folder: private folder of this machine for the pinned root and what was verified.
        max_age: seconds for which verified metadata is used without asking the store again.
    """

    def __init__(self, store: ObjectStore, folder: Path, max_age: float = 0.0) -> None:
        self._store = store
        self._folder = folder
        self._metadata = folder / "metadata"
        self._max_age = max_age

    @property
    def pinned(self) -> Path:
        """The file of the pinned root."""
        return self._folder / "pinned.root.json"

    def pin(self, root: bytes) -> None:
        """Makes a root the start of all trust on this machine; an existing pin is never replaced.

        Raises:
            UsageError: another root is pinned already.
        """
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            with self.pinned.open("xb") as stream:
                stream.write(root)
                stream.flush()
                os.fsync(stream.fileno())
        except FileExistsError:
            raise UsageError(
                f"a trust root is pinned already ({self.pinned})",
                mend="a pinned root is replaced by new roots that it signed, never by hand",
            ) from None

    def current(self) -> TrustState:
        """What was verified less than `max_age` ago, or else what `refresh` finds.

        If the store does not answer, what was verified last counts until its own time is over.

        Raises:
            RegistryError: see `refresh`.
        """
        if self._max_age > 0:
            known = self._recalled(self._max_age)
            if known is not None:
                return known
        try:
            return self.refresh()
        except NetworkError as error:
            known = self._recalled(None)
            if known is None:
                raise
            _logger.warning(
                "the store does not answer (%s); going on with the trust metadata verified before, which "
                "counts until %s",
                error.message,
                min(known.expires(role) for role in TOP).isoformat(timespec="seconds"),
            )
            return known

    def refresh(self, *, signing: bool = False) -> TrustState:
        """Fetches and verifies the newest metadata.

        Args:
            signing: bins whose time is over count too, because they are about to be signed anew.

        Raises:
            NotFound: no root is pinned on this machine.
            BadSignature: metadata is not signed by the keys that may sign it.
            DigestMismatch: the store's metadata was changed.
            ExpiredTrust: the time of the newest metadata is over.
            StaleTrust: the store shows older metadata than this machine has seen, or withholds it.
            NetworkError: the store does not answer.
        """
        bootstrap = self._pinned_root()
        with self.locked():
            known = self._unchanged(bootstrap, signing=signing)
            if known is not None:
                self._remember()
                return known
            for attempt in range(_ATTEMPTS):
                try:
                    self._update(bootstrap)
                    state = self._loaded(bootstrap, expired=signing)
                # A publisher may replace metadata while it is read; a withheld or changed file stays so.
                except (Withheld, DigestMismatch):
                    if attempt == _ATTEMPTS - 1:
                        raise
                    time.sleep(_PAUSE_S)
                else:
                    self._keep_up(state)
                    self._remember()
                    return state
        raise AssertionError("unreachable")

    def last_trusted(self) -> TrustState:
        """The state that was verified last, though its time may be over, if the store still shows it.

        What a signer renews is thereby never something that an attacker put into the store after the expiry.

        Raises:
            StaleTrust: nothing was verified before, or the store shows something else.
        """
        bootstrap = self._pinned_root()
        with self.locked():
            try:
                return self._loaded(bootstrap, expired=True)
            except (FileNotFoundError, DigestMismatch) as error:
                raise StaleTrust(
                    "the trust metadata has expired, and the store shows a state that was never verified",
                    mend="renew it on the machine that published last, or restore the store from a backup",
                ) from error

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes of this machine from refreshing at the same time."""
        self._metadata.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (self._folder / ".lock").open("a") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield

    def _pinned_root(self) -> bytes:
        try:
            return self.pinned.read_bytes()
        except FileNotFoundError:
            raise NotFound(
                f"no trust root is pinned under {self._folder}, so nothing can be believed",
                mend="make a registry with `registry init`, pin its root with `registry trust pin`, or set "
                "ADAPTER_FOUNDRY_HOME to a folder that has one",
            ) from None

    def _unchanged(self, bootstrap: bytes, *, signing: bool) -> TrustState | None:
        """What was verified before, if the store still shows exactly that and no newer root; None otherwise.

        The same bytes under the same root need no second verification, only their time is looked at again.
        That spares tuf, which most refreshes have no other use for.
        """
        known = self._recalled(None)
        if known is None:
            return None
        try:
            if read(self._store, f"{PREFIX}timestamp.json") != self._kept("timestamp"):
                return None
            with contextlib.suppress(NotFound):
                read(self._store, f"{PREFIX}{known.version('root') + 1}.root.json")
                return None
            return self._loaded(bootstrap, expired=signing)
        except (NotFound, StaleTrust, DigestMismatch):
            return None

    def _update(self, bootstrap: bytes) -> None:
        from tuf.ngclient import Updater

        with explained():
            updater = Updater(
                str(self._metadata), _BASE_URL, fetcher=_fetcher(self._store), bootstrap=bootstrap
            )
            updater.refresh()
            # Any path that the pattern matches makes the updater load and verify the delegation.
            updater.get_targetinfo(f"{NAMES}/any")

    def _loaded(self, bootstrap: bytes, *, expired: bool = False) -> TrustState:
        """Reads what the updater verified and kept, and compares the store's copies with it byte by byte.

        The updater does not read a file again that it knows; the comparison finds a changed one all the same.
        """
        documents: dict[str, Document] = {}
        for role in TOP:
            data = self._kept(role)
            documents[role] = json.loads(data)
            number = documents[role]["signed"]["version"]
            self._compare("timestamp.json" if role == "timestamp" else f"{number}.{role}.json", data)
        pinned: int = json.loads(bootstrap)["signed"]["version"]
        self._compare(f"{pinned}.root.json", bootstrap)
        for version in range(pinned + 1, documents["root"]["signed"]["version"]):
            history = self._metadata / "root_history" / f"{version}.root.json"
            self._compare(history.name, history.read_bytes())
        return self._state(documents, expired=expired)

    def _compare(self, name: str, trusted: bytes) -> None:
        try:
            data = read(self._store, PREFIX + name)
        except NotFound as error:
            raise withheld_error(error) from error
        if data != trusted or not _exact(data):
            raise changed_error(f"{name} differs from the verified copy")

    # -- bins --

    def _state(self, documents: Mapping[str, Document], *, expired: bool = False) -> TrustState:
        def read_bin(role: str) -> Document:
            try:
                return self._bin(role, documents, expired=expired)
            except Withheld:
                # A publisher removed what it had superseded; what is newer says at least as much.
                return self._bin(role, self.refresh().documents, expired=expired)

        return TrustState(documents=documents, read_bin=read_bin)

    def _bin(self, role: str, documents: Mapping[str, Document], *, expired: bool) -> Document:
        """The metadata of a bin that a verified snapshot names: the kept copy, or the store's, verified."""
        meta = documents["snapshot"]["signed"]["meta"][f"{role}.json"]
        kept = self._metadata / f"{role}.json"
        try:
            data = kept.read_bytes()
        except FileNotFoundError:
            data = b""
        if _digest(data) != meta.get("hashes", {}).get("sha256"):
            name = f"{meta['version']}.{role}.json"
            try:
                data = read(self._store, PREFIX + name)
            except NotFound as error:
                raise withheld_error(error) from error
            verify_bin(role, data, documents)
            _write(kept, data)
        document: Document = json.loads(data)
        if not expired and datetime.fromisoformat(document["signed"]["expires"]) <= datetime.now(UTC):
            raise expired_error(f"{role} is expired")
        return document

    def _keep_up(self, state: TrustState) -> None:
        """Reads bins anew that this machine has used before, so that they are there when it is offline."""
        meta = state.signed("snapshot")["meta"]
        for kept in self._metadata.glob("versions-*.json"):
            known = meta.get(kept.name, {}).get("hashes", {}).get("sha256")
            if known is not None and known != _digest(kept.read_bytes()):
                # Who asks for the bin hears what is wrong with it; nobody has asked yet.
                with contextlib.suppress(RegistryError):
                    self._bin(kept.stem, state.documents, expired=True)

    # -- memory --

    def _remember(self) -> None:
        """Notes which files belong together and when the store was asked; called after a whole refresh."""
        digests = {role: _digest(self._kept(role)) for role in TOP}
        _write(self._metadata / _MEMORY, json.dumps({"checked": time.time(), "sha256": digests}).encode())

    def _recalled(self, max_age: float | None) -> TrustState | None:
        """What was verified last, read from this machine alone; None if it is too old, expired or not whole.

        The folder is private and holds only what was verified, so nothing is verified again; the digests
        make sure that the files are those of one refresh. Each is read once, because another process may
        refresh meanwhile.
        """
        try:
            memory: Any = json.loads((self._metadata / _MEMORY).read_bytes())
            age = time.time() - memory["checked"]
            kept = {role: self._kept(role) for role in TOP}
            same = all(_digest(kept[role]) == memory["sha256"][role] for role in TOP)
            whole = same and self.pinned.exists()
            documents = {role: json.loads(kept[role]) for role in TOP}
        except (OSError, ValueError, KeyError, TypeError):
            return None
        state = replace(self._state(documents), remembered=True)
        now = datetime.now(UTC)
        fresh = max_age is None or 0 <= age <= max_age
        return state if whole and fresh and all(state.expires(role) > now for role in TOP) else None

    def _kept(self, role: str) -> bytes:
        return (self._metadata / f"{role}.json").read_bytes()


def verify_bin(role: str, data: bytes, documents: Mapping[str, Document]) -> None:
    """What tuf checks about delegated metadata: its digest, its signatures, its kind and its number.

    Raises:
        BadSignature, DigestMismatch: it does not hold.
    """
    import copy

    from tuf.api.exceptions import RepositoryError
    from tuf.api.metadata import Metadata, MetaFile, Targets

    meta = MetaFile.from_dict(copy.deepcopy(documents["snapshot"]["signed"]["meta"][f"{role}.json"]))
    delegator = Targets.from_dict(copy.deepcopy(documents["targets"]["signed"]))
    with explained():
        meta.verify_length_and_hashes(data)
        found = Metadata[Targets].from_bytes(data)
        delegator.verify_delegate(role, found.signed_bytes, found.signatures)
        if found.signed.type != Targets.type or found.signed.version != meta.version:
            raise RepositoryError(f"{role} is not the metadata that the snapshot names")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _exact(data: bytes) -> bool:
    """Whether JSON is written as we write it, compact and in lower case, so that no byte is idle."""
    document = json.loads(data)
    compact = json.dumps(document, indent=None, separators=(",", ":"), sort_keys=True).encode()
    return compact == data and all(
        signature["sig"] == signature["sig"].lower() for signature in document["signatures"]
    )


def _write(path: Path, data: bytes) -> None:
    """Replaces a small file of this machine's memory, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    temporary.write_bytes(data)
    temporary.replace(path)


def _fetcher(store: ObjectStore) -> FetcherInterface:
    """tuf's door to the store. Defined inside a function because its base class costs an import of tuf."""
    from tuf.api.exceptions import DownloadError, DownloadHTTPError
    from tuf.ngclient import FetcherInterface

    class StoreFetcher(FetcherInterface):
        def _fetch(self, url: str) -> Iterator[bytes]:
            try:
                return iter([read(store, PREFIX + url.removeprefix(_BASE_URL))])
            except NotFound as error:
                raise DownloadHTTPError(str(error.message), 404) from error
            except RegistryError as error:
                raise DownloadError(str(error.message)) from error

    return StoreFetcher()
