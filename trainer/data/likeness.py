"""Whose face a picture shows: unit vectors by the same encoders that the identity loss looks through."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Final

import numpy as np

from trainer.errors import DataError

if TYPE_CHECKING:
    import torch

    from registry.manifest import Ingredient
    from trainer.recipe import Recipe

_AT_ONCE: Final = 16  # faces in one pass: more of them do not fit into a core's cache and are slower


def encoder_of(recipe: Recipe) -> str | None:
    """Return which encoder the recipe's filters look through; None where they look at no face.

    Raises:
        DataError: faces of real people are asked for, and no encoder for them.
    """
    filters = recipe.data.filters
    if filters.face_encoder is None and filters.min_identity is not None and recipe.data.source != "renderer":
        raise DataError(
            "data.filters.min_identity needs to know who tells real people apart",
            "write data.filters.face_encoder: buffalo_l or antelopev2 (mind their licences), or portraits",
        )
    if filters.face_encoder is None and filters.min_identity is None:
        return None
    return filters.face_encoder or "portraits"


class Faces:
    """An identity encoder.

    Args:
        name: see `trainer.encoders.identity`.

    Attributes:
        ingredients: what the adapter's card must name.
        finds: whether it looks for a face; one that does not looks at the whole picture.

    Raises:
        BaseModelError: the encoder is not on this machine.
        ModelLicenseError: it comes with a licence file that does not hold.
    """

    def __init__(self, name: str) -> None:
        from trainer import encoders, onnx_module

        encoder = encoders.identity(name)
        self.ingredients: tuple[Ingredient, ...] = encoder.ingredients
        self.finds = encoder.detector is not None
        self._side = encoder.side
        self._network = onnx_module.load(encoder.file).eval().requires_grad_(False)
        self._detector = None
        if encoder.detector is not None:
            from trainer.faces import Detector

            self._detector = Detector(encoder.detector)

    def vector(self, pixels: np.ndarray) -> np.ndarray | None:
        """Return the unit vector of the most prominent face, float32 [D], or None if there is no face.

        Args:
            pixels: uint8 [H, W, 3] RGB.
        """
        return self.vectors([pixels])[0]

    def vectors(self, pictures: Sequence[np.ndarray]) -> list[np.ndarray | None]:
        """Return what `vector` returns of each picture; the network looks at several at once.

        Args:
            pictures: each uint8 [H, W, 3] RGB, of any size.
        """
        import torch
        import torch.nn.functional as F

        found: list[np.ndarray | None] = [None] * len(pictures)
        for start in range(0, len(pictures), _AT_ONCE):
            rows, seen = list[int](), list[torch.Tensor]()
            for row in range(start, min(start + _AT_ONCE, len(pictures))):
                face = self._face(pictures[row])
                if face is not None:
                    rows.append(row)
                    seen.append(face)
            if not rows:
                continue
            with torch.inference_mode():
                units = F.normalize(self._network(torch.cat(seen)), dim=-1, eps=1e-6).numpy()
            for row, unit in zip(rows, units, strict=True):
                found[row] = unit.copy()
        return found

    def _face(self, pixels: np.ndarray) -> torch.Tensor | None:
        """Return what the network looks at, [1, 3, side, side] in [-1, 1]; None if there is no face."""
        import torch
        import torch.nn.functional as F

        whole = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        if self._detector is None:
            side = (self._side, self._side)
            if whole.shape[-2:] == side:
                return whole
            return F.interpolate(whole, size=side, mode="bilinear", antialias=True)
        from trainer.faces import aligned, similarity, template

        landmarks = self._detector(pixels)
        return None if landmarks is None else aligned(whole, [similarity(landmarks, template())])


@lru_cache(maxsize=1)
def faces(name: str) -> Faces:
    """Return an encoder; the last one stays loaded in this process. See `Faces`."""
    return Faces(name)
