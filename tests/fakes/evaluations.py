"""Evaluations without a base model: renders stand in for edits; judges, metrics and rules are real."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fakes.adapters import card
from fakes.tasks import FIRST, write_tasks
from registry.digest import digest_bytes
from registry.manifest import AdapterCard
from registry.policy import Threshold
from trainer.data.blobs import Blobs, encode_png
from trainer.evaluation.bench import Bench, Measured
from trainer.evaluation.editing import Edited, Editor
from trainer.evaluation.evaluating import Wanted, build_report
from trainer.evaluation.judges import judges_of
from trainer.evaluation.plan import Ask, Plan, Portrait, plan_of, vector
from trainer.evaluation.reading import read
from trainer.evaluation.report import Digests, EvaluationReport, Probe
from trainer.portraits.renderer import identity, pose, render
from trainer.progress import silent
from trainer.recipe import load
from trainer.sections import SuiteSection

PROBES = (
    Probe(
        name="memorisation", title="Nearest training picture", outcome="pass", found="None of 8 is a copy."
    ),
    Probe(name="strength_zero", title="Strength 0 is the base", outcome="skipped", found="There is no base."),
)


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """What `trainer.evaluation.pictures.write` is given."""

    report: EvaluationReport
    plan: Plan
    measured: Mapping[str, Measured]


def drawn(
    place: Path,
    *,
    rules: Mapping[str, Threshold] | None = None,
    against: str | None = "pixelsmile@prod",
    names: tuple[str, ...] = (),
    probes: tuple[Probe, ...] = PROBES,
) -> Evaluated:
    """Three drawn people; the first one's edits are half as strong as asked, with surprise instead of fear.

    Args:
        place: keeps the pictures.
        rules: what it must reach.
        against: reference of an adapter that answers all but perfectly.
        names: of the people, instead of their own.
        probes: what else was asked.
    """
    suite = SuiteSection.model_validate(
        {
            "name": "three-people", "identities": {"human": 2, "anime": 1}, "first_identity": FIRST,
            "intensities": (0.0, 0.5, 1.0, 1.5), "sweep_people": 2, "blend_people": 1, "steps": 4,
            "judge": {"scorer": "judge"},
        }
    )  # fmt: skip
    plan = plan_of(suite, load("pixelsmile-portraits").conditioning)
    if names:
        people = [replace(one, name=name) for one, name in zip(plan.subjects, names, strict=True)]
        plan = replace(plan, subjects=tuple(people))

    def timid(index: int, ask: Ask) -> Portrait:
        if index == 0:
            ask = tuple(sorted((("surprised" if name == "fear" else name), x / 2) for name, x in ask))
        return _truth(plan, index, ask)

    editors = {"adapter": timid, "base": lambda index, ask: plan.pictures.source(index)}
    if against is not None:
        editors["against"] = lambda index, ask: _truth(plan, index, ask)
    return _evaluated(place, plan, editors, rules or {}, against, probes)


def tasks(place: Path, asked: tuple[tuple[str, tuple[str, ...]], ...]) -> Evaluated:
    """A folder of tasks: pictures of which each is asked for few expressions, and no true answers."""
    write_tasks(place / "tasks", asked)
    suite = SuiteSection.model_validate(
        {
            "name": "drawn-tasks", "source": "tasks", "path": str(place / "tasks"), "steps": 4,
            "intensities": (0.0, 0.5, 1.0), "judge": {"scorer": "judge"},
        }
    )  # fmt: skip
    plan = plan_of(suite, load("pixelsmile-portraits").conditioning)

    def edit(index: int, ask: Ask) -> Portrait:
        number = int(plan.subjects[index].name.rpartition("/")[2].partition(".")[0])
        domain = "anime" if "anime" in plan.subjects[index].name else "human"
        return render(identity(FIRST + number, domain), vector(ask), place=pose(FIRST + number))

    return _evaluated(place, plan, {"adapter": edit}, {}, None, ())


def _truth(plan: Plan, index: int, ask: Ask) -> Portrait:
    found = plan.pictures.truth(index, ask)
    assert found is not None, "drawn people have true answers"
    return found


def _evaluated(
    place: Path,
    plan: Plan,
    editors: Mapping[str, Callable[[int, Ask], Portrait]],
    rules: Mapping[str, Threshold],
    against: str | None,
    probes: tuple[Probe, ...],
) -> Evaluated:
    judges, made = judges_of(plan.suite, place), AdapterCard.parse(json.dumps(card()).encode())
    measured = {}
    for name, draw in editors.items():
        blobs, edited = Blobs(place / name), Edited()
        scope = "full strength" if name == "base" else "all"
        who = Editor(
            name=name, folder=place, weights=digest_bytes(name.encode()), card=made, scope=scope,
            reference=against if name == "against" else None,
        )  # fmt: skip
        for index in range(len(plan.subjects)):
            for ask in who.asks(plan, index):
                edited[index, ask] = blobs.add(encode_png(np.asarray(draw(index, ask))), "image/png")
        readings = read(plan, judges, edited, blobs, silent)
        measured[name] = Measured(editor=who, readings=readings, edited=edited, blobs=blobs)
    base = load("pixelsmile-portraits").base
    bench = Bench(plan=plan, judges=judges, base=base, base_path=place, place=place / "kept")
    digests = Digests(
        adapter=measured["adapter"].editor.weights, raw=None, base=digest_bytes(b"base"),
        judges=judges.digests, suite=plan.digest(), code=digest_bytes(b"code"),
    )  # fmt: skip
    wanted = Wanted(adapter=place, rules=rules)
    report = build_report(bench, measured, bench.truth(), wanted, digests, probes)
    return Evaluated(report=report, plan=plan, measured=measured)
