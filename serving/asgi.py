"""What middleware of the service knows of ASGI: types, and what of a request may be counted and recorded."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


def verb(scope: Mapping[str, Any]) -> str:
    """Return the method of a request, or ``OTHER`` for one that HTTP does not name."""
    method: str = scope["method"]
    return method if method in _METHODS else "OTHER"


def template(scope: Mapping[str, Any]) -> str:
    """Return the template of the route that took a request, never the path that a client chose.

    Starlette and FastAPI leave the route in the scope; a mounted application is named by where it is mounted.
    """
    path = getattr(scope.get("route"), "path", None)
    if isinstance(path, str):
        return path
    mounts = {getattr(route, "path", "") for route in getattr(scope.get("app"), "routes", ())}
    root = scope.get("root_path", "")
    return f"{root}/*" if root and root in mounts else "unmatched"
