"""The portrait world's judges: ONNX networks that read expressions and identities from 64-pixel portraits.

Two expression judges exist, trained apart on different people and with different widths: ``label`` scores
training data, ``evaluation`` judges edits. The identity encoder has ArcFace's interface
(`insightface.model_zoo` loads it as it loads glintr100): RGB [N, 3, 112, 112] in [-1, 1] -> embedding [N,
128].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

Kind = Literal["label", "evaluation", "identity"]
IDENTITY_SIDE = 112


def path(kind: Kind) -> Path:
    """The ONNX file of a shipped judge."""
    return Path(__file__).with_name("weights") / "judges" / f"{kind}.onnx"


@cache
def _session(file: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def _batches(images: np.ndarray, run: Callable[[np.ndarray], np.ndarray], size: int = 64) -> np.ndarray:
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise ValueError(f"judges take uint8 images [N, H, W, 3], not {images.dtype} {list(images.shape)}")
    return np.concatenate([run(images[i : i + size]) for i in range(0, len(images), size)])


def resized(images: np.ndarray, side: int) -> np.ndarray:
    """Images resized to `side` with bilinear filtering, uint8 [N, side, side, 3]."""
    if images.shape[1:3] == (side, side):
        return images
    from PIL import Image

    filtered = Image.Resampling.BILINEAR
    return np.stack([np.asarray(Image.fromarray(image).resize((side, side), filtered)) for image in images])


def _network_input(images: np.ndarray, side: int) -> np.ndarray:
    return np.ascontiguousarray(resized(images, side).transpose(0, 3, 1, 2)).astype(np.float32) / 127.5 - 1


class ExpressionJudge:
    """Reads the 12 intensities of `EXPRESSIONS` from portraits."""

    def __init__(self, file: Path):
        self.file = file

    @classmethod
    def load(cls, kind: Literal["label", "evaluation"]) -> ExpressionJudge:
        """The shipped judge of `kind`."""
        return cls(path(kind))

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Intensities [N, 12] float32, about 0 to 1.2, of uint8 images [N, H, W, 3].

        Raises:
            ValueError: the images have another shape or type.
        """
        session = _session(self.file)
        return _batches(images, lambda rows: session.run(None, {"image": _network_input(rows, 64)})[0])


class IdentityEncoder:
    """Maps portraits to unit vectors whose cosine tells whether they show the same person."""

    def __init__(self, file: Path):
        self.file = file

    @classmethod
    def load(cls) -> IdentityEncoder:
        """The shipped encoder."""
        return cls(path("identity"))

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Unit vectors [N, 128] float32 of uint8 images [N, H, W, 3].

        Raises:
            ValueError: the images have another shape or type.
        """
        session = _session(self.file)

        def run(rows: np.ndarray) -> np.ndarray:
            vectors = session.run(None, {"input.1": _network_input(rows, IDENTITY_SIDE)})[0]
            return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

        return _batches(images, run)
