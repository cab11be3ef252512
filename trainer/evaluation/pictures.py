"""The files that people look at: the sheets and the HTML page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from trainer.evaluation import sheets
from trainer.evaluation.plan import Plan, single
from trainer.evaluation.report import EvaluationReport

if TYPE_CHECKING:
    from trainer.evaluation.evaluating import Measured

CONTACT_SHEET = "contact_sheet.png"
PAGE = "report.html"
CONTACT_SUBJECTS = 8


def write(
    folder: Path, report: EvaluationReport, plan: Plan, measured: Mapping[str, Measured], *, subject: str
) -> None:
    """Write the sheets and the page into an existing folder.

    Args:
        folder: where to.
        report: what the page says.
        plan: what was asked.
        measured: by editor: "adapter" has everything in the plan.
        subject: name of the adapter.
    """
    contact = contact_sheet(plan, measured["adapter"], subject)
    (folder / CONTACT_SHEET).write_bytes(sheets.png(contact))


def contact_sheet(plan: Plan, edits: Measured, subject: str) -> Image.Image:
    """Source and every expression at intensity 1 of the first held-out people."""
    people = []
    for index, person in enumerate(plan.subjects[:CONTACT_SUBJECTS]):
        row = [edits.picture(index, single(name, 1.0)) for name in plan.expressions]
        people.append((person.name.replace(" ", "\n"), plan.pictures.source(index), row))
    return sheets.contact_sheet(
        people,
        plan.expressions,
        title=f"{subject}: every expression at intensity 1",
        subtitle=f"Held-out people, never part of training. {plan.suite.steps} sampling steps.",
    )
