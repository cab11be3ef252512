"""The perceptual distance: the paper's formula, the paper's networks, a gradient of the prediction."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from trainer.errors import BaseModelError
from trainer.identity import Truth
from trainer.perceptual import _STACKS, Stack, distance, load_lpips, perceptual_features
from trainer.portraits import judges
from trainer.sections import LossSection

CPU = torch.device("cpu")
#: torchvision's ``features.N.weight``, by N.
ALEXNET = {
    0: (64, 3, 11, 11),
    3: (192, 64, 5, 5),
    6: (384, 192, 3, 3),
    8: (256, 384, 3, 3),
    10: (256, 256, 3, 3),
}
VGG16 = {
    0: (64, 3), 2: (64, 64), 5: (128, 64), 7: (128, 128), 10: (256, 128), 12: (256, 256), 14: (256, 256),
    17: (512, 256), 19: (512, 512), 21: (512, 512), 24: (512, 512), 26: (512, 512), 28: (512, 512),
}  # fmt: skip


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def truth_of(pictures: np.ndarray) -> Truth:
    return Truth(
        fitted=lambda rows, size: pictures[list(rows)], digests=["sha256:" + "0" * 64] * len(pictures)
    )


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ADAPTER_FOUNDRY_TRAINER_ENCODERS_ROOT", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def alex() -> dict[str, torch.Tensor]:
    """Random weights under the names of torchvision's AlexNet and of the lpips package."""
    tensors = {f"features.{n}.weight": 0.05 * random(*shape, seed=n) for n, shape in ALEXNET.items()}
    tensors |= {f"features.{n}.bias": 0.1 * random(shape[0], seed=n + 50) for n, shape in ALEXNET.items()}
    for number, shape in enumerate(ALEXNET.values()):
        tensors[f"lin{number}.model.1.weight"] = random(1, shape[0], 1, 1, seed=number).abs()
    return tensors


def test_the_distance_of_known_maps() -> None:
    first, second = [torch.tensor([3.0, 4.0]).view(1, 2, 1, 1)], [torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)]
    weights = [torch.tensor([1.0, 10.0])]
    assert float(distance(first, second, weights)) == pytest.approx(0.4**2 + 10 * 0.8**2)
    assert float(distance(first, [5 * first[0]], weights)) == pytest.approx(
        0, abs=1e-9
    )  # length does not count
    half = [torch.cat([first[0], second[0]], 3)], [torch.cat([second[0], second[0]], 3)]
    assert float(distance(*half, weights)) == pytest.approx((0.4**2 + 10 * 0.8**2) / 2)  # the mean of places
    twice = distance(first * 2, second * 2, weights * 2)
    assert float(twice) == pytest.approx(2 * (0.4**2 + 10 * 0.8**2))  # layers add up


def test_a_place_without_features_has_a_finite_gradient() -> None:
    nothing = torch.zeros(1, 2, 1, 1, requires_grad=True)
    distance([nothing], [torch.ones(1, 2, 1, 1)], [torch.ones(2)]).sum().backward()
    assert bool(torch.isfinite(nothing.grad).all())


@pytest.mark.parametrize(("name", "shapes"), [("lpips-alex", ALEXNET), ("lpips-vgg", VGG16)])
def test_the_stacks_are_torchvisions(name: str, shapes: dict[int, tuple[int, ...]]) -> None:
    with torch.device("meta"):
        stack = Stack(_STACKS[name])
    found = {key: tuple(value.shape) for key, value in stack.state_dict().items()}
    expected = {f"features.{n}.weight": (*one, 3, 3)[:4] for n, one in shapes.items()}
    expected |= {f"features.{n}.bias": one[:1] for n, one in shapes.items()}
    assert found == expected


@pytest.mark.parametrize(
    ("name", "sides", "widths"),
    [
        ("lpips-alex", [15, 7, 3, 3, 3], [64, 192, 384, 256, 256]),
        ("lpips-vgg", [64, 32, 16, 8, 4], [64, 128, 256, 512, 512]),
    ],
)
def test_the_maps_are_those_of_the_paper(name: str, sides: list[int], widths: list[int]) -> None:
    with torch.device("meta"):
        maps = Stack(_STACKS[name])(torch.zeros(2, 3, 64, 64))
    assert [tuple(one.shape) for one in maps] == [
        (2, width, side, side) for side, width in zip(sides, widths, strict=True)
    ]


def test_lpips_of_random_weights_is_the_formula_by_hand(root: Path, alex: dict[str, torch.Tensor]) -> None:
    save_file(alex, root / "lpips-alex.safetensors")
    pictures = np.random.default_rng(0).integers(0, 255, (2, 72, 64, 3), np.uint8)
    net = perceptual_features(truth_of(pictures), CPU, LossSection(weight=1, encoder="lpips-alex"))
    predicted = (0.5 * random(2, 3, 72, 64)).requires_grad_()
    found = net.distance(predicted, [1, 0])

    def maps(pixels: torch.Tensor) -> list[torch.Tensor]:
        mean, std = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
        x, result = (pixels - mean[:, None, None]) / std[:, None, None], []
        for n, stride, padding in ((0, 4, 2), (3, 1, 2), (6, 1, 1), (8, 1, 1), (10, 1, 1)):
            if n in (3, 6):
                x = torch.nn.functional.max_pool2d(x, 3, 2)
            kernel, bias = alex[f"features.{n}.weight"], alex[f"features.{n}.bias"]
            x = torch.relu(torch.nn.functional.conv2d(x, kernel, bias, stride, padding))
            result.append(x / x.norm(dim=1, keepdim=True))
        return result

    true = torch.from_numpy(pictures[[1, 0]]).permute(0, 3, 1, 2) / 127.5 - 1
    expected = sum(
        ((f - g).square() * alex[f"lin{n}.model.1.weight"]).sum(1).mean((1, 2))
        for n, (f, g) in enumerate(zip(maps(predicted.detach()), maps(true), strict=True))
    )
    assert torch.allclose(found, expected, rtol=1e-4)
    found.sum().backward()
    assert float(predicted.grad.abs().sum()) > 0
    assert not any(parameter.requires_grad for parameter in net._stack.parameters())


def test_the_portraits_compare_the_judges_convolutions() -> None:
    pictures = np.random.default_rng(0).integers(0, 255, (1, 64, 64, 3), np.uint8)
    net = perceptual_features(truth_of(pictures), CPU, LossSection(weight=1))
    assert [len(one) for one in net._weights] == [
        one.shape[1] for one in net._stack(torch.zeros(1, 3, 64, 64))
    ]
    assert len(net._weights) == 5
    same = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1
    assert float(net.distance(same, [0])) == pytest.approx(0, abs=1e-6)
    farther = [float(net.distance(same + scale * random(1, 3, 64, 64), [0])) for scale in (0.05, 0.2, 0.8)]
    assert farther == sorted(farther)
    assert 0 < farther[0] < farther[-1] < 2
    larger = torch.nn.functional.interpolate(same, scale_factor=2)
    assert net.distance(larger, [0]).shape == (1,)  # the truth of a larger picture is read at its size
    assert net.ingredients[0].source.endswith(judges.path("label").name)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda t: t.pop("lin3.model.1.weight"), "lin3"),
        (lambda t: t.pop("features.3.bias"), r"features\.3\.bias"),
        (lambda t: t.update({"classifier.1.weight": torch.zeros(2)}), "classifier"),
        (lambda t: t.update({"features.0.weight": torch.zeros(64, 3, 5, 5)}), r"features\.0\.weight"),
        (lambda t: t.update({"lin0.model.1.weight": torch.zeros(1, 63, 1, 1)}), "channels"),
    ],
)
def test_a_file_of_another_network_is_explained(change, why: str, alex: dict, tmp_path: Path) -> None:
    tensors = dict(alex)
    change(tensors)
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(BaseModelError, match=why) as caught:
        load_lpips("lpips-alex", tmp_path / "x.safetensors", CPU)
    assert "docs/licences.md" in caught.value.mend


def test_a_damaged_file_is_explained(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"\x80\x04 a pickle, say")
    with pytest.raises(BaseModelError, match="is not the network"):
        load_lpips("lpips-alex", tmp_path / "x.safetensors", CPU)
