"""Bad losses: what is bad, what is said about it, and that nothing of it stays."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import pytest
import torch
from safetensors.torch import load_file

from fakes.trainings import (
    assert_same_tensors,
    assert_same_training,
    changed,
    curve,
    job_of,
    start,
    stop_at,
    train_tiny,
)
from trainer import checkpoint
from trainer.data.batches import Draw, TrainingSet
from trainer.data.cache import View
from trainer.data.dataset import Dataset
from trainer.data.tensors import TensorCache
from trainer.errors import Interrupted, NotFinite
from trainer.policy import IN_A_ROW, LEAST, BadLossPolicy, PairRecord, worst
from trainer.recipe import Recipe
from trainer.sections import LossSection, OptimiserSection


def policy(**values: object) -> BadLossPolicy:
    return BadLossPolicy(
        OptimiserSection(learning_rate=0.1, warmup_steps=0, steps=9, batch_pairs=1, **values)
    )


def good(loss: float = 1.0) -> dict[str, float]:
    return {"loss": loss, "flow_matching": loss, "gradient": 0.5}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("flow_matching", "the loss flow_matching is"),
        ("loss", "the loss is"),
        ("gradient", "the length of the gradient is"),
    ],
)
def test_what_is_not_finite_is_bad_and_named(name: str, said: str, value: float) -> None:
    wrong = policy().judge({**good(), name: value})
    assert wrong is not None
    assert wrong.startswith(said)


def test_the_part_is_named_before_the_total() -> None:
    wrong = policy().judge(
        {"loss": math.nan, "contrastive": math.nan, "flow_matching": 1.0, "gradient": math.nan}
    )
    assert wrong == "the loss contrastive is nan"


def test_a_spike_is_a_multiple_of_the_median_once_there_is_one() -> None:
    one = policy(spike=3.0)
    for number in range(LEAST):
        assert one.judge(good(1.0 + 0.01 * number)) is None
    wrong = one.judge(good(4.0))
    assert wrong is not None
    assert "4 is more than 3 times 1.095" in wrong
    assert one.judge(good(3.2)) is None
    assert policy(spike=3.0).judge(good(1e9)) is None  # nothing to compare with
    calm = policy()
    for _ in range(LEAST):
        calm.judge(good())
    assert calm.judge(good(1e9)) is None  # spike 0 looks for none


def test_bad_steps_stay_out_of_the_window_and_the_window_moves_on() -> None:
    one = policy(spike=2.0, bad_loss="skip")
    for _ in range(100):
        one.judge(good(1.0))
    for _ in range(5):
        assert one.judge(good(100.0)) is not None
    assert one.numbers()["good"] == [1.0] * 100
    for _ in range(60):
        assert one.judge(good(1.9)) is None
    assert one.judge(good(3.0)) is None  # the median is 1.9 by now
    assert len(one.numbers()["good"]) == 100


def test_ten_in_a_row_end_it_and_a_good_one_begins_anew() -> None:
    one = policy(bad_loss="skip")
    for _ in range(IN_A_ROW - 1):
        one.judge(good(math.nan))
        assert not one.stops()
    one.judge(good())
    for _ in range(IN_A_ROW - 1):
        one.judge(good(math.nan))
        assert not one.stops()
    one.judge(good(math.nan))
    assert one.stops()
    assert "as in the 9 steps before it" in str(one.error(40, "the loss is nan", "someone"))
    stopping = policy()
    stopping.judge(good(math.nan))
    assert stopping.stops()


def test_a_policy_goes_on_where_it_was() -> None:
    one, other = policy(spike=2.0, bad_loss="skip"), policy(spike=2.0, bad_loss="skip")
    for number in range(30):
        one.judge(good(1.0 + number / 7))
    one.judge(good(math.nan))
    other.load(one.numbers())
    assert other.numbers() == one.numbers()
    assert other.judge(good(20.0)) == one.judge(good(20.0)) is not None


def record(slot: int, **values: float) -> PairRecord:
    return PairRecord(slot=slot, about=f"pair {slot}", values={**good(), **values})


def test_the_worst_pair_is_no_number_first_then_no_gradient_then_the_highest() -> None:
    high, gradient, number = record(0, loss=9.0), record(1, gradient=math.inf), record(2, loss=math.nan)
    assert worst([high, gradient, number]).startswith("pair 2; alone it gives loss nan")
    assert worst([high, gradient]).startswith("pair 1")
    assert worst([record(3), high]).startswith("pair 0")
    assert worst([record(3), high]).endswith("(alone every pair is finite)")


@dataclass(frozen=True, kw_only=True)
class Broken:
    """A run whose cache has a picture that is no number, and where the training meets it."""

    run: Path
    steps: list[int]
    draw: Draw
    dataset: Dataset


@pytest.fixture(scope="module")
def broken(
    tiny_recipe: Recipe,
    tiny_run: Path,
    tiny_base: Path,
    tiny_pipeline,
    tmp_path_factory: pytest.TempPathFactory,
) -> Broken:
    run, dataset = tmp_path_factory.mktemp("broken"), Dataset.open(tiny_run / "dataset")
    view = View.of(tiny_pipeline, tiny_base, tiny_recipe)
    data = TrainingSet(dataset, TensorCache(tiny_run / "cache"), view, tiny_recipe)
    plans = [data.plan(tiny_recipe.seed, step, 2) for step in range(12)]
    seen = [{row for draw in plan.draws for row in rows_of(draw)} for plan in plans]
    # Of the second pair alone, which the second of two processes has.
    early = set().union(*seen[:4], rows_of(plans[4].draws[0]))
    row = min(rows_of(plans[4].draws[1]) - early)
    (run / "dataset").symlink_to(tiny_run / "dataset")
    bad = view.latent_key(dataset.image_digests[row], plans[4].size)
    for path in (tiny_run / "cache").glob("tensors-*.safetensors"):
        tensors = load_file(path)
        if bad in tensors:
            tensors[bad] = torch.full_like(tensors[bad], math.nan)
        TensorCache(run / "cache").add(tensors)
    return Broken(
        run=run,
        steps=[step for step, rows in enumerate(seen) if row in rows],
        draw=plans[4].draws[1],
        dataset=dataset,
    )


def rows_of(draw: Draw) -> set[int]:
    """The pictures that a pair is trained on."""
    members = (draw.triplet.a, draw.triplet.b)
    kept = {one.image for one, keeps in zip(members, draw.keeps, strict=True) if not keeps}
    return kept | {draw.triplet.source}


def test_a_stop_names_step_part_and_sample_and_keeps_the_step_before(
    broken: Broken, tiny_recipe: Recipe, tiny_base: Path, tiny_pipeline, tmp_path: Path
) -> None:
    with pytest.raises(NotFinite) as caught:
        train_tiny(tiny_recipe, broken.run, tiny_base, tiny_pipeline, tmp_path)
    assert "skip" in caught.value.mend
    assert_explained(caught.value.message, broken, tmp_path)


@pytest.mark.slow
def test_the_pair_of_another_process_is_named(
    broken: Broken, tiny_recipe: Recipe, tiny_base: Path, tmp_path: Path
) -> None:
    """The main process, that tells, has only good pairs."""
    with start(job_of(tiny_recipe, broken.run, tiny_base, tmp_path), 2) as process:
        _, said = process.communicate(timeout=600)
    assert process.returncode == 1
    assert "\nNotFinite " in f"\n{said}"
    assert_explained(said, broken, tmp_path)


def assert_explained(message: str, broken: Broken, out: Path) -> None:
    """Check what was said about the broken step, and that nothing of it was kept."""
    draw, digests = broken.draw, broken.dataset.image_digests
    assert f"the loss flow_matching is nan at step 5; the worst pair: {draw.triplet.identity}, " in message
    assert f"source {digests[draw.triplet.source]}, noise level {draw.sigma:.4f}" in message
    for one, keeps in zip((draw.triplet.a, draw.triplet.b), draw.keeps, strict=True):
        asked = "keeps the source" if keeps else f"{one.expression} {one.intensity:g} ({digests[one.image]})"
        assert asked in message
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000004"]
    assert [line["step"] for line in curve(out)] == [1, 2, 3, 4]
    assert all(torch.isfinite(value).all() for value in state_after(out, 4).tensors.values())


def test_a_skipped_step_changes_nothing_but_the_curve_also_over_a_stop(
    broken: Broken, tiny_recipe: Recipe, tiny_base: Path, tiny_pipeline, tmp_path: Path
) -> None:
    recipe = changed(tiny_recipe, "optimiser", bad_loss="skip")
    recipe = changed(recipe, "running", checkpoint_every=1, keep_checkpoints=20, log_every=1)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    result = train_tiny(recipe, broken.run, tiny_base, tiny_pipeline, whole)
    lines, bad = curve(whole), [step + 1 for step in broken.steps]
    assert [line["step"] for line in lines if "skipped" in line] == bad
    assert result.facts["skipped_steps"] == len(bad)
    assert broken.draw.triplet.identity in lines[4]["skipped"]
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert [line["step"] for line in lines if line["loss"] is None] == bad
    for step in bad:
        before, after = state_after(whole, step - 1), state_after(whole, step)
        assert_same_tensors(before.tensors, after.tensors)
        assert after.numbers["ema_updates"] == before.numbers["ema_updates"]
        assert after.numbers["policy"]["good"] == before.numbers["policy"]["good"]
        assert after.numbers["policy"]["in_a_row"] == before.numbers["policy"]["in_a_row"] + 1
    assert all(torch.isfinite(value).all() for value in state_after(whole, 12).tensors.values())

    with pytest.raises(Interrupted):
        train_tiny(recipe, broken.run, tiny_base, tiny_pipeline, halves, stop_at(5))
    train_tiny(recipe, broken.run, tiny_base, tiny_pipeline, halves)
    assert_same_training(whole, halves)


def test_ten_bad_steps_in_a_row_end_a_training_that_skips(
    tiny_recipe: Recipe, tiny_run: Path, tiny_base: Path, tiny_pipeline, tmp_path: Path
) -> None:
    recipe = changed(tiny_recipe, "optimiser", bad_loss="skip").model_copy(
        update={"losses": {"flow_matching": LossSection(weight=1e39)}}
    )
    with pytest.raises(NotFinite, match="the loss is inf at step 10, as in the 9 steps before it"):
        train_tiny(recipe, tiny_run, tiny_base, tiny_pipeline, tmp_path)


def test_a_spike_stops_a_training(
    tiny_recipe: Recipe, tiny_run: Path, tiny_base: Path, tiny_pipeline, tmp_path: Path
) -> None:
    """At the very step where the curve of the training that does not look is first so far above."""
    blind, out = changed(tiny_recipe, "optimiser", steps=40, learning_rate=1e-6), tmp_path / "spike"
    train_tiny(blind, tiny_run, tiny_base, tiny_pipeline, tmp_path / "blind")
    losses = [line["loss"] for line in curve(tmp_path / "blind")]
    ratios = {at: losses[at] / median(losses[:at]) for at in range(LEAST, 40)}
    high = max(ratios, key=lambda at: (round(ratios[at], 6), -at))
    spike = ratios[high] * 0.999
    assert spike > 1
    looking = changed(blind, "optimiser", spike=spike)
    with pytest.raises(NotFinite, match=rf"the median of .* at step {high + 1}; the worst pair"):
        train_tiny(looking, tiny_run, tiny_base, tiny_pipeline, out)
    assert [line["loss"] for line in curve(out)] == losses[:high]
    assert (out / "checkpoints" / f"step-{high:06d}" / "state.json").exists()


def state_after(out: Path, step: int) -> checkpoint.Checkpoint:
    found = checkpoint._read(out / "checkpoints" / f"step-{step:06d}")
    assert found is not None
    return found
