"""Prefect's server as it is started here: neither it nor its pages speak to anybody else.

Settings do not reach everything (see `flows.settings.QUIET` for what they reach). The second user interface
asks an analytics vendor for its configuration whatever the settings say, a picture in a markdown artifact is
fetched from wherever its author wants, and the list of worker types is fetched from GitHub when somebody
creates a work pool. So every answer carries a content security policy that lets a page connect to this server
only, and the list is the one that Prefect ships.

``python -m flows.prefect_app --port 4200`` starts it.
"""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

MODULE = "flows.prefect_app"

#: The pages are Prefect's own and run on its server alone; they compile forms from JSON schemas, which takes
#: ``unsafe-eval``. What matters here is that no directive names another host.
_POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "connect-src 'self'",
    )
)


def create_app() -> App:
    """Return Prefect's server with its pages kept to it; Prefect's settings decide everything else."""
    from prefect.server.api.server import create_app as prefect_app
    from prefect.settings import PREFECT_UI_API_URL

    keep_collections_here()
    return with_policy(prefect_app(final=True), policy(PREFECT_UI_API_URL.value()))


def policy(api_url: str | None) -> str:
    """Return the content security policy of the pages.

    Args:
        api_url: where the pages look for the API; it may be this server by another name, which is another
            origin to a browser.
    """
    if not api_url:
        return _POLICY
    where = urlsplit(api_url)
    events = "wss" if where.scheme == "https" else "ws"
    return f"{_POLICY} {where.scheme}://{where.netloc} {events}://{where.netloc}"


def with_policy(app: App, value: str) -> App:
    """Return ``app`` with the policy ``value`` on every answer."""
    header = (b"content-security-policy", value.encode("ascii"))

    async def answer(scope: Message, receive: Receive, send: Send) -> None:
        async def send_with(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), header]}
            await send(message)

        await app(scope, receive, send_with if scope["type"] == "http" else send)

    return answer


def keep_collections_here() -> None:
    """Answer for worker and block types from the files that Prefect ships, and never from GitHub."""
    from prefect.server.api import collections

    shipped = Path(collections.__file__).parent / "collections_data" / "views"
    views = {view: shipped / f"{view}.json" for view in collections.KNOWN_VIEWS}
    # Prefect looks here first; its own is a cache that forgets after ten minutes and then asks GitHub.
    collections.GLOBAL_COLLECTIONS_VIEW_CACHE = {  # type: ignore[assignment]
        view: json.loads(path.read_bytes()) for view, path in views.items() if path.is_file()
    }
    # What is not shipped does not exist.
    collections.KNOWN_VIEWS.clear()
    collections.KNOWN_VIEWS.update(dict.fromkeys(collections.GLOBAL_COLLECTIONS_VIEW_CACHE, ""))


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(1, 65535), default=4200, show_default=True)
@click.option("--socket", "inherited", type=int, hidden=True, help="File descriptor that has the port.")
def main(host: str, port: int, inherited: int | None) -> None:
    """Run Prefect's server, whose pages and processes speak to nobody else."""
    import uvicorn

    # The application first: making it sets up Prefect's logging, which would swallow the server's errors.
    app = create_app()
    server = uvicorn.Server(uvicorn.Config(app, host=host, port=port, log_level="warning"))
    with suppress(KeyboardInterrupt):
        server.run(None if inherited is None else [socket.socket(fileno=inherited)])
    if not server.started:
        sys.exit(1)


if __name__ == "__main__":
    main()
