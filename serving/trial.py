"""A small edit that nobody asked for: it tells whether an adapter and a device work."""

from __future__ import annotations

from typing import TYPE_CHECKING

from serving.conditioning import strength_of
from serving.schema import SweepRequest

if TYPE_CHECKING:
    from registry.admission import VerifiedAdapter
    from serving.adapters import Stack


def trial(adapter: VerifiedAdapter) -> tuple[SweepRequest, Stack]:
    """Return an edit of one step, and the adapters that answer it."""
    from PIL import Image

    grey = Image.new("RGB", (64, 64), (128, 128, 128))
    stack = ((adapter, strength_of(adapter.card.conditioning)),)
    return SweepRequest.make(image=grey, rows=({},), steps=1), stack
