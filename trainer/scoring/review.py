"""The review queue: pictures whose samples differ, shown on one page, and what a person says about them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from registry.digest import Digest
from registry.errors import shown
from trainer.data.blobs import Blobs
from trainer.errors import DataError
from trainer.evaluation.html import document, picture, section
from trainer.portraits.expressions import EXPRESSIONS
from trainer.scoring.decisions import Decision, now
from trainer.scoring.stage import REVIEW_NAME, SCORES_NAME
from trainer.stage import STAGE_NAME

_LEFT, _WIDTH, _STEP = 78, 180, 18  # of the bars, in units of their view box
_SHORT = 12  # hex digits that name a picture on the page and in the command
_MEND = "give the folder of a score stage, with scores.parquet and review.jsonl"
_STYLE = """.bars{font:12px system-ui,sans-serif;margin-top:10px}.bars .span{fill:var(--accent);opacity:.3}
.bars .wide{fill:var(--out);opacity:.55}.bars .tick{fill:var(--ink)}.bars .track{fill:var(--cell)}
.gallery{grid-template-columns:repeat(auto-fill,minmax(300px,1fr))}img{image-rendering:auto}"""


_Number = Annotated[float, Field(ge=-2, le=2)]
_Numbers = Annotated[tuple[_Number, ...], Field(min_length=12, max_length=12)]


class Waiting(BaseModel):
    """A picture that waits for a person: a line of ``review.jsonl``.

    Attributes:
        image: its digest.
        scorer: who looked.
        reason: why it waits.
        confidence, disagreement: see `Scored`.
        expressions: the twelve names, in the order of the numbers.
        scores: the medians.
        samples: the answers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    image: Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
    scorer: str
    reason: str
    confidence: Annotated[float, Field(ge=0, le=1)]
    disagreement: Annotated[float, Field(ge=0, le=4)]
    expressions: Annotated[tuple[str, ...], Field(min_length=12, max_length=12)]
    scores: _Numbers
    samples: Annotated[tuple[_Numbers, ...], Field(min_length=1, max_length=64)]

    @model_validator(mode="after")
    def _named(self) -> Self:
        if sorted(self.expressions) != sorted(EXPRESSIONS):
            raise ValueError("these are other expressions")
        return self

    @property
    def medians(self) -> dict[str, float]:
        """The medians by name, in the order of `EXPRESSIONS`."""
        return self._by_name(self.scores)

    @property
    def answers(self) -> list[dict[str, float]]:
        """The samples by name, in the order of `EXPRESSIONS`."""
        return [self._by_name(row) for row in self.samples]

    def _by_name(self, row: Sequence[float]) -> dict[str, float]:
        return {name: row[self.expressions.index(name)] for name in EXPRESSIONS}


def queue(folder: Path) -> list[Waiting]:
    """Return what waits in the output of the score stage, the largest disagreement first.

    Raises:
        DataError: the folder is no output of that stage.
    """
    path = folder / REVIEW_NAME
    try:
        lines = path.read_bytes().splitlines()
        found = [Waiting.model_validate_json(line) for line in lines]
    except OSError as error:
        raise DataError(f"the review queue {path} cannot be read: {error}", _MEND) from None
    except ValidationError as error:
        # Where it is wrong, not what is written there: that may be anybody's words.
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise DataError(f"the review queue {path} cannot be read: {shown(where)} is wrong", _MEND) from None
    return sorted(found, key=lambda one: (-one.disagreement, one.image))


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
        waiting = {one.image: one for one in queue(folder)}
        known = {name: row.get(f"score_{name}") for name in EXPRESSIONS}
        if row["image"] in waiting:
            known = dict(waiting[row["image"]].medians)
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


def pictures_of(folder: Path) -> Path:
    """Return the folder of the pictures that were scored: where it was then, or ``images`` beside it."""
    try:
        recorded = Path(json.loads((folder / STAGE_NAME).read_bytes())["facts"]["pictures"])
    except (OSError, ValueError, KeyError, TypeError):
        recorded = folder
    return recorded if (recorded / "blobs").is_dir() else folder.parent / "images"


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


def _figure(one: Waiting, blobs: Blobs) -> str:
    from PIL import Image

    image = Image.fromarray(blobs.pixels(Digest(one.image)))
    image.thumbnail((256, 256))
    return (
        f"<figure>{picture(image, _short(one.image))}{_bars(one)}<figcaption>"
        f"<code>{_short(one.image)}</code><br>{escape(shown(one.reason))}; confidence {one.confidence:.2f}"
        "</figcaption></figure>"
    )


def _bars(one: Waiting) -> str:
    """Return the samples of a picture as bars, a row for each expression."""
    height = _STEP * len(EXPRESSIONS) + 4
    return (
        f'<svg class="chart bars" viewBox="0 0 {_LEFT + _WIDTH + 40} {height}" role="img" '
        f'aria-label="samples">{"".join(_bar_rows(one))}</svg>'
    )


def _bar_rows(one: Waiting) -> Iterator[str]:
    said = {name: [min(1.0, max(0.0, row[name])) for row in one.answers] for name in EXPRESSIONS}
    widest = max(max(values) - min(values) for values in said.values())
    for number, (name, values) in enumerate(said.items()):
        y, low, high = number * _STEP + 2, _LEFT + min(values) * _WIDTH, _LEFT + max(values) * _WIDTH
        kind = "wide" if max(values) - min(values) == widest > 0 else "span"
        yield f'<text class="end" x="{_LEFT - 8}" y="{y + 11}">{escape(name)}</text>'
        yield f'<rect class="track" x="{_LEFT}" y="{y}" width="{_WIDTH}" height="14" rx="3"/>'
        yield f'<rect class="{kind}" x="{low:.1f}" y="{y}" width="{max(1.0, high - low):.1f}" height="14"/>'
        for value in values:
            yield f'<rect class="tick" x="{_LEFT + value * _WIDTH - 1:.1f}" y="{y}" width="2" height="14"/>'
        yield f'<text class="small" x="{_LEFT + _WIDTH + 6}" y="{y + 11}">{one.medians[name]:.2f}</text>'


def _short(image: str) -> str:
    return escape(image.removeprefix("sha256:")[:_SHORT])
