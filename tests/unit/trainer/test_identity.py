"""What losses look through: whole pictures of any size, the truth once and by itself, a bounded memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from trainer import identity
from trainer.identity import FeatureNet, Truth, contrastive_features, identity_features
from trainer.portraits.judges import IdentityEncoder
from trainer.portraits.renderer import render
from trainer.portraits.samples import draw_identity
from trainer.sections import LossSection

CPU = torch.device("cpu")


def pictures(count: int, height: int = 64, width: int = 64) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 255, (count, height, width, 3), np.uint8)


class Reader:
    """Gives pictures and remembers which were asked for."""

    def __init__(self, given: np.ndarray) -> None:
        self.given, self.asked = given, []

    def truth(self) -> Truth:
        return Truth(fitted=self, digests=["sha256:" + "0" * 64] * len(self.given))

    def __call__(self, rows, size) -> np.ndarray:
        self.asked += [(row, size) for row in rows]
        height, width = size
        return self.given[list(rows), :height, :width]


class Mixing(nn.Module):
    """A network whose answer for one picture depends on the others of its batch, as rounding does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) + x.sum(0, keepdim=True).flatten(1)


def test_the_truth_does_not_depend_on_what_was_asked_before() -> None:
    """A resumed run asks for other pictures first and must see the same."""
    given = pictures(4, 8, 8)
    first, second = (FeatureNet(Mixing(), 8, Reader(given).truth()) for _ in range(2))
    first.of_truth([0, 1, 2], (8, 8), CPU)
    assert torch.equal(first.of_truth([3, 1], (8, 8), CPU), second.of_truth([3, 1], (8, 8), CPU))


def test_each_true_picture_is_read_once_at_each_size() -> None:
    reader = Reader(pictures(3))
    net = FeatureNet(nn.Flatten(), 8, reader.truth())
    for size in ((64, 64), (32, 64), (64, 64)):
        for _ in range(2):
            net.of_truth([2, 0, 2], size, CPU)
    assert sorted(reader.asked) == [(row, size) for row in (0, 2) for size in ((32, 64), (64, 64))]


def test_the_memory_is_bounded_and_what_is_asked_for_is_always_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "_REMEMBERED", 3)
    reader = Reader(pictures(6))
    net = FeatureNet(nn.Flatten(), 4, reader.truth())
    everything = net.of_truth(range(6), (64, 64), CPU)
    assert everything.shape[0] == 6
    assert len(net._known) == 3
    assert torch.equal(net.of_truth([0], (64, 64), CPU), everything[:1])


def test_pictures_are_made_smaller_without_skipping_pixels() -> None:
    net = FeatureNet(nn.Flatten(), 8, Reader(pictures(1)).truth())
    pixels = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (net(pixels, [0]) ** 2 * torch.arange(192)).sum().backward()
    assert bool((pixels.grad != 0).all())


def test_the_portraits_encoder_knows_a_person_as_onnxruntime_does() -> None:
    rng = np.random.default_rng(5)
    given = np.stack([render(draw_identity(rng), np.zeros(12, np.float32), 64) for _ in range(3)])
    net = identity_features(Reader(given).truth(), CPU, LossSection(weight=1))
    found = net.of_truth([0, 1, 2], (64, 64), CPU).numpy()
    assert np.sum(found * IdentityEncoder.load()(given), axis=1) == pytest.approx(1, abs=0.02)
    assert net.sees(0, (64, 64))
    assert not net.takes_faces


@pytest.mark.parametrize("make", [identity_features, contrastive_features])
def test_the_shipped_encoders_give_unit_vectors_with_a_gradient(make) -> None:
    net = make(Reader(pictures(2)).truth(), CPU, LossSection(weight=1))
    pixels = (torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1).requires_grad_()
    found = net(pixels, [0, 1])
    assert torch.allclose(found.norm(dim=1), torch.ones(2), atol=1e-5)
    (found * torch.arange(found.shape[1])).sum().backward()
    assert float(pixels.grad.abs().sum()) > 0
    assert [one.license for one in net.ingredients] == ["Apache-2.0"]
