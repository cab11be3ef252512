"""ONNX networks give the same numbers in torch as in onnxruntime, and a gradient."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from trainer import onnx_module
from trainer.errors import BaseModelError
from trainer.portraits import judges
from trainer.portraits.judge_training import ExpressionNet, IdentityNet


def exported(net: torch.nn.Module, side: int, file: Path) -> Path:
    torch.manual_seed(0)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d | torch.nn.BatchNorm1d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net.eval(), (torch.zeros(2, 3, side, side),), str(file), dynamo=False, opset_version=17,
            input_names=["image"], dynamic_axes={"image": {0: "N"}},
        )  # fmt: skip
    return file


@pytest.mark.parametrize(("net", "side"), [(ExpressionNet(4), 64), (IdentityNet((4, 6, 8, 8, 8), 16), 112)])
def test_torch_and_onnxruntime_agree(net: torch.nn.Module, side: int, tmp_path: Path) -> None:
    file = exported(net, side, tmp_path / "net.onnx")
    x = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(1))
    expected = onnxruntime.InferenceSession(str(file)).run(None, {"image": x.numpy()})[0]
    ours = onnx_module.load(file)
    x.requires_grad_()
    found = ours(x)
    assert np.abs(found.detach().numpy() - expected).max() < 1e-4
    found.sum().backward()
    assert float(x.grad.abs().sum()) > 0
    assert all(parameter.grad is None for parameter in ours.parameters())


def test_the_features_are_what_the_last_layer_sees(tmp_path: Path) -> None:
    net = ExpressionNet(4)
    file = exported(net, 64, tmp_path / "net.onnx")
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(onnx_module.load(file, penultimate=True)(x), net.layers[:-1](x), atol=1e-4)


@pytest.mark.parametrize("kind", ["label", "identity"])
def test_the_shipped_networks_can_be_differentiated(kind: judges.Kind) -> None:
    side = judges.IDENTITY_SIDE if kind == "identity" else 64
    x = torch.zeros(1, 3, side, side, requires_grad=True)
    onnx_module.load(judges.path(kind))(x).square().sum().backward()
    assert float(x.grad.abs().sum()) > 0


def test_an_unknown_operator_is_an_explained_error(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Cos", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )
    onnx.save(helper.make_model(graph), str(tmp_path / "cos.onnx"))
    with pytest.raises(BaseModelError, match="Cos"):
        onnx_module.load(tmp_path / "cos.onnx")
    with pytest.raises(BaseModelError, match="No such file"):
        onnx_module.load(tmp_path / "nothing.onnx")


def test_a_stack_gives_every_rectified_convolution(tmp_path: Path) -> None:
    net = ExpressionNet(4)
    stack = onnx_module.load_stack(exported(net, 64, tmp_path / "net.onnx"))
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = stack(x)
        assert len(found) == 5
        y = x
        for layer in net.layers[:15]:
            y = layer(y)
            if isinstance(layer, torch.nn.ReLU):
                assert torch.allclose(found.pop(0), y, atol=1e-4)
    assert not found


def test_networks_without_such_layers_are_explained(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )
    onnx.save(helper.make_model(graph), str(tmp_path / "relu.onnx"))
    with pytest.raises(BaseModelError, match="no convolution"):
        onnx_module.load_stack(tmp_path / "relu.onnx")
