"""From trained weights to an adapter folder: a file that diffusers loads as trained, and its card.

Keys are ``transformer.<module>.lora_A.weight`` and ``.lora_B.weight`` (``unet.`` in the older families); the
scale is folded into B, so a loader that takes alpha for the rank applies exactly the trained update. With
DoRA there is ``.lora_magnitude_vector``, always in fp32, for it replaces the length of the base's own rows;
the scale stands before B A inside the norm, too, so folding it is exact there as well.

Tags in the header tell people what the file is; no loader may depend on them. None of them states an alpha:
loaders that believe one would apply it a second time. There is no date, so that equal trainings give equal
bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from registry.digest import Digest, digest_bytes
from registry.families import family
from registry.manifest import (
    CARD_NAME,
    WEIGHTS_NAME,
    AdapterCard,
    Ingredient,
    LoraFacts,
    Provenance,
    TrainingLineage,
)
from trainer.errors import ExportError
from trainer.recipe import Recipe
from trainer.sections import DTYPES
from trainer.stage import new_folder

if TYPE_CHECKING:
    import torch

_TOLERANCE, _MODULE_TOLERANCE = 1e-3, 1e-2
_MAGNITUDE = "lora_magnitude_vector"

# The bases that ModelSpec names more closely than by their family.
_BASES = {
    "Qwen/Qwen-Image-Edit-2509": "Qwen-Image-Edit-2509",
    "Qwen/Qwen-Image-Edit-2511": "Qwen-Image-Edit-2511",
    "stabilityai/stable-diffusion-3.5-medium": "stable-diffusion-3-5-medium",
    "stabilityai/stable-diffusion-3.5-large": "stable-diffusion-3-5-large",
}


@cache
def code_version() -> str:
    """Return name and version of this software, as this process first found them."""
    try:
        return f"adapter-foundry/{metadata.version('adapter-foundry')}"
    except metadata.PackageNotFoundError:
        return "adapter-foundry/0+source"


def folded(weights: Mapping[str, torch.Tensor], recipe: Recipe) -> dict[str, torch.Tensor]:
    """Return the tensors of the file, by key: in the recipe's dtype, with the scale folded into B.

    Raises:
        ExportError: a weight is not finite, or too large for the dtype.
    """
    import torch

    scale = recipe.lora.scale
    result = {}
    for name, value in weights.items():
        factor = scale if name.endswith("lora_B.weight") else 1.0
        dtype = "F32" if name.endswith(_MAGNITUDE) else recipe.lora.dtype
        tensor = (value.detach().float().cpu() * factor).to(getattr(torch, DTYPES[dtype])).contiguous()
        if not torch.isfinite(tensor).all():
            raise ExportError(
                f"{name} has values that {dtype} cannot hold",
                "export as BF16 or F32 (lora.dtype), or train with a lower learning rate",
            )
        result[key(recipe, name)] = tensor
    return result


def key(recipe: Recipe, name: str) -> str:
    """Return what a trained tensor is called in the file; those of text encoders name their part already."""
    facts = family(recipe.base.family)
    return name if name.partition(".")[0] in facts.text_encoders else f"{facts.prefix}.{name}"


def tags(recipe: Recipe, dataset: Digest, size: tuple[int, int] | None = None) -> dict[str, str]:
    """Return what the header of the file tells people about it.

    Args:
        recipe: of the training.
        dataset: its digest.
        size: height and width in pixels that the base is made for; the largest of ``data.sizes`` goes first.

    Those that begin with "modelspec." follow version 1.0.1 of the Stability AI Model Metadata Standard.
    """
    facts = family(recipe.base.family)
    if recipe.data.sizes:
        size = (max(recipe.data.sizes),) * 2
    found = {
        "format": "pt",
        "base": f"{recipe.base.id}@{recipe.base.revision}",
        "recipe": str(recipe.digest),
        "dataset": str(dataset),
        "code": code_version(),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture(recipe)}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": recipe.release.adapter,
    }
    if recipe.release.license.isascii():  # a header of anything else is refused
        found["modelspec.license"] = recipe.release.license
    if size is not None:
        found["modelspec.resolution"] = f"{size[1]}x{size[0]}"
    if facts.prediction != "velocity":  # the standard knows no more than these two
        found["modelspec.prediction_type"] = facts.prediction
    return found


def architecture(recipe: Recipe) -> str:
    """Return the name by which other programs know the base's architecture."""
    return _BASES.get(recipe.base.id, family(recipe.base.family).architecture)


def strength_ratio(
    file: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor], recipe: Recipe
) -> float:
    """Return the length of the exported update along the trained one, over all modules; 1 is exact.

    With an update of zero in both it is 1.
    """
    lengths = _lengths(file, weights, recipe).values()
    along, trained = sum(pair[0] for pair in lengths), sum(pair[1] for pair in lengths)
    return along / trained if trained else 1.0


def weakest(
    file: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor], recipe: Recipe
) -> tuple[str, float]:
    """Return the module whose exported update is farthest from the trained one in length, and their ratio.

    Modules with less than a thousandth of the longest update do not count.
    """
    lengths = _lengths(file, weights, recipe)
    enough = 1e-6 * max((trained for _, trained in lengths.values()), default=0.0)
    ratios = {module: along / trained for module, (along, trained) in lengths.items() if trained > enough}
    return max(ratios.items(), key=lambda item: abs(item[1] - 1), default=("", 1.0))


def _lengths(
    file: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor], recipe: Recipe
) -> dict[str, tuple[float, float]]:
    """Return module -> <trained, exported> and <trained, trained> of the updates."""
    found = {}
    for name, a in weights.items():
        if not name.endswith("lora_A.weight"):
            continue
        b_name = name.replace("lora_A", "lora_B")
        a, b = a.detach().double().cpu(), weights[b_name].detach().double().cpu() * recipe.lora.scale
        x, y = file[key(recipe, name)].double(), file[key(recipe, b_name)].double()
        # <B A, Y X> without forming either product.
        found[name.removesuffix(".lora_A.weight")] = (
            float(((b.T @ y) * (a @ x.T)).sum()),
            float(((b.T @ b) * (a @ a.T)).sum()),
        )
    return found


def card(
    recipe: Recipe, weights: Mapping[str, torch.Tensor], dataset: Digest, base: Digest, license_of_data: str,
    looked_through: Sequence[Ingredient], run_id: str | None, steps: int,
    made_with: Sequence[Ingredient] = (), provenance: Provenance | None = None,
) -> AdapterCard:  # fmt: skip
    """Return what the adapter says about itself; the targets are those that the weights really have.

    Base, dataset, what the dataset was ``made_with`` and the networks that losses looked through are named
    whatever the recipe says. With ``provenance`` others can make it again; the recipe in it may name folders
    and servers.
    """
    facts = family(recipe.base.family)
    kinds = {facts.block_of(name.rsplit(".lora_", 1)[0])[1] for name in weights}
    return AdapterCard(
        base=recipe.base,
        lora=LoraFacts(
            rank=recipe.lora.rank, alpha=recipe.lora.alpha, targets=tuple(sorted(kinds)),
            dtype=recipe.lora.dtype
        ),
        conditioning=recipe.conditioning,
        license=recipe.release.license,
        ingredients=(
            Ingredient(
                name=recipe.base.id, kind="base", license=recipe.base.license,
                source=f"{recipe.base.id}@{recipe.base.revision}", digest=base,
            ),
            Ingredient(
                name=f"{recipe.name} triplets", kind="dataset", license=license_of_data,
                source="trainer.data.build_triplets", digest=dataset,
            ),
            *dict.fromkeys((*made_with, *looked_through)),
            *recipe.release.ingredients,
        ),
        training=TrainingLineage(
            recipe=recipe.digest, dataset=dataset, seed=recipe.seed, steps=steps, code_version=code_version(),
            run_id=run_id, provenance=provenance,
        ),
        description=recipe.release.description,
    )  # fmt: skip


def export(
    recipe: Recipe,
    weights: Mapping[str, torch.Tensor],
    adapter_card: AdapterCard,
    out: Path,
    size: tuple[int, int] | None = None,
) -> Digest:
    """Write the adapter folder ``out`` and prove that it gives back what was trained.

    Args:
        recipe: of the training.
        weights: its weights, or their average.
        adapter_card: what the adapter says about itself.
        out: folder to make, in the place of an older one.
        size: see `tags`.

    Returns:
        the digest of the weights' file.

    Raises:
        ExportError: the file does not have the trained update within 0.1 %, or that of a module within 1 %.
    """
    from safetensors.torch import load, save

    about = tags(recipe, adapter_card.training.dataset, size)
    data = _in_order(save(folded(weights, recipe), metadata=about))
    file = load(data)
    ratio, (module, worst) = strength_ratio(file, weights, recipe), weakest(file, weights, recipe)
    mend = "export as F32 (lora.dtype)"
    if abs(ratio - 1) > _TOLERANCE:
        raise ExportError(f"the exported update has {ratio:.4f} of the trained strength", mend)
    if abs(worst - 1) > _MODULE_TOLERANCE:
        raise ExportError(f"the exported update of {module} has {worst:.4f} of the trained strength", mend)
    with new_folder(out) as folder:
        (folder / WEIGHTS_NAME).write_bytes(data)
        (folder / CARD_NAME).write_text(adapter_card.model_dump_json(indent=1) + "\n", "utf-8")
    return digest_bytes(data)


def _in_order(data: bytes) -> bytes:
    """Return a safetensors file with its tags in order; safetensors puts them in one of chance."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]
