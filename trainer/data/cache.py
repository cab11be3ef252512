"""The cache of what a base model makes of pictures and prompts, by content.

A latent is kept under the digest of (encoder, picture), a prompt's embedding under that of (encoder, picture,
prompt), because the text encoder sees the picture. So the cache can be shared by recipes and processes, and a
second run encodes nothing. Files are safetensors that are written once and never changed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from registry.digest import Digest, digest_bytes
from registry.manifest import canonical_json
from trainer.data.triplets import Dataset
from trainer.errors import CacheError
from trainer.progress import Progress, silent
from trainer.recipe import Recipe
from trainer.stage import StageResult, stage_key

if TYPE_CHECKING:
    import torch

    from serving.pipelines.base import EditPipeline

_ENCODERS = ("vae", "text_encoder", "tokenizer", "processor")
_IMAGE_BATCH = 64
_PROMPT_BATCH = 104
_PER_FILE = 1024


class TensorCache:
    """Tensors by content key in a folder of safetensors files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, Path] = {}
        for path in sorted(folder.glob("tensors-*.safetensors")):
            self._files.update(dict.fromkeys(_keys(path), path))

    def __contains__(self, key: str) -> bool:
        return key in self._files

    def __len__(self) -> int:
        return len(self._files)

    def add(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep ``tensors`` in a new file, named after its keys."""
        from safetensors.torch import save

        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"tensors-{digest_bytes(canonical_json(sorted(tensors))).hex[:32]}.safetensors"
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_bytes(save({key: value.contiguous().cpu() for key, value in tensors.items()}))
        temporary.replace(path)
        self._files.update(dict.fromkeys(tensors, path))

    def get(self, keys: Sequence[str]) -> list[torch.Tensor]:
        """Return the tensors of ``keys``, in order.

        Raises:
            CacheError: one of them was never cached.
        """
        from safetensors import safe_open

        missing = [key for key in keys if key not in self._files]
        if missing:
            raise CacheError(
                f"{len(missing)} of {len(keys)} tensors are not in the cache {self._folder}",
                "run `trainer train` again; it fills the cache for this dataset and base before it trains",
            )
        found = {}
        for path in sorted({self._files[key] for key in keys}):
            with safe_open(path, "pt") as file:
                found.update({key: file.get_tensor(key) for key in keys if self._files[key] == path})
        return [found[key] for key in keys]


def _keys(path: Path) -> list[str]:
    """Return the tensor names of a safetensors file; none if the file is cut short."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            return list(file.keys())
    except (OSError, SafetensorError):
        return []


def encoder_digest(base_path: Path) -> Digest:
    """Return the digest of those parts of a base that decide latents and embeddings."""
    folders = [base_path / name for name in _ENCODERS if (base_path / name).is_dir()]
    return _tree_digest(base_path, [*folders, base_path / "resolution.json"])


def _tree_digest(root: Path, places: Iterable[Path]) -> Digest:
    files = sorted(
        path
        for place in places
        for path in ([place] if place.is_file() else place.rglob("*"))
        if path.is_file()
    )
    listing = {}
    for path in files:
        with path.open("rb") as stream:
            listing[path.relative_to(root).as_posix()] = hashlib.file_digest(stream, "sha256").hexdigest()
    return digest_bytes(canonical_json(listing))


def latent_key(encoder: Digest, image: Digest) -> str:
    """Return the key of a picture's latents."""
    return hashlib.sha256(f"latent {encoder} {image}".encode()).hexdigest()


def prompt_key(encoder: Digest, image: Digest, prompt: str) -> str:
    """Return the key of a prompt's embedding beside a picture."""
    return hashlib.sha256(f"prompt {encoder} {image} {json.dumps(prompt)}".encode()).hexdigest()


def cache_dataset(
    recipe: Recipe,
    dataset: Path,
    base_path: Path,
    out: Path,
    progress: Progress = silent,
    *,
    pipeline: EditPipeline | None = None,
) -> StageResult:
    """Encode a dataset's pictures, and all prompts beside each source, unless it was done before.

    Args:
        recipe: gives the prompts.
        dataset: output of `trainer.data.build_triplets`.
        base_path: folder of the base model.
        out: folder of the cache; recipes and bases may share one.
        progress: is told after every batch.
        pipeline: the loaded base, if the caller has it; it is loaded from ``base_path`` only if something is
            missing.

    Returns:
        the result; ``facts`` counts the pictures and prompts that were encoded and those that were there.
    """
    data = Dataset.open(dataset)
    encoder = encoder_digest(base_path)
    cache = TensorCache(out)
    spec = recipe.conditioning
    prompts = [spec.prompt(name) for name in (spec.neutral, *spec.expressions)]
    images = {latent_key(encoder, digest): (row,) for row, digest in enumerate(data.image_digests)}
    sources = sorted({triplet.source for triplet in data.triplets})
    pairs = {
        prompt_key(encoder, data.image_digests[row], text): (row, text) for row in sources for text in prompts
    }
    new_images = {key: value for key, value in images.items() if key not in cache}
    new_pairs = {key: value for key, value in pairs.items() if key not in cache}
    if new_images or new_pairs:
        _encode(data, pipeline or load_base(base_path, recipe), cache, new_images, new_pairs, progress)
    total = len(images) + len(pairs)
    progress("cache", total, total, f"{len(new_images) + len(new_pairs)} encoded")
    key = stage_key("cache", dataset=data.digest, encoder=encoder, prompts=prompts)
    return StageResult(
        stage="cache",
        folder=out,
        key=key,
        digest=stage_key("cached", keys=sorted([*images, *pairs])),
        facts={
            "encoded_images": len(new_images),
            "encoded_prompts": len(new_pairs),
            "found": total - len(new_images) - len(new_pairs),
        },
        reused=not new_images and not new_pairs,
    )


def load_base(base_path: Path, recipe: Recipe) -> EditPipeline:
    """Return the base model of a recipe from its folder, on the GPU if there is one."""
    import torch

    from serving import pipelines
    from serving.memory import keep_freed_memory

    keep_freed_memory()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return pipelines.load(recipe.base.family, base_path, device=device)


def _encode(
    data: Dataset,
    pipeline: EditPipeline,
    cache: TensorCache,
    images: Mapping[str, tuple[int]],
    pairs: Mapping[str, tuple[int, str]],
    progress: Progress,
) -> None:
    """Encode pictures and prompts in batches and keep them."""
    from PIL import Image

    pictures = [Image.fromarray(row) for row in data.images()]
    total, done = len(images) + len(pairs), count(1)

    def in_batches(
        keys: Sequence[str], size: int, encode: Callable[[Sequence[str]], list[torch.Tensor]]
    ) -> None:
        for begin in range(0, len(keys), _PER_FILE):
            found: dict[str, torch.Tensor] = {}
            part = keys[begin : begin + _PER_FILE]
            for start in range(0, len(part), size):
                batch = part[start : start + size]
                found.update(zip(batch, encode(batch), strict=True))
                for _ in batch:
                    number = next(done)
                progress("cache", number, total)
            cache.add(found)

    def latents(batch: Sequence[str]) -> list[torch.Tensor]:
        return [row.clone() for row in pipeline.encode_images([pictures[images[key][0]] for key in batch])]

    def embeddings(batch: Sequence[str]) -> list[torch.Tensor]:
        found = pipeline.encode_prompts(
            [pictures[pairs[key][0]] for key in batch], [pairs[key][1] for key in batch]
        )
        return [row[mask].clone() for row, mask in zip(found.embeds, found.mask, strict=True)]

    in_batches(list(images), _IMAGE_BATCH, latents)
    in_batches(list(pairs), _PROMPT_BATCH, embeddings)
