"""The cache of what a base model makes of pictures and prompts, by content.

Its keys (`trainer.data.view`) are digests of all that decides a tensor. So it is shared by recipes, runs and
processes, and a second run encodes nothing.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from registry.digest import digest_bytes
from registry.manifest import canonical_json
from serving.pipelines.base import Size
from trainer.data.buckets import crop
from trainer.data.dataset import Dataset
from trainer.data.tensors import TensorCache
from trainer.data.view import Needs, View, encoder_digest, numbers, pooled_key, tree_digest
from trainer.errors import CacheError
from trainer.progress import Progress, silent
from trainer.recipe import Recipe
from trainer.stage import StageResult, stage_key, write_atomically

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from serving.pipelines.base import EditPipeline

_IMAGE_BATCH, _PROMPT_BATCH, _PER_FILE = 64, 104, 1024
_PER_PROCESS = 64  # one process more has to load the base: with less to do it is not worth that
_FILE_BYTES = 64 << 20
_PIXELS_AT_ONCE = {"cpu": 64 * 64 * 64, "cuda": 4 << 20}
_PATIENCE = 1800.0  # seconds without news from the other processes


def cache_dataset(
    recipe: Recipe,
    dataset: Path,
    base_path: Path,
    out: Path,
    progress: Progress = silent,
    *,
    pipeline: EditPipeline | None = None,
    rank: int | None = None,
    world: int | None = None,
    room: Callable[[int], AbstractContextManager[int]] = nullcontext,
) -> StageResult:
    """Encode a dataset's pictures and prompts, unless it was done before; several processes share the work.

    Args:
        recipe: gives the prompts and the sizes.
        dataset: output of `trainer.data.build_triplets` or `trainer.data.read_folder`.
        base_path: folder of the base model.
        out: folder of the cache; recipes, bases and processes may share one.
        progress: is told after every batch.
        pipeline: the loaded base, if the caller has it; it is loaded from ``base_path`` only if something is
            missing.
        rank, world: number of this process and of all that call this for the same cache; each encodes its
            share and waits for the others. None takes RANK and WORLD_SIZE from the environment; without
            these and with several GPUs, one process is started for each, or fewer where there is little to
            do.
        room: is asked for as many processes as there is work for, a GPU each, and only if something is
            missing; it gives how many there may be. It is left when nothing is on a GPU any more.

    Returns:
        the result; ``facts`` counts the pictures and prompts that this process encoded and those that were
        there.

    Raises:
        CacheError: the other processes do not deliver.
    """
    data, cache = Dataset.open(dataset), TensorCache(out)
    rank = int(os.environ.get("RANK", "0")) if rank is None else rank
    world = int(os.environ.get("WORLD_SIZE", "1")) if world is None else world
    load = _Loader(base_path, recipe, pipeline)
    view = _known_view(out, base_path, recipe, load)
    needs = Needs.of(data, recipe, view)
    share = needs.keys[rank::world]
    # Whoever removes a damaged file makes up for all of it: the others may have looked already.
    mine = {*share, *cache.drop_damaged([*share, *map(pooled_key, share)])}
    encoded = set[str]()
    if missing := cache.missing(needs.keys):
        alone = pipeline is None and world == 1 and "RANK" not in os.environ
        with room(min(processes(), max(1, len(missing) // _PER_PROCESS)) if alone else 1) as granted:
            cache.refresh()
            missing = cache.missing(needs.keys)  # while this one waited for room, another may have encoded
            if missing and alone and granted > 1:
                # Not above: a process of it is that module itself, and would find it imported already.
                from trainer.data.share import encode_in_processes

                load.pipeline = None
                encode_in_processes(recipe, dataset, base_path, out, progress, granted)
                cache.refresh()
                encoded |= {*missing} - {*cache.missing(missing)}
            encoded |= _encode_share(data, load, cache, needs, mine, view, progress)
            load.pipeline = None
    total = len(needs.keys)
    progress("cache", total, total, f"{len(encoded)} encoded")
    facts = {
        "encoded_images": len(encoded & needs.latents.keys()),
        "encoded_prompts": len(encoded & needs.prompts.keys()),
        "found": total - len(missing),
    }
    key = stage_key("cache", dataset=data.digest, encoder=view.encoder, keys=sorted(needs.keys))
    digest = stage_key("cached", keys=sorted(needs.keys))
    return StageResult(stage="cache", folder=out, key=key, digest=digest, facts=facts, reused=not encoded)


def _encode_share(
    data: Dataset,
    load: _Loader,
    cache: TensorCache,
    needs: Needs,
    mine: Collection[str],
    view: View,
    progress: Progress,
) -> set[str]:
    """Encode what is missing of ``mine`` and wait for the rest; return what was encoded here."""
    encoded = set[str]()
    seen, since = len(cache), time.monotonic()
    while missing := cache.missing(needs.keys):
        todo = [key for key in missing if key in mine]
        if todo:
            encoded |= _encode(data, load(), cache, needs, todo, view, progress)
        else:
            time.sleep(0.2)
        cache.refresh()
        if len(cache) != seen:
            seen, since = len(cache), time.monotonic()
        elif time.monotonic() - since > _PATIENCE:
            raise CacheError(
                "the other processes have not encoded anything for half an hour",
                "look at their messages, then run the same command again; what is there is kept",
            )
    return encoded


def processes() -> int:
    """Return how many processes encode when there is much to do: one a GPU."""
    import torch

    return max(1, torch.cuda.device_count())


def load_base(base_path: Path, recipe: Recipe) -> EditPipeline:
    """Return the base model of a recipe from its folder, in the machine's memory.

    `trainer.placement` brings its parts to the GPU when they are needed there, so they never have to fit all.
    """
    import torch

    from serving import pipelines
    from serving.memory import keep_freed_memory

    keep_freed_memory()
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return pipelines.load(recipe.base.family, base_path, device="cpu", dtype=dtype)


class _Loader:
    """Loads the base when it is needed for the first time."""

    def __init__(self, base_path: Path, recipe: Recipe, pipeline: EditPipeline | None) -> None:
        self._base_path, self._recipe, self.pipeline = base_path, recipe, pipeline

    def __call__(self) -> EditPipeline:
        self.pipeline = self.pipeline or load_base(self._base_path, self._recipe)
        return self.pipeline


def _known_view(out: Path, base_path: Path, recipe: Recipe, load: _Loader) -> View:
    """Return the base's view; what only a loaded base knows is kept beside the tensors for the next run."""
    about = {"family": recipe.base.family, "files": tree_digest(base_path, base_path.rglob("*.json"))}
    path = out / f"view-{digest_bytes(canonical_json(about)).hex[:32]}.json"
    try:
        if load.pipeline is None:
            value = json.loads(path.read_bytes())
            value["size"] = tuple(map(int, value["size"]))
            return View(encoder=encoder_digest(base_path), numbers=numbers(recipe), **value)
    except (OSError, ValueError, KeyError, TypeError):
        pass  # nobody has loaded this base yet
    view = View.of(load(), base_path, recipe)
    out.mkdir(parents=True, exist_ok=True)
    value = {name: getattr(view, name) for name in ("family", "size", "multiple", "sees_image")}
    write_atomically(path, canonical_json(value))
    return view


def _encode(
    data: Dataset,
    pipeline: EditPipeline,
    cache: TensorCache,
    needs: Needs,
    todo: Sequence[str],
    view: View,
    progress: Progress,
) -> set[str]:
    """Encode pictures and prompts in batches of one size and keep them; return those that nobody else had."""
    import torch

    from trainer import placement
    from trainer.parallel import device

    placement.encoding(pipeline, device())
    dtype, done, encoded = getattr(torch, view.numbers), 0, set[str]()

    def work(
        keys: Sequence[str],
        size: Size,
        most: int,
        encode: Callable[[Sequence[str], Size], dict[str, torch.Tensor]],
    ) -> None:
        nonlocal done
        waiting: dict[str, torch.Tensor] = {}
        for begin in range(0, len(keys), most):
            batch = [key for key in keys[begin : begin + most] if key not in cache]
            if batch:
                found = encode(batch, size)
                waiting |= {key: value.detach().to("cpu", dtype, copy=True) for key, value in found.items()}
                encoded.update(batch)
            done += len(keys[begin : begin + most])
            progress("cache", done, len(todo))
            full = len(waiting) >= _PER_FILE or sum(v.nbytes for v in waiting.values()) >= _FILE_BYTES
            if waiting and (full or begin + most >= len(keys)):
                cache.add(waiting)
                waiting = {}
                cache.refresh()  # what another process has encoded meanwhile is not encoded again

    encoders = _Encoders(data, pipeline, needs)
    for size, keys in groupby((key for key in todo if key in needs.latents), lambda k: needs.latents[k][1]):
        work(list(keys), size, _at_once(_IMAGE_BATCH, size), encoders.latents)
    for size, keys in groupby((key for key in todo if key in needs.prompts), lambda k: needs.prompts[k][1]):
        work(list(keys), size, _at_once(_PROMPT_BATCH, size), encoders.embeddings)
    return encoded


class _Encoders:
    """Encodes what keys stand for, in one batch of one size."""

    def __init__(self, data: Dataset, pipeline: EditPipeline, needs: Needs) -> None:
        self._data, self._pipeline, self._needs = data, pipeline, needs

    def latents(self, keys: Sequence[str], size: Size) -> dict[str, torch.Tensor]:
        """Return the latents of some pictures by key."""
        rows = [self._needs.latents[key][0] for key in keys]
        return dict(zip(keys, self._pipeline.encode_images(self._cropped(rows, size), size), strict=True))

    def embeddings(self, keys: Sequence[str], size: Size) -> dict[str, torch.Tensor]:
        """Return the embeddings of some prompts by key, without padding, and their pooled vectors."""
        rows, _, texts = zip(*(self._needs.prompts[key] for key in keys), strict=True)
        prompts = self._pipeline.encode_prompts(self._cropped(rows, size), texts, size)
        found = {key: row[mask] for key, row, mask in zip(keys, prompts.embeds, prompts.mask, strict=True)}
        if prompts.pooled is not None:
            found |= {pooled_key(key): row for key, row in zip(keys, prompts.pooled, strict=True)}
        return found

    def _cropped(self, rows: Sequence[int], size: Size) -> list[Image.Image]:
        from PIL import Image

        some = sorted({*rows})
        read = dict(zip(some, self._data.pictures(some), strict=True))
        return [crop(Image.fromarray(read[row]), size) for row in rows]


def _at_once(most: int, size: Size) -> int:
    """Return how many pictures of a size are encoded together."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return max(1, min(most, _PIXELS_AT_ONCE[device] // (size[0] * size[1])))
