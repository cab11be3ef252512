"""Training and ONNX export of the portrait world's judges."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from trainer.portraits.autoencoder import to_float
from trainer.portraits.expressions import EXPRESSIONS, one_hot
from trainer.portraits.identities import Identity
from trainer.portraits.judges import IDENTITY_SIDE
from trainer.portraits.renderer import render
from trainer.portraits.samples import draw_identity, draw_pose, recolour

Say = Callable[[str], None]


class ExpressionNet(nn.Module):
    """A small convolutional regressor: [N, 3, 64, 64] in [-1, 1] -> 12 intensities."""

    def __init__(self, width: int):
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for i, out in enumerate((width, 2 * width, 3 * width, 4 * width)):
            size = 5 if i == 0 else 3
            layers += [nn.Conv2d(channels, out, size, 2, size // 2), nn.BatchNorm2d(out), nn.ReLU()]
            channels = out
        layers += [nn.Conv2d(channels, channels, 3, 1, 1), nn.BatchNorm2d(channels), nn.ReLU(), nn.Flatten()]
        self.layers = nn.Sequential(*layers, nn.Linear(channels * 16, 128), nn.ReLU(), nn.Linear(128, 12))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.layers(image)


class _ResidualBlock(nn.Module):
    """The pre-activation block of IResNet, ArcFace's backbone (Duta et al., arXiv 2004.04989)."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(inputs),
            nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.PReLU(outputs),
            nn.Conv2d(outputs, outputs, 3, 2, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.skip = nn.Sequential(nn.Conv2d(inputs, outputs, 1, 2, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x) + self.skip(x)


class IdentityNet(nn.Module):
    """A small IResNet: [N, 3, 112, 112] in [-1, 1] -> embedding [N, 128]."""

    def __init__(self, widths: tuple[int, ...] = (16, 24, 40, 64, 96), dim: int = 128):
        super().__init__()
        stem = [nn.Conv2d(3, widths[0], 3, 2, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.PReLU(widths[0])]
        blocks = [_ResidualBlock(a, b) for a, b in pairwise(widths)]
        self.body = nn.Sequential(*stem, *blocks, nn.BatchNorm2d(widths[-1]), nn.Flatten())
        self.head = nn.Linear(widths[-1] * 16, dim)
        self.norm = nn.BatchNorm1d(dim, affine=False)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.norm(self.head(self.body(image)))


def _draw_expression(rng: np.random.Generator) -> np.ndarray:
    """Neutral 6 %, one expression 59 %, a blend of two 35 %."""
    kind = rng.random()
    if kind < 0.06:
        return np.zeros(12, np.float32)
    first, second = rng.choice(EXPRESSIONS, size=2, replace=False)
    if kind < 0.65:
        return one_hot(str(first), float(rng.uniform(0.05, 1.4)))
    return one_hot(str(first), float(rng.uniform(0.1, 1.0))) + one_hot(
        str(second), float(rng.uniform(0.1, 1.0))
    )


def _expression_data(count: int, seed: int, single: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng([seed, 21])
    images, vectors = [], []
    for i in range(count):
        vector = one_hot(EXPRESSIONS[i % 12]) if single else _draw_expression(rng)
        images.append(render(recolour(draw_identity(rng), rng), vector, 64, draw_pose(rng)))
        vectors.append(vector)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.from_numpy(np.stack(vectors))


def _spoil(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Blur by a random resize, shift colours and add noise, so that a judge also reads decoded edits."""
    if torch.rand((), generator=generator) < 0.5:
        side = int(torch.randint(28, 64, (), generator=generator))
        small = F.interpolate(x, size=(side, side), mode="area")
        x = F.interpolate(small, size=x.shape[-2:], mode="bilinear")
    gain = 1 + 0.06 * torch.randn((len(x), 1, 1, 1), generator=generator)
    noise = (
        0.08 * torch.rand((len(x), 1, 1, 1), generator=generator) * torch.randn(x.shape, generator=generator)
    )
    return x * gain + 0.04 * torch.randn((len(x), 3, 1, 1), generator=generator) + noise


def _one_cycle(share: float, peak: float) -> float:
    return peak * (
        share / 0.15 if share < 0.15 else max(0.002, 0.5 * (1 + math.cos(math.pi * (share - 0.15) / 0.85)))
    )


def train_expression_judge(
    file: Path, width: int, minutes: float, seed: int, say: Say = print
) -> dict[str, float]:
    """Train one expression judge on fresh portraits and export it.

    Returns:
        ``top1`` over the 12 expressions at full intensity on unseen people, ``error`` the mean absolute error
        of the asked expression's intensity.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    net = ExpressionNet(width)
    optimiser = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=0.02)
    images, vectors = _expression_data(6000, seed)
    begun, step = time.monotonic(), 0
    while (share := (time.monotonic() - begun) / 60 / minutes) < 1:
        fresh, truth = _expression_data(32, seed * 1_000_003 + step)
        slots = torch.randint(len(images), (32,), generator=generator)
        images[slots], vectors[slots] = fresh, truth
        rows = torch.randint(len(images), (96,), generator=generator)
        loss = 12 * F.mse_loss(net(_spoil(to_float(images[rows]), generator)), vectors[rows])
        optimiser.param_groups[0]["lr"] = _one_cycle(share, 3e-3)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        step += 1
        if step % 200 == 0:
            say(f"judge {file.stem} {100 * share:3.0f} %  step {step}  loss {loss.item():.4f}")
    net.eval()
    unseen, truth = _expression_data(1200, 0, single=True)
    with torch.no_grad():
        read = net(to_float(unseen))
    asked = truth.argmax(1)
    result = {
        "top1": round(float((read.argmax(1) == asked).float().mean()), 4),
        "error": round(float((read.gather(1, asked[:, None])[:, 0] - 1).abs().mean()), 4),
        "steps": step,
    }
    _export(net, torch.zeros(2, 3, 64, 64), file, "image", "intensities")
    say(f"judge {file.stem}: {result}")
    return result


def _views(people: list[Identity], each: int, seed: int) -> torch.Tensor:
    """`each` pictures of every person, with any expression, pose, background and clothes."""
    rng = np.random.default_rng([seed, 31])
    rows = [
        render(recolour(person, rng), _draw_expression(rng), 64, draw_pose(rng))
        for person in people
        for _ in range(each)
    ]
    return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2)


def _enlarged(pixels: torch.Tensor) -> torch.Tensor:
    return F.interpolate(pixels, size=(IDENTITY_SIDE, IDENTITY_SIDE), mode="bilinear", align_corners=False)


def _arcface(cosine: torch.Tensor, labels: torch.Tensor, margin: float, scale: float = 24.0) -> torch.Tensor:
    """Additive angular margin loss (Deng et al., arXiv 1801.07698, equation 3)."""
    bounded = cosine.clamp(-0.999, 0.999)
    angle = bounded.gather(1, labels[:, None]).acos()
    return F.cross_entropy(scale * bounded.scatter(1, labels[:, None], (angle + margin).cos()), labels)


def verification_auc(vectors: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve of telling pairs of the same person from pairs of two, by cosine."""
    similarity = vectors @ vectors.T
    first, second = np.triu_indices(len(labels), 1)
    scores, same = similarity[first, second], labels[first] == labels[second]
    ranks = scores.argsort().argsort() + 1
    positives = int(same.sum())
    return float(
        (ranks[same].sum() - positives * (positives + 1) / 2) / (positives * (len(same) - positives))
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class IdentityPlan:
    people: int = 500
    each: int = 24
    batch: int = 64
    seed: int = 3


def train_identity_encoder(
    file: Path, minutes: float, plan: IdentityPlan = IdentityPlan(), say: Say = print
) -> dict[str, float]:
    """Train the identity encoder with ArcFace's margin and export it.

    Returns:
        ``auc`` of verification on 100 unseen people.
    """
    torch.manual_seed(plan.seed)
    generator = torch.Generator().manual_seed(plan.seed)
    rng = np.random.default_rng(plan.seed)
    images = _views([draw_identity(rng) for _ in range(plan.people)], plan.each, plan.seed)
    labels = torch.arange(plan.people).repeat_interleave(plan.each)
    net, centres = IdentityNet(), nn.Parameter(0.01 * torch.randn(plan.people, 128, generator=generator))
    optimiser = torch.optim.AdamW([*net.parameters(), centres], 1e-3, weight_decay=0.05)
    begun, step = time.monotonic(), 0
    while (share := (time.monotonic() - begun) / 60 / minutes) < 1:
        rows = torch.randint(len(images), (plan.batch,), generator=generator)
        vectors = net(_enlarged(_spoil(to_float(images[rows]), generator)))
        cosine = F.linear(F.normalize(vectors), F.normalize(centres))
        loss = _arcface(cosine, labels[rows], 0.35 * min(1.0, 2 * share))
        optimiser.param_groups[0]["lr"] = _one_cycle(share, 4e-3)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        step += 1
        if step % 100 == 0:
            say(f"identity {100 * share:3.0f} %  step {step}  loss {loss.item():.3f}")
    net.eval()
    unseen = _views([draw_identity(np.random.default_rng([0, i])) for i in range(100)], 6, 0)
    with torch.no_grad():
        embedded = F.normalize(
            torch.cat([net(_enlarged(to_float(part))) for part in unseen.split(100)])
        ).numpy()
    result = {"auc": round(verification_auc(embedded, np.arange(100).repeat(6)), 5), "steps": step}
    _export(net, torch.zeros(2, 3, IDENTITY_SIDE, IDENTITY_SIDE), file, "input.1", "embedding")
    say(f"identity: {result}")
    return result


def _export(net: nn.Module, example: torch.Tensor, file: Path, inputs: str, outputs: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.onnx.export(
        net.eval(),
        (example,),
        str(file),
        input_names=[inputs],
        output_names=[outputs],
        dynamic_axes={inputs: {0: "N"}, outputs: {0: "N"}},
        opset_version=17,
        dynamo=False,
    )
