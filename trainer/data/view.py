"""How a base sees a dataset: the keys of the cache, and what a training needs to find there.

A latent is kept under the digest of (encoder, picture, size), a prompt's embedding under that of (encoder,
prompt) and, where the text encoder sees the picture, of that and its size too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from registry.digest import Digest, digest_bytes
from registry.manifest import canonical_json
from serving.pipelines.base import Size
from trainer.data.buckets import resolutions, sizes_of
from trainer.data.dataset import Dataset
from trainer.data.digests import file_digest
from trainer.recipe import Recipe

if TYPE_CHECKING:
    from serving.pipelines.base import EditPipeline

_ENCODERS = ("vae", "text_encoder", "tokenizer", "processor")  # and their numbered fellows
_FORMAT = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """How a base sees pictures and prompts: all that decides what is cached.

    Attributes:
        encoder: digest of its encoders; see `encoder_digest`.
        family: whose code does the encoding.
        size: its own height and width in pixels.
        multiple: both sides of a size are multiples of so many pixels.
        sees_image: whether a prompt's embedding depends on the picture beside it.
        numbers: dtype of what is cached, "float32" or "bfloat16".
    """

    encoder: Digest
    family: str
    size: Size
    multiple: int
    sees_image: bool
    numbers: str

    @classmethod
    def of(cls, pipeline: EditPipeline, base_path: Path, recipe: Recipe) -> View:
        """Return the view of a loaded base that lies in ``base_path``."""
        return cls(
            encoder=encoder_digest(base_path),
            family=pipeline.family,
            size=pipeline.size,
            multiple=pipeline.multiple,
            sees_image=pipeline.sees_image,
            numbers=numbers(recipe),
        )

    def latent_key(self, image: Digest, size: Size) -> str:
        """Return the key of a picture's latents; the middle of the picture, at that size."""
        return self._key("latent", image, *size)

    def prompt_key(self, image: Digest, size: Size, prompt: str) -> str:
        """Return the key of a prompt's embedding beside a picture that is trained at that size."""
        return self._key("prompt", json.dumps(prompt), *((image, *size) if self.sees_image else ()))

    def _key(self, *parts: object) -> str:
        what = (*parts, self.encoder, self.family, self.numbers, _FORMAT)
        return hashlib.sha256(" ".join(map(str, what)).encode()).hexdigest()


def pooled_key(prompt: str) -> str:
    """Return the key of the pooled vector that belongs to a prompt's embedding."""
    return f"{prompt}.pooled"


def numbers(recipe: Recipe) -> str:
    """Return the dtype in which this machine encodes for a recipe: bf16 where the base computes in bf16."""
    import torch

    own = "bf16" if torch.cuda.is_available() else "fp32"
    compute = recipe.precision.compute
    return {"bf16": "bfloat16", "fp32": "float32"}[own if compute == "auto" else compute]


def encoder_digest(base_path: Path) -> Digest:
    """Return the digest of those parts of a base that decide latents and embeddings."""
    folders = [path for path in base_path.glob("*/") if path.name.rstrip("_23") in _ENCODERS]
    return tree_digest(base_path, [*folders, base_path / "resolution.json"])


def tree_digest(root: Path, places: Iterable[Path]) -> Digest:
    """Return the digest of files and folders below ``root``: of their names and contents."""
    files = sorted(
        path
        for place in places
        for path in ([place] if place.is_file() else place.rglob("*"))
        if path.is_file()
    )
    return digest_bytes(
        canonical_json({path.relative_to(root).as_posix(): file_digest(path).hex for path in files})
    )


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a training reads from the cache: key -> what is encoded for it.

    Attributes:
        latents: key -> row of the picture, size.
        prompts: key -> row of the source beside it, its size, prompt.
    """

    latents: dict[str, tuple[int, Size]] = field(default_factory=dict)
    prompts: dict[str, tuple[int, Size, str]] = field(default_factory=dict)

    @classmethod
    def of(cls, data: Dataset, recipe: Recipe, view: View) -> Needs:
        """Return all that a dataset needs under a view."""
        spec, found = recipe.conditioning, cls()
        texts = [spec.prompt(name) for name in (spec.neutral, *spec.expressions)]
        wanted = resolutions(recipe.data, view.size, view.multiple)
        places = {(size, triplet) for triplet in data.triplets
                  for size in sizes_of(data.sizes[triplet.source], wanted)}  # fmt: skip
        for size, row in sorted({(size, row) for size, triplet in places for row in triplet.rows}):
            found.latents[view.latent_key(data.image_digests[row], size)] = (row, size)
        for size, row in sorted({(size, triplet.source) for size, triplet in places}):
            for text in texts:
                found.prompts[view.prompt_key(data.image_digests[row], size, text)] = (row, size, text)
        return found

    @property
    def keys(self) -> list[str]:
        """All keys, latents first."""
        return [*self.latents, *self.prompts]
