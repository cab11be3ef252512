"""`evaluate`: edits through the engine that production serves, judges, compares, decides, writes the report.

What an editor did and what the judges read from it is kept in the data folder by the digest of everything that
decided it, so that the version that production runs is measured once, and every candidate is compared with it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from registry.digest import Digest, digest_bytes
from registry.manifest import BaseModelRef, canonical_json
from registry.policy import Threshold
from registry.settings import home
from trainer.data.blobs import Blobs, encode_png
from trainer.errors import BaseModelError, EvaluationError, RecipeError
from trainer.evaluation import measure, pictures
from trainer.evaluation.editing import BLOBS_NAME, Edited, Editor, edit, editor
from trainer.evaluation.gates import judge, rows, thresholds
from trainer.evaluation.judges import Judges, judges_of
from trainer.evaluation.plan import Ask, Plan, Portrait, plan_of
from trainer.evaluation.reading import read
from trainer.evaluation.readings import Readings
from trainer.evaluation.report import Against, Digests, EvaluationReport, Gap, Value
from trainer.evaluation.statistics import Sample, difference, estimate, holm
from trainer.evaluation.suites import of_recipe
from trainer.export import code_version
from trainer.parts import Mapper, forget, here
from trainer.progress import Progress, silent
from trainer.recipe import Recipe
from trainer.sections import SuiteSection
from trainer.stage import StageResult, finished, new_folder, stage_key, write_result

REPORT_NAME = "evaluation.json"
WORST_CASES = 12
READINGS_NAME = "readings.parquet"
EDITS_NAME = "edits.json"
FOLDER = "evaluations"
"""Folder of the data folder with what editors did and what judges read."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What an editor did, and what the judges say of it.

    Attributes:
        editor: who edited.
        readings: of every picture.
        edited: which picture answers which request.
        blobs: the pictures.
    """

    editor: Editor
    readings: Readings
    edited: Edited
    blobs: Blobs

    def picture(self, index: int, ask: Ask) -> Portrait:
        """The answer to a request.

        Raises:
            KeyError: this editor was not asked for that.
            DataError: the picture is gone or damaged.
        """
        return self.blobs.pixels(self.edited[index, ask])


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Where editors are measured: a plan, its judges, a base, and the folder that keeps what was measured."""

    plan: Plan
    judges: Judges
    base: BaseModelRef
    base_path: Path
    place: Path
    mapper: Mapper = here
    progress: Progress = silent
    least: int = 256

    def measure(self, who: Editor) -> Measured:
        """Have an editor do what the plan asks for, and judges look at it; or find what they said before.

        Raises:
            EvaluationError: the judge labelled the editor's training data, or the editor lacks an expression.
            DataError, BaseModelError, ServingError, ApiError: as `trainer.evaluation.editing.edit` and the judges.
        """
        self.judges.require_independent(who.card)
        missing = sorted(set(self.plan.expressions) - set(who.card.conditioning.expressions))
        if missing:
            raise EvaluationError(
                f"{who.reference or who.folder} has no expression {', '.join(missing)}, which the other has",
                "compare adapters for the same expressions",
            )
        key = stage_key(
            "measure",
            editor=[str(who.weights), who.card.conditioning.model_dump(mode="json"), who.strength, who.scope],
            base=str(folder_digest(self.base_path)),
            plan=str(self.plan.digest()),
            judges=self.judges.digests,
            code=code_version(),
        )
        out = self.place / key.hex[:32]
        if not finished(out, key):
            self._do(who, out, key)
        told = json.loads((out / EDITS_NAME).read_text("utf-8"))
        edited = {
            (index, tuple((str(name), float(x)) for name, x in ask)): Digest(digest) for index, ask, digest in told
        }
        readings = Readings.read(out / READINGS_NAME, self.plan.judged)
        return Measured(editor=who, readings=readings, edited=edited, blobs=Blobs(out / BLOBS_NAME))

    def _do(self, who: Editor, out: Path, key: Digest) -> None:
        told = (out, key, self.mapper, self.progress, self.least)
        folder, edited = edit(self.plan, who, self.base, self.base_path, *told)
        readings = read(self.plan, self.judges, edited, Blobs(folder / BLOBS_NAME), self.progress)
        with new_folder(out) as new:
            readings.write(new / READINGS_NAME, self.plan.judged)
            rows = [[index, ask, str(digest)] for (index, ask), digest in edited.items()]
            (new / EDITS_NAME).write_text(json.dumps(rows), "utf-8")
            (folder / BLOBS_NAME).rename(new / BLOBS_NAME)
            digest = digest_bytes((new / READINGS_NAME).read_bytes())
            facts = {"pictures": len(edited), "editor": who.reference or str(who.folder)}
            write_result(new, StageResult(stage="measure", folder=out, key=key, digest=digest, facts=facts))
        forget(out, key)

    def truth(self) -> Readings | None:
        """What the judges say of the true answers, their own error; None where there are none."""
        plan = self.plan
        if plan.pictures.truth(0, ()) is None:
            return None
        key = stage_key("truth", plan=str(plan.digest()), judges=self.judges.digests, code=code_version())
        out = self.place / f"truth-{key.hex[:32]}"
        if not finished(out, key):
            with new_folder(out) as new:
                blobs, edited = Blobs(new / BLOBS_NAME), Edited()
                for index, subject in enumerate(plan.subjects):
                    for ask in subject.asks:
                        picture = plan.pictures.truth(index, ask)
                        assert picture is not None, "a suite knows all true answers or none"
                        edited[index, ask] = blobs.add(encode_png(picture), "image/png")
                read(plan, self.judges, edited, blobs, self.progress).write(new / READINGS_NAME, plan.judged)
                shutil.rmtree(new / BLOBS_NAME)
                digest = digest_bytes((new / READINGS_NAME).read_bytes())
                write_result(new, StageResult(stage="truth", folder=out, key=key, digest=digest))
        return Readings.read(out / READINGS_NAME, plan.judged)


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


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What an evaluation is asked for.

    Attributes:
        adapter: folder of the adapter to be judged.
        raw: folder of the same training's weights without EMA, for comparison.
        against: the adapter that production runs, or another to be compared with: its folder and reference.
        rules: metric -> the range that it must lie in.
        training_data: folder of the dataset that the adapter was trained on, for the probe of memorisation.
        subject: what the report calls the adapter.
    """

    adapter: Path
    raw: Path | None = None
    against: tuple[Path, str] | None = None
    rules: Mapping[str, Threshold] = field(default_factory=dict)
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
    training_data: Path | None = None,
    judges: Judges | None = None,
    mapper: Mapper = here,
    place: Path | None = None,
) -> EvaluationReport:
    """Judge an adapter by the suite and the thresholds of its recipe; see `evaluate`.

    Raises:
        RecipeError: a threshold on a metric that does not exist.
    """
    suite = of_recipe(recipe)
    try:
        rules = thresholds(recipe.evaluation.thresholds)
    except ValueError as error:
        raise RecipeError(f"evaluation.thresholds: {error}", "correct or remove that threshold") from None
    wanted = Wanted(
        adapter=adapter_dir, raw=raw_dir, against=against, rules=rules, training_data=training_data,
        subject=recipe.release.adapter,
    )  # fmt: skip
    data_folder = place or home()
    bench = Bench(
        plan=plan_of(suite, recipe.conditioning),
        judges=judges or judges_of(suite, data_folder),
        base=recipe.base,
        base_path=base_path,
        place=data_folder / FOLDER,
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
        RecipeError: the suite asks for something that cannot be done, or a rule is on what it does not measure.
        EvaluationError: the judge labelled the training data, or the adapters cannot be compared.
        DataError: an adapter folder is incomplete.
        BaseModelError: there is no base model.
        RegistryError: the scan blocks an adapter, or the licence check does.
        ServingError: an adapter does not fit the base.
    """
    editors = _editors(wanted)
    adapter, against = editors["adapter"], editors.get("against")
    digests = Digests(
        adapter=adapter.weights,
        raw=editors["raw"].weights if "raw" in editors else None,
        base=folder_digest(bench.base_path),
        judges=bench.judges.digests,
        suite=bench.plan.digest(),
    )
    code = code_version()
    key = stage_key(
        "evaluate",
        digests=digests.model_dump(mode="json"),
        against=None if against is None else [against.reference, str(against.weights)],
        rules={name: rule.model_dump(mode="json") for name, rule in wanted.rules.items()},
        code=code,
    )
    if finished(out, key):
        return EvaluationReport.model_validate_json((out / REPORT_NAME).read_bytes())
    measured = {name: bench.measure(one) for name, one in editors.items()}
    truth = bench.truth()
    report = build_report(bench, measured, truth, wanted, digests, code)
    with new_folder(out) as folder:
        data = report.model_dump_json(indent=1).encode()
        (folder / REPORT_NAME).write_bytes(data)
        pictures.write(folder, report, bench.plan, measured, subject=wanted.subject)
        facts = {"verdict": "passed" if report.verdict.passed else "refused", **report.scalars()}
        write_result(
            folder, StageResult(stage="evaluate", folder=out, key=key, digest=digest_bytes(data), facts=facts)
        )
    return report


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
    code: str,
) -> EvaluationReport:
    """Measure, compare and decide.

    Args:
        bench: where it was measured.
        measured: "adapter", "base", and where given "raw" and "against".
        truth: what the judges say of the true answers.
        wanted: has the rules.
        digests: what was judged, on what, by what.
        code: version of this code.

    Raises:
        RecipeError: a rule is on a metric that the suite does not measure.
    """
    plan, seed = bench.plan, bench.plan.suite.seed
    readings = {name: one.readings for name, one in measured.items()}
    if truth is not None:
        readings["renders"] = truth
    samples = measure.measure_all(plan, readings)
    values = {
        who: {name: Value.of(estimate(sample, seed=seed)) for name, sample in found.items()}
        for who, found in samples.items()
    }
    references: dict[str, dict[str, Value]] = {}
    for who in values.keys() - {"adapter"}:
        for name, value in values[who].items():
            references.setdefault(name, {})[who] = value
    cases = tuple(measure.cases(plan, readings["adapter"]))
    gaps = _gaps(samples["adapter"], samples["against"], seed) if "against" in samples else {}
    try:
        metrics = rows(values["adapter"], references, gaps, wanted.rules, cases)
    except ValueError as error:
        raise RecipeError(str(error), "correct or remove that threshold") from None
    beside = measured.get("against")
    return EvaluationReport(
        code_version=code,
        digests=digests,
        judges={"expression": bench.judges.expression.name, "identity": bench.judges.face},
        suite=plan.describe(),
        against=None
        if beside is None
        else Against(reference=beside.editor.reference or str(beside.editor.folder), weights=beside.editor.weights),
        metrics=metrics,
        verdict=judge(metrics),
        confusion=measure.confusion(plan, readings["adapter"]),
        curves=measure.response_curves(plan, readings["adapter"]),
        worst=cases[:WORST_CASES],
    )


def _gaps(ours: Mapping[str, Sample], theirs: Mapping[str, Sample], seed: int) -> dict[str, Gap]:
    names = [name for name in ours if name in theirs]
    found = [difference(ours[name], theirs[name], seed=seed) for name in names]
    corrected = holm([one.p for one in found])
    return {
        name: Gap(
            value=one.value, low=one.low, high=one.high, p=one.p, p_holm=p, n=one.n, detectable=one.detectable
        )
        for name, one, p in zip(names, found, corrected, strict=True)
    }
