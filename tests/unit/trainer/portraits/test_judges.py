"""The judges on people and pictures that they have never seen."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.portraits.judge_training import verification_auc
from trainer.portraits.judges import ExpressionJudge, IdentityEncoder, path, resized
from trainer.portraits.renderer import EXPRESSIONS, identity, one_hot, pose, render

SEEDS = range(95_000, 95_020)


def person(seed: int) -> object:
    return identity(seed, "human" if seed % 3 else "anime")


@pytest.fixture(scope="module")
def shown() -> np.ndarray:
    """20 people x 12 expressions at full intensity."""
    return np.stack(
        [render(person(seed), one_hot(name), 64, pose(seed)) for seed in SEEDS for name in EXPRESSIONS]
    )


@pytest.mark.parametrize("kind", ["label", "evaluation"])
def test_expressions_are_read(kind: str, shown: np.ndarray) -> None:
    read = ExpressionJudge.load(kind)(shown)
    assert read.shape == (240, 12)
    assert (read.argmax(1) == np.tile(np.arange(12), 20)).mean() >= 0.95


def test_the_evaluation_judge_reads_intensity() -> None:
    amounts = np.linspace(0, 1, 6)
    pictures = [
        render(person(s), one_hot(n, a), 64, pose(s)) for s in SEEDS[:6] for n in EXPRESSIONS for a in amounts
    ]
    read = ExpressionJudge.load("evaluation")(np.stack(pictures)).reshape(6, 12, 6, 12)
    own = np.stack([read[:, k, :, k] for k in range(12)], 1)
    assert np.corrcoef(np.broadcast_to(amounts, own.shape).ravel(), own.ravel())[0, 1] >= 0.95


def test_the_two_expression_judges_are_different_models(shown: np.ndarray) -> None:
    label, evaluation = (ExpressionJudge.load(kind)(shown[:24]) for kind in ("label", "evaluation"))
    assert np.abs(label - evaluation).mean() > 0.005


def test_identities_are_told_apart(shown: np.ndarray) -> None:
    vectors = IdentityEncoder.load()(shown)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(len(shown)), abs=1e-5)
    assert verification_auc(vectors, np.repeat(np.arange(20), 12)) >= 0.99


def test_the_identity_encoder_loads_through_insightface(shown: np.ndarray) -> None:
    from insightface import model_zoo

    model = model_zoo.get_model(str(path("identity")), providers=["CPUExecutionProvider"])
    model.prepare(-1)
    large = resized(shown[:4], 112)
    theirs = model.get_feat([np.ascontiguousarray(picture[:, :, ::-1]) for picture in large])
    theirs = theirs / np.linalg.norm(theirs, axis=1, keepdims=True)
    assert type(model).__name__ == "ArcFaceONNX"
    assert theirs == pytest.approx(IdentityEncoder.load()(large), abs=1e-4)


@pytest.mark.parametrize("images", [np.zeros((2, 64, 64, 3), np.float32), np.zeros((64, 64, 3), np.uint8)])
def test_other_images_are_refused(images: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint8"):
        ExpressionJudge.load("label")(images)


def test_the_area_under_the_curve_of_known_cases() -> None:
    perfect = np.array([[1.0, 0], [1, 0], [0, 1], [0, 1]])
    assert verification_auc(perfect, np.array([0, 0, 1, 1])) == 1.0
    assert verification_auc(perfect, np.array([0, 1, 0, 1])) < 0.5
