"""The generator that draws portraits: free, deterministic, and the truth is known."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import ClassVar

import numpy as np

from trainer.portraits.renderer import identity, one_hot, pose, render
from trainer.synthesis.source import PortraitRequest

_CHUNK = 64
_WORTH_A_PROCESS = 512


class PortraitRenderer:
    """`Generator` that draws with `trainer.portraits.renderer`; many requests are shared between processes.

    Args:
        workers: processes; None takes one a core, up to four.
        license: licence under which the drawn people are used.
    """

    name: ClassVar[str] = "portrait-renderer/1"
    origin: ClassVar[str] = "drawn by trainer.portraits.renderer; no real person is depicted"

    def __init__(self, workers: int | None = None, license: str = "Apache-2.0") -> None:
        self.license = license
        self._workers = min(4, os.cpu_count() or 1) if workers is None else workers

    def generate(self, requests: Sequence[PortraitRequest]) -> Iterator[np.ndarray]:
        """See `Generator`."""
        if self._workers < 2 or len(requests) < _WORTH_A_PROCESS:
            yield from map(draw, requests)
            return
        from concurrent.futures import ProcessPoolExecutor
        from multiprocessing import get_context

        # Not forked: a fork of a process that runs torch threads can hang.
        with ProcessPoolExecutor(self._workers, get_context("spawn")) as pool:
            chunks = [requests[start : start + _CHUNK] for start in range(0, len(requests), _CHUNK)]
            yield from chain.from_iterable(pool.map(_draw_chunk, chunks))

    def truth(self, request: PortraitRequest) -> list[float]:
        """See `Generator`."""
        return [float(value) for value in one_hot(request.expression or "neutral", request.intensity)]


def draw(request: PortraitRequest) -> np.ndarray:
    """Return the picture of one request, uint8 [size, size, 3]."""
    person = identity(request.identity, request.domain)  # type: ignore[arg-type]
    vector = one_hot(request.expression or "neutral", request.intensity)
    return render(person, vector, request.size, pose(request.pose))


def _draw_chunk(requests: Sequence[PortraitRequest]) -> list[np.ndarray]:
    return [draw(request) for request in requests]
