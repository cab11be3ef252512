"""`evaluate`: edits held-out people through the engine that production serves, judges, writes the report.

The edits are made by `trainer.evaluation.editing`. The judge is trained apart from the one that labelled the
training data; its own error on true renders of the same people stands beside every value.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from registry.digest import Digest, digest_bytes
from registry.manifest import canonical_json
from trainer.errors import BaseModelError
from trainer.evaluation import measure, metrics, pictures
from trainer.evaluation.editing import candidate, edits, parts_key
from trainer.evaluation.measure import Gallery, Judge, Key, Measured
from trainer.evaluation.plan import Plan, plan_of, vector
from trainer.evaluation.report import Digests, EvaluationReport, Value, build_metrics, judge
from trainer.evaluation.sheets import Portrait
from trainer.export import code_version
from trainer.parts import Mapper, forget, here
from trainer.portraits.renderer import render
from trainer.progress import Progress, silent
from trainer.recipe import Recipe
from trainer.stage import StageResult, finished, new_folder, stage_key, write_result

REPORT_NAME = "evaluation.json"
WORST_CASES = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Judges:
    """Who judges: expressions [N, 12], identities [N, D] unit rows, and the digests of their files."""

    expression: Judge
    identity: Judge
    digests: dict[str, Digest]


def load_judges() -> Judges:
    """The shipped evaluation judge and identity encoder."""
    from trainer.portraits import judges

    paths = {"expression": judges.path("evaluation"), "identity": judges.path("identity")}
    return Judges(
        expression=judges.ExpressionJudge.load("evaluation"),
        identity=judges.IdentityEncoder.load(),
        digests={name: digest_bytes(path.read_bytes()) for name, path in paths.items()},
    )


def evaluate(
    recipe: Recipe,
    adapter_dir: Path,
    base_path: Path,
    out: Path,
    raw_dir: Path | None = None,
    progress: Progress = silent,
    judges: Judges | None = None,
    *,
    mapper: Mapper = here,
) -> EvaluationReport:
    """Judge an adapter on people that training has never seen.

    Where `out` already holds the report of the very same evaluation, that one is returned.

    Args:
        recipe: its evaluation section decides people, intensities, steps and thresholds.
        adapter_dir: folder of the adapter to be judged (the EMA weights).
        base_path: folder of the base model.
        out: becomes a folder with evaluation.json, report.html and the sheets, all at once.
        raw_dir: the same training's weights without EMA, for comparison.
        progress: takes notice of the people that are done.
        judges: None loads the shipped ones.
        mapper: does the edits; the report is the same, whoever does.

    Raises:
        RecipeError: the recipe's evaluation asks for something that this suite cannot do.
        DataError: an adapter folder is incomplete.
        BaseModelError: there is no base model.
        RegistryError: the scan blocks an adapter, or the licence check does. What it wants a person to review
            is evaluated: that is what the person will look at.
        ServingError: an adapter does not fit the base.
    """
    plan = plan_of(recipe)
    judges = judges or load_judges()
    # Who has to review an adapter, such as one with DoRA, decides by this very evaluation.
    adapter, weights = candidate(adapter_dir, allow_review=True)
    raw, raw_weights = (None, None) if raw_dir is None else candidate(raw_dir, allow_review=True)
    digests = Digests(
        adapter=weights,
        raw=raw_weights,
        base=folder_digest(base_path),
        judges=judges.digests,
        suite=plan.digest(),
    )
    code = code_version()
    key = stage_key(
        "evaluate",
        digests=digests.model_dump(mode="json"),
        thresholds=recipe.evaluation.thresholds,
        code=code,
    )
    if finished(out, key):
        return EvaluationReport.model_validate_json((out / REPORT_NAME).read_bytes())

    truth = Gallery.of(render_truth(plan), judges.expression, judges.identity)
    given = {"adapter": (adapter_dir, weights)}
    adapters = {"adapter": adapter}
    if raw_dir is not None and raw is not None and raw_weights is not None:
        given["raw"], adapters["raw"] = (raw_dir, raw_weights), raw
    found = edits(recipe, given, adapters, base_path, out, key, mapper, progress)
    galleries = {name: Gallery.of(one, judges.expression, judges.identity) for name, one in found.items()}
    report = build_report(plan, galleries, truth, recipe.evaluation.thresholds, digests, code)
    with new_folder(out) as folder:
        data = report.model_dump_json(indent=1).encode()
        (folder / REPORT_NAME).write_bytes(data)
        pictures.write(folder, report, plan, galleries["adapter"], truth, subject=recipe.release.adapter)
        facts = {"verdict": "passed" if report.verdict.passed else "refused", **report.scalars()}
        write_result(
            folder, StageResult(stage="evaluate", folder=out, key=key, digest=digest_bytes(data), facts=facts)
        )
    forget(out, parts_key(key, recipe.running.batch))
    return report


def folder_digest(folder: Path) -> Digest:
    """Digest over the names and contents of a base model's files.

    Raises:
        BaseModelError: there is no such folder.
    """
    if not (folder / "model_index.json").is_file():
        raise BaseModelError(
            f"{folder} holds no base model: model_index.json is missing", "give a folder in diffusers layout"
        )
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    entries = {path.relative_to(folder).as_posix(): str(digest_bytes(path.read_bytes())) for path in files}
    return digest_bytes(canonical_json(entries))


def render_truth(plan: Plan) -> dict[Key, Portrait]:
    """True renders of everything that the adapter is asked for, and the neutral sources."""
    return {
        (index, ask): render(subject.person, vector(ask), place=subject.place)
        for index, subject in enumerate(plan.subjects)
        for ask in plan.everything(index)
    }


def build_report(
    plan: Plan,
    galleries: dict[str, Gallery],
    truth: Gallery,
    thresholds: dict[str, float],
    digests: Digests,
    code: str,
) -> EvaluationReport:
    """Measure, compare and gate.

    Args:
        plan: what was asked.
        galleries: "adapter" with everything in the plan, "base" and, where given, "raw" at full strength.
        truth: sources and true renders.
        thresholds: of the recipe.
        digests: what was judged, on what, by what.
        code: version of this code.
    """
    edits = galleries["adapter"]
    measured = {name: measure.full_strength(plan, gallery, truth) for name, gallery in galleries.items()}
    measured["renders"] = measure.full_strength(plan, truth, truth) | measure.control(plan, truth)
    del measured["renders"]["paired_psnr"]  # of a picture with itself
    ceiling = measured["renders"]["identity_similarity"]
    for values in measured.values():
        similarity = values["identity_similarity"]
        ratio = metrics.identity_ratio(similarity.values, ceiling.values)
        values["identity_ratio"] = Measured(values=ratio, samples=similarity.samples)
    base = measured["base"]
    for name in ("adapter", "raw"):
        if name in measured:
            paired = measured[name]["paired_psnr"]
            gain = paired.values - base["paired_psnr"].values
            measured[name]["psnr_gain"] = Measured(values=gain, samples=paired.samples)
    measured["adapter"] |= measure.control(plan, edits) | {
        "base_top1_accuracy": base["top1_accuracy"],
        "identity_ceiling": ceiling,
    }
    values = {name: measure.value(item, plan) for name, item in measured.pop("adapter").items()}
    references: dict[str, dict[str, Value]] = {}
    for which, items in measured.items():
        for name, item in items.items():
            references.setdefault(name, {})[which] = measure.value(item, plan)
    rows = build_metrics(values, references, thresholds)
    return EvaluationReport(
        code_version=code,
        digests=digests,
        suite=plan.describe(),
        metrics=rows,
        verdict=judge(rows),
        confusion=measure.confusion(plan, edits),
        curves=measure.response_curves(plan, edits),
        worst=tuple(case for _, case in measure.cases(plan, edits, truth)[:WORST_CASES]),
    )
