"""What the pages of evaluation and scoring are built of: one HTML file, nothing fetched, no script.

Names of people, prompts and references may have been written by somebody who wants to do harm: `text` makes
them printable and escapes them, and a content security policy forbids scripts and every address. All other
functions take markup where they say so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Final, Literal

import numpy as np

from registry.errors import shown
from registry.scanning.style import STYLE
from trainer.evaluation import drawing

if TYPE_CHECKING:
    from PIL import Image

    from trainer.evaluation.sheets import Portrait, Sheet

THUMBNAIL: Final = 128
SENTENCES: Final = 2000
_POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
Kind = Literal["good", "warn", "bad", "off"]

_STYLE: Final = """
:root{--beside:#b06a00;--ours-bg:#eef3fc}
@media(prefers-color-scheme:dark){:root{--beside:#f0b45c;--ours-bg:#232c3d}}
img{image-rendering:auto;height:auto}
nav{display:flex;flex-wrap:wrap;gap:4px 16px;font-size:13.5px;margin:14px 0 0}nav a{text-decoration:none}
nav a:hover{text-decoration:underline}
td small,th small,figcaption small{display:block;color:var(--faint);font-size:12px;font-weight:400}
.wide-table td{white-space:nowrap;vertical-align:top}
.wide-table td:first-child{white-space:normal;min-width:190px}
.wide-table th,.wide-table td{padding-left:7px;padding-right:7px}
.wide-table a{color:inherit;text-decoration:none}.wide-table a:hover{text-decoration:underline}
.wide-table td.text{white-space:normal;text-align:left;min-width:180px}
.wide-table tr.group td{border-top:0;padding:18px 2px 4px;font-weight:600;color:var(--ink);font-size:14px}
.wide-table tr.ours td{background:var(--ours-bg);font-weight:600}
.ok{color:var(--good);font-weight:600}.beside{color:var(--beside)}
.faces{border-collapse:separate;border-spacing:5px;width:auto;margin:0 auto}
.faces th,.faces td{border:0;padding:0;text-align:center;vertical-align:middle;white-space:nowrap}
.faces th{padding:0 2px 4px;font-size:12px}.faces th:first-child,.faces td:first-child{position:sticky;left:0;
z-index:1;background:var(--card);min-width:64px;padding:0 8px 0 0;font-size:13px}
.faces td small{max-width:110px;white-space:normal}.faces img{width:66px;min-width:52px}
.faces td.after,.faces th.after{padding-left:14px}.faces td:last-child,.faces th:last-child{padding-right:2px}
.trio{display:grid;grid-template-columns:repeat(3,1fr);gap:6px}.trio span{font-size:12px;color:var(--faint)}
.why{border-top:1px solid var(--line);margin-top:14px;padding-top:12px}.why:first-of-type{margin-top:10px}
.why p{margin:2px 0}.why .gallery{margin:10px 0 0}
.chips{display:flex;flex-wrap:wrap;gap:6px;margin:10px 0 0}
svg.matrix{min-width:720px;max-width:1080px;margin:0 auto}svg.rows{min-width:680px}svg.heat{max-width:740px}
@media(max-width:700px){main{padding:24px 14px 48px}dl{grid-template-columns:1fr;gap:0}dd{margin:0 0 8px}
.card{padding:12px}.gallery{grid-template-columns:1fr}.wide-table td:first-child{min-width:130px}
.curves{grid-template-columns:1fr 1fr}}
@media print{nav{display:none}svg.matrix,svg.rows,svg.heat{min-width:0}h1{font-size:22px}
.faces{border-spacing:2px}.faces th{font-size:7.5px;padding:0 1px 2px}.faces img{width:42px;min-width:0}
.faces td:first-child,.faces th:first-child{position:static;min-width:0;padding-right:3px;font-size:9px}
.faces td.after,.faces th.after{padding-left:6px}td small,th small{font-size:8.5px}
.wide-table{font-size:11px}.wide-table th{font-size:10px;white-space:normal;padding:4px 4px}
.wide-table td{padding:4px 4px}.wide-table td:first-child{min-width:96px}.card{padding:10px}}
"""


def text(value: object) -> str:
    """Markup of a name that anybody may have written: one printable line, cut where it is long, escaped."""
    return escape(shown(value))


def sentences(value: object) -> str:
    """The same of sentences, which are longer than names."""
    return escape(shown(value, SENTENCES))


def document(title: str, body: str, style: str = "") -> str:
    """Return a whole page.

    Args:
        title: text.
        body: markup below the heading.
        style: CSS rules after those of all pages.
    """
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        "<meta name='viewport' content='width=device-width,initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{STYLE}{_STYLE}{drawing.css()}{style}</style></head><body><main>"
        f"<h1>{escape(title)}</h1>{body}</main></body></html>\n"
    )


def section(title: str, lead: str, content: str, *, anchor: str = "") -> str:
    """Return a part of a page; title and lead are text, ``content`` is markup, ``anchor`` an id."""
    name = f' id="{escape(anchor)}"' if anchor else ""
    return f"<section{name}><h2>{escape(title)}</h2><p class='faint'>{escape(lead)}</p>{content}</section>"


def contents(parts: Iterable[tuple[str, str]]) -> str:
    """Return links to the parts of a page: anchor and title of each."""
    links = "".join(f'<a href="#{escape(anchor)}">{escape(title)}</a>' for anchor, title in parts)
    return f"<nav>{links}</nav>"


def card(content: str) -> str:
    """Return markup on a card; what is too wide scrolls inside of it."""
    return f'<div class="card">{content}</div>'


def chip(kind: Kind, label: str) -> str:
    """Return a short label in a colour of its own."""
    return f'<span class="chip {kind}">{escape(label)}</span>'


def verdict(kind: Kind, headline: str, content: str = "") -> str:
    """Return the banner that says how it ended; the headline is text, ``content`` is markup."""
    return f'<div class="verdict {kind}"><strong>{escape(headline)}</strong>{content}</div>'


def table(heads: Sequence[str], rows: Iterable[str], *, kind: str = "wide-table") -> str:
    """Return a table on a card.

    Args:
        heads: markup of the head of each column.
        rows: see `row`.
        kind: its CSS class.
    """
    head = "".join(f"<th>{one}</th>" for one in heads)
    return card(f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>')


def row(cells: Iterable[str], *, kind: str = "") -> str:
    """Return a row of a table; cells are markup, ``kind`` is "ours" for the line that is talked about."""
    name = f' class="{kind}"' if kind else ""
    return f"<tr{name}>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def group(title: str, columns: int) -> str:
    """Return a row that names the ones below it."""
    return f'<tr class="group"><td colspan="{columns}">{escape(title)}</td></tr>'


def facts(entries: Iterable[tuple[str, str]]) -> str:
    """Return names and what belongs to them on a card; both are markup."""
    items = "".join(f"<dt>{name}</dt><dd>{said}</dd>" for name, said in entries)
    return card(f"<dl>{items}</dl>")


def picture(image: Image.Image, name: str) -> str:
    """Return a picture inside of the page; the name is text."""
    from trainer.evaluation.sheets import address

    return f'<img alt="{text(name)}" width="{image.width}" height="{image.height}" src="{address(image)}">'


def thumbnail(portrait: Portrait, name: str, side: int = THUMBNAIL) -> str:
    """Return a small picture of a portrait [H, W, 3]; the name is text."""
    from trainer.evaluation.sheets import enlarge

    return picture(enlarge(np.asarray(portrait), side), name)


def faces(sheet: Sheet) -> str:
    """Return a sheet of portraits as a table on a card, which follows the page's light or dark scheme."""

    def after(index: int) -> str:
        return ' class="after"' if index - 1 in sheet.gaps_after else ""

    heads = "".join(f"<th{after(index)}>{text(name)}</th>" for index, name in enumerate(sheet.columns))
    rows = []
    for one in sheet.rows:
        first, *rest = one.label.split("\n")
        label = text(first) + "".join(f"<small>{text(line)}</small>" for line in rest)
        cells = []
        for index, (name, portrait) in enumerate(zip(sheet.columns, one.cells, strict=True)):
            caption = f"<small>{text(one.captions[index])}</small>" if one.captions else ""
            shot = "" if portrait is None else thumbnail(portrait, f"{first}: {name}")
            cells.append(f"<td{after(index)}>{shot}{caption}</td>")
        rows.append(f"<tr><td>{label}</td>{''.join(cells)}</tr>")
    return card(
        f'<table class="faces"><thead><tr><th></th>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    )
