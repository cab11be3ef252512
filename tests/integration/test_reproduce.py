"""A released adapter is made again from its signed recipe: bit for bit, and a changed one is found out."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load, save

from fakes.pipelines import command, small_recipe
from flows.server import attached, managed_server
from registry.client import Registry
from registry.digest import digest_bytes
from registry.manifest import CARD_NAME, WEIGHTS_NAME, AdapterCard
from registry.storage import shelf

pytestmark = pytest.mark.slow
FACTOR = 1.5


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reproduce")


def train(data_folder: Path, recipe: Path) -> dict[str, Any]:
    """Run the flow that trains the small recipe, and return its summary."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADAPTER_FOUNDRY_HOME", str(data_folder))
        with (
            managed_server(data_folder) as server,
            attached(data_folder, server.url),
        ):
            from flows import limits
            from flows.job import training
            from flows.parameters import RecipeChoice

            limits.ensure()
            return training(RecipeChoice(recipe=str(recipe), changes={"optimiser.steps": 3}))


@pytest.fixture(scope="module")
def released(data_folder: Path, repository: Path) -> Path:
    """The folder of an adapter that a flow trained, and that is pixelsmile:1 of the registry."""
    made = train(data_folder, small_recipe(repository, data_folder / "small.yaml"))
    adapter = Path(made["folder"]) / "adapter"
    Registry.init(data_folder).push(adapter, "pixelsmile")
    return adapter


@pytest.fixture(scope="module")
def again(data_folder: Path, released: Path) -> dict[str, Any]:
    """The summary of the first reproduction."""
    done = command(data_folder, "-m", "flows.reproduce", "pixelsmile:1", "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_what_was_released_comes_out_again_bit_for_bit(
    data_folder: Path, released: Path, again: dict[str, Any]
) -> None:
    assert not any(stage["reused"] for stage in again["stages"])
    found = again["reproduction"]
    assert (found["outcome"], found["notes"]) == ("identical", [])
    weights = digest_bytes((released / WEIGHTS_NAME).read_bytes())
    assert found["weights"] == found["rebuilt"] == {"sha256": weights.hex}
    trained = next(Path(stage["folder"]) for stage in again["stages"] if stage["stage"] == "train")
    assert "reproductions" in trained.parts
    assert (trained / "adapter" / WEIGHTS_NAME).read_bytes() == (released / WEIGHTS_NAME).read_bytes()
    (statement,) = [
        view for view in Registry.open(data_folder).show("pixelsmile:1").statements
        if view.kind == "reproduction"
    ]  # fmt: skip
    assert statement.signed
    assert statement.predicate == found


def test_two_that_are_started_at_once_do_all_of_it_one_after_the_other(
    data_folder: Path, again: dict[str, Any]
) -> None:
    words = (data_folder, "-m", "flows.reproduce", "pixelsmile:1", "--no-sign", "--json")
    with ThreadPoolExecutor(2) as pool:
        both = [one.result() for one in [pool.submit(command, *words) for _ in range(2)]]
    for done in both:
        assert done.returncode == 0, done.stderr
        made = json.loads(done.stdout)
        assert not any(stage["reused"] for stage in made["stages"])
        assert made["reproduction"]["outcome"] == "identical"


def test_an_adapter_that_its_recipe_does_not_make_is_found_out(
    data_folder: Path, released: Path, again: dict[str, Any], tmp_path: Path
) -> None:
    """Somebody with the publisher's key pushed other weights under the honest recipe."""
    other = tmp_path / "other"
    shutil.copytree(released, other)
    data = (other / WEIGHTS_NAME).read_bytes()
    tags = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    tensors = {
        name: (value.float() * FACTOR).to(value.dtype) if "lora_B" in name else value
        for name, value in load(data).items()
    }
    (other / WEIGHTS_NAME).write_bytes(save(tensors, metadata=tags))
    registry = Registry.open(data_folder)
    digest = registry.push(other, "pixelsmile").digest
    # As a reproduction that was killed before it compared: the training need not be done a third time.
    (first,) = (data_folder / "reproductions").glob("pixelsmile-1-*")
    copy = data_folder / "reproductions" / f"pixelsmile-2-{digest.hex[:12]}"
    shutil.copytree(first, copy, ignore=shutil.ignore_patterns("outcome.json", "complete"))
    # Nor does it have to be done again because the outcome could not be signed.
    room = shelf.MAX_STATEMENTS - len(shelf.read_statements(registry.store, digest))
    full = [shelf.put_statement(registry.store, digest, "evaluation", b"%d" % i)[0] for i in range(room)]
    unsigned = command(data_folder, "-m", "flows.reproduce", "pixelsmile:2")
    assert "with one more nobody could pull it" in unsigned.stderr
    assert (copy / "outcome.json").exists()
    for key in full:
        registry.store.delete(key)
    done = command(data_folder, "-m", "flows.reproduce", "pixelsmile:2", "--json")
    assert done.returncode == 14, done.stderr
    summary = json.loads(done.stdout)
    stages = {stage["stage"]: stage for stage in summary["stages"]}
    for name in ("triplets", "train", "evaluate"):
        assert stages[name]["reused"], name
        assert Path(stages[name]["folder"]).parent == copy
    found = summary["reproduction"]
    assert found["outcome"] == "different"
    assert found["difference"]["relative"] == pytest.approx(1 - 1 / FACTOR, rel=0.02)
    assert found["difference"]["cosine"] == pytest.approx(1.0, abs=1e-3)
    views = registry.show("pixelsmile:2").statements
    assert [view.predicate["outcome"] for view in views if view.kind == "reproduction"] == ["different"]


def test_nothing_is_rebuilt_that_could_not_be_signed(data_folder: Path, again: dict[str, Any]) -> None:
    trained = next(Path(stage["folder"]) for stage in again["stages"] if stage["stage"] == "train")
    key = Registry.open(data_folder).keys.file("evaluator")
    away = key.rename(key.with_suffix(".away"))
    try:
        done = command(data_folder, "-m", "flows.reproduce", "pixelsmile:1")
    finally:
        away.rename(key)
    assert done.returncode == 11, done.stderr
    assert trained.is_dir()


def test_nothing_is_rebuilt_without_a_recorded_recipe(
    data_folder: Path, released: Path, tmp_path: Path
) -> None:
    old = tmp_path / "old"
    shutil.copytree(released, old)
    card = json.loads((old / CARD_NAME).read_bytes())
    del card["training"]["provenance"]
    (old / CARD_NAME).write_bytes(AdapterCard.parse(json.dumps(card).encode()).canonical_bytes())
    Registry.open(data_folder).push(old, "older")
    done = command(data_folder, "-m", "flows.reproduce", "older:1")
    assert done.returncode == 1
    assert "no signed recipe" in done.stderr


def test_the_pipeline_does_not_take_what_a_reproduction_made(
    data_folder: Path, again: dict[str, Any]
) -> None:
    shutil.rmtree(data_folder / "reproductions")
    made = train(data_folder, data_folder / "small.yaml")
    for stage in made["stages"]:
        assert stage["reused"]
        assert Path(stage["folder"]).is_relative_to(data_folder / "runs")
        assert Path(stage["folder"]).is_dir()


def test_a_dataset_that_was_not_there_is_not_called_reused(data_folder: Path, again: dict[str, Any]) -> None:
    shutil.rmtree(data_folder / "runs" / "small")
    (data_folder / "runs" / "small").mkdir()
    # The second goes on as one that was killed at the end; the third finds what somebody else has made there.
    for forgotten, reused in ((), False), (("complete",), False), (("complete", "made.json"), True):
        for name in forgotten:
            for path in (data_folder / "reproductions").glob(f"pixelsmile-1-*/{name}"):
                path.unlink()
        done = command(
            *(data_folder, "-m", "flows.reproduce", "pixelsmile:1"),
            *("--reuse-dataset", "--no-sign", "--json"),
        )
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)["reproduction"]
        assert (found["outcome"], found["dataset_reused"]) == ("identical", reused)
