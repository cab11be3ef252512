"""Keys of paid APIs: from the environment, never on a disk, in a log or in a message.

Also which addresses of servers are taken: one with a password in it would put that into every record.
"""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from registry.errors import shown
from trainer.errors import ApiError

VARIABLES = {"gemini": "GEMINI_API_KEY", "openai": "OPENAI_API_KEY"}
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


def address(endpoint: str) -> str:
    """Return the address of a server as the SDKs take it.

    Raises:
        ApiError: it is no plain http(s) address.
    """
    try:
        parts = urlsplit(endpoint)
        plain = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        plain = False
    if not plain or parts.scheme not in ("http", "https"):
        raise ApiError(
            f"{shown(endpoint)!r} is no address of a server", "write for example https://host:8000/v1"
        )
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ApiError(
            f"the address of the server {parts.hostname} has a password, a query or a fragment in it",
            "write scheme, host, port and path alone; a key belongs into the environment",
        )
    return endpoint.rstrip("/")
