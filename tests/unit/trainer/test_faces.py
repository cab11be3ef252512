"""Faces: found by InsightFace's own detector, aligned to a fraction of a pixel, with a gradient."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from insightface.model_zoo import SCRFD, ArcFaceONNX
from insightface.utils import face_align
from torch import nn

from fakes import faces as fakes
from trainer import onnx_module
from trainer.errors import BaseModelError
from trainer.faces import Detector, FaceNet, aligned, similarity, template
from trainer.identity import Truth
from trainer.portraits import judges

HEIGHT, WIDTH = 120, 128  # the detector's smallest input is 128 x 128: nothing is resized
SIZE = (HEIGHT, WIDTH)
CPU = torch.device("cpu")
POSES = [(0, 1.0, (60, 60)), (30, 0.9, (58, 64)), (-75, 0.7, (60, 60)), (160, 1.1, (66, 62))]


@pytest.fixture(scope="module")
def scrfd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fakes.detector(tmp_path_factory.mktemp("pack") / "scrfd_10g_bnkps.onnx")


@pytest.fixture(scope="module")
def detector(scrfd: Path) -> Detector:
    return Detector(scrfd)


def as_pixels(*pictures: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def truth_of(*pictures: np.ndarray) -> Truth:
    stacked = np.stack(pictures)
    return Truth(
        fitted=lambda rows, size: stacked[list(rows)],
        digests=[f"sha256:{n:064x}" for n in range(len(stacked))],
    )


class ArcFace(nn.Module):
    """Embeds a crop by its pixels, and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.seen = 0, 0
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, crops: torch.Tensor) -> torch.Tensor:
        assert crops.shape[1:] == (3, 112, 112)
        self.calls, self.seen = self.calls + 1, self.seen + len(crops)
        return nn.functional.avg_pool2d(crops, 8).flatten(1) * self.weight


class Counting:
    """A detector that counts."""

    def __init__(self, detector: Detector) -> None:
        self.detector, self.calls = detector, 0

    def __call__(self, picture: np.ndarray) -> np.ndarray | None:
        self.calls += 1
        return self.detector(picture)


def test_the_fake_has_the_layout_of_scrfd(scrfd: Path) -> None:
    real = SCRFD(str(scrfd))
    assert (real.fmc, real._num_anchors, real.use_kps) == (3, 2, True)
    session = real._session_for_input_size((64, 32))
    found = session.run(None, {"input.1": np.zeros((1, 3, 32, 64), np.float32)})
    assert [one.shape for one in found] == [
        (count, width) for width in (1, 4, 10) for count in (4 * 8 * 2, 2 * 4 * 2, 1 * 2 * 2)
    ]


@pytest.mark.parametrize("pose", POSES)
def test_a_face_lands_on_the_template(detector: Detector, pose: tuple) -> None:
    truth = fakes.posed(*pose)
    picture = fakes.drawn(truth, HEIGHT, WIDTH)
    found = detector(picture)
    assert np.abs(found - truth).max() < 0.25
    crop = aligned(as_pixels(picture), [similarity(found, template())])
    assert np.abs(fakes.dots(crop[0]) - fakes.TEMPLATE).max() < 0.25


@pytest.mark.parametrize("pose", POSES)
def test_the_crop_is_insightfaces(pose: tuple) -> None:
    landmarks = fakes.posed(*pose)
    picture = fakes.drawn(landmarks, HEIGHT, WIDTH)
    expected = face_align.norm_crop(picture, landmarks.astype(np.float32)).astype(np.float64)
    found = aligned(as_pixels(picture), [similarity(landmarks, template())])[0]
    assert np.abs((found.permute(1, 2, 0).numpy() + 1) * 127.5 - expected).max() < 1


def test_the_similarity_is_umeyamas_for_points_that_fit_badly() -> None:
    points = np.random.default_rng(0).normal(size=(5, 2)) * 40 + 100
    a, b = similarity(points, template())
    ours = np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])
    assert np.allclose(ours, face_align.estimate_norm(points.astype(np.float32)), atol=1e-4)


def test_the_detector_sees_red_as_red(detector: Detector) -> None:
    picture = fakes.drawn(fakes.posed(*POSES[0]), HEIGHT, WIDTH)
    assert detector(picture) is not None
    assert detector(picture[..., ::-1]) is None
    assert detector(fakes.nobody(HEIGHT, WIDTH)) is None


def test_large_pictures_are_found_too(detector: Detector) -> None:
    truth = fakes.posed(20, 3.0, (300, 260))
    found = detector(fakes.drawn(truth, 520, 600, radius=10.0))
    assert np.abs(found - truth).max() < 3  # of 300 pixels from eye to mouth; it is resized to 640 and 128


@pytest.mark.parametrize("scale", [2.0, 3.0])
def test_a_large_face_is_made_smaller_to_the_same_places(scale: float) -> None:
    landmarks = fakes.posed(10, scale, (200, 190))
    picture = fakes.drawn(landmarks, 400, 400, radius=5 * scale)
    crop = aligned(as_pixels(picture), [similarity(landmarks, template())])
    assert np.abs(fakes.dots(crop[0]) - fakes.TEMPLATE).max() < 0.2


def test_gradient_reaches_the_face_and_nothing_else() -> None:
    landmarks = fakes.posed(25, 0.5, (50, 60))
    pixels = as_pixels(fakes.drawn(landmarks, HEIGHT, WIDTH)).requires_grad_()
    a, b = similarity(landmarks, template())
    aligned(pixels, [(a, b)]).sum().backward()
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    place = a * (x + 1j * y) + b
    beyond = np.maximum(np.abs(place.real - 55.5), np.abs(place.imag - 55.5)) - 56
    touched = pixels.grad[0].abs().sum(0).numpy() > 0
    assert touched[beyond < 0].all()
    assert not touched[beyond > 2 * abs(a)].any()


def test_a_crop_that_shrinks_skips_no_pixel() -> None:
    pixels = torch.zeros(1, 3, 400, 400, requires_grad=True)
    aligned(pixels, [(112 / 400 + 0j, 0j)]).sum().backward()
    assert bool((pixels.grad[:, :, 2:-2, 2:-2] > 0).all())


def test_black_lies_beyond_the_edge() -> None:
    crop = aligned(torch.ones(1, 3, 20, 20), [(1 + 0j, 56 + 0j)])
    assert float(crop[0, 0, 5, 5]) == -1
    assert float(crop[0, 0, 5, 60]) == pytest.approx(1)


def test_all_faces_of_a_step_are_one_call_and_the_truth_is_looked_at_once(detector: Detector) -> None:
    pictures = [fakes.drawn(fakes.posed(*pose), HEIGHT, WIDTH) for pose in POSES]
    network, counting = ArcFace(), Counting(detector)
    net = FaceNet(network, counting, truth_of(*pictures))  # type: ignore[arg-type]
    rows = [0, 1, 2, 3]
    vectors = net.of_truth(rows, SIZE, CPU)
    assert (counting.calls, network.seen) == (4, 4)
    for step in range(1, 4):
        found = net(as_pixels(*pictures), rows)
        assert torch.allclose(found, vectors, atol=1e-5)
        assert (network.calls, network.seen) == (4 + step, 4 + 4 * step)
        net.of_truth(rows, SIZE, CPU)
    assert counting.calls == 4


def test_the_prediction_is_cut_out_where_the_truth_has_its_face(detector: Detector) -> None:
    face = fakes.drawn(fakes.posed(*POSES[1]), HEIGHT, WIDTH)
    moved = fakes.drawn(fakes.posed(*POSES[2]), HEIGHT, WIDTH)
    net = FaceNet(ArcFace(), detector, truth_of(face))
    a, b = similarity(detector(face), template())
    expected = nn.functional.normalize(ArcFace()(aligned(as_pixels(moved), [(a, b)])), dim=-1)
    assert torch.allclose(net(as_pixels(moved), [0]), expected, atol=1e-5)


def test_a_picture_without_a_face_is_named_once_and_never_cut(
    detector: Detector, caplog: pytest.LogCaptureFixture
) -> None:
    face, empty = fakes.drawn(fakes.posed(*POSES[0]), HEIGHT, WIDTH), fakes.nobody(HEIGHT, WIDTH)
    network, counting = ArcFace(), Counting(detector)
    net = FaceNet(network, counting, truth_of(face, empty))  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING):
        assert [[net.sees(row, SIZE) for row in (0, 1)] for _ in range(2)] == [[True, False]] * 2
        assert not net.sees(1, (64, 64))  # at another size
    assert counting.calls == 3
    told = [record.message for record in caplog.records if record.name.startswith("trainer.")]
    assert [f"sha256:{1:064x}" in message for message in told] == [True]
    with pytest.raises(ValueError, match="shows no face"):
        net(as_pixels(face, face), [0, 1])
    assert network.calls == 0


def test_arcface_learns_nothing(detector: Detector) -> None:
    face = fakes.drawn(fakes.posed(*POSES[0]), HEIGHT, WIDTH)
    network = ArcFace()
    net = FaceNet(network, detector, truth_of(face))
    pixels = as_pixels(face).requires_grad_()
    net(pixels, [0])[:, 3:].sum().backward()
    assert float(pixels.grad.abs().sum()) > 0
    assert network.weight.grad is None
    assert not net.of_truth([0], SIZE, CPU).requires_grad


def test_a_file_that_is_no_detector_is_explained(scrfd: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no network")
    with pytest.raises(BaseModelError, match="cannot be used"):
        Detector(tmp_path / "broken.onnx")
    model = onnx.load(str(scrfd))
    del model.graph.output[6:]
    onnx.save(model, str(tmp_path / "blind.onnx"))
    with pytest.raises(BaseModelError, match="no landmarks"):
        Detector(tmp_path / "blind.onnx")


@pytest.mark.parametrize("pose", POSES[:2])
def test_an_embedding_is_what_insightface_itself_computes(detector: Detector, pose: tuple) -> None:
    """Detection, alignment, order of colours and normalisation together, for the same ONNX file."""
    rng = np.random.default_rng(1)
    picture = fakes.drawn(fakes.posed(*pose), HEIGHT, WIDTH)
    picture[100:] = rng.integers([0, 0, 128], [100, 100, 255], (20, 1, 3))  # blue stripes below the face
    recogniser = ArcFaceONNX(str(judges.path("identity")))
    blue_first = np.ascontiguousarray(picture[..., ::-1])
    crop = face_align.norm_crop(blue_first, detector(picture).astype(np.float32))
    expected = recogniser.get_feat(crop)[0]
    net = FaceNet(onnx_module.load(judges.path("identity")), detector, truth_of(picture))
    found = net.of_truth([0], SIZE, CPU)[0].numpy()
    assert found @ expected / np.linalg.norm(expected) > 0.999
