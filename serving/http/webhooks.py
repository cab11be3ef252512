"""Webhooks: the end of a job, signed, sent to an address that the owner of the job named.

Signed as Standard Webhooks says (headers ``webhook-id``, ``webhook-timestamp``, ``webhook-signature``), with
the secret of the key that asked. What is owed is kept with the jobs, so a restart loses none.

Whoever may name an address could make the service ask its own network for them. So: https only; every address
that the name means has to be a public one; the connection goes to the address that was checked, not to what
the name means a moment later; no redirect is followed, no proxy asked, and nothing of the answer is shown.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import ipaddress
import logging
import re
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final
from urllib.parse import SplitResult, urlsplit

from registry.errors import shown
from serving.http.answers import HttpError, Invalid
from serving.http.keyring import KeysDamaged

if TYPE_CHECKING:
    from serving.http.job import Delivery
    from serving.http.keyring import Keys

MAX_URL: Final = 2000
SECONDS: Final = 15.0
"""For the whole of an attempt: the name, the connection, and the first line of the answer."""
WAITS: Final = (5.0, 30.0, 120.0, 900.0, 3600.0, 10800.0, 28800.0)
"""Seconds before each further attempt."""
_NAMES_AT_ONCE: Final = 16
"""Threads that ask for names; a name server that hangs keeps one for longer than the attempt lasts."""
_URL: Final = re.compile(r"[!-~]+")
_STATUS: Final = re.compile(rb"HTTP/1\.[01] ([1-5][0-9]{2})(?: |\r?\n|$)")
_NAT64: Final = ipaddress.ip_network("64:ff9b::/96")

_log = logging.getLogger(__name__)
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]


class WebhookRefused(HttpError):
    """The address is not one that the service sends to."""

    status = 422


@dataclass(frozen=True, kw_only=True, slots=True)
class Webhook:
    """Where the end of a job is announced.

    Attributes:
        url: an https address.
        secret: name of the key whose secret signs; None is the caller's own, and no other is allowed.
    """

    url: str
    secret: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A URL that may be sent to, taken apart."""

    host: str
    port: int
    tls: bool
    path: str
    loopback: bool

    @property
    def authority(self) -> str:
        """The Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.tls else 80) else f"{host}:{self.port}"


def check_url(url: str, *, loopback: bool = False) -> Target:
    """Return where a URL leads.

    Args:
        url: as a caller wrote it.
        loopback: whether this machine itself, also without TLS, is allowed.

    Raises:
        WebhookRefused: it is no https URL, holds a password, or names an address that is not public.
    """
    try:
        parts = urlsplit(url if len(url) <= MAX_URL and _URL.fullmatch(url) else "")
        port = parts.port
    except ValueError:
        parts, port = SplitResult("", "", "", "", ""), None
    host = (parts.hostname or "").rstrip(".")
    here = host == "localhost" or _is_loopback(host)
    if parts.scheme not in ("https", "http") or not host or "\\" in url or port == 0:
        raise _refused("is not an https address")
    if parts.username is not None or parts.password is not None:
        raise _refused("holds a name or a password")
    if not (loopback and here):
        if parts.scheme != "https":
            raise _refused("is not encrypted")
        if here or (_is_address(host) and not is_public(host)):
            raise _refused("leads to an address that is not public")
    tls = parts.scheme == "https"
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Target(
        host=host, port=port or (443 if tls else 80), tls=tls, path=path, loopback=loopback and here
    )


def is_public(address: str) -> bool:
    """Whether an address belongs to the internet: not to this machine, its network, or a way into them."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv6Address):
        teredo = found.teredo
        inner = found.ipv4_mapped or found.sixtofour or (teredo[1] if teredo else None)
        if inner is not None or found in _NAT64 or found.is_site_local:
            return inner is not None and found.ipv4_mapped is not None and is_public(str(inner))
    return found.is_global and not found.is_multicast and not found.is_reserved and not found.is_unspecified


def sign(secret: str, id: str, timestamp: int, body: bytes) -> str:
    """Return the signature of a message, as Standard Webhooks writes it.

    Args:
        secret: ``whsec_`` and base64.
        id: of the message.
        timestamp: seconds since the epoch.
        body: as it is sent.
    """
    key = base64.b64decode(secret.removeprefix("whsec_"), validate=True)
    digest = hmac.new(key, f"{id}.{timestamp}.".encode() + body, hashlib.sha256).digest()
    return "v1," + base64.b64encode(digest).decode("ascii")


class Sender:
    """Makes one attempt to deliver a webhook.

    Args:
        keys: whose secrets sign.
        loopback: see `check_url`.
        resolve: name and port -> addresses; None asks the system.
        trust: certificates that are believed; None is the system's.
        clock: seconds since the epoch.
    """

    def __init__(
        self,
        keys: Keys,
        *,
        loopback: bool = False,
        resolve: Resolve | None = None,
        trust: ssl.SSLContext | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._keys, self._loopback, self._clock = keys, loopback, clock
        self._resolve = resolve or _system_names()
        self._trust = trust or ssl.create_default_context()

    def check(self, webhook: Webhook, owner: str) -> None:
        """Refuse a webhook that could not be delivered, while somebody is there to hear it.

        Args:
            webhook: that is asked for.
            owner: name of the caller.

        Raises:
            WebhookRefused: see `check_url`.
            Invalid: there is no secret that could sign it.
        """
        check_url(webhook.url, loopback=self._loopback)
        if self._keys.named(owner) is None:
            raise Invalid(
                "webhooks are signed with the secret of an API key, and there is none",
                "ask with a key: serving keys add NAME",
                param="webhook",
            )
        if webhook.secret not in (None, owner):
            raise Invalid(
                "the secret is not one of this key", "leave it out, or name the key", param="webhook.secret"
            )

    async def send(self, delivery: Delivery) -> tuple[str, float | None]:
        """Try to deliver.

        A key that is over sends no more; one that the file does not know at the moment, or that cannot be
        read, is no reason to give up.

        Returns:
            What came of it (``delivered``, ``refused``, ``failed``, ``gone``), and in how many seconds to try
            again; None is never.
        """
        try:
            key = next((one for one in self._keys.all() if one.name == delivery.caller), None)
            if key is None:
                return "failed", wait_after(delivery)
            if not key.alive(self._clock()):
                return "refused", None
            async with asyncio.timeout(SECONDS):
                status = await self._post(delivery, key.webhook_secret)
        except WebhookRefused:
            return "refused", None
        except KeysDamaged as error:
            _log.warning("a webhook waits: %s", error.message)
            status = 0
        except (OSError, TimeoutError, ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            status = 0
        if 200 <= status < 300:
            return "delivered", None
        if status == 410:  # the receiver wants no more of them
            return "gone", None
        return "failed", wait_after(delivery)

    async def _post(self, delivery: Delivery, secret: str) -> int:
        """Send one request to the checked address, and return the status of the answer."""
        target = check_url(delivery.url, loopback=self._loopback)
        addresses = await self._resolve(target.host, target.port)
        good = _is_loopback if target.loopback else is_public
        if not addresses or not all(good(address) for address in addresses):
            raise _refused("leads to an address that is not public")
        body, now = delivery.body.encode(), int(self._clock())
        head = "\r\n".join(
            [
                f"POST {target.path} HTTP/1.1",
                f"host: {target.authority}",
                "user-agent: adapter-foundry",
                "content-type: application/json",
                f"content-length: {len(body)}",
                f"webhook-id: {delivery.id}",
                f"webhook-timestamp: {now}",
                f"webhook-signature: {sign(secret, delivery.id, now, body)}",
                "connection: close",
                "\r\n",
            ]
        )
        # The name is not asked for again: it is for the certificate only
        reader, writer = await asyncio.open_connection(
            addresses[0],
            target.port,
            ssl=self._trust if target.tls else None,
            server_hostname=target.host if target.tls else None,
            limit=8192,
        )
        try:
            writer.write(head.encode("ascii") + body)
            await writer.drain()
            found = _STATUS.match(await reader.readline())
            return int(found[1]) if found else 0
        finally:
            writer.transport.abort()


def wait_after(delivery: Delivery) -> float | None:
    """Return the seconds to wait after an attempt that failed; None when it was the last one."""
    return next(iter(WAITS[delivery.attempts :]), None)


def _system_names() -> Resolve:
    """Return what asks the system, in threads of its own: whoever owns a name can make each answer hang."""
    threads = ThreadPoolExecutor(_NAMES_AT_ONCE, "webhook-names")

    async def resolve(host: str, port: int) -> Sequence[str]:
        ask = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        found = await asyncio.get_running_loop().run_in_executor(threads, ask)
        return [str(place[0]) for *_, place in found]

    return resolve


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_loopback(host: str) -> bool:
    return _is_address(host) and ipaddress.ip_address(host).is_loopback


def _refused(why: str) -> WebhookRefused:
    return WebhookRefused(
        f"the address of the webhook {shown(why)}", "name a public https address", param="webhook.url"
    )
