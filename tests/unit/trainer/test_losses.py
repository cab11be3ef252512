"""Losses: known values, gradients that arrive, and nothing decoded for a loss without weight."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from serving.pipelines.base import PromptEmbeds
from serving.pipelines.process import Flow
from trainer import losses
from trainer.data.batches import Batch, Draw, StepPlan
from trainer.data.triplets import Member, Triplet
from trainer.identity import FeatureNet, Truth
from trainer.launch import train
from trainer.losses import (
    LOSSES,
    Selection,
    StepOutputs,
    combined,
    flow_matching,
    min_snr,
    select,
    symmetric_info_nce,
)
from trainer.perceptual import PerceptualNet
from trainer.recipe import Recipe
from trainer.sections import LossName, LossSection

SIDE = 8


class Decoder:
    """A base whose latents are pixels."""

    family = "fake"
    process = Flow()
    calls = 0

    def decode(self, latents: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        self.calls += 1
        return latents.reshape(len(latents), 3, SIDE, SIDE)


class Maps(nn.Module):
    """One layer of features: the pixels."""

    def forward(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        return [pixels]


def truth_of(pictures: np.ndarray) -> Truth:
    return Truth(fitted=lambda rows, size: pictures[list(rows)], digests=[f"sha256:{n}" for n in range(99)])


def batch(sigma: list[float], keeps: tuple[bool, ...] | None = None) -> Batch:
    pairs = len(sigma)
    source = torch.Generator().manual_seed(0)
    shape = (2 * pairs, 3, SIDE * SIDE)
    return Batch(
        slots=tuple(range(pairs)),
        size=(SIDE, SIDE),
        target=torch.rand(shape, generator=source),
        source=torch.rand(shape, generator=source),
        noise=torch.randn((pairs, *shape[1:]), generator=source).repeat(2, 1, 1),
        sigma=torch.tensor(sigma).repeat(2),
        prompts=PromptEmbeds(
            embeds=torch.zeros(2 * pairs, 1, 1), mask=torch.ones(2 * pairs, 1, dtype=torch.bool)
        ),
        images=tuple(range(2 * pairs)),
        keeps=keeps or (False,) * (2 * pairs),
    )


def plan_of(given: Batch) -> StepPlan:
    count = len(given.slots)
    members = [Member(image=row, expression="happy", intensity=1.0) for row in given.images]
    draws = [
        Draw(
            slot=slot,
            triplet=Triplet(split="train", identity="x", source=0, a=members[slot], b=members[count + slot]),
            keeps=(given.keeps[slot], given.keeps[count + slot]),
            sigma=round(float(given.sigma[slot]), 4),
            noise=torch.Generator(),
        )
        for slot in range(count)
    ]
    return StepPlan(size=(SIDE, SIDE), draws=tuple(draws))


def outputs(given: Batch, predicted: torch.Tensor, settings: dict[LossName, LossSection]) -> StepOutputs:
    pictures = (given.target.reshape(-1, 3, SIDE, SIDE).permute(0, 2, 3, 1).numpy() + 1) * 127.5
    truth = truth_of(np.round(pictures).astype(np.uint8))
    net = FeatureNet(nn.Flatten(), SIDE, truth)
    return StepOutputs(
        batch=given,
        noisy=Flow().noisy(given.target, given.noise, given.sigma),
        predicted=predicted,
        pipeline=Decoder(),  # type: ignore[arg-type]
        features={
            "contrastive": net,
            "identity": net,
            "perceptual": PerceptualNet(Maps(), [torch.ones(3)], 0, truth),
        },
        selection=select(plan_of(given), settings),
    )


def test_every_loss_of_a_recipe_is_registered() -> None:
    assert set(LOSSES) == set(LossName.__args__)


def test_the_true_velocity_has_no_loss() -> None:
    given = batch([0.3, 0.7])
    exact = outputs(given, given.noise - given.target, {})
    assert float(flow_matching(exact, LossSection(weight=1)).mean()) == 0
    off_by_two = outputs(given, given.noise - given.target + 2, {})
    assert float(flow_matching(off_by_two, LossSection(weight=1)).mean()) == pytest.approx(4)


def test_info_nce_of_known_vectors() -> None:
    truth = torch.eye(2)[None]
    right = float(symmetric_info_nce(truth, truth, 0.07))
    assert right == pytest.approx(math.log(1 + math.exp(-1 / 0.07)), abs=1e-6)
    assert float(symmetric_info_nce(torch.zeros(1, 2, 2), truth, 0.07)) == pytest.approx(math.log(2))
    swapped = float(symmetric_info_nce(truth.flip(1), truth, 0.07))
    assert swapped == pytest.approx(1 / 0.07, abs=1e-3)


def test_info_nce_looks_in_both_directions() -> None:
    same = torch.nn.functional.normalize(torch.ones(1, 2, 2), dim=-1)  # both members predicted alike
    one = torch.tensor([[[1.0, 0.0], [0.6, 0.8]]])
    assert float(symmetric_info_nce(same, one, 0.5)) == pytest.approx(
        float(symmetric_info_nce(one, same, 0.5))
    )


def test_perfect_predictions_keep_the_identity() -> None:
    settings = {"identity": LossSection(weight=1, max_sigma=0.5)}
    given = batch([0.2])
    exact = outputs(given, given.noise - given.target, settings)
    assert float(LOSSES["identity"](exact, settings["identity"])) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("name", ["flow_matching", "contrastive", "identity", "perceptual"])
def test_gradients_reach_the_prediction(name: LossName) -> None:
    settings = {name: LossSection(weight=1)}
    given = batch([0.2, 0.4])
    velocity = torch.zeros_like(given.target).requires_grad_()
    total, parts = combined(outputs(given, velocity, settings), settings)
    total.backward()
    assert set(parts) == {name}
    assert velocity.grad is not None
    assert float(velocity.grad.abs().sum()) > 0


def test_a_loss_without_weight_costs_no_decode() -> None:
    settings = {
        "flow_matching": LossSection(weight=1),
        "contrastive": LossSection(weight=0),
        "identity": LossSection(weight=0),
    }
    made = outputs(batch([0.1, 0.2]), torch.zeros(4, 3, SIDE * SIDE), settings)
    combined(made, settings)
    assert made.decodes == 0
    assert made.pipeline.calls == 0  # type: ignore[attr-defined]


def test_two_looking_losses_share_one_decode() -> None:
    settings = {
        "contrastive": LossSection(weight=1, pairs=2, max_sigma=0.5),
        "identity": LossSection(weight=1, pairs=1, max_sigma=0.3),
    }
    made = outputs(batch([0.4, 0.2, 0.45, 0.9]), torch.zeros(8, 3, SIDE * SIDE), settings)
    combined(made, settings)
    assert made.selection == Selection(slots={"contrastive": (1, 0), "identity": (1,)})
    assert (made.decodes, made.pipeline.calls) == (4, 1)  # type: ignore[attr-defined]
    assert made.pictures("identity")[0] == [1, 5]  # rows of the dataset, which are those of the batch here


@pytest.mark.parametrize(
    ("sigma", "keeps", "expected"),
    [
        ([0.9, 0.8], None, ()),  # too much noise for all
        ([0.9, 0.1], None, (1,)),  # each pair is judged by its own noise
        ([0.3, 0.1, 0.2], None, (1, 2)),  # the least noise first, two at most
        ([0.1, 0.2], (True, False, False, False), (1,)),  # member a of the first pair keeps the source
        ([0.1, 0.2], (False, False, False, True), (0,)),
    ],
)
def test_pairs_are_gated_one_by_one(
    sigma: list[float], keeps: tuple[bool, ...] | None, expected: tuple[int, ...]
) -> None:
    settings = {"contrastive": LossSection(weight=1, pairs=2, max_sigma=0.5)}
    assert select(plan_of(batch(sigma, keeps)), settings).slots["contrastive"] == expected


def test_without_a_pair_the_looking_losses_are_zero() -> None:
    settings = {"contrastive": LossSection(weight=1), "identity": LossSection(weight=1)}
    made = outputs(batch([0.9]), torch.zeros(2, 3, SIDE * SIDE), settings)
    assert float(combined(made, settings)[0]) == 0
    assert made.decodes == 0


def test_auxiliary_networks_are_frozen_and_the_truth_is_seen_once() -> None:
    class Counting(nn.Module):
        seen = 0

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3 * SIDE * SIDE, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen += len(x)
            return self.linear(x.flatten(1))

    network = Counting()
    net = FeatureNet(network, SIDE, truth_of(np.zeros((5, SIDE, SIDE, 3), np.uint8)))
    for _ in range(2):
        net.of_truth([1, 3, 1], (SIDE, SIDE), torch.device("cpu"))
    assert network.seen == 2
    assert not any(parameter.requires_grad for parameter in network.parameters())


class Seeing(FeatureNet):
    """Finds no face in some rows."""

    takes_faces = True

    def __init__(self, network: nn.Module, truth: Truth, blind: set[int]) -> None:
        super().__init__(network, SIDE, truth)
        self.blind = blind

    def sees(self, row: int, size: tuple[int, int]) -> bool:
        return row not in self.blind


def test_a_pair_counts_by_those_of_its_members_that_show_a_face() -> None:
    settings = {"identity": LossSection(weight=1, pairs=3)}
    given = batch([0.2, 0.1, 0.3, 0.4])  # members a are the rows 0 to 3 of the data, members b 4 to 7
    velocity = torch.randn(given.target.shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
    made = outputs(given, velocity, settings)
    truth = made.features["identity"]._truth
    values = {}
    for blind in [set(), {0, 1, 5}]:
        net = Seeing(nn.Flatten(), truth, blind)
        made = outputs(given, velocity, settings)
        made.features = {"identity": net}
        made.selection = select(plan_of(given), settings, {"identity": net})
        values[len(blind)] = dict(
            zip(made.selection.slots["identity"], LOSSES["identity"](made, settings["identity"]), strict=True)
        )
        assert made.selection.unseen == ((1, 1, 0) if blind else ())  # once each, in the order they were seen
        assert made.unseen == len(blind)
    # Of pair 1 no member shows a face, so the fourth takes its place; of pair 0 member b counts alone.
    assert list(values[0]) == [1, 0, 2]
    assert list(values[3]) == [0, 2, 3]
    assert values[3][2].item() == pytest.approx(values[0][2].item())
    values[3][0].backward()
    assert float(velocity.grad[0].abs().sum()) == 0
    assert float(velocity.grad[4].abs().sum()) > 0
    rows, pixels = made.pictures("identity")
    alone = 1 - (net(pixels, rows) * net.of_truth(rows, (SIDE, SIDE), pixels.device)).sum(-1)
    assert values[3][0].item() == pytest.approx(alone[rows.index(4)].item())


def test_nothing_to_see_is_a_loss_of_zero_with_a_gradient() -> None:
    settings = {"identity": LossSection(weight=1)}
    given = batch([0.2])
    velocity = torch.zeros_like(given.target).requires_grad_()
    made = outputs(given, velocity, settings)
    net = Seeing(nn.Flatten(), made.features["identity"]._truth, {0, 1})
    made.features = {"identity": net}
    for selection in (
        Selection(slots={"identity": (0,)}),
        select(plan_of(given), settings, {"identity": net}),
    ):
        made.selection = selection
        total, _ = combined(made, settings)
        total.backward()
        assert float(total.detach()) == 0
        assert float(velocity.grad.abs().sum()) == 0


@pytest.mark.parametrize(
    ("prediction", "snr", "expected"),
    [
        ("epsilon", [1e-6, 0.5, 5.0, 50.0], [1.0, 1.0, 1.0, 0.1]),
        ("v", [0.5, 5.0, 50.0], [1 / 3, 5 / 6, 5 / 51]),
        ("v", [0.0], [0.0]),
    ],
)
def test_min_snr_weighs_as_its_paper_says(prediction: str, snr: list[float], expected: list[float]) -> None:
    assert min_snr(torch.tensor(snr), 5.0, prediction).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_denoising_weighs_each_sample_by_its_own_noise(prediction: str) -> None:
    """With weights by SNR, an error in epsilon or v is the clipped error in x_0: Hang et al., section 3.4."""

    class Variance(Flow):
        """Variance preserving: alpha = cos, sigma = sin."""

        def snr(self, level: torch.Tensor) -> torch.Tensor:
            return 1 / torch.tan(level * math.pi / 2) ** 2

    process = Variance()
    process.prediction = prediction  # type: ignore[assignment]
    settings = {"denoising": LossSection(weight=1)}
    given = batch([0.1, 0.8])
    for gamma in (0.0, 5.0):
        made = outputs(given, torch.zeros_like(given.target), settings)
        made.pipeline.process = process  # type: ignore[misc]
        made.snr_gamma = gamma
        plain = process.target(given.target, given.noise, given.sigma).square().flatten(1).mean(1)
        snr = process.snr(given.sigma)
        weights = min_snr(snr, gamma, prediction) if gamma else torch.ones_like(snr)
        expected = (plain * weights).reshape(2, 2).mean(0)
        assert torch.allclose(LOSSES["denoising"](made, settings["denoising"]), expected)
    # One sample is clipped, the other is not.
    assert bool((snr > 5).any() and (snr < 5).any())


def looking(names: tuple[LossName, ...], sigma: list[float]) -> tuple[StepOutputs, torch.Tensor, dict]:
    settings = {name: LossSection(weight=1, pairs=8) for name in names}
    given = batch(sigma)
    velocity = torch.randn(given.target.shape, generator=torch.Generator().manual_seed(2)).requires_grad_()
    return outputs(given, velocity, settings), velocity, settings


def test_three_looking_losses_share_one_decode_and_read_the_truth_lazily() -> None:
    names: tuple[LossName, ...] = ("contrastive", "identity", "perceptual")
    made, _, settings = looking(names, [0.2, 0.3, 0.9])
    asked: list[int] = []
    truth = made.features["perceptual"]._truth

    def fitted(rows, size):
        asked.extend(rows)
        return truth.fitted(rows, size)

    lazy = Truth(fitted=fitted, digests=truth.digests)
    made.features = {
        "contrastive": FeatureNet(nn.Flatten(), SIDE, lazy),
        "identity": FeatureNet(nn.Flatten(), SIDE, lazy),
        "perceptual": PerceptualNet(Maps(), [torch.ones(3)], 0, lazy),
    }
    combined(made, settings)
    assert (made.decodes, made.pipeline.calls) == (4, 1)  # type: ignore[attr-defined]
    assert sorted(asked) == sorted([0, 1, 3, 4] * 3)  # not the rows of the third pair, which is too noisy
    quiet, _, off = looking(names, [0.2, 0.3, 0.9])
    quiet.features = made.features
    combined(quiet, {name: LossSection(weight=0) for name in off})
    assert len(asked) == 12
    assert quiet.pipeline.calls == 0  # type: ignore[attr-defined]


class Curved(Decoder):
    """A decoder whose backward needs what its forward computed."""

    def decode(self, latents: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        return super().decode(latents, size).tanh()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_decode_in_parts_is_the_same_decode(checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for at_once in (losses.DECODED_AT_ONCE, 2 * SIDE * SIDE):
        monkeypatch.setattr(losses, "DECODED_AT_ONCE", at_once)
        made, velocity, settings = looking(("perceptual",), [0.2, 0.3, 0.4])
        made.checkpointing, made.pipeline = checkpointing, Curved()  # type: ignore[assignment]
        total, _ = combined(made, settings)
        forward = made.pipeline.calls  # type: ignore[attr-defined]
        total.backward()
        again = made.pipeline.calls - forward  # type: ignore[attr-defined]
        assert again == (forward if checkpointing else 0)
        assert made.decodes == 6
        results.append((forward, total.detach(), velocity.grad))
    assert [forward for forward, _, _ in results] == [1, 3]
    assert torch.equal(results[0][1], results[1][1])
    assert torch.equal(results[0][2], results[1][2])


def test_micro_batches_add_up() -> None:
    """What the losses of parts of a step add up to is the loss of the step."""
    names: tuple[LossName, ...] = ("contrastive", "identity", "perceptual", "flow_matching")
    whole, velocity, settings = looking(names, [0.2, 0.3, 0.4])
    expected, _ = combined(whole, settings)
    total = torch.zeros(())
    for pair in range(3):
        rows = [pair, 3 + pair]
        full = whole.batch
        part = replace(
            full, slots=(pair,), target=full.target[rows], source=full.source[rows], noise=full.noise[rows],
            sigma=full.sigma[rows], prompts=full.prompts.rows(rows), images=(pair, 3 + pair),
            keeps=(False, False),
        )  # fmt: skip
        made = replace(
            whole, batch=part, noisy=whole.noisy[rows], predicted=velocity[rows], decodes=0, _pixels=None
        )
        total = total + combined(made, settings)[0]
    assert float(total.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_all_losses_train_together_and_recomputing_the_decode_changes_nothing(
    tiny_recipe: Recipe, tiny_run: Path, tiny_base: Path, tiny_pipeline, tmp_path: Path
) -> None:
    values = tiny_recipe.model_dump(mode="json")
    values["optimiser"] |= {"steps": 4, "warmup_steps": 1}
    looking = {"pairs": 2, "max_sigma": 1.0}
    values["losses"] = {
        "flow_matching": {"weight": 1.0},
        "contrastive": {"weight": 0.05, **looking},
        "identity": {"weight": 0.1, **looking},
        "perceptual": {"weight": 0.1, **looking},
    }
    curves = []
    for checkpointing in (False, True):
        values["running"] |= {"checkpointing": checkpointing}
        out = tmp_path / str(checkpointing)
        recipe = Recipe.model_validate(values)
        result = train(
            recipe,
            tiny_run / "dataset",
            tiny_run / "cache",
            tiny_base,
            out,
            pipeline=tiny_pipeline,
            track=False,
        )
        assert result.facts["decodes"] > 0
        curves.append([json.loads(line) for line in (out / "loss.jsonl").read_text("utf-8").splitlines()])
    for plain, again in zip(*curves, strict=True):
        assert {"flow_matching", "contrastive", "identity", "perceptual"} < set(plain)
        assert "unseen" not in plain  # no loss looks for faces
        assert plain["loss"] == pytest.approx(again["loss"], rel=1e-4)
        assert plain["perceptual"] > 0
