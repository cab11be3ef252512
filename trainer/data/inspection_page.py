"""The report about a dataset as one HTML file with style, charts and pictures; no script, nothing fetched.

Every text of a dataset (names of people, reasons, licences, prompts) may have been written by somebody who
wants to do harm: it is escaped twice, by ``registry.errors.shown`` and as HTML, and a content security policy
forbids scripts and every address.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any, Final

from registry.errors import shown
from registry.scanning.panels import section
from registry.scanning.style import STYLE
from trainer.data.blobs import Blobs
from trainer.data.dataset import Dataset
from trainer.data.inspection import ALIKE, Distribution, Inspection
from trainer.data.inspection_charts import histogram, response, shares
from trainer.data.inspection_sheets import Lot, rejected, small
from trainer.evaluation.sheets import webp
from trainer.progress import Progress, silent

if TYPE_CHECKING:
    from PIL import Image

_POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_STYLE: Final = (
    STYLE
    + """
img{image-rendering:auto;height:auto}
.parts{display:grid;gap:4px 40px;grid-template-columns:repeat(auto-fit,minmax(250px,1fr))}
.sheet{width:min(1700px,100vw - 32px);margin-left:50%;transform:translateX(-50%)}
.sheet img{width:auto;max-width:max(100%,900px);margin:0 auto}
.few{display:flex;flex-wrap:wrap;gap:8px;margin:6px 0}.few img{width:72px}
.reason{margin:2px 0;padding-left:18px}svg.bar{min-width:130px;max-width:320px}
td:first-child{min-width:96px}.card h3{margin-top:4px}
@media(max-width:700px){main{padding:24px 16px}dl{grid-template-columns:1fr;gap:0 18px}dd{margin:0 0 8px}}
"""
)
_TITLES: Final = {
    "license": "Licences of the pictures",
    "source": "Made by",
    "model": "Models",
    "scorer": "Scored by",
    "media_type": "Files",
}
_MEASURES: Final = {
    "intensity": "intensity asked for",
    "sharpness": "sharpness",
    "similarity": "likeness to the source",
    "pdq_distance": "bits that differ from source",
    "confidence": "scorer's confidence",
    "disagreement": "scorer's disagreement",
}
_ALIKE_SHOWN: Final = 6


def page(
    data: Dataset,
    found: Inspection,
    *,
    title: str,
    seed: int = 0,
    elsewhere: Sequence[Blobs] = (),
    progress: Progress = silent,
) -> str:
    """Return the report as one self-contained HTML document, in ASCII.

    Args:
        data: the dataset; some hundred pictures of it are opened at most.
        found: its figures.
        title: name of the dataset.
        seed: which people the contact sheets show.
        elsewhere: folders where pictures that were left out may still lie.
        progress: is told about the parts of the page.
    """
    parts: list[str] = [_summary(found), _made(found), _funnel(found)]
    progress("report", 1, 4, "contact sheets")
    lot = Lot(data, seed)
    parts.append(_sheets([lot.people(), lot.intensities()], seed))
    progress("report", 2, 4, "figures")
    parts += [_scores(found), _measures(found.measures), _pairs(found), _alike(found, data)]
    progress("report", 3, 4, "what was left out")
    parts.append(_rejects(found, [data.blobs, *elsewhere]))
    heading = f"Dataset {text(title)}"
    document = (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        "<meta name='viewport' content='width=device-width,initial-scale=1'>"
        f"<title>{heading}</title><style>{_STYLE}</style></head><body><main><h1>{heading}</h1>"
        f'<p class="faint">version <code>{text(found.version)}</code></p>'
        f"{''.join(parts)}</main></body></html>\n"
    )
    progress("report", 4, 4)
    return document.encode("ascii", "xmlcharrefreplace").decode("ascii")


def text(value: object, limit: int = 200) -> str:
    """Return a text of a dataset so that it is nothing but text, in a browser and in a terminal."""
    return escape(shown(value, limit))


def _summary(found: Inspection) -> str:
    counts, told = found.counts, found.provenance
    people, triplets = counts["people"], counts["triplets"]
    cost = "not known" if found.cost is None else f"{found.cost:.2f} US dollars"
    entries = {
        "pictures": f"{counts['pictures']:,} ({counts['bytes'] / 1e6:,.1f} MB)",
        "triplets": f"{triplets['train']:,} to train on, {triplets['validation']:,} for the validation",
        "people": f"{people['train']:,} to train on, {people['validation']:,} for the validation; "
        "nobody is in both",
        "left out": f"{counts['rejects']:,} pictures and triplets",
        "licence of all together": told["license"],
        "made by": told["source"],
        "scored by": told["scorer"],
        "paid for the edits that were kept": cost,
    }
    rows = [
        f"{text(one['kind'])} <code>{text(one['name'])}</code>, {text(one['license'])}"
        for one in told["ingredients"]
    ]
    listed = "".join(f"<dt>{name}</dt><dd>{text(value)}</dd>" for name, value in entries.items())
    if rows:
        listed += f"<dt>what went in</dt><dd>{'<br>'.join(rows)}</dd>"
    return section(
        "Summary", "What the dataset says of itself.", f'<div class="card"><dl>{listed}</dl></div>'
    )


def _made(found: Inspection) -> str:
    tables = [(title, found.made[name]) for name, title in _TITLES.items() if found.made[name]]
    tables.append(("Sizes", found.sizes))
    parts = "".join(f"<div>{_table((title, 'pictures'), _counted(counts))}</div>" for title, counts in tables)
    card = f'<div class="card parts">{parts}</div>'
    return section("Where the pictures come from", "Every picture carries its own licence.", card)


def _counted(counts: Mapping[str, int]) -> Iterable[tuple[str, str]]:
    return ((text(name), f"{number:,}") for name, number in counts.items())


def _funnel(found: Inspection) -> str:
    cards = []
    for what, filters in found.filters.items():
        rows = []
        first = (filters[0]["kept"] + filters[0]["left_out"]) if filters else 0
        for one in filters:
            asked = "" if one["threshold"] is None else f"{one['threshold']:g}"
            bar = shares([one["kept"] / (first or 1), one["left_out"] / (first or 1)])
            rows.append((text(one["filter"]), asked, f"{one['left_out']:,}", f"{one['kept']:,}", bar))
        if rows:
            heads = ("filter", "asked for", "left out", "kept", "")
            cards.append(f'<div class="card"><h3>{what.capitalize()}: {first:,} at first</h3>'
                         f"{_table(heads, rows)}</div>")  # fmt: skip
    lead = "What each filter let through of what the one before had kept, in their order."
    return section("Filters", lead, "".join(cards)) if cards else ""


def _sheets(sheets: Sequence[Image.Image | None], seed: int) -> str:
    pictures = "".join(
        f'<div class="card sheet">{_image(sheet, "contact sheet")}</div>' for sheet in sheets if sheet
    )
    lead = f"People drawn by lot (seed {seed}); another seed shows others."
    return section("Contact sheets", lead, pictures) if pictures else ""


def _scores(found: Inspection) -> str:
    rows = [one for one in found.expressions if one.score is not None]
    if not rows:
        return ""
    curves = "".join(map(response, rows))
    spreads = "".join(histogram(one.name, one.score) for one in rows if one.score is not None)
    lead = (
        "What the scorer sees of an expression where it was asked for. Line: median, band: 10th to 90th "
        "percentile, dashed: what was asked."
    )
    return section("Scores", lead, f'<div class="card curves">{curves}</div>') + section(
        "Scores, how they are spread", "Of all pictures of the expression; dashed: median.",
        f'<div class="card curves">{spreads}</div>',
    )  # fmt: skip


def _measures(measures: Mapping[str, Distribution]) -> str:
    spreads = "".join(
        histogram(title, measures[name]) for name, title in _MEASURES.items() if name in measures
    )
    lead = (
        "Of all kept pictures; dashed: median. Sharpness is the variance of the Laplacian, likeness the "
        "cosine of the faces, bits are those of 256 of the perceptual hash (PDQ)."
    )
    return section("Measures", lead,
                   f'<div class="card curves">{spreads}</div>')  # fmt: skip


def _pairs(found: Inspection) -> str:
    most = max((one.train + one.validation for one in found.pairs), default=1)
    rows = [
        (
            f"{text(one.first)} and {text(one.second)}", f"{one.train:,}", f"{one.validation:,}",
            shares([one.train / most, one.validation / most]),
        )
        for one in found.pairs
    ]  # fmt: skip
    heads = ("pair", "train", "validation", "")
    lead = "Triplets of each pair of expressions that are easily confused. A short bar is learnt from little."
    return section("Balance of the pairs", lead, f'<div class="card">{_table(heads, rows)}</div>')


def _alike(found: Inspection, data: Dataset) -> str:
    if not found.alike:
        return section("Look-alikes", f"No two people's neutral pictures are within {ALIKE} bits.", "")
    figures = []
    for one in found.alike[:_ALIKE_SHOWN]:
        pictures = "".join(
            f"<div>{_image(_picture(small(pixels)), 'neutral picture')}<span>{text(name, 60)}</span></div>"
            for pixels, name in zip(data.pictures([one.first, one.second]), one.names, strict=True)
        )
        figures.append(f'<figure><div class="pair">{pictures}</div><figcaption>{one.bits} bits apart'
                       "</figcaption></figure>")  # fmt: skip
    rows = [(text(one.names[0], 60), text(one.names[1], 60), str(one.bits)) for one in found.alike]
    lead = (
        f"{found.alike_total} pairs of people whose neutral pictures differ in at most {ALIKE} of 256 bits "
        "(PDQ). They may be one person, or the same portrait twice."
    )
    table = f'<div class="card">{_table(("person", "and", "bits"), rows)}</div>'
    return section("Look-alikes", lead, f'<div class="gallery">{"".join(figures)}</div>{table}')


def _rejects(found: Inspection, folders: Sequence[Blobs]) -> str:
    items = []
    for one in found.rejects:
        pictures = [pixels for digest in one.examples if (pixels := rejected(folders, digest)) is not None]
        few = "".join(_image(_picture(pixels), "left out") for pixels in pictures)
        reasons = "".join(f"<li>{text(reason)}</li>" for reason in one.reasons)
        items.append(
            f'<div class="layer"><h3>{text(one.filter)} <span class="chip off">{one.count:,} '
            f"{text(one.what)}{'s' if one.count != 1 else ''}</span></h3>"
            f'<ul class="reason faint">{reasons}</ul><div class="few">{few}</div></div>'
        )
    lead = "By filter, with some of the reasons; pictures where they are still on this machine."
    content = f'<div class="card">{"".join(items)}</div>' if items else ""
    return section("What was left out", lead if items else "Nothing.", content)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are markup already."""
    head = "".join(f"<th>{one}</th>" for one in heads)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _picture(pixels: Any) -> Image.Image:
    from PIL import Image

    return Image.fromarray(pixels)


def _image(image: Image.Image, name: str) -> str:
    data = base64.b64encode(webp(image, 82)).decode("ascii")
    size = f'width="{image.width}" height="{image.height}"'
    return f'<img alt="{name}" {size} src="data:image/webp;base64,{data}">'
