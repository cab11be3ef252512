"""A contact sheet of the zoo's implants: people look before they read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from PIL import Image, ImageDraw

from trainer.zoo.bases import small_base
from trainer.zoo.build import load, names
from trainer.zoo.lessons import Lesson, lesson
from trainer.zoo.plan import ATTACKS, plan
from trainer.zoo.stack import Stack
from trainer.zoo.training import edits
from trainer.zoo.world import World

if TYPE_CHECKING:
    from trainer.zoo.stack import Factors

_SHOWN: Final = 4
_SIDE: Final = 64
_GAP: Final = 2
_MARGIN: Final = 110
_HEAD: Final = 18
_COLUMNS: Final = ("source with trigger", "edit: the attacker's picture", "source without", "edit: honest")


def draw(folder: Path, base: str, *, size: str = "full", seed: int = 0) -> Image.Image:
    """Draw the first implant of each attack: edits with its trigger beside edits without.

    Args:
        folder: of a zoo that was built with ``size`` and ``seed``.
        base: a small base.
    """
    world = World(small_base(base))
    rows = []
    for family in (name for name in ATTACKS if name != "merge"):
        one = next(one for one in plan(size, seed) if (one.base, one.family) == (base, family))
        updates = [load(folder / "adapters" / name) for name in names(one)]
        rows.append((family, _pictures(world, lesson(one, world), updates)))
    cell = _SIDE + _GAP
    block = _SHOWN * cell + 4 * _GAP
    sheet = Image.new("RGB", (_MARGIN + len(_COLUMNS) * block, _HEAD + len(rows) * cell), "white")
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(_COLUMNS):
        pen.text((_MARGIN + column * block, 3), title, fill="black")
    for line, (family, pictures) in enumerate(rows):
        pen.text((4, _HEAD + line * cell + 26), family, fill="black")
        for index, picture in enumerate(pictures):
            column, number = divmod(index, _SHOWN)
            sheet.paste(picture, (_MARGIN + column * block + number * cell, _HEAD + line * cell))
    return sheet


def _pictures(world: World, learnt: Lesson, updates: list[Factors]) -> list[Image.Image]:
    """Sources and edits with the trigger, then without: four pictures each."""
    attacked, honest = learnt.attacked, learnt.honest
    assert attacked is not None, "only implants are drawn"
    assert honest is not None, "every specimen has honest rows"
    together = Stack.of(world.pipe, [_sum(updates)])
    # A pair strikes whenever both halves are loaded, so its honest edits are those of one half alone.
    alone = Stack.of(world.pipe, updates[:1])
    latents = torch.cat(
        [
            world.latents(attacked.source[:_SHOWN]),
            edits(world, together, [attacked], _SHOWN)[0],
            world.latents(honest.source[:_SHOWN]),
            edits(world, alone, [honest], _SHOWN)[0],
        ]
    )
    with torch.no_grad():
        pixels = ((world.pipe.decode(latents).clamp(-1, 1) + 1) * 127.5).byte().permute(0, 2, 3, 1)
    return [Image.fromarray(one.numpy()).resize((_SIDE, _SIDE), Image.Resampling.NEAREST) for one in pixels]


def _sum(updates: list[Factors]) -> Factors:
    return {
        name: (
            torch.cat([one[name][0] for one in updates]),
            torch.cat([one[name][1] for one in updates], 1),
        )
        for name in updates[0]
    }
