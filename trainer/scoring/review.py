"""The review queue: pictures whose samples differ, shown on one page, and what a person says about them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from registry.errors import shown
from trainer.data.blobs import Blobs
from trainer.errors import DataError
from trainer.portraits.expressions import EXPRESSIONS
from trainer.scoring.calibration_page import document, picture, section
from trainer.scoring.decisions import Decision, now
from trainer.scoring.scorer import Row
from trainer.scoring.stage import REVIEW_NAME, SCORES_NAME

_SHORT = 12  # hex digits that name a picture on the page and in the command
_MEND = "give the folder of a score stage, with scores.parquet and review.jsonl"
_STYLE = """.bars{font:12px system-ui,sans-serif}.bars .span{fill:var(--accent);opacity:.3}
.bars .wide{fill:var(--out);opacity:.55}.bars .tick{fill:var(--ink)}.bars .track{fill:var(--cell)}
.gallery{grid-template-columns:repeat(auto-fill,minmax(300px,1fr))}img{image-rendering:auto}"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Open:
    """A picture that waits for a person.

    Attributes:
        image: its digest.
        reason: why.
        confidence, disagreement: see `Scored`.
        scores: the medians, in the order of `EXPRESSIONS`.
        samples: the answers.
    """

    image: str
    reason: str
    confidence: float
    disagreement: float
    scores: Row
    samples: tuple[Row, ...]


def queue(folder: Path) -> list[Open]:
    """Return what waits in the output of the score stage, the largest disagreement first.

    Raises:
        DataError: the folder is no output of that stage.
    """
    try:
        lines = [json.loads(line) for line in (folder / REVIEW_NAME).read_text("utf-8").splitlines()]
        found = [_open(line) for line in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"the review queue in {folder} cannot be read: {error}", _MEND) from None
    return sorted(found, key=lambda one: (-one.disagreement, one.image))


def _open(line: Mapping[str, Any]) -> Open:
    order = [line["expressions"].index(name) for name in EXPRESSIONS]
    return Open(
        image=str(line["image"]),
        reason=str(line["reason"]),
        confidence=float(line["confidence"]),
        disagreement=float(line["disagreement"]),
        scores=tuple(float(line["scores"][place]) for place in order),
        samples=tuple(tuple(float(row[place]) for place in order) for row in line["samples"]),
    )


def decide(
    folder: Path,
    image: str,
    *,
    accept: bool,
    by: str,
    changes: Mapping[str, float] | None = None,
    reason: str = "",
) -> Decision:
    """Return a decision about a picture of a score stage; it is not kept yet.

    Args:
        folder: output of the stage.
        image: digest of the picture, or the beginning of its hex digits.
        accept: take the medians with ``changes``; otherwise leave the picture out.
        by: who decides.
        changes: expression -> intensity 0 to 1; a picture without medians needs all twelve.
        reason: why.

    Raises:
        DataError: there is no such picture, it is not told apart, or scores are missing.
    """
    row = _row(folder, image)
    scores: dict[str, float] | None = None
    if accept:
        waiting = {one.image: one.scores for one in queue(folder)}
        if row["image"] in waiting:
            scores = dict(zip(EXPRESSIONS, waiting[row["image"]], strict=True))
        else:
            known = {name: row.get(f"score_{name}") for name in EXPRESSIONS}
            scores = {name: min(1.0, max(0.0, value)) for name, value in known.items() if value is not None}
        scores.update(changes or {})
        missing = [name for name in EXPRESSIONS if name not in scores]
        if missing:
            raise DataError(
                f"the picture {image} has no score for {', '.join(missing)}",
                "give each of them, as in " + " ".join(f"--expression {name}=0" for name in missing[:2]),
            )
    return Decision(
        time=now(), image=row["image"], scorer=row["scorer"], decision="accept" if accept else "reject",
        scores=scores, by=by, reason=reason,
    )  # fmt: skip


def _row(folder: Path, image: str) -> dict[str, Any]:
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(folder / SCORES_NAME).to_pylist()
    except (OSError, ValueError) as error:
        raise DataError(f"the scores in {folder} cannot be read: {error}", _MEND) from None
    wanted = image.removeprefix("sha256:").lower()
    found = {row["image"]: row for row in rows if row["image"].removeprefix("sha256:").startswith(wanted)}
    if len(found) != 1 or len(wanted) < 4:
        raise DataError(
            f"{len(found)} pictures in {folder} begin with {shown(image, 80)!r}",
            "give at least four hex digits of one picture's digest, as the review page shows them",
        )
    return next(iter(found.values()))


def quarantine(folder: Path) -> list[tuple[str, str]]:
    """Return digest and reason of every picture without a score."""
    import pyarrow.parquet as pq

    table = pq.read_table(folder / SCORES_NAME, columns=["image", "status", "reason"]).to_pylist()
    return [(row["image"], str(row["reason"])) for row in table if row["status"] == "quarantined"]


def page(folder: Path, blobs: Blobs, limit: int = 200) -> str:
    """Return the queue as one self-contained HTML document.

    Args:
        folder: output of the score stage.
        blobs: its pictures.
        limit: at most that many pictures, those that differ most; the rest is counted.
    """
    waiting, without = queue(folder), quarantine(folder)
    figures = "".join(_figure(one, blobs) for one in waiting[:limit])
    more = f" The {limit} that differ most are shown." if len(waiting) > limit else ""
    lead = (
        f"{len(waiting)} pictures wait for a person; without a decision they stay out of the dataset.{more} "
        "Bars reach from the lowest to the highest sample, ticks are the samples, numbers their median."
    )
    body = section("Samples differ", lead, f'<div class="gallery">{figures}</div>')
    body += "<p>Decide with <code>trainer scores decide FOLDER IMAGE --accept --by NAME</code>, "
    body += "<code>--reject</code>, or <code>--accept --expression happy=0.6</code> for another value.</p>"
    if without:
        rows = "".join(
            f"<tr><td>{escape(shown(reason))}</td><td><code>{_short(image)}</code></td></tr>"
            for image, reason in without[:limit]
        )
        lead = f"{len(without)} pictures have no score."
        body += section("Quarantined", lead, f'<div class="card"><table>{rows}</table></div>')
    return document("Review queue", body, _STYLE)


def _figure(one: Open, blobs: Blobs) -> str:
    from PIL import Image

    image = Image.fromarray(blobs.pixels(one.image))  # type: ignore[arg-type]
    image.thumbnail((256, 256))
    return (
        f"<figure>{picture(image, _short(one.image))}{_bars(one.samples, one.scores)}<figcaption>"
        f"<code>{_short(one.image)}</code><br>{escape(shown(one.reason))}; confidence {one.confidence:.2f}"
        "</figcaption></figure>"
    )


def _bars(samples: Sequence[Row], medians: Row) -> str:
    """Return the samples of a picture as bars, a row for each expression."""
    left, width, step = 78, 180, 18
    parts = list(_bar_rows(samples, medians, left, width, step))
    height = step * len(EXPRESSIONS) + 4
    return (
        f'<svg class="chart bars" viewBox="0 0 {left + width + 40} {height}" role="img" '
        f'aria-label="samples">{"".join(parts)}</svg>'
    )


def _bar_rows(samples: Sequence[Row], medians: Row, left: int, width: int, step: int) -> Iterator[str]:
    spreads = [max(column) - min(column) for column in zip(*samples, strict=True)]
    for number, name in enumerate(EXPRESSIONS):
        y, values = number * step + 2, [row[number] for row in samples]
        kind = "wide" if spreads[number] == max(spreads) > 0 else "span"
        low, high = left + min(values) * width, left + max(values) * width
        yield f'<text class="end" x="{left - 8}" y="{y + 11}">{escape(name)}</text>'
        yield f'<rect class="track" x="{left}" y="{y}" width="{width}" height="14" rx="3"/>'
        yield f'<rect class="{kind}" x="{low:.1f}" y="{y}" width="{max(1.0, high - low):.1f}" height="14"/>'
        for value in values:
            yield f'<rect class="tick" x="{left + value * width - 1:.1f}" y="{y}" width="2" height="14"/>'
        yield f'<text class="small" x="{left + width + 6}" y="{y + 11}">{medians[number]:.2f}</text>'


def _short(image: str) -> str:
    return escape(image.removeprefix("sha256:")[:_SHORT])
