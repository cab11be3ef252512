"""What an adapter says of the code and the machines that made it is true, whatever happens meanwhile."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fakes.trainings import changed, stop_at, train_tiny
from registry.attestation import training_predicate
from registry.manifest import CARD_NAME, AdapterCard, Provenance
from trainer import checkpoint, provenance
from trainer.errors import CheckpointError, Interrupted
from trainer.recipe import Recipe


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


def rewritten(source: Path) -> None:
    source.write_text(source.read_text() + "\n# another version\n")


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
    assert "checkpoints" in caught.value.mend
    source.write_text(content)
    provenance.running_code.cache_clear()
    assert train_tiny(*given).facts["resumed_from"] == 5
    assert made(out).code == began


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
