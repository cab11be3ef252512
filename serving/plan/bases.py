"""The module trees of base models on the meta device, and what samples of a step give them.

The shapes come from a base's own folder, or for the bases of `registry.families.KNOWN_BASES` from
``configs/*.json``, the values of the published config files with their source.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from registry.families import family
from serving.errors import BaseNotFound

if TYPE_CHECKING:
    import torch

Size = tuple[int, int]

_LAYOUT = "give a folder in diffusers layout"
_CLIP_TOKENS, _T5_TOKENS, _SD3_T5_TOKENS = 77, 512, 256
_QWEN_WORDS, _QWEN_PATCH, _QWEN_CONDITION = 24, 28, 384


@dataclass(frozen=True, kw_only=True, slots=True)
class Base:
    """A base model without weights.

    Attributes:
        family: its family.
        parts: component of the pipeline ("transformer", "vae", "text_encoder" …) -> values of its config file
            with ``_class_name``.
        pixels: side of the square that it was made for.
        condition_pixels: side at which a text encoder that sees pictures sees them.
        prompt_tokens: length that prompts are padded to, where the base says it; None is the family's.
    """

    family: str
    parts: Mapping[str, Mapping[str, Any]]
    pixels: int
    condition_pixels: int = _QWEN_CONDITION
    prompt_tokens: int | None = None

    @property
    def denoiser(self) -> str:
        """Name of the component that carries the LoRA."""
        return family(self.family).prefix

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """Names of the text encoders."""
        return tuple(name for name in self.parts if name.startswith("text_encoder"))

    @property
    def downscale(self) -> int:
        """Pixels of one side that become one latent."""
        vae = self.parts["vae"]
        steps = vae.get("temperal_downsample", vae.get("block_out_channels", ())[1:])
        return int(2 ** len(steps))

    def build(self, part: str, dtype: torch.dtype) -> torch.nn.Module:
        """Return a component in ``dtype`` on the meta device: shapes without weights.

        Raises:
            BaseNotFound: neither diffusers nor transformers knows its class.
        """
        import diffusers
        import torch
        import transformers

        values = dict(self.parts[part])
        name = str(values.pop("_class_name"))
        with torch.device("meta"):
            if hasattr(diffusers, name):
                found: torch.nn.Module = getattr(diffusers, name).from_config(values)
            elif hasattr(transformers, name):
                kind = getattr(transformers, name)
                found = kind(kind.config_class(**values))
            else:
                raise BaseNotFound(
                    f"neither diffusers nor transformers has the class {name} of the base's {part}",
                    "update them, or give another base",
                )
        # Not found.to(dtype): diffusers warns of precision there, and there are no numbers to lose.
        return torch.nn.Module.to(found.requires_grad_(False).eval(), dtype)


class Named(Protocol):
    """What says which base is meant: a recipe's section, or an adapter's reference."""

    @property
    def id(self) -> str:
        """Of the base."""

    @property
    def family(self) -> str:
        """Of the base."""


def load(base: Named, folder: Path | None) -> Base:
    """Return the shapes of a base: of ``folder``, or of the published configuration of that name.

    Raises:
        BaseNotFound: there is no folder and no published configuration, or the folder is no pipeline.
    """
    if folder is not None:
        return _from_folder(base.family, folder)
    shipped = resources.files("serving.plan") / "configs" / f"{base.id.rpartition('/')[2]}.json"
    if shipped.is_file():
        value = json.loads(shipped.read_text("utf-8"))
        if value["base"] == base.id:
            family_name = base.family
            return Base(family=family_name, parts=value["parts"], pixels=family(family_name).pixels)
    raise BaseNotFound(
        f"the shapes of {base.id} are not known here", "give the folder of the base with --base"
    )


def _from_folder(family_name: str, folder: Path) -> Base:
    parts: dict[str, dict[str, Any]] = {}
    try:
        index = json.loads((folder / "model_index.json").read_text("utf-8"))
        for name, entry in index.items():
            config = folder / name / "config.json"
            if isinstance(entry, list) and entry[1] and config.is_file():
                parts[name] = {**json.loads(config.read_text("utf-8")), "_class_name": entry[1]}
        local = folder / "resolution.json"
        sides = json.loads(local.read_text("utf-8")) if local.is_file() else {}
    except (OSError, ValueError) as error:
        raise BaseNotFound(f"{folder} is no base model: {error}", _LAYOUT) from None
    missing = {family(family_name).prefix, "vae"} - set(parts)
    if missing:
        raise BaseNotFound(f"the base in {folder} has no {', '.join(sorted(missing))}", _LAYOUT)
    return Base(
        family=family_name,
        parts=parts,
        pixels=sides.get("pixels", family(family_name).pixels),
        condition_pixels=sides.get("condition_pixels", _QWEN_CONDITION),
        prompt_tokens=sides.get("prompt_tokens"),
    )


def samples(base: Base, size: Size, count: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return what the denoiser of ``base`` is called with for some samples, on the meta device.

    Args:
        base: the base.
        size: height and width in pixels.
        count: how many samples.
        dtype: of the latents and embeddings.
    """
    import torch

    config = base.parts[base.denoiser]
    high, wide = (side // base.downscale for side in size)

    def floats(*shape: int) -> torch.Tensor:
        return torch.empty(count, *shape, device="meta", dtype=dtype)

    text = text_tokens(base)
    given: dict[str, Any] = {"timestep": floats()}
    width = config["cross_attention_dim" if base.denoiser == "unet" else "joint_attention_dim"]
    given["encoder_hidden_states"] = floats(text, width)
    if base.denoiser == "unet":
        given["sample"] = floats(config["in_channels"], high, wide)
        if config.get("addition_embed_type") == "text_time":
            pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
            given["added_cond_kwargs"] = {"text_embeds": floats(pooled), "time_ids": floats(6)}
        return given
    if "pooled_projection_dim" in config and base.family != "qwen-image-edit":  # which ignores it
        given["pooled_projections"] = floats(config["pooled_projection_dim"])
    if base.family == "sd3":
        return {**given, "hidden_states": floats(config["in_channels"], high, wide)}
    pictures = 2 if family(base.family).edits else 1
    tokens = high // 2 * (wide // 2) * pictures
    given["hidden_states"] = floats(tokens, config["in_channels"])
    if base.family == "qwen-image-edit":
        return {**given, "img_shapes": [[(1, high // 2, wide // 2)] * pictures] * count}
    axes = len(config.get("axes_dims_rope", (0, 0, 0)))
    given["img_ids"] = torch.empty(tokens, axes, device="meta")
    given["txt_ids"] = torch.empty(text, axes, device="meta")
    if config.get("guidance_embeds"):
        given["guidance"] = floats()
    return given


def text_tokens(base: Base) -> int:
    """Return how many text tokens a prompt has.

    Qwen's are the words (about 24) and the picture's merged patches; the others pad to a fixed length.
    """
    if base.prompt_tokens is not None:
        return base.prompt_tokens
    if base.family == "qwen-image-edit":
        return _QWEN_WORDS + max(1, round(base.condition_pixels / _QWEN_PATCH)) ** 2
    if base.family in ("sd15", "sdxl"):
        return _CLIP_TOKENS
    return _CLIP_TOKENS + _SD3_T5_TOKENS if base.family == "sd3" else _T5_TOKENS


def latents(base: Base, size: Size, count: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the latents of some pictures as the VAE decodes them, on the meta device."""
    import torch

    vae = base.parts["vae"]
    high, wide = (side // base.downscale for side in size)
    shape = (vae["z_dim"], 1, high, wide) if "z_dim" in vae else (vae["latent_channels"], high, wide)
    return torch.empty(count, *shape, device="meta", dtype=dtype)
