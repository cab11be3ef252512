"""ONNX networks as torch modules, for gradients with regard to their input.

onnx2torch converts the graph. It imports torchvision for two detection operators that no judge has; where
torchvision is not installed, a stand-in is there during that one import only.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from trainer.errors import BaseModelError


@contextmanager
def _torchvision_stand_in() -> Iterator[None]:
    if importlib.util.find_spec("torchvision") is not None:
        yield
        return
    package, operators = ModuleType("torchvision"), ModuleType("torchvision.ops")

    def roi_align(*_: object, **__: object) -> None:
        raise ImportError("this network aligns regions of interest, which needs torchvision")

    operators.roi_align = roi_align  # type: ignore[attr-defined]
    package.ops = operators  # type: ignore[attr-defined]
    names = {"torchvision": package, "torchvision.ops": operators}
    sys.modules.update(names)
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


def _converter() -> Callable[[Any], torch.nn.Module]:
    with _torchvision_stand_in():
        return importlib.import_module("onnx2torch").convert


def load(file: Path, *, penultimate: bool = False) -> torch.nn.Module:
    """Load an ONNX network with frozen weights.

    Args:
        file: the network; one input, one output.
        penultimate: give what goes into the last layer instead of the output: features rather than classes.

    Raises:
        BaseModelError: there is no such network, or onnx2torch knows one of its operators not.
    """
    return _converted(file, lambda graph: [graph.node[-1].input[0]] if penultimate else [])


def load_stack(file: Path) -> torch.nn.Module:
    """Load the convolutions of an ONNX network with frozen weights.

    Returns:
        a network that gives a list of maps [N, C, H, W]: what each rectified convolution puts out, in order.

    Raises:
        BaseModelError: as for `load`, or none of its convolutions is rectified.
    """

    def rectified(graph: Any) -> list[str]:
        convolved = {node.output[0] for node in graph.node if node.op_type == "Conv"}
        found = [n.output[0] for n in graph.node if n.op_type == "Relu" and n.input[0] in convolved]
        if not found:
            raise ValueError("it has no convolution that a ReLU follows")
        return found

    return _converted(file, rectified)


def _converted(file: Path, outputs: Callable[[Any], list[str]]) -> torch.nn.Module:
    """Return the network cut off at some of its values; at its own output if there are none."""
    import onnx
    from onnx.checker import ValidationError

    try:
        model = onnx.load(str(file))
        if wanted := outputs(model.graph):
            extractor = onnx.utils.Extractor(onnx.shape_inference.infer_shapes(model))
            model = extractor.extract_model([model.graph.input[0].name], wanted)
        network = _converter()(model)
    except (OSError, ValueError, NotImplementedError, ValidationError) as error:
        raise BaseModelError(
            f"the network {file} cannot be used for gradients: {error}",
            "use an ONNX file whose operators onnx2torch converts, such as an ArcFace encoder's",
        ) from error
    return network.eval().requires_grad_(False)
