"""Faces in pictures: found once in the true picture, cut out of the prediction with a gradient.

InsightFace's SCRFD detector (Guo et al., arXiv 2105.04714) gives five landmarks of the true picture. The
similarity that moves them onto ArcFace's template is used for the prediction too: both members of the
comparison are aligned alike, and no detector runs in the step.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F

from serving.pipelines.base import Size
from trainer import encoders
from trainer.encoders import ARCFACE_SIDE
from trainer.errors import BaseModelError
from trainer.identity import FeatureNet, Truth

_LOG = logging.getLogger(__name__)
_FINEST: Final = 4
"""A crop averages at most that many samples a side for each of its pixels."""


class Detector:
    """InsightFace's own face detector, on the CPU: every process must find the same faces.

    Args:
        file: an SCRFD network with landmarks.

    Raises:
        BaseModelError: insightface is missing, or the file is no such network.
    """

    def __init__(self, file: Path) -> None:
        try:
            from insightface.model_zoo import SCRFD

            self._model = SCRFD(str(file))
            self._model.prepare(-1)
        except Exception as error:  # onnxruntime raises errors of its own for every damage
            raise BaseModelError(
                f"the face detector {file} cannot be used: {error}",
                "install insightface as requirements-nodeps.txt tells and unpack the model pack again",
            ) from error
        if not self._model.use_kps:
            raise BaseModelError(
                f"the face detector {file} gives no landmarks", "unpack InsightFace's model pack again"
            )

    def __call__(self, picture: np.ndarray) -> np.ndarray | None:
        """Return the landmarks of the most prominent face, or None.

        Args:
            picture: uint8 [H, W, 3], RGB.

        Returns:
            float64 [5, 2]: x and y in pixels of eyes, nose and corners of the mouth.
        """
        blue_first = np.ascontiguousarray(picture[..., ::-1])  # it expects what OpenCV reads
        _, landmarks = self._model.detect(blue_first, max_num=1)
        return None if landmarks is None or not len(landmarks) else landmarks[0].astype(np.float64)


def template() -> np.ndarray:
    """Return where ArcFace expects the five landmarks: float64 [5, 2], x and y in its 112 pixels."""
    from insightface.utils.face_align import arcface_dst

    return np.asarray(arcface_dst, np.float64)


def similarity(landmarks: np.ndarray, target: np.ndarray) -> tuple[complex, complex]:
    """Return the similarity p -> a p + b that moves landmarks [K, 2] next to a target [K, 2].

    Points x + i y are numbers; then the least squares of Umeyama (1991) in the plane are one division.
    """
    points, wanted = landmarks @ (1, 1j), target @ (1, 1j)
    centre, goal = points.mean(), wanted.mean()
    a = np.vdot(points - centre, wanted - goal) / np.vdot(points - centre, points - centre)
    return complex(a), complex(goal - a * centre)


def aligned(
    pixels: torch.Tensor, moves: Sequence[tuple[complex, complex]], side: int = ARCFACE_SIDE
) -> torch.Tensor:
    """Cut faces out of pictures; differentiable.

    Args:
        pixels: pictures [N, 3, H, W] in [-1, 1]; black beyond their edges.
        moves: of each picture, a similarity from its pixels to those of the crop.
        side: of the crop in pixels.

    Returns:
        crops [N, 3, side, side]. One that shrinks its picture averages, so no pixel of a face is skipped.
    """
    height, width = pixels.shape[-2:]
    fine = min(_FINEST, max(1, *(round(1 / abs(a)) for a, _ in moves)))
    line = (np.arange(side * fine) + 0.5) / fine - 0.5
    places = line[None, :] + 1j * line[:, None]
    sources = np.stack([(places - b) / a for a, b in moves])
    grid = np.stack([2 * sources.real / (width - 1) - 1, 2 * sources.imag / (height - 1) - 1], -1)
    crops = F.grid_sample(
        pixels + 1, torch.from_numpy(grid).to(pixels), mode="bilinear", padding_mode="zeros",
        align_corners=True,
    )  # fmt: skip
    return F.avg_pool2d(crops, fine) - 1


class FaceNet(FeatureNet):
    """ArcFace on aligned faces. Where the true picture shows no face, nothing is looked at.

    Args:
        network: from float [N, 3, 112, 112] in [-1, 1] to [N, D].
        detector: finds the landmarks of true pictures, once each.
        truth: the true pictures.
        encoder: names what the adapter's card says about both networks.
    """

    takes_faces = True

    def __init__(
        self,
        network: torch.nn.Module,
        detector: Detector,
        truth: Truth,
        encoder: encoders.Encoder | None = None,
    ) -> None:
        super().__init__(network, ARCFACE_SIDE, truth, encoder)
        self._detector = detector
        self._named: set[int] = set()
        self._moves: dict[tuple[int, Size], tuple[complex, complex] | None] = {}

    def sees(self, row: int, size: Size) -> bool:
        """Return whether a true picture shows a face."""
        return self._move(row, size) is not None

    def __call__(self, pixels: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """See `FeatureNet`; all faces go through the network at once.

        Raises:
            ValueError: one of the true pictures shows no face.
        """
        moves = [self._move(row, (pixels.shape[-2], pixels.shape[-1])) for row in rows]
        found = [move for move in moves if move is not None]
        if len(found) < len(rows):
            raise ValueError("ask `sees` first: one of these pictures shows no face")
        return F.normalize(self._network(aligned(pixels.float(), found)), dim=-1, eps=1e-6)

    def _move(self, row: int, size: Size) -> tuple[complex, complex] | None:
        """Return how the face of a true picture is aligned; None if it shows none."""
        if (row, size) not in self._moves:
            landmarks = self._detector(self._truth.fitted([row], size)[0])
            self._moves[row, size] = None if landmarks is None else similarity(landmarks, template())
            if landmarks is None and row not in self._named:
                self._named.add(row)
                digest = self._truth.digests[row]
                _LOG.warning("no face was found in the picture %s: the identity loss skips it", digest)
        return self._moves[row, size]
