"""What an adapter says of the code and the machines that made it is true, whatever happens meanwhile."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grimp
import pytest
import torch

from fakes.trainings import changed, stop_at, train_tiny
from registry.attestation import training_predicate
from registry.manifest import CARD_NAME, AdapterCard, Provenance
from trainer import checkpoint, provenance
from trainer.errors import CheckpointError, Interrupted
from trainer.recipe import Recipe

SOURCES = Path(provenance.__file__).parent.parent
#: Reports, advice, services, upkeep: one file each of what has no part in the making.
NO_PART = (
    *("serving/http/app.py", "serving/plan/needs.py", "serving/ray_app.py", "serving/metrics.py"),
    *("serving/tracing.py", "serving/logs.py", "serving/serve_command.py", "serving/keys_command.py"),
    *(
        "registry/commands/upkeep.py",
        "registry/rescanning.py",
        "registry/telling.py",
        "registry/promotion.py",
    ),
    *("registry/mirror.py", "registry/backup.py", "registry/restoring.py", "registry/publishing.py"),
    *("registry/signing/keys.py", "registry/storage/s3.py", "registry/scanning/page.py"),
    *("trainer/doctor/command.py", "trainer/plan/memory.py", "trainer/tracking.py", "trainer/outbox.py"),
    *(
        "trainer/data/inspection_page.py",
        "trainer/evaluation/page.py",
        "trainer/zoo/plan.py",
        "trainer/cli.py",
    ),
)
#: What turns pictures into datasets, scores, losses and weights, and what verifies an input.
PART = (
    *("trainer/loop.py", "trainer/losses.py", "trainer/lora.py", "trainer/checkpoint.py"),
    *("trainer/provenance.py", "trainer/export.py", "trainer/data/triplets.py", "trainer/data/folder.py"),
    *("trainer/data/command.py", "trainer/scoring/vlm.py", "trainer/scoring/review.py"),
    *("trainer/synthesis/people.py", "trainer/portraits/renderer.py", "trainer/portraits/judges.py"),
    *("serving/conditioning.py", "serving/bases.py", "serving/pipelines/flux.py", "serving/engine.py"),
    *("registry/digest.py", "registry/manifest.py", "registry/families/facts.py", "registry/admission.py"),
    *("registry/pulling.py", "registry/gates.py", "registry/belief.py", "registry/licenses.py"),
)


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of sources that are digested: copies of some of each kind, which may be changed."""
    for name in (*NO_PART, *PART):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(SOURCES / name, tmp_path / name)
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "trainer" / "provenance.py"))
    return tmp_path


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A source file of the code that is digested: a copy of some, which may be changed."""
    here = Path(provenance.__file__)
    for name in ("loop.py", "lora.py", "provenance.py"):
        (tmp_path / "trainer").mkdir(exist_ok=True)
        shutil.copy(here.with_name(name), tmp_path / "trainer")
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "trainer" / here.name))
    provenance.running_code.cache_clear()
    yield tmp_path / "trainer" / "loop.py"
    provenance.running_code.cache_clear()


def made(out: Path) -> Provenance:
    found = AdapterCard.parse((out / "adapter" / CARD_NAME).read_bytes()).training.provenance
    assert found is not None
    return found


def signed(out: Path) -> dict[str, Any]:
    """What the publisher's statement would say of how it was made."""
    card = AdapterCard.parse((out / "adapter" / CARD_NAME).read_bytes())
    told = training_predicate(card, builder="https://example.org")
    return told["buildDefinition"]["internalParameters"]


def file_of(module: str) -> str:
    path = SOURCES / module.replace(".", "/")
    return (
        (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).relative_to(SOURCES).as_posix()
    )


def rewritten(source: Path) -> None:
    source.write_text(source.read_text() + "\n# another version\n")


@pytest.mark.parametrize("name", NO_PART)
def test_what_has_no_part_in_the_making_does_not_count(tree: Path, name: str) -> None:
    began = provenance.code_digest(provenance.NOT_MAKING)
    rewritten(tree / name)
    assert provenance.code_digest(provenance.NOT_MAKING) == began


@pytest.mark.parametrize("name", PART)
def test_what_has_a_part_in_the_making_counts(tree: Path, name: str) -> None:
    began = provenance.code_digest(provenance.NOT_MAKING)
    rewritten(tree / name)
    assert provenance.code_digest(provenance.NOT_MAKING) != began


def test_everything_that_does_not_count_is_there() -> None:
    """A module that was renamed would count again, and nobody would notice."""
    for beginning in provenance.NOT_MAKING:
        assert list(SOURCES.glob(f"{beginning}*")), beginning


def test_nothing_that_the_making_imports_is_left_out() -> None:
    """But for what looks at a training, or stands behind an import whose other half the making needs."""
    looks_on = ("trainer/tracking.py", "trainer/outbox.py", "trainer/evaluation/")
    behind_admission = ("registry/signing/", "registry/storage/", "registry/scanning/")
    graph = grimp.build_graph("registry", "serving", "trainer", cache_dir=None)
    begin = ["trainer.launch", "trainer.data.share", "trainer.data", "trainer.scoring", "trainer.synthesis"]
    # These are imported by name, where a recipe or a base model asks for one.
    begin += [one for one in graph.modules if one.startswith(("serving.pipelines", "trainer.portraits"))]
    reached = {*begin}.union(*(graph.find_upstream_modules(one) for one in begin))
    files = {file_of(one) for one in reached}
    assert "trainer/loop.py" in files, "which only a function of the launcher imports"
    aside = (*looks_on, *behind_admission)
    left_out = [one for one in files if one.startswith(provenance.NOT_MAKING) and not one.startswith(aside)]
    assert left_out == []


def test_an_upgrade_while_it_trains_is_not_what_made_it(
    source: Path, tiny_recipe: Recipe, tiny_run: Path, tiny_base: Path, tiny_pipeline: Any, tmp_path: Path
) -> None:
    began = provenance.code_digest(provenance.NOT_MAKING)

    def upgrade(stage: str, done: int, total: int, note: str = "") -> None:
        if done == 3:
            rewritten(source)

    recipe, out = changed(tiny_recipe, "running", log_every=1), tmp_path / "train"
    train_tiny(recipe, tiny_run, tiny_base, tiny_pipeline, out, upgrade)
    assert provenance.code_digest(provenance.NOT_MAKING) != began
    assert made(out).code == began
    assert signed(out)["codeDigest"] == began
    assert "earlierMachines" not in signed(out)
    assert "earlier_machines" not in (out / "adapter" / CARD_NAME).read_text()


def test_other_sources_do_not_go_on_with_a_checkpoint(
    source: Path, tiny_recipe: Recipe, tiny_run: Path, tiny_base: Path, tiny_pipeline: Any, tmp_path: Path
) -> None:
    recipe, out = changed(tiny_recipe, "running", log_every=1), tmp_path / "train"
    given, content = (recipe, tiny_run, tiny_base, tiny_pipeline, out), source.read_text()
    began = provenance.code_digest(provenance.NOT_MAKING)
    with pytest.raises(Interrupted):
        train_tiny(*given, stop_at(4))
    rewritten(source)
    provenance.running_code.cache_clear()  # as a new process has it
    with pytest.raises(CheckpointError, match="not those that began") as caught:
        train_tiny(*given)
    assert began in caught.value.message
    assert str(out / "checkpoints") in caught.value.mend
    source.write_text(content)
    provenance.running_code.cache_clear()
    assert train_tiny(*given).facts["resumed_from"] == 5
    assert made(out).code == began


def test_a_checkpoint_of_a_version_that_recorded_no_sources_is_refused(
    tiny_recipe: Recipe, tiny_run: Path, tiny_base: Path, tiny_pipeline: Any, tmp_path: Path
) -> None:
    recipe, out = changed(tiny_recipe, "running", log_every=1), tmp_path / "train"
    given, folder = (recipe, tiny_run, tiny_base, tiny_pipeline, out), out / "checkpoints"
    with pytest.raises(Interrupted):
        train_tiny(*given, stop_at(4))
    newest = max(folder.glob("step-*"))
    key = json.loads((newest / "state.json").read_text())["state"]["key"]
    last = checkpoint.latest(folder, key)
    assert last is not None
    earlier = {name: value for name, value in last.numbers.items() if name != "made"}
    checkpoint.save(folder, replace(last, numbers=earlier))
    with pytest.raises(CheckpointError, match="did not record its sources") as caught:
        train_tiny(*given)
    assert f"remove {folder}" in caught.value.mend


def test_every_machine_that_made_a_step_is_named(
    tiny_recipe: Recipe, tiny_run: Path, tiny_base: Path, tiny_pipeline: Any, tmp_path: Path
) -> None:
    recipe, out = changed(tiny_recipe, "running", log_every=1), tmp_path / "train"
    given, threads = (recipe, tiny_run, tiny_base, tiny_pipeline, out), torch.get_num_threads()
    try:
        for step, many in ((3, threads), (6, threads + 1)):
            torch.set_num_threads(many)
            with pytest.raises(Interrupted):
                train_tiny(*given, stop_at(step))
        result = train_tiny(*given)
    finally:
        torch.set_num_threads(threads)
    found = made(out)
    assert found.machine.threads == threads + 1
    assert [machine.threads for machine in found.earlier_machines] == [threads]
    assert [machine["threads"] for machine in signed(out)["earlierMachines"]] == [threads]
    last = checkpoint.latest(out / "checkpoints", result.key)
    assert last is not None
    assert last.numbers["made"] == provenance.kept(found)
