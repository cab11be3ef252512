"""What changed where no expression should change anything: outside of the face.

Both measures compare the source with a picture that is the source inside of the face and the edit outside of
it, so that a face that changed as it was asked to cannot count, not even where a window reaches into it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from registry.digest import Digest, digest_bytes
from trainer.errors import BaseModelError

if TYPE_CHECKING:
    import torch

Array = NDArray[np.float64]

_LUMA: Final = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601
_WINDOW: Final = 11
_C1: Final = (0.01 * 255) ** 2
_C2: Final = (0.03 * 255) ** 2
_AT_ONCE: Final = 16


def outside_only(
    source: NDArray[np.uint8], edits: NDArray[np.uint8], outside: NDArray[np.bool_]
) -> NDArray[np.uint8]:
    """Return the edits with the source's face: uint8 [N, H, W, 3].

    Args:
        source: uint8 [H, W, 3].
        edits: uint8 [N, H, W, 3].
        outside: [H, W], True outside of the face.
    """
    return np.where(outside[..., None], edits, source)


def background_ssim(source: NDArray[np.uint8], edits: NDArray[np.uint8], outside: NDArray[np.bool_]) -> Array:
    """Structural similarity of source and edits outside of the face, [N].

    Formula: the mean over the places outside of the face of
    SSIM(x, y) = (2 mx my + C1)(2 sxy + C2) / ((mx^2 + my^2 + C1)(sx^2 + sy^2 + C2)) on luma, with a Gaussian
    window of 11 x 11 (sigma 1.5), C1 = (0.01 L)^2, C2 = (0.03 L)^2, L = 255.
    Range: -1 to 1, 1 is unchanged. NaN where nothing is outside, or a side has fewer than 11 pixels.
    Source: Wang et al., "Image quality assessment", IEEE TIP 2004.

    Args:
        source: uint8 [H, W, 3].
        edits: uint8 [N, H, W, 3].
        outside: [H, W], True outside of the face.
    """
    if not outside.any() or min(outside.shape) < _WINDOW:
        return np.full(len(edits), np.nan)
    x, y = (source @ _LUMA)[None], outside_only(source, edits, outside) @ _LUMA
    mean_x, mean_y = _blurred(x), _blurred(y)
    xx, yy, xy = _blurred(x * x) - mean_x**2, _blurred(y * y) - mean_y**2, _blurred(x * y) - mean_x * mean_y
    means = (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
    return np.asarray((means * (2 * xy + _C2) / (xx + yy + _C2))[:, outside].mean(axis=1), np.float64)


def _blurred(pictures: NDArray[np.float32]) -> NDArray[np.float32]:
    """Means [N, H, W] under a Gaussian window of 11 x 11 around each place; pictures go on mirrored."""
    from skimage.filters import gaussian

    sigma, reach = 1.5, _WINDOW // 2 / 1.5
    blurred: NDArray[np.float32] = gaussian(
        pictures, sigma=(0, sigma, sigma), truncate=reach, mode="reflect", preserve_range=True
    )
    return blurred


@dataclass(frozen=True, slots=True)
class Perceptual:
    """A network whose features tell how far apart pictures look (LPIPS; see `trainer.perceptual`).

    Attributes:
        name: what reports call it.
        digest: of its weights' file.
        stack: from pictures [N, 3, H, W] in [-1, 1] to the maps of each layer.
        weights: of the channels [C], one a layer.
        side: pictures are resized to that many pixels; 0 takes them as they are.
    """

    name: str
    digest: Digest
    stack: torch.nn.Module
    weights: tuple[torch.Tensor, ...]
    side: int

    def distance(
        self, source: NDArray[np.uint8], edits: NDArray[np.uint8], outside: NDArray[np.bool_]
    ) -> Array:
        """Perceptual distance of source and edits outside of the face, [N]; 0 is unchanged.

        Formula: LPIPS of the source and the source with the edit's outside, divided by the share of the
        picture that is outside, which makes small and large faces comparable. NaN where nothing is outside.

        Args:
            source: uint8 [H, W, 3].
            edits: uint8 [N, H, W, 3].
            outside: [H, W], True outside of the face.
        """
        import torch

        from trainer.perceptual import distance

        if not outside.any():
            return np.full(len(edits), np.nan)
        seen = outside_only(source, edits, outside)
        with torch.inference_mode():
            here = self.stack(self._tensor(source[None]))
            parts = [
                distance(here, self.stack(self._tensor(seen[start : start + _AT_ONCE])), self.weights)
                for start in range(0, len(seen), _AT_ONCE)
            ]
            return torch.cat(parts).double().numpy() / float(outside.mean())

    def _tensor(self, pictures: NDArray[np.uint8]) -> torch.Tensor:
        import torch
        import torch.nn.functional as F

        pixels = torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))).float() / 127.5 - 1
        if not self.side or pixels.shape[-2:] == (self.side, self.side):
            return pixels
        return F.interpolate(pixels, size=(self.side, self.side), mode="bilinear", antialias=True)


@lru_cache(maxsize=2)
def perceptual(drawn: bool) -> Perceptual | None:
    """Return the network for drawn portraits, or for photographs; None where it is not on this machine.

    Drawn portraits are compared by the convolutions of the evaluation's judge, all channels alike: no loss
    looks through them, as losses do through those of the labelling judge. Photographs are compared by LPIPS
    with AlexNet, as its authors advise.

    Raises:
        BaseModelError: the network's file is damaged.
    """
    import torch

    from trainer import encoders, onnx_module
    from trainer.perceptual import load_lpips

    if drawn:
        from trainer.portraits import judges

        file, side = judges.path("evaluation"), 64
        stack = onnx_module.load_stack(file).eval()
        with torch.inference_mode():
            maps = stack(torch.zeros(1, 3, side, side))
        weights = tuple(torch.full((one.shape[1],), 1 / len(maps)) for one in maps)
        digest = digest_bytes(file.read_bytes())
        return Perceptual("convolutions of the evaluation-judge", digest, stack, weights, side)
    try:
        encoder = encoders.perceptual("lpips-alex")
    except BaseModelError:
        return None
    network, linear = load_lpips("lpips-alex", encoder.file, torch.device("cpu"))
    assert encoder.ingredient.digest is not None, "an encoder of this machine is a file"
    return Perceptual("lpips-alex", encoder.ingredient.digest, network, tuple(linear), 0)
