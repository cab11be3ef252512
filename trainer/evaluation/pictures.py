"""The files that people look at: the sheets and charts as PNG, and the HTML page with all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from PIL import Image

from registry.errors import shown
from trainer.evaluation import charts, page, sheets
from trainer.evaluation.drawing import Drawing
from trainer.evaluation.page import CasePictures, Shown
from trainer.evaluation.plan import BASIC, NEUTRAL, Ask, Plan, Portrait, mixed, single
from trainer.evaluation.report import Case, EvaluationReport
from trainer.evaluation.sheets import Row, Sheet

if TYPE_CHECKING:
    from trainer.evaluation.bench import Measured

PAGE: Final = "report.html"
CONTACT_SHEET: Final = "contact_sheet.png"
FILES: Final = (
    ("summary.png", "Metrics with intervals, rules and what they are compared with"),
    (CONTACT_SHEET, "People and expressions at full intensity"),
    ("intensity_sheet.png", "Expressions from none to beyond what was trained"),
    ("blends.png", "Blends of two expressions"),
    ("confusion.png", "Asked against judged expressions"),
    ("curves.png", "Response of each expression to its intensity"),
    ("worst.png", "Worst cases first"),
)
"""Name and title of each picture; a suite that asks for no sweep or no blends leaves their pictures out."""

CONTACT_SUBJECTS: Final = 8
EXAMPLES: Final = 3
_LARGEST: Final = 256
"""Pixels; larger pictures are reduced before anything is drawn."""


def write(
    folder: Path,
    report: EvaluationReport,
    plan: Plan,
    measured: Mapping[str, Measured],
    *,
    subject: str,
    pairs: Sequence[tuple[str, Portrait, Portrait]] = (),
) -> None:
    """Write the pictures and the page into an existing folder.

    Args:
        folder: where to.
        report: what the page says.
        plan: what was asked.
        measured: by editor: "adapter" has everything in the plan.
        subject: name of the adapter.
        pairs: caption, an edit of a held-out person, and the training picture that is nearest to it.
    """
    album = Album(plan, measured["adapter"])
    bare = Album(plan, measured["base"]) if "base" in measured else album
    shots = Shown(
        contact=contact_sheet(album),
        intensities=intensity_sheet(album),
        blends=blend_matrix(album, report),
        worst=album.cases(report.worst),
        examples={
            metric.name: (bare if metric.name.startswith("base_") else album).cases(
                metric.examples[:EXAMPLES]
            )
            for metric in report.metrics
            if metric.passed is False
        },
        pairs=pairs,
    )
    (folder / PAGE).write_text(page.page(report, shots, subject=subject), encoding="utf-8")
    for name, image in _images(report, shots, f"{shown(subject)}, {shown(report.suite.name)}"):
        (folder / name).write_bytes(sheets.png(image))


def _images(report: EvaluationReport, shots: Shown, title: str) -> Iterable[tuple[str, Image.Image]]:
    def framed(
        name: str, drawings: Sequence[Drawing], said: str, columns: int = 1
    ) -> tuple[str, Image.Image]:
        images = [one.image() for one in drawings]
        return name, sheets.framed(images, columns, title=title, subtitle=said)

    yield framed("summary.png", [page.summary(report)], page.headline(report))
    yield CONTACT_SHEET, shots.contact.image()
    if shots.intensities is not None:
        yield "intensity_sheet.png", shots.intensities.image()
    if shots.blends is not None:
        said = "Below the diagonal: blends with both expressions, and how strong each was judged"
        yield framed("blends.png", [shots.blends], said)
    yield framed("confusion.png", [page.confusion(report)], "Asked down, judged across, per cent of edits")
    if report.curves:
        against = "" if report.against is None else f"; amber: {shown(report.against.reference)}"
        yield framed("curves.png", page.responses(report), f"Judged against asked intensity{against}", 4)
    if shots.worst:
        yield "worst.png", worst_sheet(shots.worst, title).image()


class Album:
    """The pictures of an evaluation, each read once and no larger than is shown."""

    def __init__(self, plan: Plan, edits: Measured) -> None:
        self.plan, self._edits = plan, edits
        self._kept: dict[tuple[str, int, Ask], Portrait | None] = {}
        self._where: dict[tuple[str, Ask], int] = {}
        for index, ask in edits.edited:
            self._where.setdefault((plan.subjects[index].name, ask), index)

    def asked(self, index: int, ask: Ask) -> bool:
        """Whether the adapter was asked for that."""
        return (index, ask) in self._edits.edited

    def edit(self, index: int, ask: Ask) -> Portrait | None:
        """The adapter's answer, None where it was not asked."""
        key = ("edit", index, ask)
        if key not in self._kept:
            self._kept[key] = _reduced(self._edits.picture(index, ask)) if self.asked(index, ask) else None
        return self._kept[key]

    def source(self, index: int) -> Portrait:
        """The picture that is edited."""
        key = ("source", index, NEUTRAL)
        if key not in self._kept:
            self._kept[key] = _reduced(self.plan.pictures.source(index))
        found = self._kept[key]
        assert found is not None, "every subject has a source"
        return found

    def cases(self, cases: Sequence[Case]) -> list[CasePictures]:
        """Cases with their portraits."""
        found = []
        for case in cases:
            ask = mixed(case.asked)
            index = self._where[case.subject, ask]
            edit, truth = self.edit(index, ask), self.plan.pictures.truth(index, ask)
            assert edit is not None, "a case is an edit"
            answer = None if truth is None else _reduced(truth)
            found.append(CasePictures(case=case, source=self.source(index), edit=edit, truth=answer))
        return found


def _reduced(portrait: Portrait) -> Portrait:
    if max(portrait.shape[:2]) <= _LARGEST:
        return portrait
    import numpy as np

    image = Image.fromarray(portrait)
    image.thumbnail((_LARGEST, _LARGEST), Image.Resampling.LANCZOS)
    return np.asarray(image)


def contact_sheet(album: Album) -> Sheet:
    """People down, expressions across, at intensity 1; expressions down where nobody was asked for two."""
    plan, full = album.plan, {name: single(name, 1.0) for name in album.plan.expressions}
    several = [
        index
        for index in range(len(plan.subjects))
        if sum(album.asked(index, ask) for ask in full.values()) > 1
    ][:CONTACT_SUBJECTS]
    title = "Every expression at intensity 1"
    if several:
        rows = [
            Row(
                label=_label(plan.subjects[index].name),
                cells=[album.source(index), *(album.edit(index, ask) for ask in full.values())],
            )
            for index in several
        ]
        said = f"{_who(plan)}: {len(several)} of {len(plan.subjects)}."
        return Sheet(title=title, subtitle=said, columns=["source", *full], rows=rows)
    rows = []
    for name, ask in full.items():
        people = [index for index in range(len(plan.subjects)) if album.asked(index, ask)][:3]
        cells, words = [], []
        for place in range(3):
            known = place < len(people)
            cells += [album.source(people[place]), album.edit(people[place], ask)] if known else [None, None]
            words += [_short(plan.subjects[people[place]].name), name] if known else ["", ""]
        if people:
            rows.append(Row(label=name, cells=cells, captions=words))
    columns = ["source", "edit"] * 3
    said = f"{_who(plan)}; up to three for each expression."
    return Sheet(title=title, subtitle=said, columns=columns, rows=rows, gaps_after=(1, 3))


def intensity_sheet(album: Album) -> Sheet | None:
    """One person in every expression at every intensity; somebody else where that person was not asked."""
    plan, levels = album.plan, album.plan.suite.intensities

    def known(index: int, name: str) -> int:
        return sum(album.asked(index, single(name, level)) for level in levels if level > 0)

    people = range(len(plan.subjects))
    main = max(people, key=lambda index: sum(known(index, name) for name in plan.expressions))
    rows, who = [], _short(plan.subjects[main].name)
    for name in plan.expressions:
        index = max((main, *people), key=lambda one: known(one, name))
        if known(index, name) < 2:
            continue
        other = "" if index == main else f"\n{_short(plan.subjects[index].name)}"
        who = who if index == main else "The person with most intensities of each expression"
        cells = [album.edit(index, single(name, level)) for level in levels]
        rows.append(Row(label=f"{name}{other}", cells=[album.source(index), *cells]))
    if not rows:
        return None
    gaps = (0, *(1 + gap for gap in sheets.beyond(levels)))
    return Sheet(
        title="Every intensity",
        subtitle=f"{who}, from none to {levels[-1]:g}.",
        columns=["source", *(f"{level:g}" for level in levels)],
        rows=rows,
        tile=112,
        gaps_after=gaps,
    )


def blend_matrix(album: Album, report: EvaluationReport) -> Drawing | None:
    """The chart of all pairs of expressions, basic ones first; None where no blend was asked for."""
    plan = album.plan
    order = sorted(plan.expressions, key=lambda name: (name not in BASIC, plan.expressions.index(name)))
    pictures: dict[tuple[str, str], Image.Image] = {}
    first: int | None = None
    for index, subject in enumerate(plan.subjects):
        for ask in subject.asks:
            a, b = sorted((name for name, _ in ask), key=order.index) if len(ask) == 2 else ("", "")
            if not a or (a, b) in pictures or (portrait := album.edit(index, ask)) is None:
                continue
            first = index if first is None else first
            pictures[a, b] = _tile(portrait)
    if first is None:
        return None
    for name in order:
        portrait = album.edit(first, single(name, 1.0))
        if portrait is not None:
            pictures[name, name] = _tile(portrait)
    return charts.blends(report.blends, order, pictures)


def worst_sheet(worst: Sequence[CasePictures], title: str) -> Sheet:
    """The worst edits, two beside each other, with source and true answer."""
    answers = any(entry.truth is not None for entry in worst)
    heads = ["source", "edit", *(["true answer"] if answers else [])]
    rows = []
    for start in range(0, len(worst), 2):
        cells: list[Portrait | None] = []
        words: list[str] = []
        for entry in worst[start : start + 2]:
            case = entry.case
            cells += [entry.source, entry.edit, *([entry.truth] if answers else [])]
            words += [
                _short(case.subject),
                f"judged {shown(case.judged_as)}",
                *([page.asked(case)] if answers else []),
            ]
        empty = 2 * len(heads) - len(cells)
        rows.append(
            Row(label=str(start + 1), cells=[*cells, *[None] * empty], captions=[*words, *[""] * empty])
        )
    subtitle = "Worst cases first: wrong expression, then the pictures furthest from right."
    return Sheet(title=title, subtitle=subtitle, columns=heads * 2, rows=rows, gaps_after=(len(heads) - 1,))


def _who(plan: Plan) -> str:
    """Who is edited; only of drawn people do we know that no training saw them."""
    return (
        "Held-out people, never part of training"
        if plan.suite.source == "renderer"
        else "Pictures of the suite"
    )


def _tile(portrait: Portrait) -> Image.Image:
    return sheets.enlarge(portrait, 2 * (charts.BLEND_CELL - 4))


def _short(name: str) -> str:
    return shown(name, 24)


def _label(name: str) -> str:
    return _short(name).replace(" ", "\n", 1)
