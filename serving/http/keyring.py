"""API keys: made once, shown once, kept as digests in one file of the data folder.

A token is ``afk_`` and 256 random bits. So much chance needs no slow hash: sha256 is enough, and nobody finds
a token from its digest. The file is read again whenever it has changed, so that a key that was revoked stops
at its next request, without a restart. It is written whole and renamed into place, by one writer at a time.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import hmac
import json
import os
import re
import secrets
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from registry.errors import shown
from serving.errors import ServingError, UsageError

Scope = Literal["edit", "read", "admin"]
"""What a key may do: edit pictures; see what is served, the metrics and the traces; everything, also the jobs
of other keys."""
SCOPES: Final[tuple[Scope, ...]] = ("edit", "read", "admin")
PREFIX: Final = "afk_"
SECRET_PREFIX: Final = "whsec_"  # noqa: S105 (what such a secret begins with)
MAX_KEYS: Final = 1000
MAX_FILE: Final = 4 << 20
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_TOKEN: Final = re.compile(r"afk_[A-Za-z0-9_-]{43}")
_RESERVED: Final = ("local", "public")


class KeysDamaged(ServingError):
    """The file of the keys cannot be read; nobody is let in."""


class KeyLimits(BaseModel):
    """What a key may ask for.

    Attributes:
        requests: a minute.
        pictures: that may be asked for in a minute.
        concurrent: requests at the same moment.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    requests: Annotated[int, Field(ge=1, le=1_000_000)] = 120
    pictures: Annotated[int, Field(ge=1, le=1_000_000)] = 240
    concurrent: Annotated[int, Field(ge=1, le=10_000)] = 16


class Key(BaseModel):
    """A key as it is kept.

    Attributes:
        name: of its owner; jobs belong to it.
        digest: sha256 of the token, hexadecimal.
        scopes: what it may do.
        limits: how much of it.
        created: seconds since the epoch.
        expires: when it ends by itself; None is never.
        revoked: when somebody ended it; None is not.
        webhook_secret: signs the webhooks of its jobs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    scopes: Annotated[tuple[Scope, ...], Field(min_length=1, strict=False)]
    limits: KeyLimits = KeyLimits()
    created: float
    expires: float | None = None
    revoked: float | None = None
    webhook_secret: Annotated[str, Field(pattern=r"^whsec_[A-Za-z0-9+/]{43}=$")]

    def alive(self, now: float) -> bool:
        """Whether it opens anything at a time."""
        return self.revoked is None and (self.expires is None or now < self.expires)

    def facts(self, now: float) -> dict[str, object]:
        """The key for people, without what has to stay secret."""
        state = "revoked" if self.revoked is not None else "valid" if self.alive(now) else "expired"
        return {
            "name": self.name,
            "state": state,
            "scopes": list(self.scopes),
            "created": _when(self.created),
            "expires": _when(self.expires),
            "revoked": _when(self.revoked),
            **{f"{what}_limit": value for what, value in self.limits.model_dump().items()},
        }


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: Literal[1] = 1
    keys: Annotated[tuple[Key, ...], Field(max_length=MAX_KEYS, strict=False)] = ()


class Keys:
    """The keys of one service.

    Args:
        path: the file; it need not exist.
        clock: seconds since the epoch.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._path, self._clock = path, clock
        self._lock = threading.Lock()
        self._seen: tuple[int, int, int] | None = None
        self._keys: tuple[Key, ...] = ()

    @classmethod
    def open(cls, home: Path) -> Keys:
        """Return the keys of a data folder."""
        return cls(home / "serving" / "keys.json")

    def all(self) -> Sequence[Key]:
        """Return every key, also those that are over.

        Raises:
            KeysDamaged: the file cannot be read.
        """
        with self._lock:
            seen = self._stamp()
            if seen != self._seen:
                self._keys, self._seen = self._read(), seen
            return self._keys

    def find(self, token: str) -> Key | None:
        """Return the key that a token opens; None when it opens nothing.

        Every key is compared, each in constant time: the time says nothing about how near a guess is.

        Raises:
            KeysDamaged: the file cannot be read.
        """
        if not _TOKEN.fullmatch(token):
            return None
        digest, found = hashlib.sha256(token.encode("ascii")).hexdigest(), None
        for key in self.all():
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found if found is not None and found.alive(self._clock()) else None

    def named(self, name: str) -> Key | None:
        """Return the living key of that name."""
        now = self._clock()
        return next((key for key in self.all() if key.name == name and key.alive(now)), None)

    def add(
        self,
        name: str,
        scopes: Sequence[Scope],
        *,
        limits: KeyLimits | None = None,
        days: float | None = None,
    ) -> tuple[str, Key]:
        """Make a key.

        Args:
            name: of its owner; never used before.
            scopes: what it may do.
            limits: how much of it.
            days: after which it ends by itself; None is never.

        Returns:
            The token, which is kept nowhere, and the key.

        Raises:
            UsageError: the name is not valid or was used before, there is no scope, or the time is over.
        """
        if not _NAME.fullmatch(name) or name in _RESERVED:
            raise UsageError(
                f"{shown(name)!r} is not a name for a key",
                "use 1 to 64 letters, digits, '.', '_' and '-'; 'local' and 'public' are taken",
            )
        if not scopes or (days is not None and not 0 < days <= 36500):
            raise UsageError(
                "a key needs a scope, and its time lies ahead", "give --scope, and --days above 0"
            )
        token = PREFIX + secrets.token_urlsafe(32)
        now = self._clock()
        key = Key(
            name=name,
            digest=hashlib.sha256(token.encode("ascii")).hexdigest(),
            scopes=tuple(dict.fromkeys(scopes)),
            limits=limits or KeyLimits(),
            created=now,
            expires=None if days is None else now + days * 86400,
            webhook_secret=SECRET_PREFIX + base64.b64encode(secrets.token_bytes(32)).decode("ascii"),
        )
        with self._writing() as keys:
            if any(other.name == name for other in keys):
                raise UsageError(
                    f"there is or was a key named {name}",
                    "choose another name: jobs of the old key belong to its name",
                )
            if len(keys) >= MAX_KEYS:
                raise UsageError(f"there are {MAX_KEYS} keys", f"remove old ones from {self._path}")
            self._write((*keys, key))
        return token, key

    def revoke(self, name: str) -> Key:
        """End a key at once.

        Raises:
            UsageError: there is no such key.
        """
        with self._writing() as keys:
            found = next((key for key in keys if key.name == name), None)
            if found is None:
                raise UsageError(f"there is no key named {shown(name)}", "see: serving keys list")
            over = found.model_copy(update={"revoked": found.revoked or self._clock()})
            self._write(tuple(over if key is found else key for key in keys))
        return over

    # -- the file --

    def _stamp(self) -> tuple[int, int, int]:
        try:
            found = self._path.stat()
        except FileNotFoundError:
            return (0, 0, 0)
        except OSError as error:
            raise self._damaged(error) from error
        return (found.st_mtime_ns, found.st_size, found.st_ino)

    def _read(self) -> tuple[Key, ...]:
        try:
            with self._path.open("rb") as stream:
                data = stream.read(MAX_FILE + 1)
            return _File.model_validate(json.loads(data)).keys
        except FileNotFoundError:
            return ()
        except (OSError, ValueError, RecursionError) as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> KeysDamaged:
        reason = "it is not a file of keys" if isinstance(error, ValidationError) else shown(error)
        return KeysDamaged(
            f"the keys in {self._path} cannot be read: {reason}", "restore the file, or make it readable"
        )

    @contextlib.contextmanager
    def _writing(self) -> Iterator[tuple[Key, ...]]:
        """The keys as they are, while no other process writes them."""
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        lock = os.open(self._path.with_suffix(".lock"), flags, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield self._read()
        finally:
            os.close(lock)

    def _write(self, keys: tuple[Key, ...]) -> None:
        content = _File(keys=keys).model_dump_json(indent=1).encode() + b"\n"
        # mkstemp makes the file for its owner alone (0600) before a byte is in it
        descriptor, temporary = tempfile.mkstemp(dir=self._path.parent, prefix=".keys-")
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, self._path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def _when(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
