"""What the pages of scoring have in common: one HTML file, nothing fetched, no script."""

from __future__ import annotations

import base64
from html import escape
from typing import TYPE_CHECKING

from registry.scanning.style import STYLE

if TYPE_CHECKING:
    from PIL import Image

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def document(title: str, body: str, style: str = "") -> str:
    """Return a whole page; ``body`` is HTML, ``title`` is not."""
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        "<meta name='viewport' content='width=device-width,initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{STYLE}{style}</style></head><body><main>"
        f"<h1>{escape(title)}</h1>{body}</main></body></html>\n"
    )


def section(title: str, lead: str, content: str) -> str:
    """Return a part of a page; the lead is text, ``content`` is HTML."""
    return f"<section><h2>{escape(title)}</h2><p class='faint'>{escape(lead)}</p>{content}</section>"


def picture(image: Image.Image, name: str) -> str:
    """Return a picture inside of the page."""
    from trainer.evaluation.sheets import webp

    data = base64.b64encode(webp(image)).decode("ascii")
    return f'<img alt="{escape(name)}" src="data:image/webp;base64,{data}">'
