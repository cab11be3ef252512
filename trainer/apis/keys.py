"""Keys of paid APIs: from the environment, never on a disk, in a log or in a message.

Also to which servers they go: a recipe from somebody else must not send them to a server of his.
"""

from __future__ import annotations

import os
from ipaddress import ip_address
from urllib.parse import urlsplit

from registry.errors import shown
from trainer.errors import ApiError

VARIABLES = {"gemini": "GEMINI_API_KEY", "openai": "OPENAI_API_KEY"}
HOSTS = "ADAPTER_FOUNDRY_API_HOSTS"
HIDDEN = "[key]"
_SHORTEST = 8  # shorter ones are words such as "none" for servers that want no key


def key_of(provider: str) -> str:
    """Return the key of a provider.

    Raises:
        ApiError: the environment has none, or one that cannot be a key.
    """
    name = VARIABLES[provider]
    key = os.environ.get(name, "").strip()
    if not key:
        raise ApiError(
            f"{provider} asks for a key, and the environment variable {name} is not set",
            f"export {name}=...; a server of your own that wants no key takes any word",
        )
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ApiError(
            f"the environment variable {name} holds something that is no key",
            f"copy the key again into {name}: one word without spaces and line breaks",
        )
    return key


def hidden(provider: str, text: str, limit: int = 300) -> str:
    """Return what a server said as one printable line without the provider's key, should it repeat it."""
    key = os.environ.get(VARIABLES.get(provider, ""), "").strip()
    return shown(text.replace(key, HIDDEN) if len(key) >= _SHORTEST else text, limit)


def repeats(provider: str, body: bytes) -> bool:
    """Return whether a server put the key into its answer."""
    key = os.environ.get(VARIABLES.get(provider, ""), "").strip().encode()
    return len(key) >= _SHORTEST and key in body


def address(endpoint: str, own: str) -> str:
    """Return the address of a server as the SDKs take it, if the key may go there.

    A recipe names the server, and whoever writes a recipe need not be the one whose key is sent. So a key
    goes to the vendor, to this machine, and to the hosts that `HOSTS` in the environment lists: ``host`` or
    ``host:port`` for https, ``http://host:port`` for a server that has no certificate.

    Args:
        endpoint: the address.
        own: the vendor's.

    Raises:
        ApiError: it is no plain http(s) address, or the key may not go there.
    """
    try:
        parts = urlsplit(endpoint)
        plain = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        plain = False
    if not plain or parts.scheme not in ("http", "https") or not endpoint.isascii():
        raise ApiError(
            f"{shown(endpoint)!r} is no address of a server", "write for example https://host:8000/v1"
        )
    host = str(parts.hostname)
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ApiError(
            f"the address of the server {shown(host)} has a password, a query or a fragment in it",
            "write scheme, host, port and path alone; a key belongs into the environment",
        )
    origin = _origin(endpoint)
    if origin != _origin(own) and not _here(host) and origin not in set(map(_origin, _listed())):
        listed = f"{host}:{parts.port}" if parts.port else host
        entry = listed if parts.scheme == "https" else f"http://{listed}"
        raise ApiError(
            f"the key may not be sent to {shown(origin)}, which is neither the vendor's nor on this machine",
            f"if you trust that server with the key, export {HOSTS}={shown(entry)} (several with commas) "
            "where the requests are sent from",
        )
    return endpoint.rstrip("/")


def _listed() -> list[str]:
    """Return the addresses of the hosts that the environment lists."""
    entries = [entry.strip() for entry in os.environ.get(HOSTS, "").split(",")]
    return [entry if "://" in entry else f"https://{entry}" for entry in entries if entry]


def _origin(endpoint: str) -> str:
    """Return scheme, host and port of an address; empty for what is none."""
    try:
        parts = urlsplit(endpoint)
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError:
        return ""
    return f"{parts.scheme}://{parts.hostname}:{port}"


def _here(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
