"""The page and its parts, read once and served from memory under the digest of the whole.

No request reaches the file system, so there is no path to climb. Every part lies under a path that names the
digest of all parts: browsers keep it for ever, and a new version of the page is a new path. The page itself
is asked for again each time and answered with 304 while it is the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, HTTPException, Request, Response

from registry.digest import digest_bytes

FOLDER = Path(__file__).parent / "page"
_INDEX = "index.html"
_PLACE = b"@digest@"
_KINDS: Mapping[str, str] = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".webmanifest": "application/manifest+json",
}

#: No script and no style but our own files, nothing from elsewhere, no frame around the page. Trusted types
#: make the browser refuse to parse any text as HTML, so the text of an adapter's card stays text even if the
#: page forgot about that. Pictures that the page made itself are ``blob:``.
SECURITY: Mapping[str, str] = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' blob:; object-src 'none'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_FOR_EVER = "public, max-age=31536000, immutable"


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """The page as it is served.

    Attributes:
        digest: first half of the sha256 over all parts, in hexadecimal digits.
        index: the page; its links name the digest.
        parts: path below the folder -> bytes.
    """

    digest: str
    index: bytes
    parts: Mapping[str, bytes]


def read(folder: Path = FOLDER) -> Page:
    """Read the page and its parts into memory."""
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.suffix in _KINDS
    }
    listed = b"".join(f"{name} {digest_bytes(data)}\n".encode() for name, data in files.items())
    digest = digest_bytes(listed).hex[:32]
    index = files.pop(_INDEX).replace(_PLACE, digest.encode())
    return Page(digest=digest, index=index, parts=files)


def router(page: Page | None = None) -> APIRouter:
    """Return the routes of the page: ``/`` and ``/static/{digest}/{name}``."""
    served = page or read()
    routes = APIRouter(include_in_schema=False)
    etag = f'"{served.digest}"'

    @routes.api_route("/", methods=["GET", "HEAD"])
    def index(request: Request) -> Response:
        headers = {**SECURITY, "Cache-Control": "no-cache", "ETag": etag}
        if etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(served.index, headers=headers, media_type=_KINDS[".html"])

    @routes.api_route("/static/{digest}/{name:path}", methods=["GET", "HEAD"])
    def part(digest: str, name: str) -> Response:
        data = served.parts.get(name) if digest == served.digest else None
        if data is None:
            raise HTTPException(404, "the page has no such part")
        headers = {**SECURITY, "Cache-Control": _FOR_EVER, "ETag": etag}
        return Response(data, headers=headers, media_type=_KINDS[Path(name).suffix])

    return routes
