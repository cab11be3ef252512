"""Whose face a picture shows: unit vectors by the same encoders that the identity loss looks through."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from trainer.errors import DataError

if TYPE_CHECKING:
    from registry.manifest import Ingredient
    from trainer.recipe import Recipe


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
        import torch
        import torch.nn.functional as F

        whole = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        if self._detector is None:
            side = (self._side, self._side)
            seen = whole if whole.shape[-2:] == side else F.interpolate(
                whole, size=side, mode="bilinear", antialias=True
            )  # fmt: skip
        else:
            from trainer.faces import aligned, similarity, template

            landmarks = self._detector(pixels)
            if landmarks is None:
                return None
            seen = aligned(whole, [similarity(landmarks, template())])
        with torch.no_grad():
            return F.normalize(self._network(seen), dim=-1, eps=1e-6)[0].numpy()


@lru_cache(maxsize=1)
def faces(name: str) -> Faces:
    """Return an encoder; the last one stays loaded in this process. See `Faces`."""
    return Faces(name)
