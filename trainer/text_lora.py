"""LoRA in the text encoders, for recipes that ask for it in ``lora.text_encoder``.

The prompts of a step then depend on what is trained and cannot come from the cache: the distinct ones of each
batch are encoded with gradients and blended as ever (`trainer.data.batches`). The weights stand in the one
mapping of parameters under their part of the pipeline, ``text_encoder.text_model.….lora_A.weight``, which is
also what they are called in the file.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from registry.families import family
from trainer import lora
from trainer.errors import BaseModelError

if TYPE_CHECKING:
    import torch

    from serving.pipelines.base import EditPipeline, PromptEmbeds, Size
    from trainer.recipe import Recipe


def inject(pipeline: EditPipeline, recipe: Recipe) -> dict[str, torch.nn.Parameter]:
    """Put the LoRA layers of a recipe into the text encoders of its base.

    Layers that nobody reads are left out, as in the denoiser: they would never get a gradient.

    Returns:
        see `trainer.lora.wrap`; nothing if the recipe trains no text encoder.

    Raises:
        BaseModelError: the base has no text encoder to train, or none of its modules is of a kind.
    """
    if not recipe.lora.text_encoder:
        return {}
    found: dict[str, torch.nn.Parameter] = {}
    for part, model in _encoders(pipeline, recipe).items():
        component = component_of(part, model)
        names = target_modules(model, component, recipe)
        found |= lora.wrap(model, names, recipe.lora, recipe.seed, component)
    return found


def remove(pipeline: EditPipeline, recipe: Recipe) -> None:
    """Take the LoRA layers out again; the text encoders are as they were."""
    if recipe.lora.text_encoder:
        for model in _encoders(pipeline, recipe).values():
            lora.remove(model)


def encoder(pipeline: EditPipeline, recipe: Recipe) -> Callable[[Sequence[str], Size], PromptEmbeds] | None:
    """Return what encodes prompts with gradients, or None if the cached embeddings stay right."""
    if not recipe.lora.text_encoder:
        return None
    from PIL import Image

    # The families with text encoders to train do not look at the pictures beside the prompts.
    blank = Image.new("RGB", (1, 1))
    return lambda prompts, size: pipeline.encode_prompts([blank] * len(prompts), prompts, size)


def component_of(part: str, model: torch.nn.Module) -> str:
    """Return what stands before the names of a text encoder's modules in a file."""
    # transformers has flattened the model without a projection; files keep the name that it had.
    return part if hasattr(model, "text_model") else f"{part}.text_model"


def target_modules(model: torch.nn.Module, component: str, recipe: Recipe) -> list[str]:
    """Return the names, inside of a text encoder, of the modules that get a LoRA.

    Args:
        model: the text encoder.
        component: stands before each of its names in a file, for example "text_encoder.text_model".
        recipe: names the kinds.

    Raises:
        BaseModelError: the encoder has no module of a kind.
    """
    import torch

    facts = family(recipe.base.family)
    part = component.partition(".")[0]
    linear = {
        f"{component}.{name}": name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and facts.is_target(f"{component}.{name}")
    }
    kind_of = {full: facts.block_of(full)[1].removeprefix(f"{part}.") for full in linear}
    known = sorted(set(kind_of.values()))
    for kind in recipe.lora.text_encoder:
        if kind not in known:
            near = difflib.get_close_matches(kind, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise BaseModelError(
                f"the {part} of the base has no modules {kind!r} for a LoRA{hint}",
                "choose lora.text_encoder from: " + ", ".join(known),
            )
    silent = facts.silent(linear)
    return [
        name
        for full, name in linear.items()
        if kind_of[full] in recipe.lora.text_encoder and full not in silent
    ]


def _encoders(pipeline: EditPipeline, recipe: Recipe) -> Mapping[str, torch.nn.Module]:
    """Return the text encoders of a base that may be trained, by their part of the pipeline."""
    parts = family(recipe.base.family).text_encoders
    present: Mapping[str, torch.nn.Module] = getattr(pipeline, "text_encoders", {})
    found = {part: model for part, model in present.items() if part in parts}
    if not found:
        raise BaseModelError(
            f"the family {recipe.base.family} has no text encoder that a LoRA can be trained in",
            "leave lora.text_encoder out of the recipe",
        )
    return found
