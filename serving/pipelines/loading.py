"""How a base's files become a pipeline on a device: one way for every family.

A denoiser whose weights are to be small is read layer by layer from its safetensors files, and each linear
layer becomes small before the next is read: nothing ever holds the denoiser as it was published.
"""

from __future__ import annotations

import importlib.util
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, Self

import torch

from registry.families import family
from serving.errors import UsageError
from serving.frozen import FrozenLinear
from serving.memory import keep_freed_memory
from serving.placement import stored_modules

Weights = Literal["whole", "fp8", "nf4"]
"""How the linear weights of a denoiser's blocks are kept; see `serving.frozen`."""

_FILE: Final = "diffusion_pytorch_model.safetensors"


class Loadable(ABC):
    """The part of an `EditPipeline` that loads it.

    A base's folder may hold ``resolution.json`` with the sizes that it was made for, for example
    ``{"pixels": side}``; the published weights have none and get the family's own.
    """

    family: ClassVar[str]
    diffusers_class: ClassVar[str]

    @classmethod
    @abstractmethod
    def of(cls, pipe: Any, sizes: Mapping[str, int]) -> Self:
        """Return the pipeline around diffusers' own, with the sizes of ``resolution.json``."""

    @classmethod
    def components(cls, source: str, revision: str | None) -> Mapping[str, Any]:
        """Return what the diffusers pipeline is given in the place of what the folder says."""
        return {}

    @classmethod
    def load(
        cls,
        base: str | Path,
        *,
        revision: str | None = None,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        weights: Weights = "whole",
        compute: str | None = None,
    ) -> Self:
        """Load a base from a local folder or from a hub id at ``revision``.

        Args:
            base: the folder or the id.
            revision: of the hub id.
            device: where everything goes.
            dtype: of the weights; None means float32 where a CPU computes and bfloat16 elsewhere.
            weights: how the denoiser's are kept.
            compute: what will compute, if that is not ``device``.

        Raises:
            OSError: the folder or id holds no such pipeline, or only pickled weights.
            UsageError: NF4 is asked for and bitsandbytes is not installed.
        """
        import diffusers

        compute, source = compute or device, str(base)
        if compute == "cpu":
            keep_freed_memory()
        local = Path(source) / "resolution.json"
        sizes = json.loads(local.read_text()) if local.is_file() else {}
        numbers = dtype or (torch.float32 if compute == "cpu" else torch.bfloat16)
        kind = getattr(diffusers, cls.diffusers_class)
        if weights != "whole" and not Path(source).is_dir():
            source, revision = str(kind.download(source, revision=revision, use_safetensors=True)), None
        index = kind.load_config(source, revision=revision)
        # diffusers has an entry of null pass for a missing component only if it is told so.
        given: dict[str, Any] = {
            name: None for name, entry in index.items() if isinstance(entry, list) and not any(entry)
        }
        given |= cls.components(source, revision)
        if weights != "whole":
            part = family(cls.family).prefix
            if part not in index:
                raise OSError(f"{source} has no {part}")
            given[part] = small_denoiser(
                Path(source) / part, index[part][1], weights, numbers, device=device, compute=compute
            )
        # Without use_safetensors a folder that holds only pickled weights would have them unpickled.
        pipe = kind.from_pretrained(source, revision=revision, dtype=numbers, use_safetensors=True, **given)
        return cls.of(pipe.to(device), sizes)


def small_denoiser(
    folder: Path,
    class_name: str,
    weights: Literal["fp8", "nf4"],
    dtype: torch.dtype,
    *,
    device: str,
    compute: str,
) -> torch.nn.Module:
    """Return the denoiser of a folder with the linear layers of its blocks kept small.

    Args:
        folder: of the denoiser: ``config.json`` and safetensors files.
        class_name: of diffusers' class.
        weights: the format.
        dtype: of everything else, and of the computation.
        device: where it goes.
        compute: where the layers are made small.

    Raises:
        OSError: a weight is missing or of the wrong shape.
        UsageError: the format needs a package that is not installed.
    """
    import diffusers
    from accelerate import init_empty_weights

    if weights == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError(
            "weights in NF4 need the package bitsandbytes",
            "install adapter-foundry[nf4], or set weights to fp8",
        )
    kind = getattr(diffusers, class_name)
    with init_empty_weights():
        model: torch.nn.Module = kind.from_config(kind.load_config(str(folder)))
    files = _Files(folder)
    for name in stored_modules(model):
        linear = model.get_submodule(name)
        assert isinstance(linear, torch.nn.Linear)
        _fill(linear, name, files, compute, dtype)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, FrozenLinear(linear, weights).to(device))
    for name, module in model.named_modules():
        if not isinstance(module, FrozenLinear):
            _fill(module, name, files, device, dtype)
    return model


class _Files:
    """The tensors in a folder of safetensors files, read one at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        index = folder / f"{_FILE}.index.json"
        self._where: dict[str, str] = json.loads(index.read_text())["weight_map"] if index.is_file() else {}
        self._open: dict[str, Any] = {}

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor.

        Raises:
            OSError: it is not there.
        """
        from safetensors import SafetensorError, safe_open

        file = self._where.get(name, _FILE)
        try:
            if file not in self._open:
                # An index is not believed when it points out of the folder.
                if Path(file).name != file or not (self._folder / file).is_file():
                    raise OSError(f"{self._folder} holds no weights as safetensors for {name}")
                self._open[file] = safe_open(self._folder / file, "pt")
            found: torch.Tensor = self._open[file].get_tensor(name)
        except SafetensorError as error:
            raise OSError(f"{self._folder / file} cannot be read: {error}") from error
        return found


def _fill(module: torch.nn.Module, name: str, files: _Files, device: str, dtype: torch.dtype) -> None:
    """Read a module's own weights, which are on the meta device.

    Raises:
        OSError: one is missing or of the wrong shape.
    """
    wanted = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
    for leaf, empty in wanted.items():
        if leaf in module._non_persistent_buffers_set:
            continue
        value = files.read(f"{name}.{leaf}" if name else leaf)
        if value.shape != empty.shape:
            raise OSError(f"{name}.{leaf} has the shape {list(value.shape)}, not {list(empty.shape)}")
        value = value.to(device, dtype if value.is_floating_point() else value.dtype)
        if leaf in module._parameters:
            module._parameters[leaf] = torch.nn.Parameter(value, requires_grad=False)
        else:
            module._buffers[leaf] = value
