"""From trained weights to an adapter folder: a file that diffusers loads as trained, and its card.

Keys are ``transformer.<module>.lora_A.weight`` and ``.lora_B.weight``; alpha is folded into B, so a loader
that takes alpha for the rank applies exactly the trained update. Tags in the header tell people what the file
is; no loader may depend on them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    TrainingLineage,
)
from trainer.errors import ExportError
from trainer.recipe import Recipe
from trainer.sections import DTYPES
from trainer.stage import new_folder

if TYPE_CHECKING:
    import torch

_TOLERANCE = 1e-3


def code_version() -> str:
    """Return name and version of this software."""
    try:
        return f"adapter-foundry/{metadata.version('adapter-foundry')}"
    except metadata.PackageNotFoundError:
        return "adapter-foundry/0+source"


def folded(weights: Mapping[str, torch.Tensor], recipe: Recipe) -> dict[str, torch.Tensor]:
    """Return the tensors of the file, by key: in the recipe's dtype, with alpha / rank folded into B.

    Raises:
        ExportError: a weight is not finite, or too large for the dtype.
    """
    import torch

    scale = recipe.lora.scale
    dtype = getattr(torch, DTYPES[recipe.lora.dtype])
    result = {}
    for name, value in weights.items():
        factor = scale if name.endswith("lora_B.weight") else 1.0
        tensor = (value.detach().float().cpu() * factor).to(dtype).contiguous()
        if not torch.isfinite(tensor).all():
            raise ExportError(
                f"{name} has values that {recipe.lora.dtype} cannot hold",
                "export as BF16 or F32 (lora.dtype), or train with a lower learning rate",
            )
        result[key(recipe, name)] = tensor
    return result


def key(recipe: Recipe, name: str) -> str:
    """Return what a trained tensor is called in the file; those of text encoders name their part already."""
    facts = family(recipe.base.family)
    return name if name.partition(".")[0] in facts.text_encoders else f"{facts.prefix}.{name}"


def tags(recipe: Recipe, dataset: Digest) -> dict[str, str]:
    """Return what the header of the file tells people about it."""
    return {
        "format": "pt",
        "base": f"{recipe.base.id}@{recipe.base.revision}",
        "recipe": str(recipe.digest),
        "dataset": str(dataset),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{recipe.base.family}/lora",
        "modelspec.title": recipe.release.adapter,
        "modelspec.license": recipe.release.license,
    }


def strength_ratio(
    file: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor], recipe: Recipe
) -> float:
    """Return the length of the exported update along the trained one, over all modules; 1 is exact.

    With an update of zero in both it is 1.
    """
    scale = recipe.lora.scale
    along = length = 0.0
    for name, a in weights.items():
        if not name.endswith("lora_A.weight"):
            continue
        b_name = name.replace("lora_A", "lora_B")
        a, b = a.detach().double().cpu(), weights[b_name].detach().double().cpu() * scale
        x, y = file[key(recipe, name)].double(), file[key(recipe, b_name)].double()
        # <B A, Y X> without forming either product.
        along += float(((b.T @ y) * (a @ x.T)).sum())
        length += float(((b.T @ b) * (a @ a.T)).sum())
    return along / length if length else 1.0


def card(
    recipe: Recipe, weights: Mapping[str, torch.Tensor], dataset: Digest, base: Digest, license_of_data: str,
    looked_through: Sequence[Ingredient], run_id: str | None, steps: int,
) -> AdapterCard:  # fmt: skip
    """Return what the adapter says about itself; the targets are those that the weights really have.

    Base, dataset and the networks that losses looked through are named whatever the recipe says.
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
            *looked_through,
            *recipe.release.ingredients,
        ),
        training=TrainingLineage(
            recipe=recipe.digest, dataset=dataset, seed=recipe.seed, steps=steps, code_version=code_version(),
            run_id=run_id,
        ),
        description=recipe.release.description,
    )  # fmt: skip


def export(
    recipe: Recipe, weights: Mapping[str, torch.Tensor], adapter_card: AdapterCard, out: Path
) -> Digest:
    """Write the adapter folder ``out`` and prove that it gives back what was trained.

    Returns:
        the digest of the weights' file.

    Raises:
        ExportError: the written file does not have the trained update within 0.1 %.
    """
    from safetensors.torch import load, save

    data = save(folded(weights, recipe), metadata=tags(recipe, adapter_card.training.dataset))
    ratio = strength_ratio(load(data), weights, recipe)
    if abs(ratio - 1) > _TOLERANCE:
        raise ExportError(
            f"the exported update has {ratio:.4f} of the trained strength", "export as F32 (lora.dtype)"
        )
    with new_folder(out) as folder:
        (folder / WEIGHTS_NAME).write_bytes(data)
        (folder / CARD_NAME).write_text(adapter_card.model_dump_json(indent=1) + "\n", "utf-8")
    return digest_bytes(data)
