"""`evaluate`: measures an adapter beside others, compares, decides, writes the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from registry.digest import Digest, digest_bytes
from registry.policy import Threshold
from registry.settings import home
from trainer.errors import RecipeError
from trainer.evaluation import measure, pictures
from trainer.evaluation.bench import Bench, Measured
from trainer.evaluation.editing import Editor, editor
from trainer.evaluation.gates import judge, merged, rows, thresholds
from trainer.evaluation.judges import Judges, judges_of, require_able
from trainer.evaluation.plan import plan_of
from trainer.evaluation.readings import Readings
from trainer.evaluation.report import Against, Digests, EvaluationReport, Gap, Probe, Value
from trainer.evaluation.statistics import Difference, Sample, difference, estimate, holm
from trainer.evaluation.suites import of_recipe
from trainer.export import code_version
from trainer.parts import Mapper, here
from trainer.progress import Progress, Whole, silent
from trainer.provenance import running_code
from trainer.recipe import Recipe
from trainer.stage import StageResult, finished, new_folder, stage_key, write_result

REPORT_NAME = "evaluation.json"
WORST_CASES = 12
FOLDER = "evaluations"
"""Folder of the data folder with reports, and with what editors did and what judges read."""
MEASURED = "measured"
STAGE = "evaluate"
ENDED = "edited, judged and asked"
PROBES = 100
"""The probes take about as long as so many pictures."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What an evaluation is asked for.

    Attributes:
        adapter: folder of the adapter to be judged.
        raw: folder of the same training's weights without EMA, for comparison.
        against: the adapter that production runs, or another to be compared with: its folder and reference.
        rules: metric -> what it must reach.
        taken: the alias whose rules these are means another version already, so that a rule about regression
            must find something to compare with.
        training_data: folder of the dataset that the adapter was trained on, for the probe of memorisation.
        subject: what the report calls the adapter.
    """

    adapter: Path
    raw: Path | None = None
    against: tuple[Path, str] | None = None
    rules: Mapping[str, Threshold] = field(default_factory=dict)
    taken: bool = False
    training_data: Path | None = None
    subject: str = "adapter"


def evaluate_recipe(
    recipe: Recipe,
    adapter_dir: Path,
    base_path: Path,
    out: Path,
    raw_dir: Path | None = None,
    progress: Progress = silent,
    *,
    against: tuple[Path, str] | None = None,
    rules: Mapping[str, Threshold] | None = None,
    taken: bool = False,
    training_data: Path | None = None,
    judges: Judges | None = None,
    mapper: Mapper = here,
    place: Path | None = None,
) -> EvaluationReport:
    """Judge an adapter by the suite and thresholds of its recipe and by a policy's rules; see `evaluate`.

    Args:
        rules, taken: of the policy; where the recipe has a threshold on the same metric, the stricter counts.
        place: the data folder; None is this machine's.

    Raises:
        RecipeError: a threshold on a metric that does not exist.
    """
    suite = of_recipe(recipe)
    try:
        own = thresholds(recipe.evaluation.thresholds)
    except ValueError as error:
        raise RecipeError(f"evaluation.thresholds: {error}", "correct or remove that threshold") from None
    wanted = Wanted(
        adapter=adapter_dir, raw=raw_dir, against=against, rules=merged(own, rules or {}), taken=taken,
        training_data=training_data, subject=recipe.release.adapter,
    )  # fmt: skip
    data_folder = place or home()
    bench = Bench(
        plan=plan_of(suite, recipe.conditioning),
        judges=judges or judges_of(suite, data_folder),
        base=recipe.base,
        base_path=base_path,
        place=data_folder / FOLDER / MEASURED,
        mapper=mapper,
        progress=progress,
        least=recipe.running.batch,
    )
    return evaluate(bench, wanted, out)


def evaluate(bench: Bench, wanted: Wanted, out: Path) -> EvaluationReport:
    """Judge an adapter on subjects that training has never seen.

    Where `out` already holds the report of the very same evaluation, that one is returned.

    Args:
        bench: where it is measured.
        wanted: who is judged, beside whom, by which rules.
        out: becomes a folder with evaluation.json, report.html and the sheets, all at once.

    Raises:
        RecipeError: the suite asks for what cannot be done.
        EvaluationError: the judge labelled the training data, or the adapters cannot be compared.
        DataError: an adapter folder is incomplete, or the training data are not there.
        BaseModelError: there is no base model.
        RegistryError: the scan blocks an adapter, or the licence check does.
        ServingError: an adapter does not fit the base.
    """
    from trainer.evaluation import memorisation, safety

    require_able(bench.plan.suite, bench.base)
    editors = _editors(wanted)
    adapter, against = editors["adapter"], editors.get("against")
    digests = Digests(
        adapter=adapter.weights,
        raw=editors["raw"].weights if "raw" in editors else None,
        base=bench.base_digest,
        judges=bench.judges.digests,
        suite=bench.plan.digest(),
        code=running_code(),
    )
    key = stage_key(
        "evaluate",
        digests=digests.model_dump(mode="json"),
        against=None if against is None else [against.reference, str(against.weights)],
        rules={name: rule.model_dump(mode="json") for name, rule in wanted.rules.items()},
        taken=wanted.taken,
        training_data=None if wanted.training_data is None else str(_dataset(wanted.training_data)),
        subject=wanted.subject,
    )
    if finished(out, key):
        bench.say(f"this very evaluation was made before: {out}")
        return EvaluationReport.model_validate_json((out / REPORT_NAME).read_bytes())
    whole = progress_of(bench, editors, extra=PROBES)
    measured, truth = measured_by(bench, editors, whole)
    asking = replace(bench, progress=whole.part("probes", 2 * PROBES))
    # Two evaluations of one adapter share the parts of its probes.
    with bench.alone(bench.probes(adapter.weights), "the probes of this adapter"):
        found = memorisation.probe(asking, measured["adapter"], wanted.training_data)
        probes = (found.probe, *safety.probes(asking, measured))
    report = build_report(bench, measured, truth, wanted, digests, probes)
    with new_folder(out) as folder:
        data = report.model_dump_json(indent=1).encode()
        (folder / REPORT_NAME).write_bytes(data)
        pictures.write(folder, report, bench.plan, measured, subject=wanted.subject, pairs=found.pairs())
        facts = {"verdict": "passed" if report.verdict.passed else "refused", **report.scalars()}
        write_result(
            folder, StageResult(stage="evaluate", folder=out, key=key, digest=digest_bytes(data), facts=facts)
        )
    whole.end(ENDED)
    return report


def progress_of(bench: Bench, editors: Mapping[str, Editor], *, extra: int = 0) -> Whole:
    """One measure of progress for `measured_by`, and for ``extra`` pictures that somebody makes after it."""
    # An edit is made and judged, a true answer is only judged.
    pictures = sum(2 * bench.pictures(one) for one in editors.values())
    return Whole(bench.progress, STAGE, pictures + bench.answers + 2 * extra)


def measured_by(
    bench: Bench, editors: Mapping[str, Editor], whole: Whole
) -> tuple[dict[str, Measured], Readings | None]:
    """Measure editors one after the other, by name, and look at the true answers."""
    measured = {}
    for name, one in editors.items():
        part = whole.part(name, 2 * bench.pictures(one))
        measured[name] = replace(bench, progress=part).measure(one)
    return measured, replace(bench, progress=whole.part("true answers", bench.answers)).truth()


def _dataset(folder: Path) -> Digest:
    """Digest of a dataset, as it names itself.

    Raises:
        DataError: that is none.
    """
    from trainer.data.dataset import Dataset

    return Dataset.open(folder).digest


def _editors(wanted: Wanted) -> dict[str, Editor]:
    """Who edits: the adapter, the base alone, and what else it is compared with."""
    found = {"adapter": editor("adapter", wanted.adapter)}
    found["base"] = replace(found["adapter"], name="base", strength=0.0, scope="full strength")
    if wanted.raw is not None:
        found["raw"] = editor("raw", wanted.raw, scope="full strength")
    if wanted.against is not None:
        folder, reference = wanted.against
        found["against"] = editor("against", folder, reference=reference)
    return found


def build_report(
    bench: Bench,
    measured: Mapping[str, Measured],
    truth: Readings | None,
    wanted: Wanted,
    digests: Digests,
    probes: tuple[Probe, ...] = (),
) -> EvaluationReport:
    """Measure, compare and decide.

    Args:
        bench: where it was measured.
        measured: "adapter", "base", and where given "raw" and "against".
        truth: what the judges say of the true answers.
        wanted: has the rules.
        digests: what was judged, on what, by what.
        probes: what else was asked.
    """
    plan, seed = bench.plan, bench.plan.suite.seed
    readings = {name: one.readings for name, one in measured.items()}
    if truth is not None:
        readings["renders"] = truth
    samples = measure.measure_all(plan, readings)
    values = estimated(samples, seed)
    references: dict[str, dict[str, Value]] = {}
    for who in [who for who in values if who != "adapter"]:
        for name, value in values[who].items():
            references.setdefault(name, {})[who] = value
    gaps = compared(samples["adapter"], samples["against"], seed) if "against" in samples else {}
    metrics = rows(
        values["adapter"], references, gaps, wanted.rules, taken=wanted.taken,
        worst=lambda name: measure.worst(plan, readings, name),
    )  # fmt: skip
    beside = measured["against"].editor if "against" in measured else None
    return EvaluationReport(
        code_version=code_version(),
        digests=digests,
        judges=bench.judges.names,
        suite=plan.describe(),
        against=None if beside is None else Against(reference=beside.called, weights=beside.weights),
        metrics=metrics,
        verdict=judge(metrics, probes, wanted.rules),
        confusion=measure.confusion(plan, readings["adapter"]),
        curves=measure.response_curves(plan, readings["adapter"]),
        against_curves=() if beside is None else measure.response_curves(plan, readings["against"]),
        blends=measure.blends(plan, readings["adapter"]),
        probes=probes,
        worst=tuple(measure.cases(plan, readings["adapter"])[:WORST_CASES]),
    )


def estimated(samples: Mapping[str, Mapping[str, Sample]], seed: int) -> dict[str, dict[str, Value]]:
    """Editor -> metric -> value with its interval."""
    return {
        who: {name: Value.of(estimate(sample, seed=seed)) for name, sample in found.items()}
        for who, found in samples.items()
    }


def compared(ours: Mapping[str, Sample], theirs: Mapping[str, Sample], seed: int) -> dict[str, Gap]:
    """Metric -> what the first is above the second on the same subjects, corrected for all these metrics."""
    names = [name for name in ours if name in theirs]
    found = [difference(ours[name], theirs[name], seed=seed) for name in names]
    corrected = holm([one.p for one in found])
    return {name: gap(one, p) for name, one, p in zip(names, found, corrected, strict=True)}


def gap(one: Difference, corrected: float) -> Gap:
    """The report's form of a difference, with its corrected p-value."""
    return Gap(
        value=one.value,
        low=one.low,
        high=one.high,
        p=one.p,
        p_holm=corrected,
        n=one.n,
        detectable=one.detectable,
    )
