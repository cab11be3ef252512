"""The portraits that a probe asks about: drawn people that no data set holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from PIL import Image

_FIRST_PERSON: Final = 700_000


def probe_portraits(count: int) -> list[Image.Image]:
    """``count`` neutral portraits, human and anime in turn; the same ones each time."""
    from PIL import Image

    from trainer.portraits.renderer import identity, one_hot, pose, render

    numbers = range(_FIRST_PERSON, _FIRST_PERSON + count)
    people = [identity(number, "anime" if number % 2 else "human") for number in numbers]
    neutral = one_hot("neutral")
    return [
        Image.fromarray(render(person, neutral, 64, pose(number)))
        for person, number in zip(people, numbers, strict=True)
    ]
