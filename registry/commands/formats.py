"""Commands for LoRA files of other programs: import, convert."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import click

from registry.commands import Answer, command, table

if TYPE_CHECKING:
    from registry.dialects.files import Imported

_DTYPE = click.option(
    "--dtype", type=click.Choice(["F16", "BF16", "F32"]), help="Dtype to write; the file's own by default."
)
_ALPHA = click.option("--alpha", type=float, help="Alpha of the training, for a file that does not state it.")


@functools.partial(command, name="import")
@click.argument("file", type=click.Path(exists=True, dir_okay=False))
@click.option("--base", required=True, help="Id of the base model that it was trained on.")
@click.option("--output", required=True, type=click.Path(), help="Adapter folder to make.")
@click.option("--card", type=click.Path(exists=True, dir_okay=False), help="Its adapter card.")
@_ALPHA
@_DTYPE
def import_(
    file: str, base: str, output: str, card: str | None, alpha: float | None, dtype: str | None
) -> Answer:
    """Make an adapter folder of a LoRA FILE of another program.

    Reads the dialects of diffusers, PEFT, kohya, ComfyUI, DiffSynth, LightX2V, OneTrainer and the released
    PixelSmile, and refuses what it cannot map whole. Without a card the folder gets a draft to fill in.

    Example: registry import lora.safetensors --base Qwen/Qwen-Image-Edit-2511 --output imported
    """
    from pathlib import Path

    from registry.dialects.cards import DRAFT_NAME
    from registry.dialects.files import import_file
    from registry.manifest import CARD_NAME

    made = import_file(
        Path(file), base, Path(output), card=None if card is None else Path(card), alpha=alpha, dtype=dtype
    )
    data = _data(made) | {
        "card": CARD_NAME if card else DRAFT_NAME,
        "open_fields": list(made.open_fields),
    }
    text = _text(made)
    if made.open_fields:
        text += (
            f"\n\n{Path(output) / DRAFT_NAME} is a draft. Check what the file's own tags filled in, fill in "
            f"these fields, and rename it to {CARD_NAME}:\n"
        ) + "\n".join(f"  {field}" for field in made.open_fields)
    return Answer(data, text)


@command
@click.argument("source", type=click.Path(exists=True))
@click.option(
    "--to",
    required=True,
    type=click.Choice(["kohya", "comfyui", "peft", "diffsynth", "diffusers"]),
    help="Dialect to write.",
)
@click.option("--output", required=True, type=click.Path(), help="File to make.")
@click.option("--base", help="Id of the base model; an adapter folder names its own.")
@_ALPHA
@_DTYPE
def convert(
    source: str, to: str, output: str, base: str | None, alpha: float | None, dtype: str | None
) -> Answer:
    """Write SOURCE, an adapter folder or a LoRA file, in another dialect.

    Example: registry convert adapter --to kohya --output lora.safetensors
    """
    from pathlib import Path

    from registry.dialects.files import convert_file

    made = convert_file(Path(source), to, Path(output), base=base, alpha=alpha, dtype=dtype)
    return Answer(_data(made) | {"to": to}, _text(made))


def _data(made: Imported) -> dict[str, Any]:
    lora = made.lora
    return {
        "path": str(made.path),
        "digest": str(made.digest),
        "dialect": lora.dialect,
        "base": lora.base.id,
        "modules": len(lora.updates),
        "targets": [*lora.targets],
        "rank": lora.rank,
        "ranks": [*lora.ranks],
        "dtype": made.dtype,
        "alpha": lora.alpha,
        "strength": {
            "scales": [*lora.scales],
            "source": lora.source,
            "ratio": made.written.ratio,
            "exact": made.written.exact,
        },
    }


def _text(made: Imported) -> str:
    lora, scales = made.lora, made.lora.scales
    folded = f"{scales[0]:g}" if len(scales) == 1 else f"{scales[0]:g} to {scales[-1]:g}, module by module"
    exactly = "every number exactly" if made.written.exact else "rounded to the nearest"
    rank = f"{lora.rank}" if len(lora.ranks) == 1 else f"{lora.rank}, lower ones padded with zeros"
    rows = [
        ("dialect", lora.dialect),
        ("modules", f"{len(lora.updates)} of {len(lora.base.spec)} of {lora.base.id}"),
        ("rank", rank),
        ("strength", f"{folded} x B @ A, stated by {lora.source}"),
        ("written", f"{made.dtype}, {made.written.ratio:.6f} of that strength, {exactly}"),
        ("digest", str(made.digest)),
    ]
    return f"{made.path}\n{table(rows)}"


COMMANDS = (import_, convert)
