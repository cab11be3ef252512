"""The whole evaluation on an untrained base: real admission, engine, judges and files."""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from fakes.adapters import card, container, factors, folder, rescaled
from registry.digest import digest_bytes
from registry.errors import RegistryError
from registry.families import KNOWN_BASES
from registry.manifest import WEIGHTS_NAME, BaseModelRef
from registry.policy import Threshold
from serving.errors import AdapterMismatch, WrongBase
from trainer.errors import BaseModelError, DataError, EvaluationError
from trainer.evaluation import Bench, EvaluationReport, Wanted, evaluate
from trainer.evaluation.bench import EDITS_NAME, READINGS_NAME, folder_digest
from trainer.evaluation.comparison import Comparison, compare, everything
from trainer.evaluation.editing import BLOBS_NAME, candidate, edit_part, editor
from trainer.evaluation.judges import Judges, judges_of
from trainer.evaluation.plan import plan_of
from trainer.parts import Part, PartFunction, here
from trainer.portraits.base import BASE_ID, build
from trainer.sections import SuiteSection
from trainer.stage import STAGE_NAME

pytestmark = [pytest.mark.integration]

BASE = KNOWN_BASES[BASE_ID]
REF = BaseModelRef(id=BASE.id, revision=BASE.revision, family=BASE.family, license=BASE.license)
ASKED = ("fear", "happy", "surprised")
SUITE = {
    "name": "tiny",
    "identities": {"human": 2, "anime": 1},
    "first_identity": 900,
    "intensities": (0.0, 0.5, 1.0),
    "sweep_people": 2,
    "blend_people": 1,
    "steps": 1,
    "judge": {"scorer": "judge"},
}
PICTURES = (1 + 6 + 3) + (1 + 6) + (1 + 3)
"""The first: neutral, a sweep, blends; then one without a sweep, and one without blends."""


def write_adapter(path: Path, seed: int, expressions: Sequence[str] = ASKED, **changes: object) -> Path:
    values = card(BASE)
    values["conditioning"]["expressions"] = list(expressions)
    values |= changes
    path.mkdir(parents=True)
    for name, data in folder(container(factors(BASE, seed=seed)), values).items():
        (path / name).write_bytes(data)
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("base") / "portraits")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("adapters")
    for name, seed in (("ema", 1), ("raw", 2), ("prod", 3)):
        write_adapter(place / name, seed)
    return place


@pytest.fixture
def bench(base: Path, adapters: Path, tmp_path: Path) -> Bench:
    return bench_of(base, adapters, tmp_path / "measured")


def bench_of(base: Path, adapters: Path, place: Path) -> Bench:
    suite = SuiteSection.model_validate(SUITE)
    spec = candidate(adapters / "ema")[0].card.conditioning
    judges = judges_of(suite, place)
    return Bench(plan=plan_of(suite, spec), judges=judges, base=REF, base_path=base, place=place, least=8)


Evaluated = tuple[Path, EvaluationReport, list[tuple[int, int, str]], Bench]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory, base: Path, adapters: Path) -> Evaluated:
    """One evaluation: its folder, its report, the progress that it told, and its bench."""
    place = tmp_path_factory.mktemp("evaluation")
    steps: list[tuple[int, int, str]] = []
    bench = replace(
        bench_of(base, adapters, place / "measured"),
        progress=lambda stage, done, total, note="": steps.append((done, total, stage)),
    )
    report = evaluate(bench, wanted(adapters), place / "out")
    return place, report, steps, bench


def wanted(adapters: Path) -> Wanted:
    return Wanted(
        adapter=adapters / "ema",
        raw=adapters / "raw",
        against=(adapters / "prod", "tiny@prod"),
        rules={"top1_accuracy": Threshold(min=0.99), "paired_psnr": Threshold(min=40)},
        subject="tiny",
    )


class Stopped(BaseException):
    """As if the process were killed here."""


class Counting:
    """Does parts here and counts them; raises before the one whose number is `last`."""

    def __init__(self, last: int = 10**9) -> None:
        self.done, self.last = 0, last

    def __call__(self, stage: str, function: PartFunction, parts: Sequence[Part]) -> Iterator[None]:
        for part in parts:
            if self.done == self.last:
                raise Stopped
            yield from here(stage, function, [pickle.loads(pickle.dumps(dict(part)))])
            self.done += 1


# -- the report --


def test_every_file_is_there_and_says_the_same(evaluated: Evaluated) -> None:
    place, report, _, _ = evaluated
    out = place / "out"
    names = {path.name for path in out.iterdir()}
    assert {"evaluation.json", "report.html", "contact_sheet.png", STAGE_NAME} <= names
    assert EvaluationReport.model_validate_json((out / "evaluation.json").read_bytes()) == report
    assert json.loads((out / STAGE_NAME).read_text())["facts"]["verdict"] == "refused"
    assert Image.open(out / "contact_sheet.png").width > 4 * 64


def test_the_report_names_what_was_judged(evaluated: Evaluated, adapters: Path) -> None:
    _, report, _, bench = evaluated
    digests = [digest_bytes((adapters / name / WEIGHTS_NAME).read_bytes()) for name in ("ema", "raw", "prod")]
    assert [report.digests.adapter, report.digests.raw] == digests[:2]
    assert report.against is not None
    assert (report.against.reference, report.against.weights) == ("tiny@prod", digests[2])
    assert report.digests.base == folder_digest(bench.base_path)
    assert report.suite.expressions == ASKED
    assert report.suite.confusing_pairs == (("fear", "surprised"),)
    assert report.suite.subjects == ("human 900", "anime 902", "human 901")
    assert report.suite.pictures == PICTURES
    assert set(report.metric("top1_accuracy").references) == {"raw", "base", "against", "renders"}
    assert {probe.name for probe in report.probes} >= {"memorisation", "strength_zero"}


def test_an_adapter_that_learned_nothing_is_refused_with_reasons_and_examples(evaluated: Evaluated) -> None:
    _, report, _, _ = evaluated
    assert {"top1_accuracy", "paired_psnr"} <= set(report.verdict.failed)
    assert report.metric("top1_accuracy").examples
    assert any(reason.startswith("top1_accuracy is ") for reason in report.verdict.reasons)


def test_adapter_base_and_raw_are_really_different_edits(evaluated: Evaluated) -> None:
    psnr = evaluated[1].metric("paired_psnr")
    values = {name: value.value for name, value in psnr.references.items()}
    assert len({psnr.value.value, values["raw"], values["base"], values["against"]}) == 4
    assert psnr.difference is not None
    assert psnr.difference.value == pytest.approx(psnr.value.value - values["against"])


def test_one_measure_of_progress_counts_everything(evaluated: Evaluated) -> None:
    steps = evaluated[2]
    assert len({(total, stage) for _, total, stage in steps}) == 1
    assert [done for done, _, _ in steps] == sorted(done for done, _, _ in steps)
    assert steps[-1][0] == steps[-1][1]
    assert sum(done == total for done, total, _ in steps) == 1, "the end is told once"


def test_the_report_is_the_same_whoever_edits(evaluated: Evaluated, adapters: Path) -> None:
    place, report, _, bench = evaluated

    def backwards(stage: str, function: PartFunction, parts: Sequence[Part]) -> Iterator[None]:
        for part in reversed(parts):
            function(**pickle.loads(pickle.dumps(dict(part))))
            yield

    other = replace(bench, place=place / "other", mapper=backwards, least=1)
    assert evaluate(other, wanted(adapters), place / "again") == report
    one, again = ((place / name / "evaluation.json").read_bytes() for name in ("out", "again"))
    assert one == again
    assert not list(other.place.glob(".*.parts")), "the parts are gone"


def test_the_same_evaluation_again_is_reused(evaluated: Evaluated, adapters: Path) -> None:
    place, report, _, bench = evaluated
    said: list[str] = []
    before = (place / "out" / "evaluation.json").stat().st_mtime_ns
    still = replace(bench, mapper=Counting(0), say=said.append)
    assert evaluate(still, wanted(adapters), place / "out") == report
    assert (place / "out" / "evaluation.json").stat().st_mtime_ns == before
    assert said == [f"this very evaluation was made before: {place / 'out'}"]


# -- what was measured is kept --


def test_an_editor_is_measured_once(bench: Bench, adapters: Path) -> None:
    counting, said = Counting(), list[str]()
    bench = replace(bench, mapper=counting, say=said.append)
    first = bench.measure(editor("adapter", adapters / "prod"))
    done = counting.done
    again = bench.measure(editor("against", adapters / "prod", reference="tiny@prod"))
    assert counting.done == done > 1
    assert again.edited == first.edited
    assert len(again.edited) == PICTURES
    assert said == ["against: tiny@prod was measured before"]


def test_the_base_alone_is_measured_once_for_all_candidates(bench: Bench, adapters: Path) -> None:
    counting = Counting()
    bench = replace(bench, mapper=counting)
    first = bench.measure(editor("base", adapters / "ema", strength=0.0, scope="full strength"))
    done = counting.done
    again = bench.measure(editor("base", adapters / "prod", strength=0.0, scope="full strength"))
    assert counting.done == done
    assert again.edited == first.edited


def test_a_stopped_measurement_goes_on_where_it_was(bench: Bench, adapters: Path) -> None:
    who = editor("adapter", adapters / "ema")
    whole = Counting()
    expected = replace(bench, place=bench.place.with_name("whole"), mapper=whole).measure(who)
    with pytest.raises(Stopped):
        replace(bench, mapper=Counting(1)).measure(who)
    rest = Counting()
    assert replace(bench, mapper=rest).measure(who).edited == expected.edited
    assert rest.done == whole.done - 1


def test_edits_are_not_made_again_when_the_judge_was_stopped(bench: Bench, adapters: Path) -> None:
    class Tired:
        """Says nothing any more."""

        name, expressions, ingredient = (
            bench.judges.expression.name,
            bench.judges.expression.expressions,
            bench.judges.expression.ingredient,
        )

        def __call__(self, pictures: Sequence[object]) -> list[object]:
            raise Stopped

    who = editor("adapter", adapters / "ema")
    tired = Judges(expression=Tired(), face=bench.judges.face)  # type: ignore[arg-type]
    with pytest.raises(Stopped):
        replace(bench, judges=tired).measure(who)
    counting = Counting()
    assert len(replace(bench, mapper=counting).measure(who).edited) == PICTURES
    assert counting.done == 0


def test_parts_of_another_size_are_other_parts(bench: Bench, adapters: Path) -> None:
    who = editor("adapter", adapters / "ema")
    with pytest.raises(Stopped):
        replace(bench, mapper=Counting(1)).measure(who)
    assert len(replace(bench, least=1000).measure(who).edited) == PICTURES


def damaged_picture(out: Path) -> None:
    victim = next((out / BLOBS_NAME).rglob("*.png"))
    victim.chmod(0o600)
    victim.write_bytes(victim.read_bytes()[:-1] + b"\0")


@pytest.mark.parametrize(
    "damage",
    [
        damaged_picture,
        lambda out: next((out / BLOBS_NAME).rglob("*.png")).unlink(),
        lambda out: (out / EDITS_NAME).write_text("{}"),
        lambda out: (out / EDITS_NAME).unlink(),
        lambda out: (out / READINGS_NAME).write_bytes(b"PAR1"),
        lambda out: (out / STAGE_NAME).unlink(),
    ],
    ids=["picture", "no picture", "edits", "no edits", "readings", "no stage"],
)
def test_what_was_kept_and_is_damaged_is_measured_again(
    damage: Callable[[Path], object], bench: Bench, adapters: Path
) -> None:
    who = editor("base", adapters / "ema", strength=0.0, scope="full strength")
    first = bench.measure(who)
    (out,) = (path for path in bench.place.iterdir() if path.is_dir())
    damage(out)
    counting = Counting()
    again = replace(bench, mapper=counting).measure(who)
    assert counting.done > 0
    assert again.edited == first.edited
    assert (again.readings.judged == first.readings.judged).all()


def test_readings_that_somebody_changed_are_not_believed(bench: Bench, adapters: Path) -> None:
    """They can be read, so only their digest tells."""
    who = editor("base", adapters / "ema", strength=0.0, scope="full strength")
    first = bench.measure(who)
    (out,) = (path for path in bench.place.iterdir() if path.is_dir())
    better = replace(first.readings, judged=first.readings.judged * 0 + 1)
    better.write(out / READINGS_NAME, bench.plan.judged)
    assert (bench.measure(who).readings.judged == first.readings.judged).all()


def test_two_at_once_measure_one_editor_once(bench: Bench, adapters: Path) -> None:
    counting, said, found = Counting(), list[str](), list[object]()
    waits = threading.Event()

    def say(text: str) -> None:
        said.append(text)
        if "waiting" in text:
            waits.set()

    def mapper(stage: str, function: PartFunction, parts: Sequence[Part]) -> Iterator[None]:
        """Whoever comes first does not end before the other one is there."""
        waits.wait(120)
        yield from counting(stage, function, parts)

    bench = replace(bench, mapper=mapper, say=say)

    def measure() -> None:
        found.append(bench.measure(editor("adapter", adapters / "ema")).edited)

    threads = [threading.Thread(target=measure) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    assert found[0] == found[1]
    alone = Counting()
    replace(bench, place=bench.place.with_name("alone"), mapper=alone).measure(editor("", adapters / "ema"))
    assert counting.done == alone.done, "no part was done twice"
    assert any("waiting" in text for text in said)


KILLED = """
import sys, time
from pathlib import Path
sys.path[:0] = [{tests!r}]
from test_evaluation import bench_of
from trainer.evaluation.editing import editor
from trainer.parts import here
from dataclasses import replace

def slowly(stage, function, parts):
    for part in parts:
        yield from here(stage, function, [part])
        print("part", flush=True)
        time.sleep(600)  # until it is killed

base, adapters, place = map(Path, sys.argv[1:])
found = replace(bench_of(base, adapters, place), mapper=slowly).measure(editor("adapter", adapters / "ema"))
print("measured", len(found.edited), flush=True)
"""


def test_a_killed_process_leaves_no_lock_and_its_parts(base: Path, adapters: Path, bench: Bench) -> None:
    """SIGKILL between two parts: the next process does not wait, and does the rest only."""
    here_is = Path(__file__).parent
    program = KILLED.format(tests=str(here_is))
    words = [sys.executable, "-c", program, str(base), str(adapters), str(bench.place)]
    paths = os.pathsep.join([str(here_is), str(here_is.parent), str(here_is.parent.parent)])
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": paths}
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "part\n"
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=120)
    counting = Counting()
    found = replace(bench, mapper=counting).measure(editor("adapter", adapters / "ema"))
    assert len(found.edited) == PICTURES
    assert counting.done == 1, "of two parts"


def test_adapters_are_swapped_exactly_and_memory_stays(bench: Bench, adapters: Path) -> None:
    """Back from another adapter every edit is the same to the last bit, and nothing piles up."""
    first = bench.measure(editor("adapter", adapters / "ema")).edited
    peaks = []
    for turn in range(3):
        for name in ("prod", "raw", "ema"):
            other = replace(bench, place=bench.place.with_name(f"turn-{turn}"))
            found = other.measure(editor("adapter", adapters / name)).edited
            assert (found == first) == (name == "ema")
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert peaks[-1] - peaks[0] < 40_000, "KiB"


# -- who is not evaluated --


def test_a_part_refuses_an_adapter_that_was_changed(bench: Bench, adapters: Path, tmp_path: Path) -> None:
    who = editor("adapter", adapters / "ema")
    with pytest.raises(DataError, match="not the one"):
        edit_part(
            tmp_path,
            suite=bench.plan.suite.model_dump(mode="json"),
            conditioning=who.card.conditioning.model_dump(mode="json"),
            adapter=str(adapters / "raw"),
            weights=str(who.weights),
            strength=1.0,
            scope="all",
            base=REF.model_dump(mode="json"),
            base_path=str(bench.base_path),
            people=[0],
        )


def test_an_adapter_that_fails_the_scan_is_never_edited_with(bench: Bench, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", seed=1)
    weights = adapter / WEIGHTS_NAME
    weights.write_bytes(weights.read_bytes() + b"\0")
    with pytest.raises(RegistryError):
        evaluate(replace(bench, mapper=Counting(0)), Wanted(adapter=adapter), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_somebody_has_to_review_can_be_evaluated(bench: Bench, tmp_path: Path) -> None:
    """The scan cannot bound DoRA; what it does to pictures is in the report that the reviewer reads."""
    adapter = write_adapter(tmp_path / "adapter", seed=1)
    (adapter / WEIGHTS_NAME).write_bytes(container(rescaled(factors(BASE, seed=1))))
    report = evaluate(bench, Wanted(adapter=adapter), tmp_path / "out")
    assert (tmp_path / "out" / "evaluation.json").exists()
    assert report.digests.adapter == digest_bytes((adapter / WEIGHTS_NAME).read_bytes())


def test_an_adapter_of_another_shape_is_refused_and_leaves_nothing(
    bench: Bench, adapters: Path, tmp_path: Path
) -> None:
    other = replace(bench, base_path=build(tmp_path / "narrow", width=64))
    with pytest.raises(AdapterMismatch):
        evaluate(other, Wanted(adapter=adapters / "ema"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_for_another_base_is_explained(bench: Bench, adapters: Path, tmp_path: Path) -> None:
    other = BASE.revision + "-other"
    values = {"base": {**card(BASE)["base"], "revision": other}}
    adapter = write_adapter(tmp_path / "adapter", 1, **values)
    with pytest.raises((WrongBase, RegistryError)) as caught:
        evaluate(bench, Wanted(adapter=adapter), tmp_path / "out")
    assert other in str(caught.value)


def test_adapters_for_other_expressions_are_not_compared(
    bench: Bench, adapters: Path, tmp_path: Path
) -> None:
    other = write_adapter(tmp_path / "other", 1, expressions=("fear", "happy"))
    asked = Wanted(adapter=adapters / "ema", against=(other, "other@prod"))
    with pytest.raises(EvaluationError, match=r"other@prod has no expression surprised"):
        evaluate(bench, asked, tmp_path / "out")


def test_the_judge_that_scored_the_training_data_does_not_judge(bench: Bench, tmp_path: Path) -> None:
    own = bench.judges.expression.ingredient
    assert own is not None
    values = card(BASE)
    ingredients = [*values["ingredients"], json.loads(own.model_dump_json(exclude_none=True))]
    adapter = write_adapter(tmp_path / "adapter", 1, ingredients=ingredients)
    with pytest.raises(EvaluationError, match="cannot judge"):
        evaluate(replace(bench, mapper=Counting(0)), Wanted(adapter=adapter), tmp_path / "out")


def test_a_missing_base_is_explained(bench: Bench, adapters: Path, tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=r"model_index\.json is missing"):
        evaluate(replace(bench, base_path=tmp_path), Wanted(adapter=adapters / "ema"), tmp_path / "out")


# -- several --


def test_a_comparison_tells_everything_of_each(bench: Bench, adapters: Path, tmp_path: Path) -> None:
    bare = editor("base", adapters / "ema", strength=0.0, reference="base")
    others = [editor(name, adapters / name) for name in ("raw", "ema")]
    editors = everything([bare, *others], ["base", "raw", "EMA"])
    found = compare(bench, editors, tmp_path / "out")
    assert Comparison.model_validate_json((tmp_path / "out" / "comparison.json").read_bytes()) == found
    assert [one.weights is None for one in found.adapters] == [True, False, False]
    assert set(found.curves) == {"base", "raw", "EMA"}
    row = next(row for row in found.metrics if row.name == "top1_accuracy")
    assert set(row.values) == {"base", "raw", "EMA", "true answers"}
    assert [(pair.first, pair.second) for pair in row.pairs] == [
        ("base", "raw"), ("base", "EMA"), ("raw", "EMA")
    ]  # fmt: skip
    page = (tmp_path / "out" / "comparison.html").read_text("utf-8")
    assert page.count("<img") >= 3 * 3 * len(ASKED)
    assert "<script" not in page
    counting = Counting(0)
    assert compare(replace(bench, mapper=counting), editors, tmp_path / "out") == found
