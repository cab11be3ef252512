"""The files that people look at: the three sheets and the HTML page."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from trainer.evaluation import sheets
from trainer.evaluation.measure import Gallery
from trainer.evaluation.page import CasePictures, page
from trainer.evaluation.plan import (
    BLEND_INTENSITY,
    CONTACT_SUBJECTS,
    NEUTRAL,
    TRANSITION_WEIGHTS,
    Plan,
    mixed,
    single,
)
from trainer.evaluation.report import EvaluationReport

CONTACT_SHEET = "contact_sheet.png"
INTENSITY_STRIP = "intensity_strip.png"
BLEND_STRIP = "blend_strip.png"
PAGE = "report.html"


def write(
    folder: Path, report: EvaluationReport, plan: Plan, edits: Gallery, truth: Gallery, *, subject: str
) -> None:
    """Write the sheets and the page into an existing folder.

    Args:
        folder: where to.
        report: what the page says.
        plan: what was asked.
        edits: of the adapter, everything in the plan.
        truth: sources and true renders.
        subject: name of the adapter.
    """
    contact = contact_sheet(plan, edits, truth, subject)
    strip = intensity_strip(plan, edits, subject)
    blends = blend_strip(plan, edits, subject) if plan.transition_rows() else None
    for name, image in ((CONTACT_SHEET, contact), (INTENSITY_STRIP, strip), (BLEND_STRIP, blends)):
        if image is not None:
            (folder / name).write_bytes(sheets.png(image))
    index_of = {person.name: index for index, person in enumerate(plan.subjects)}
    worst = []
    for case in report.worst:
        index, ask = index_of[case.identity], single(case.expression, 1.0)
        worst.append(
            CasePictures(
                case=case,
                source=truth.images[index, NEUTRAL],
                edit=edits.images[index, ask],
                truth=truth.images[index, ask],
            )
        )
    text = page(report, subject=subject, contact=contact, intensities=strip, blends=blends, worst=worst)
    (folder / PAGE).write_text(text, encoding="utf-8")


def contact_sheet(plan: Plan, edits: Gallery, truth: Gallery, subject: str) -> Image.Image:
    """Source and every expression at intensity 1 of the first held-out people."""
    people = []
    for index, person in enumerate(plan.subjects[:CONTACT_SUBJECTS]):
        row = [edits.images[index, single(name, 1.0)] for name in plan.expressions]
        people.append((person.name.replace(" ", "\n"), truth.images[index, NEUTRAL], row))
    return sheets.contact_sheet(
        people,
        plan.expressions,
        title=f"{subject}: every expression at intensity 1",
        subtitle=f"Held-out people, never part of training. {plan.steps} sampling steps.",
    )


def intensity_strip(plan: Plan, edits: Gallery, subject: str) -> Image.Image:
    """One expression of one person a row, from none to beyond what was trained."""
    rows = [
        (
            f"{name}\n{plan.subjects[index].name}",
            [edits.images[index, single(name, x)] for x in plan.strip],
        )
        for index, name in plan.strip_rows()
    ]
    return sheets.intensity_strip(
        rows,
        plan.strip,
        title=f"{subject}: intensity",
        subtitle="Held-out people; from 0 to 1 as trained, and beyond.",
    )


def blend_strip(plan: Plan, edits: Gallery, subject: str) -> Image.Image:
    """From one expression to another, and both at once."""
    strips = []
    for index, a, b in plan.transition_rows():
        between = [edits.images[index, mixed({a: 1 - w, b: w})] for w in TRANSITION_WEIGHTS]
        both = edits.images[index, mixed({a: BLEND_INTENSITY, b: BLEND_INTENSITY})]
        strips.append((a, b, [np.asarray(image) for image in between], both))
    return sheets.blend_strip(
        strips,
        TRANSITION_WEIGHTS,
        BLEND_INTENSITY,
        title=f"{subject}: blends",
        subtitle="Held-out people; from one expression to another, and both at once.",
    )
