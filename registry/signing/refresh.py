"""Refreshing trust: from the pinned root to the newest metadata, and no byte in between believed unseen.

python-tuf's ``Updater`` is given the store as its network. It walks root -> timestamp -> snapshot -> targets
-> versions and catches wrong signatures, rollback, freezing and expiry; what it verified it keeps in a folder
of this machine, which is also its memory of what it has seen.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.errors import BadSignature, DigestMismatch, NotFound, RegistryError, StaleTrust, UsageError
from registry.signing.trust import PREFIX, VERSIONS, ExpiredTrust, TrustState
from registry.storage.base import ObjectStore, read

if TYPE_CHECKING:
    from tuf.api.metadata import Signed
    from tuf.ngclient import FetcherInterface

_BASE_URL = "store:///"
_ATTEMPTS = 4
_PAUSE_S = 0.05


class TrustClient:
    """Refreshes the trust metadata of a store, starting from the root that this machine pinned."""

    def __init__(self, store: ObjectStore, folder: Path) -> None:
        self._store = store
        self._folder = folder
        self._metadata = folder / "metadata"

    @property
    def pinned(self) -> Path:
        """The file of the pinned root."""
        return self._folder / "pinned.root.json"

    def pin(self, root: bytes) -> None:
        """Makes a root the start of all trust on this machine; an existing pin is never replaced.

        Raises:
            UsageError: another root is pinned already.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
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

    def refresh(self) -> TrustState:
        """Fetches and verifies the newest metadata.

        Raises:
            NotFound: no root is pinned on this machine.
            BadSignature: metadata is not signed by the keys that may sign it.
            DigestMismatch: the store's metadata was changed.
            ExpiredTrust: the time of the newest metadata is over.
            StaleTrust: the store shows older metadata than this machine has seen, or withholds it.
        """
        bootstrap = self._pinned_root()
        with self.locked():
            for attempt in range(_ATTEMPTS):
                try:
                    self._update(bootstrap)
                    return self._loaded(bootstrap)
                # A publisher may replace metadata while it is read; a withheld or changed file stays so.
                except (_Withheld, DigestMismatch):
                    if attempt == _ATTEMPTS - 1:
                        raise
                    time.sleep(_PAUSE_S)
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
                return self._loaded(bootstrap)
            except (FileNotFoundError, DigestMismatch) as error:
                raise StaleTrust(
                    "the trust metadata has expired, and the store shows a state that was never verified",
                    mend="renew it on the machine that published last, or restore the store from a backup",
                ) from error

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes of this machine from refreshing at the same time."""
        self._metadata.mkdir(parents=True, exist_ok=True)
        with (self._folder / ".lock").open("a") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield

    def _pinned_root(self) -> bytes:
        try:
            return self.pinned.read_bytes()
        except FileNotFoundError:
            raise NotFound(
                f"no trust root is pinned under {self._folder}, so nothing can be believed",
                mend="make a registry with `registry init`, or set ADAPTER_FOUNDRY_HOME to one",
            ) from None

    def _update(self, bootstrap: bytes) -> None:
        from tuf.api import exceptions
        from tuf.ngclient import Updater

        try:
            updater = Updater(
                str(self._metadata), _BASE_URL, fetcher=_fetcher(self._store), bootstrap=bootstrap
            )
            updater.refresh()
            # Any name that the pattern matches makes the updater load and verify the delegation.
            updater.get_targetinfo("any:1")
        except exceptions.ExpiredMetadataError as error:
            raise _expired(str(error)) from error
        except exceptions.BadVersionNumberError as error:
            raise StaleTrust(
                f"the store shows older trust metadata than this machine has already seen ({error})",
                mend="do not use this store until its owner explains; nothing was loaded",
            ) from error
        except exceptions.UnsignedMetadataError as error:
            raise BadSignature(
                f"trust metadata is not signed by the keys that may sign it ({error})",
                mend="the store may have been tampered with; nothing was loaded",
            ) from error
        except exceptions.DownloadLengthMismatchError as error:
            raise _changed(str(error)) from error
        except exceptions.DownloadError as error:
            raise _withheld(error) from error
        except exceptions.RepositoryError as error:
            raise _changed(str(error)) from error

    def _loaded(self, bootstrap: bytes) -> TrustState:
        """Parses what the updater verified and kept, and compares the store's copies with it byte by byte.

        The updater does not read a file again that it knows; the comparison finds a changed one all the same.
        """
        from tuf.api.metadata import Metadata, Root, Snapshot, Targets, Timestamp

        def local(role: str, kind: type[Signed]) -> Any:
            data = (self._metadata / f"{role}.json").read_bytes()
            signed: Signed = Metadata.from_bytes(data).signed
            if not isinstance(signed, kind):
                raise _changed(f"{role}.json is not {kind.type} metadata")
            name = "timestamp.json" if role == Timestamp.type else f"{signed.version}.{role}.json"
            self._compare(name, data)
            return signed

        state = TrustState(
            root=local(Root.type, Root),
            timestamp=local(Timestamp.type, Timestamp),
            snapshot=local(Snapshot.type, Snapshot),
            targets=local(Targets.type, Targets),
            version_targets=local(VERSIONS, Targets),
        )
        pinned = Metadata[Root].from_bytes(bootstrap).signed.version
        self._compare(f"{pinned}.root.json", bootstrap)
        for version in range(pinned + 1, state.root.version):
            history = self._metadata / "root_history" / f"{version}.root.json"
            self._compare(history.name, history.read_bytes())
        return state

    def _compare(self, name: str, trusted: bytes) -> None:
        try:
            data = read(self._store, PREFIX + name)
        except NotFound as error:
            raise _withheld(error) from error
        if data != trusted or not _exact(data):
            raise _changed(f"{name} differs from the verified copy")


class _Withheld(StaleTrust):
    """A metadata file is missing; worth another look, because publishing removes superseded files."""


def _expired(what: str) -> ExpiredTrust:
    role = what.removeprefix("New ").removeprefix("Final ").split(".")[0].split(" ")[0]
    mends = {
        "root": "the root's owner must sign a new root",
        "targets": "promote an alias again (`registry promote`) where the approver key is kept",
        VERSIONS: "push an adapter again (`registry push`) where the publisher key is kept",
    }
    return ExpiredTrust(
        f"the trust metadata of the store has expired ({what})",
        mend=mends.get(role, "run any `registry` command where the online key is kept, which renews it")
        + "; if it was renewed, the store is withholding the newer one",
    )


def _changed(what: str) -> DigestMismatch:
    return DigestMismatch(
        f"the trust metadata in the store was changed ({what})",
        mend="the store may have been tampered with; nothing was loaded",
    )


def _withheld(error: Exception) -> _Withheld:
    return _Withheld(
        f"the store withholds trust metadata ({error})",
        mend="check that the store is complete and the right one; nothing was loaded",
    )


def _exact(data: bytes) -> bool:
    """Whether JSON is written as we write it, compact and in lower case, so that no byte is idle."""
    document = json.loads(data)
    compact = json.dumps(document, indent=None, separators=(",", ":"), sort_keys=True).encode()
    return compact == data and all(
        signature["sig"] == signature["sig"].lower() for signature in document["signatures"]
    )


def _fetcher(store: ObjectStore) -> FetcherInterface:
    """tuf's door to the store. Defined inside a function because its base class costs an import of tuf."""
    from tuf.api.exceptions import DownloadHTTPError
    from tuf.ngclient import FetcherInterface

    class StoreFetcher(FetcherInterface):
        def _fetch(self, url: str) -> Iterator[bytes]:
            try:
                return iter([read(store, PREFIX + url.removeprefix(_BASE_URL))])
            except NotFound as error:
                raise DownloadHTTPError(str(error.message), 404) from error
            except RegistryError as error:
                raise DownloadHTTPError(str(error.message), 500) from error

    return StoreFetcher()
