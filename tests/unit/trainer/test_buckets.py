"""Sizes of a training: buckets by aspect, one size a step, the same draws whoever asks."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fakes.datasets import small_dataset
from serving.pipelines.base import PromptEmbeds, pixels_of
from trainer.data.batches import TrainingSet
from trainer.data.buckets import crop, fit, nearest, resolutions, sizes_of
from trainer.data.cache import Needs, TensorCache, View
from trainer.data.dataset import Dataset
from trainer.recipe import Recipe
from trainer.sections import DataSection


def section(**values: object) -> DataSection:
    return DataSection.model_validate({"source": "folder", "path": "x", **values})


def test_without_wishes_there_is_the_bases_own_size() -> None:
    assert resolutions(section(), (512, 512), 16) == (((512, 512),),)
    assert resolutions(section(), (480, 640), 16) == (((480, 640),),)


def test_sizes_are_squares_of_the_bases_multiple() -> None:
    assert resolutions(section(sizes=[512, 768]), (1024, 1024), 16) == (((512, 512),), ((768, 768),))
    assert resolutions(section(sizes=[100]), (64, 64), 16) == (((96, 96),),)


@pytest.mark.parametrize("side", [64, 512, 1024])
@pytest.mark.parametrize("multiple", [8, 16, 32])
def test_buckets_keep_the_area_and_the_limit(side: int, multiple: int) -> None:
    (buckets,) = resolutions(section(sizes=[side], max_aspect=2.0), (side, side), multiple)
    assert buckets[0] == (side, side)
    assert {(width, height) for height, width in buckets} == {*buckets}
    for height, width in buckets:
        assert height % multiple == width % multiple == 0
        assert max(height, width) <= 2 * min(height, width)
        assert height * width == pytest.approx(side * side, rel=2 * multiple / side)
    assert len(buckets) == 9 or side == 64  # few multiples fit there


def test_a_picture_goes_to_the_nearest_aspect_of_each_resolution() -> None:
    wanted = resolutions(section(sizes=[512, 1024], max_aspect=2.0), (512, 512), 16)
    assert sizes_of((1000, 1000), wanted) == ((512, 512), (1024, 1024))
    (small, large) = sizes_of((1080, 1920), wanted)
    assert small[1] / small[0] == pytest.approx(16 / 9, rel=0.13)
    assert large == (nearest(wanted[1], (1080, 1920)))
    assert nearest(wanted[0], (10, 1000)) == max(wanted[0], key=lambda size: size[1] / size[0])


def test_the_middle_is_cropped_and_nothing_is_stretched() -> None:
    pixels = np.zeros((60, 100, 3), np.uint8)
    pixels[:, 20:80] = 255
    image = Image.fromarray(pixels)
    square = crop(image, (32, 32))
    assert square.size == (60, 60)
    assert np.asarray(square).min() == 255
    assert crop(image, (64, 32)).size == (30, 60)
    assert crop(image, (60, 100)) is image
    assert fit(image, (32, 64)).size == (64, 32)


def test_fitted_is_what_the_pipelines_encode() -> None:
    random = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    image = Image.fromarray(random)
    seen = pixels_of([crop(image, (64, 48))], (64, 48))[0].add(1).mul(127.5).round().byte()
    assert np.array_equal(seen.permute(1, 2, 0).numpy(), np.asarray(fit(image, (64, 48))))


VIEW = View(
    encoder="sha256:" + "1" * 64, family="fake", size=(64, 64), multiple=16, sees_image=True,
    numbers="float32",
)  # fmt: skip


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, tiny_recipe: Recipe):
    """Three square people and one wide one, at two resolutions, with made-up latents and embeddings."""
    recipe = tiny_recipe.model_copy(
        update={"data": tiny_recipe.data.model_copy(update={"sizes": (64, 128), "max_aspect": 2.0})}
    )
    folder = tmp_path_factory.mktemp("wide")
    people = []
    for person in range(8):
        shape = (40, 40, 3) if person % 4 else (40, 80, 3)
        shown = [np.full(shape, 3 * person + face, np.uint8) for face in range(3)]
        people.append(("train" if person < 4 else "validation", str(person), shown))
    small_dataset(folder, people)
    data, cache = Dataset.open(folder), TensorCache(folder / "cache")
    needs = Needs.of(data, recipe, VIEW)
    source = torch.Generator().manual_seed(0)
    cache.add(
        {key: torch.randn(size[0] * size[1] // 256, 8, generator=source)
         for key, (_, size) in needs.latents.items()}
    )  # fmt: skip
    cache.add({key: torch.randn(5 + size[0] // 64, 4, generator=source)
               for key, (_, size, _) in needs.prompts.items()})  # fmt: skip
    return data, cache, recipe


def test_a_step_has_one_size_and_sizes_come_as_often_as_they_have_triplets(wide) -> None:
    data, cache, recipe = wide
    made = TrainingSet(data, cache, VIEW, recipe)
    plans = [made.plan(7, step, 3) for step in range(400)]
    counts = Counter(plan.size for plan in plans)
    assert set(counts) == {(64, 64), (48, 96), (128, 128), (96, 176)}
    for size, share in (((64, 64), 3 / 8), ((48, 96), 1 / 8), ((128, 128), 3 / 8), ((96, 176), 1 / 8)):
        assert counts[size] / 400 == pytest.approx(share, abs=0.06)
    for plan in plans:
        wide_ones = {draw.triplet.identity == "0" for draw in plan.draws}
        assert wide_ones == {plan.size[0] != plan.size[1]}
    again = TrainingSet(data, cache, VIEW, recipe)
    assert [again.plan(7, step, 3).size for step in range(400)] == [plan.size for plan in plans]


def test_every_batch_of_a_step_has_the_shape_of_its_size(wide) -> None:
    data, cache, recipe = wide
    made = TrainingSet(data, cache, VIEW, recipe)
    seen = set()
    for step in range(30):
        plan = made.plan(7, step, 4)
        one, other = made.batch(plan, [0, 2]), made.batch(plan, [1, 3])
        tokens = plan.size[0] * plan.size[1] // 256
        assert one.size == other.size == plan.size
        assert one.target.shape == other.source.shape == one.noise.shape == (4, tokens, 8)
        assert one.prompts.embeds.shape == (4, 5 + plan.size[0] // 64, 4)
        seen.add(plan.size)
    assert len(seen) == 4


def test_slots_are_drawn_alike_in_any_micro_batch(wide) -> None:
    data, cache, recipe = wide
    made, other = (TrainingSet(data, cache, VIEW, recipe) for _ in range(2))
    whole = made.batch(made.plan(1, 9, 4), range(4))
    parts = other.plan(1, 9, 4)
    second = other.batch(parts, [1, 3])
    rows = [1, 3, 5, 7]
    for name in ("target", "source", "noise", "sigma"):
        assert torch.equal(getattr(whole, name)[rows], getattr(second, name))
    assert torch.equal(whole.prompts.embeds[rows], second.prompts.embeds)
    assert second.expressions == ("fear",) * 2 + ("surprised",) * 2
    assert isinstance(second.prompts, PromptEmbeds)


def test_what_is_asked_for_has_the_size_of_its_source(wide) -> None:
    data, cache, recipe = wide
    made = TrainingSet(data, cache, VIEW, recipe, split="validation")
    size, latents, prompts = made.ask([made.triplets[0].source] * 2, ["fear", "surprised"], [0.0, 1.0])
    assert size == (48, 96)
    assert latents.shape == (2, 18, 8)
    assert len(prompts) == 2


def test_a_small_memory_gives_the_same_batches(wide) -> None:
    data, cache, recipe = wide
    large, small = TrainingSet(data, cache, VIEW, recipe), TrainingSet(data, cache, VIEW, recipe, limit=2000)
    for step in range(12):
        one, other = (made.batch(made.plan(3, step, 2), range(2)) for made in (large, small))
        assert torch.equal(one.target, other.target)
        assert torch.equal(one.prompts.embeds, other.prompts.embeds)
    assert small._held.bytes <= 2000
    assert small._held.reads > large._held.reads


def test_the_next_step_is_read_in_the_background(wide) -> None:
    data, cache, recipe = wide
    made = TrainingSet(data, cache, VIEW, recipe)
    made.batch(made.plan(3, 0, 2), range(2))
    made.batch(made.plan(3, 1, 2), range(2))  # while this step is planned, step 2 is read
    made._thread.shutdown(wait=True)
    reads = made._held.reads
    made._thread = type(made._thread)(1)
    after = made._plan(3, 2, 2)
    made.batch(after, range(2))
    assert made._held.reads == reads


def test_a_dataset_of_the_folder_says_where_its_pictures_are(wide, tmp_path: Path) -> None:
    data, _, _ = wide
    assert data.sizes[0] == (40, 80)
    assert data.sizes[3] == (40, 40)
    assert [int(picture.flat[0]) for picture in data.pictures([3, 0, 23])] == [3, 0, 23]
    assert data.fitted([0, 3], (48, 96)).shape == (2, 48, 96, 3)
