"""The cache: by content, once, whole or not at all, whoever fills it."""

from __future__ import annotations

import gc
import json
import multiprocessing
import shutil
import sys
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from fakes.averaging_base import AveragingBase, fill_cache
from fakes.datasets import small_dataset
from fakes.followed import wait_until
from trainer.data import Dataset, cache_dataset
from trainer.data.cache import Needs, TensorCache, View, pooled_key
from trainer.data.share import encode_in_processes
from trainer.errors import CacheError
from trainer.recipe import Recipe


def fill(recipe: Recipe, run: Path, base: Path, out: Path, fake: AveragingBase, **share: int):
    return cache_dataset(recipe, run / "dataset", base, out, pipeline=fake, **share)


def needs_of(recipe: Recipe, run: Path, base: Path, fake: AveragingBase) -> tuple[View, Needs]:
    view = View.of(fake, base, recipe)
    return view, Needs.of(Dataset.open(run / "dataset"), recipe, view)


def test_a_second_run_encodes_nothing_and_loads_no_base(
    tiny_recipe: Recipe, tiny_run: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = AveragingBase()
    first = fill(tiny_recipe, tiny_run, tiny_base, tmp_path, fake)
    assert (first.facts["encoded_images"], first.facts["encoded_prompts"]) == (36, 4 * 5)
    assert (len(fake.images), len(fake.prompts)) == (36, 20)
    monkeypatch.setattr("serving.pipelines.load", lambda *a, **k: pytest.fail("the base was loaded"))
    again = cache_dataset(tiny_recipe, tiny_run / "dataset", tiny_base, tmp_path)
    assert again.reused
    assert again.facts == {"encoded_images": 0, "encoded_prompts": 0, "found": 56}
    assert again.key == first.key


class Room:
    """Has room for so many processes; notes how many were asked for, and looks around when they have left."""

    def __init__(self, most: int, look: Callable[[], object] = lambda: None) -> None:
        self.most, self.look = most, look
        self.asked: list[int] = []
        self.left: list[object] = []

    @contextmanager
    def __call__(self, processes: int) -> Iterator[int]:
        self.asked.append(processes)
        yield min(self.most, processes)
        self.left.append(self.look())


def test_room_is_asked_for_what_is_missing_and_left_without_the_base(
    tiny_recipe: Recipe, tiny_run: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.data.cache.processes", lambda: 4)
    places = (tiny_run / "dataset", tiny_base, tmp_path)
    bases: list[weakref.ref[AveragingBase]] = []

    def load(*_: object) -> AveragingBase:
        base = AveragingBase()
        bases.append(weakref.ref(base))
        return base

    def still_there() -> int:
        gc.collect()
        return sum(base() is not None for base in bases)

    monkeypatch.setattr("trainer.data.cache.load_base", load)
    room = Room(4, still_there)
    first = cache_dataset(tiny_recipe, *places, room=room)
    assert first.facts["encoded_images"] == 36
    assert (len(bases), room.asked, room.left) == (1, [1], [0]), "too little for a second process"
    assert cache_dataset(tiny_recipe, *places, room=room).reused
    assert room.asked == [1], "nothing was missing"
    for path in tmp_path.glob("tensors-*"):
        path.unlink()
    monkeypatch.setattr("trainer.data.cache._PER_PROCESS", 18)
    room = Room(1)
    assert cache_dataset(tiny_recipe, *places, room=room).facts["encoded_prompts"] == 20
    assert room.asked == [3], "56 pictures and prompts, and room for one process"


def test_a_prompt_that_sees_no_picture_is_encoded_once(
    tiny_recipe: Recipe, tiny_run: Path, tiny_base: Path, tmp_path: Path
) -> None:
    fake = AveragingBase(sees_image=False)
    result = fill(tiny_recipe, tiny_run, tiny_base, tmp_path, fake)
    assert result.facts["encoded_prompts"] == 5
    assert sorted(fake.prompts) == sorted({*fake.prompts})


def test_prompts_are_kept_without_padding_and_with_their_pooled_vector(
    tiny_recipe: Recipe, tiny_run: Path, tiny_base: Path, tmp_path: Path
) -> None:
    fake = AveragingBase(sees_image=False)
    fill(tiny_recipe, tiny_run, tiny_base, tmp_path, fake)
    view, _ = needs_of(tiny_recipe, tiny_run, tiny_base, fake)
    text = tiny_recipe.conditioning.prompt("fear")
    key = view.prompt_key("sha256:" + "0" * 64, (64, 64), text)
    embeds, pooled = TensorCache(tmp_path).get([key, pooled_key(key)])
    assert embeds.shape == (len(text), 3)
    assert pooled.tolist() == [float(len(text))] * 4


def test_the_key_is_the_picture_the_size_the_encoder_and_the_numbers(
    tiny_recipe: Recipe, tiny_run: Path, tiny_base: Path, tmp_path: Path
) -> None:
    fake = AveragingBase()
    fill(tiny_recipe, tiny_run, tiny_base, tmp_path, fake)
    larger = tiny_recipe.model_copy(update={"data": tiny_recipe.data.model_copy(update={"sizes": (64, 96)})})
    more = fill(larger, tiny_run, tiny_base, tmp_path, fake)
    assert more.facts == {"encoded_images": 36, "encoded_prompts": 20, "found": 56}
    view, needs = needs_of(larger, tiny_run, tiny_base, fake)
    tokens = {TensorCache(tmp_path).shape(key)[0] for key in needs.latents}
    assert tokens == {16, 36}
    bf16 = tiny_recipe.model_copy(
        update={"precision": tiny_recipe.precision.model_copy(update={"compute": "bf16"})}
    )
    fill(bf16, tiny_run, tiny_base, tmp_path, fake)
    _, halves = needs_of(bf16, tiny_run, tiny_base, fake)
    assert not halves.latents.keys() & needs.latents.keys()
    assert TensorCache(tmp_path).get(list(halves.latents)[:1])[0].dtype == torch.bfloat16
    other = shutil.copytree(tiny_base, tmp_path / "base")
    (other / "vae" / "config.json").write_text("{}")
    assert View.of(fake, other, tiny_recipe).encoder != view.encoder


def test_pictures_are_cropped_before_they_are_encoded(
    tiny_recipe: Recipe, tiny_run: Path, tiny_base: Path, tmp_path: Path
) -> None:
    people = (("train", 0), ("validation", 9))
    flat = [(split, split, [np.full((30, 90, 3), value + face, np.uint8) for face in range(3)])
            for split, value in people]  # fmt: skip
    small_dataset(tmp_path / "dataset", flat)
    fake = AveragingBase()
    fill(tiny_recipe, tmp_path, tiny_base, tmp_path / "cache", fake)
    assert set(fake.images) == {(30, 30)}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-2] ^= 4
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut, lengthen, flip, empty])
@pytest.mark.parametrize("which", [0, 1])
def test_a_damaged_file_is_noticed_and_encoded_again(
    tiny_recipe: Recipe, tiny_run: Path, tiny_base: Path, tmp_path: Path, damage, which: int
) -> None:
    fill(tiny_recipe, tiny_run, tiny_base, tmp_path, AveragingBase())
    _, needs = needs_of(tiny_recipe, tiny_run, tiny_base, AveragingBase())
    keys = [*needs.keys, *map(pooled_key, needs.prompts)]
    before = TensorCache(tmp_path).get(keys)
    path = sorted(tmp_path.glob("tensors-*"))[which]
    damage(path)
    with pytest.raises(CacheError):
        TensorCache(tmp_path).get(keys)
    fake = AveragingBase()
    again = fill(tiny_recipe, tiny_run, tiny_base, tmp_path, fake)
    assert sorted((again.facts["encoded_images"], again.facts["encoded_prompts"])) in ([0, 20], [0, 36])
    after = TensorCache(tmp_path).get(keys)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_a_pooled_vector_that_is_damaged_is_encoded_again(
    tiny_recipe: Recipe, tiny_run: Path, tiny_base: Path, tmp_path: Path
) -> None:
    fill(tiny_recipe, tiny_run, tiny_base, tmp_path, AveragingBase(sees_image=False))
    cache = TensorCache(tmp_path)
    entry = next(value for key, value in cache._entries.items() if key.endswith(".pooled"))
    data = bytearray(entry.path.read_bytes())
    data[entry.begin] ^= 1
    entry.path.write_bytes(data)
    again = fill(tiny_recipe, tiny_run, tiny_base, tmp_path, AveragingBase(sees_image=False))
    assert again.facts["encoded_prompts"] == 5


def test_a_file_that_is_half_written_is_not_looked_at(
    tiny_recipe: Recipe, tiny_run: Path, tiny_base: Path, tmp_path: Path
) -> None:
    fill(tiny_recipe, tiny_run, tiny_base, tmp_path, AveragingBase())
    whole = sorted(tmp_path.glob("tensors-*"))
    count = len(TensorCache(tmp_path))
    (tmp_path / f".{whole[0].stem}.abc.tmp").write_bytes(whole[0].read_bytes()[:100])
    header = len(json.dumps({})).to_bytes(8, "little") + b"{}"
    (tmp_path / "tensors-zz.safetensors").write_bytes(header)
    assert len(TensorCache(tmp_path)) == count


def test_a_file_that_was_not_whole_is_looked_at_again(tmp_path: Path) -> None:
    """Two ranks find what a power cut left; one writes the same tensors anew, under the same name."""
    tensors = {"a": torch.ones(3), "b": torch.ones(2)}
    TensorCache(tmp_path).add(tensors)
    cut(next(tmp_path.glob("tensors-*")))
    waiting, writing = TensorCache(tmp_path), TensorCache(tmp_path)
    assert writing.missing(tensors) == waiting.missing(tensors) == ["a", "b"]
    writing.add(tensors)
    waiting.refresh()
    assert torch.equal(waiting.get(["a"])[0], tensors["a"])


def in_processes(recipe: Recipe, run: Path, base: Path, out: Path, shares: list[dict]) -> list[dict]:
    logs = [out.parent / f"log-{number}" for number in range(len(shares))]
    jobs = [(recipe.model_dump(mode="json"), run, base, out, log, share)
            for log, share in zip(logs, shares, strict=True)]  # fmt: skip
    with multiprocessing.get_context("spawn").Pool(len(shares)) as pool:
        return pool.map(fill_cache, jobs, chunksize=1)


def test_two_processes_fill_one_cache_at_once(
    tiny_recipe: Recipe, tiny_run: Path, tiny_base: Path, tmp_path: Path
) -> None:
    shares = [{"rank": 0, "world": 1}] * 2
    in_processes(tiny_recipe, tiny_run, tiny_base, tmp_path / "cache", shares)
    _, needs = needs_of(tiny_recipe, tiny_run, tiny_base, AveragingBase())
    alone = tmp_path / "alone"
    fill(tiny_recipe, tiny_run, tiny_base, alone, AveragingBase())
    both = zip(
        TensorCache(tmp_path / "cache").get(needs.keys), TensorCache(alone).get(needs.keys), strict=True
    )
    assert all(torch.equal(one, other) for one, other in both)
    assert not list((tmp_path / "cache").glob(".*.tmp"))
    assert fill(tiny_recipe, tiny_run, tiny_base, tmp_path / "cache", AveragingBase()).reused


def test_ranks_share_the_work(tiny_recipe: Recipe, tiny_run: Path, tiny_base: Path, tmp_path: Path) -> None:
    shares = [{"rank": rank, "world": 2} for rank in range(2)]
    facts = in_processes(tiny_recipe, tiny_run, tiny_base, tmp_path / "cache", shares)
    assert [one["encoded_images"] for one in facts] == [18, 18]
    assert [one["encoded_prompts"] for one in facts] == [10, 10]
    encoded = [sum(map(int, (tmp_path / f"log-{rank}").read_text().split())) for rank in range(2)]
    assert encoded == [18, 18]
    assert fill(tiny_recipe, tiny_run, tiny_base, tmp_path / "cache", AveragingBase()).reused


@pytest.mark.slow
def test_several_gpus_are_given_a_process_each(
    tiny_recipe: Recipe, tiny_run: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the real base; two processes on the CPU stand for two GPUs, and there is room for no third."""
    monkeypatch.setattr("trainer.data.cache.processes", lambda: 3)
    monkeypatch.setattr("trainer.data.cache._PER_PROCESS", 16)
    told: list[int] = []
    result = cache_dataset(
        tiny_recipe,
        tiny_run / "dataset",
        tiny_base,
        tmp_path / "cache",
        lambda s, done, *_: told.append(done),
        room=Room(2),
    )
    assert result.facts == {"encoded_images": 36, "encoded_prompts": 20, "found": 0}
    assert 28 in told, "its half"
    assert told[0] <= 28
    assert told[-1] == 56
    monkeypatch.setattr("trainer.data.cache.load_base", lambda *_: pytest.fail("the base was loaded"))
    assert cache_dataset(tiny_recipe, tiny_run / "dataset", tiny_base, tmp_path / "cache").reused


def encoding(parent: psutil.Process) -> dict[str, psutil.Process]:
    """The encoding processes of a process, by their numbers."""
    found = {}
    for child in parent.children():
        with suppress(psutil.Error):  # one of another test that ends meanwhile
            found[child.environ().get("RANK", "")] = child
    return found


def both_encoding(parent: psutil.Process) -> dict[str, psutil.Process]:
    seen: dict[str, psutil.Process] = {}

    def there() -> bool:
        seen.update(encoding(parent))
        return {"0", "1"} <= seen.keys()

    wait_until(there)
    return seen


def test_a_process_that_fails_ends_the_others(
    tiny_recipe: Recipe, tiny_run: Path, tiny_base: Path, tmp_path: Path
) -> None:
    """The first one, that tells the progress, would wait half an hour for the share of the second."""
    with ThreadPoolExecutor(1) as killer:
        killed = killer.submit(lambda: both_encoding(psutil.Process())["1"].kill())
        with pytest.raises(CacheError, match="the encoding process 1 of 2 ended with status -9"):
            encode_in_processes(
                tiny_recipe, tiny_run / "dataset", tiny_base, tmp_path / "cache", lambda *_: None, 2
            )
        killed.result()
    assert not {"0", "1"} & encoding(psutil.Process()).keys()


def working(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


ENCODE = """
import sys
from pathlib import Path
from trainer.data.share import encode_in_processes
from trainer.recipe import Recipe
recipe = Recipe.model_validate_json(sys.argv[1])
encode_in_processes(recipe, *map(Path, sys.argv[2:]), lambda *_: None, 2)
"""


@pytest.mark.slow
@pytest.mark.parametrize("when", ["they start", "they encode"])
def test_a_process_that_is_killed_leaves_none_that_encodes(
    tiny_recipe: Recipe, tiny_run: Path, tiny_base: Path, tmp_path: Path, when: str
) -> None:
    """Who only computes would wait half an hour for the share of the one that can tell nobody any more."""
    cache = tmp_path / "cache"
    places = [str(place) for place in (tiny_run / "dataset", tiny_base, cache)]
    parent = psutil.Popen([sys.executable, "-c", ENCODE, tiny_recipe.model_dump_json(), *places])
    started: dict[str, psutil.Process] = {}
    try:
        started = both_encoding(parent)
        if when == "they encode":
            started["0"].suspend()  # so that it is the other one that has encoded, and waits for this one
            wait_until(lambda: any(cache.glob("tensors-*")))
    finally:
        parent.kill()
        parent.wait()
        for process in started.values():
            with suppress(psutil.NoSuchProcess):
                process.resume()
    try:
        wait_until(lambda: not any(map(working, started.values())))
    finally:
        for process in started.values():
            with suppress(psutil.NoSuchProcess):
                process.kill()


def test_ranks_are_found_in_the_environment(
    tiny_recipe: Recipe, tiny_run: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("trainer.data.cache._PATIENCE", 0.1)
    fake = AveragingBase()
    with pytest.raises(CacheError, match="the other processes have not encoded"):
        fill(tiny_recipe, tiny_run, tiny_base, tmp_path, fake)
    assert (len(fake.images), len(fake.prompts)) == (18, 10)


def test_who_removes_a_damaged_file_makes_up_for_all_of_it(
    tiny_recipe: Recipe, tiny_run: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.data.cache._PATIENCE", 1.0)
    fill(tiny_recipe, tiny_run, tiny_base, tmp_path, AveragingBase())
    for path in tmp_path.glob("tensors-*"):
        flip(path)
    fake = AveragingBase()
    total = len(needs_of(tiny_recipe, tiny_run, tiny_base, fake)[1].keys)
    for rank in range(2):
        fill(tiny_recipe, tiny_run, tiny_base, tmp_path, fake, rank=rank, world=2)
    assert len(fake.images) + len(fake.prompts) == total
    assert fill(tiny_recipe, tiny_run, tiny_base, tmp_path, AveragingBase()).reused


def test_a_missing_tensor_is_an_explained_error(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"2 of 2 tensors are not in the cache .*\n.*trainer train"):
        TensorCache(tmp_path).get(["0" * 64, "1" * 64])


def test_the_picture_is_what_the_dataset_has(
    tiny_recipe: Recipe, tiny_run: Path, tiny_base: Path, tmp_path: Path
) -> None:
    fake = AveragingBase()
    fill(tiny_recipe, tiny_run, tiny_base, tmp_path, fake)
    data, view = Dataset.open(tiny_run / "dataset"), View.of(fake, tiny_base, tiny_recipe)
    key = view.latent_key(data.image_digests[5], (64, 64))
    expected = fake.encode_images([Image.fromarray(data.pictures([5])[0])], (64, 64))[0].float()
    assert torch.equal(TensorCache(tmp_path).get([key])[0], expected)
