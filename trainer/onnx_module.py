"""ONNX networks as differentiable torch modules.

Judges and identity encoders come as ONNX files, and a loss needs their gradient with respect to the picture.
A network of convolutions is a short list of operators, so they are written out here: no converter is needed,
and glintr100 of InsightFace is made of the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from trainer.errors import BaseModelError

Attributes = Mapping[str, Any]
Operator = Callable[[Sequence[Any], Attributes], torch.Tensor]


def _padding(attributes: Attributes) -> tuple[int, int]:
    top, left, bottom, right = attributes.get("pads", (0, 0, 0, 0))
    if (top, left) != (bottom, right) or attributes.get("auto_pad", b"NOTSET") != b"NOTSET":
        raise BaseModelError(
            "an ONNX network pads one side more than the other", "export it with symmetric padding"
        )
    return top, left


def _conv(x: Sequence[torch.Tensor], a: Attributes) -> torch.Tensor:
    bias = x[2] if len(x) > 2 else None
    strides, dilations = a.get("strides", (1, 1)), a.get("dilations", (1, 1))
    return F.conv2d(x[0], x[1], bias, tuple(strides), _padding(a), tuple(dilations), a.get("group", 1))


def _batch_norm(x: Sequence[torch.Tensor], a: Attributes) -> torch.Tensor:
    return F.batch_norm(x[0], x[3], x[4], x[1], x[2], False, 0.0, a.get("epsilon", 1e-5))


def _gemm(x: Sequence[torch.Tensor], a: Attributes) -> torch.Tensor:
    left = x[0].T if a.get("transA") else x[0]
    right = x[1].T if a.get("transB") else x[1]
    product = a.get("alpha", 1.0) * (left @ right)
    return product + a.get("beta", 1.0) * x[2] if len(x) > 2 else product


def _axes(x: Sequence[torch.Tensor], a: Attributes) -> tuple[int, ...]:
    return tuple(a["axes"] if "axes" in a else x[1].tolist())


def _prelu(x: Sequence[torch.Tensor], a: Attributes) -> torch.Tensor:
    return torch.where(x[0] >= 0, x[0], x[0] * x[1])


OPERATORS: Mapping[str, Operator] = {
    "Add": lambda x, a: x[0] + x[1],
    "BatchNormalization": _batch_norm,
    "Conv": _conv,
    "Div": lambda x, a: x[0] / x[1],
    "Dropout": lambda x, a: x[0],
    "Flatten": lambda x, a: x[0].flatten(a.get("axis", 1)),
    "Gemm": _gemm,
    "GlobalAveragePool": lambda x, a: x[0].mean((2, 3), keepdim=True),
    "Identity": lambda x, a: x[0],
    "MatMul": lambda x, a: x[0] @ x[1],
    "MaxPool": lambda x, a: F.max_pool2d(x[0], a["kernel_shape"], a.get("strides"), _padding(a)),
    "Mul": lambda x, a: x[0] * x[1],
    "PRelu": _prelu,
    "Reshape": lambda x, a: x[0].reshape(tuple(x[1].long())),
    "Relu": lambda x, a: F.relu(x[0]),
    "Sigmoid": lambda x, a: torch.sigmoid(x[0]),
    "Squeeze": lambda x, a: x[0].squeeze(_axes(x, a)),
    "Sub": lambda x, a: x[0] - x[1],
    "Unsqueeze": lambda x, a: x[0].unsqueeze(_axes(x, a)[0]),
}


class OnnxModule(torch.nn.Module):
    """Runs an ONNX graph with torch, so that gradients flow to its input; its weights are frozen.

    Args:
        file: the network, with one input and one output.
        penultimate: give what goes into the last fully connected layer instead of the output.

    Raises:
        BaseModelError: the file is missing, or has an operator that is not known.
    """

    def __init__(self, file: Path, *, penultimate: bool = False) -> None:
        import onnx

        super().__init__()
        if not file.is_file():
            raise BaseModelError(
                f"the network {file} is missing", "install the package again with its data files"
            )
        graph = onnx.load(str(file)).graph
        tensors = {item.name: item for item in graph.initializer}
        for node in graph.node:
            if node.op_type == "Constant":
                tensors[node.output[0]] = onnx.helper.get_node_attr_value(node, "value")
        weights = {name: onnx.numpy_helper.to_array(item) for name, item in tensors.items()}
        self._nodes = [
            (
                node.op_type,
                tuple(name for name in node.input if name),
                node.output[0],
                {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute},
            )
            for node in graph.node
            if node.op_type != "Constant"
        ]
        unknown = sorted({kind for kind, *_ in self._nodes} - set(OPERATORS))
        if unknown:
            raise BaseModelError(
                f"{file.name} uses operators that cannot be differentiated here: {', '.join(unknown)}",
                "add them to trainer.onnx_module.OPERATORS",
            )
        self._slots = {name: f"weight_{number}" for number, name in enumerate(weights)}
        for name, slot in self._slots.items():
            self.register_buffer(slot, torch.from_numpy(weights[name].copy()))
        self._input = next(item.name for item in graph.input if item.name not in weights)
        self._output = graph.output[0].name
        if penultimate:
            self._output = [inputs[0] for kind, inputs, *_ in self._nodes if kind in ("Gemm", "MatMul")][-1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the graph on one input; its shape is the network's own."""
        values: dict[str, torch.Tensor] = {name: getattr(self, slot) for name, slot in self._slots.items()}
        values[self._input] = x
        for kind, inputs, output, attributes in self._nodes:
            values[output] = OPERATORS[kind]([values[name] for name in inputs], attributes)
            if output == self._output:
                break
        return values[self._output]
