"""Who may ask, and how much: every route that does something depends on `require`.

The order of the checks: the key, its scope, its requests a minute, its concurrent requests. Only then is a
byte of the body read. Pictures are taken from the key's minute by `Caller.spend`, before one is decoded.

Without a key somebody is let in as `LOCAL` (a program or page of this machine, which may do everything) or
as `PUBLIC` (nobody knows who, and the operator answers everybody: limited, and never an admin). `LOCAL` needs
all of: no word about it in the settings, no key, an address of this machine alone to listen on, and a peer on
this machine. What a proxy says about the peer is not believed.

Limits are kept in this process. Where several answer for one service, each allows them once.
"""

from __future__ import annotations

import ipaddress
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Final
from urllib.parse import urlsplit

from fastapi import Depends, Request

from serving import logs
from serving.errors import UsageError
from serving.http.answers import Forbidden, HttpError, Invalid, RateLimited, Unauthenticated
from serving.http.keyring import PREFIX, SCOPES, KeyLimits, Keys, KeysDamaged, Scope

if TYPE_CHECKING:
    from starlette.datastructures import Headers

LOCAL: Final = "local"
PUBLIC: Final = "public"
_MINUTE: Final = 60.0
_FORWARDED: Final = ("forwarded", "via", "x-forwarded-for", "x-real-ip")
"""What a proxy adds: it stands on this machine, and who asks it may be anywhere."""
_MEND_KEY: Final = "send Authorization: Bearer afk_…; serving keys add makes a key"


class KeysUnreadable(HttpError):
    """The file of the keys is damaged, and so nobody is let in."""

    status = 503


class WrongOrigin(HttpError):
    """Without keys only this machine's own pages and programs are answered."""

    status = 403


@dataclass(slots=True)
class Bucket:
    """A token bucket: it holds ``size``, and fills in a minute.

    Attributes:
        size: of the bucket.
        left: in it.
        at: when that was so, on the clock of the gate.
    """

    size: float
    left: float
    at: float

    def fill(self, now: float) -> None:
        """Add what the time has brought."""
        self.left = min(self.size, self.left + max(0.0, now - self.at) * self.size / _MINUTE)
        self.at = now

    def wait(self, amount: float) -> float:
        """Seconds until so much is in it."""
        return max(0.0, (amount - self.left) * _MINUTE / self.size)


@dataclass(slots=True)
class _Use:
    """What a key has used."""

    requests: Bucket
    pictures: Bucket
    running: int = 0

    @classmethod
    def of(cls, limits: KeyLimits, now: float) -> _Use:
        requests, pictures = float(limits.requests), float(limits.pictures)
        return cls(Bucket(requests, requests, now), Bucket(pictures, pictures, now))


@dataclass(frozen=True, kw_only=True, slots=True)
class Caller:
    """Who asks.

    Attributes:
        name: of the key; `LOCAL` or `PUBLIC` without one.
        scopes: what they may do.
        local: whether this machine asks, at a service that no other reaches.
    """

    name: str
    scopes: tuple[Scope, ...]
    local: bool = False
    _gate: Gate | None = field(default=None, repr=False, compare=False)
    _headers: list[tuple[bytes, bytes]] = field(default_factory=list, repr=False, compare=False)

    @property
    def anonymous(self) -> bool:
        """Whether nobody knows who it is."""
        return self.name == PUBLIC

    def may(self, scope: Scope) -> bool:
        """Whether a scope, or the scope of everything, is theirs."""
        return scope in self.scopes or "admin" in self.scopes

    def spend(self, pictures: int) -> None:
        """Take pictures from the minute of the key.

        Raises:
            RateLimited: there are not so many left; says exactly when there are.
            Invalid: the key never has so many.
        """
        if self._gate is not None:
            self._gate.spend(self, pictures)


class Gate:
    """Lets callers in.

    Args:
        keys: the keys.
        host: the address that the service listens on.
        public: whether requests without a key are answered, as those of `PUBLIC`; None answers programs of
            this machine as `LOCAL`, on its own address and while there is no key.
        clock: seconds, never going back.

    Raises:
        UsageError: everybody could reach the service, and nobody has a key.
    """

    def __init__(
        self,
        keys: Keys,
        *,
        host: str = "127.0.0.1",
        public: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.keys = keys
        self._public, self._clock = public, clock
        self._loopback = _is_loopback(host)
        self._used: dict[str, tuple[KeyLimits, _Use]] = {}
        # A file of keys that was deleted later opens nothing
        self._guarded = bool(keys.all())
        if public is None and not self._loopback and not self._guarded:
            raise UsageError(
                f"the service would listen on {host}, where others reach it, and there is no API key",
                "make one: serving keys add NAME; or listen on 127.0.0.1; or set "
                "ADAPTER_FOUNDRY_SERVING_PUBLIC=true to answer everybody",
            )

    def caller(self, headers: Headers, peer: str | None) -> Caller:
        """Return who asks.

        Args:
            headers: of the request.
            peer: the address at the other end of the connection; None is not known.

        Raises:
            Unauthenticated: the key is missing, wrong, expired or revoked.
            WrongOrigin: without a key, another machine asks, or a page from elsewhere through a browser here.
            KeysUnreadable: the file of the keys is damaged.
        """
        token = _token(headers)
        try:
            key = None if token is None else self.keys.find(token)
            self._guarded = self._guarded or bool(self.keys.all())
        except KeysDamaged as error:
            raise KeysUnreadable("the service cannot read its keys", "tell who runs it") from error
        if key is not None:
            return Caller(name=key.name, scopes=key.scopes, _gate=self)
        local = self._public is None and self._loopback and not self._guarded
        # Clients such as OpenAI's always send some token; where none is needed, only ours mean anything
        if token is not None and (token.startswith(PREFIX) or not (self._public or local)):
            raise Unauthenticated("the API key is not valid", _MEND_KEY)
        if self._public:
            return Caller(name=PUBLIC, scopes=("edit", "read"), _gate=self)
        if not local:
            raise Unauthenticated("this service needs an API key", _MEND_KEY)
        _check_here(headers, peer)
        _check_origin(headers)
        return Caller(name=LOCAL, scopes=SCOPES, local=True)

    @contextmanager
    def turn(self, caller: Caller) -> Iterator[None]:
        """Count a request of a key for as long as it is answered.

        Raises:
            RateLimited: too many in this minute, or at this moment.
        """
        if caller.local:
            yield
            return
        limits, use = self._use(caller)
        self._tell(caller, limits, use)
        if use.running >= limits.concurrent:
            raise RateLimited(
                f"this key has {use.running} requests running; at most {limits.concurrent} run at once",
                "wait for one of them",
            )
        wait = use.requests.wait(1)
        if wait > 0:
            raise RateLimited(
                f"this key may ask {limits.requests} times a minute", "wait as Retry-After says", wait
            )
        use.requests.left -= 1
        self._tell(caller, limits, use)
        use.running += 1
        try:
            yield
        finally:
            use.running -= 1

    def spend(self, caller: Caller, pictures: int) -> None:
        """See `Caller.spend`."""
        limits, use = self._use(caller)
        if pictures > limits.pictures:
            raise Invalid(
                f"{pictures} pictures are more than the {limits.pictures} a minute of this key",
                "ask for fewer at once",
                param="rows",
            )
        wait = use.pictures.wait(pictures)
        if wait > 0:
            raise RateLimited(
                f"this key may ask for {limits.pictures} pictures a minute", "wait as Retry-After says", wait
            )
        use.pictures.left -= pictures
        self._tell(caller, limits, use)

    def _use(self, caller: Caller) -> tuple[KeyLimits, _Use]:
        """What a caller may use and has used; new limits of a key begin with full buckets."""
        key = None if caller.anonymous else self.keys.named(caller.name)
        limits = KeyLimits() if key is None else key.limits
        now, kept = self._clock(), self._used.get(caller.name)
        if kept is None or kept[0] != limits:
            kept = self._used[caller.name] = (limits, _Use.of(limits, now))
        kept[1].requests.fill(now)
        kept[1].pictures.fill(now)
        return kept

    def _tell(self, caller: Caller, limits: KeyLimits, use: _Use) -> None:
        """Write the RateLimit headers (draft-ietf-httpapi-ratelimit-headers) of the answer."""
        policy = f'"requests";q={limits.requests};w=60, "pictures";q={limits.pictures};w=60'
        state = ", ".join(
            f'"{name}";r={math.floor(bucket.left)};t={math.ceil(bucket.wait(bucket.size))}'
            for name, bucket in (("requests", use.requests), ("pictures", use.pictures))
        )
        caller._headers[:] = [(b"ratelimit-policy", policy.encode()), (b"ratelimit", state.encode())]


def require(scope: Scope) -> Any:
    """Return a dependency that lets callers with a scope in, and holds their turn until they are answered.

    Raises:
        Unauthenticated: who asks is not known.
        Forbidden: their key has another scope.
        RateLimited: they ask too much.
    """

    async def caller(request: Request) -> AsyncIterator[Caller]:
        gate: Gate = request.app.state.service.keys
        found = gate.caller(request.headers, _peer(request))
        logs.bind(key=found.name)
        # `Limits` adds these to the answer, whatever route or error makes it, and counts bodies by the name
        request.scope.setdefault("state", {}).update(answer_headers=found._headers, caller=found.name)
        if not found.may(scope):
            raise Forbidden(
                f"this key may not {scope} here", f"use a key with the scope {scope}: serving keys add"
            )
        with gate.turn(found):
            yield found

    return Depends(caller)


def may(request: Request, scope: Scope) -> bool:
    """Return whether who asks has a scope, for routes that also answer strangers and count nobody's turn."""
    gate: Gate = request.app.state.service.keys
    try:
        return gate.caller(request.headers, _peer(request)).may(scope)
    except HttpError:
        return False


Editor = Annotated[Caller, require("edit")]
Reader = Annotated[Caller, require("read")]


def _token(headers: Headers) -> str | None:
    """The token of a request; one way to send it is enough.

    Raises:
        Unauthenticated: it is sent in another way, or twice.
    """
    given = [*headers.getlist("authorization"), *headers.getlist("x-api-key")]
    if not given:
        return None
    if len(given) > 1:
        raise Unauthenticated("the API key is given more than once", "send it once")
    if headers.get("x-api-key") is not None:
        return given[0].strip()
    scheme, _, token = given[0].partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise Unauthenticated("the Authorization header is not a Bearer token", _MEND_KEY)
    return token.strip()


def _peer(request: Request) -> str | None:
    return None if request.client is None else request.client.host


def _check_here(headers: Headers, peer: str | None) -> None:
    """Refuse another machine, and a proxy of this one that asks for somebody."""
    if peer is None or not _is_loopback(peer) or any(name in headers for name in _FORWARDED):
        raise WrongOrigin(
            "without API keys only programs of this machine are answered, and none through a proxy",
            "make a key: serving keys add NAME; or ask from the machine of the service itself",
        )


def _check_origin(headers: Headers) -> None:
    """Refuse what a page from elsewhere makes a browser on this machine send.

    Such a page may send a form to 127.0.0.1 (the browser then names its Origin), or let its own name mean
    127.0.0.1 (then Host is that name).
    """
    host = headers.get("host", "")
    origin = headers.get("origin")
    if not _names_loopback(f"http://{host}") or (origin is not None and not _names_loopback(origin)):
        raise WrongOrigin(
            "without API keys only pages and programs of this machine are answered",
            "open 127.0.0.1 with the port of the service, or make a key: serving keys add NAME",
        )
    if headers.get("sec-fetch-site", "none") not in ("none", "same-origin", "same-site"):
        raise WrongOrigin("another site asks through this browser", "open the page of the service itself")


def _names_loopback(url: str) -> bool:
    try:
        host = urlsplit(url).hostname or ""
    except ValueError:
        return False
    return _is_loopback(host)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
